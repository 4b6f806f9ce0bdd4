"""What is added changes nothing at first, is trained alone, and can be passed by."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from chorus_moe import ChorusForConditionalGeneration, surgery
from chorus_moe.modeling.moe_banks import MixtureOfBanks
from chorus_moe.modeling.moe_plan import ForwardPlan
from chorus_moe.surgery import add_bank, add_experts, close_bank, freeze, open_bank, parameter_report, unfreeze
from chorus_moe.training.lora import lora_config
from chorus_moe.training.routing.observer import RoutingObserver
from tests.conftest import tiny_config

Batch = dict[str, Tensor]
BANKS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "sigmoid": {"router": "sigmoid", "num_groups": 2, "topk_groups": 1},
    "attention": {"router": "attention"},
    "adaptive": {"adaptive_experts": True},
}


def make(**text: Any) -> ChorusForConditionalGeneration:
    torch.manual_seed(0)
    return ChorusForConditionalGeneration(tiny_config(**text)).eval()


@torch.no_grad()
def logits_of(model: nn.Module, batch: Batch, **options: Any) -> Tensor:
    model.eval()
    return model(**{name: value for name, value in batch.items() if name != "labels"}, **options).logits


def grown() -> ChorusForConditionalGeneration:
    """With two banks more, whose outputs are no longer zero."""
    model = make()
    add_bank(model, "medical", modalities=["text", "image"], num_experts=3)
    add_experts(model, "text", 2)
    for layer in (1, 2):
        for name in ("medical", "text_2"):
            nn.init.normal_(model.model.language_model.layers[layer].mlp.banks[name].experts.down_proj, std=0.2)
    return model


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_a_bank_is_added_wherever_the_norms_are(placement: str, batch: Batch):
    model = make(norm_placement=placement)
    before = logits_of(model, batch)
    add_bank(model, "medical", modalities=["text"], num_experts=3)
    assert torch.equal(logits_of(model, batch), before)


def train(model: nn.Module, batch: Batch, steps: int = 5) -> list[float]:
    """Losses of AdamW with weight decay on what is not frozen."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    losses = []
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm", "cpu_mm"])
def test_an_added_bank_changes_no_bit_of_the_outputs(implementation: str, batch: Batch):
    model = make()
    model.set_experts_implementation(implementation)
    before = logits_of(model, batch)
    add_bank(model, "medical", num_experts=3, intermediate_size=24)
    add_bank(model, "anatomy", modalities=["image"])  # first by name
    assert torch.equal(logits_of(model, batch), before)


@pytest.mark.parametrize("shared", [0, 32])
@pytest.mark.parametrize("kind", BANKS)
def test_added_experts_change_no_bit_of_the_outputs_whatever_routes_them(kind: str, shared: int, batch: Batch):
    model = make(expert_banks={"text": BANKS[kind], "common": BANKS[kind]}, shared_expert_intermediate_size=shared)
    before = logits_of(model, batch)
    add_experts(model, "text", 3)
    add_experts(model, "common", 1)
    assert torch.equal(logits_of(model, batch), before)


def test_added_experts_keep_the_settings_of_their_bank():
    model = make(expert_banks={"text": {**BANKS["sigmoid"], "layers": [2]}, "common": {}})
    report = add_experts(model, "text", 3, intermediate_size=8)
    (added,) = (bank for bank in model.config.text_config.banks if bank.name == "text_2")
    assert (added.router, added.balance, added.layers, added.modalities) == ("sigmoid", "bias", [2], ["text"])
    assert (added.num_experts_per_tok, added.num_groups, added.intermediate_size) == (2, 1, 8)
    assert report.experts == {"text_2": {2: (0, 3)}}


def test_each_layer_may_get_its_own_number_of_experts(batch: Batch):
    model = make()
    before = logits_of(model, batch)
    report = add_experts(model, "common", {1: 1, 2: 3})
    assert torch.equal(logits_of(model, batch), before)
    layers = model.model.language_model.layers
    assert [layers[i].mlp.banks["common_2"].experts.num_experts for i in (1, 2)] == [1, 3]
    assert report.experts == {"common_2": {1: (0, 1), 2: (0, 3)}}


def test_banks_stay_in_the_order_of_their_names_as_in_a_reloaded_model(tmp_path: Path, batch: Batch):
    model = grown()
    add_experts(model, "text", 1)
    model.save_pretrained(tmp_path)
    loaded = ChorusForConditionalGeneration.from_pretrained(tmp_path)
    assert list(model.model.language_model.layers[1].mlp.banks) == [
        *("audio", "common", "image", "medical", "text", "text_2", "text_3"),
    ]
    assert [name for name, _ in loaded.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert torch.equal(logits_of(loaded, batch), logits_of(model, batch))


def test_generation_is_unchanged_at_first_and_equal_with_and_without_a_cache_after(batch: Batch):
    model = make()
    inputs = {"input_ids": batch["input_ids"][2:, 17:], "max_new_tokens": 6, "do_sample": False}
    before = model.generate(**inputs)
    add_bank(model, "medical")
    assert torch.equal(model.generate(**inputs), before)
    model = grown()
    assert torch.equal(model.generate(**inputs), model.generate(**inputs, use_cache=False))


@pytest.mark.parametrize("names", [["medical"], ["text_2"]])
def test_what_was_added_learns_while_nothing_else_moves(names: list[str], batch: Batch):
    model = make()
    add_bank(model, "medical")
    add_experts(model, "text", 2)
    freeze(model, "all")
    unfreeze(model, *names)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    losses = train(model, batch)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert losses[-1] < losses[0] - 0.1
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}


