"""Experts made of a dense feed-forward, or taken from a mixture."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from chorus_moe import ChorusForConditionalGeneration
from chorus_moe.surgery.compose_upcycling import tie_slices
from tests.modeling.text_parents import MIXTURES, PARENTS, save_parent, text_difference, tiny_towers
from tests.parents import build

# Sums in another order, float32, logits up to 3: the worst difference seen over all cases and three seeds is 4e-6.
ATOL = 1e-5
ROUTERS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "sigmoid": {"router": "sigmoid"},
    "sigmoid with groups": {"router": "sigmoid", "num_groups": 2, "topk_groups": 1},
    "softmax with a bias": {"balance": "bias"},
    "attention": {"router": "attention"},
    "all experts": {"num_experts_per_tok": 8},
}
Compose = Callable[..., ChorusForConditionalGeneration]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("llama")
    return folder, save_parent(folder)


@pytest.fixture
def compose(llama: tuple[Path, Any]) -> Compose:
    def call(**options: Any) -> ChorusForConditionalGeneration:
        options = {"audio": tiny_towers()[1], "sparse_layers": [1, 2]} | options
        return build(llama[0], **options)

    return call


def mixture(model: ChorusForConditionalGeneration, layer: int = 1) -> Any:
    return model.model.language_model.layers[layer].mlp


def two_banks(**settings: Any) -> dict[str, dict[str, Any]]:
    """Two banks that text enters, so that the gate over banks takes part."""
    return {"text": {"num_experts": 8, **settings}, "common": {"num_experts": 8, **settings}}


@pytest.mark.parametrize("split", [1, 2, 4])
@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_computes_what_the_parent_computes(
    router: str, split: int, compose: Compose, llama: tuple[Path, Any]
):
    settings = {"num_experts_per_tok": 4} | ROUTERS[router]
    model = compose(experts=two_banks(**settings), expert_split=split)
    assert text_difference(model, llama[1]) < ATOL


def test_routers_choose_different_copies_for_different_tokens(compose: Compose):
    model = compose(experts=two_banks(num_experts_per_tok=2))
    with torch.no_grad():
        routing = model(input_ids=torch.arange(3, 60)[None], output_router_logits=True).routing[0]["text"]
    assert len(routing.selected_experts.unique()) == 8


@pytest.mark.parametrize("router", ["softmax", "sigmoid", "attention"])
def test_all_slices_of_a_copy_are_chosen_together(router: str, compose: Compose):
    model = compose(experts=two_banks(num_experts_per_tok=4, router=router), expert_split=2)
    with torch.no_grad():
        routing = model(input_ids=torch.arange(3, 60)[None], output_router_logits=True).routing[0]["text"]
    chosen = routing.selected_experts.sort(dim=1).values
    assert torch.equal(chosen[:, ::2] + 1, chosen[:, 1::2])
    assert (chosen[:, ::2] % 2 == 0).all()
    assert len(chosen.unique()) == 8


def test_a_copy_split_into_slices_holds_the_whole_feed_forward(compose: Compose, llama: tuple[Path, Any]):
    experts = mixture(compose(experts=two_banks(num_experts_per_tok=4), expert_split=4)).banks["text"].experts
    parent = llama[1].model.layers[1].mlp
    for copy in (0, 4):
        gate_up, down = experts.gate_up_proj[copy : copy + 4], experts.down_proj[copy : copy + 4]
        assert torch.equal(torch.cat([part[:12] for part in gate_up]), parent.gate_proj.weight)
        assert torch.equal(torch.cat([part[12:] for part in gate_up]), parent.up_proj.weight)
        assert torch.equal(torch.cat(list(down), dim=1), parent.down_proj.weight)


def test_slices_of_a_copy_part_in_training(compose: Compose):
    model = compose(experts=two_banks(num_experts_per_tok=4), expert_split=2).train()
    ids = torch.arange(3, 60)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    grad = mixture(model).banks["text"].router.weight.grad
    assert grad is not None
    assert (grad[::2] - grad[1::2]).abs().max() > 1e-6  # a thousand times what rounding leaves of equal gradients


def test_noise_changes_the_text_a_little(compose: Compose, llama: tuple[Path, Any]):
    differences = [
        text_difference(compose(experts=two_banks(), expert_noise=noise), llama[1]) for noise in (0.001, 0.01, 0.1)
    ]
    assert 10 * ATOL < differences[0] < differences[1] < differences[2] < 1.0


def test_noise_is_relative_to_the_weights_and_differs_between_copies(compose: Compose, llama: tuple[Path, Any]):
    banks = mixture(compose(experts=two_banks(), expert_noise=0.1)).banks
    parent = llama[1].model.layers[1].mlp.down_proj.weight
    noise = torch.cat([bank.experts.down_proj for bank in banks.values()]) - parent
    # 16 copies of 1,536 numbers: one standard deviation is known to 2% of itself.
    scale = noise.flatten(1).std(dim=1) / parent.square().mean().sqrt()
    torch.testing.assert_close(scale, torch.full_like(scale, 0.1), rtol=0.1, atol=0)
    correlation = torch.corrcoef(noise.flatten(1)) - torch.eye(len(noise))
    assert correlation.abs().max() < 0.15


def test_noise_is_the_same_for_a_seed_and_another_for_another(compose: Compose):
    first, again, other = (
        mixture(compose(experts=two_banks(), expert_noise=0.1, seed=seed)).banks["text"].experts.down_proj
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_every_second_layer_but_not_the_last_becomes_sparse(compose: Compose):
    assert compose(sparse_layers=None).config.text_config.sparse_layers == [1]


def test_dense_layers_keep_the_feed_forward(compose: Compose, llama: tuple[Path, Any]):
    model = compose(sparse_layers=[2])
    for layer in (0, 1, 3):
        parent = llama[1].model.layers[layer].mlp
        assert torch.equal(mixture(model, layer).down_proj.weight, parent.down_proj.weight)


def test_a_preset_of_banks_is_filled(compose: Compose, llama: tuple[Path, Any]):
    model = compose(experts="specific_then_common", num_experts=4)
    assert list(mixture(model, 1).banks) == ["audio", "text"]  # it is composed without a vision parent
    assert list(mixture(model, 2).banks) == ["common"]
    assert text_difference(model, llama[1]) < ATOL


def test_numbers_of_experts_may_differ_between_layers(compose: Compose, llama: tuple[Path, Any]):
    model = compose(experts={"text": {"num_experts": [2, 6]}})
    assert [len(mixture(model, layer).banks["text"].experts.down_proj) for layer in (1, 2)] == [2, 6]
    assert text_difference(model, llama[1]) < ATOL


def test_without_sparse_layers_a_parent_with_biases_in_its_feed_forward_is_taken_whole(tmp_path: Path):
    parent = save_parent(tmp_path, mlp_bias=True, attention_bias=True)
    model = build(tmp_path, sparse_layers=[])
    assert text_difference(model, parent) < ATOL
    with pytest.raises(ValueError, match=r"its feed-forward has biases.*sparse_layers=\[\]"):
        build(tmp_path)


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_parent_gives_every_bank_its_experts_and_router(name: str, tmp_path: Path):
    model_type, settings = PARENTS[name]
    parent = save_parent(tmp_path, model_type, **settings)
    banks = {"text": {}, "common": {}}
    model = build(tmp_path, experts=banks)
    for layer in model.config.text_config.sparse_layers:
        theirs = parent.model.layers[layer].mlp
        for bank in mixture(model, layer).banks.values():
            assert torch.equal(bank.router.weight, theirs.gate.weight)
            assert torch.equal(bank.experts.gate_up_proj, theirs.experts.gate_up_proj)
            assert torch.equal(bank.experts.down_proj, theirs.experts.down_proj)
    assert text_difference(model, parent) < ATOL  # two banks with equal answers, weighed by the gate


def test_the_sparse_layers_of_a_mixture_parent_stay_what_they_are(tmp_path: Path):
    model_type, settings = PARENTS["qwen3_moe"]
    save_parent(tmp_path, model_type, **settings)
    model = build(tmp_path)
    assert model.config.text_config.sparse_layers == [0, 2, 3]
    assert not model.config.text_config.expert_banks["text"]["norm_topk_prob"]
    with pytest.raises(ValueError, match=r"sparse_layers=\[1\], but .* stay what they are: \[0, 2, 3\]"):
        build(tmp_path, sparse_layers=[1])
    with pytest.raises(ValueError, match="expert_split=2 .* are for the copies of a dense parent"):
        build(tmp_path, expert_split=2)
    with pytest.raises(ValueError, match="'text': num_experts=8 would not compute .*; it must be 4"):
        build(tmp_path, experts={"text": {"num_experts": 8}})


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "weights that do not sum to one": (
        {"experts": {"text": {"norm_topk_prob": False}}},
        "'text': norm_topk_prob=False would not compute what the parent computes; it must be True",
    ),
    "a factor": (
        {"experts": {"text": {"routed_scaling_factor": 2.5}}},
        "routed_scaling_factor=2.5 would not compute .*; it must be 1.0",
    ),
    "another width": ({"experts": {"text": {"intermediate_size": 40}}}, "intermediate_size=40 .*; it must be 48"),
    "dropped tokens": (
        {"experts": {"text": {"expert_capacity": 2.0, "capacity_in_eval": True}}},
        "capacity_in_eval=True would not compute",
    ),
    "no bank for text": (
        {"experts": {"audio": {}}},
        r"sparse layer 1: no expert bank is open to text; found \['audio'\]",
    ),
    "no bank for text in one layer": ({"experts": {"text": {"layers": [1]}, "audio": {}}}, "sparse layer 2: no expert"),
    "a width that does not divide": ({"expert_split": 5}, "intermediate_size=48 is not a multiple of expert_split=5"),
    "parts of a copy": (
        {"expert_split": 2, "experts": {"text": {"num_experts": 8, "num_experts_per_tok": 3}}},
        "'text' with expert_split=2: num_experts_per_tok=3 is not a multiple of 2",
    ),
    "half a copy": (
        {"expert_split": 2, "experts": {"text": {"num_experts": 7, "num_experts_per_tok": 2}}},
        "num_experts=7 is not a multiple of 2",
    ),
    "a group with parts of a copy": (
        {
            "expert_split": 2,
            "experts": {"text": {"num_experts": 6, "num_experts_per_tok": 2, "num_groups": 2, "topk_groups": 1}},
        },
        "experts in a group=3 is not a multiple of 2",
    ),
    "unused slots": (
        {"expert_split": 2, "experts": {"text": {"adaptive_experts": True}}},
        "adaptive_experts leaves slots unused",
    ),
    "a layer that is not there": ({"sparse_layers": [4]}, "sparse_layers names layer 4 of 4"),
    "no parts": ({"expert_split": 0}, "expert_split=0 must be at least 1"),
    "negative noise": ({"expert_noise": -0.1}, "expert_noise=-0.1 must be at least 0"),
    "a misspelt key": ({"experts": {"text": {"num_expert": 4}}}, "unknown key 'num_expert'; did you mean"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_would_change_the_text_is_refused(case: str, compose: Compose):
    options, message = REFUSALS[case]
    with pytest.raises(ValueError, match=message):
        compose(**options)


def test_tied_rows_are_those_of_the_first_slice(compose: Compose):
    router = mixture(compose(experts=two_banks(router="attention"))).banks["text"].router
    before = {name: parameter.clone() for name, parameter in router.named_parameters()}
    tie_slices(router, 2)
    for name in ("expert_keys", "expert_values"):
        rows = getattr(router, name)
        assert torch.equal(rows[::2], before[name][::2])
        assert torch.equal(rows[1::2], before[name][::2])
    assert torch.equal(router.query, before["query"])


@pytest.mark.parametrize("split", [1, 2])
def test_the_further_feed_forwards_of_an_expert_start_without_a_word(
    split: int, compose: Compose, llama: tuple[Path, Any]
):
    model = compose(experts=two_banks(num_experts_per_tok=4, expert_depth=3), expert_split=split)
    assert text_difference(model, llama[1]) < ATOL
    bank = mixture(model).banks["text"]
    assert len(bank.deeper_experts) == 2
    for stack in bank.deeper_experts:
        assert not stack.down_proj.any()
        assert stack.gate_up_proj.std() > 0.01  # or no gradient would ever arrive
