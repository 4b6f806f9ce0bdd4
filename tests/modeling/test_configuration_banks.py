"""What a bank's configuration refuses, with the reason, and what presets stand for."""

from typing import Any

import pytest

from chorus_moe import ChorusConfig, ChorusTextConfig
from tests.conftest import tiny_config

TEXT = {"vocab_size": 32, "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 5, "num_experts": 8}


def bank(**values: Any) -> Any:
    return ChorusTextConfig(**TEXT, expert_banks={"common": values}).banks[0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"router": "sigmoyd"}, "unknown router 'sigmoyd'; did you mean 'sigmoid'"),
        ({"balance": "cv"}, "unknown balance 'cv'; did you mean 'cv2'"),
        ({"capacity_overflow": "dropp"}, "unknown capacity_overflow 'dropp'; did you mean 'drop'"),
        ({"modalities": ["imgae"]}, "unknown modality 'imgae'; did you mean 'image'"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok=9 must be between 1 and num_experts=8"),
        ({"num_experts": 1, "num_experts_per_tok": 1}, "num_experts=1 leaves.*shared_expert_intermediate_size"),
        ({"num_experts": 4.0}, r"num_experts=4.0 must be of type int \| list\[int\]"),
        ({"num_experts": [8, 8, 4]}, r"num_experts=\[8, 8, 4\] has 3 numbers for the 4 layers \[1, 2, 3, 4\]"),
        ({"num_experts": [8], "layers": [2, 4]}, r"num_experts=\[8\] has 1 numbers for the 2 layers \[2, 4\]"),
        ({"num_experts": [8, True], "layers": [2, 4]}, r"num_experts=\[8, True\] must be of type int \| list\[int\]"),
        ({"num_experts": [8, 1], "layers": [2, 4]}, "num_experts=1 leaves"),
        (
            {"num_experts": [8, 2], "layers": [2, 4], "num_experts_per_tok": 3},
            "num_experts_per_tok=3 must be between 1 and num_experts=2",
        ),
        ({"num_experts": [8, 6], "layers": [2, 4], "num_groups": 4}, "num_groups=4 does not divide num_ex"),
        ({"expert_depth": 0}, r"expert_depth=0 is outside 1\.\.64"),
        ({"num_groups": 3}, "num_groups=3 does not divide num_experts=8"),
        ({"num_groups": 0}, "num_groups=0 does not divide num_experts=8"),
        ({"num_groups": 4, "topk_groups": 5}, "topk_groups=5 is outside 1..num_groups=4"),
        ({"num_groups": 8, "topk_groups": 1}, "leave 1 experts to choose num_experts_per_tok=2 from"),
        ({"expert_capacity": 0}, "expert_capacity=0 must be a positive number"),
        ({"expert_capacity": -0.5}, "expert_capacity=-0.5 must be a positive number"),
        ({"expert_capacity": True}, r"expert_capacity=True must be of type int \| float \| None"),
        ({"closed": "no"}, "closed='no' must be of type bool"),
        ({"closed": 0}, "closed=0 must be of type bool"),
        ({"num_groups": 2.0}, "num_groups=2.0 must be of type int"),
        ({"num_experts_per_tok": True}, "num_experts_per_tok=True must be of type int"),
        ({"intermediate_size": "64"}, "intermediate_size='64' must be of type int"),
        ({"modalities": "text"}, r"modalities='text' must be of type list\[str\]"),
        ({"layers": [1.0]}, r"layers=\[1.0\] must be of type list\[int\] \| None"),
        ({"router": ["softmax"]}, r"router=\['softmax'\] must be of type str"),
        ({"routed_scaling_factor": float("inf")}, "routed_scaling_factor=inf must be finite"),
        ({"bias_update_rate": float("nan")}, "bias_update_rate=nan must be finite"),
        ({"expert_capacity": float("inf")}, "expert_capacity=inf must be finite"),
        ({"capacity_in_eval": True}, "capacity_in_eval=True needs an expert_capacity"),
        ({"adaptive_experts": True, "num_experts_per_tok": 1}, "num_experts_per_tok=1 experts, which is no choice"),
        ({"routed_scaling_factor": 0.0}, "routed_scaling_factor=0.0 must be positive"),
        ({"router_jitter_noise": 1.0}, "router_jitter_noise=1.0 must be at least 0 and below 1"),
        ({"bias_update_rate": 0.0}, "bias_update_rate=0.0 must be positive"),
        ({"balanse": "cv2"}, "unknown key 'balanse'; did you mean 'balance'"),
    ],
)
def test_a_bank_that_cannot_be_built_is_refused_with_the_reason(values: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=f"expert bank 'common'.*: .*{message}"):
        bank(**values)


def test_a_whole_number_stands_for_a_real_one() -> None:
    assert bank(routed_scaling_factor=2, router_jitter_noise=0, bias_update_rate=1).routed_scaling_factor == 2


@pytest.mark.parametrize("name", ["items", "forward", "train", "router", "base_layer", "lora_A", "modules_to_save"])
def test_a_bank_named_like_a_part_of_torch_or_peft_is_refused(name: str) -> None:
    with pytest.raises(Exception, match=f"expert bank '{name}': torch or PEFT uses this name"):
        ChorusTextConfig(**TEXT, expert_banks={name: {}})


