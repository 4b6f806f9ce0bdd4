"""The decoder's configuration: what is refused, what stands where nothing was said, and both ends of every range."""

import time
from typing import Any

import pytest

from chorus_moe import ChorusTextConfig
from chorus_moe.modeling.configuration_checks import MAX_LAYERS, MAX_POSITIONS, MAX_VOCABULARY, MAX_WIDTH

TEXT = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
BANK: dict[str, Any] = {"num_experts": 4}
WINDOWS = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 8}
MEMORY = {"layer_types": ["hybrid_sliding", "full_attention", "hybrid_sliding"], "sliding_window": 8}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hiden_size": 64}, "unknown key 'hiden_size'; did you mean 'hidden_size'"),
        ({"expert_bank": {}}, "unknown key 'expert_bank'; did you mean 'expert_banks'"),
        ({"hidden_size": 65}, "hidden_size=65 is not a multiple of num_attention_heads=4"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple of num_key_value_heads=3"),
        ({"head_dim": 15}, "even rotary dimension, but got `head_dim`=15"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 is outside"),
        ({"num_attention_heads": 0}, "num_attention_heads=0 is outside"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0 is outside"),
        ({"router_aux_loss_coef": -0.1}, "router_aux_loss_coef=-0.1 is outside 0..inf"),
        ({"layer_types": ["full_attention"]}, r"num_hidden_layers` \(3\) must be equal to .* `layer_types` \(1\)"),
        ({"mlp_layer_types": ["dense"] * 4}, r"num_hidden_layers` \(3\) must be equal to .* `mlp_layer_types` \(4\)"),
        ({"mlp_layer_types": ["dense", "moe", "dense"]}, "mlp_layer_types` entries must be in .* got .*'moe'"),
        ({"layer_types": ["chunked_attention"] * 3}, "unknown layer_types 'chunked_attention'"),
        ({"layer_types": ["sliding_attention"] * 3}, "sliding_window is None"),
        ({"qk_norm_scope": "heads"}, "unknown qk_norm_scope 'heads'; did you mean 'head'"),
        ({"norm_placement": "posts"}, "unknown norm_placement 'posts'; did you mean 'post'"),
        ({"no_rope_layers": [1, 0]}, "no_rope_layers has 2 entries for num_hidden_layers=3"),
        ({"sliding_window": 0}, "sliding_window=0 is outside 1"),
        ({"num_global_tokens": 4}, "num_global_tokens=4 serve windows, but no layer"),
        ({"num_global_tokens": -1}, "num_global_tokens=-1 is outside 0"),
        ({"chunk_size_feed_forward": -8}, "chunk_size_feed_forward=-8 is outside 0"),
        ({"exit_layers": [3]}, r"exit_layers=3 is outside 1\.\.2 of 3 layers"),
        ({"exit_layers": [0]}, r"exit_layers=0 is outside 1\.\.2"),
        ({"exit_loss_coef": 1.0}, "exit_loss_coef=1.0 without exit_layers"),
        ({"exit_layers": [1], "exit_loss_coef": -1.0}, "exit_loss_coef=-1.0 is outside 0..inf"),
        ({"skip_budget": 1.5}, r"skip_budget=1.5 is outside 0\.\.1"),
        ({"skip_budget": -0.1}, r"skip_budget=-0.1 is outside 0\.\.1"),
        ({"skip_layers": [1]}, r"skip_layers=\[1\] without a skip_budget"),
        ({"skip_budget": 0.3, "skip_layers": []}, "skip_budget=0.3 without any layer to skip"),
        ({"skip_budget": 0.3, "skip_layers": [3]}, "skip_layers names layer 3 of 3"),
        ({"cross_modal_layers": [3]}, "cross_modal_layers names layer 3 of 3"),
        ({"expert_banks": {"text": {"layers": [1]}}}, "sparse layer 2 holds no expert bank"),
        ({"expert_banks": {"image": {"modality": ["image"]}}}, "unknown key 'modality'; did you mean 'modalities'"),
        ({"expert_banks": {"x": {"modalities": ["smell"]}}}, "expert bank 'x': unknown modality 'smell'"),
        ({"expert_banks": {"x": {"modalities": []}}}, "`modalities` is empty"),
        ({"expert_banks": {"x": {"modalities": ["text", "text"]}}}, "names one twice"),
        ({"expert_banks": {"x": BANK | {"num_experts_per_tok": 5}}}, "num_experts_per_tok=5 must be .* num_experts=4"),
        ({"expert_banks": {"x": {"num_experts_per_tok": 0}}}, "num_experts_per_tok=0 must be between 1"),
        ({"expert_banks": {"x": {"router": "hash"}}}, "unknown router 'hash'"),
        ({"expert_banks": {"x": {"layers": [0]}}}, r"layer 0 is not a sparse layer; the sparse layers are \[1, 2\]"),
        ({"expert_banks": {"x.y": {}}}, "must be a Python identifier"),
        ({"expert_banks": {"x": {"intermediate_size": 0}}}, "intermediate_size=0 is outside 1"),
        ({"expert_banks": {f"bank{i}": {} for i in range(1_025)}}, "1025 expert_banks, at most 1024"),
        ({"num_labels": 10**9}, r"num_labels=1000000000 is outside 1\.\.1048576"),
        ({"num_labels": 0}, "num_labels=0 is outside 1"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan is not a finite number"),
        ({"router_aux_loss_coef": float("nan")}, "router_aux_loss_coef=nan is not a finite number"),
        ({"initializer_range": float("inf")}, "initializer_range=inf is not a finite number"),
        ({"rope_parameters": {"rope_theta": float("nan")}}, r"rope_parameters\['rope_theta'\]=nan is not a finite"),
    ],
)
def test_a_decoder_that_cannot_be_built_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        ChorusTextConfig(**TEXT | values)


@pytest.mark.parametrize(
    "name",
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
        "num_experts",
    ],
)
def test_absurd_sizes_are_refused_at_once(name: str) -> None:
    start = time.monotonic()
    with pytest.raises(Exception, match=f"{name.removeprefix('moe_')}.*={10**9}"):
        ChorusTextConfig(**TEXT | {name: 10**9})
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("name", ["num_experts", "intermediate_size"])
def test_absurd_sizes_of_a_bank_are_refused(name: str) -> None:
    with pytest.raises(Exception, match=f"expert bank 'x': {name}={10**9}"):
        ChorusTextConfig(**TEXT, expert_banks={"x": {name: 10**9}})


def test_default_banks_are_one_a_modality_and_one_for_all() -> None:
    banks = {bank.name: bank for bank in ChorusTextConfig(**TEXT).banks}
    assert {name: bank.modalities for name, bank in banks.items() if name != "common"} == {
        "text": ["text"],
        "image": ["image"],
        "audio": ["audio"],
    }
    assert banks["common"].modalities == ["text", "image", "audio"]


def test_the_order_in_which_banks_are_given_changes_nothing() -> None:
    # A config.json is written with sorted keys, and the gate has one column a bank.
    first = ChorusTextConfig(**TEXT, expert_banks={"text": {}, "image": {}, "common": {}})
    second = ChorusTextConfig(**TEXT, expert_banks={"common": {}, "image": {}, "text": {}})
    assert [bank.name for bank in first.banks] == [bank.name for bank in second.banks]


def test_sizes_that_a_bank_leaves_out_come_from_the_decoder() -> None:
    config = ChorusTextConfig(**TEXT, num_experts=6, expert_banks={"text": {"num_experts": 2}, "common": {}})
    assert {bank.name: bank.num_experts for bank in config.banks} == {"common": 6, "text": 2}


def test_cross_modal_layers_are_the_full_attention_ones_of_a_sliding_model() -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    assert ChorusTextConfig(**TEXT, layer_types=kinds, sliding_window=8).cross_modal_layers == [1]
    assert ChorusTextConfig(**TEXT).cross_modal_layers == [2]


# As docs and saved files know them: a default that moves changes every model whose file does not name it.
DEFAULTS: dict[str, Any] = {
    "vocab_size": 32_000, "hidden_size": 512, "intermediate_size": 1_536, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64, "hidden_act": "silu",
    "max_position_embeddings": 32_768, "initializer_range": 0.02, "rms_norm_eps": 1e-6, "attention_bias": False,
    "attention_output_bias": False, "mlp_bias": False, "attention_dropout": 0.0, "use_qk_norm": False,
    "qk_norm_scope": "head", "norm_placement": "pre", "no_rope_layers": None, "sliding_window": None,
    "num_global_tokens": 0, "num_memory_tokens": 0, "share_cross_modal_query": True, "num_experts": 8,
    "num_experts_per_tok": 2, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
    "expert_width_shares": None, "experts_layout": "fused", "router_aux_loss_coef": 0.01, "router_z_loss_coef": 0.0,
    "expert_budget_loss_coef": 1.0, "alignment_loss_coef": 0.0, "alignment": "contrastive", "exit_layers": None,
    "exit_loss_coef": 0.0, "skip_layers": None, "skip_budget": None, "skip_scope": "feed_forward",
    "skip_loss_coef": 1.0, "output_router_logits": False, "is_causal": True, "use_cache": True,
    "tie_word_embeddings": False, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
    "chunk_size_feed_forward": 0, "modalities": ["text", "image", "audio"], "cross_modal_layers": [7],
    "layer_types": ["full_attention"] * 8, "mlp_layer_types": ["dense"] + ["sparse"] * 7,
}  # fmt: skip


def test_what_stands_where_nothing_was_said():
    config = ChorusTextConfig()
    assert {name: getattr(config, name) for name in DEFAULTS} == DEFAULTS
    assert config.rope_parameters == {"rope_theta": 10_000.0, "rope_type": "default"}
    assert config.num_tokens_in_front == 0 and config.sparse_layers == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("given", "name", "expected"),
    [
        ({"head_dim": 10, "hidden_size": 65}, "head_dim", 10),
        ({}, "head_dim", 16),
        ({"num_key_value_heads": 2}, "num_key_value_heads", 2),
        ({"is_causal": False}, "alignment", "log_odds"),
        ({"is_causal": False, "alignment": "maps"}, "alignment", "maps"),
        ({"skip_budget": 0.5}, "skip_layers", [1, 2]),
        ({"skip_budget": 0.5, "skip_layers": [0]}, "skip_layers", [0]),
        ({"mlp_layer_types": ["sparse"] * 3}, "sparse_layers", [0, 1, 2]),
        ({"cross_modal_layers": []}, "cross_modal_layers", []),
        (WINDOWS | {"cross_modal_layers": [0]}, "cross_modal_layers", [0]),
        ({"layer_types": ["sliding_attention"] * 3, "sliding_window": 1}, "cross_modal_layers", []),
        (WINDOWS | {"is_causal": False, "num_global_tokens": 5}, "num_tokens_in_front", 5),
        (WINDOWS | {"num_global_tokens": 5}, "num_tokens_in_front", 0),
    ],
)
def test_what_follows_from_what_was_said(given: dict[str, Any], name: str, expected: Any):
    assert getattr(ChorusTextConfig(**TEXT | given), name) == expected


