"""The router's losses and the alignment loss as functions: analytic values, gradients, what counts."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from chorus_moe import ChorusForConditionalGeneration
from chorus_moe.modeling.configuration_banks import read_expert_banks
from chorus_moe.modeling.configuration_text import ALIGNMENTS
from chorus_moe.modeling.losses import (
    BALANCE_LOSSES,
    alignment_loss,
    balance_loss,
    cv2_loss,
    mean_over_banks,
    switch_loss,
    variance_loss,
    z_loss,
)
from chorus_moe.modeling.modeling_outputs import BankRouting
from chorus_moe.modeling.moe_selection import count_choices
from tests.conftest import tiny_batch, tiny_config


def routing(logits: Tensor, top_k: int = 2, mask: Tensor | None = None) -> BankRouting:
    chosen = logits.topk(top_k, dim=-1)
    return BankRouting(logits, chosen.values.softmax(dim=-1), chosen.indices, mask)


def settings(**values: Any) -> Any:
    """The configuration of one bank."""
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 8}
    return read_expert_banks({"common": values}, sizes)[0]


def balanced(num_experts: int = 4) -> BankRouting:
    """Each expert is chosen equally often and is equally probable."""
    return routing(
        torch.stack([torch.eye(num_experts).roll(shift, 0) for shift in range(num_experts)]).flatten(0, 1), 1
    )


def collapsed(expert: int, num_experts: int = 4, num_tokens: int = 16) -> BankRouting:
    logits = torch.zeros(num_tokens, num_experts)
    logits[:, expert] = 50.0
    return routing(logits, 1)


def test_the_switch_loss_is_one_at_perfect_balance():
    assert switch_loss(balanced()).item() == pytest.approx(1.0, abs=1e-6)


def test_the_switch_loss_is_the_number_of_experts_when_collapsed():
    assert switch_loss(collapsed(2)).item() == pytest.approx(4.0, abs=1e-6)


# The largest value of each loss over E experts, all tokens choosing the same one.
WORST = {"switch": lambda e: e, "cv2": lambda e: e - 1, "variance": lambda e: 1 - 1 / e}
LOSSES = [*BALANCE_LOSSES.values(), z_loss]
maps_loss = partial(alignment_loss, kind="maps")


@pytest.mark.parametrize("loss", [cv2_loss, variance_loss])
def test_the_load_losses_are_zero_at_perfect_balance(loss: Any):
    assert loss(balanced()).item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("kind", BALANCE_LOSSES)
@pytest.mark.parametrize("num_experts", [2, 4, 7])
def test_a_collapsed_bank_has_the_largest_loss(kind: str, num_experts: int):
    found = BALANCE_LOSSES[kind](collapsed(1, num_experts))
    assert found.item() == pytest.approx(WORST[kind](num_experts), rel=1e-5)


@pytest.mark.parametrize("kind", BALANCE_LOSSES)
def test_both_banks_collapsed_is_seen(kind: str):
    # One collapses on its first expert, the other on its second: added into the same columns they would look better.
    banks = {name: settings(balance=kind) for name in ("text", "image")}
    both = balance_loss([{"text": collapsed(0), "image": collapsed(1)}], banks)
    assert both.item() == pytest.approx(WORST[kind](4), rel=1e-5)


@pytest.mark.parametrize("kind", BALANCE_LOSSES)
def test_two_layers_of_opposite_imbalance_do_not_cancel(kind: str):
    layers = [{"common": collapsed(0, num_experts=2)}, {"common": collapsed(1, num_experts=2)}]
    assert balance_loss(layers, {"common": settings(balance=kind)}).item() == pytest.approx(WORST[kind](2), rel=1e-5)


def test_each_bank_has_its_own_loss_and_some_have_none():
    banks = {kind: settings(balance=kind) for kind in ("switch", "cv2", "bias", "none")}
    layer = {kind: collapsed(0) for kind in banks}
    assert balance_loss([layer], banks).item() == pytest.approx((4.0 + 3.0) / 2, rel=1e-5)
    assert balance_loss([{"bias": layer["bias"], "none": layer["none"]}], banks) is None


@pytest.mark.parametrize("loss", [cv2_loss, variance_loss])
def test_the_gradient_of_the_load_goes_straight_through_to_the_probabilities(loss: Any):
    logits = torch.randn(12, 4, dtype=torch.float64, requires_grad=True)
    made = routing(logits)
    count = torch.bincount(made.selected_experts.flatten(), minlength=4) / 24
    pull = 2 * (count.double() - 0.25) * (4 if loss is cv2_loss else 1)
    expected = torch.autograd.grad((pull * logits.softmax(dim=-1).mean(dim=0)).sum(), logits)[0]
    found = torch.autograd.grad(loss(made), logits)[0]
    # The share of the choices is taken in float32 by the test, in float64 by the loss.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("kind", BALANCE_LOSSES)
def test_descent_on_a_balance_loss_spreads_the_choices(kind: str):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(400, 8, generator=generator) + 1.0
    weight = (
        torch.randn(4, 8, generator=generator) * 0.1 + torch.tensor([0.5, 0.0, 0.0, 0.0])[:, None]
    ).requires_grad_()
    before = cv2_loss(routing(hidden @ weight.T, 1)).item()
    optimizer = torch.optim.Adam([weight], lr=0.02)
    for _ in range(300):
        optimizer.zero_grad()
        BALANCE_LOSSES[kind](routing(hidden @ weight.T, 1)).backward()
        optimizer.step()
    assert before > 2.5
    assert cv2_loss(routing(hidden @ weight.T, 1)).item() < 0.2


@pytest.mark.parametrize("kind", BALANCE_LOSSES)
def test_sentinels_are_no_choices(kind: str):
    made = routing(torch.randn(10, 4))
    cut = made._replace(selected_experts=made.selected_experts[:, :1])
    padded = made._replace(selected_experts=torch.cat([cut.selected_experts, torch.full((10, 1), 4)], dim=1))
    assert torch.equal(BALANCE_LOSSES[kind](padded), BALANCE_LOSSES[kind](cut))
    assert count_choices(padded).sum() == 10


@pytest.mark.parametrize("loss", LOSSES)
def test_masked_rows_change_nothing(loss: Any):
    logits = torch.randn(10, 4)
    padded = torch.cat([logits, torch.randn(50, 4) * 9])
    mask = torch.arange(60) < 10
    assert torch.equal(loss(routing(padded, mask=mask)), loss(routing(logits)))


@pytest.mark.parametrize("loss", LOSSES)
def test_a_bank_without_tokens_counts_for_nothing_but_stays_in_the_graph(loss: Any):
    empty = torch.zeros(0, 4, requires_grad=True)
    full = torch.randn(6, 4)
    total = mean_over_banks([{"image": routing(empty), "text": routing(full)}], loss)
    total.backward()
    assert torch.equal(total, loss(routing(full)))
    assert empty.grad is not None


def test_the_z_loss_is_the_mean_squared_logsumexp():
    logits = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    expected = (torch.tensor([2.0, 2.0]).log() + torch.tensor([0.0, 1.0])).square().mean()
    assert z_loss(routing(logits)).item() == pytest.approx(expected.item(), abs=1e-6)


def test_no_sparse_layer_has_no_balance_loss():
    assert mean_over_banks([], switch_loss) is None


def test_the_switch_loss_reads_the_choices_made_not_the_logits():
    logits = torch.zeros(8, 4)
    chosen = torch.zeros(8, 1, dtype=torch.long)
    forced = BankRouting(logits, torch.ones(8, 1), chosen, None)
    # f = (1, 0, 0, 0), P = 1/4 each.
    assert switch_loss(forced).item() == pytest.approx(1.0, abs=1e-6)
    assert switch_loss(forced._replace(router_logits=logits + torch.tensor([9.0, 0, 0, 0]))).item() > 3.9


def states(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (1, 2, 8, 4), keys (1, 1, 8, 4), three image tokens before five words."""
    generator = torch.Generator().manual_seed(seed)
    modality = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0]])
    return torch.randn(1, 2, 8, 4, generator=generator), torch.randn(1, 1, 8, 4, generator=generator), modality


