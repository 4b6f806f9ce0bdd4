"""One bank in a file, to share it without the whole model.

Unusual here:
- the file holds the hash of the bank's base: all other weights of the model, encoders and head included. A bank is
  meaningful only on the weights it was trained on;
- closed banks do not count as base, because the model does not compute them. To join banks that were trained separately
  on one base, load them one by one and close each before the next;
- the file is safetensors, read tensor by tensor; nothing is unpickled.

Shape suffixes: N banks of the gate, D hidden size.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.utils import logging

from chorus_moe.modeling.configuration_banks import ExpertBankConfig, check_name, read_expert_banks
from chorus_moe.modeling.modeling_base import ChorusPreTrainedModel, make_readable
from chorus_moe.modeling.moe_banks import BankGate, ExpertBank
from chorus_moe.surgery.banks import place_bank
from chorus_moe.surgery.parts import bank_tensor, decoder_of
from chorus_moe.surgery.report import OperationReport, count_parameters, refuse_adapters

logger = logging.get_logger(__name__)

FORMAT, VERSION = "chorus_bank", "1"
GATE = "mlp.bank_gate.weight"


def save_bank(model: ChorusPreTrainedModel, name: str, path: str | os.PathLike[str]) -> OperationReport:
    """Write one bank to a small safetensors file, with its configuration and the hash of its base.

    Raises:
        ValueError: adapters are active, or an unknown bank.
    """
    refuse_adapters(model, "save_bank")
    decoder, total = decoder_of(model), count_parameters(model)
    check_name("save_bank", "bank", name, decoder.banks)
    bank = decoder.banks[name]
    # safetensors writes contiguous tensors only.
    tensors = {key: value.detach().cpu().contiguous() for key, value in _bank_tensors(decoder, bank).items()}
    # The hash does not depend on the bank itself, so it may be trained further and saved again on the same base.
    found = base_hash(model, name)
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "name": name,
        # Metadata of safetensors are strings only; sorted keys give equal banks equal files.
        "config": json.dumps(bank.to_dict(), sort_keys=True),
        "base_sha256": found,
    }
    save_file(tensors, path, metadata=metadata)
    make_readable(Path(path))
    size = sum(tensor.numel() for tensor in tensors.values())
    return OperationReport(
        operation="save_bank",
        subject=name,
        parameters_before=total,
        parameters_after=total,
        notes=[f"{size:,} numbers, {Path(path).stat().st_size:,} bytes", f"base sha256 {found}"],
    )


def load_bank(model: ChorusPreTrainedModel, path: str | os.PathLike[str], strict_base: bool = True) -> OperationReport:
    """Add the bank of a file, or replace the bank of that name.

    Args:
        strict_base: refuse a bank that was trained on top of other weights; with False it is only a warning.

    Raises:
        ValueError: adapters are active, `save_bank` did not write the file, a tensor has another shape (the message
            names both), holds whole numbers or a value that is not finite, or the base differs (the message names
            both hashes). The model is unchanged then.
    """
    refuse_adapters(model, "load_bank")
    decoder, before = decoder_of(model), count_parameters(model)
    bank, wanted, tensors = _read(path)
    # Shapes come before the hash: they are cheap, and with `strict_base=False` they are all that guards the model.
    _check_fit(decoder, bank, tensors)
    found, notes = base_hash(model, bank.name), []
    if found != wanted:
        fault = f"load_bank: bank {bank.name!r} was trained on top of sha256 {wanted}, this model has {found} below it"
        if strict_base:
            raise ValueError(f"{fault}; load it on its own base, or with strict_base=False")
        logger.warning(fault)
        notes.append(fault)
    # Nothing below this line may fail: every check is done, and the model changes now.
    changes = place_bank(decoder, bank)
    _fill(decoder, bank, tensors)
    return OperationReport(
        operation="load_bank",
        subject=bank.name,
        parameters_before=before,
        parameters_after=count_parameters(model),
        experts={bank.name: changes},
        notes=notes,
    )


def base_hash(model: nn.Module, bank: str) -> str:
    """SHA-256, in hexadecimal, of the base of a bank.

    Covers names, dtypes, shapes and bytes of all saved weights and buffers, head and encoders included, sorted by name.
    Leaves out the bank itself, closed banks, and the rows of both in the gates over banks. The hash does not depend on
    the device, and saving and loading keep it; another dtype changes it.
    """
    decoder, digest = decoder_of(model), hashlib.sha256()
    # Closed banks compute nothing here, so two banks trained apart on one base can be joined one after the other.
    left_out = {bank} | {found.name for found in decoder.banks.values() if found.closed}
    # The prefix depends on the head and on wrappers around the decoder; names in the state dictionary carry it.
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    # A gate over banks has one row for each bank. Only the rows of banks that stay in the base are hashed.
    columns = {
        ".".join(filter(None, (prefix, "layers", str(layer), GATE))): [
            column for column, found in enumerate(mlp.bank_gate.banks) if found.name not in left_out
        ]
        for layer, mlp in _sparse_layers(decoder)
    }
    # By name: the order of modules must not matter, since operations may insert modules at another place.
    for name, tensor in sorted(model.state_dict().items()):
        place = bank_tensor(name)
        if place is not None and place.bank in left_out:
            continue
        add_to_hash(digest, name, tensor[columns[name]] if name in columns else tensor)
    return digest.hexdigest()


def add_to_hash(digest: "hashlib._Hash", name: str, tensor: Tensor) -> None:
    """Let a hash know a tensor, with its name."""
    # Name, dtype and shape first: the same bytes under another name or in another shape are another base.
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    # numpy has no bfloat16, so the hash reads bytes.
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _sparse_layers(decoder: Any) -> Iterator[tuple[int, Any]]:
    for layer in decoder.config.sparse_layers:
        yield layer, decoder.layers[layer].mlp


def _bank_tensors(decoder: Any, bank: ExpertBankConfig) -> dict[str, Tensor]:
    """The bank's weights and buffers, and its row `(D,)` of the gates, by their names in the decoder."""
    tensors: dict[str, Tensor] = {}
    for layer in bank.layers_among(decoder.config.sparse_layers):
        mlp = decoder.layers[layer].mlp
        tensors |= {
            f"layers.{layer}.mlp.banks.{bank.name}.{key}": value
            for key, value in mlp.banks[bank.name].state_dict().items()
        }
        # A bank with its own gate has no row in the shared one, and a gate over a single bank has no weight at all.
        if mlp.bank_gate.weight is not None and not bank.has_own_gate:
            column = [found.name for found in mlp.bank_gate.banks].index(bank.name)
            tensors[f"layers.{layer}.{GATE}"] = mlp.bank_gate.weight[column]
    return tensors


