"""Exits and skip gates that are added change nothing at first, and are then like those that were always there."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from chorus_moe import (
    ChorusForConditionalGeneration,
    ChorusForContrastive,
    ChorusForSequenceClassification,
    ChorusModel,
    surgery,
)
from chorus_moe.modeling.modeling_text import ChorusTextModel
from chorus_moe.surgery import add_exits, add_skip_gates, freeze, parameter_report, unfreeze
from tests.conftest import tiny_config
from tests.modeling.test_depth_exits import classifier, exit_logits, inputs, let_one_leave
from tests.modeling.test_modeling_heads import ATOL
from tests.surgery.test_banks import Batch, logits_of, train

LABELS = torch.tensor([0, 4, 2])


def plain_classifier(**text: Any) -> ChorusForSequenceClassification:
    return classifier(**{"exit_layers": None, "exit_loss_coef": 0.0} | text)


def make(**text: Any) -> ChorusForConditionalGeneration:
    torch.manual_seed(0)
    return ChorusForConditionalGeneration(tiny_config(**text)).eval()


def names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize("is_causal", [True, False])
def test_added_exits_change_no_bit_of_the_outputs(is_causal: bool):
    model = plain_classifier(is_causal=is_causal)
    before = logits_of(model, inputs(model))
    report = add_exits(model, [3, 1])
    assert torch.equal(logits_of(model, inputs(model)), before)
    assert (model.exits.layers, model.config.text_config.exit_layers) == ([1, 3], [1, 3])
    assert report.parameters_after - report.parameters_before == sum(p.numel() for p in model.exits.parameters()) > 0


def test_a_new_exit_answers_as_if_the_model_ended_there():
    model = plain_classifier(cross_modal_layers=[])
    nn.init.normal_(model.model.language_model.norm.weight, mean=1.0, std=0.3)
    add_exits(model, [1, 2])
    found = exit_logits(model, inputs(model))
    for row, layers in enumerate((1, 2)):
        short = plain_classifier(cross_modal_layers=[], num_hidden_layers=layers)
        short.load_state_dict(model.state_dict(), strict=False)
        torch.testing.assert_close(found[row], logits_of(short, inputs(model)), rtol=0, atol=ATOL)
    assert (found[0] - found[1]).abs().max() > 100 * ATOL


def test_exits_that_were_there_keep_their_weights_and_their_threshold():
    model = classifier(exit_layers=[2], exit_loss_coef=0.5)
    head = model.exits[0]
    for parameter in head.parameters():
        nn.init.normal_(parameter)
    before = {name: value.clone() for name, value in head.state_dict().items()}
    sure = exit_logits(model, inputs(model))[0].softmax(dim=-1).amax(dim=-1).sort().values
    model.config.exit_thresholds = [sure[:2].mean().item()]
    with torch.no_grad():
        expected = model(**inputs(model))
        report = add_exits(model, [3, 1])
        found = model(**inputs(model))
    assert model.exits[1] is head
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())
    assert model.config.exit_thresholds == [1.0, sure[:2].mean().item(), 1.0]
    assert model.config.text_config.exit_loss_coef == 0.5
    assert "none leaves at a new exit" in str(report)
    assert sorted(expected.left_after.tolist()) == [2, 2, 4]
    assert torch.equal(found.left_after, expected.left_after) and torch.equal(found.logits, expected.logits)


def test_added_exits_and_gates_load_as_they_were_saved_in_the_same_order(tmp_path: Path):
    model = plain_classifier()
    add_exits(model, [2])
    train(model, inputs(model) | {"labels": LABELS}, steps=1)
    add_exits(model.eval(), [1, 3])
    add_skip_gates(model, [1, 3], skip_budget=0.4)
    let_one_leave(model, inputs(model))
    model.save_pretrained(tmp_path)
    loaded = ChorusForSequenceClassification.from_pretrained(tmp_path)
    assert names(loaded) == names(model)
    state = loaded.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        expected, found = model(**inputs(model)), loaded(**inputs(model))
    assert sorted(found.left_after.tolist()) == [1, 2, 4]
    assert torch.equal(found.left_after, expected.left_after) and torch.equal(found.logits, expected.logits)


def test_new_exits_learn_while_nothing_else_moves():
    model = plain_classifier()
    add_exits(model, [1, 2])
    freeze(model, "all")
    unfreeze(model, "exits")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    losses = train(model, inputs(model) | {"labels": LABELS})
    assert losses[-1] < losses[0] - 0.1
    moved = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert moved == [f"exits.{exit_}.{part}.weight" for exit_ in (0, 1) for part in ("norm", "score")]


def test_exits_of_a_generative_model_have_a_loss_and_no_parameters(tmp_path: Path, batch: Batch):
    model = make()
    before = logits_of(model, batch)
    assert model.train()(**batch).exit_loss is None
    report = add_exits(model.eval(), [1])
    assert report.parameters_before == report.parameters_after
    assert "no parameters: an exit of a generative model runs the final norm and the head" in str(report)
    assert torch.equal(logits_of(model, batch), before)
    model.save_pretrained(tmp_path)
    loaded = ChorusForConditionalGeneration.from_pretrained(tmp_path).train()
    assert loaded(**batch).exit_loss > 0
    assert (loaded.config.text_config.exit_layers, loaded.config.text_config.exit_loss_coef) == ([1], 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [False, True])
def test_added_gates_change_no_bit_of_the_outputs(training: bool, dtype: torch.dtype, batch: Batch):
    model = make().to(dtype).train(training)
    media = {n: v.to(dtype) if v.is_floating_point() else v for n, v in batch.items() if n != "labels"}
    with torch.no_grad():
        before = model(**media).logits
        report = add_skip_gates(model, [0, 2], skip_budget=0.3)
        assert torch.equal(model(**media).logits, before)
        assert torch.equal(model(**media, skip_threshold=0.73).logits, before)
        assert not torch.equal(model(**media, skip_threshold=0.74).logits, before)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert report.parameters_after - report.parameters_before == 2 * (64 + 1)
    assert parameter_report(model.config).total == report.parameters_after


def test_added_gates_of_whole_layers_change_no_bit_and_then_skip(batch: Batch):
    model = make()
    media = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        before = model(**media, output_compute=True)
        add_skip_gates(model, [1, 2], skip_budget=0.3, skip_scope="layer")
        assert torch.equal(model(**media).logits, before.logits)
        closed = model(**media, skip_threshold=1.0, output_compute=True)
    queries = [layer.skip_scope for layer in model.model.language_model.layers]
    assert queries == ["layer"] * len(queries) and model.config.text_config.skip_scope == "layer"
    assert (closed.compute.flops < before.compute.flops).all()
    with pytest.raises(ValueError, match=r"skip_scope='feed_forward', but the gates of skip_layers=\[1, 2\]"):
        add_skip_gates(model, [0], skip_scope="feed_forward")


def test_gates_that_were_there_keep_their_weights():
    model = make(skip_layers=[1], skip_budget=0.3)
    gate = model.model.language_model.layers[1].skip_gate
    nn.init.normal_(gate.weight)
    before = gate.weight.clone()
    add_skip_gates(model, [2, 0])
    text = model.config.text_config
    assert (text.skip_layers, text.skip_budget) == ([0, 1, 2], 0.3)
    assert model.model.language_model.layers[1].skip_gate is gate and torch.equal(gate.weight, before)


def test_generation_goes_on_as_before_with_new_gates(batch: Batch):
    model = make()
    prompt = {"input_ids": batch["input_ids"][2:, 17:], "max_new_tokens": 6, "do_sample": False}
    before = model.generate(**prompt)
    add_skip_gates(model, [1, 2], skip_budget=0.3)
    assert torch.equal(model.generate(**prompt), before)


def test_gates_added_after_outputs_were_recorded_are_recorded_too(batch: Batch):
    model = make(skip_layers=[1], skip_budget=0.3)
    media = {name: value for name, value in batch.items() if name != "labels"}
    assert len(model.model(**media, output_skip_logits=True).skip_logits) == 1
    add_skip_gates(model, [2])
    assert len(model.model(**media, output_skip_logits=True).skip_logits) == 2
    assert model(**media, output_compute=True).compute.flops.min() > 0


def test_new_gates_come_to_their_budget_while_nothing_else_moves(batch: Batch):
    model = make(router_aux_loss_coef=0.0)
    add_skip_gates(model, [1, 2], skip_budget=0.9)
    freeze(model, "all")
    unfreeze(model, "skip_gates")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = model.train()(**batch).skip_loss.item()
    train(model, batch, steps=40)
    assert model(**batch).skip_loss.item() < 0.5 * first
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if ".skip_gate." in name}


def test_a_decoder_alone_takes_gates():
    decoder = ChorusTextModel(tiny_config().text_config)
    add_skip_gates(decoder, [1], skip_budget=0.3)
    assert [n for n in names(decoder) if "skip_gate" in n] == [f"layers.1.skip_gate.{n}" for n in ("weight", "bias")]


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (lambda m: add_exits(m, [4]), r"add_exits: .*exit_layers=4 is outside 1\.\.3 of 4 layers"),
        (lambda m: add_exits(m, [1, 0]), r"exit_layers=0 is outside 1\.\.3"),
        (lambda m: add_exits(m, []), r"add_exits: layers is empty; the model has exit_layers=\[2\]"),
        (lambda m: add_exits(m, [1, 2]), r"add_exits: the model has 2 already, exit_layers=\[2\]"),
        (lambda m: add_exits(m, [1, 1]), r"add_exits: layers=\[1, 1\] names 1 twice"),
        (lambda m: add_exits(m, [1], exit_loss_coef=-1.0), "add_exits: .*exit_loss_coef=-1.0 is outside 0..inf"),
        (lambda m: add_skip_gates(m, [4]), "add_skip_gates: .*skip_layers names layer 4 of 4"),
        (lambda m: add_skip_gates(m, []), r"add_skip_gates: layers is empty; the model has skip_layers=\[1\]"),
        (lambda m: add_skip_gates(m, [1]), r"add_skip_gates: the model has 1 already, skip_layers=\[1\]"),
        (lambda m: add_skip_gates(m, [2], skip_budget=1.5), r"add_skip_gates: .*skip_budget=1.5 is outside 0\.\.1"),
    ],
)
def test_what_cannot_be_added_is_refused_and_nothing_changes(operation: Any, message: str):
    model = classifier([0.5], exit_layers=[2], skip_layers=[1], skip_budget=0.3)
    config, before = model.config.to_dict(), names(model)
    with pytest.raises(ValueError, match=message):
        operation(model)
    assert model.config.to_dict() == config
    assert names(model) == before


def test_gates_of_a_model_without_a_budget_need_one():
    with pytest.raises(ValueError, match=r"add_skip_gates: .*skip_layers=\[1\] without a skip_budget"):
        add_skip_gates(make(), [1])


@pytest.mark.parametrize("kind", [ChorusForContrastive, ChorusModel])
def test_exits_need_a_head_that_can_answer(kind: Any):
    with pytest.raises(ValueError, match=f"add_exits: {kind.__name__} has no head that could answer after a layer"):
        add_exits(kind(tiny_config()), [1])


@pytest.mark.parametrize("operation", ["add_exits", "add_skip_gates"])
def test_adapters_refuse_it(operation: str):
    adapted = get_peft_model(make(), LoraConfig(target_modules=["o_proj"]))
    with pytest.raises(ValueError, match=f"{operation}: 3 modules carry adapters"):
        getattr(surgery, operation)(adapted, [1])