@pytest.mark.parametrize(("router", "balance"), [("softmax", "switch"), ("attention", "switch"), ("sigmoid", "bias")])
def test_the_balance_of_a_router_without_a_word_about_it(router: str, balance: str) -> None:
    assert bank(router=router).balance == balance


def test_a_number_of_tokens_and_a_factor_stay_apart_in_a_saved_configuration(tmp_path: Any) -> None:
    config = tiny_config(expert_banks={"text": {"expert_capacity": 2}, "common": {"expert_capacity": 2.0}})
    config.save_pretrained(tmp_path)
    banks = ChorusConfig.from_pretrained(tmp_path).text_config.expert_banks
    kinds = {name: type(values["expert_capacity"]) for name, values in banks.items()}
    assert kinds == {"text": int, "common": float}


def test_a_rule_broken_in_one_layer_names_that_layer() -> None:
    with pytest.raises(Exception, match="expert bank 'common', layer 3: num_experts_per_tok=3 must be between 1 and"):
        bank(num_experts=[8, 8, 2, 8], num_experts_per_tok=3)


def test_a_bank_has_in_each_layer_the_experts_that_its_list_says_in_rising_order() -> None:
    config = ChorusTextConfig(**TEXT, expert_banks={"common": {}, "text": {"layers": [4, 2], "num_experts": [3, 5]}})
    counts = {i: {bank.name: bank.num_experts for bank in config.banks_of_layer(i)} for i in config.sparse_layers}
    assert counts == {1: {"common": 8}, 2: {"common": 8, "text": 3}, 3: {"common": 8}, 4: {"common": 8, "text": 5}}


def test_the_uniform_preset_has_four_banks_in_every_sparse_layer() -> None:
    config = ChorusTextConfig(**TEXT, expert_banks="uniform")
    assert config.to_dict() == ChorusTextConfig(**TEXT).to_dict()
    assert all(len(config.banks_of_layer(layer)) == 4 for layer in config.sparse_layers)


def test_specific_then_common_splits_the_sparse_layers_in_two_halves() -> None:
    config = ChorusTextConfig(**TEXT, expert_banks="specific_then_common")
    names = {layer: [bank.name for bank in config.banks_of_layer(layer)] for layer in config.sparse_layers}
    specific = ["audio", "image", "text"]
    assert names == {1: specific, 2: specific, 3: ["common"], 4: ["common"]}


def test_a_saved_preset_is_the_banks_it_stood_for() -> None:
    saved = ChorusTextConfig(**TEXT, expert_banks="specific_then_common").to_dict()["expert_banks"]
    assert saved["text"]["layers"] == [1, 2]


def test_a_preset_that_does_not_exist_or_does_not_fit_is_refused() -> None:
    with pytest.raises(Exception, match="preset of expert_banks 'unifrom'; did you mean 'uniform'"):
        ChorusTextConfig(**TEXT, expert_banks="unifrom")
    with pytest.raises(Exception, match="needs 2 sparse layers, found 1"):
        ChorusTextConfig(**TEXT | {"num_hidden_layers": 2}, expert_banks="specific_then_common")


@pytest.mark.parametrize(
    ("values", "training", "evaluation"),
    [
        ({}, False, False),
        ({"expert_capacity": 1.0}, True, False),
        ({"expert_capacity": 3, "capacity_in_eval": True}, True, True),
    ],
)
def test_experts_can_be_full_where_there_is_a_capacity(
    values: dict[str, Any], training: bool, evaluation: bool
) -> None:
    found = bank(**values)
    assert (found.limits_capacity(True), found.limits_capacity(False)) == (training, evaluation)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"mean_experts": 1.5},
            "mean_experts=1.5 and adaptive_rounding='ceil' are of adaptive_experts, which is False",
        ),
        ({"adaptive_rounding": "floor"}, "mean_experts=None and adaptive_rounding='floor' are of adaptive_experts"),
        (
            {"adaptive_experts": True, "mean_experts": 0.5},
            "mean_experts=0.5 must lie between 1 and num_experts_per_tok=2",
        ),
        ({"adaptive_experts": True, "mean_experts": 2.5}, "mean_experts=2.5 must lie between 1 and"),
        ({"adaptive_experts": True, "num_experts_per_tok": 1, "gate": "own"}, "experts, which is no choice"),
        ({"capacity_scope": "batch"}, "capacity_scope='batch' needs an expert_capacity, found None"),
        ({"capacity_scope": "batch", "expert_capacity": 2, "capacity_in_eval": True}, "found capacity_in_eval=True"),
        ({"num_experts": 0, "num_experts_per_tok": 0}, r"num_experts=0 is outside 1\.\.65536"),
        ({"num_experts": 65_537}, r"num_experts=65537 is outside 1\.\.65536"),
        ({"intermediate_size": 1_048_577}, r"intermediate_size=1048577 is outside 1\.\.1048576"),
        ({"expert_depth": 65}, r"expert_depth=65 is outside 1\.\.64"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok=9 must be between 1 and num_experts=8"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok=0 must be between 1 and num_experts=8"),
        ({"router_jitter_noise": -0.1}, "router_jitter_noise=-0.1 must be at least 0 and below 1"),
        ({"num_groups": 4, "topk_groups": 0}, r"topk_groups=0 is outside 1\.\.num_groups=4"),
        (
            {"num_groups": 4, "topk_groups": 1, "num_experts_per_tok": 3},
            "topk_groups=1 of num_groups=4 leave 2 experts",
        ),
        ({"gate": "owns"}, "unknown gate 'owns'; did you mean 'own'"),
        ({"adaptive_rounding": "round"}, "unknown adaptive_rounding 'round'"),
        ({"layers": [1, 5]}, r"layer 5 is not a sparse layer; the sparse layers are \[1, 2, 3, 4\]"),
        ({"modalities": ["text", "text"]}, r"`modalities` names one twice: \['text', 'text'\]"),
    ],
)
def test_a_setting_beyond_its_end_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=f"expert bank 'common': .*{message}"):
        bank(**values)