ENDS = [
    *((name, 1, MAX_WIDTH) for name in ("intermediate_size", "head_dim", "moe_intermediate_size")),
    *((name, 0, MAX_WIDTH) for name in ("num_global_tokens", "shared_expert_intermediate_size")),
    *((name, 1, MAX_POSITIONS) for name in ("max_position_embeddings", "sliding_window")),
    ("chunk_size_feed_forward", 0, MAX_POSITIONS),
    ("vocab_size", 1, MAX_VOCABULARY),
    ("hidden_size", 1, MAX_WIDTH),
    ("num_attention_heads", 1, MAX_WIDTH),
    ("pad_token_id", 0, 127),
    ("bos_token_id", 0, 127),
    ("eos_token_id", 0, 127),
]


@pytest.mark.parametrize(("name", "low", "high"), ENDS)
def test_a_size_may_be_both_ends_of_its_range_and_nothing_beyond(name: str, low: int, high: int):
    given = TEXT | {"head_dim": 8, "num_key_value_heads": 1} | (WINDOWS if name == "num_global_tokens" else {})
    # A rotary head has two halves.
    step = 2 if name == "head_dim" else 1
    for end in (low - 1 + step, high):
        assert getattr(ChorusTextConfig(**given | {name: end}), name) == end
    for beyond in (low - 1, high + step):
        with pytest.raises(Exception, match=rf"{name.removeprefix('moe_')}={beyond} is outside {low}\.\.{high}$"):
            ChorusTextConfig(**given | {name: beyond})