def slow_alignment(
    query: Tensor, key: Tensor, modality: Tensor, real: Tensor, scaling: float, is_causal: bool
) -> tuple[float, int]:
    """The definition with one number at a time: the loss, and over how many distributions it is the mean."""
    _, heads, length, size = query.shape
    values = []

    def softmax(scores: list[float]) -> list[float]:
        total = sum(math.exp(score) for score in scores)
        return [math.exp(score) / total for score in scores]

    for sample in range(len(query)):
        for other in (1, 3):
            places = [p for p in range(length) if real[sample, p] and modality[sample, p] == other]
            texts = [t for t in range(length) if real[sample, t] and modality[sample, t] == 0]
            for head in range(heads):

                def score(reads: int, read: int) -> float:
                    shared = head // (heads // key.shape[1])  # noqa: B023  called within the loop
                    pairs = (query[sample, head, reads, c] * key[sample, shared, read, c] for c in range(size))  # noqa: B023
                    return float(sum(pairs)) * scaling

                # Of each place of the medium: its attention over the words that may see it.
                back = {}
                for p in places:
                    words = [t for t in texts if not is_causal or p < t]
                    back |= {
                        (p, t): share for t, share in zip(words, softmax([score(p, t) for t in words]), strict=True)
                    }
                for t in texts:
                    seen = [p for p in places if not is_causal or p < t]
                    if not seen:
                        continue
                    there = softmax([score(t, p) for p in seen])
                    received = [back[p, t] for p in seen]
                    here = [share / sum(received) for share in received]
                    middle = [(a + b) / 2 for a, b in zip(there, here, strict=True)]
                    divergences = [
                        sum(a * math.log(a / m) for a, m in zip(shares, middle, strict=True))
                        for shares in (there, here)
                    ]
                    values.append(sum(divergences) / 2)
    return sum(values) / len(values), len(values)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("scaling", [0.25, 0.5, 2.0])
