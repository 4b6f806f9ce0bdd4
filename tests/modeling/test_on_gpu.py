"""What runs on a GPU equals what runs on the CPU. Everything here is skipped where there is no GPU."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from chorus_moe import ChorusForConditionalGeneration, ChorusForSequenceClassification
from chorus_moe.fastpaths import attention_blocks, experts_gpu
from chorus_moe.fastpaths.attention_blocks import LocalMask, attend_in_blocks
from chorus_moe.modeling.layers import float32_product
from chorus_moe.modeling.moe_selection import best_experts
from chorus_moe.training.lora import lora_config
from tests.conftest import tiny_batch, tiny_config
from tests.fastpaths.test_attention_blocks import dense
from tests.fastpaths.test_experts_cpu import make, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("no_tf32"),
]

# float32 products in another order on another processor, through three layers and two towers.
ATOL = 2e-4
# Norm of the difference over norm of the value: float32 sums in another order; bfloat16 rounds a few times in a row.
RELATIVE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture
def no_tf32() -> Iterator[None]:
    """Convolutions in full float32; matrix products are by default."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def on_gpu(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.cuda() for name, value in batch.items()}


def pair(**text: Any) -> tuple[nn.Module, nn.Module, dict[str, Tensor]]:
    """The same model on both, and a batch on the CPU."""
    torch.manual_seed(0)
    config = tiny_config(**text)
    here = ChorusForConditionalGeneration(config).eval()
    there = ChorusForConditionalGeneration(config).eval()
    there.load_state_dict(here.state_dict())
    return here, there.cuda(), tiny_batch(config)


