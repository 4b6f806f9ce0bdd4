"""Small text models of every family that Chorus can start from, saved to folders."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from chorus_moe.modeling.configuration_towers import ChorusAudioConfig, ChorusVisionConfig
from tests.conftest import tiny_config

VOCABULARY = 96
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
ALTERNATING = ["sliding_attention", "full_attention"] * 2
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
# name -> model type and settings.
PARENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied, biased": ("llama", {"tie_word_embeddings": True, "attention_bias": True}),
    "llama wide heads": ("llama", {"head_dim": 16, "hidden_act": "gelu"}),
    "llama rope llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama rope yarn": ("llama", {"rope_parameters": YARN}),
    "mistral": ("mistral", {"sliding_window": 5}),
    "mistral full": ("mistral", {"sliding_window": None}),
    "ministral": (
        "ministral",
        {"head_dim": 8, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 sliding": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "smollm3": ("smollm3", {}),
    "olmo2": ("olmo2", {}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5}),
    "qwen3_moe": ("qwen3_moe", EXPERTS | {"moe_intermediate_size": 24, "mlp_only_layers": [1], "head_dim": 16}),
    "qwen3_moe normalised": ("qwen3_moe", EXPERTS | {"moe_intermediate_size": 24, "norm_topk_prob": True}),
    "olmoe": ("olmoe", EXPERTS),
}
MIXTURES = [name for name, (model_type, _) in PARENTS.items() if model_type in ("mixtral", "qwen3_moe", "olmoe")]


def make_parent(model_type: str = "llama", dtype: torch.dtype = torch.float32, **settings: Any) -> PreTrainedModel:
    """A model away from its start: norms of one, biases of zero and small logits would hide faults."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SIZES | settings), dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0).add_(torch.randn_like(parameter), alpha=0.05)
    return model


def save_parent(folder: Path, model_type: str = "llama", **settings: Any) -> PreTrainedModel:
    parent = make_parent(model_type, **settings)
    parent.save_pretrained(folder)
    return parent


def tiny_towers() -> tuple[ChorusVisionConfig, ChorusAudioConfig]:
    config = tiny_config()
    return config.vision_config, config.audio_config  # type: ignore[return-value]


def prompts() -> dict[str, torch.Tensor]:
    """Two samples, one of them padded on the left."""
    input_ids = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
    attention_mask = torch.ones_like(input_ids)
    input_ids[1, :4], attention_mask[1, :4] = 0, 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


@torch.no_grad()
def text_difference(model: Any, parent: Any) -> float:
    """Largest difference of the logits of real tokens over the parent's vocabulary."""
    batch = prompts()
    real = batch["attention_mask"].bool()
    found, expected = model(**batch).logits[real][:, :VOCABULARY], parent(**batch).logits[real]
    return (found - expected).abs().max().item()
