"""Each step on a model without memory and on the model itself: the same shapes, and the bytes of the file."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from chorus_moe import ChorusForConditionalGeneration, ChorusProcessor
from chorus_moe.surgery import merge_experts, prune_dense, prune_experts, quantize
from chorus_moe.training.compression import steps as module
from chorus_moe.training.compression.plan import CompressionRecipe, Distil, Merge, Prune, Quantize, Step
from chorus_moe.training.compression.steps import (
    apply,
    batches,
    bytes_on_disk,
    distil_recipe,
    even_scores,
    layer_scores,
    model_without_memory,
    outline,
)
from tests.conftest import tiny_config
from tests.training.conftest import make_model, make_rows
from tests.training.test_data import PLAIN, write_jsonl


def shapes(model: nn.Module) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_model_without_memory_has_the_numbers_of_its_configuration(dtype: torch.dtype | None) -> None:
    config = tiny_config()
    config.dtype = dtype
    before = config.to_dict()
    model = model_without_memory(config)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert model.lm_head.weight.dtype == (dtype or torch.float32)
    assert model.config is not config and config.to_dict() == before


@pytest.mark.parametrize("groups", [None, "int8", {"experts": "int4"}])
def test_bytes_are_those_of_the_file(groups: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ChorusForConditionalGeneration(tiny_config())
    if groups is not None:
        quantize(model, groups, verbose=False)
    model.save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    # The names of the numbers, the digits of places in another order, a line that says who wrote it, and spaces.
    assert abs(size - bytes_on_disk(model)) <= 2 * len(model.state_dict()) + 60


def test_a_header_of_its_own_is_counted() -> None:
    model = nn.Linear(3, 2)
    tensors = [("weight", [2, 3], [0, 24]), ("bias", [2], [24, 32])]
    header = {n: {"dtype": "F32", "shape": shape, "data_offsets": at} for n, shape, at in tensors}
    assert bytes_on_disk(model) == 8 + len(json.dumps(header, separators=(",", ":"))) + 32


STEPS: dict[str, Step] = {
    "experts": Prune(experts={"text": 2, "common": {1: 3}}),
    "dense": Prune(dense={"heads": 1, "experts:image": 16, "vision_tower.feed_forward": 0.5}),
    "layers": Prune(dense={"layers": 2}),
    "layers of a tower": Prune(dense={"audio_tower.layers": 1}),
    "both": Prune(experts={"text": 0.5}, dense={"experts:text": 16}),
    "merge": Merge(banks={"common": 2, "image": {1: 3}}),
    "distil": Distil(),
    "quantize": Quantize({"experts": "int4", "attention": "int8"}),
}


@pytest.mark.parametrize("name", STEPS)
def test_an_outline_has_the_shapes_of_the_step_itself(name: str) -> None:
    step, config = STEPS[name], tiny_config()
    torch.manual_seed(0)
    whole, outlined = ChorusForConditionalGeneration(config), model_without_memory(config)
    outline(step, outlined)
    if isinstance(step, Prune):
        if step.experts:
            prune_experts(whole, step.experts, even_scores(whole))
        if step.dense:
            prune_dense(whole, step.dense, layer_scores(whole, 1.0))
    elif isinstance(step, Merge):
        for bank, count in step.banks.items():
            merge_experts(whole, bank, count, even_scores(whole), step.similarity)
    elif isinstance(step, Quantize):
        quantize(whole, step.groups, verbose=False)
    assert shapes(outlined) == shapes(whole)
    found, expected = (vars(model.config.text_config) | {"dtype": None} for model in (outlined, whole))
    assert found == expected
    assert {parameter.device.type for parameter in outlined.parameters()} == {"meta"}


def test_deep_experts_are_pruned_and_not_merged() -> None:
    banks = {"common": {"modalities": ["text", "image", "audio"], "expert_depth": 2}, "text": {}}
    config = tiny_config(expert_banks=banks)
    with pytest.raises(ValueError, match="bank 'common' has expert_depth=2; prune it instead"):
        outline(Merge(banks={"text": 2, "common": 2}), model_without_memory(config))
    outline(Merge(banks={"text": 2}), model_without_memory(config))


def test_distilling_comes_before_rounding() -> None:
    model = model_without_memory(tiny_config())
    outline(Distil(), model)
    outline(Quantize("int8"), model)
    with pytest.raises(ValueError, match="distil: the weights are quantised by then .*; put distil before quantize"):
        outline(Distil(), model)


def test_scores_without_rows_are_even() -> None:
    model = model_without_memory(tiny_config(expert_banks={"text": {}, "common": {"layers": [2], "num_experts": 6}}))
    found = {layer: {n: s.tolist() for n, s in banks.items()} for layer, banks in even_scores(model).items()}
    assert found == {1: {"text": [1.0] * 4}, 2: {"text": [1.0] * 4, "common": [1.0] * 6}}
    layers = {name: scores[""].tolist() for name, scores in layer_scores(model, 0.5).items()}
    assert layers == {"layers": [0.5] * 3, "vision_tower.layers": [0.5], "audio_tower.layers": [0.5]}


def test_rows_become_batches_with_labels_the_last_one_smaller(processor: ChorusProcessor) -> None:
    found = list(batches(processor, make_rows(5), 2))
    assert [len(batch["input_ids"]) for batch in found] == [2, 2, 1]
    assert all((batch["labels"] >= 0).any(dim=1).all() for batch in found)
    assert list(batches(processor, [], 2)) == []


class Asked:
    """Stands for the measurements, and notes what they were asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[int] = []
        self.sizes: list[int] = []
        monkeypatch.setattr(module, "expert_saliency", self.saliency)
        monkeypatch.setattr(module, "measure_importance", self.importance)

    def saliency(self, model: Any, processor: Any, rows: Any, *, batch_size: int) -> Any:
        self.rows.append(len(rows))
        self.sizes.append(batch_size)
        scores = even_scores(model)
        for banks in scores.values():
            for bank in banks.values():
                bank += torch.arange(len(bank))
        # The first are used most, the last matter most.
        uses = {layer: {name: bank.flip(0) for name, bank in banks.items()} for layer, banks in scores.items()}
        return type("Found", (), {"saliency": scores, "uses": uses})

    def importance(self, model: Any, found: Any) -> Any:
        sizes = [len(batch["input_ids"]) for batch in found]
        self.rows.append(sum(sizes))
        self.sizes.append(sizes[0])
        return layer_scores(model, 1.0)


