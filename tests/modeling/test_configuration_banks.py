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