def test_the_value_of_the_alignment_is_that_of_its_definition(scaling: float, causal: bool):
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 4, 9, 4, generator=generator), torch.randn(2, 2, 9, 4, generator=generator)
    # Words before, between and behind media of both kinds, as many words as places or more; padding on the left.
    modality = torch.tensor([[0, 1, 1, 0, 1, 0, 0, 3, 0], [1, 0, 1, 1, 0, 3, 3, 0, 0]])
    real = torch.ones(2, 9, dtype=torch.bool)
    real[1, :2] = False
    expected, count = slow_alignment(query.double(), key.double(), modality, real, scaling, causal)
    assert count == 4 * (10 if causal else 16)
    found = maps_loss(query, key, modality, real, scaling, causal)
    # float32 against float64, at a loss of 0.05 and more.
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_alignment_is_zero_when_both_directions_agree():
    query, _, modality = states()
    both = query[:, :1]
    # With the same vectors as queries and keys the scores are symmetric, but each direction is normalised over its own
    # partners; with one word there is nothing to normalise differently.
    value = maps_loss(both[:, :, :4], both[:, :, :4], modality[:, :4], None, 0.5)
    assert 0.0 <= value.item() < 0.2
    same = torch.ones(1, 1, 8, 4)
    assert maps_loss(same, same, modality, None, 0.5).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("causal", [True, False])
def test_alignment_lies_between_zero_and_log_two(causal: bool):
    query, key, modality = states()
    value = maps_loss(query * 20, key * 20, modality, None, 0.5, causal)
    assert 0.01 < value.item() < 0.6932


def test_alignment_is_zero_and_differentiable_without_a_pair():
    query, key, _ = states()
    query.requires_grad_()
    value = maps_loss(query, key, torch.zeros(1, 8, dtype=torch.long), None, 0.5)
    assert value.item() == 0.0