def test_the_first_step_already_has_a_gradient(batch: Batch):
    model = make()
    add_bank(model, "medical")
    model.train()(**batch).loss.backward()
    bank = model.model.language_model.layers[1].mlp.banks["medical"]
    assert bank.experts.down_proj.grad.abs().sum() > 0
    assert bank.experts.gate_up_proj.grad.abs().sum() == 0


def test_a_closed_bank_is_as_if_it_were_not_there_bit_for_bit(batch: Batch):
    model, before = grown(), logits_of(make(), batch)
    assert not torch.equal(logits_of(model, batch), before)
    assert torch.equal(logits_of(model, batch, closed_banks=["medical", "text_2"]), before)
    train(model, batch, steps=1)
    model.load_state_dict(grown().state_dict())
    close_bank(model, "medical")
    assert torch.equal(logits_of(model, batch, closed_banks=["text_2"]), before)
    open_bank(model, "medical")
    assert not torch.equal(logits_of(model, batch, closed_banks=["text_2"]), before)


def test_a_bank_stays_closed_after_saving_and_in_generation(tmp_path: Path, batch: Batch):
    model, plain = grown(), make()
    for name in ("medical", "text_2"):
        close_bank(model, name)
    model.save_pretrained(tmp_path)
    loaded = ChorusForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(logits_of(loaded, batch), logits_of(plain, batch))
    inputs = {"input_ids": batch["input_ids"][2:, 17:], "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(loaded.generate(**inputs), plain.generate(**inputs))
    assert torch.equal(grown().generate(**inputs, closed_banks=["medical", "text_2"]), plain.generate(**inputs))


def test_closing_a_bank_of_the_softmax_leaves_its_weight_to_the_others(batch: Batch):
    model, without = make(), make(expert_banks={"text": {}, "image": {}, "audio": {}})
    states = {name: value for name, value in model.state_dict().items() if ".banks.common." not in name}
    for name, value in states.items():
        if name.endswith("bank_gate.weight"):
            states[name] = value[[0, 2, 3]]  # audio, image, text: without "common"
    without.load_state_dict(states)
    # Products with a row less may sum in another order: nothing was seen at logits of size 1.
    torch.testing.assert_close(
        logits_of(model, batch, closed_banks=["common"]), logits_of(without, batch), atol=1e-6, rtol=0
    )


def test_a_closed_bank_stays_in_the_graph_with_zero_gradients(batch: Batch):
    model = grown().train()
    model(**batch, closed_banks=["medical"]).loss.backward()
    bank = model.model.language_model.layers[1].mlp.banks["medical"]
    assert all(p.grad is not None and not p.grad.any() for p in bank.experts.parameters())


def test_a_closed_bank_routes_nothing(batch: Batch):
    model = grown()
    with RoutingObserver(model) as observer:
        logits_of(model, batch, closed_banks=["medical"])
    banks = observer.counters.banks[1]
    assert int(banks["medical"].tokens_M.sum()) == 0
    assert int(banks["text_2"].tokens_M.sum()) > 0


def test_a_single_expert_has_an_entropy_of_zero(batch: Batch):
    model = make()
    add_experts(model, "text", 1)
    with RoutingObserver(model) as observer:
        logits_of(model, batch)
    assert observer.counters.banks[1]["text_2"].entropy_M.tolist() == [0, 0, 0]


@pytest.mark.parametrize("closed", [(), ("medical",), ("common",)])
def test_a_static_plan_weighs_an_own_gate_like_a_dynamic_one(closed: tuple[str, ...]):
    config = tiny_config(expert_banks={"text": {}, "common": {}, "medical": {"gate": "own", "modalities": ["image"]}})
    torch.manual_seed(0)
    layer = MixtureOfBanks(config.text_config, 1)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    hidden, modality = torch.randn(1, 8, 64), torch.tensor([[0, 0, 1, 1, 3, 0, 1, 0]])
    outputs = []
    for is_static in (False, True):
        plan = ForwardPlan.build(modality, None)
        plan.is_static = is_static
        plan.options = options_with(closed)
        outputs.append(layer(hidden, plan)[0])
    # All rows against some rows of a product: worst difference seen 2e-6 at outputs of size 10.
    torch.testing.assert_close(*outputs, atol=1e-4, rtol=1e-5)


def options_with(closed: tuple[str, ...]) -> Any:
    from chorus_moe.modeling.moe_plan import RoutingOptions

    return RoutingOptions(None, {}, frozenset(), None, {}, frozenset(closed))


def test_the_report_and_the_plans_know_the_new_bank():
    model = grown()
    report = parameter_report(model.config)
    size = sum(p.numel() for n, p in model.named_parameters() if ".banks.medical." in n)
    assert report.total == sum(p.numel() for p in model.parameters())
    assert report.banks["medical"]["total"] == size
    assert "layers.*.mlp.banks.medical.experts" in model.config.text_config.base_model_ep_plan


def test_a_lora_finds_the_new_bank_and_its_gate():
    config = lora_config(grown(), banks="medical", router="train", verbose=False)
    assert config.modules_to_save == [
        f"language_model.layers.{layer}.mlp.banks.medical.{part}" for layer in (1, 2) for part in ("router", "gate")
    ]


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (lambda m: add_bank(m, "text"), "already has a bank 'text'"),
        (lambda m: add_bank(m, "dense"), "'dense' is the name of a part"),
        (lambda m: add_bank(m, "new", gate="softmax"), "gate='softmax'"),
        (lambda m: add_bank(m, "new", rooter="x"), "unknown key 'rooter'; did you mean 'router'"),
        (lambda m: add_bank(m, "new", num_experts=2, num_experts_per_tok=3), "=3 must be between 1 and num_experts=2"),
        (lambda m: add_bank(m, "new", layers=[0]), "layer 0 is not a sparse layer"),
        (lambda m: add_experts(m, "txt", 2), "unknown bank 'txt'; did you mean 'text'"),
        (lambda m: add_experts(m, "text", 0), "num_experts=0 is outside"),
        (lambda m: add_experts(m, "text", {0: 2}), r"layer 0 does not hold the bank 'text', which lives in \[1, 2\]"),
        (lambda m: close_bank(m, "txt"), "unknown bank 'txt'; did you mean 'text'"),
    ],
)
def test_an_impossible_operation_is_refused_and_nothing_changes(operation: Any, message: str):
    model = make()
    config, names = model.config.to_dict(), [name for name, _ in model.named_parameters()]
    with pytest.raises(ValueError, match=message):
        operation(model)
    assert model.config.to_dict() == config
    assert [name for name, _ in model.named_parameters()] == names


