"""A token passes a feed-forward by on its own account, at no cost, and training keeps to a budget."""

from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch import Tensor, nn

from chorus_moe import ChorusForConditionalGeneration
from chorus_moe.modeling.depth_skip import SkipGate, feed_open_tokens, open_share, straight_through, threshold_logit
from chorus_moe.modeling.losses import skip_budget_loss
from chorus_moe.modeling.moe_plan import ForwardPlan
from tests.conftest import tiny_batch, tiny_config
from tests.modeling.test_modeling_generation import collate, sample_inputs

BUDGET = 0.4
WHOLE = {"skip_scope": "layer"}
# float32 sums in another order (other rows at once): logits are of size 0.5, worst difference seen is 2e-7.
ATOL = 5e-6


def make(std: float = 1.0, **text: Any) -> ChorusForConditionalGeneration:
    """A tiny model in which some gates are open and some are closed: whatever the token, if `std` is 0."""
    torch.manual_seed(0)
    options = {"skip_budget": BUDGET, "router_aux_loss_coef": 0.0} | text
    model = ChorusForConditionalGeneration(tiny_config(**options)).eval()
    model.generation_config.eos_token_id = None
    for gate in gates(model):
        gate.weight.data.normal_(std=std)
        gate.bias.data.zero_()
    return model


def gates(model: nn.Module) -> list[SkipGate]:
    return [module for module in model.modules() if isinstance(module, SkipGate)]


@pytest.fixture
def batch() -> dict[str, Tensor]:
    return tiny_batch(tiny_config())


def run(model: nn.Module, batch: dict[str, Tensor], **options: Any) -> Any:
    with torch.no_grad():
        return model(**{k: v for k, v in batch.items() if k != "labels"}, **options)


@pytest.mark.parametrize("training", [False, True])
def test_new_gates_change_nothing(training: bool, batch: dict[str, Tensor]):
    torch.manual_seed(0)
    model = ChorusForConditionalGeneration(tiny_config(skip_budget=BUDGET)).train(training)
    plain = ChorusForConditionalGeneration(tiny_config()).train(training)
    missing = plain.load_state_dict(model.state_dict(), strict=False)
    assert missing.unexpected_keys == [
        f"model.language_model.layers.{layer}.skip_gate.{name}" for layer in (1, 2) for name in ("weight", "bias")
    ]
    assert torch.equal(run(model, batch).logits, run(plain, batch).logits)


def test_closed_gates_leave_attention_and_no_feed_forward(batch: dict[str, Tensor]):
    model, plain = make(), make()
    for layer in plain.model.language_model.layers[1:]:
        layer.mlp.forward = lambda hidden_states, plan: (torch.zeros_like(hidden_states), {})
    found = run(model, batch, skip_threshold=1.0).logits
    assert torch.equal(found, run(plain, batch, skip_threshold=0.0).logits)
    assert not torch.equal(found, run(model, batch, skip_threshold=0.0).logits)


@pytest.mark.parametrize("mlp", ["dense", "sparse"])
def test_tokens_that_pass_by_never_enter_the_feed_forward(mlp: str, batch: dict[str, Tensor]):
    model = make(mlp_layer_types=["dense", mlp, mlp])
    entered: list[int] = []
    for layer in model.model.language_model.layers[1:]:
        layer.mlp.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0].shape[:-1].numel()))
    logits = run(model.model, batch, output_skip_logits=True).skip_logits
    assert entered == [int((layer > 0).sum()) for layer in logits]
    assert 0 < min(entered) <= max(entered) < batch["input_ids"].numel()


def test_training_computes_what_inference_computes(batch: dict[str, Tensor]):
    model = make()
    expected = run(model, batch).logits
    torch.testing.assert_close(run(model.train(), batch).logits, expected, rtol=0, atol=ATOL)


def test_a_static_plan_computes_what_gathered_rows_compute():
    model = make(mlp_layer_types=["dense"] * 3)
    layer = model.model.language_model.layers[1]
    hidden = torch.randn(2, 5, 64)
    modality = torch.zeros(2, 5, dtype=torch.long)
    plan = ForwardPlan.build(modality, None)
    static = ForwardPlan(modality.flatten(), None, is_static=True)
    logits = layer.skip_gate(hidden)
    found, expected = (feed_open_tokens(layer.mlp, hidden, p, logits) for p in (static, plan))
    torch.testing.assert_close(found, expected, rtol=0, atol=ATOL)


