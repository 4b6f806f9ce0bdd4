"""Contrast beside the labelled tokens: against vectors of each medium computed alone, and beside the other loss."""

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import PreTrainedTokenizerFast, TrainingArguments

from chorus_moe import ChorusProcessor
from chorus_moe.modeling.modeling_heads import ChorusForContrastive
from chorus_moe.surgery.processor import processor_from_config
from chorus_moe.training.collator import ChorusDataCollator
from chorus_moe.training.objectives.contrast import Contrast
from chorus_moe.training.trainer import ChorusTrainer
from tests.fresh_process import ROOT, run_ranks
from tests.training.conftest import make_model, make_row, make_rows, make_tokenizer
from tests.training.test_checkpoints import SETTINGS

# An image, a clip and both, twice; then clips alone.
ROWS = [*make_rows(6), *(make_row(index) for index in (7, 10, 13))]


def vectors_alone(
    model: ChorusForContrastive, collate: ChorusDataCollator, row: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """What the contrastive head makes of each medium of a row, one at a time."""
    batch = collate([row])
    found = {"text": model.get_text_features(batch["input_ids"][batch["labels"] != -100][None])}
    if "pixel_values" in batch:
        found["image"] = model.get_image_features(batch["pixel_values"])
    if "input_features" in batch:
        found["audio"] = model.get_audio_features(batch["input_features"], batch["input_features_mask"])
    return {name: vector[0] for name, vector in found.items()}


def test_the_loss_is_that_of_the_contrastive_head_on_each_medium_alone(
    tokenizer: PreTrainedTokenizerFast, processor: ChorusProcessor
) -> None:
    """Rows of an image, of a clip and of both: each pair of modalities learns from the rows that have the two."""
    model, collate, rows = make_model(tokenizer).eval(), ChorusDataCollator(processor), make_rows(6)
    objective, head = Contrast(model), ChorusForContrastive(model.config).eval()
    head.model.load_state_dict(model.model.state_dict())
    head.projections.load_state_dict(objective.projections.state_dict())
    batch = collate(rows)
    with torch.no_grad():
        found = objective(model, batch, model(**batch))
        vectors = [vectors_alone(head, collate, row) for row in rows]
    losses = []
    for first, second in combinations(("text", "image", "audio"), 2):
        both = [row for row in vectors if first in row and second in row]
        scores = torch.stack([row[first] for row in both]) @ torch.stack([row[second] for row in both]).T / 0.07
        right = torch.arange(len(both))
        losses.append((F.cross_entropy(scores, right) + F.cross_entropy(scores.T, right)) / 2)
    # Four rows with an image, four with a clip, two with both.
    assert len(losses) == 3
    # Cosines are divided by 0.07, so rounding of 1e-7 in each is worth 1e-5.
    torch.testing.assert_close(found, torch.stack(losses).mean(), rtol=0, atol=5e-5)


def gradients(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Of the contrast of some rows, in this process; with several, their mean over the processes."""
    model = make_model(tokenizer := make_tokenizer()).train()
    objective = Contrast(model)
    batch = ChorusDataCollator(processor_from_config(model.config, tokenizer))(rows)
    objective(model, batch, model(**batch)).backward()
    named = {**dict(model.named_parameters()), **dict(objective.named_parameters())}
    found = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in named.items()}
    if dist.is_initialized():
        for gradient in found.values():
            dist.all_reduce(gradient)
            gradient /= dist.get_world_size()
    return found


@pytest.mark.slow
def test_two_processes_are_one_batch(tmp_path: Path) -> None:
    """The second has no row with an image."""
    for done in run_ranks(ROOT / "tests/training/distributed_contrast.py", [str(tmp_path)], cwd=tmp_path):
        assert done.returncode == 0, done.stderr[-3000:]
    together = torch.load(tmp_path / "gradients.pt", weights_only=True)
    alone = gradients(ROWS)
    assert alone["projections.image.weight"].any() and alone["logit_scale"] != 0
    for name, gradient in alone.items():
        # Gradients of up to 1, sums of float32 in another order.
        torch.testing.assert_close(together[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_rows_without_a_partner_add_nothing(tokenizer: PreTrainedTokenizerFast, processor: ChorusProcessor) -> None:
    model, rows = make_model(tokenizer).train(), make_rows(1)
    batch = ChorusDataCollator(processor)(rows)
    loss = Contrast(model)(model, batch, model(**batch))
    assert loss.item() == 0.0
    loss.backward()


def test_both_losses_fall_in_one_run(
    tokenizer: PreTrainedTokenizerFast, processor: ChorusProcessor, tmp_path: Path
) -> None:
    model = make_model(tokenizer)
    settings = {"max_steps": 12, "learning_rate": 3e-3, "logging_steps": 4, "per_device_train_batch_size": 3}
    trainer = ChorusTrainer(
        model=model,
        args=TrainingArguments(str(tmp_path), **SETTINGS | settings),
        objectives=[Contrast(model)],
        data_collator=ChorusDataCollator(processor),
        train_dataset=make_rows(3),
        processing_class=processor,
    )
    trainer.train()
    first, *_, last = [entry for entry in trainer.state.log_history if "contrast" in entry]
    assert last["contrast"] < first["contrast"] and last["loss"] - last["contrast"] < first["loss"] - first["contrast"]


def test_a_model_of_text_alone_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_model(tokenizer)
    model.config.vision_config = model.config.audio_config = None
    with pytest.raises(ValueError, match="contrast_weight=1.0: the model reads text alone"):
        Contrast(model)