@pytest.mark.parametrize("operation", ["add_bank", "add_experts"])
def test_adapters_refuse_the_operation(operation: str):
    adapted = get_peft_model(make(), LoraConfig(target_modules=["o_proj"]))
    arguments = {"add_bank": ("new",), "add_experts": ("text", 2)}[operation]
    with pytest.raises(ValueError, match=f"{operation}: 3 modules carry adapters"):
        getattr(surgery, operation)(adapted, *arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"closed_banks": ["txt"]}, "unknown bank 'txt'; did you mean 'text'"),
        ({"closed_banks": "text"}, "is a string"),
        ({"closed_banks": ["text"], "sample_experts": ["text"]}, "'text', which is closed"),
    ],
)
def test_a_wrong_name_of_a_closed_bank_is_an_error(options: dict[str, Any], message: str, batch: Batch):
    with pytest.raises(ValueError, match=message):
        logits_of(make(), batch, **options)


@pytest.mark.parametrize("is_linear", [False, True])
def test_deeper_experts_answer_as_before_then_learn_and_are_saved(is_linear: bool, batch: Batch, tmp_path: Path):
    model = make(expert_banks={"text": {"num_experts": [3, 5]}, "common": {}})
    if is_linear:
        surgery.unfuse_experts(model)
    before = logits_of(model, batch)
    report = surgery.deepen_experts(model, "text", 3)
    # One product of a choice at a time where a token's choices were summed by the implementation: rounding.
    torch.testing.assert_close(logits_of(model, batch), before, rtol=0, atol=1e-6)
    assert report.parameters_after - report.parameters_before == 2 * (3 + 5) * 3 * 64 * 32
    freeze(model, "all")
    unfreeze(model, "experts:text")
    bank = model.model.language_model.layers[1].mlp.banks["text"]
    assert all(parameter.requires_grad for parameter in bank.deeper_experts.parameters())
    train(model, batch)
    assert (logits_of(model, batch) - before).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(type(model).from_pretrained(tmp_path), batch), logits_of(model, batch))


@pytest.mark.parametrize("is_linear", [False, True])
def test_a_deep_bank_that_is_added_changes_no_bit(is_linear: bool, batch: Batch):
    model = make()
    if is_linear:
        surgery.unfuse_experts(model)
    before = logits_of(model, batch)
    add_bank(model, "medical", modalities=["text"], expert_depth=2)
    assert torch.equal(logits_of(model, batch), before)


def test_experts_do_not_become_shallower():
    model = make(expert_banks={"common": {"expert_depth": 2}})
    with pytest.raises(ValueError, match=r"deepen_experts: bank 'common' has expert_depth=2, found 2"):
        surgery.deepen_experts(model, "common", 2)
