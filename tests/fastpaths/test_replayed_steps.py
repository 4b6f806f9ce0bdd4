"""The kernels of a compiled step, called alone, do what the step does; more than kernels is left to the step."""

from pathlib import Path
from threading import Thread
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from chorus_moe.fastpaths.compiled_decoding import _backend
from chorus_moe.fastpaths.replayed_steps import ReplayedSteps, _kernels, can_replay, generated_modules
from chorus_moe.modeling.modeling_outputs import CACHE

# As Inductor writes it: a region, a buffer in two halves, an output that is a view.
SOURCE = """
def region(args):
    values, = args
    args.clear()
    buffer = empty_strided_cpu((8, ), (1, ), torch.float32)
    half = reinterpret_tensor(buffer, (4, ), (1, ), 4)
    cpp_fused_double_0(values, half)
    return (half, )

def call(args):
    values, kept = args
    args.clear()
    found = region([values])
    output = empty_strided_cpu((4, ), (1, ), torch.float32)
    cpp_fused_add_1(found[0], kept, output)
    return (reinterpret_tensor(output, (1, 4), (4, 1), 0), )

def benchmark_compiled_module(args):
    return print(args)
"""


def load(folder: Path, source: str = SOURCE) -> ModuleType:
    """A generated module, which counts the tensors that it makes and the calls of its kernels."""
    module = ModuleType("generated")
    module.__file__ = str(folder / "generated.py")
    Path(module.__file__).write_text(source)
    counts = {"made": 0, "kernels": 0}

    def made(make: Any) -> Any:
        def count(*args: Any) -> Tensor:
            counts["made"] += 1
            return make(*args)

        return count

    def double(values: Tensor, output: Tensor) -> None:
        counts["kernels"] += 1
        if values[0].isnan():
            raise RuntimeError("index out of bounds")
        torch.mul(values, 2, out=output)

    def add(values: Tensor, kept: Tensor, output: Tensor) -> None:
        counts["kernels"] += 1
        kept += 1  # as a cache counts its tokens
        torch.add(values, kept, out=output)

    guards = torch._C._dynamo.guards
    vars(module).update(
        torch=torch,
        counts=counts,
        empty_strided_cpu=made(guards._empty_strided_cpu),
        reinterpret_tensor=made(guards._reinterpret_tensor),
        cpp_fused_double_0=double,
        cpp_fused_add_1=add,
    )
    exec(compile(source, module.__file__, "exec"), vars(module))
    return module


def cache_of(*lengths: int) -> Any:
    layers = [
        SimpleNamespace(keys=torch.zeros(1), values=torch.zeros(1), cumulative_length=torch.full((4,), float(length)))
        for length in lengths
    ]
    return SimpleNamespace(layers=layers)


@pytest.fixture
def module(tmp_path: Path) -> ModuleType:
    made = load(tmp_path)
    assert can_replay([made])
    return made


def steps(module: ModuleType) -> ReplayedSteps:
    def step(model: Any, values: Tensor, past_key_values: Any, **_: Any) -> Tensor:
        return module.call([values, past_key_values.layers[0].cumulative_length])[0]

    return ReplayedSteps(step)


def test_a_text_is_replayed_with_its_own_inputs(module: ModuleType) -> None:
    run, cache = steps(module), cache_of(0)
    outputs = []
    for number in range(1, 5):
        values = torch.full((4,), float(number))
        outputs.append(run(None, values=values, **{CACHE: cache}))
        assert torch.equal(values, torch.full((4,), float(number)))  # an input is the caller's
    # So are outputs: none is written over later. The count in the cache has gone on.
    assert torch.equal(torch.cat(outputs)[:, 0], torch.tensor([2.0 * number + number for number in range(1, 5)]))
    assert module.counts == {"made": 4, "kernels": 8}