@pytest.mark.parametrize(("by", "kept"), [("saliency", [2, 3]), ("uses", [0, 1])])
@pytest.mark.parametrize(("asked_rows", "read"), [(3, 3), (4, 4), (100, 5)])
def test_experts_are_pruned_by_the_scores_that_were_asked_for(
    by: str, kept: list[int], asked_rows: int, read: int,
    tokenizer: PreTrainedTokenizerFast, processor: ChorusProcessor, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    asked, model = Asked(monkeypatch), make_model(tokenizer)
    bank = model.model.language_model.layers[1].mlp.banks["text"]
    expected = bank.experts.down_proj.detach()[kept].clone()
    step = Prune(experts={"text": 2}, by=by, rows=asked_rows)
    (report,) = apply(step, model, processor, make_rows(5), 2)
    assert torch.equal(bank.experts.down_proj, expected)
    assert (asked.rows, asked.sizes, report.operation) == ([read], [2], "prune_experts")


def test_units_are_measured_on_what_the_experts_have_left(
    tokenizer: PreTrainedTokenizerFast, processor: ChorusProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, model, seen = Asked(monkeypatch), make_model(tokenizer), []
    real = asked.importance
    monkeypatch.setattr(
        module,
        "measure_importance",
        lambda model, found: (
            seen.append(model.config.text_config.expert_banks["text"]["num_experts"]) or real(model, found)
        ),
    )
    step = Prune(experts={"text": 2}, dense={"layers": 2}, rows=4)
    reports = apply(step, model, processor, make_rows(5), 3)
    assert [report.operation for report in reports] == ["prune_experts", "prune_dense"]
    assert (asked.rows, asked.sizes, seen) == ([4, 4], [3, 3], [2])
    (alone,) = apply(Prune(dense={"heads": 1}), model, processor, make_rows(5), 3)
    assert alone.operation == "prune_dense" and asked.rows == [4, 4, 5]


def test_banks_are_merged_one_by_one_weighted_by_use(
    tokenizer: PreTrainedTokenizerFast, processor: ChorusProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, calls = Asked(monkeypatch), []
    monkeypatch.setattr(module, "merge_experts", lambda *given: calls.append(given) or "report")
    step = Merge(banks={"text": 2, "common": {1: 3}}, similarity="router", rows=2)
    model = make_model(tokenizer)
    assert apply(step, model, processor, make_rows(5), 1) == ["report"] * 2
    assert [given[1:3] for given in calls] == [("text", 2), ("common", {1: 3})]
    assert {given[4] for given in calls} == {"router"} and asked.rows == [2]
    assert calls[0][0] is model and calls[0][3][1]["text"].tolist() == [4, 3, 2, 1]


def test_rounding_needs_no_rows(tokenizer: PreTrainedTokenizerFast, processor: ChorusProcessor) -> None:
    model = make_model(tokenizer)
    (report,) = apply(Quantize({"head": "int8"}), model, processor, None, 1)
    assert (report.operation, report.subject) == ("quantize", "1 weights")
    assert hasattr(model.lm_head, "parametrizations")


def test_a_distil_step_is_a_training_recipe_with_the_whole_model_as_teacher(tmp_path: Path) -> None:
    rows = str(write_jsonl(tmp_path / "rows.jsonl", [{"messages": PLAIN}]))
    source = tmp_path / "student"
    ChorusForConditionalGeneration(tiny_config()).save_pretrained(source)
    recipe = CompressionRecipe(
        model="whole", output_dir="out", data={"train_data": rows, "eval_data": rows, "eval_split": "x"}, seed=7
    )
    found = distil_recipe(Distil(), recipe, str(source), tmp_path / "trained")
    for device, is_cpu in (("cpu", True), ("cuda", False)):
        place = torch.device(device)
        asked = distil_recipe(Distil(), recipe, str(source), tmp_path / "trained", place)
        assert asked.training.use_cpu == is_cpu
    training = found.training
    assert (training.seed, training.num_train_epochs, training.per_device_train_batch_size) == (7, 3, 16)
    assert (training.learning_rate, str(training.lr_scheduler_type.value)) == (1e-4, "cosine")
    assert (training.warmup_steps, str(training.save_strategy.value), training.save_total_limit) == (0.1, "epoch", 1)
    assert (training.output_dir, training.resume_from_checkpoint) == (str(tmp_path / "trained"), "auto")
    assert found.model.model_name_or_path == str(source)
    assert (found.data.train_data, found.data.eval_data) == (rows, None)
    assert found.distillation.teachers == ["whole"]
    sections: Any = {
        "training": {"learning_rate": 3e-3, "seed": 9},
        "distillation": {"teachers": ["other"], "distillation_temperature": 2.0},
        "objectives": {"next_token_weight": 0.5},
    }
    found = distil_recipe(Distil(sections), recipe, str(source), tmp_path / "trained")
    assert (found.training.learning_rate, found.training.seed, found.training.num_train_epochs) == (3e-3, 9, 3)
    assert (found.distillation.teachers, found.distillation.distillation_temperature) == (["other"], 2.0)
    assert found.objectives.next_token_weight == 0.5
    bad = Distil({"distillation": {"distillation_temperature": 0.0}})
    with pytest.raises(ValueError, match="distillation_temperature=0.0"):
        distil_recipe(bad, recipe, str(source), tmp_path / "trained")
