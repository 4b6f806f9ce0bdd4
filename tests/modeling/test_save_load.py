"""What is saved is what is loaded: bit for bit, in a fresh process, also when uninitialised memory is NaN."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForSequenceClassification,
)

from chorus_moe import (
    ChorusForConditionalGeneration,
    ChorusForContrastive,
    ChorusForSequenceClassification,
    ChorusModel,
)
from chorus_moe.modeling.modeling_base import ALIGNMENT
from chorus_moe.surgery.heads import HEADS, Head
from tests.conftest import tiny_batch, tiny_config
from tests.fresh_process import run_fresh

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Run in a process of its own: no module state of the process that saved can help it.
FRESH = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
import chorus_moe
from transformers import AutoModelForMultimodalLM
torch.use_deterministic_algorithms(True, warn_only=True)
for folder in map(Path, sys.argv[1:]):
    model = AutoModelForMultimodalLM.from_pretrained(folder)
    state = {"state." + name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    buffers = {"buffer." + name: tensor.contiguous().clone() for name, tensor in model.named_buffers()}
    batch = load_file(folder / "batch.safetensors")
    with torch.no_grad():
        logits = model(**batch).logits
    save_file(state | buffers | {"logits": logits.contiguous()}, folder / "fresh.safetensors")
"""


@pytest.fixture
def nan_memory() -> Iterator[None]:
    """torch fills uninitialised memory with NaN, so a tensor that nobody sets is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def make(dtype: torch.dtype = torch.float32, **text) -> ChorusForConditionalGeneration:
    torch.manual_seed(0)
    return ChorusForConditionalGeneration(tiny_config(**text)).to(dtype).eval()


def logits_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits


def assert_same_state(first: nn.Module, second: nn.Module) -> None:
    left = dict(first.state_dict()) | dict(first.named_buffers())
    right = dict(second.state_dict()) | dict(second.named_buffers())
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each type of number, loaded and run once by a fresh process."""
    folders = {}
    for name, dtype in DTYPES.items():
        folder = tmp_path_factory.mktemp(name)
        model = make(dtype)
        batch = tiny_batch(model.config)
        model.save_pretrained(folder)
        save_file(batch, folder / "batch.safetensors")
        folders[name] = folder
    done = run_fresh(FRESH, [*map(str, folders.values())], cwd=folder, environment=os.environ)
    assert done.returncode == 0, done.stderr[-4000:]
    return folders


@pytest.mark.parametrize("name", DTYPES)
def test_a_fresh_process_loads_every_parameter_and_buffer_bit_for_bit(saved: dict[str, Path], name: str) -> None:
    model = make(DTYPES[name])
    loaded = load_file(saved[name] / "fresh.safetensors")
    # Buffers that are not saved are rebuilt in float32 at load, whatever type the weights have.
    buffers = {f"buffer.{key}": value for key, value in make().named_buffers()}
    for key, tensor in {f"state.{key}": value for key, value in model.state_dict().items()}.items():
        assert torch.equal(tensor, loaded[key]), key
    for key, tensor in buffers.items():
        assert torch.isfinite(loaded[key].float()).all(), key
        if name == "float32":
            assert torch.equal(tensor, loaded[key]), key


def test_a_fresh_process_computes_the_same_logits_bit_for_bit(saved: dict[str, Path]) -> None:
    batch = load_file(saved["float32"] / "batch.safetensors")
    loaded = load_file(saved["float32"] / "fresh.safetensors")
    assert torch.equal(logits_of(make(), batch), loaded["logits"])


def test_bfloat16_weights_compute_the_same_logits_in_both_processes(saved: dict[str, Path]) -> None:
    batch = load_file(saved["bfloat16"] / "batch.safetensors")
    loaded = load_file(saved["bfloat16"] / "fresh.safetensors")
    reloaded = ChorusForConditionalGeneration.from_pretrained(saved["bfloat16"])
    assert reloaded.dtype == torch.bfloat16
    assert torch.equal(logits_of(reloaded, batch), loaded["logits"])