def test_alignment_ignores_padding():
    query, key, modality = states()
    plain = maps_loss(query, key, modality, None, 0.5)
    pad = (0, 0, 3, 0)
    padded = [torch.nn.functional.pad(x, pad, value=7.0) for x in (query, key)]
    longer = torch.nn.functional.pad(modality, (3, 0), value=1)
    real = torch.arange(11)[None] >= 3
    assert torch.equal(maps_loss(*padded, longer, real, 0.5), plain)


def test_text_before_its_image_has_no_alignment_in_a_causal_model():
    query, key, modality = states()
    assert maps_loss(query, key, modality.flip(1), None, 0.5, True).item() == 0.0
    assert maps_loss(query, key, modality.flip(1), None, 0.5, False).item() > 0.0


def slow_log_odds(query: Tensor, key: Tensor, texts: list[int], places: list[int]) -> Tensor:
    """One minus the correlation of the two directions' scores, rows and columns taken out, by least squares."""
    values = []
    for head in range(query.shape[1]):
        there = query[0, head, texts] @ key[0, 0, places].T
        back = (query[0, head, places] @ key[0, 0, texts].T).T
        # What rows and columns explain together is a linear model of their indicators.
        rows = torch.eye(len(texts), dtype=there.dtype).repeat_interleave(len(places), dim=0)
        columns = torch.eye(len(places), dtype=there.dtype).repeat(len(texts), 1)
        design = torch.cat((rows, columns), dim=1)
        left = [s.flatten() - design @ (torch.linalg.pinv(design) @ s.flatten()) for s in (there, back)]
        values.append(1 - left[0] @ left[1] / (left[0].norm() * left[1].norm()))
    return torch.stack(values).mean()


def test_log_odds_are_one_minus_the_correlation_and_flat_maps_gain_nothing():
    query, key, modality = (part.double() if part.is_floating_point() else part for part in states())
    expected = slow_log_odds(query, key, [3, 4, 5, 6, 7], [0, 1, 2])
    for scaling in (0.01, 0.5, 3.0):
        found = alignment_loss(query, key, modality, None, scaling, False, "log_odds")
        assert found.item() == pytest.approx(expected.item(), abs=1e-5)
    # The divergence of the same maps falls with their sharpness.
    flat, sharp = (alignment_loss(query, key, modality, None, s, False, "maps").item() for s in (0.01, 3.0))
    assert flat < 0.001 < 0.1 < sharp
    assert alignment_loss(query, query[:, :1], modality, None, 0.5, False, "log_odds")[None].isfinite().all()
    same = alignment_loss(query[:, :1], query[:, :1], modality, None, 0.5, False, "log_odds")
    assert same.item() == pytest.approx(0.0, abs=1e-6)


def pairs_of_samples() -> tuple[Tensor, Tensor, Tensor]:
    """Three samples of three places and five words, and a fourth without an image."""
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(4, 2, 8, 4, generator=generator), torch.randn(4, 1, 8, 4, generator=generator)
    return query, key, torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0]] * 3 + [[0] * 8])


def test_the_contrast_is_the_cross_entropy_of_whose_image_a_text_looks_at():
    query, key, modality = pairs_of_samples()
    scores = torch.zeros(2, 3, 3)
    for head in range(2):
        for text in range(3):
            for image in range(3):
                looks = query[text, head, 3:] @ key[image, 0, :3].T * 0.5
                scores[head, text, image] = looks.exp().mean(dim=1).log().mean()
    expected = -torch.stack([(s.log_softmax(d)).diagonal(dim1=1, dim2=2) for s in [scores] for d in (1, 2)]).mean()
    for is_causal in (True, False):
        found = alignment_loss(query, key, modality, None, 0.5, is_causal, "contrastive")
        assert found.item() == pytest.approx(expected.item(), abs=1e-5)


