"""Tokens a second and the share of the peak, against counts by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch

from chorus_moe import ChorusForConditionalGeneration, ChorusForSequenceClassification
from chorus_moe.training.recipe import read_recipe
from chorus_moe.training.scale import hardware_share
from chorus_moe.training.scale.hardware_share import HardwareShare, known_peak
from chorus_moe.training.scale.plan_model import PlannedModel
from chorus_moe.training.scale.plan_time import step_flops
from chorus_moe.training.train import run_training
from tests.conftest import tiny_config
from tests.training.routing_streams import make_trainer
from tests.training.test_train import recipe  # noqa: F401  a fixture

PEAK = 1e9


class Clock:
    """Four seconds from one look to the next."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 4.0
        return self.now


def rows(count: int, length: int, padding: int, images: int) -> list[dict[str, torch.Tensor]]:
    ids, mask, types = torch.full((length,), 7), torch.ones(length, dtype=torch.long), torch.zeros(length).long()
    ids[:padding], mask[:padding] = 0, 0
    # Behind the padding; without placeholders, since no picture is given.
    types[padding : padding + images] = 1
    row = {"input_ids": ids, "attention_mask": mask, "labels": ids, "mm_token_type_ids": types}
    return [row] * count


@pytest.mark.parametrize("accumulation", [1, 2])
def test_tokens_and_operations_are_those_of_the_batches(
    accumulation: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware_share, "time", Clock())
    model = _model()
    steps, length, padding = 2, 12, 4
    trainer = make_trainer(
        model, tmp_path, rows(16, length, padding, 0), max_steps=steps, logging_steps=1,
        gradient_accumulation_steps=accumulation, per_device_train_batch_size=4,
    )  # fmt: skip
    HardwareShare.add_to(trainer, PEAK)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "mfu" in entry]
    assert len(logs) == steps
    tokens = 4 * accumulation * (length - padding)
    flops = tokens * sum(step_flops(PlannedModel(model.config), {"text": 1.0}, length, False))
    for entry in logs:
        assert entry["tokens_per_second"] == pytest.approx(tokens / 4)
        assert entry["mfu"] == pytest.approx(flops / (4 * PEAK))


def _model() -> ChorusForConditionalGeneration:
    torch.manual_seed(0)
    return ChorusForConditionalGeneration(tiny_config())


def test_modalities_have_their_own_operations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware_share, "time", Clock())
    model = _model()
    share = HardwareShare(model, PEAK)
    trainer = make_trainer(model, tmp_path, rows(4, 8, 0, 0))
    share.on_train_begin(trainer.args, trainer.state, trainer.control)
    ids, types = torch.full((2, 8), 7), torch.zeros(2, 8, dtype=torch.long)
    types[:, 2:5] = 1
    model.train().model.language_model(input_ids=ids, mm_token_type_ids=types)
    # An evaluation in between is not counted.
    with torch.no_grad():
        model.eval().model.language_model(input_ids=ids)
    logs = {"loss": 1.0}
    share.on_log(trainer.args, trainer.state, trainer.control, logs)
    mix = {"text": 10 / 16, "image": 6 / 16}
    assert logs["tokens_per_second"] == pytest.approx(16 / 4)
    assert logs["mfu"] == pytest.approx(16 * sum(step_flops(PlannedModel(model.config), mix, 8, False)) / (4 * PEAK))
    # After a run nothing is counted, also not for one that ended twice.
    for _ in range(2):
        share.on_train_end(trainer.args, trainer.state, trainer.control)
    assert not model.model.language_model._forward_pre_hooks
    # Frozen towers need no gradients of their own.
    for name, parameter in model.named_parameters():
        if "_tower." in name:
            parameter.requires_grad_(False)
    assert HardwareShare(model, PEAK).planned.train == "frozen_towers"


def test_a_recipe_logs_them(recipe: Path) -> None:  # noqa: F811  the fixture
    recipe.write_text(recipe.read_text() + "parallel:\n  device_flops: 1e12\n")
    run_training(read_recipe(recipe, ["--logging_steps", "1"]))
    history = (recipe.parent / "out" / "trainer_state.json").read_text()
    assert history.count('"mfu"') == 4 and history.count('"tokens_per_second"') == 4


def test_what_cannot_be_counted_is_refused_and_unknown_devices_log_nothing(tmp_path: Path) -> None:
    model: Any = _model()
    for peak in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"device_flops: expected a positive number, found {peak}"):
            HardwareShare(model, peak)
    classifier: Any = ChorusForSequenceClassification(tiny_config())
    with pytest.raises(ValueError, match="not of a ChorusForSequenceClassification"):
        HardwareShare(classifier, PEAK)
    trainer = make_trainer(model, tmp_path, rows(4, 8, 0, 0))
    before = len(trainer.callback_handler.callbacks)
    HardwareShare.add_to(trainer, None)
    assert len(trainer.callback_handler.callbacks) == before
    assert known_peak("NVIDIA H100 80GB HBM3") == known_peak("NVIDIA H200") == 989.5e12
    assert known_peak("NVIDIA GeForce RTX 4090") == 165.2e12
    assert known_peak("Tesla T4") is None
