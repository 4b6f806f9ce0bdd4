"""A spread model and its optimizer on disk, written and read by all ranks through torch's distributed checkpoint.

Unusual here:
- each rank writes what it holds; the pieces of a tensor are then joined into ordinary `model-*.safetensors` with their
  index, which any number of processes and `from_pretrained` read;
- each bank has files of its own, so that one bank can be fetched alone;
- the optimizer's state lies in safetensors too, by the names of the parameters, and its numbers in JSON: nothing is
  unpickled, and the layout that reads need not be the one that wrote.
"""

import contextlib
import copy
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files_on_every_rank
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel
from transformers.distributed.checkpoint import _redistribute_state_dict
from transformers.utils import CONFIG_NAME

from chorus_moe.surgery.saved_code import drop_absent_code

INDEX = "model.safetensors.index.json"
PIECES = "pieces"
OPTIMIZER, NUMBERS = "optimizer_shards", "numbers.json"
BANK = re.compile(r"\.banks\.([^.]+)\.")
FILE_BYTES = 5 * 10**9
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def weights_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors of a spread model as DTensors that can be written, tied ones under one name."""
    tied = set(model.all_tied_weights_keys or {})
    state = {name: tensor for name, tensor in get_model_state_dict(model).items() if name not in tied}
    return _redistribute_state_dict(state)


def file_numbers(weights: Mapping[str, Tensor], file_bytes: int = FILE_BYTES) -> dict[str, int]:
    """Tensor -> number of its file, from 1: first what belongs to no bank, then one bank after the other."""
    groups: dict[str, list[str]] = {"": []}
    for name in weights:
        match = BANK.search(name)
        groups.setdefault(match[1] if match else "", []).append(name)
    numbers, number = {}, 0
    for group in sorted(groups):
        size = file_bytes + 1
        for name in groups[group]:
            new = weights[name].numel() * weights[name].element_size()
            # A group always begins a file.
            number, size = (number + 1, new) if size + new > file_bytes else (number, size + new)
            numbers[name] = number
    return numbers


def files_of_bank(folder: Path, bank: str) -> list[str]:
    """The files that hold a bank and nothing else, as a spread run writes them.

    Raises:
        ValueError: no tensor belongs to the bank, naming the banks that are there; or a file holds more than it.
    """
    places = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
    banks = {name: match[1] if (match := BANK.search(name)) else "" for name in places}
    files = sorted({places[name] for name in places if banks[name] == bank})
    if not files or not bank:
        raise ValueError(f"{folder} holds no bank {bank!r}, it has {', '.join(sorted({*banks.values()} - {''}))}")
    if mixed := sorted({name for name in places if places[name] in files and banks[name] != bank}):
        raise ValueError(f"{folder}: {places[mixed[0]]} holds {mixed[0]} beside bank {bank!r}")
    return files


@contextlib.contextmanager
def named_failures() -> Iterator[None]:
    """What torch raises on all ranks when one fails is no Exception, and does not say which."""
    try:
        yield
    except dcp.CheckpointException as error:
        said = [f"rank {rank}: {type(failure).__name__}: {failure}" for rank, (failure, _) in error.failures.items()]
        raise OSError(f"a checkpoint could not be read or written by {'; '.join(said)}") from error


def weights_writer(folder: Path, numbers: dict[str, int]) -> HuggingFaceStorageWriter:
    return HuggingFaceStorageWriter(str(folder / PIECES), numbers, save_distributed=True)


def save_weights(weights: dict[str, Tensor], folder: Path) -> None:
    """Write `model-*.safetensors` and their index. Every rank must call it."""
    numbers = file_numbers(weights)
    with named_failures():
        dcp.save(weights, storage_writer=weights_writer(folder, numbers))
    join_pieces(folder, numbers)


def join_pieces(folder: Path, numbers: dict[str, int], group: dist.ProcessGroup | None = None) -> None:
    """Make ordinary files of the pieces of all ranks. Every rank must call it, and joins some of the files."""
    pieces = folder / PIECES
    dist.barrier(group)
    consolidate_safetensors_files_on_every_rank(str(pieces), str(folder), numbers, process_group=group)
    dist.barrier(group)
    if dist.get_rank() == 0:
        last = max(numbers.values())
        places = {name: f"model-{number:05}-of-{last:05}.safetensors" for name, number in numbers.items()}
        size = sum((folder / file).stat().st_size for file in set(places.values()))
        index = {"metadata": {"total_size": size}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(pieces)


def save_settings(model: PreTrainedModel, folder: Path) -> None:
    """Write what `from_pretrained` reads beside the weights; by one rank."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    # How this run is spread is no property of the model.
    vars(config).pop("distributed_config", None)
    config.save_pretrained(folder)
    drop_absent_code(folder / CONFIG_NAME)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def load_weights(model: PreTrainedModel, folder: Path) -> None:
    """Fill a spread model from `model*.safetensors` of any number of processes. Every rank must call it."""
    state = weights_of(model)
    with named_failures():
        dcp.load(state, storage_reader=HuggingFaceStorageReader(str(folder)))
    held = get_model_state_dict(model)
    state = _redistribute_state_dict(state, {name: held[name] for name in state})
    # Not strict: of tied tensors one is enough.
    set_model_state_dict(model, state, options=StateDictOptions(strict=False))


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Its tensors by name, as they can be written, and its numbers."""
    with no_empty_groups(optimizer):
        state = get_optimizer_state_dict(model, optimizer, options=FLAT)
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    numbers = {name: value for name, value in state.items() if not isinstance(value, Tensor)}
    return _redistribute_state_dict(tensors), numbers


def optimizer_writer(folder: Path) -> HuggingFaceStorageWriter:
    return HuggingFaceStorageWriter(str(folder / OPTIMIZER), save_distributed=True)


def save_optimizer(tensors: dict[str, Tensor], numbers: Mapping[str, Any], folder: Path) -> None:
    """Write an optimizer's state. Every rank must call it."""
    with named_failures():
        dcp.save(tensors, storage_writer=optimizer_writer(folder))
    write_numbers(numbers, folder)