def _read(path: str | os.PathLike[str]) -> tuple[ExpertBankConfig, str, dict[str, Tensor]]:
    """Configuration, hash of the base and tensors of a file.

    Raises:
        ValueError: it was not written by `save_bank`, or by a later version of it.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  no mapping
    except SafetensorError as error:
        raise ValueError(f"load_bank: {os.fspath(path)!r} is no safetensors file: {error}") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"load_bank: {os.fspath(path)!r} was not written by `save_bank`: format={metadata.get('format')!r}, "
            f"expected {FORMAT!r}"
        )
    if metadata.get("version") != VERSION:
        raise ValueError(
            f"load_bank: {os.fspath(path)!r} has version {metadata.get('version')!r}, this one reads {VERSION!r}"
        )
    try:
        # The file comes from somewhere else: its configuration passes the checks that `config.json` passes.
        (bank,) = read_expert_banks({metadata["name"]: json.loads(metadata["config"])}, {})
        return bank, metadata["base_sha256"], tensors
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"load_bank: {os.fspath(path)!r} has unreadable metadata about its bank: {error}") from error


def _check_fit(decoder: Any, bank: ExpertBankConfig, tensors: dict[str, Tensor]) -> None:
    """Refuse a bank that does not fit this model.

    Raises:
        ValueError: naming the bank's setting, a missing or unexpected tensor, one of another shape, with both sides, or
            one that holds no finite floating-point numbers.
    """
    config, old = decoder.config, decoder.banks.get(bank.name)
    expected: dict[str, torch.Size] = {}
    sparse = config.sparse_layers
    bank.validate(sparse, config.modalities)
    layers = bank.layers_among(sparse)
    # A bank that is replaced must stand at the same places: otherwise old layers of it would stay behind.
    if old is not None and (old.gate, old.layers_among(sparse)) != (bank.gate, layers):
        raise ValueError(
            f"load_bank: bank {bank.name!r} has gate={bank.gate!r} and layers {layers} in the file, "
            f"gate={old.gate!r} and layers {old.layers_among(sparse)} in the model"
        )
    for layer in layers:
        # Built only for the names and shapes of its tensors; the meta device allocates nothing.
        with torch.device("meta"):
            built = ExpertBank(config, bank.of_layer(layer, sparse))
        expected |= {f"layers.{layer}.mlp.banks.{bank.name}.{key}": t.shape for key, t in built.state_dict().items()}
        if bank.has_own_gate:
            continue
        gate = decoder.layers[layer].mlp.bank_gate
        others = [found.name for found in gate.banks if found.name != bank.name]
        # With one bank the gate is a constant. A second bank needs a row for the first one, and no such row exists.
        if len(others) == 1 and gate.weight is None:
            raise ValueError(f"load_bank: the gate of layer {layer} has no row for {others[0]!r}, the only bank there")
        # Alone in its layer the bank needs no row: that gate has no weight.
        if others:
            expected[f"layers.{layer}.{GATE}"] = torch.Size([config.hidden_size])
    for name in sorted(expected.keys() | tensors.keys()):
        wanted, found = (tuple(t) if t is not None else None for t in (expected.get(name), _shape(tensors.get(name))))
        if wanted != found:
            raise ValueError(f"load_bank: {name} has shape {found} in the file, this model needs {wanted}")
    for name, tensor in sorted(tensors.items()):
        # Copying casts any dtype: weights below 1 would all become 0 as whole numbers, without an error.
        if not tensor.is_floating_point():
            raise ValueError(f"load_bank: {name} is {tensor.dtype} in the file, weights are floating-point numbers")
        # In float32, since the CPU has no such test for the 8-bit types.
        if bad := tensor.numel() - int(tensor.float().isfinite().sum()):
            raise ValueError(f"load_bank: {name} holds {bad} of {tensor.numel()} values that are not finite")


def _shape(tensor: Tensor | None) -> torch.Size | None:
    return None if tensor is None else tensor.shape


@torch.no_grad()
def _fill(decoder: Any, bank: ExpertBankConfig, tensors: dict[str, Tensor]) -> None:
    """The file's numbers, into a bank that has its place already; gates over banks get its row."""
    config = decoder.config
    for layer in bank.layers_among(config.sparse_layers):
        mlp, prefix = decoder.layers[layer].mlp, f"layers.{layer}.mlp.banks.{bank.name}."
        states = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        mlp.banks[bank.name].load_state_dict(states)
        if bank.has_own_gate:
            continue
        old = mlp.bank_gate
        # A gate's number of rows is fixed when it is built, so a new one is built and the old rows are copied.
        gate = BankGate(config.hidden_size, [found for found in config.banks_of_layer(layer) if not found.has_own_gate])
        if gate.weight is not None:
            names = [found.name for found in old.banks]
            rows = {} if old.weight is None else dict(zip(names, old.weight.unbind(0), strict=True))
            rows[bank.name] = tensors[f"layers.{layer}.{GATE}"].to(decoder.norm.weight)
            # In the order of the new gate: banks are sorted by name, so the loaded bank may stand between old ones.
            gate.weight.copy_(torch.stack([rows[found.name].to(rows[bank.name]) for found in gate.banks]))
            # A gate that was frozen stays frozen.
            gate.weight.requires_grad_(old.weight is None or old.weight.requires_grad)
        # The device is that of the bank in this layer: a model may be spread over several.
        mlp.bank_gate = gate.to(mlp.banks[bank.name].experts.down_proj.device, decoder.norm.weight.dtype)
