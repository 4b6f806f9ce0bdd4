"""Activation checkpointing changes memory, not numbers."""

from typing import Any

import pytest
import torch
from torch import Tensor

from chorus_moe import ChorusForConditionalGeneration
from tests.conftest import tiny_batch, tiny_config


def make(**text: Any) -> ChorusForConditionalGeneration:
    torch.manual_seed(0)
    options = {"router_z_loss_coef": 0.1, "alignment_loss_coef": 0.1} | text
    return ChorusForConditionalGeneration(tiny_config(**options)).train()


def train_step(model: ChorusForConditionalGeneration) -> tuple[Tensor, dict[str, Tensor | None], list[Tensor]]:
    """Loss, gradients and, for each bank, how often each expert was chosen."""
    output = model(**tiny_batch(model.config), output_router_logits=True)
    output.loss.backward()
    counts = [
        torch.bincount(bank.selected_experts.flatten(), minlength=4)
        for layer in output.routing
        for bank in layer.values()
    ]
    return output.loss, {name: parameter.grad for name, parameter in model.named_parameters()}, counts


@pytest.mark.parametrize("experts", ["cpu_mm", "grouped_mm"])
def test_checkpointing_changes_no_loss_no_gradient_and_no_choice(experts: str):
    plain, checkpointed = make(), make()
    for model in (plain, checkpointed):
        model.set_experts_implementation(experts)
    checkpointed.activation_checkpointing_enable()
    expected, found = train_step(plain), train_step(checkpointed)
    assert torch.equal(expected[0], found[0])
    assert all(torch.equal(a, b) for a, b in zip(expected[2], found[2], strict=True))
    for name, gradient in expected[1].items():
        # The same operations in the same order; the sums over a parameter's uses may change places.
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def test_decoder_and_towers_all_recompute():
    model = make()
    model.activation_checkpointing_enable()
    calls: dict[str, int] = {}

    def count(name: str):
        return lambda *_: calls.__setitem__(name, calls.get(name, 0) + 1)

    model.model.language_model.layers[1].mlp.register_forward_pre_hook(count("decoder"))
    model.model.audio_tower.encoder.layers[0].conv_module.register_forward_pre_hook(count("audio"))
    model.model.vision_tower.timm_model.blocks[0].attn.register_forward_pre_hook(count("vision"))
    train_step(model)
    assert calls == {"decoder": 2, "audio": 2, "vision": 2}


def test_reentrant_checkpointing_is_refused_where_it_would_drop_the_balance_loss():
    model = make()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(RuntimeError, match=r"balance loss would have no gradient.*use_reentrant.*False"):
        model(**tiny_batch(model.config))


def test_reentrant_checkpointing_is_refused_where_it_would_drop_the_alignment_loss():
    model = make(router_aux_loss_coef=0.0, router_z_loss_coef=0.0)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(RuntimeError, match=r"alignment loss would have no gradient.*use_reentrant.*False"):
        model(**tiny_batch(model.config))


def test_reentrant_checkpointing_is_refused_where_it_would_drop_the_gradient_of_a_draw():
    model = make(router_aux_loss_coef=0.0, router_z_loss_coef=0.0, alignment_loss_coef=0.0)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(RuntimeError, match=r"policy-gradient loss would have no gradient.*use_reentrant.*False"):
        model(**tiny_batch(model.config), sample_experts=("text",))


ROUTING = {
    "text": {"router": "sigmoid", "num_groups": 2, "topk_groups": 1},
    "image": {"router": "attention", "balance": "cv2", "adaptive_experts": True, "router_jitter_noise": 0.3},
    "audio": {"expert_capacity": 1.5, "capacity_overflow": "drop"},
    "common": {"balance": "variance", "expert_capacity": 4, "router_jitter_noise": 0.3},
}


def test_checkpointing_repeats_every_decision_noise_included():
    plain, checkpointed = make(expert_banks=ROUTING), make(expert_banks=ROUTING)
    checkpointed.activation_checkpointing_enable()
    results = []
    for model in (plain, checkpointed):
        torch.manual_seed(5)
        output = model(**tiny_batch(model.config), sample_experts=("image",))
        output.loss.backward()
        results.append((output.loss, {name: parameter.grad for name, parameter in model.named_parameters()}))
    assert torch.equal(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        # The same operations in the same order; the sums over a parameter's uses may change places.
        torch.testing.assert_close(results[1][1][name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def test_a_balance_bias_is_counted_also_under_reentrant_checkpointing():
    banks = {"common": {"balance": "bias"}, "text": {"balance": "none"}}
    options = {"router_z_loss_coef": 0.0, "alignment_loss_coef": 0.0}
    model = make(expert_banks=banks, **options)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
    output = model(**tiny_batch(model.config))
    output.loss.backward()
    assert len(output.routing) == 2


def test_reentrant_checkpointing_works_without_auxiliary_losses():
    options = {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0, "alignment_loss_coef": 0.0}
    plain, checkpointed = make(**options), make(**options)
    checkpointed.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
    batch = tiny_batch(plain.config)
    for model in (plain, checkpointed):
        model(**batch).loss.backward()
    for (name, first), second in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(second.grad, first.grad, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_frozen_towers_keep_no_graph(checkpointing: bool):
    model = make()
    if checkpointing:
        model.activation_checkpointing_enable()
    seen = []
    for tower in (model.model.vision_tower, model.model.audio_tower):
        tower.requires_grad_(False)
        tower.register_forward_hook(lambda module, args, output: seen.append(output.last_hidden_state.grad_fn))
    model(**tiny_batch(model.config)).loss.backward()
    assert seen == [None, None]


def test_adapters_behind_a_frozen_decoder_get_gradients_under_checkpointing():
    model = make(router_aux_loss_coef=0.0, router_z_loss_coef=0.0, alignment_loss_coef=0.0)
    model.requires_grad_(False)
    model.model.language_model.layers[0].self_attn.q_proj.requires_grad_(True)
    model.activation_checkpointing_enable()
    model.enable_input_require_grads()
    model(**tiny_batch(model.config)).loss.backward()
    assert model.model.language_model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


def test_reentrant_checkpointing_is_refused_where_it_would_drop_the_skip_budget():
    off = {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0, "alignment_loss_coef": 0.0}
    model = make(**off, skip_budget=0.3, skip_layers=[1])
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(RuntimeError, match=r"skip budget loss would have no gradient.*use_reentrant.*False"):
        model(**tiny_batch(model.config))


def test_reentrant_checkpointing_is_refused_where_frozen_routers_pass_their_loss_on():
    """The balance loss moves what lies before a frozen router; what lies behind the last router it cannot move."""
    model = make(alignment_loss_coef=0.0).requires_grad_(False)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    layers = model.model.language_model.layers
    layers[2].mlp.banks["text"].experts.down_proj.requires_grad_(True)
    model(**tiny_batch(model.config)).loss.backward()
    assert layers[2].mlp.banks["text"].experts.down_proj.grad.abs().sum() > 0
    layers[1].self_attn.q_proj.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"balance loss would have no gradient.*use_reentrant.*False"):
        model(**tiny_batch(model.config))


def test_a_loss_without_a_graph_is_no_mistake_where_nothing_before_it_saw_a_token():
    """Experts of images, and a batch of text: no token entered them, yet they stay in the graph of what follows."""
    model = make().requires_grad_(False)
    model.model.language_model.layers[1].mlp.banks["image"].experts.down_proj.requires_grad_(True)
    ids = torch.randint(5, 128, (2, 6), generator=torch.Generator().manual_seed(0))
    for part in (ids, ids[:1]):
        model(input_ids=part, labels=part).loss.backward()
