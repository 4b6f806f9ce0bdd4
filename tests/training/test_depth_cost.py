"""What a forward spends, against counts by the flop counter of torch and by hooks."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from chorus_moe import ChorusForConditionalGeneration, ChorusForSequenceClassification
from chorus_moe.modeling.attention import Attention
from chorus_moe.modeling.layers import TokenGate
from chorus_moe.modeling.moe_banks import BankGate, ChorusExperts, ExpertBank
from chorus_moe.modeling.moe_routers import Router
from tests.conftest import tiny_batch, tiny_config

BANKS = {"text": {"router": "attention"}, "image": {"gate": "own"}, "audio": {"num_experts": 8}, "common": {}}
WINDOWS = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 4}


def generator(attention: str = "eager", **text: Any) -> ChorusForConditionalGeneration:
    torch.manual_seed(0)
    return ChorusForConditionalGeneration._from_config(tiny_config(**text), attn_implementation=attention).eval()


def row_of(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """The real tokens of one sample of `tiny_batch`, in a batch of its own."""
    real = batch["attention_mask"][row].bool()
    alone = {name: batch[name][row : row + 1, real] for name in ("input_ids", "mm_token_type_ids")}
    if row != 1:
        alone["pixel_values"] = batch["pixel_values"][[0 if row == 0 else 1]]
    if row != 0:
        alone |= {name: batch[name][[row - 1]] for name in ("input_features", "input_features_mask")}
    return alone


@torch.no_grad()
def counted_by_torch(model: Any, batch: dict[str, Tensor]) -> int:
    """Operations in the layers, as torch counts the products that it runs."""
    with FlopCounterMode(display=False) as counter:
        model(**batch, use_cache=False)
    found = counter.get_flop_counts()
    layers = [f"{type(model).__name__}.model.language_model.layers.{i}" for i in range(3)]
    return sum(sum(found[name].values()) for name in layers)


@pytest.mark.parametrize("banks", [None, BANKS])
@pytest.mark.parametrize("row", [0, 1, 2])
def test_the_operations_of_a_bidirectional_sample_are_those_that_torch_runs(row: int, banks: Any):
    # Bidirectional: everything that a dense product computes is seen. Linear experts: only what is visited is computed.
    model = generator(is_causal=False, experts_layout="linear", expert_banks=banks)
    batch = row_of(tiny_batch(model.config), row)
    with torch.no_grad():
        compute = model(**batch, output_compute=True).compute
    assert compute.flops.item() == counted_by_torch(model, batch)


@torch.no_grad()
def counted_by_hooks(model: Any, batch: dict[str, Tensor]) -> tuple[int, int]:
    """Visits and operations in the layers, by what the modules were given; attention by its maps."""
    flops = visits = 0

    first = {id(bank.experts) for bank in model.modules() if isinstance(bank, ExpertBank)}

    def add(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal flops, visits
        rows = args[0].shape[:-1].numel() if args else 0
        if isinstance(module, nn.Linear):
            flops += 2 * rows * module.weight.numel()
        elif isinstance(module, ChorusExperts):
            visited = int((args[1] < module.num_experts).sum())
            visits += visited * (id(module) in first)  # further feed-forwards of an expert are no visits of their own
            flops += visited * 2 * (module.gate_up_proj[0].numel() + module.down_proj[0].numel())
        elif isinstance(module, (Router, TokenGate)) or (isinstance(module, BankGate) and module.weight is not None):
            flops += 2 * rows * module.weight.numel()
        elif isinstance(module, Attention):
            flops += 4 * module.head_dim * int((output[1] > 0).sum())

    for module in model.model.language_model.layers.modules():
        module.register_forward_hook(add)
    model(**batch, use_cache=False)
    return visits, flops


DEEP = {"expert_banks": {"text": {"expert_depth": 3, "adaptive_experts": True}, "common": {"expert_depth": 2}}}
ADAPTIVE = {name: {"adaptive_experts": True} for name in ("text", "common")}


@pytest.mark.parametrize("text", [{}, WINDOWS, WINDOWS | {"is_causal": False}, {"expert_banks": ADAPTIVE}, DEEP])
@pytest.mark.parametrize("row", [0, 2])
def test_visits_and_operations_are_those_that_hooks_see(row: int, text: dict[str, Any]):
    model = generator(**text)
    batch = row_of(tiny_batch(model.config), row)
    with torch.no_grad():
        compute = model(**batch, output_compute=True).compute
    assert (compute.experts.item(), compute.flops.item()) == counted_by_hooks(model, batch)


def test_a_batch_costs_what_its_samples_cost_alone_and_padding_nothing():
    model = generator("sdpa")
    batch = {name: value for name, value in tiny_batch(model.config).items() if name != "labels"}
    with torch.no_grad():
        together = model(**batch, output_compute=True).compute
        alone = [model(**row_of(batch, row), output_compute=True).compute for row in range(3)]
    for found, parts in zip(together, zip(*alone, strict=True), strict=True):
        assert torch.equal(found, torch.cat(parts))


def test_a_cached_step_costs_what_the_whole_costs_more():
    model = generator("sdpa").model
    ids = torch.randint(5, 128, (2, 7))
    with torch.no_grad():
        whole = model(input_ids=ids, output_compute=True).compute
        first = model(input_ids=ids[:, :5], use_cache=True, output_compute=True)
        rest = model(input_ids=ids[:, 5:], past_key_values=first.past_key_values, output_compute=True).compute
    assert torch.equal(first.compute.flops + rest.flops, whole.flops)


def test_a_sample_that_leaves_pays_for_the_layers_it_ran_through():
    torch.manual_seed(0)
    config = tiny_config(num_hidden_layers=4, exit_layers=[2])
    config.num_labels = 5
    model = ChorusForSequenceClassification(config).eval()
    batch = {name: value for name, value in tiny_batch(config).items() if name != "labels"}
    with torch.no_grad():
        full = model(**batch, output_compute=True).compute
        sure = model(**batch, output_exit_logits=True).exit_logits[0].softmax(dim=-1).amax(dim=-1)
        config.exit_thresholds = [sure.sort().values[:2].mean().item()]
        outputs = model(**batch, output_compute=True)
        config.exit_thresholds = [0.0]
        short = model(**batch, output_compute=True).compute
    left = outputs.left_after == 2
    assert left.sum() == 2 and torch.equal(outputs.compute.layers, outputs.left_after)
    assert torch.equal(outputs.compute.flops, torch.where(left, short.flops, full.flops))
    assert (short.flops < full.flops).all() and outputs.routing is None


def test_nothing_is_counted_unless_asked_for():
    model = generator("sdpa")
    batch = tiny_batch(model.config)
    with torch.no_grad():
        plain, counted = model(**batch), model(**batch, output_compute=True)
    assert plain.compute is None and counted.routing is None and torch.equal(plain.logits, counted.logits)


def test_packed_sequences_are_refused():
    model = generator("sdpa").model
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    with pytest.raises(ValueError, match="packed sequences"):
        model(input_ids=torch.full((1, 5), 7), position_ids=positions, output_compute=True)


SKIPPING = {"skip_budget": 0.3, "shared_expert_intermediate_size": 32}


def open_some_gates(model: Any) -> None:
    """Gates that are open for about every other token."""
    torch.manual_seed(1)
    for layer in model.model.language_model.layers:
        if layer.skip_gate is not None:
            torch.nn.init.normal_(layer.skip_gate.weight)
            torch.nn.init.zeros_(layer.skip_gate.bias)


@pytest.mark.parametrize(
    "text", [{}, {"expert_banks": ADAPTIVE}, {"is_causal": False}, {"mlp_layer_types": ["dense"] * 3}]
)
@pytest.mark.parametrize("skip_threshold", [None, 0.4])
def test_tokens_that_pass_a_feed_forward_by_cost_nothing_there(text: dict[str, Any], skip_threshold: float | None):
    model = generator(**SKIPPING | text)
    open_some_gates(model)
    batch = row_of(tiny_batch(model.config), 2) | {"skip_threshold": skip_threshold}
    with torch.no_grad():
        outputs = model.model(**batch, output_compute=True)
        everything = model(**batch | {"skip_threshold": 0.0}, output_compute=True).compute
    assert (outputs.compute.experts.item(), outputs.compute.flops.item()) == counted_by_hooks(model, batch)
    assert outputs.compute.flops < everything.flops and outputs.skip_logits is None


def test_in_training_every_token_pays_for_the_feed_forward():
    model = generator(**SKIPPING)
    open_some_gates(model)
    batch = tiny_batch(model.config)
    with torch.no_grad():
        everything = model(**batch, skip_threshold=0.0, output_compute=True).compute
        model.train()
        assert torch.equal(model(**batch, output_compute=True).compute.flops, everything.flops)


def test_gates_of_global_tokens_are_counted_and_left_out_of_what_is_returned():
    windows = {"layer_types": ["sliding_attention"] * 3, "sliding_window": 4, "num_global_tokens": 2}
    model = generator(is_causal=False, cross_modal_layers=[], **SKIPPING | windows)
    open_some_gates(model)
    batch = row_of(tiny_batch(model.config), 0)
    with torch.no_grad():
        outputs = model.model(**batch, output_compute=True, output_skip_logits=True)
    assert [logits.shape for logits in outputs.skip_logits] == [batch["input_ids"].shape] * 2
    assert (outputs.compute.experts.item(), outputs.compute.flops.item()) == counted_by_hooks(model, batch)


def test_an_early_exit_pays_for_its_layers():
    model = generator()
    with torch.no_grad():
        spent = model(**tiny_batch(model.config), output_compute=True, exit_layer=1).compute
    assert spent.layers.tolist() == [1] * len(spent.layers)


def flops(model: Any, ids: Tensor, **options: Any) -> int:
    with torch.no_grad():
        return model(input_ids=ids, output_compute=True, **options).compute.flops.item()


def test_a_token_that_skips_a_layer_costs_its_keys_and_values_alone():
    length, text = 7, {"skip_layers": [1], "skip_budget": 0.5, "skip_scope": "layer", "mlp_layer_types": ["dense"] * 3}
    model = generator("sdpa", **text)
    ids = torch.randint(5, 128, (1, length))
    # Of a width of 64: queries and output, then a feed-forward of 96, then scores and sums over the keys up to each.
    saved = length * (2 * 2 * 64 * 64 + 3 * 2 * 64 * 96) + 4 * 64 * sum(range(1, length + 1))
    assert flops(model, ids, skip_threshold=0.0) - flops(model, ids, skip_threshold=1.0) == saved


def test_memory_tokens_cost_the_same_for_each_token():
    kinds = {"layer_types": ["hybrid_sliding"] * 3, "num_memory_tokens": 5}
    plain, memory = (
        generator("sdpa", **WINDOWS | {"cross_modal_layers": []} | more)
        for more in ({"layer_types": ["sliding_attention"] * 3}, kinds)
    )
    # In each of 3 layers, of 5 memory tokens: weights of 2 key heads, what 2 key heads of 16 write, what 4 heads read.
    of_token = 3 * 5 * (2 * 64 * 2 + 4 * 16 * 2 + 4 * 16 * 4)
    for length in (3, 40):
        ids = torch.randint(5, 128, (1, length))
        assert flops(memory, ids) - flops(plain, ids) == length * of_token
