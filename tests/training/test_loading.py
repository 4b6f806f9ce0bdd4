"""Full models and adapters load with their processor, wherever it lies."""

from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import PreTrainedModel

from chorus_moe import (
    ChorusForConditionalGeneration,
    ChorusForContrastive,
    ChorusForSequenceClassification,
    ChorusProcessor,
)
from chorus_moe.training import loading
from chorus_moe.training.collator import ChorusDataCollator
from chorus_moe.training.loading import base_model, find_device, load_model
from chorus_moe.training.lora import lora_config
from tests.conftest import tiny_config
from tests.training.conftest import make_rows


@torch.no_grad()
def logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**batch).logits


def test_a_model_and_an_adapter_on_it_load(
    model: ChorusForConditionalGeneration, processor: ChorusProcessor, tmp_path: Path
) -> None:
    batch = ChorusDataCollator(processor)(make_rows(3))
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    loaded, its_processor = load_model(tmp_path / "base")
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    assert its_processor.num_image_tokens == processor.num_image_tokens

    adapted = get_peft_model(loaded, lora_config(loaded, banks=["text"], init_lora_weights=False)).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    again, its_processor = load_model(tmp_path / "adapter")
    assert torch.equal(logits(again, batch), logits(adapted, batch))
    assert its_processor.num_image_tokens == processor.num_image_tokens
    merged, _ = load_model(tmp_path / "adapter", merge=True)
    assert base_model(merged) is merged
    assert base_model(again) is not again
    # The adapter added to the weights instead of to the outputs: another order of float32 sums.
    torch.testing.assert_close(logits(merged, batch), logits(adapted, batch), atol=1e-5, rtol=0)

    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match="which is not there; pass `base`"):
        load_model(tmp_path / "adapter")
    moved, _ = load_model(tmp_path / "adapter", base=str(tmp_path / "moved"))
    assert torch.equal(logits(moved, batch), logits(adapted, batch))


def test_a_model_goes_to_an_accelerator_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    found = None
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: found)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert find_device() == torch.device("cpu")
    found = torch.device("cuda")
    assert find_device() == found
    assert find_device("cpu") == torch.device("cpu")
    assert find_device("cuda:1") == torch.device("cuda:1")
    for name in ("cuda:2", "mps"):
        with pytest.raises(
            ValueError, match=rf"there is no device '{name}' here; choose from \['cpu', 'cuda:0', 'cuda"
        ):
            find_device(name)


def test_weights_that_are_not_finite_are_named_at_load(
    model: ChorusForConditionalGeneration,
    processor: ChorusProcessor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    monkeypatch.setattr(loading.logger, "warning", said.append)
    processor.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    load_model(tmp_path)
    assert said == []
    model.lm_head.weight.data[0, 0] = torch.nan
    model.model.language_model.norm.weight.data[1] = torch.inf
    model.save_pretrained(tmp_path)
    load_model(tmp_path)
    assert len(said) == 1
    assert "2 weights hold NaN or infinity, the first is model.language_model.norm.weight" in said[0]
    model.lm_head.weight.data[0, 0] = 0.0
    model.save_pretrained(tmp_path)
    load_model(tmp_path)
    assert "the weight model.language_model.norm.weight holds NaN or infinity; its answers are void" in said[1]


@pytest.mark.parametrize("kind", [ChorusForSequenceClassification, ChorusForContrastive])
def test_a_checkpoint_without_the_layer_that_predicts_tokens_does_not_generate(
    kind: type[PreTrainedModel], processor: ChorusProcessor, tmp_path: Path
) -> None:
    kind(tiny_config()).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"was saved as {kind.__name__}, without the layer that predicts tokens"):
        load_model(tmp_path)
    assert isinstance(load_model(tmp_path, kind=kind)[0], kind)


def test_a_tied_layer_is_there_whatever_head_was_saved(processor: ChorusProcessor, tmp_path: Path) -> None:
    model = ChorusForSequenceClassification(tiny_config(tie_word_embeddings=True))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)[0]
    assert torch.equal(loaded.get_output_embeddings().weight, model.get_input_embeddings().weight)