@pytest.mark.parametrize("change", ["cache", "keys", "shape", "name"])
def test_what_differs_is_noted_anew(module: ModuleType, change: str) -> None:
    run, cache, inputs = steps(module), cache_of(0), {"values": torch.ones(4)}
    for _ in range(2):
        run(None, **inputs, **{CACHE: cache})
    if change == "cache":
        cache = cache_of(5)
    elif change == "keys":
        cache.layers[0].cumulative_length = torch.full((4,), 5.0)  # as `reorder_cache` does
    elif change == "shape":
        inputs["mask"] = torch.ones(1)
        run(None, **inputs, **{CACHE: cache})
        inputs["mask"] = torch.ones(2)
    else:
        inputs["mask"] = torch.ones(1)
    before = module.counts["made"]
    start = cache.layers[0].cumulative_length[0].item()
    for number in (1, 2):
        assert torch.equal(run(None, **inputs, **{CACHE: cache}), torch.full((1, 4), 2 + start + number))
    assert module.counts["made"] - before == 4


def test_a_kernel_that_fails_is_seen(module: ModuleType) -> None:
    run, cache = steps(module), cache_of(0)
    for number in (1.0, torch.nan, 2.0, torch.nan, 3.0):
        values = torch.full((4,), number)
        if number == number:
            count = cache.layers[0].cumulative_length[0].item()
            assert torch.equal(run(None, values=values, **{CACHE: cache}), torch.full((1, 4), 2 * number + count + 1))
        else:
            with pytest.raises(RuntimeError, match="out of bounds"):
                run(None, values=values, **{CACHE: cache})


def test_a_failure_while_noting_leaves_nothing_behind(module: ModuleType) -> None:
    run, cache = steps(module), cache_of(0)
    with pytest.raises(RuntimeError, match="out of bounds"):
        run(None, values=torch.full((4,), torch.nan), **{CACHE: cache})
    module.call([torch.ones(4), torch.zeros(4)])  # no step of ours
    assert run.noted is None
    assert torch.equal(run(None, values=torch.ones(4), **{CACHE: cache}), torch.full((1, 4), 3.0))


def test_an_output_that_no_kernel_wrote(module: ModuleType) -> None:
    """A copy of it would stay as it was."""
    run, cache = steps(module), cache_of(0)
    step = run.step
    run.step = lambda *args, **inputs: step(*args, **inputs).clone()
    for number in range(1, 4):
        assert torch.equal(run(None, values=torch.ones(4), **{CACHE: cache}), torch.full((1, 4), 2.0 + number))
    assert run.noted is None


def test_two_texts_share_a_module(module: ModuleType) -> None:
    runs, wrong = [steps(module) for _ in range(3)], []

    def text(run: ReplayedSteps, number: float) -> None:
        cache = cache_of(0)
        for token in range(1, 100):
            if run(None, values=torch.full((4,), number), **{CACHE: cache})[0, 0] != 2 * number + token:
                wrong.append((number, token))

    threads = [Thread(target=text, args=(run, float(number))) for number, run in enumerate(runs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    "line", ["extern_kernels.mm(kept, kept, out=output)", "torch.ops.aten.topk.default(kept, 2)", "kept.item()"]
)
def test_more_than_kernels(tmp_path: Path, line: str) -> None:
    module = load(tmp_path, SOURCE.replace("    found =", f"    {line}\n    found ="))
    kernel = module.cpp_fused_double_0
    assert _kernels(module) is None and not can_replay([module])
    assert module.cpp_fused_double_0 is kernel  # left alone
    assert not can_replay([])


def test_an_operation_that_runs_layers_is_no_more_than_kernels(tmp_path: Path) -> None:
    module = load(tmp_path, SOURCE.replace("    found =", "    torch.ops.chorus.decoder_layers.default()\n    found ="))
    assert can_replay([module])


def test_modules_are_found() -> None:
    """What Inductor loads for a function, with what it calls."""

    def function(values: Tensor) -> Tensor:
        return (values * 2).sin() + values.sum()

    with generated_modules() as modules:
        torch.compile(function, backend=_backend({}))(torch.randn(16))
    assert modules and all(_kernels(module) for module in modules)