def test_a_sample_alone_is_what_it_is_in_a_batch(batch: dict[str, Tensor]):
    model = make()
    ids = batch["input_ids"].clamp(min=5)
    whole = run(model, {"input_ids": ids}).logits
    for row in range(3):
        torch.testing.assert_close(
            run(model, {"input_ids": ids[row : row + 1]}).logits[0], whole[row], rtol=0, atol=ATOL
        )


def test_a_cached_step_is_what_it_is_uncached():
    model = make()
    ids = torch.randint(5, 128, (2, 12), generator=torch.Generator().manual_seed(0))
    first = run(model, {"input_ids": ids[:, :8]}, use_cache=True)
    rest = run(model, {"input_ids": ids[:, 8:]}, past_key_values=first.past_key_values).logits
    torch.testing.assert_close(rest, run(model, {"input_ids": ids}).logits[:, 8:], rtol=0, atol=ATOL)


def test_generate_reads_the_threshold_from_its_configuration(tmp_path: Any):
    model = make()
    ids = collate([sample_inputs(model, 1, [9])], 0)
    model.generation_config.skip_threshold = 0.9
    model.save_pretrained(tmp_path)
    again = ChorusForConditionalGeneration.from_pretrained(tmp_path)
    seen: list[Any] = []
    again.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs.get("skip_threshold")), with_kwargs=True
    )
    again.generate(**ids, max_new_tokens=2, do_sample=False)
    assert seen and set(seen) == {0.9}
    assert torch.equal(run(again, ids).logits, run(model, ids).logits)


def test_recorded_routing_names_the_tokens_of_the_batch(batch: dict[str, Tensor]):
    model = make()
    outputs = run(model.model, batch, output_router_logits=True, output_skip_logits=True)
    modality = batch["mm_token_type_ids"].flatten()
    real = batch["attention_mask"].flatten().bool()
    for routing, logits in zip(outputs.routing, outputs.skip_logits, strict=True):
        is_open = logits.flatten() > 0
        assert torch.equal(routing["common"].rows, is_open.nonzero().squeeze(1))
        assert torch.equal(routing["image"].rows, (is_open & real & (modality == 1)).nonzero().squeeze(1))


def test_a_decision_is_exact_and_has_the_gradient_of_the_sigmoid():
    logits = torch.tensor([-3.0, -0.1, 0.0, 0.1, 7.0], requires_grad=True)
    decision = straight_through(logits)
    assert decision.tolist() == [0, 0, 0, 1, 1]
    decision.sum().backward()
    probability = logits.detach().sigmoid()
    torch.testing.assert_close(logits.grad, probability * (1 - probability))


def test_the_open_share_counts_real_tokens_only():
    layers = [torch.tensor([[1.0, -1.0, 1.0]]), torch.tensor([[-1.0, -1.0, 1.0]])]
    real = torch.tensor([[1, 1, 0]])
    assert open_share(layers, None).item() == pytest.approx(3 / 6)
    assert open_share(layers, real).item() == pytest.approx(1 / 4)
    assert skip_budget_loss(layers, real, 0.25).item() == pytest.approx((1 / 4 - 3 / 4) ** 2)


def test_training_adds_the_budget_in_the_share_of_the_micro_batch(batch: dict[str, Tensor]):
    model = make(skip_loss_coef=2.0).train()
    with torch.no_grad():
        whole = model(**batch)
        count = int((batch["labels"][:, 1:] != -100).sum())
        half = model(**batch, num_items_in_batch=2 * count)
        model.config.text_config.skip_loss_coef = 0.0
        plain = model(**batch)
    logits = run(model.model, batch, output_skip_logits=True).skip_logits
    assert whole.skip_loss.item() == pytest.approx(skip_budget_loss(logits, batch["attention_mask"], BUDGET).item())
    assert whole.loss.item() == pytest.approx(plain.loss.item() + 2 * whole.skip_loss.item(), rel=1e-6)
    assert half.loss.item() == pytest.approx(whole.loss.item() / 2, rel=1e-6)
    assert plain.skip_loss is None


