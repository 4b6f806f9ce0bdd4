"""Files of a spread model: which tensor lies where, what is written and read again, and who failed."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from peft import get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForMultimodalLM

from benchmarks.same_bits import TEXT
from chorus_moe import ChorusConfig, ChorusForConditionalGeneration
from chorus_moe.training.lora import lora_config
from chorus_moe.training.scale.background import BackgroundWriter
from chorus_moe.training.scale.shards import (
    INDEX,
    NUMBERS,
    OPTIMIZER,
    PIECES,
    file_numbers,
    files_of_bank,
    load_adapter,
    load_optimizer,
    load_weights,
    named_failures,
    no_empty_groups,
    optimizer_state,
    save_optimizer,
    save_settings,
    save_weights,
    weights_of,
    write_numbers,
)


def tensors(**sizes: int) -> dict[str, Tensor]:
    """Of so many bytes, by name with `__` for a dot."""
    return {name.replace("__", "."): torch.zeros(size, dtype=torch.uint8) for name, size in sizes.items()}


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"a": 4, "b": 4, "c": 4}, [1, 1, 2]),
        ({"a": 4, "b": 6, "c": 1}, [1, 1, 2]),
        ({"a": 4, "b": 7}, [1, 2]),
        # Larger than a file, it has one of its own.
        ({"a": 1, "b": 30, "c": 1}, [1, 2, 3]),
        ({"x__banks__z__w": 1, "a": 1, "x__banks__b__w": 9, "y__banks__b__v": 2, "c": 1}, [4, 1, 2, 3, 1]),
    ],
)
def test_files_are_filled_bank_by_bank(sizes: dict[str, int], expected: list[int]) -> None:
    found = file_numbers(tensors(**sizes), file_bytes=10)
    assert [found[name.replace("__", ".")] for name in sizes] == expected


def test_bytes_count_and_a_bank_alone_begins_with_the_first_file() -> None:
    wide = {"a": torch.zeros(2), "b": torch.zeros(2, dtype=torch.bfloat16), "c": torch.zeros(1)}
    assert list(file_numbers(wide, file_bytes=12).values()) == [1, 1, 2]
    assert file_numbers(tensors(x__banks__t__w=1)) == {"x.banks.t.w": 1}
    assert set(file_numbers(tensors(a=10**6, b=10**6)).values()) == {1}


def index(folder: Path, **places: str) -> Path:
    names = {name.replace("__", "."): file for name, file in places.items()}
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))
    return folder


def test_a_banks_files_are_its_own(tmp_path: Path) -> None:
    index(tmp_path, a="1", x__banks__t__w="3", y__banks__t__v="2", z__banks__u__w="4")
    assert files_of_bank(tmp_path, "t") == ["2", "3"] and files_of_bank(tmp_path, "u") == ["4"]
    for name in ("v", ""):
        with pytest.raises(ValueError, match=f"holds no bank '{name}', it has t, u$"):
            files_of_bank(tmp_path, name)
    index(tmp_path, x__banks__t__w="2", b="2", a="2")
    with pytest.raises(ValueError, match="2 holds a beside bank 't'"):
        files_of_bank(tmp_path, "t")


def test_a_failure_names_its_rank() -> None:
    failures: Any = {1: (OSError("disk full"), None), 3: (KeyError("w"), None)}
    with pytest.raises(OSError, match=r"by rank 1: OSError: disk full; rank 3: KeyError: 'w'$"), named_failures():
        raise dcp.CheckpointException("", failures)
    with pytest.raises(TypeError), named_failures():
        raise TypeError


def test_groups_without_parameters_are_left_out_for_a_while() -> None:
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": []}, {"params": [a]}, {"params": []}, {"params": [b]}], lr=0.1)
    before = list(optimizer.param_groups)
    with no_empty_groups(optimizer):
        assert [group["params"] for group in optimizer.param_groups] == [[a], [b]]
    assert [id(group) for group in optimizer.param_groups] == [id(group) for group in before]


@pytest.fixture
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A group of this process alone."""
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def made(seed: int = 0, is_tied: bool = False) -> ChorusForConditionalGeneration:
    torch.manual_seed(seed)
    banks = {"text": {}, "common": {"modalities": ["text"]}}
    config = ChorusConfig(text_config=TEXT | {"num_hidden_layers": 2, "expert_banks": banks})
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = is_tied
    return ChorusForConditionalGeneration(config)


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("in_background", [False, True])
def test_what_is_written_is_an_ordinary_model(alone: None, tmp_path: Path, is_tied: bool, in_background: bool) -> None:
    model = made(is_tied=is_tied)
    weights = weights_of(model)
    assert ("lm_head.weight" in weights) == (not is_tied)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_settings(model, tmp_path)
    if in_background:
        writer = BackgroundWriter()
        assert not writer.is_writing
        writer.begin(weights, {"w": torch.ones(2)}, {"a": 1}, tmp_path)
        # What changes meanwhile is not what is written.
        with torch.no_grad():
            model.model.language_model.norm.weight.fill_(7)
        assert writer.is_writing
        writer.settle()
        assert not writer.is_writing
        writer.settle()
        assert json.loads((tmp_path / OPTIMIZER / NUMBERS).read_text()) == {"a": 1}
    else:
        save_weights(weights, tmp_path)
    assert not (tmp_path / PIECES).exists()
    written = json.loads((tmp_path / INDEX).read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [f"model-{number:05}-of-00003.safetensors" for number in range(1, 4)]
    assert written["metadata"]["total_size"] == sum((tmp_path / name).stat().st_size for name in files)
    for name, file in written["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], expected[name])
    again = AutoModelForMultimodalLM.from_pretrained(tmp_path)
    assert again.config.architectures == ["ChorusForConditionalGeneration"]
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())
    other = made(1, is_tied)
    load_weights(other, tmp_path)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in other.state_dict().items())
    assert files_of_bank(tmp_path, "common") == files[1:2]


