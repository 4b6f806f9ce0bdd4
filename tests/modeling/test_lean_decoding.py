"""A lean step gives the logits of the modules, or leaves the step to them."""

import threading
from contextlib import nullcontext, suppress
from copy import deepcopy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Cache, DynamicCache, StaticCache

from chorus_moe import ChorusForConditionalGeneration
from chorus_moe.modeling import lean_decoding as module
from chorus_moe.modeling.lean_checks import can_decode
from chorus_moe.modeling.lean_decoding import LeanDecoder, lean_decoding
from chorus_moe.modeling.lean_layers import LeanBanks, ModuleFeedForward
from chorus_moe.modeling.routers import Router
from tests.conftest import tiny_config
from tests.modeling.test_modeling_generation import collate, sample_inputs

TOKENS = [7, 9, 100, 31, 9, 64]
# Sums in another order: worst differences seen over all cases, two caches and three seeds, at logits up to 1.9, are
# 1.1e-6 and 0.053. In bfloat16 the modules and the lean step are both roundings of the same float32 text.
ATOL = {torch.float32: 1e-5, torch.bfloat16: 0.1}
ROPE = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "dense": {"mlp_layer_types": ["dense"] * 3},
    "one bank": {"expert_banks": {"common": {}}},
    "no bank for text": {"expert_banks": {"image": {}}},
    "no shared experts": {"shared_expert_intermediate_size": 0},
    "weights over all experts": {"expert_banks": {"text": {"norm_topk_prob": False}, "common": {}}},
    "two banks in one layer only": {"expert_banks": {"text": {}, "common": {"layers": [2]}}},
    "untied queries": {"share_cross_modal_query": False, "cross_modal_layers": [0, 1, 2]},
    "query and key norms": {"use_qk_norm": True},
    "attention bias": {"attention_bias": True, "attention_output_bias": True},
    "a layer without rotation": {"no_rope_layers": [1, 0, 1]},
    "one head a key": {"num_key_value_heads": 4},
    "sliding window": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "sliding_window": 6,
    },
    "global tokens": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "sliding_window": 6,
        "num_global_tokens": 3,
    },
    "sigmoid router": {"expert_banks": {"text": {"router": "sigmoid"}, "common": {}}},
    "attention router": {"expert_banks": {"text": {}, "common": {"router": "attention"}}},
    "adaptive experts": {"expert_banks": {"text": {"adaptive_experts": True}, "common": {}}},
    "groups of experts": {"expert_banks": {"text": {"num_experts": 4, "num_groups": 2, "topk_groups": 1}}},
    "groups by sigmoid": {
        "expert_banks": {"text": {"router": "sigmoid", "num_experts": 4, "num_groups": 2, "topk_groups": 1}}
    },
    "balance bias": {"expert_banks": {"text": {"balance": "bias"}, "common": {}}},
    "a gate of its own": {
        "expert_banks": {"text": {}, "new": {"gate": "own", "num_experts": 1, "num_experts_per_tok": 1}, "common": {}}
    },
    "only gates of their own": {"expert_banks": {"common": {"gate": "own"}, "image": {}}},
    "closed bank": {"expert_banks": {"text": {}, "more": {"closed": True}, "common": {}}},
    "closed bank of a called module": {"expert_banks": {"text": {"router": "sigmoid", "closed": True}, "common": {}}},
    "sigmoid with a balance bias": {"expert_banks": {"text": {"router": "sigmoid", "balance": "bias"}}},
    "scaled weights": {"expert_banks": {"text": {"routed_scaling_factor": 2.5}, "common": {}}},
    "capacity in training": {"expert_banks": {"text": {"expert_capacity": 1.0}, "common": {}}},
    "changing rotation": {"rope_parameters": ROPE, "max_position_embeddings": 8},
}


