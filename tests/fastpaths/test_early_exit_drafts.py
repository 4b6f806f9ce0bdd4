"""Early exit drafts change the speed of `generate` and never its text."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from chorus_moe.fastpaths.early_exit_drafts import EarlyExitDrafts
from chorus_moe.modeling.configuration_services import SERVICES
from chorus_moe.modeling.modeling_outputs import CACHE
from tests.conftest import IMAGE_TOKEN
from tests.modeling.conftest import make_model
from tests.modeling.test_modeling_generation import collate, sample_inputs

SLIDING = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 6}
CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "dense": {"mlp_layer_types": ["dense"] * 3},
    "sliding window": SLIDING,
    "sliding window after the exit": SLIDING | {"layer_types": ["full_attention", *["sliding_attention"] * 2]},
    "skipped layers": {"skip_budget": 0.3},
}
NEW_TOKENS = 14
# No threshold, so that drafts are long and mostly wrong: the cache is given back again and again.
DRAFTS = {"num_assistant_tokens": 5, "assistant_confidence_threshold": 0.0}


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Drafted and accepted tokens of every verification."""
    found: list[tuple[int, int]] = []
    update = EarlyExitDrafts.update_candidate_strategy

    def spy(self: EarlyExitDrafts, input_ids: Tensor, scores: Tensor, num_matches: int) -> None:
        found.append((scores.shape[1] - 1, int(num_matches)))
        update(self, input_ids, scores, num_matches)

    monkeypatch.setattr(EarlyExitDrafts, "update_candidate_strategy", spy)
    return found


def text_of(model: Any, batch: dict[str, Tensor], **options: Any) -> list[int]:
    options = {"do_sample": False, "max_new_tokens": NEW_TOKENS} | options
    return model.generate(**batch, **options)[0].tolist()


def prompt(model: Any, images: int = 1, clips: int = 1, padding: int = 0) -> dict[str, Tensor]:
    return collate([sample_inputs(model, images, [9] * clips)], padding)