def write_numbers(numbers: Mapping[str, Any], folder: Path) -> None:
    if dist.get_rank() == 0:
        (folder / OPTIMIZER / NUMBERS).write_text(json.dumps(numbers) + "\n", encoding="utf-8")


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Fill an optimizer on any layout, one process included. Every rank must call it."""
    tensors, numbers = optimizer_state(model, optimizer)
    with no_empty_groups(optimizer):
        before = get_optimizer_state_dict(model, optimizer, options=FLAT)
    reader = HuggingFaceStorageReader(str(folder / OPTIMIZER))
    with named_failures():
        dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    saved = json.loads((folder / OPTIMIZER / NUMBERS).read_text(encoding="utf-8"))
    saved = {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
    state = _redistribute_state_dict(tensors, {name: before[name] for name in tensors})
    with no_empty_groups(optimizer):
        set_optimizer_state_dict(model, optimizer, {**numbers, **saved, **state}, options=FLAT)


@contextlib.contextmanager
def no_empty_groups(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Without the groups that hold no parameter, which torch cannot name: an adapter has no norms without decay."""
    empty = [(place, group) for place, group in enumerate(optimizer.param_groups) if not group["params"]]
    optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
    yield
    for place, group in empty:
        optimizer.param_groups.insert(place, group)


def load_adapter(model: PeftModel, folder: Path) -> None:
    """Fill a spread adapter from its file. Every rank must call it."""
    saved, own = load_file(folder / "adapter_model.safetensors"), model.state_dict()
    # PEFT has names of its own in the file, and gathers what it is asked for: numbers tell which tensor gets which.
    names, numbers = list(own), {name: torch.tensor(place) for place, name in enumerate(own)}
    with torch.no_grad():
        for name, number in get_peft_model_state_dict(model, state_dict=numbers).items():
            tensor, value = own[names[int(number)]], saved[name]
            if isinstance(tensor, DTensor):
                value = distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements)
            tensor.copy_(value)