def test_training_brings_the_open_share_to_the_budget(batch: dict[str, Tensor]):
    model = make(std=0.3, skip_budget=0.7).train()
    optimizer = torch.optim.Adam([p for gate in gates(model) for p in gate.parameters()], lr=0.02)
    distances = []
    for _ in range(25):
        loss = model(**batch).skip_loss
        distances.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert distances[-1] < 0.1 * distances[0]


def test_the_language_loss_reaches_the_gates(batch: dict[str, Tensor]):
    model = make(skip_loss_coef=0.0).train()
    model(**batch).loss.backward()
    assert all(gate.weight.grad.abs().max() > 0 for gate in gates(model))


@pytest.mark.parametrize(
    ("threshold", "message"),
    [(1.5, r"skip_threshold=1.5 is outside 0\.\.1"), (-0.1, r"skip_threshold=-0.1 is outside")],
)
def test_a_threshold_that_is_no_probability_is_refused(threshold: float, message: str):
    with pytest.raises(ValueError, match=message):
        threshold_logit(threshold)


def test_a_threshold_without_gates_is_refused(model: ChorusForConditionalGeneration, batch: dict[str, Tensor]):
    with pytest.raises(ValueError, match="skip_threshold=0.3 changes nothing: the model has no skip_layers"):
        run(model, batch, skip_threshold=0.3)