def test_the_contrast_reads_nothing_that_no_causal_layer_computes():
    query, key, modality = pairs_of_samples()
    query.requires_grad_(), key.requires_grad_()
    alignment_loss(query, key, modality, None, 0.5, True, "contrastive").backward()
    # Of an image in front, queries read no text, and of the text, keys are read by no image.
    assert not query.grad[:, :, :3].any()
    assert not key.grad[:, :, 3:].any()
    assert query.grad[:3, :, 3:].any()
    # Text in front of its image sees nothing of it.
    behind = alignment_loss(query, key, modality.flip(1), None, 0.5, True, "contrastive")
    assert behind.item() == 0.0
    behind.backward()  # in the graph all the same
    assert alignment_loss(query[:1], key[:1], modality[:1], None, 0.5, True, "contrastive").item() == 0.0


@pytest.mark.parametrize("kind", ALIGNMENTS)
def test_every_kind_ignores_padding_and_has_a_finite_gradient(kind: str):
    query, key, modality = pairs_of_samples()
    plain = alignment_loss(query, key, modality, None, 0.5, False, kind)
    pad = (0, 0, 3, 0)
    padded = [torch.nn.functional.pad(x, pad, value=7.0).requires_grad_() for x in (query, key)]
    longer, real = torch.nn.functional.pad(modality, (3, 0), value=1), torch.arange(11).expand(4, 11) >= 3
    value = alignment_loss(*padded, longer, real, 0.5, False, kind)
    torch.testing.assert_close(value, plain, rtol=1e-6, atol=1e-7)
    value.backward()
    assert all(part.grad.isfinite().all() and not part.grad[:, :, :3].any() for part in padded)


def test_a_causal_model_is_not_asked_for_two_directions():
    assert tiny_config().text_config.alignment == "contrastive"
    assert tiny_config(is_causal=False).text_config.alignment == "log_odds"
    with pytest.raises(Exception, match=r"alignment='log_odds' compares .* is_causal=True computes one of the two"):
        tiny_config(alignment="log_odds", alignment_loss_coef=0.1)
    with pytest.raises(Exception, match="unknown alignment 'contrast'; did you mean 'contrastive'"):
        tiny_config(alignment="contrast")


@pytest.mark.parametrize("is_causal", [True, False])
def test_only_layers_that_see_all_pairs_are_aligned(is_causal: bool):
    windows = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 6}
    losses = []
    for layers in ([1], [1, 2]):
        torch.manual_seed(0)
        model = ChorusForConditionalGeneration(
            tiny_config(**windows, is_causal=is_causal, cross_modal_layers=layers, alignment_loss_coef=0.1)
        ).train()
        # The first two layers are alike; what the third one is must not matter.
        state = {
            n: torch.full_like(p, 0.02) * torch.arange(1, p.numel() + 1).view_as(p).sin()
            for n, p in model.state_dict().items()
            if p.is_floating_point()
        }
        model.load_state_dict(state, strict=False)
        losses.append(model(**tiny_batch(model.config)).alignment_loss)
    assert losses[0].item() > 0
    assert torch.equal(*losses)
    alone = ChorusForConditionalGeneration(tiny_config(**windows, cross_modal_layers=[2], alignment_loss_coef=0.1))
    with pytest.raises(ValueError, match=r"needs a cross-modal layer with full attention; cross_modal_layers=\[2\]"):
        alone.train()(**tiny_batch(alone.config))


@pytest.mark.parametrize("kind", ["contrastive", "maps"])
def test_alignment_falls_under_training(kind: str):
    torch.manual_seed(0)
    model = ChorusForConditionalGeneration(tiny_config(alignment=kind))
    text = model.config.text_config
    text.alignment_loss_coef, text.router_aux_loss_coef = 1.0, 0.0
    layer = model.model.language_model.layers[-1].self_attn
    for projection in (layer.q_proj, *layer.k_proj.values()):
        projection.weight.data.mul_(20)
    batch = tiny_batch(model.config)
    optimizer = torch.optim.Adam(layer.parameters(), lr=3e-3)
    values = []
    model.train()
    for _ in range(6):
        loss = model(**batch).alignment_loss
        values.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert layer.q_proj.weight.grad.abs().sum() > 0
    assert values[-1] < 0.9 * values[0]
