"""A LoRA on stacked experts as one on linear experts, and back, number for number.

PEFT stores a LoRA of rank r on `gate_up_proj (E, 2I, D)` as `lora_A (E * r, D)`, experts slowest, and
`lora_B (2I, r * E)`, experts **fastest** (`peft.tuners.lora.layer.ParamWrapper`, 0.21); on linear experts every one has
its own pair. The first product's two halves share a `lora_A` when stacked and have one each when linear, so what was
trained on linear experts can be stacked only while the two are equal.

Unusual here: gate-up and down are told apart by their shapes, since the order in which PEFT nests them is not stored.

Shape suffixes: E experts, R rank, D hidden size, I expert width.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.hotswap import hotswap_adapter
from peft.utils.save_and_load import load_peft_weights
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from chorus_moe.modeling.modeling_base import make_readable
from chorus_moe.surgery.parts import decoder_of
from chorus_moe.training.lora import full_path_regex

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
EXPERTS = r"(?:experts|deeper_experts\.\d+)"
STACKED = re.compile(rf"(.*\.layers\.(\d+)\.mlp\.banks\.(\w+)\.{EXPERTS})\.((?:base_layer\.)?)lora_A\.weight")
LINEAR = re.compile(rf"(.*\.layers\.\d+\.mlp\.banks\.\w+\.{EXPERTS})\.(\d+)\.(gate|up|down)_proj\.lora_([AB])\.weight")
Tensors = dict[str, Tensor]


def unfuse_adapter(tensors: Mapping[str, Tensor], model: nn.Module) -> Tensors:
    """The tensors of an adapter for a model after `unfuse_experts(model)`.

    Raises:
        ValueError: a tensor that is no LoRA on the experts of this model (shapes are named).
    """
    result = dict(tensors)
    for name in tensors:
        match = STACKED.fullmatch(name)
        if match is None:
            continue
        prefix, nested = match[1], match[4]
        lora_a, lora_b = result.pop(name), result.pop(f"{prefix}.{nested}lora_B.weight")
        kind, experts = _read_stack(match, lora_a, lora_b, model)
        parts = ("down",) if kind == "down_proj" else ("gate", "up")
        a_ERX = lora_a.view(experts, -1, lora_a.shape[1])
        # Experts vary fastest in `lora_B` and slowest in `lora_A`: the two are cut differently.
        b_EYR = lora_b.view(len(lora_b), -1, experts).permute(2, 0, 1)
        for expert in range(experts):
            for part, b_YR in zip(parts, b_EYR[expert].chunk(len(parts)), strict=True):
                path = f"{prefix}.{expert}.{part}_proj"
                # Gate and up share one `lora_A` when stacked; each gets a copy.
                result[f"{path}.lora_A.weight"] = a_ERX[expert].clone()
                result[f"{path}.lora_B.weight"] = b_YR.contiguous()
    return result


def _read_stack(match: re.Match[str], lora_a: Tensor, lora_b: Tensor, model: nn.Module) -> tuple[str, int]:
    """Which parameter a LoRA is on, and of how many experts."""
    config, layer, name = decoder_of(model).config, int(match[2]), match[3]
    banks = {bank.name: bank for bank in config.banks_of_layer(layer)}
    if name not in banks:
        raise ValueError(f"{match[0]}: layer {layer} of the model holds the banks {sorted(banks)}")
    experts, width, inner = banks[name].num_experts, config.hidden_size, banks[name].intermediate_size
    # PEFT nests the second LoRA in the first and does not store which is which; only the shapes tell.
    kinds = {(width, 2 * inner): "gate_up_proj", (inner, width): "down_proj"}
    shape = (lora_a.shape[1], lora_b.shape[0])
    if shape not in kinds or lora_a.shape[0] % experts or lora_a.shape[0] != lora_b.shape[1]:
        raise ValueError(
            f"{match[0]}: lora_A {tuple(lora_a.shape)} and lora_B {tuple(lora_b.shape)} fit no stack of {experts} "
            f"experts of width {inner} on hidden size {width}"
        )
    return kinds[shape], experts


def fuse_adapter(tensors: Mapping[str, Tensor]) -> Tensors:
    """The tensors of an adapter for a model after `fuse_experts(model)`; undoes `unfuse_adapter`.

    Raises:
        ValueError: gate and up of an expert have different `lora_A`, or not all experts of a bank have a LoRA.
    """
    result: Tensors = {}
    found: dict[str, dict[tuple[str, str], dict[int, Tensor]]] = {}
    for name, tensor in tensors.items():
        match = LINEAR.fullmatch(name)
        if match is None:
            result[name] = tensor
            continue
        prefix, expert, part, side = match.groups()
        found.setdefault(prefix, {}).setdefault((part, side), {})[int(expert)] = tensor
    for prefix, parts in found.items():
        experts = len(next(iter(parts.values())))
        pairs: dict[str, tuple[Tensor, Tensor]] = {}
        stacked = {key: _stack(prefix, key, values, experts) for key, values in parts.items()}
        if ("gate", "A") in stacked or ("up", "A") in stacked:
            gate_a, up_a = stacked.get(("gate", "A")), stacked.get(("up", "A"))
            # Training on linear experts makes the two differ; stacked experts have no place for both.
            if gate_a is None or up_a is None or not torch.equal(gate_a, up_a):
                raise ValueError(
                    f"{prefix}: gate_proj and up_proj have different lora_A, but stacked experts have one for both; "
                    "keep the model linear, or merge the adapter into it before fuse_experts()"
                )
            pairs["gate_up"] = gate_a, torch.cat((stacked["gate", "B"], stacked["up", "B"]), dim=1)
        if ("down", "A") in stacked:
            pairs["down"] = stacked["down", "A"], stacked["down", "B"]
        for part, (a_ERX, b_EYR) in pairs.items():
            # PEFT wraps the parameters in the order of `target_parameters`: gate-up first, so it ends up inside.
            nested = "base_layer." if part == "gate_up" and "down" in pairs else ""
            result[f"{prefix}.{nested}lora_A.weight"] = a_ERX.flatten(0, 1)
            result[f"{prefix}.{nested}lora_B.weight"] = b_EYR.permute(1, 2, 0).flatten(1).contiguous()
    return result


def convert_adapter(
    source: str | os.PathLike[str], target: str | os.PathLike[str], model: nn.Module, layout: str
) -> None:
    """Write a copy of an adapter's folder for experts of another layout.

    Args:
        model: the model below the adapter, in either layout; it is not changed.
        layout: "linear" or "fused".

    Raises:
        ValueError: an unknown layout, patterns of ranks or alphas (they name stacked tensors), or see the functions
            above.
    """
    if layout not in ("linear", "fused"):
        raise ValueError(f"layout={layout!r}; choose 'linear' or 'fused'")
    config: dict[str, Any] = json.loads((Path(source) / CONFIG).read_text(encoding="utf-8"))
    # Left unchanged, they would silently match nothing in the other layout.
    for key in ("rank_pattern", "alpha_pattern"):
        if config.get(key):
            raise ValueError(f"{source}: {key}={config[key]} names tensors of one layout; convert an adapter without")
    with safe_open(Path(source) / WEIGHTS, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  no mapping
    new = unfuse_adapter(tensors, model) if layout == "linear" else fuse_adapter(tensors)
    modules, parameters = _targets(new, model)
    config["target_modules"] = full_path_regex(modules) if modules else []
    config["target_parameters"] = parameters or None
    Path(target).mkdir(parents=True, exist_ok=True)
    (Path(target) / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_file(new, Path(target) / WEIGHTS, metadata={"format": "pt"})
    make_readable(Path(target) / WEIGHTS)


def swap_adapter(model: PeftModel, source: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Put another adapter in the place of one, as `peft.utils.hotswap.hotswap_adapter` does, whatever its rank.

    PEFT puts a smaller tensor in front of zeros. In a LoRA on stacked experts the place of a row says whose it is, so
    all experts but the first would get rows of others, without an error. Here these tensors take the new shape first.

    Raises:
        RuntimeError: the new adapter is on modules that the old one is not on. The model is unchanged then.
    """
    tensors, old = load_peft_weights(os.fspath(source), device="cpu"), []
    for name, module in model.named_modules():
        if not isinstance(module, ParamWrapper) or adapter_name not in module.lora_A:
            continue
        for part in ("lora_A", "lora_B"):
            weight, new = getattr(module, part)[adapter_name].weight, tensors.get(f"{name}.{part}.weight")
            if new is not None and new.shape != weight.shape:
                old.append((weight, weight.data))
                weight.data = weight.new_zeros(new.shape)
    try:
        hotswap_adapter(model, os.fspath(source), adapter_name)
    except Exception:
        for weight, data in old:
            weight.data = data
        raise


def _stack(prefix: str, key: tuple[str, str], values: Mapping[int, Tensor], experts: int) -> Tensor:
    if sorted(values) != list(range(experts)):
        raise ValueError(f"{prefix}: {key[0]}_proj has a LoRA on experts {sorted(values)} of {experts}")
    return torch.stack([values[expert] for expert in range(experts)])


def _targets(tensors: Mapping[str, Tensor], model: nn.Module) -> tuple[list[str], list[str]]:
    """Names below the head of the linear layers, and of the stacked parameters, that have a LoRA; gate-up first, as
    PEFT nests them in the order of this list."""
    modules, parameters = [], []
    for name, tensor in tensors.items():
        path, is_lora, _ = name.partition(".lora_A.")
        path = path.removeprefix("base_model.model.").removeprefix("model.")
        match = STACKED.fullmatch(name)
        if match is not None:
            kind, _ = _read_stack(match, tensor, tensors[name.replace("lora_A", "lora_B")], model)
            parameters.append(f"{path.removesuffix('.base_layer')}.{kind}")
        elif is_lora:
            modules.append(path)
    # Reversed, "gate_up_proj" comes before "down_proj".
    return sorted(modules), sorted(parameters, reverse=True)