def test_layers_have_a_limit_and_memory_tokens_none_below_it():
    with pytest.raises(Exception, match=rf"num_hidden_layers={MAX_LAYERS + 1} is outside 0\.\.{MAX_LAYERS}$"):
        ChorusTextConfig(**TEXT | {"num_hidden_layers": MAX_LAYERS + 1})
    assert ChorusTextConfig(**TEXT | MEMORY, num_memory_tokens=MAX_WIDTH).num_memory_tokens == MAX_WIDTH
    with pytest.raises(Exception, match=rf"num_memory_tokens={MAX_WIDTH + 1} is outside 0\.\.{MAX_WIDTH}$"):
        ChorusTextConfig(**TEXT | MEMORY, num_memory_tokens=MAX_WIDTH + 1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"eos_token_id": [1, 128]}, r"eos_token_id=128 is outside 0\.\.127"),
        ({"eos_token_id": [-1]}, r"eos_token_id=-1 is outside 0\.\.127"),
        ({"hidden_act": "sylu"}, "unknown hidden_act 'sylu'; did you mean 'silu'"),
        ({"skip_scope": "layers"}, "unknown skip_scope 'layers'; did you mean 'layer'"),
        ({"experts_layout": "fussed"}, "unknown experts_layout 'fussed'; did you mean 'fused'"),
        ({"alignment": "map"}, "unknown alignment 'map'; did you mean 'maps'"),
        ({"modalities": ["image"]}, r"modalities=\['image'\] lacks 'text'"),
        ({"layer_types": ["hybrid_sliding"] * 3, "num_memory_tokens": 2}, "for hybrid_sliding but sliding_window is N"),
        (MEMORY, "num_memory_tokens=0 and 2 hybrid_sliding layers in layer_types: one needs the other"),
        (WINDOWS | {"num_memory_tokens": 1}, "num_memory_tokens=1 and 0 hybrid_sliding layers"),
        (MEMORY | {"num_memory_tokens": 1, "is_causal": False}, "num_memory_tokens=1 with is_causal=False"),
        ({"num_global_tokens": 1}, "num_global_tokens=1 serve windows, but no layer"),
        ({"no_rope_layers": [1] * 4}, "no_rope_layers has 4 entries for num_hidden_layers=3"),
        ({"cross_modal_layers": [-1]}, "cross_modal_layers names layer -1 of 3"),
        ({"skip_layers": [1, -1], "skip_budget": 0.1}, "skip_layers names layer -1 of 3"),
        ({"exit_layers": [1, 1]}, r"exit_layers=\[1, 1\] names an exit twice"),
        ({"skip_scope": "layer"}, "skip_scope='layer' without skip_layers"),
        ({"expert_width_shares": [1]}, r"expert_width_shares=\[1\] must rise from above 0 to 1, two or more"),
        ({"expert_width_shares": [0.5, 0.75]}, r"expert_width_shares=\[0.5, 0.75\] must rise"),
        ({"expert_width_shares": [0, 1]}, r"expert_width_shares=\[0, 1\] must rise"),
        ({"expert_width_shares": [0.5, 0.25, 1]}, "must rise"),
        ({"expert_width_shares": [0.5, 0.5, 1]}, "must rise"),
        ({"expert_width_shares": [0.5, 1], "experts_layout": "linear"}, "with experts_layout='linear', which runs"),
        (
            {"expert_width_shares": [0.25, 1], "expert_banks": {"common": {}, "text": {"intermediate_size": 6}}},
            "0.25 of expert_width_shares is 1.5 of intermediate_size=6 of bank 'text', no whole number",
        ),
        ({"alignment": "log_odds", "alignment_loss_coef": 0.1}, "alignment='log_odds' compares how text sees"),
        ({"alignment": "pooled", "alignment_loss_coef": 0.1}, "alignment='pooled' compares"),
        ({"rope_parameters": {"rope_type": "lama3"}}, "unknown rope_type 'lama3'; did you mean 'llama3'"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "ChorusTextConfig: .*factor"),
        (
            {"rope_parameters": LLAMA3 | {"low_freq_factor": 4.0, "high_freq_factor": 4.0}},
            "low_freq_factor=4.0 must be below high_freq_factor=4.0",
        ),
        (
            {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": -1}},
            r"rope_parameters\['original_max_position_embeddings'\]=-1 is outside 1\.\.1073741824",
        ),
        ({"expert_banks": {"common": {"layers": [2]}}}, "sparse layer 1 holds no expert bank"),
    ],
)
def test_what_contradicts_itself_is_refused(values: dict[str, Any], message: str):
    with pytest.raises(Exception, match=message):
        ChorusTextConfig(**TEXT | values)