def by_hand(model: Any, layer: Any, hidden: Tensor) -> Tensor:
    """A layer on one sample, token by token: each open token attends to the keys of all before it."""
    attention, outputs = layer.self_attn, []
    normed = layer.input_layernorm(hidden)
    cos, sin = model.model.language_model.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])

    def heads(projection: nn.Module) -> Tensor:
        states = projection(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        first, second = states.chunk(2, dim=-1)
        return states * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]

    groups = attention.num_key_value_groups
    query, key = heads(attention.q_proj), heads(attention.k_proj).repeat_interleave(groups, dim=1)
    value = attention.v_proj(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
    value = value.repeat_interleave(groups, dim=1)
    for place in range(hidden.shape[1]):
        if layer.skip_gate(normed)[0, place] <= 0:
            outputs.append(hidden[:, place])
            continue
        scores = (key[:, :, : place + 1] @ query[:, :, place, :, None]).squeeze(-1) * attention.scaling
        read = (scores.softmax(dim=-1)[..., None] * value[:, :, : place + 1]).sum(dim=2).flatten(1)
        state = hidden[:, place] + attention.o_proj(read)
        outputs.append(state + layer.mlp(layer.post_attention_layernorm(state)[:, None], None)[0][:, 0])
    return torch.stack(outputs, dim=1)


@torch.no_grad()
def test_a_token_that_skips_a_layer_leaves_its_keys_and_nothing_else():
    model = make(**WHOLE, mlp_layer_types=["dense"] * 3, cross_modal_layers=[2])
    found: dict[str, Tensor] = {}
    layer = model.model.language_model.layers[1]
    layer.register_forward_hook(lambda _, inputs, output: found.update(before=inputs[0], after=output))
    run(model, {"input_ids": torch.randint(5, 128, (1, 13), generator=torch.Generator().manual_seed(0))})
    expected = by_hand(model, layer, found["before"])
    torch.testing.assert_close(found["after"], expected, rtol=0, atol=ATOL)
    assert 0 < int((found["after"] == found["before"]).all(-1).sum()) < 13


@pytest.mark.parametrize("attention", ["sdpa", "eager", "block_local"])
@pytest.mark.parametrize(
    "text",
    [
        {},
        {"is_causal": False},
        {"sliding_window": 4, "layer_types": ["sliding_attention"] * 3, "cross_modal_layers": [0]},
        {"sliding_window": 4, "layer_types": ["hybrid_sliding"] * 3, "num_memory_tokens": 2},
    ],
    ids=["causal", "bidirectional", "windows", "memory"],
)
def test_whole_layers_compute_in_training_what_they_compute_in_a_batch_and_alone(attention: str, text: dict[str, Any]):
    model = make(**WHOLE, **text)
    model.set_attn_implementation(attention)
    batch = tiny_batch(model.config)
    real = batch["attention_mask"].bool()
    expected = run(model.train(), batch).logits
    found = run(model.eval(), batch).logits
    torch.testing.assert_close(found[real], expected[real], rtol=0, atol=ATOL)
    ids = batch["input_ids"].clamp(min=5)
    whole = run(model, {"input_ids": ids}).logits
    for row in range(3):
        alone = run(model, {"input_ids": ids[row : row + 1]}).logits[0]
        torch.testing.assert_close(alone, whole[row], rtol=0, atol=ATOL)


@pytest.mark.parametrize("pieces", [[8, 1, 1, 1, 1], [5, 7], [1] * 12])
def test_whole_layers_are_cached_as_uncached(pieces: list[int]):
    model = make(**WHOLE, exit_layers=[1])
    ids = torch.randint(5, 128, (2, 12), generator=torch.Generator().manual_seed(0))
    cache, found, start = None, [], 0
    for size in pieces:
        output = run(model, {"input_ids": ids[:, start : start + size]}, past_key_values=cache, use_cache=True)
        cache, start = output.past_key_values, start + size
        found.append(output.logits)
    torch.testing.assert_close(torch.cat(found, dim=1), run(model, {"input_ids": ids}).logits, rtol=0, atol=ATOL)


@pytest.mark.parametrize("scope", ["feed_forward", "layer"])
def test_queries_and_feed_forwards_are_computed_for_open_tokens_alone(scope: str):
    model = make(skip_scope=scope, mlp_layer_types=["dense"] * 3, cross_modal_layers=[0])
    layer = model.model.language_model.layers[1]
    rows: dict[str, int] = {}
    for name, module in {"q": layer.self_attn.q_proj, "k": layer.self_attn.k_proj, "mlp": layer.mlp.up_proj}.items():
        module.register_forward_hook(lambda _, args, __, name=name: rows.update({name: args[0].shape[:-1].numel()}))
    ids = torch.randint(5, 128, (1, 30), generator=torch.Generator().manual_seed(0))
    outputs = run(model, {"input_ids": ids}, output_compute=True)
    opened = int((run(model.model, {"input_ids": ids}, output_skip_logits=True).skip_logits[0] > 0).sum())
    assert 0 < opened < 30
    assert rows == {"q": opened if scope == "layer" else 30, "k": 30, "mlp": opened}
    model.config.text_config.skip_scope = "feed_forward"
    assert (outputs.compute.flops < run(model, {"input_ids": ids}, output_compute=True).compute.flops) == (
        scope == "layer"
    )


def test_closed_gates_leave_a_layer_out_and_fill_its_cache():
    model = make(**WHOLE)
    ids = torch.randint(5, 128, (2, 9), generator=torch.Generator().manual_seed(0))
    output = run(model, {"input_ids": ids}, skip_threshold=1.0, use_cache=True, output_router_logits=True)
    assert [len(layer["common"].rows) for layer in output.routing] == [0, 0]
    assert [layer.get_seq_length() for layer in output.past_key_values.layers] == [9, 9, 9]
    shallow = run(model.model.language_model, {"input_ids": ids}, exit_layer=1).last_hidden_state
    torch.testing.assert_close(output.logits, model.lm_head(shallow), rtol=0, atol=ATOL)


def test_whole_layers_train_to_the_budget_and_checkpointing_changes_no_gradient(batch: dict[str, Tensor]):
    gradients = []
    for checkpointed in (False, True):
        model = make(**WHOLE).train()
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        loss = model(**batch)
        assert loss.skip_loss > 0
        loss.loss.backward()
        assert all(gate.weight.grad.abs().max() > 0 for gate in gates(model))
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("training", [False, True])
def test_new_gates_of_whole_layers_change_nothing(training: bool, batch: dict[str, Tensor]):
    torch.manual_seed(0)
    model = ChorusForConditionalGeneration(tiny_config(skip_budget=BUDGET, **WHOLE)).train(training)
    plain = ChorusForConditionalGeneration(tiny_config()).train(training)
    plain.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(run(model, batch).logits, run(plain, batch).logits)


@pytest.mark.parametrize(
    ("text", "message"),
    [({"skip_scope": "layers"}, "skip_scope 'layers'"), ({"skip_budget": None}, "skip_scope='layer' without")],
)
def test_a_scope_that_does_nothing_is_refused(text: dict[str, Any], message: str):
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        tiny_config(**{"skip_budget": BUDGET} | WHOLE | text)
