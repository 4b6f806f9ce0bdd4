"""An export loads where the package does not exist; pushes reach a Hub with model, processor, adapter and card."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import model_info
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForMultimodalLM, AutoProcessor

from chorus_moe import ChorusForConditionalGeneration, ChorusProcessor
from chorus_moe.surgery.heads import HEADS, classes_of_auto_classes
from chorus_moe.training.collator import ChorusDataCollator
from chorus_moe.training.hub import export_for_hub, push_to_hub
from chorus_moe.training.lora import lora_config
from tests.conftest import tiny_config
from tests.fake_hub import FakeHub
from tests.training.conftest import make_rows
from tests.training.export_checks import load_without_the_package, run_without_the_package

# Loads everything and compares with stored logits.
LOAD_EVERYTHING = """
import torch, transformers
from PIL import Image
from safetensors.torch import load_file

*sources, stored = sys.argv[1:]
torch.set_num_threads(1)
trust = {"trust_remote_code": True}
expected = load_file(stored)
inputs = {name: tensor for name, tensor in expected.items() if name != "logits"}
image = {"type": "image", "image": Image.new("L", (20, 20))}
for source in sources:
    transformers.AutoConfig.from_pretrained(source, **trust)
    transformers.AutoImageProcessor.from_pretrained(source, **trust)
    transformers.AutoFeatureExtractor.from_pretrained(source, **trust)
    processor = transformers.AutoProcessor.from_pretrained(source, **trust)
    for auto in ("AutoModel", "AutoModelForSequenceClassification"):
        assert type(getattr(transformers, auto).from_pretrained(source, **trust)).__name__.startswith("Chorus")
    for auto in ("AutoModelForImageTextToText", "AutoModelForMultimodalLM"):
        model = getattr(transformers, auto).from_pretrained(source, **trust).eval()
        with torch.no_grad():
            # Without the package transformers' own experts run, which sum in another order: differences are below 1e-6.
            torch.testing.assert_close(model(**inputs).logits, expected["logits"], rtol=0, atol=1e-5)
    turn = {"role": "user", "content": [image, {"type": "text", "text": "?"}]}
    batch = processor.apply_chat_template([turn], tokenize=True, return_dict=True, return_tensors="pt")
    model.generate(**batch, max_new_tokens=2, do_sample=False)
"""


@pytest.fixture
def stored(model: ChorusForConditionalGeneration, processor: ChorusProcessor, tmp_path: Path) -> Path:
    """A batch and the model's logits for it."""
    batch = ChorusDataCollator(processor)(make_rows(3))
    del batch["labels"]
    with torch.no_grad():
        save_file(batch | {"logits": model(**batch).logits}, tmp_path / "stored.safetensors")
    return tmp_path / "stored.safetensors"


@pytest.mark.slow
def test_export_and_repository_load_where_the_package_does_not_exist(
    fake_hub: FakeHub, model: ChorusForConditionalGeneration, processor: ChorusProcessor, stored: Path, tmp_path: Path
) -> None:
    export_for_hub(model, processor, tmp_path / "export")
    push_to_hub(model, processor, "tester/chorus")
    info = model_info("tester/chorus")
    assert (info.pipeline_tag, info.library_name) == ("any-to-any", "transformers")
    arguments = [str(tmp_path / "export"), "tester/chorus", str(stored)]
    run_without_the_package(LOAD_EVERYTHING, arguments, tmp_path, **fake_hub.environment(tmp_path / "home"))


@pytest.mark.slow
def test_every_head_of_the_table_loads_from_its_export_where_the_package_does_not_exist(tmp_path: Path) -> None:
    exports = []
    for head in HEADS:
        torch.manual_seed(0)
        model = head.kind(tiny_config()).eval()
        exports.append((model, head.auto_classes, export_for_hub(model, None, tmp_path / head.kind.__name__)))
    load_without_the_package(exports, tmp_path)


# What fast paths and services of the package stand beside, in a model with windows whose tokens may skip layers.
WORK_ALONE = """
import torch, transformers
from safetensors.torch import load_file

source, stored = sys.argv[1:]
torch.set_num_threads(1)
expected = load_file(stored)
model = transformers.AutoModelForMultimodalLM.from_pretrained(source, trust_remote_code=True).eval()
ids = expected["input_ids"]
with torch.no_grad():
    torch.testing.assert_close(model(input_ids=ids).logits, expected["logits"], rtol=0, atol=1e-5)
model.train()(input_ids=ids, labels=ids).loss.backward()
model.eval()
for wanted, call in {
    "assistant_early_exit": lambda: model.generate(ids[:1], assistant_early_exit=1),
    "sample_experts": lambda: model(input_ids=ids, sample_experts=["text"]),
    "output_compute=True": lambda: model(input_ids=ids, output_compute=True),
}.items():
    try:
        call()
    except ImportError as error:
        assert str(error).startswith(f"{wanted} takes the whole package"), error
    else:
        raise AssertionError(wanted)
model.save_pretrained(source + "/again")
transformers.AutoModelForMultimodalLM.from_pretrained(source + "/again", trust_remote_code=True)
"""


