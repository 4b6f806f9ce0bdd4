"""A compiled step gives the text and the logits of the modules, or leaves the step to them.

Most cases trace the whole step in one graph and run it operation by operation (`aot_eager`): this shows what is in the
graph and takes a second. What Inductor makes of it is compiled once.
"""

import re
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from transformers import CompileConfig

from chorus_moe import ChorusForConditionalGeneration
from chorus_moe.fastpaths.compiled_decoding import (
    CompiledDecoding,
    _backend,
    compile_decoding,
)
from chorus_moe.fastpaths.quantized_weights import STEP_TOKENS
from chorus_moe.surgery import close_bank
from tests.conftest import tiny_batch, tiny_config

# Sums in another order, at logits up to 2.
ATOL = 1e-5
WINDOWS: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6}
CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "one bank": {"expert_banks": {"common": {}}},
    "no bank for text": {"expert_banks": {"image": {}}},
    "sigmoid router": {"expert_banks": {"text": {"router": "sigmoid"}, "common": {}}},
    "attention router": {"expert_banks": {"text": {}, "common": {"router": "attention"}}},
    "adaptive experts": {"expert_banks": {"text": {"adaptive_experts": True}, "common": {}}},
    "deep experts": {"expert_banks": {"text": {"expert_depth": 2, "adaptive_experts": True}, "common": {}}},
    "groups": {"expert_banks": {"text": {"num_experts": 4, "num_groups": 2, "topk_groups": 1}}},
    "balance bias": {"expert_banks": {"text": {"balance": "bias"}, "common": {}}},
    "own gate": {
        "expert_banks": {"text": {}, "new": {"gate": "own", "num_experts": 1, "num_experts_per_tok": 1}, "common": {}}
    },
    "closed bank": {"expert_banks": {"text": {}, "common": {"closed": True}}},
    "windows": WINDOWS,
    "global tokens": WINDOWS | {"num_global_tokens": 3},
    "skip gates": {"skip_layers": [1], "skip_budget": 0.5},
    "norms after": {"norm_placement": "post"},
    "many experts": {
        "expert_banks": {"common": {"num_experts": 128, "num_experts_per_tok": 8, "intermediate_size": 8}}
    },
    "cross-modal layers": {"cross_modal_layers": [0, 1], "share_cross_modal_query": False},
}


def make(**text: Any) -> ChorusForConditionalGeneration:
    torch.manual_seed(0)
    model = ChorusForConditionalGeneration(tiny_config(**{"num_hidden_layers": 2} | text)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "skip_gate" in name or ".gate." in name:
                parameter.normal_()
    return model


def generate(
    model: Any, inputs: dict[str, Tensor], backend: str = "aot_eager", **options: Any
) -> tuple[Tensor, Tensor]:
    """Text and logits `(steps, B, V)` of six new tokens."""
    given = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "output_logits": True, **options}
    config = CompileConfig(backend=backend, mode=None if backend == "aot_eager" else "default")
    found = model.generate(**inputs, **given, compile_config=config, return_dict_in_generate=True)
    return found.sequences, torch.stack(found.logits)


def check(model: Any, inputs: dict[str, Tensor], **options: Any) -> CompiledDecoding:
    """Both ways, once; the compiled way must have had its graph."""
    compile_decoding(model)
    expected = generate(model, inputs, disable_compile=True, **{k: v for k, v in options.items() if k != "backend"})
    found = generate(model, inputs, **options)
    decoding = getattr(model, "get_base_model", lambda: model)().get_compiled_call.__self__
    assert not decoding.failure
    assert decoding.graphs
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], atol=ATOL, rtol=0)
    return decoding


