"""Masked features against a computation by hand: which tokens are hidden, what is predicted, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerFast, TrainingArguments

from chorus_moe import ChorusProcessor
from chorus_moe.surgery import freeze
from chorus_moe.training.collator import ChorusDataCollator
from chorus_moe.training.objectives.masked import MaskedFeatures, draw
from chorus_moe.training.trainer import ChorusTrainer
from tests.training.conftest import make_model, make_rows
from tests.training.test_checkpoints import SETTINGS


@pytest.fixture
def parts(tokenizer: PreTrainedTokenizerFast, processor: ChorusProcessor) -> dict[str, Any]:
    model = make_model(tokenizer)
    freeze(model, "towers")
    return {
        "model": model,
        "data_collator": ChorusDataCollator(processor),
        "train_dataset": make_rows(6),
        "processing_class": processor,
    }


def objective_of(parts: dict[str, Any], modality: str, share: float = 0.5) -> MaskedFeatures:
    objective = MaskedFeatures(modality, parts["model"], share)
    objective.check(parts["model"], parts["processing_class"])
    return objective


@pytest.mark.parametrize("modality", ["image", "audio"])
def test_the_loss_is_that_of_a_computation_by_hand(parts: dict[str, Any], modality: str) -> None:
    model = parts["model"].eval()
    objective, batch = objective_of(parts, modality), parts["data_collator"](make_rows(3))
    torch.manual_seed(3)
    found = objective(model, batch, model(**batch))

    # Embeddings merged by hand, and the features of each medium that the model calls on the way.
    token_id = {"image": model.config.image_token_id, "audio": model.config.audio_token_id}
    with torch.no_grad():
        image = model.get_image_features(batch["pixel_values"])
        audio = model.get_audio_features(batch["input_features"], batch["input_features_mask"])
        ids = batch["input_ids"]
        embeds = model.get_input_embeddings()(ids)
        embeds[ids == token_id["image"]] = image.pooler_output.flatten(0, 1)
        embeds[ids == token_id["audio"]] = torch.cat(list(audio.pooler_output))
        torch.manual_seed(3)
        hidden = draw(ids == token_id[modality], 0.5)
        embeds[hidden] = objective.mask_token
        states = model.model(
            inputs_embeds=embeds,
            attention_mask=batch["attention_mask"],
            mm_token_type_ids=batch["mm_token_type_ids"],
        ).last_hidden_state
        if modality == "image":
            target, pool = image.last_hidden_state, model.config.vision_config.pool_size
            side = int(target.shape[1] ** 0.5)
            grid = target.transpose(1, 2).unflatten(2, (side, side))
            target = F.avg_pool2d(grid, pool).flatten(2).transpose(1, 2).flatten(0, 1)
        else:
            pool = model.config.audio_config.pool_size
            sizes = [len(piece) for piece in audio.pooler_output]
            rows = audio.last_hidden_state.unflatten(1, (-1, pool)) if pool > 1 else audio.last_hidden_state[:, :, None]
            target = torch.cat([row[:size].mean(1) for row, size in zip(rows, sizes, strict=True)])
        target = target[hidden[ids == token_id[modality]]]
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        gap = (states[hidden] @ objective.prediction.weight.T + objective.prediction.bias - target).abs()
        expected = torch.where(gap < 1, gap**2 / 2, gap - 0.5).mean()
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.99])
def test_the_share_of_each_row_is_hidden(share: float) -> None:
    torch.manual_seed(0)
    is_token = torch.zeros(4, 20, dtype=torch.bool)
    is_token[0, :10], is_token[1, 5:], is_token[2, 7] = True, True, True
    hidden = draw(is_token, share)
    assert not (hidden & ~is_token).any()
    wanted = [min(max(round(count * share), 1), max(count - 1, 1)) if count else 0 for count in (10, 15, 1, 0)]
    assert hidden.sum(dim=1).tolist() == wanted


def test_every_token_is_hidden_as_often() -> None:
    torch.manual_seed(0)
    is_token = torch.ones(20_000, 8, dtype=torch.bool)
    torch.testing.assert_close(draw(is_token, 0.5).float().mean(dim=0), torch.full((8,), 0.5), rtol=0, atol=0.02)


def test_a_batch_without_the_medium_adds_nothing(parts: dict[str, Any]) -> None:
    model, rows = parts["model"].train(), [row for row in make_rows(3) if not row["audio"]]
    batch = parts["data_collator"](rows)
    assert objective_of(parts, "audio")(model, batch, model(**batch)).item() == 0.0


def test_features_are_learned_and_the_run_resumes_bit_for_bit(
    parts: dict[str, Any], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    found = []
    for name in ("whole", "resumed"):
        parts["model"] = make_model(tokenizer, attention_dropout=0.1)
        freeze(parts["model"], "towers")
        torch.manual_seed(0)
        objectives = [MaskedFeatures(modality, parts["model"]) for modality in ("image", "audio")]
        arguments = TrainingArguments(str(tmp_path), **SETTINGS | {"save_strategy": "steps", "logging_steps": 1})
        trainer = ChorusTrainer(args=arguments, objectives=objectives, **parts)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if name == "resumed" else None)
        state = {**trainer.model.state_dict(), **trainer.objectives.state_dict()}
        found.append(({k: v.clone() for k, v in state.items()}, trainer.state.log_history[:4]))
    assert all(torch.equal(tensor, found[1][0][name]) for name, tensor in found[0][0].items())
    for entry in found[0][1]:
        assert entry["masked_image"] > 0 and "masked_audio" in entry


def test_a_trained_tower_and_a_missing_one_are_refused(parts: dict[str, Any], tokenizer: Any) -> None:
    trained = make_model(tokenizer)
    with pytest.raises(ValueError, match="tensors of the vision_tower are trained.*add vision_tower to parts.freeze"):
        MaskedFeatures("image", trained).check(trained, parts["processing_class"])
    trained.config.vision_config = None
    with pytest.raises(ValueError, match="masked_image_weight=1.0: the model has no vision_tower"):
        MaskedFeatures("image", trained)
