"""Experts that are taken away: what stays the same, what is refused, what is saved."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from chorus_moe import (
    ChorusForConditionalGeneration,
    ChorusForContrastive,
    ChorusForSequenceClassification,
    ChorusModel,
    ChorusTextModel,
)
from chorus_moe.surgery import prune_experts
from tests.conftest import ROUNDING, tiny_batch, tiny_config

Scores = dict[int, dict[str, torch.Tensor]]
IDLE = [5, 9, 11]  # of 14 experts of the bank `text`


def make(**text: Any) -> ChorusForConditionalGeneration:
    banks = {"text": {"num_experts": 14, **text}, "common": {}}
    torch.manual_seed(0)
    model = ChorusForConditionalGeneration(tiny_config(expert_banks=banks)).eval()
    for parameter in model.parameters():
        parameter.data.mul_(2.0).add_(torch.randn_like(parameter), alpha=0.02)
    return model


def router(model: Any, layer: int = 1, bank: str = "text") -> Any:
    return model.model.language_model.layers[layer].mlp.banks[bank].router


def idle(model: ChorusForConditionalGeneration) -> Scores:
    """Equal scores go to the lower index: of five equal rows a token that visits two never chooses the last three."""
    scores: Scores = {}
    for layer in (1, 2):
        weight = router(model, layer).weight.data
        weight[[3, *IDLE]] = weight[2].clone()
        used = torch.ones(14).index_fill(0, torch.tensor(IDLE), 0.0)
        scores[layer] = {"text": used, "common": torch.arange(4.0)}
    return scores


def logits_of(model: Any, seed: int = 0) -> torch.Tensor:
    with torch.no_grad():
        return model(**tiny_batch(model.config, seed)).logits


@pytest.mark.parametrize("router_kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("implementation", ["cpu_mm", "eager", "batched_mm", "grouped_mm"])
def test_without_experts_that_nothing_chose_outputs_are_the_same(implementation: str, router_kind: str) -> None:
    model = make(router=router_kind)
    model.set_experts_implementation(implementation)
    scores = idle(model)
    before = [logits_of(model, seed) for seed in range(3)]
    report = prune_experts(model, {"text": "used"}, scores)
    assert report.experts == {"text": {1: (14, 11), 2: (14, 11)}}
    # The same bits on Intel's processors; on AMD's, MKL sums a row in another order beside fewer others.
    for seed, old in enumerate(before):
        torch.testing.assert_close(logits_of(model, seed), old, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("use_cache", [True, False])
def test_without_experts_that_nothing_chose_generation_is_the_same(use_cache: bool) -> None:
    model = make()
    scores = idle(model)
    prompt = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "use_cache": use_cache}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    before = model.generate(**prompt, **options)
    prune_experts(model, {"text": "used"}, scores)
    after = model.generate(**prompt, **options)
    assert torch.equal(before.sequences, after.sequences)
    torch.testing.assert_close(after.logits, before.logits, rtol=0, atol=ROUNDING)


def test_the_best_stay_with_all_that_is_theirs_in_their_order() -> None:
    model = make(router="sigmoid")
    experts = model.model.language_model.layers[1].mlp.banks["text"].experts
    router(model).e_score_correction_bias.copy_(torch.arange(14.0))
    down, weight = experts.down_proj.clone(), router(model).weight.clone()
    score = torch.zeros(14).index_fill(0, torch.tensor([12, 1, 7]), 1.0)
    prune_experts(model, {"text": {1: 3}}, {1: {"text": score}})
    assert torch.equal(experts.down_proj, down[[1, 7, 12]])
    assert torch.equal(router(model).weight, weight[[1, 7, 12]])
    assert router(model).e_score_correction_bias.tolist() == [1.0, 7.0, 12.0]
    assert model.config.text_config.expert_banks["text"]["num_experts"] == [3, 14]


def test_an_attention_router_loses_keys_and_values() -> None:
    model = make(router="attention")
    keys = router(model).expert_keys.clone()
    scores = {layer: {"text": torch.arange(14.0)} for layer in (1, 2)}
    report = prune_experts(model, {"text": 0.5}, scores)
    assert torch.equal(router(model).expert_keys, keys[7:])
    assert len(router(model, 2).expert_values) == 7
    assert any("in the light of each other" in note for note in report.notes)
    assert logits_of(model).isfinite().all()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"norm_topk_prob": False}, "softmax over all experts"),
        ({"adaptive_experts": True}, "entropy"),
        ({"num_groups": 2, "topk_groups": 1}, "topk_groups=1"),
        ({"balance": "bias"}, "correction bias"),
        ({"expert_capacity": 1.5}, "expert_capacity=1.5"),
    ],
)
def test_the_report_says_which_settings_change_outputs_all_the_same(settings: dict[str, Any], words: str) -> None:
    scores = {layer: {"text": torch.arange(14.0)} for layer in (1, 2)}
    report = prune_experts(make(**settings), {"text": 12}, scores)
    assert any(words in note for note in report.notes)
    assert not any(words in note for note in prune_experts(make(), {"text": 12}, scores).notes)


def test_a_bank_that_loses_nothing_says_so() -> None:
    scores = {layer: {"text": torch.ones(14), "common": torch.arange(4.0)} for layer in (1, 2)}
    model = make(adaptive_experts=True)
    report = prune_experts(model, {"text": "used", "common": {1: 3}}, scores)
    nothing = [f"text, layer {layer}: nothing was taken away, all 14 experts stay" for layer in (1, 2)]
    assert report.notes == [*nothing, "common, layer 1: what was taken away had 0.0% of the scores"]


def test_groups_lose_as_many_experts_each() -> None:
    model = make(num_groups=2)
    weight = router(model).weight.clone()
    prune_experts(model, {"text": {1: 4}}, {1: {"text": torch.arange(14.0)}})
    assert torch.equal(router(model).weight, weight[[5, 6, 12, 13]])


HEADS = [
    ChorusForConditionalGeneration, ChorusForSequenceClassification, ChorusForContrastive, ChorusModel, ChorusTextModel,
]  # fmt: skip


@pytest.mark.parametrize("head", HEADS)
def test_a_pruned_model_of_any_head_is_saved_and_loaded_bit_for_bit(head: Any, tmp_path: Path) -> None:
    config = tiny_config(expert_banks={"text": {"num_experts": 6}, "common": {}})
    model = head(config if head is not ChorusTextModel else config.text_config)
    scores = {layer: {"text": torch.arange(6.0), "common": torch.arange(4.0)} for layer in (1, 2)}
    report = prune_experts(model, {"text": {1: 2, 2: 5}, "common": 3}, scores)
    assert report.parameters_after == sum(parameter.numel() for parameter in model.parameters())
    assert report.parameters_before - report.parameters_after == (4 + 1 + 2) * (64 + 3 * 64 * 32)
    model.save_pretrained(tmp_path)
    loaded = head.from_pretrained(tmp_path)
    left, right = model.state_dict(), loaded.state_dict()
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    assert loaded.config.get_text_config().expert_banks["text"]["num_experts"] == [2, 5]


def test_a_pruned_model_trains_on() -> None:
    model = make().train()
    prune_experts(model, {"text": 3}, {layer: {"text": torch.arange(14.0)} for layer in (1, 2)})
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    losses = []
    for _ in range(4):
        loss = model(**tiny_batch(model.config)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


GOOD = {layer: {"text": torch.arange(14.0), "common": torch.arange(4.0)} for layer in (1, 2)}


@pytest.mark.parametrize(
    ("keep", "scores", "words"),
    [
        ({"txet": 3}, GOOD, "unknown bank 'txet'; did you mean 'text'"),
        ({}, GOOD, "no bank is named"),
        ({"common": 1}, GOOD, "expert bank 'common': num_experts=1 leaves"),
        ({"text": {2: 1}}, GOOD, "expert bank 'text', layer 2: num_experts=1 leaves"),
        ({"text": 15}, GOOD, "cannot keep 15 of 14 experts"),
        ({"text": 0.0}, GOOD, "keep=0.0 is neither"),
        ({"text": "unused"}, GOOD, "keep='unused' is neither"),
        ({"text": {0: 3}}, GOOD, r"layer 0 does not hold bank 'text', which is in \[1, 2\]"),
        ({"text": 3}, {1: GOOD[1]}, "scores of bank 'text', layer 2 are missing"),
        ({"text": 3}, {1: GOOD[1], 2: {"text": torch.ones(4)}}, r"layer 2 have shape \(4,\) for 14 exp.*measure"),
        ({"text": 3}, {1: GOOD[1], 2: {"text": torch.full((14,), torch.nan)}}, "layer 2 are not finite"),
        ({"common": 3, "text": 1}, GOOD, "expert bank 'text': num_experts=1 leaves"),
    ],
)
def test_what_cannot_be_done_is_refused_and_nothing_changes(keep: Any, scores: Any, words: str) -> None:
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=words):
        prune_experts(model, keep, scores)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_more_experts_per_token_than_are_left_are_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match="num_experts_per_tok=3 must be between 1 and num_experts=2"):
        prune_experts(make(num_experts_per_tok=3), {"text": 2}, GOOD)


def test_groups_that_no_longer_divide_are_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match="num_groups=2 does not divide num_experts=5"):
        prune_experts(make(num_groups=2), {"text": 5}, GOOD)


def test_active_adapters_are_refused() -> None:
    model = make()
    get_peft_model(model, LoraConfig(target_modules=["q_proj.weight", "o_proj"]))
    with pytest.raises(ValueError, match="prune_experts: .* carry adapters"):
        prune_experts(model, {"text": 3}, GOOD)


@pytest.mark.parametrize("implementation", ["cpu_mm", "eager"])
def test_deep_experts_are_pruned_whole(implementation: str, tmp_path: Path) -> None:
    model = make(expert_depth=3)
    model.set_experts_implementation(implementation)
    scores = idle(model)
    before = logits_of(model)
    old = [stack.down_proj.detach().clone() for stack in model.model.language_model.layers[1].mlp.banks["text"].stacks]
    prune_experts(model, {"text": "used"}, scores)
    kept = [expert for expert in range(14) if expert not in IDLE]
    for stack, down in zip(model.model.language_model.layers[1].mlp.banks["text"].stacks, old, strict=True):
        assert torch.equal(stack.down_proj, down[kept])
        assert stack.num_experts == 11
    # Float32 sums in another order, at logits of about 1.
    torch.testing.assert_close(logits_of(model), before, rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path)
    loaded = ChorusForConditionalGeneration.from_pretrained(tmp_path, experts_implementation=implementation).eval()
    assert torch.equal(logits_of(loaded), logits_of(model))


@pytest.mark.parametrize(
    ("settings", "used", "left"),
    [
        # Of a bank that nothing chose, what a token and the router need.
        ({}, 0, 2),
        ({"num_experts_per_tok": 3}, 0, 3),
        ({"num_experts_per_tok": 1}, 0, 2),
        ({"num_experts_per_tok": 3}, 5, 5),
        ({"num_groups": 2}, 0, 2),
        ({"num_groups": 2, "num_experts_per_tok": 3}, 0, 4),
        # A token finds all of its experts in one group of two.
        ({"num_groups": 2, "topk_groups": 1}, 0, 4),
        ({"num_groups": 2, "topk_groups": 1, "num_experts_per_tok": 3}, 0, 6),
        ({"num_groups": 7, "topk_groups": 2, "num_experts_per_tok": 2}, 0, 7),
    ],
)
def test_a_bank_keeps_what_a_token_needs(settings: dict[str, Any], used: int, left: int) -> None:
    model = make(layers=[1], **settings)
    scores = torch.zeros(14)
    scores[:used] = 1.0
    report = prune_experts(model, {"text": "used"}, {1: {"text": scores}})
    assert report.experts == {"text": {1: (14, left)}}
    assert logits_of(model, 0).isfinite().all()