def text(batch: int = 1, length: int = 9) -> dict[str, Tensor]:
    input_ids = torch.randint(5, 128, (batch, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


# Each case is traced for some seconds.
QUICK = ("default", "global tokens", "own gate")


@pytest.mark.parametrize("case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CASES])
def test_every_kind_of_model(case: str):
    check(make(**CASES[case]), text())


@pytest.mark.parametrize(
    "options",
    [{"expert_budget": {"text": 1}}, {"closed_banks": ["common"]}],
    ids=lambda options: next(iter(options)),
)
def test_what_a_caller_may_ask(options: dict[str, Any]):
    check(make(expert_banks={"text": {}, "common": {}}), text(), **options)


def test_a_skip_threshold():
    check(make(skip_layers=[1], skip_budget=0.5), text(), skip_threshold=0.7)


def test_a_batch():
    check(make(), text(4))


def test_media_and_padding_in_the_prompt():
    model = make()
    batch = tiny_batch(model.config)
    del batch["labels"]
    check(model, batch)


def test_weights_changed_in_place():
    model = make()
    decoding = check(model, text())
    graphs = dict(decoding.graphs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    assert check(model, text()).graphs == graphs  # the very same: nothing was compiled again


def test_an_adapter_added_later():
    model = make()
    check(model, text())
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "o_proj"], init_lora_weights=False)).eval()
    check(adapted, text())


def test_adapters_switched_between_texts():
    config = LoraConfig(target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    adapted = get_peft_model(make(), config, "first").eval()
    adapted.add_adapter("second", config)
    adapted.eval()
    check(adapted, text())
    adapted.set_adapter("second")
    check(adapted, text())
    with adapted.disable_adapter():
        check(adapted, text())


def test_an_adapter_for_each_sample():
    config = LoraConfig(target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    adapted = get_peft_model(make(), config, "first").eval()
    adapted.add_adapter("second", config)
    adapted.eval()
    decoding = check(adapted, text(2), adapter_names=["first", "second"])
    graphs = dict(decoding.graphs)
    assert check(adapted, text(2), adapter_names=["first", "second"]).graphs == graphs
    check(adapted, text(2), adapter_names=["second", "__base__"])


# The kernels of a step would not call them.
@pytest.mark.parametrize("place", ["the model", "model.language_model.layers.1.self_attn", "all modules"])
def test_hooks_are_called_at_every_step(place: str):
    model, calls = make(), []
    expected = generate(model, text())[0]
    decoding = check(model, text())
    hook = lambda module, *rest: calls.append(module)  # noqa: E731
    if place == "all modules":
        handle = torch.nn.modules.module.register_module_forward_hook(hook)
    else:
        handle = (model if place == "the model" else model.get_submodule(place)).register_forward_hook(hook)
    with handle:
        found = generate(model, text())[0]
    module = model.get_submodule("" if place != "model.language_model.layers.1.self_attn" else place)
    assert sum(each is module for each in calls) == 6
    assert torch.equal(found, expected)
    assert not decoding.graphs and place in decoding.failure
    check(model, text())


def test_a_bank_closed_between_texts():
    model = make(expert_banks={"text": {}, "common": {}})
    check(model, text())
    close_bank(model, "common")
    check(model, text())


def test_two_threads_get_their_own_texts():
    model = compile_decoding(make())
    prompts = [text(length=length) for length in (7, 9)]
    expected = [generate(model, prompt, disable_compile=True)[0] for prompt in prompts]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(2):  # the first round compiles
            found = list(pool.map(lambda prompt: generate(model, prompt)[0], prompts))
            assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    decoding = model.get_compiled_call.__self__
    assert len(decoding.graphs) == 1 and not decoding.failure


def test_a_copy_compiles_for_itself():
    model = compile_decoding(make())
    copied = deepcopy(model)
    assert copied.get_compiled_call.__self__.model is copied


def test_lengths_of_one_size_share_a_graph():
    model = make()
    check(model, text(length=9))
    assert len(check(model, text(length=12)).graphs) == 1


def test_generate_hands_its_tokenizer_on():
    check(make(), text(), tokenizer=object())


def test_what_a_step_cannot_have_is_named_once(caplog: pytest.LogCaptureFixture):
    model = make()
    expected = generate(model, text(), disable_compile=True)
    with caplog.at_level("WARNING"):
        found = generate(compile_decoding(model), text(), output_hidden_states=True)
    assert torch.equal(found[0], expected[0])
    assert not model.get_compiled_call.__self__.graphs
    line = "compiled decoding: the step is given output_hidden_states; the modules run instead"
    assert [record.message for record in caplog.records].count(line) == 1


def test_linear_experts_run_through_the_modules():
    model = make(experts_layout="linear", expert_banks={"common": {}})
    expected = generate(model, text(), disable_compile=True)
    found = generate(compile_decoding(model), text())
    assert "linear" in model.get_compiled_call.__self__.failure
    assert torch.equal(found[0], expected[0])


@pytest.mark.parametrize("first", [torch.no_grad, torch.inference_mode])
def test_one_graph_serves_both_modes_without_gradients(first: Any):
    second = torch.no_grad if first is torch.inference_mode else torch.inference_mode
    model = make()
    expected = generate(model, text(), disable_compile=True)
    compile_decoding(model)
    for mode in (first, second, first):
        with mode():
            assert torch.equal(generate(model, text())[0], expected[0])
    assert len(model.get_compiled_call.__self__.graphs) == 1


def test_sizes_that_change():
    """Dynamo's, on the CPU as well."""
    model = make()
    expected = generate(model, text(), disable_compile=True)
    config = CompileConfig(backend="aot_eager", mode=None, dynamic=True)
    asked: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "compile_config": config}
    found = compile_decoding(model).generate(**text(), **asked)
    assert torch.equal(found, expected[0])
    (graph,) = model.get_compiled_call.__self__.graphs.values()
    assert graph.traced.compiled is None and not model.get_compiled_call.__self__.failure


def test_a_compiler_that_fails(monkeypatch: pytest.MonkeyPatch):
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no compiler")

    model = make()
    expected = generate(model, text(), disable_compile=True)
    compile_decoding(model)
    monkeypatch.setattr("chorus_moe.fastpaths.compiled_decoding._compiler", lambda *_: refuse)
    assert torch.equal(generate(model, text())[0], expected[0])
    assert "no compiler" in model.get_compiled_call.__self__.failure


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batch", "case"),
    [(1, "adaptive experts"), (4, "adaptive experts"), (2, "windows"), (1, "groups"), (1, "many experts")],
)
def test_inductor(batch: int, case: str):
    decoding = check(make(**CASES[case]), text(batch), backend="inductor")
    # From the third token on the kernels alone run: the output says that they compute, this that they are taken.
    assert decoding.replayed == set(decoding.graphs)


@pytest.mark.slow
def test_inductor_with_padding_and_weights_changed_in_place():
    model = make()
    batch = tiny_batch(model.config)
    del batch["labels"]
    decoding = check(model, batch, backend="inductor")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    check(model, batch, backend="inductor")
    # Other memory, of the step and of a layer.
    for module in (model.lm_head, model.model.language_model.layers[1].self_attn.o_proj):
        module.weight = torch.nn.Parameter(module.weight.detach() * 2)
    assert len(check(model, batch, backend="inductor").replayed) == len(decoding.graphs) == 1


@pytest.mark.slow
def test_threads_replay_their_own_texts():
    model = compile_decoding(make())
    prompts = [text(length=length) for length in (7, 9)]
    expected = [generate(model, prompt, disable_compile=True) for prompt in prompts]
    generate(model, prompts[0], backend="inductor")
    with ThreadPoolExecutor(2) as pool:
        for _ in range(10):
            for found, (tokens, logits) in zip(
                pool.map(lambda prompt: generate(model, prompt, backend="inductor"), prompts), expected, strict=True
            ):
                assert torch.equal(found[0], tokens)
                torch.testing.assert_close(found[1], logits, atol=ATOL, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "calls"), [(1, 0), (STEP_TOKENS, 0), (STEP_TOKENS + 1, 1)])
def test_products_are_written_as_loops(rows: int, calls: int) -> None:
    """And what makes the rows, here a sine, is computed once, not for each of the 64 rows of the weight."""
    weight, states = torch.randn(64, 48), torch.randn(rows, 48)

    def step() -> Tensor:
        return F.linear(states.sin(), weight)

    torch.compiler.reset()
    with torch.no_grad():
        product, (code,) = run_and_get_code(torch.compile(step, backend=_backend({"fx_graph_cache": False})))
    assert code.count("extern_kernels.mm(") == calls
    torch.testing.assert_close(product, step(), rtol=1e-5, atol=ATOL)
    assert re.search(r"\.sin\(\);\s+tmp\d+\.store\(", code)  # into memory, not on into the products