def test_how_a_run_is_spread_is_not_saved(tmp_path: Path) -> None:
    model = made()
    model.config.distributed_config = {"fsdp": 2}
    save_settings(model, tmp_path)
    assert "distributed_config" not in json.loads((tmp_path / "config.json").read_text())
    assert model.config.distributed_config == {"fsdp": 2}
    assert (tmp_path / "generation_config.json").is_file()
    model.can_generate = lambda: False  # type: ignore[method-assign, assignment]
    os.remove(tmp_path / "generation_config.json")
    save_settings(model, tmp_path)
    assert not (tmp_path / "generation_config.json").exists()


def stepped(seed: int, steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    groups = [{"params": model[0].parameters(), "weight_decay": 0.5}, {"params": []}, {"params": model[1].parameters()}]
    optimizer = torch.optim.AdamW(groups, lr=0.1 + seed, betas=(0.8, 0.9))
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("steps", [0, 1])
def test_an_optimizer_goes_on_where_it_was(alone: None, tmp_path: Path, steps: int) -> None:
    model, optimizer = stepped(0, 3)
    save_optimizer(*optimizer_state(model, optimizer), tmp_path)
    other, filled = stepped(1, steps)
    load_optimizer(other, filled, tmp_path)
    assert len(filled.param_groups) == 3 and filled.param_groups[1]["params"] == []
    for own, saved in zip(filled.param_groups, optimizer.param_groups, strict=True):
        for name in ("lr", "betas", "weight_decay"):
            # Of a group of nothing, nothing is saved.
            assert own[name] == saved[name] or not own["params"]
    for a, b in zip(other.parameters(), model.parameters(), strict=True):
        assert filled.state[a].keys() == optimizer.state[b].keys()
        assert all(torch.equal(filled.state[a][key], value) for key, value in optimizer.state[b].items())


def test_only_the_first_rank_writes_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / OPTIMIZER).mkdir()
    for rank in (1, 0):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        write_numbers({"lr": 0.1}, tmp_path)
        assert (tmp_path / OPTIMIZER / NUMBERS).exists() == (rank == 0)


def test_an_adapter_that_was_saved_is_read_into_another(tmp_path: Path) -> None:
    adapters = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = ChorusForConditionalGeneration(ChorusConfig(text_config=TEXT))
        settings = lora_config(model, dense=True, router="train", verbose=False)
        adapters.append(get_peft_model(model, settings))
        for parameter in adapters[-1].parameters():
            if parameter.requires_grad:
                parameter.data.normal_()
    first, second = adapters
    before = {name: value.clone() for name, value in second.state_dict().items()}
    first.save_pretrained(tmp_path)
    load_adapter(second, tmp_path)
    trained = {name for name, parameter in first.named_parameters() if parameter.requires_grad}
    assert len(trained) > 10
    expected = {name: first.state_dict()[name] if name in trained else value for name, value in before.items()}
    assert all(torch.equal(value, expected[name]) for name, value in second.state_dict().items())
