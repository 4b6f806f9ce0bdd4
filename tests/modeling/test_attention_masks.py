"""Which mask a layer gets: who is seen, and when a rule stands in for the matrix."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask
from transformers import DynamicCache, StaticCache

from chorus_moe.fastpaths.attention_blocks import LocalMask
from chorus_moe.modeling import attention_masks as module
from chorus_moe.modeling.attention_masks import build_masks, is_packed
from tests.modeling.conftest import WINDOW, windowed_model

LONG = 2 * WINDOW + 1


def sliding_mask(count: int, attention: str = "sdpa", attention_mask=None, cache=None, position_ids=None, **text):
    config = windowed_model(attention, **text).config.text_config
    return build_masks(config, torch.zeros(2, count, 8), attention_mask, cache, position_ids)["sliding_attention"]


@pytest.mark.parametrize(
    ("attention", "count", "is_rule"),
    [
        ("sdpa", LONG, True),
        ("sdpa", LONG - 1, False),
        ("block_local", 2, True),
        ("block_local", 1, False),
        ("eager", LONG, False),
    ],
)
def test_long_prefills_get_a_rule_by_themselves(attention: str, count: int, is_rule: bool):
    assert isinstance(sliding_mask(count, attention), LocalMask) == is_rule


def test_no_dense_mask_is_built_for_a_long_prefill(monkeypatch: pytest.MonkeyPatch):
    model = windowed_model(num_global_tokens=2)
    monkeypatch.setattr(module, "create_sliding_window_causal_mask", None)
    with torch.no_grad():
        model(input_ids=torch.randint(5, 128, (1, LONG)))
        with pytest.raises(TypeError):
            model(input_ids=torch.randint(5, 128, (1, LONG - 1)))


def test_padding_is_kept_in_the_rule_only_where_there_is_any():
    mask = torch.ones(2, LONG, dtype=torch.long)
    assert sliding_mask(LONG, attention_mask=mask).real_BK is None
    mask[0, :3] = 0
    expected = torch.cat((torch.ones(2, 2, dtype=torch.bool), mask.bool()), dim=1)
    assert torch.equal(sliding_mask(LONG, attention_mask=mask, num_global_tokens=2).real_BK, expected)


def test_a_rule_goes_to_another_device_with_its_padding():
    real = torch.ones(1, 9, dtype=torch.bool)
    assert LocalMask(WINDOW, True, 0, real).to("meta", non_blocking=True).real_BK.device.type == "meta"
    assert LocalMask(WINDOW, True).to("meta") == LocalMask(WINDOW, True)


def test_packed_sequences_and_masks_of_the_caller_stay_dense():
    packed = torch.cat((torch.arange(5), torch.arange(LONG - 5)))[None]
    assert not isinstance(sliding_mask(LONG, position_ids=packed), LocalMask)
    custom = torch.ones(2, 1, LONG, LONG, dtype=torch.bool).tril()
    assert sliding_mask(LONG, attention_mask=custom) is custom


def test_a_static_cache_with_room_behind_the_tokens_stays_dense():
    config = windowed_model().config
    assert isinstance(sliding_mask(LONG, "block_local", cache=StaticCache(config, max_cache_len=64)), LocalMask)
    assert not isinstance(sliding_mask(3, "block_local", cache=StaticCache(config, max_cache_len=64)), LocalMask)
    assert isinstance(sliding_mask(3, "block_local", cache=DynamicCache(config=config)), LocalMask)


@pytest.mark.parametrize("is_causal", [True, False])
def test_global_tokens_are_seen_from_everywhere_and_windows_end(is_causal: bool):
    model = windowed_model("eager", num_global_tokens=2, is_causal=is_causal)
    with torch.no_grad():
        maps = model(input_ids=torch.randint(5, 128, (1, 20)), output_attentions=True).attentions
    distance = torch.arange(20)[:, None] - torch.arange(20)
    window = (distance >= 0) & (distance < WINDOW) if is_causal else distance.abs() <= WINDOW
    if is_causal:  # the maps of sliding layers begin with the global keys
        window = torch.cat((torch.ones(20, 2, dtype=torch.bool), window), dim=1)
    assert torch.equal(maps[0][0, 0] > 0, window)
    assert maps[1].shape[-1] == 20


def test_a_block_mask_gets_columns_for_global_keys():
    inner = create_block_mask(lambda b, h, q, k: (k <= q) & (k > q - 3), 1, None, 5, 5, device="cpu")
    mask = module._with_global_keys(inner, 2)
    query, key = torch.arange(5)[:, None], torch.arange(7)
    expected = (key < 2) | ((key - 2 <= query) & (key - 2 > query - 3))
    assert torch.equal(mask.mask_mod(0, 0, query, key), expected)
    assert tuple(mask.shape) == (1, 1, 5, 7)


def test_global_tokens_are_refused_where_the_mask_cannot_show_them():
    config = windowed_model(num_global_tokens=2).config.text_config
    config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="num_global_tokens=2 with 'flash_attention_2' attention"):
        build_masks(config, torch.zeros(1, 4, 8), None, None, None)


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("num_global", [0, 2])
def test_a_long_bidirectional_prefill_builds_no_dense_mask(
    num_global: int, padding: int, monkeypatch: pytest.MonkeyPatch
):
    """With a mask and without; global tokens, which all stand at position 0, are no packed sequences."""
    options = {"is_causal": False, "num_global_tokens": num_global}
    ids, mask = torch.randint(5, 128, (2, 3 * WINDOW)), None
    if padding:
        mask = torch.ones_like(ids)
        mask[:, -padding:] = 0
    with torch.no_grad():
        expected = windowed_model("eager", **options).model(input_ids=ids, attention_mask=mask).last_hidden_state
        monkeypatch.setattr(module, "create_bidirectional_sliding_window_mask", None)
        found = windowed_model(**options).model(input_ids=ids, attention_mask=mask).last_hidden_state
    real = slice(0, ids.shape[1] - padding)
    # float32 sums in another order: worst difference seen is 2e-6.
    torch.testing.assert_close(found[:, real], expected[:, real], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("positions", "packed"),
    [
        ([[0, 1, 2, 3]], False),
        ([[5, 6, 9, 20]], False),
        ([[0, 1, 0, 1]], True),
        ([[0, 1, 1, 2]], True),
        ([[0, 0, 1, 2]], True),
        ([[0, 1, 2, 3], [0, 1, 2, 0]], True),
        ([[3]], False),
    ],
)
def test_rows_are_packed_where_positions_do_not_rise(positions: list[list[int]], packed: bool):
    given = torch.tensor(positions)
    assert is_packed(None, given) is packed
    # A mask says what belongs together.
    assert not is_packed(torch.ones_like(given), given) and not is_packed({}, given) and not is_packed(None, None)


MASKED = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1, 1]])
KINDS = ("full_attention", "sliding_attention")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("num_global", [0, 2])
@pytest.mark.parametrize("is_causal", [True, False])
def test_dense_masks_show_what_each_kind_of_layer_sees(attention: str, num_global: int, is_causal: bool):
    """Global keys of a causal model stand in front of the keys, those of a bidirectional one among the tokens."""
    config = windowed_model(attention, num_global_tokens=num_global, is_causal=is_causal).config.text_config
    masks = build_masks(config, torch.zeros(2, 9, 8), MASKED, None, None)
    query, key = torch.arange(9)[:, None], torch.arange(9)
    order = (key <= query) if is_causal else torch.ones(9, 9, dtype=torch.bool)
    window = query - key < WINDOW if is_causal else (query - key).abs() <= WINDOW
    if num_global and not is_causal:
        window = window | (query < num_global) | (key < num_global)
    expected = {"full_attention": order, "sliding_attention": order & window}
    real = MASKED.bool()[:, None, None]
    assert set(masks) == set(KINDS)
    for kind, mask in masks.items():
        seen = mask if mask.dtype == torch.bool else mask == 0
        in_front = num_global if is_causal and kind == "sliding_attention" else 0
        assert seen.shape[-1] == 9 + in_front and seen[..., :in_front].all()
        # What a padded query sees is nobody's business.
        rows = real.expand(2, 1, 9, 9).transpose(2, 3)
        assert torch.equal(seen[..., in_front:] & rows, expected[kind] & real & rows)
        assert mask.dtype == torch.bool or mask.min() == torch.finfo(mask.dtype).min


def test_a_mask_is_left_out_where_nothing_needs_it_and_kept_for_global_keys():
    for count, is_none in ((0, True), (2, False)):
        config = windowed_model("sdpa", num_global_tokens=count).config.text_config
        masks = build_masks(config, torch.zeros(2, WINDOW - 1, 8), None, None, None)
        assert masks["full_attention"] is None and (masks["sliding_attention"] is None) is is_none


def test_layers_of_one_kind_have_one_mask_and_masks_made_before_are_taken():
    for kinds in (["full_attention"] * 3, ["sliding_attention"] * 3):
        config = windowed_model("eager", layer_types=kinds).config.text_config
        assert list(build_masks(config, torch.zeros(2, 9, 8), MASKED, None, None)) == kinds[:1]
    made = {"full_attention": None}
    assert build_masks(config, torch.zeros(2, 9, 8), made, None, None) is made


def test_memory_tokens_take_masks_of_one_form_and_no_packed_rows():
    kinds = ["hybrid_sliding", "full_attention", "sliding_attention"]
    model = windowed_model("eager", layer_types=kinds, num_memory_tokens=2)
    config, states = model.config.text_config, torch.zeros(2, 9, 8)
    masks = build_masks(config, states, MASKED, None, None)
    assert set(masks) == set(kinds) and masks["hybrid_sliding"] is masks["sliding_attention"]
    with pytest.raises(ValueError, match=r"memory tokens takes an attention_mask \(batch, sequence\)"):
        build_masks(config, states, torch.ones(2, 1, 9, 9, dtype=torch.bool), None, None)
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]).expand(2, 9)
    with pytest.raises(ValueError, match="packed sequences would read each other through memory tokens"):
        build_masks(config, states, None, None, packed)
    build_masks(config, states, None, DynamicCache(config=model.config), packed)
    build_masks(config, states, MASKED, None, packed)


@pytest.mark.parametrize("attention", ["flash_attention_2", "paged|sdpa"])
def test_without_global_tokens_any_implementation_will_do(attention: str):
    config = windowed_model(num_global_tokens=2).config.text_config
    config._attn_implementation = attention
    with pytest.raises(
        ValueError, match=r"num_global_tokens=2 with .* attention; it takes \('eager', 'sdpa', 'flex_att"
    ):
        build_masks(config, torch.zeros(1, 4, 8), None, None, None)
    config.num_global_tokens = 0
    config._attn_implementation = "eager"
    assert build_masks(config, torch.zeros(1, 4, 8), None, None, None)
