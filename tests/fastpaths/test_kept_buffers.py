"""Buffers of compiled steps: the same ones serve every run, and nobody sees it."""

import time
from threading import Barrier, Thread
from types import ModuleType

import pytest
import torch
from torch import Tensor

from chorus_moe.fastpaths import kept_buffers
from chorus_moe.fastpaths.kept_buffers import MOST_BYTES, generated_modules, keep_buffers


@pytest.fixture
def module() -> ModuleType:
    """A generated module, as Inductor writes them, that counts what it is asked for."""
    made = ModuleType("generated")
    made.asked = {"empty": 0, "view": 0}

    def empty_strided_cpu(*args: object) -> Tensor:
        made.asked["empty"] += 1
        return torch._C._dynamo.guards._empty_strided_cpu(*args)

    def reinterpret_tensor(*args: object) -> Tensor:
        made.asked["view"] += 1
        return torch._C._dynamo.guards._reinterpret_tensor(*args)

    made.empty_strided_cpu, made.reinterpret_tensor = empty_strided_cpu, reinterpret_tensor
    return made


def doubled_sum(module: ModuleType, values: Tensor, width: int = 4) -> Tensor:
    """What a wrapper looks like: a buffer in two halves, a view of an input, and an output."""
    buffer = module.empty_strided_cpu((2 * width,), (1,), torch.float32)
    for start in (0, width):
        half = module.reinterpret_tensor(buffer, (width,), (1,), start)
        half.copy_(module.reinterpret_tensor(values, (width,), (1,), 0))
    output = module.empty_strided_cpu((width,), (1,), torch.float32)
    torch.add(buffer[:width], buffer[width:], out=output)
    return module.reinterpret_tensor(output, (1, width), (width, 1), 0)


def test_buffers_are_made_once(module: ModuleType) -> None:
    step = keep_buffers(lambda values: doubled_sum(module, values), [module])
    for _ in range(3):
        values = torch.randn(4)
        assert torch.equal(step(values), 2 * values[None])
    # Of each later run only the output, its view and the two views of the input.
    assert module.asked == {"empty": 2 + 1 + 1, "view": 5 + 3 + 3}


def test_an_output_is_the_callers(module: ModuleType) -> None:
    step = keep_buffers(lambda values: doubled_sum(module, values), [module])
    outputs = [step(torch.full((4,), float(number))) for number in range(4)]
    for number, output in enumerate(outputs):
        assert torch.equal(output, torch.full((1, 4), 2.0 * number))


def test_an_input_may_get_other_memory(module: ModuleType) -> None:
    """As a weight does whose `data` is replaced."""
    weight = torch.nn.Parameter(torch.ones(4))
    step = keep_buffers(lambda: doubled_sum(module, weight.detach()), [module])
    same = keep_buffers(lambda: doubled_sum(module, weight), [module])
    with torch.no_grad():
        for number in range(3):
            weight.data = torch.full((4,), float(number))
            assert torch.equal(step(), torch.full((1, 4), 2.0 * number))
            assert torch.equal(same(), torch.full((1, 4), 2.0 * number))


@pytest.mark.parametrize(("width", "made"), [(MOST_BYTES // 8, 1), (MOST_BYTES // 8 + 1, 2)])
def test_large_buffers_are_made_anew(module: ModuleType, width: int, made: int) -> None:
    step = keep_buffers(lambda values: doubled_sum(module, values, width), [module])
    step(torch.ones(width))
    before = dict(module.asked)
    # The output is a new one in both cases, and half as large.
    assert torch.equal(step(torch.ones(width)), torch.full((1, width), 2.0))
    assert module.asked["empty"] - before["empty"] == made


def test_a_run_that_fails_leaves_nothing_behind(module: ModuleType) -> None:
    def run(values: Tensor) -> Tensor:
        first = module.empty_strided_cpu((4,), (1,), torch.float32)
        if values[0] < 0:
            raise ValueError("negative")
        first.copy_(values)
        return doubled_sum(module, first)

    step = keep_buffers(run, [module])
    for value in (-1.0, 1.0, -1.0, 2.0, 3.0):
        if value < 0:
            with pytest.raises(ValueError, match="negative"):
                step(torch.full((4,), value))
        else:
            assert torch.equal(step(torch.full((4,), value)), torch.full((1, 4), 2 * value))


def test_two_steps_share_a_module(module: ModuleType) -> None:
    """Equal code is loaded once, also for two models; each has its own buffers."""
    one = keep_buffers(lambda values: doubled_sum(module, values), [module])
    two = keep_buffers(lambda values: doubled_sum(module, values, 8), [module])
    for number in range(1, 4):
        assert torch.equal(one(torch.full((4,), float(number))), torch.full((1, 4), 2.0 * number))
        assert torch.equal(two(torch.full((8,), float(number))), torch.full((1, 8), 2.0 * number))


def test_outside_of_a_step_nothing_is_kept(module: ModuleType) -> None:
    step = keep_buffers(lambda values: doubled_sum(module, values), [module])
    step(torch.ones(4))
    before = dict(module.asked)
    assert torch.equal(doubled_sum(module, torch.ones(4)), torch.full((1, 4), 2.0))
    assert module.asked["empty"] - before["empty"] == 2


def test_threads_wait_for_each_other(module: ModuleType) -> None:
    step = keep_buffers(lambda values: doubled_sum(module, values), [module])
    wrong: list[float] = []

    def run(value: float) -> None:
        for _ in range(200):
            if not torch.equal(step(torch.full((4,), value)), torch.full((1, 4), 2 * value)):
                wrong.append(value)

    threads = [Thread(target=run, args=(float(number),)) for number in range(1, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_first_runs_of_threads_keep_one_set(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noted by two runs at once, tensors would stand in places where others are asked for."""
    real = kept_buffers._share_memory

    def slowly(one: Tensor, other: Tensor) -> bool:
        time.sleep(1e-3)  # others may run
        return real(one, other)

    monkeypatch.setattr(kept_buffers, "_share_memory", slowly)
    step, together = keep_buffers(lambda values: doubled_sum(module, values), [module]), Barrier(3)

    def run() -> None:
        together.wait()
        step(torch.ones(4))

    threads = [Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert module.asked["empty"] == 2 + 1 + 1  # as one thread asks in three runs
    assert torch.equal(step(torch.full((4,), 3.0)), torch.full((1, 4), 6.0))


def test_modules_are_found() -> None:
    """What Inductor loads for a function, and whose buffers are then kept."""

    def function(values: Tensor) -> Tensor:
        return (values.sort().values.cumsum(0) * 2).flip(0)

    compiled, values = torch.compile(function), torch.randn(16)
    with generated_modules() as modules:
        expected = compiled(values)
    assert modules
    step = keep_buffers(compiled, modules)
    for _ in range(3):
        assert torch.equal(step(values), expected)
