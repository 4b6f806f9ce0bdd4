"""Global tokens: one result on every path, nothing of them in what is returned, and no way around causality."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from chorus_moe import ChorusForConditionalGeneration, ChorusForSequenceClassification
from chorus_moe.surgery import parameter_report
from tests.conftest import moved, tiny_batch, tiny_config
from tests.modeling.conftest import KINDS, WINDOW, windowed_model

# float32 sums in another order: worst difference of logits seen is 1.2e-6.
ATOL = 1e-5
CAUSAL = {"num_global_tokens": 3}
BIDIRECTIONAL = CAUSAL | {"is_causal": False}

pytestmark = pytest.mark.usefixtures("small_blocks")


def text(length: int, batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randint(5, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


def make_cache(kind: str, model: ChorusForConditionalGeneration) -> Any:
    if kind == "static":
        return StaticCache(model.config, max_cache_len=64)
    return DynamicCache(config=model.config) if kind == "dynamic" else DynamicCache()


@torch.no_grad()
def in_pieces(
    model: ChorusForConditionalGeneration, ids: Tensor, mask: Tensor, pieces: list[int], cache: Any
) -> Tensor:
    logits, start = [], 0
    for size in pieces:
        stop = start + size
        inputs = {"input_ids": ids[:, start:stop], "attention_mask": mask[:, :stop]}
        logits.append(model(**inputs, past_key_values=cache, use_cache=True).logits)
        start = stop
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("cache", ["dynamic", "dynamic without configuration", "static"])
@pytest.mark.parametrize("pieces", [[20, 1, 1, 1], [WINDOW - 2, 1, 1, 1, 1], [4, 19], [9, 14, 1]])
@pytest.mark.parametrize("attention", ["sdpa", "block_local"])
def test_a_cached_text_equals_the_whole_with_a_dense_mask(cache: str, pieces: list[int], attention: str):
    ids = text(sum(pieces))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    with torch.no_grad():
        expected = windowed_model("eager", **CAUSAL)(input_ids=ids, attention_mask=mask).logits
    model = windowed_model(attention, **CAUSAL)
    found = in_pieces(model, ids, mask, pieces, make_cache(cache, model))
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=0, atol=ATOL)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static", "disable_compile": True}])
def test_generated_text_is_the_same_with_every_cache_and_with_beams(options: dict[str, Any]):
    model, ids = windowed_model(**CAUSAL), text(2 * WINDOW + 3)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    common: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    beams = {"num_beams": options.get("num_beams", 1)}
    expected = model.generate(ids, **common, **beams, use_cache=False)
    assert torch.equal(model.generate(ids, **common, **options), expected)


def test_global_keys_are_never_in_the_cache():
    model, cache = windowed_model(**CAUSAL), DynamicCache()
    with torch.no_grad():
        model(input_ids=text(20), past_key_values=cache)
    assert cache.get_seq_length(0) == 20


def test_a_causal_model_with_global_keys_reads_nothing_that_follows():
    model, ids = windowed_model(**CAUSAL), text(30, batch=1)
    other = ids.clone()
    other[0, 20] = 9 if ids[0, 20] != 9 else 10
    with torch.no_grad():
        reached = moved(model(input_ids=ids).logits, model(input_ids=other).logits)[0]
    assert not reached[:20].any()
    assert reached[20:].all()


def test_global_tokens_carry_what_windows_cannot_reach():
    ids = text(40, batch=1)
    other = ids.clone()
    other[0, 0] = 9 if ids[0, 0] != 9 else 10
    kinds = {"layer_types": ["sliding_attention"] * 3, "cross_modal_layers": []}
    reached = {}
    for count in (0, 1):
        model = windowed_model(**BIDIRECTIONAL | kinds | {"num_global_tokens": count})
        with torch.no_grad():
            reached[count] = moved(model(input_ids=ids).logits, model(input_ids=other).logits)[0]
    assert not reached[0][1 + 3 * WINDOW :].any()
    assert reached[1].all()


def test_what_a_bidirectional_model_returns_is_about_the_sequence_alone():
    model = windowed_model("eager", **BIDIRECTIONAL)
    batch = tiny_batch(model.config, length=27)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    flags = ("hidden_states", "attentions", "router_logits", "cross_modal_states")
    with torch.no_grad():
        output = model.model(**inputs, **{f"output_{flag}": True for flag in flags})
    assert [tuple(h.shape[:2]) for h in output.hidden_states] == [(3, 27)] * 4
    assert {tuple(a.shape[2:]) for a in output.attentions} == {(27, 27)}
    assert [tuple(k.shape[2:3]) for _, k in output.cross_modal_states] == [(27,)]
    modality, real = batch["mm_token_type_ids"].flatten(), batch["attention_mask"].flatten().bool()
    for routing in output.routing:
        for name, value in (("text", 0), ("image", 1), ("audio", 3)):
            assert torch.equal(routing[name].rows, ((modality == value) & real).nonzero().squeeze(1))
            assert len(routing[name].router_logits) == len(routing[name].rows)
        assert torch.equal(routing["common"].token_mask, real)
    assert not isinstance(model.model.language_model(input_ids=text(9), return_dict=False), dict)


@pytest.mark.parametrize("padding", [1, 9])
def test_padding_changes_nothing_for_a_bidirectional_model(padding: int):
    model, ids = windowed_model(**BIDIRECTIONAL), text(20, batch=1)
    padded = torch.cat((torch.zeros(1, padding, dtype=torch.long), ids), dim=1)
    mask = (torch.arange(20 + padding) >= padding).long()[None]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = model.model(input_ids=ids).last_hidden_state
        found = model.model(input_ids=padded, attention_mask=mask, position_ids=positions).last_hidden_state
    torch.testing.assert_close(found[:, padding:], expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize("options", [CAUSAL, BIDIRECTIONAL], ids=["causal", "bidirectional"])
def test_every_head_learns_its_global_tokens_and_loads_what_it_saved(options: dict[str, Any], tmp_path: Path):
    torch.manual_seed(0)
    config = tiny_config(layer_types=KINDS, sliding_window=WINDOW, **options)
    model = ChorusForSequenceClassification(config).train()
    batch = tiny_batch(config) | {"labels": torch.tensor([0, 1, 1])}
    model(**batch).loss.backward()
    learned = {name: p for name, p in model.named_parameters() if "global_tokens" in name}
    assert len(learned) == (4 if config.text_config.is_causal else 1)
    for name, parameter in learned.items():
        assert parameter.grad.abs().sum() > 0, name
        assert parameter.std().item() == pytest.approx(config.text_config.initializer_range, rel=0.5)
    model.eval().save_pretrained(tmp_path)
    loaded = ChorusForSequenceClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointed in (False, True):
        model = windowed_model(**BIDIRECTIONAL).train()
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model(**tiny_batch(model.config, length=30)).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_no_cache_and_no_other_mask_with_tokens_in_front():
    model = windowed_model(**BIDIRECTIONAL)
    with pytest.raises(ValueError, match="there is no cache"):
        model(input_ids=text(9), past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="takes an attention_mask"):
        model(input_ids=text(9), attention_mask=torch.ones(2, 1, 9, 9, dtype=torch.bool))


@pytest.mark.parametrize(("options", "part"), [(CAUSAL, "attention"), (BIDIRECTIONAL, "embeddings")])
def test_global_tokens_are_counted_where_they_belong(options: dict[str, Any], part: str):
    more = parameter_report(windowed_model(**options).model.config).parts
    plain = parameter_report(windowed_model(**options | {"num_global_tokens": 0}).model.config).parts
    different = {name for name in more if more[name] != plain[name]}
    assert different == {part}
