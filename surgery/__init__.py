"""Model surgery: functions that compose, grow, shrink, convert and exchange parts of a model, `f(model, ...)`.

Every operation changes weights and configuration together, so that a saved model loads as it stands, and returns an
[`OperationReport`]. It is refused, before anything is changed, while adapters are active.
"""

if __name__ == "surgery":
    raise ImportError("import chorus_moe.surgery, not surgery: the bare name would load every class twice")

from chorus_moe.surgery.bank_files import load_bank, save_bank
from chorus_moe.surgery.banks import add_bank, add_experts, close_bank, deepen_experts, open_bank
from chorus_moe.surgery.compose_plan import Composed, compose, compose_checkpoint
from chorus_moe.surgery.compose_processor import compose_processor
from chorus_moe.surgery.dense_prune import prune_dense
from chorus_moe.surgery.depth import add_exits, add_skip_gates
from chorus_moe.surgery.experts_layout import export_experts, fuse_experts, unfuse_experts
from chorus_moe.surgery.experts_merge import merge_experts
from chorus_moe.surgery.experts_prune import prune_experts
from chorus_moe.surgery.modalities import add_modality
from chorus_moe.surgery.parameters import ParameterReport, parameter_report
from chorus_moe.surgery.parts import freeze, unfreeze
from chorus_moe.surgery.processor import processor_from_config
from chorus_moe.surgery.quantization import dequantize, quantize
from chorus_moe.surgery.quantization_loading import ChorusQuantizationConfig
from chorus_moe.surgery.quantization_report import BytesReport, bytes_report
from chorus_moe.surgery.report import OperationReport
from chorus_moe.surgery.tokenizer import add_media_tokens, build_tokenizer

__all__ = [
    "BytesReport",
    "ChorusQuantizationConfig",
    "Composed",
    "OperationReport",
    "ParameterReport",
    "add_bank",
    "add_exits",
    "add_experts",
    "add_media_tokens",
    "add_modality",
    "add_skip_gates",
    "build_tokenizer",
    "bytes_report",
    "close_bank",
    "compose",
    "compose_checkpoint",
    "compose_processor",
    "deepen_experts",
    "dequantize",
    "export_experts",
    "freeze",
    "fuse_experts",
    "load_bank",
    "merge_experts",
    "open_bank",
    "parameter_report",
    "processor_from_config",
    "prune_dense",
    "prune_experts",
    "quantize",
    "save_bank",
    "unfreeze",
    "unfuse_experts",
]
