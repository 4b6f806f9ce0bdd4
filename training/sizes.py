"""What a model takes, before any of it is allocated: bytes on disk, and memory to load it and to train it.

Weights, gradients and AdamW's two moments are counted, activations are not: those depend on the batch.
"""

import copy
import warnings
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from chorus_moe.modeling.configuration_chorus import ChorusConfig
from chorus_moe.modeling.modeling_generation import ChorusForConditionalGeneration
from chorus_moe.training.lora import lora_config

# Weight, gradient, and two moments.
COPIES = 4
# NF4 with double quantisation: 4 bits, and 0.127 for constants (arXiv 2305.14314, section 3).
FOUR_BITS = 4.127 / 8
DTYPES = ("float32", "bfloat16")
RANK = 8


@dataclass(frozen=True)
class Size:
    """Bytes of a model in one kind of number; None where there is no such thing.

    Args:
        disk: its safetensors files.
        load: its weights in memory.
        lora: to train a LoRA of rank 8 on all banks and cross-modal layers, in float32, above frozen weights.
        whole: to train all weights in this kind of number.
    """

    disk: int | None
    load: int
    lora: int
    whole: int | None


@dataclass(frozen=True)
class SizeReport:
    """Sizes by kind of number.

    Args:
        parameters: of the model.
        lora_parameters: of the LoRA that `Size.lora` is about.
        four_bit_share: of the parameters that a 4-bit loader reaches: linear layers; stacked experts it leaves as they
            are, see `unfuse_experts`.
        sizes: "float32", "bfloat16" and "4-bit" -> bytes.
    """

    parameters: int
    lora_parameters: int
    four_bit_share: float
    sizes: dict[str, Size]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        heads = ("on disk", "to load", f"LoRA r={RANK}", "to train whole")
        lines = [f"{'without activations':<24}" + "".join(f"{head:>16}" for head in heads)]
        for name, size in self.sizes.items():
            values = (size.disk, size.load, size.lora, size.whole)
            lines.append(f"{name:<24}" + "".join(f"{'-' if v is None else readable(v):>16}" for v in values))
        reached = f"4 bits reach {self.four_bit_share:.0%} of the parameters"
        return "\n".join([*lines, reached + ("" if self.four_bit_share > 0.5 else ": stacked experts stay in 16 bits")])


def size_report(model: ChorusConfig | ChorusForConditionalGeneration) -> SizeReport:
    """The sizes of a generative model, or of the one that a configuration describes; nothing is allocated for it."""
    given = model if isinstance(model, ChorusConfig) else model.config
    with torch.device("meta"):
        built = ChorusForConditionalGeneration(copy.deepcopy(given))
    total = sum(parameter.numel() for parameter in built.parameters())
    head = built.get_output_embeddings()
    in_four_bits = sum(
        module.weight.numel() for module in built.modules() if isinstance(module, nn.Linear) and module is not head
    )
    adapted = with_lora(built)
    lora = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    trained = COPIES * lora * torch.float32.itemsize
    sizes = {}
    for name in DTYPES:
        weights = total * getattr(torch, name).itemsize
        sizes[name] = Size(disk=weights, load=weights, lora=weights + trained, whole=COPIES * weights)
    # What is not quantised is loaded in bfloat16, see `readiness.four_bits`.
    weights = round(in_four_bits * FOUR_BITS + (total - in_four_bits) * torch.bfloat16.itemsize)
    sizes["4-bit"] = Size(disk=None, load=weights, lora=weights + trained, whole=None)
    return SizeReport(total, lora, in_four_bits / total, sizes)


def with_lora(built: ChorusForConditionalGeneration) -> PeftModel:
    """A model with the LoRA that `Size.lora` is about, which is where the model is."""
    text = built.config.text_config
    banks, cross_modal = "all" if text.sparse_layers else (), bool(text.cross_modal_layers)
    # A dense model without media has neither.
    attention = not (banks or cross_modal)
    config = lora_config(built, banks=banks, cross_modal=cross_modal, attention=attention, r=RANK, verbose=False)
    with warnings.catch_warnings():
        # PEFT asks transformers by a name that is about to change.
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(built, config, low_cpu_mem_usage=built.device.type == "meta")  # type: ignore[arg-type]


def readable(count: int) -> str:
    """Bytes in powers of 1,000, as disks and the Hub count them: 1234567890 -> "1.2 GB"."""
    value, units = float(count), ("bytes", "kB", "MB", "GB", "TB")
    for unit in units:
        if value < 999.5 or unit == units[-1]:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError("the last unit has returned")