@pytest.mark.slow
def test_an_export_with_windows_runs_and_trains_where_the_package_does_not_exist(tmp_path: Path) -> None:
    torch.manual_seed(0)
    windows = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 6}
    losses = {"router_aux_loss_coef": 0.01, "alignment_loss_coef": 0.01, "alignment": "contrastive"}
    config = tiny_config(**windows, **losses, skip_budget=0.3, skip_scope="layer")
    model = ChorusForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():
        if "skip_gate.weight" in name:  # so that some tokens skip
            parameter.data.normal_()
    ids = torch.randint(5, 128, (2, 31), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        save_file({"input_ids": ids, "logits": model(input_ids=ids).logits}, tmp_path / "stored.safetensors")
    export_for_hub(model, None, tmp_path / "export")
    arguments = [str(tmp_path / "export"), str(tmp_path / "stored.safetensors")]
    run_without_the_package(WORK_ALONE, arguments, tmp_path, HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="1")


def test_an_export_names_every_auto_class_and_leaves_no_trace(
    model: ChorusForConditionalGeneration, processor: ChorusProcessor, tmp_path: Path
) -> None:
    export_for_hub(model, processor, tmp_path / "export")
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert config["auto_map"].keys() == {"AutoConfig", *classes_of_auto_classes()}
    for reference in config["auto_map"].values():
        assert (tmp_path / "export" / f"{reference.split('.')[0]}.py").is_file()
    saved = json.loads((tmp_path / "export" / "processor_config.json").read_text())
    assert saved["auto_map"] == {"AutoProcessor": "processing_chorus.ChorusProcessor"}

    model.save_pretrained(tmp_path / "plain")
    processor.save_pretrained(tmp_path / "plain")
    assert not list((tmp_path / "plain").glob("*.py"))
    assert "auto_map" not in (tmp_path / "plain" / "config.json").read_text()
    assert "auto_map" not in (tmp_path / "plain" / "processor_config.json").read_text()


def test_an_export_is_stable_over_three_rounds_with_the_package(
    model: ChorusForConditionalGeneration, processor: ChorusProcessor, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "first")
    model = AutoModelForMultimodalLM.from_pretrained(tmp_path / "first")
    listings, configs = [], []
    for number in range(3):
        folder = export_for_hub(model, processor, tmp_path / str(number))
        listings.append(sorted(path.name for path in folder.iterdir()))
        configs.append((folder / "config.json").read_text() + (folder / "processor_config.json").read_text())
        model = AutoModelForMultimodalLM.from_pretrained(folder)
        processor = AutoProcessor.from_pretrained(folder)
    assert listings[0] == listings[1] == listings[2]
    assert configs[0] == configs[1] == configs[2]


def test_an_adapter_is_pushed_with_its_processor_and_card(
    fake_hub: FakeHub, model: ChorusForConditionalGeneration, processor: ChorusProcessor
) -> None:
    batch = ChorusDataCollator(processor)(make_rows(3))
    push_to_hub(model, processor, "tester/base", include_code=False)
    base = AutoModelForMultimodalLM.from_pretrained("tester/base")
    adapted = get_peft_model(base, lora_config(base, banks=["image"], init_lora_weights=False)).eval()
    push_to_hub(adapted, processor, "tester/adapter")
    files = set(fake_hub.files("tester/adapter"))
    assert {"adapter_config.json", "adapter_model.safetensors", "processor_config.json", "README.md"} <= files
    assert not [name for name in files if name.endswith(".py") or name == "model.safetensors"]
    assert model_info("tester/adapter").library_name == "peft"
    fresh = AutoModelForMultimodalLM.from_pretrained("tester/base")
    loaded = PeftModel.from_pretrained(fresh, "tester/adapter").eval()
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, adapted(**batch).logits)
    with pytest.raises(ValueError, match="export model.merge_and_unload"):
        export_for_hub(adapted, processor, "unused")


def test_a_card_written_by_hand_is_kept(
    fake_hub: FakeHub, model: ChorusForConditionalGeneration, processor: ChorusProcessor
) -> None:
    push_to_hub(model, processor, "tester/chorus", card="---\npipeline_tag: any-to-any\n---\nmine\n")
    push_to_hub(model, processor, "tester/chorus")
    assert fake_hub.files("tester/chorus")["README.md"].endswith(b"mine\n")