@pytest.mark.parametrize(
    "values",
    [
        {"eos_token_id": [0, 127]},
        {"exit_layers": [1, 2], "exit_loss_coef": 0.5},
        {"skip_layers": [0, 2], "cross_modal_layers": [0, 2], "skip_budget": 1, "skip_scope": "layer"},
        {"expert_width_shares": [0.25, 0.5, 1]},
        {"alignment": "log_odds", "alignment_loss_coef": 0.0},
        {"alignment": "log_odds", "alignment_loss_coef": 0.1, "is_causal": False},
        {"alignment": "maps", "alignment_loss_coef": 0.1},
        {"alignment": "contrastive", "alignment_loss_coef": 0.1},
        MEMORY | {"num_memory_tokens": 1},
        WINDOWS | {"num_global_tokens": 1},
        {"no_rope_layers": [0, 1, 0]},
        {"rope_parameters": LLAMA3 | {"low_freq_factor": 1.0, "high_freq_factor": 4.0}},
        {"mlp_layer_types": ["dense"] * 3, "expert_width_shares": [0.5, 1]},
        {"expert_banks": {f"bank{i}": {} for i in range(1_024)}},
    ],
)
def test_what_lies_just_within_is_accepted(values: dict[str, Any]):
    config = ChorusTextConfig(**TEXT | values)
    saved = config.to_dict()
    assert {name: saved[name] for name in values if name != "expert_banks"} == {
        name: value for name, value in values.items() if name != "expert_banks"
    }


def test_a_bank_has_what_its_settings_say_and_else_what_the_decoder_says():
    given = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "modalities": ["text", "audio"]}
    config = ChorusTextConfig(**TEXT, **given, expert_banks={"own": {"intermediate_size": 8}, "audio": {}})
    found = {b.name: (b.num_experts, b.num_experts_per_tok, b.intermediate_size, b.modalities) for b in config.banks}
    assert found == {"own": (6, 3, 8, ["text", "audio"]), "audio": (6, 3, 24, ["audio"])}
    assert [bank.name for bank in config.banks_of_layer(1)] == ["audio", "own"] and config.banks_of_layer(0) == []