@pytest.mark.parametrize(
    "values",
    [
        {"num_experts": 65_536, "intermediate_size": 1_048_576, "expert_depth": 64, "num_experts_per_tok": 65_536},
        {"num_experts": 1, "num_experts_per_tok": 1, "gate": "own"},
        {"num_experts_per_tok": 1},
        {"router_jitter_noise": 0.999, "routed_scaling_factor": 1e-9, "bias_update_rate": 1e-9},
        {"num_groups": 8, "topk_groups": 8},
        {"num_groups": 4, "topk_groups": 1, "num_experts_per_tok": 2},
        {"num_groups": 4, "topk_groups": 4},
        {"expert_capacity": 1},
        {"expert_capacity": 1e-9},
        {"expert_capacity": 2, "capacity_scope": "batch", "capacity_overflow": "drop"},
        {"adaptive_experts": True, "mean_experts": 1},
        {"adaptive_experts": True, "mean_experts": 2},
        {"adaptive_experts": True, "adaptive_rounding": "floor"},
        {"layers": [4, 1, 2, 3]},
    ],
)
def test_a_setting_at_its_end_is_accepted(values: dict[str, Any]) -> None:
    found = bank(**values)
    assert {name: getattr(found, name) for name in values} == values


def test_what_a_bank_is_where_nothing_was_said() -> None:
    found, expected = bank().to_dict(), {
        "modalities": ["text", "image", "audio"], "num_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 512,
        "expert_depth": 1, "layers": None, "router": "softmax", "router_bias": False, "norm_topk_prob": True,
        "routed_scaling_factor": 1.0, "router_jitter_noise": 0.0, "num_groups": 1, "topk_groups": None,
        "balance": "switch", "bias_update_rate": 1e-3, "expert_capacity": None, "capacity_overflow": "reroute",
        "capacity_scope": "sequence", "capacity_in_eval": False, "adaptive_experts": False,
        "adaptive_rounding": "ceil", "mean_experts": None, "gate": "softmax", "closed": False,
    }  # fmt: skip
    assert found == expected


@pytest.mark.parametrize(
    ("balance", "has_loss"), [("switch", True), ("cv2", True), ("variance", True), ("bias", False), ("none", False)]
)
def test_three_balances_are_losses(balance: str, has_loss: bool) -> None:
    assert bank(balance=balance).has_balance_loss is has_loss
    assert bank(gate="own").has_own_gate and not bank().has_own_gate


def test_one_modality_in_common_with_the_model_is_enough() -> None:
    text: dict[str, Any] = TEXT | {"modalities": ["text", "audio"]}
    ChorusTextConfig(**text, expert_banks={"common": {}, "x": {"modalities": ["image", "audio"]}})
    with pytest.raises(Exception, match=r"'x': it takes \['image'\] but the model has \['text', 'audio'\]; leave the"):
        ChorusTextConfig(**text, expert_banks={"common": {}, "x": {"modalities": ["image"]}})


@pytest.mark.parametrize("odd", [5, 6])
def test_halves_of_an_odd_number_of_layers_are_not_equal(odd: int) -> None:
    config = ChorusTextConfig(**TEXT | {"num_hidden_layers": odd}, expert_banks="specific_then_common")
    sparse, half = config.sparse_layers, (odd - 1) // 2
    assert config.expert_banks["text"]["layers"] == sparse[:half]
    assert config.expert_banks["common"]["layers"] == sparse[half:]


@pytest.mark.parametrize("name", ["1x", "a-b", "a b", "", "bank_gate ", "lora_", "original_module"])
def test_a_name_that_no_parameter_can_carry_is_refused(name: str) -> None:
    with pytest.raises(Exception, match=f"expert bank '{name}': (a bank's name must be|torch or PEFT uses)"):
        ChorusTextConfig(**TEXT, expert_banks={"common": {}, name: {}})
    for good in ("x1", "lora", "Router", "routers"):
        ChorusTextConfig(**TEXT, expert_banks={good: {}})