def make_model(dtype: torch.dtype = torch.float32, **text: Any) -> ChorusForConditionalGeneration:
    torch.manual_seed(0)
    model = ChorusForConditionalGeneration(tiny_config(**text)).eval().to(dtype)
    model.generation_config.eos_token_id = None
    for parameter in model.parameters():  # away from their start: norms of one and biases of zero hide faults
        parameter.data.mul_(1.5).add_(torch.randn_like(parameter), alpha=0.02)
    for router in (part for part in model.modules() if isinstance(part, Router)):
        if router.e_score_correction_bias is not None:
            router.e_score_correction_bias.normal_(std=0.1)
    return model


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of all lean steps."""
    taken: list[int] = []
    run = LeanDecoder._run

    def spy(self: LeanDecoder, token: int, *arguments: Any) -> Tensor:
        taken.append(token)
        return run(self, token, *arguments)

    monkeypatch.setattr(LeanDecoder, "_run", spy)
    return taken


def make_cache(kind: str, model: ChorusForConditionalGeneration) -> Cache:
    if kind == "static":
        return StaticCache(model.config, max_cache_len=64)
    return DynamicCache(config=model.config) if kind == "dynamic" else DynamicCache()


def decode(
    model: nn.Module, batch: dict[str, Tensor], cache: Cache, lean: bool, tokens: list[int] = TOKENS, **options: Any
) -> Tensor:
    """Logits of one step a token, after a prefill by the modules."""
    mask, logits = batch["attention_mask"], []
    with torch.no_grad():
        model(**batch, past_key_values=cache)
        with lean_decoding(model) if lean else nullcontext():
            for token in tokens:
                mask = torch.cat((mask, mask.new_ones(1, 1)), dim=1)
                ids = torch.tensor([[token]])
                logits.append(model(input_ids=ids, attention_mask=mask, past_key_values=cache, **options).logits)
    return torch.cat(logits)


def prompt(
    model: nn.Module, images: int = 1, padding: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    batch = collate([sample_inputs(model, images, [9] * images)], padding)
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}


@pytest.mark.parametrize("cache", ["dynamic", "dynamic without configuration", "static"])
@pytest.mark.parametrize("case", CASES)
def test_a_lean_step_equals_the_modules(case: str, cache: str, steps: list[int]):
    for padding in (0, 3):
        # Two models: a rotation that changes with the length remembers the longest text it has seen.
        model, twin = make_model(**CASES[case]), make_model(**CASES[case])
        batch = prompt(model, padding=padding)
        expected = decode(twin, batch, make_cache(cache, model), lean=False)
        found = decode(model, batch, make_cache(cache, model), lean=True)
        torch.testing.assert_close(found, expected, rtol=0, atol=ATOL[torch.float32])
    assert steps == TOKENS * 2


@pytest.mark.parametrize("case", ["default", "one bank", "query and key norms", "sliding window"])
def test_a_lean_step_in_bfloat16_is_as_near_to_float32_as_the_modules(case: str, steps: list[int]):
    model = make_model(torch.bfloat16, **CASES[case])
    batch = prompt(model, dtype=torch.bfloat16)
    modules = decode(model, batch, make_cache("dynamic", model), lean=False)
    found = decode(model, batch, make_cache("dynamic", model), lean=True)
    torch.testing.assert_close(found, modules, rtol=0, atol=ATOL[torch.bfloat16])
    assert steps == TOKENS
    exact = decode(model.float(), prompt(model), make_cache("dynamic", model), lean=False)
    # Mean square errors over three seeds: 2.0e-5 and 3.7e-5; single cases vary by a factor of 1.5.
    assert (found - exact).square().mean() < 2 * (modules - exact).square().mean()


@pytest.mark.parametrize(
    "options",
    [{}, {"do_sample": True}, {"cache_implementation": "static", "disable_compile": True}, {"repetition_penalty": 1.5}],
    ids=["greedy", "sampling", "static cache", "processor"],
)
def test_generate_takes_lean_steps_and_gives_the_same_text(
    options: dict[str, Any], steps: list[int], monkeypatch: pytest.MonkeyPatch
):
    model = make_model()
    texts = []
    for lean in (True, False):
        monkeypatch.setattr(module, "can_decode", can_decode if lean else lambda model: False)
        torch.manual_seed(3)
        options = {"do_sample": False, "max_new_tokens": 6} | options
        texts.append(model.generate(**prompt(model, padding=2), **options)[0, -6:].tolist())
    assert texts[0] == texts[1]
    assert steps == texts[0][:-1]


def test_a_long_text_outgrows_the_buffers(steps: list[int]):
    model = make_model()
    tokens = torch.randint(5, 128, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    expected = decode(model, prompt(model), make_cache("dynamic", model), False, tokens)
    found = decode(model, prompt(model), make_cache("dynamic", model), True, tokens)
    torch.testing.assert_close(found, expected, rtol=0, atol=ATOL[torch.float32])
    assert steps == tokens


@pytest.mark.parametrize("lean", [True, False])
def test_a_cache_filled_by_lean_steps_is_an_ordinary_cache(lean: bool):
    model = make_model()
    cache, other = make_cache("dynamic", model), make_cache("dynamic", model)
    with torch.no_grad():
        decode(model, prompt(model), cache, lean=True)
        decode(model, prompt(model), other, lean=False)
        with lean_decoding(model) if lean else nullcontext():
            for held in (cache, other):
                held.crop(-3)
            found = model(input_ids=torch.tensor([[50]]), past_key_values=cache).logits
        expected = model(input_ids=torch.tensor([[50]]), past_key_values=other).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=ATOL[torch.float32])
    for layer, twin in zip(cache.layers, other.layers, strict=True):
        torch.testing.assert_close(layer.keys, twin.keys, rtol=0, atol=ATOL[torch.float32])
        torch.testing.assert_close(layer.values, twin.values, rtol=0, atol=ATOL[torch.float32])


def test_a_lean_step_passes_by_slots_that_a_token_does_not_use(steps: list[int]):
    bank = {"num_experts": 8, "num_experts_per_tok": 4, "adaptive_experts": True}
    model = make_model(expert_banks={"text": bank})
    for router in (part for part in model.modules() if isinstance(part, Router)):
        router.weight.data.mul_(30)  # so that it is surer than at the start
        assert (router(torch.randn(20, router.weight.shape[1])).selected_experts == 8).any()
    expected = decode(model, prompt(model), make_cache("dynamic", model), lean=False)
    found = decode(model, prompt(model), make_cache("dynamic", model), lean=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=ATOL[torch.float32])
    assert steps == TOKENS


def test_two_texts_that_part_from_one_cache_do_not_disturb_each_other(steps: list[int]):
    model = make_model()
    cache = make_cache("dynamic", model)
    with torch.no_grad(), lean_decoding(model):
        decode(model, prompt(model), cache, lean=True)
        twin = make_cache("dynamic", model)
        for layer, source in zip(twin.layers, cache.layers, strict=True):
            layer.lazy_initialization(source.keys, source.values)
            layer.keys, layer.values = source.keys, source.values
        alone = deepcopy(twin)
        model(input_ids=torch.tensor([[50]]), past_key_values=cache)
        model(input_ids=torch.tensor([[60]]), past_key_values=twin)
        model(input_ids=torch.tensor([[51]]), past_key_values=cache)
        found = model(input_ids=torch.tensor([[61]]), past_key_values=twin).logits
        model(input_ids=torch.tensor([[60]]), past_key_values=alone)
        expected = model(input_ids=torch.tensor([[61]]), past_key_values=alone).logits
    assert torch.equal(found, expected)
    assert steps == [*TOKENS, 50, 60, 51, 61, 60, 61]


def test_threads_that_generate_at_once_do_not_disturb_each_other():
    model = make_model()
    batches = [prompt(model, images) for images in (0, 1, 2)]
    options = {"max_new_tokens": 24, "do_sample": False}
    expected = [model.generate(**batch, **options) for batch in batches]
    found: dict[int, Tensor] = {}
    threads = [
        threading.Thread(target=lambda i=i, batch=batch: found.update({i: model.generate(**batch, **options)}))
        for i, batch in enumerate(batches)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], expected[i]) for i in range(len(batches)))


@pytest.mark.parametrize(
    "options",
    [
        {"output_hidden_states": True},
        {"output_attentions": True},
        {"output_router_logits": True},
        {"mm_token_type_ids": torch.tensor([[1]])},
        {"inputs_embeds": None, "position_ids": torch.tensor([[0, 1]])},
    ],
    ids=["hidden states", "attention maps", "routing", "an image token", "positions of two tokens"],
)
def test_a_step_that_wants_more_than_logits_of_text_is_left_to_the_modules(options: dict[str, Any], steps: list[int]):
    model = make_model()
    with suppress(RuntimeError, ValueError):  # what the modules say to it is theirs
        decode(model, prompt(model), make_cache("dynamic", model), True, **options)
    assert not steps


def test_padding_between_tokens_is_left_to_the_modules(steps: list[int]):
    model = make_model()
    batch = prompt(model)
    batch["attention_mask"][0, 2] = 0
    expected = decode(model, batch, make_cache("dynamic", model), lean=False)
    found = decode(model, batch, make_cache("dynamic", model), lean=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=ATOL[torch.float32])
    assert not steps


def test_several_samples_are_left_to_the_modules(steps: list[int]):
    model = make_model()
    model.generate(**collate([sample_inputs(model, 1, [9])] * 2), max_new_tokens=4)
    assert not steps


def test_gradients_and_autocast_are_left_to_the_modules(steps: list[int]):
    model = make_model()
    cache = make_cache("dynamic", model)
    with torch.no_grad():
        model(**prompt(model), past_key_values=cache)
    with lean_decoding(model):
        assert model(input_ids=torch.tensor([[7]]), past_key_values=cache).logits.requires_grad
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert model(input_ids=torch.tensor([[7]]), past_key_values=cache).logits.dtype == torch.bfloat16
    assert not steps


def test_a_model_that_recorded_outputs_once_decodes_lean_again(steps: list[int]):
    model = make_model()
    expected = decode(model, prompt(model), make_cache("dynamic", model), lean=False)
    model(**prompt(model), output_router_logits=True, output_hidden_states=True)
    assert can_decode(model)
    found = decode(model, prompt(model), make_cache("dynamic", model), lean=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=ATOL[torch.float32])
    assert steps


MIXTURE_CHANGES = {
    "hook": lambda mlp: mlp.banks["text"].router.register_forward_hook(lambda *_: None),
    "unknown option": lambda mlp: setattr(mlp.banks["common"].router, "sharpness", 2.0),
    "parametrization": lambda mlp: nn.utils.parametrize.register_parametrization(
        mlp.banks["text"].experts, "down_proj", nn.Identity()
    ),
    "eager experts": lambda mlp: setattr(mlp.banks["text"].experts.config, "_experts_implementation", "eager"),
}


@pytest.mark.parametrize("change", MIXTURE_CHANGES)
def test_a_changed_sparse_layer_is_called_within_a_lean_step(change: str, steps: list[int]):
    model = make_model()
    assert isinstance(LeanDecoder(model).layers[1][-1], LeanBanks)
    MIXTURE_CHANGES[change](model.model.language_model.layers[1].mlp)
    assert isinstance(LeanDecoder(model).layers[1][-1], ModuleFeedForward)
    expected = decode(model, prompt(model), make_cache("dynamic", model), lean=False)
    found = decode(model, prompt(model), make_cache("dynamic", model), lean=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=ATOL[torch.float32])
    assert steps == TOKENS


def test_a_limited_capacity_is_refused_with_a_cache_also_while_decoding():
    model = make_model(expert_banks={"common": {"expert_capacity": 2.0, "capacity_in_eval": True}})
    with pytest.raises(ValueError, match="limits the capacity of its experts"):
        model.generate(**prompt(model), max_new_tokens=3, do_sample=False)


def test_options_of_a_call_are_the_modules_to_follow(steps: list[int]):
    model = make_model(num_experts=4, num_experts_per_tok=2)
    batch, options = prompt(model), {"max_new_tokens": 4, "do_sample": False}
    plain = model.generate(**batch, **options)
    assert steps
    steps.clear()
    model.generate(**batch, **options, expert_budget={"text": 1})
    assert not steps
    assert torch.equal(model.generate(**batch, **options), plain)
    assert steps


def test_an_adapted_model_generates_with_its_adapter(steps: list[int]):
    model = make_model()
    batch = prompt(model)
    plain = model.generate(**batch, max_new_tokens=6, do_sample=False)
    assert steps
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "o_proj"], init_lora_weights=False)).eval()
    steps.clear()
    assert not torch.equal(adapted.generate(**batch, max_new_tokens=6, do_sample=False), plain)
    assert not steps