@pytest.mark.usefixtures("nan_memory")
def test_a_sharded_checkpoint_loads_bit_for_bit(tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    loaded = ChorusForConditionalGeneration.from_pretrained(tmp_path)
    assert_same_state(model, loaded)


@pytest.mark.usefixtures("nan_memory")
def test_loaded_weights_lie_where_torch_allocates_and_not_in_the_mapped_file(tmp_path: Path) -> None:
    ChorusForConditionalGeneration(tiny_config()).save_pretrained(tmp_path)
    loaded = ChorusForConditionalGeneration.from_pretrained(tmp_path)
    assert not [name for name, weight in loaded.named_parameters() if weight.data_ptr() % ALIGNMENT]


def test_tied_embeddings_stay_tied_after_loading(tmp_path: Path) -> None:
    config = tiny_config(tie_word_embeddings=True)
    config.tie_word_embeddings = True
    model = ChorusForConditionalGeneration(config)
    model.save_pretrained(tmp_path)
    loaded = ChorusForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert_same_state(model, loaded)


@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("name", ["banks.image.experts.gate_up_proj", "banks.text.router.weight", "bank_gate.weight"])
def test_a_missing_tensor_is_named_and_starts_finite(tmp_path: Path, name: str) -> None:
    make().save_pretrained(tmp_path)
    key = f"model.language_model.layers.1.mlp.{name}"
    state = load_file(tmp_path / "model.safetensors")
    del state[key]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, info = ChorusForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {key}
    assert torch.isfinite(loaded.state_dict()[key]).all()


def test_a_complete_checkpoint_has_no_missing_or_unexpected_keys(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    _, info = ChorusForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]


@pytest.mark.parametrize(
    ("auto", "kind"),
    [
        (AutoModel, ChorusModel),
        (AutoModelForMultimodalLM, ChorusForConditionalGeneration),
        (AutoModelForImageTextToText, ChorusForConditionalGeneration),
        (AutoModelForSequenceClassification, ChorusForSequenceClassification),
    ],
)
def test_auto_classes_find_the_model(tmp_path: Path, auto: type, kind: type) -> None:
    model = make()
    model.save_pretrained(tmp_path)
    loaded = auto.from_pretrained(tmp_path)
    assert type(loaded) is kind
    inner = loaded if kind is ChorusModel else loaded.model
    assert_same_state(model.model, inner)


@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.kind.__name__)
def test_the_auto_classes_of_the_table_load_what_was_saved(tmp_path: Path, head: Head) -> None:
    model = head.kind(tiny_config())
    model.save_pretrained(tmp_path)
    for auto in head.auto_classes:
        assert_same_state(model, getattr(transformers, auto).from_pretrained(tmp_path))


def test_a_configuration_without_an_architecture_is_of_the_model_without_a_head() -> None:
    assert type(AutoModel.from_config(tiny_config())) is ChorusModel


@pytest.mark.parametrize("head", [ChorusForSequenceClassification, ChorusForContrastive])
@pytest.mark.usefixtures("nan_memory")
def test_other_heads_load_bit_for_bit(tmp_path: Path, head: type) -> None:
    model = head(tiny_config())
    model.save_pretrained(tmp_path)
    assert_same_state(model, head.from_pretrained(tmp_path))


@pytest.mark.usefixtures("nan_memory")
def test_a_generative_checkpoint_opens_as_a_contrastive_model_with_a_fresh_head(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    loaded, info = ChorusForContrastive.from_pretrained(tmp_path, output_loading_info=True)
    fresh = {"logit_scale"} | {f"projections.{name}.weight" for name in ("text", "image", "audio")}
    assert set(info["missing_keys"]) == fresh
    assert all(torch.isfinite(tensor).all() for tensor in loaded.state_dict().values())
    assert loaded.logit_scale.item() == pytest.approx(2.6592)


def test_saving_a_loaded_model_changes_no_file(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path / "a")
    ChorusForConditionalGeneration.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    ChorusForConditionalGeneration.from_pretrained(tmp_path / "b").save_pretrained(tmp_path / "c")
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in ("config.json", "generation_config.json"):
        texts = [json.loads((tmp_path / folder / name).read_text()) for folder in "bc"]
        assert texts[0] == texts[1]
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