WINDOWS = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 6, "num_global_tokens": 2}
MODELS: dict[str, dict[str, Any]] = {
    "default": {},
    "sigmoid with bias": {"expert_banks": {"common": {"router": "sigmoid", "balance": "bias"}}},
    "adaptive": {"expert_banks": {"common": {"adaptive_experts": True}}},
    "windows": {"num_hidden_layers": 4, **WINDOWS},
    "skipping": {"skip_layers": [1, 2], "skip_budget": 0.3},
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_loss_and_gradients_are_those_of_the_cpu(name: str):
    here, there, batch = pair(**MODELS[name])
    ours, theirs = here(**batch), there(**on_gpu(batch))
    torch.testing.assert_close(theirs.logits.cpu(), ours.logits, rtol=0, atol=ATOL)
    torch.testing.assert_close(theirs.loss.cpu(), ours.loss, rtol=0, atol=ATOL)
    ours.loss.backward()
    theirs.loss.backward()
    for (parameter, one), other in zip(here.named_parameters(), there.parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(other.grad.cpu(), one.grad, rtol=1e-3, atol=ATOL, msg=parameter)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_greedy_text_is_that_of_the_cpu(cache: str):
    here, there, batch = pair()
    batch.pop("labels")
    options = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": cache, "disable_compile": True}
    expected = here.generate(**batch, **options)
    assert torch.equal(there.generate(**on_gpu(batch), **options).cpu(), expected)


def test_exits_let_the_same_samples_leave():
    torch.manual_seed(0)
    config = tiny_config(num_hidden_layers=4, exit_layers=[1, 2, 3], exit_loss_coef=1.0)
    config.num_labels, config.exit_thresholds = 5, [0.25, 0.25, 0.25]
    here = ChorusForSequenceClassification(config).eval()
    batch = {name: value for name, value in tiny_batch(config).items() if name != "labels"}
    with torch.no_grad():
        expected = here(**batch, output_compute=True)
        found = here.cuda()(**on_gpu(batch), output_compute=True)
    torch.testing.assert_close(found.logits.cpu(), expected.logits, rtol=0, atol=ATOL)
    assert found.compute.layers.tolist() == expected.compute.layers.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sentinels", [False, True])
@pytest.mark.parametrize("tokens", [0, 5, 300])
def test_the_kernels_equal_the_plain_loop_forward_and_backward(dtype: torch.dtype, sentinels: bool, tokens: int):
    experts, hidden, index, weights = make(tokens, dtype, top_k=3, num_experts=7, width=64, inner=48)
    if sentinels:
        index[::2, 1:] = 7
    expected = run(experts.float(), "eager", hidden.float(), index, weights.float())
    found = run(experts.to(dtype).cuda(), experts_gpu.GPU_EXPERTS, hidden.cuda(), index.cuda(), weights.cuda())
    for name, value in expected.items():
        value = value.cpu()  # gradients of parameters move with them
        difference = (found[name].cpu().float() - value).norm()
        assert difference <= RELATIVE[dtype] * max(value.norm().item(), 1e-6), name


def test_the_kernels_are_what_runs(monkeypatch: pytest.MonkeyPatch):
    calls: list[int] = []
    real = experts_gpu.grouped_experts
    monkeypatch.setattr(experts_gpu, "grouped_experts", lambda *inputs: calls.append(1) or real(*inputs))
    _, there, batch = pair()
    there(**on_gpu(batch))
    assert calls


def test_autocast_keeps_routing_in_float32_and_gradients_finite():
    _, there, batch = pair()
    there.train()
    with torch.autocast("cuda", torch.bfloat16):
        output = there(**on_gpu(batch), output_router_logits=True)
    output.loss.backward()
    assert all(r.router_logits.dtype == torch.float32 for layer in output.routing for r in layer.values())
    assert all(p.grad.isfinite().all() for p in there.parameters() if p.grad is not None)


def test_lora_on_the_banks_trains_and_leaves_the_rest():
    _, there, batch = pair()
    adapted = get_peft_model(there, lora_config(there, banks=["common", "image"], verbose=False)).cuda().train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = adapted(**on_gpu(batch)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_scores_of_narrow_states_are_float32_products_with_float32_gradients():
    hidden = torch.randn(300, 64, device="cuda").bfloat16().requires_grad_()
    weight = torch.randn(12, 64, device="cuda").bfloat16().requires_grad_()
    found, expected = float32_product(hidden, weight), hidden.float() @ weight.float().t()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)  # sums of 64 in another order, at values of 8
    upstream = torch.randn_like(found)
    for one, other in zip(
        *(torch.autograd.grad(o, (hidden, weight), upstream) for o in (found, expected)), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("top_k", [1, 2, 8, 9])
@pytest.mark.parametrize("tokens", [3, 500])
def test_ties_go_to_the_lower_index_as_on_the_cpu(tokens: int, top_k: int):
    scores = torch.randint(0, 4, (tokens, 16)).float()
    assert torch.equal(best_experts(scores.cuda(), top_k).cpu(), best_experts(scores, top_k))


@pytest.mark.parametrize(("is_causal", "num_global"), [(True, 0), (True, 4), (False, 0), (False, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_equal_the_dense_mask_forward_and_backward(is_causal: bool, num_global: int, dtype: torch.dtype):
    length, padding = 700, 13
    keys, queries = length + num_global, length + (0 if is_causal else num_global)
    real = torch.ones(2, keys, dtype=torch.bool)
    real[1, num_global : num_global + padding] = False
    states = [torch.randn(2, heads, n, 32, requires_grad=True) for heads, n in ((4, queries), (2, keys), (2, keys))]
    expected = dense(*states, LocalMask(64, is_causal, num_global, real))
    moved = [state.detach().cuda().to(dtype).requires_grad_() for state in states]
    found = attend_in_blocks(*moved, LocalMask(64, is_causal, num_global, real.cuda()))
    counted = real[:, -queries:]
    weights = torch.randn_like(expected) * counted[..., None, None]
    grads = torch.autograd.grad((expected * weights).sum(), states)
    moved_grads = torch.autograd.grad((found * weights.cuda().to(dtype)).sum(), moved)
    values = [(found.cpu()[counted], expected[counted]), *zip(moved_grads, grads, strict=True)]
    for one, other in values:
        assert (one.cpu().float() - other).norm() <= RELATIVE[dtype] * other.norm()


@pytest.mark.slow
@pytest.mark.parametrize("is_causal", [True, False])
def test_flex_attention_equals_blocks(is_causal: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention_blocks, "WINDOWS_THAT_PAY", 1)
    text = {"num_hidden_layers": 2, "layer_types": ["sliding_attention"] * 2, "cross_modal_layers": []}
    text |= {"sliding_window": 32, "num_global_tokens": 4, "is_causal": is_causal, "head_dim": 16}
    _, there, _ = pair(**text)
    input_ids = torch.randint(5, 128, (2, 300)).cuda()
    with torch.no_grad():
        blocks = there.model(input_ids=input_ids).last_hidden_state
        there.set_attn_implementation("flex_attention")
        flex = there.model(input_ids=input_ids).last_hidden_state
    torch.testing.assert_close(flex, blocks, rtol=0, atol=ATOL)
