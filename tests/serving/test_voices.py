"""One model under several names."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model

from chorus_moe import ChorusForConditionalGeneration, ChorusForSequenceClassification
from chorus_moe.serving.voices import Voice, check_generates, load_voices, saved_kind
from tests.conftest import tiny_config

IDS = torch.tensor([[5, 6, 7, 8]])


def logits(voice: Voice) -> torch.Tensor:
    with torch.no_grad(), voice.speaking():
        return voice.model(input_ids=IDS).logits


def alone(folder: Path, adapter: Path | None = None) -> torch.Tensor:
    model: Any = ChorusForConditionalGeneration.from_pretrained(folder).eval()
    if adapter:
        model.load_adapter(str(adapter))
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture(scope="module")
def quiet(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another adapter."""
    torch.manual_seed(7)
    model = ChorusForConditionalGeneration.from_pretrained(folder)
    path = tmp_path_factory.mktemp("adapters") / "quiet"
    get_peft_model(model, LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False)).save_pretrained(path)
    return path


def test_each_voice_says_its_own_and_in_any_order(folder: Path, adapter: Path, quiet: Path) -> None:
    voices, _ = load_voices(str(folder), {"loud": str(adapter), "quiet": str(quiet)})
    assert list(voices) == ["tiny", "loud", "quiet"] and len({id(voice.model) for voice in voices.values()}) == 1
    expected = {"tiny": alone(folder), "loud": alone(folder, adapter), "quiet": alone(folder, quiet)}
    for name in ("quiet", "tiny", "loud", "tiny", "quiet"):
        torch.testing.assert_close(logits(voices[name]), expected[name])
    assert voices["loud"].config is voices["tiny"].config and not voices["tiny"].model.training


def test_an_adapter_may_be_the_first_voice(folder: Path, adapter: Path, quiet: Path) -> None:
    voices, _ = load_voices(str(adapter), {"quiet": str(quiet)}, base=str(folder))
    assert list(voices) == ["adapter", "quiet"]
    torch.testing.assert_close(logits(voices["quiet"]), alone(folder, quiet))
    torch.testing.assert_close(logits(voices["adapter"]), alone(folder, adapter))


def test_a_model_without_adapters_is_left_as_it_is(folder: Path) -> None:
    voices, _ = load_voices(str(folder))
    assert type(voices["tiny"].model) is ChorusForConditionalGeneration and voices["tiny"].adapter is None
    torch.testing.assert_close(logits(voices["tiny"]), alone(folder))


@pytest.mark.parametrize("name", ["tiny", "default"])
def test_a_name_that_is_taken_is_refused(folder: Path, adapter: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"the adapter name '{name}' is taken"):
        load_voices(str(folder), {name: str(adapter)})


@pytest.mark.parametrize("others", [0, 1], ids=["as the first", "as the second"])
def test_an_adapter_of_another_model_is_refused_by_name(
    folder: Path, adapter: Path, tmp_path: Path, others: int
) -> None:
    other = ChorusForConditionalGeneration(tiny_config(hidden_size=32))
    config = LoraConfig(target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    get_peft_model(other, config).save_pretrained(tmp_path)
    adapters = {"loud": str(adapter)} if others else {}
    with pytest.raises(ValueError, match="the adapter wide at .* does not fit the model: "):
        load_voices(str(folder), adapters | {"wide": str(tmp_path)})


def test_what_a_folder_was_saved_as(folder: Path, adapter: Path, tmp_path: Path) -> None:
    assert saved_kind(str(folder)) is saved_kind(str(adapter), str(folder)) is ChorusForConditionalGeneration
    classifier = ChorusForSequenceClassification(tiny_config(num_labels=3))
    classifier.save_pretrained(tmp_path / "classifier")
    assert saved_kind(str(tmp_path / "classifier")) is ChorusForSequenceClassification
    config = LoraConfig(target_modules=["q_proj"], task_type=TaskType.SEQ_CLS)
    get_peft_model(classifier, config).save_pretrained(tmp_path / "adapter")
    # By its task, though the base below was saved as another.
    assert saved_kind(str(tmp_path / "adapter"), str(folder)) is ChorusForSequenceClassification


def test_what_writes_no_text_is_refused_where_text_is_wanted(folder: Path) -> None:
    model = ChorusForConditionalGeneration(tiny_config())
    check_generates(model)
    check_generates(get_peft_model(model, LoraConfig(target_modules=["q_proj"])))
    with pytest.raises(ValueError, match="ChorusForSequenceClassification writes no text"):
        check_generates(ChorusForSequenceClassification(tiny_config(num_labels=2)))