def ends_with_an_image(model: Any) -> dict[str, Tensor]:
    batch = prompt(model, 1, 0)
    last = int((batch["input_ids"] == IMAGE_TOKEN).nonzero()[-1, 1]) + 1
    return batch | {name: batch[name][:, :last] for name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("exit_layer", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_greedy_text_is_that_of_plain_generation(case: str, exit_layer: int, counts: list[tuple[int, int]]):
    model = make_model(**CASES[case])
    for batch in (prompt(model, 0, 0), prompt(model), prompt(model, padding=3), ends_with_an_image(model)):
        plain = text_of(model, batch)
        assert text_of(model, batch, assistant_early_exit=exit_layer, **DRAFTS) == plain
    assert sum(accepted for _, accepted in counts) < sum(drafted for drafted, _ in counts)


def test_drafts_of_layers_that_decide_are_accepted(counts: list[tuple[int, int]]):
    model = make_model(mlp_layer_types=["dense"] * 3)
    last = model.model.language_model.layers[2]
    for parameter in (last.self_attn.o_proj.weight, last.mlp.down_proj.weight):
        parameter.data.zero_()
    text = text_of(model, prompt(model), assistant_early_exit=2, **DRAFTS)
    assert text == text_of(model, prompt(model))
    assert [drafted for drafted, _ in counts] == [accepted for _, accepted in counts]
    assert max(drafted for drafted, _ in counts) == 5


def test_the_cache_afterwards_is_that_of_plain_generation():
    model = make_model()
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    for cache, options in zip(caches, ({}, {"assistant_early_exit": 2, **DRAFTS}), strict=True):
        text_of(model, prompt(model), **{CACHE: cache}, **options)
    for plain, drafted in zip(caches[0].layers, caches[1].layers, strict=True):
        # float32 sums in another order (several rows at once): worst difference seen is 1e-6 at keys of size 5.
        torch.testing.assert_close(drafted.keys, plain.keys, rtol=0, atol=1e-5)


def test_a_draft_ends_below_the_confidence_threshold(counts: list[tuple[int, int]]):
    model = make_model()
    text_of(model, prompt(model), assistant_early_exit=2, **DRAFTS | {"assistant_confidence_threshold": 1.0})
    assert max(drafted for drafted, _ in counts) == 1


def test_a_heuristic_schedule_shortens_drafts_that_fail(counts: list[tuple[int, int]]):
    model = make_model()
    text_of(model, prompt(model), assistant_early_exit=1, **DRAFTS, num_assistant_tokens_schedule="heuristic")
    assert [drafted for drafted, _ in counts][:4] == [0, 7, 6, 5]


def test_the_generation_config_carries_the_exit(counts: list[tuple[int, int]]):
    model = make_model()
    model.generation_config.assistant_early_exit = 2
    text_of(model, prompt(model))
    assert counts


def test_sampled_text_follows_the_last_layer_and_not_the_exit():
    model = make_model(vocab_size=8, mlp_layer_types=["dense"] * 3)
    model.lm_head.weight.data.mul_(3)
    for layer in model.model.language_model.layers[1:]:
        layer.mlp.down_proj.weight.data.mul_(20)
    ids = torch.tensor([[5, 6, 7]])
    words = torch.tensor([0, 1, 2, 5, 6, 7])
    both = torch.cat((ids.expand(6, 3), words[:, None]), dim=1)
    with torch.no_grad():
        first = model(input_ids=ids).logits[0, -1, words].softmax(-1)
        after_first = [
            model(input_ids=both, **exit).logits[:, -1, words].softmax(-1) for exit in ({}, {"exit_layer": 1})
        ]
    expected, at_exit = (first @ second for second in after_first)
    # The second token is the first that is drafted.
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 3}
    torch.manual_seed(0)
    found = torch.zeros(8)
    for _ in range(150):
        text = model.generate(ids, attention_mask=torch.ones_like(ids), assistant_early_exit=1, **DRAFTS | options)
        found[text[0, 4]] += 1 / 150
    assert (at_exit - expected).abs().max() > 0.19
    # Three standard deviations of a share of 150 draws.
    torch.testing.assert_close(found[words], expected, rtol=0, atol=0.125)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"assistant_early_exit": 3}, r"assistant_early_exit=3 is outside 1\.\.2 of 3 layers"),
        ({"assistant_early_exit": 0}, r"assistant_early_exit=0 is outside 1\.\.2"),
        ({"assistant_early_exit": 1, "num_assistant_tokens": 0}, "num_assistant_tokens=0 drafts nothing"),
        ({"assistant_early_exit": 1, "use_cache": False}, "use_cache=True"),
        ({"assistant_early_exit": 1, "cache_implementation": "static"}, "Static cache"),
        ({"assistant_early_exit": 1, "num_beams": 2}, "assistant_early_exit=1 drafts one text, num_beams=2"),
    ],
)
def test_what_drafts_cannot_do_is_refused(options: dict[str, Any], message: str):
    model = make_model()
    with pytest.raises(ValueError, match=message):
        text_of(model, prompt(model), **options)


def test_drafts_of_one_token_change_nothing():
    model = make_model()
    expected = text_of(model, prompt(model))
    found = text_of(model, prompt(model), assistant_early_exit=1, **DRAFTS | {"num_assistant_tokens": 1})
    assert found == expected


def test_a_batch_is_refused():
    model = make_model()
    batch = collate([sample_inputs(model, 0, [], seed) for seed in range(2)])
    with pytest.raises(ValueError, match="batch_size = 1"):
        text_of(model, batch, assistant_early_exit=1)


def test_a_static_cache_object_is_refused():
    model = make_model()
    cache = StaticCache(model.config, max_cache_len=64)
    with pytest.raises(ValueError, match="Static cache"):
        text_of(model, prompt(model), assistant_early_exit=1, **{CACHE: cache})


def test_drafts_want_the_package(monkeypatch: pytest.MonkeyPatch):
    model = make_model()
    for name in list(SERVICES):
        monkeypatch.delitem(SERVICES, name)
    with pytest.raises(ImportError, match="assistant_early_exit takes the whole package"):
        text_of(model, prompt(model), assistant_early_exit=1)
