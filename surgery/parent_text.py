"""Text models that Chorus can start from: their configuration, and where each tensor of the decoder comes from.

Unusual here: one mapping serves every family. A family differs from Llama only in the few settings of `FAMILIES`; all
else is read from the parent's own configuration, where transformers gives the same thing the same name.
"""

import re
from difflib import get_close_matches
from typing import Any

from chorus_moe.surgery.parent_checkpoint import ParentCheckpoint

ALL_HEADS = {"use_qk_norm": True, "qk_norm_scope": "projection"}
# model type -> what transformers writes into the model's code instead of its configuration.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "ministral": {},
    # Qwen2 has biases on query, key and value and none on the output.
    "qwen2": {"attention_bias": True, "attention_output_bias": False},
    "qwen3": {"use_qk_norm": True},
    "smollm3": {},
    "olmo2": ALL_HEADS | {"norm_placement": "post"},
    "mixtral": {},
    "qwen3_moe": {"use_qk_norm": True},
    "olmoe": ALL_HEADS,
}
# Why a known family is refused: said in the error, so that users need not find out.
DIFFERENCES = {
    "gpt2": "learned positions, LayerNorm and a plain feed-forward",
    "gpt_neox": "LayerNorm and attention beside the feed-forward",
    "gemma": "embeddings times sqrt(hidden_size) and norm weights that count from one",
    "gemma2": "embeddings times sqrt(hidden_size), norm weights that count from one and capped logits",
    "gemma3_text": "embeddings times sqrt(hidden_size) and norm weights that count from one",
    "phi3": "one tensor for query, key and value, and one for gate and up",
    "cohere": "LayerNorm, attention beside the feed-forward and scaled logits",
    "granite": "scaled embeddings, residuals and logits",
    "deepseek_v3": "latent attention",
    "gpt_oss": "attention sinks and experts of another form",
}
# Fields that have the same name and meaning in the parent.
SAME = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "rope_parameters"),
    *("attention_bias", "attention_dropout", "mlp_bias", "no_rope_layers", "layer_types", "sliding_window"),
    *("tie_word_embeddings", "bos_token_id", "eos_token_id", "use_cache"),
)
DECODER = "model.language_model."
# Below a layer: in the decoder, in a parent whose norms stand behind.
NORMS_BEHIND = {
    "attention_output_norm": "post_attention_layernorm",
    "feed_forward_output_norm": "post_feedforward_layernorm",
}
MODALITY_PROJECTION = re.compile(r"(self_attn\.[qkv]_proj)\.(?:text|image|audio)\.")
NOT_WEIGHTS = re.compile(r"rotary_emb\.inv_freq$")  # a table that old checkpoints store


class ParentText:
    """A causal language model as the origin of the decoder.

    Args:
        checkpoint: with the parent's tensors under the names that transformers saves.

    Raises:
        ValueError: a model type or an option that the decoder does not have, naming it.
    """

    def __init__(self, checkpoint: ParentCheckpoint):
        self.checkpoint = checkpoint
        self.config: Any = checkpoint.config
        self._check_supported()

    def __str__(self) -> str:
        return str(self.checkpoint)

    @property
    def num_experts(self) -> int:
        """Experts in a sparse layer of the parent; 0 for a dense model."""
        # Mixtral's configuration has its own name for it.
        if self.config.model_type == "mixtral":
            return self.config.num_local_experts
        return getattr(self.config, "num_experts", None) or 0

    @property
    def expert_size(self) -> int:
        """Width of the parent's feed-forward, or of one expert of a mixture model."""
        moe_size = getattr(self.config, "moe_intermediate_size", None)
        return moe_size if self.num_experts and moe_size is not None else self.config.intermediate_size

    @property
    def sparse_layers(self) -> list[int]:
        """Layers of the parent that hold experts."""
        if not self.num_experts:
            return []
        step = getattr(self.config, "decoder_sparse_step", 1)
        dense = getattr(self.config, "mlp_only_layers", None) or []
        # The rule of Qwen3-MoE's own code; Mixtral and OLMoE have neither field, so all their layers are sparse.
        return [i for i in range(self.config.num_hidden_layers) if i not in dense and (i + 1) % step == 0]

    @property
    def norm_topk_prob(self) -> bool:
        """Whether the weights of a token's experts sum to one."""
        return bool(getattr(self.config, "norm_topk_prob", True))

    def settings(self) -> dict[str, Any]:
        """Fields of [`ChorusTextConfig`] that the parent decides; not the vocabulary, and nothing about banks."""
        values = {name: value for name in SAME if (value := getattr(self.config, name, None)) is not None}
        # One setting for all four projections in most parents; `FAMILIES` corrects those that differ.
        values["attention_output_bias"] = values.get("attention_bias", False)
        values |= FAMILIES[self.config.model_type]
        # Some checkpoints write -1 for "none".
        if self.config.pad_token_id is not None and self.config.pad_token_id >= 0:
            values["pad_token_id"] = self.config.pad_token_id
        # Old configurations (Mistral) have a window and no list: there every layer slides.
        if "layer_types" not in values and "sliding_window" in values:
            values["layer_types"] = ["sliding_attention"] * self.config.num_hidden_layers
        if self.num_experts:
            # A mixture parent was balanced with this weight, so its experts go on with it.
            values["router_aux_loss_coef"] = self.config.router_aux_loss_coef
        return values

    def source(self, name: str) -> str:
        """The parent's tensor behind a tensor of a generative model, outside of banks: `lm_head.weight`, or a name
        below `model.language_model.`. Projections by modality all come from the parent's only one."""
        name = MODALITY_PROJECTION.sub(r"\1.", name.replace(DECODER, "model.", 1))
        for ours, theirs in NORMS_BEHIND.items():
            name = name.replace(f".{ours}.", f".{theirs}.")
        return name

    def dense_weights(self, layer: int) -> tuple[str, str, str]:
        """Names of the gate, up and down projections of a dense feed-forward."""
        gate, up, down = (f"model.layers.{layer}.mlp.{name}_proj.weight" for name in ("gate", "up", "down"))
        return gate, up, down

    def expert_weights(self, layer: int, expert: int) -> tuple[str, str, str]:
        """Names of the gate, up and down projections of one expert of a mixture model."""
        is_mixtral = self.config.model_type == "mixtral"
        # Mixtral's names: w1 is the gate, w3 the up and w2 the down projection.
        names = ("w1", "w3", "w2") if is_mixtral else ("gate_proj", "up_proj", "down_proj")
        gate, up, down = (f"{self._mixture(layer)}.experts.{expert}.{name}.weight" for name in names)
        return gate, up, down

    def router_weight(self, layer: int) -> str:
        return f"{self._mixture(layer)}.gate.weight"

    def _mixture(self, layer: int) -> str:
        block = "block_sparse_moe" if self.config.model_type == "mixtral" else "mlp"
        return f"model.layers.{layer}.{block}"

    def check_tensors(self, used: dict[str, tuple[int, ...]]) -> None:
        """Nothing may be missing, of another shape, or left over, before any work is done.

        Args:
            used: name -> shape of every tensor that will be read.

        Raises:
            ValueError: naming the first tensor that does not fit.
        """
        for name, shape in used.items():
            if self.checkpoint.shape(name) != shape:
                raise ValueError(f"{self}: tensor {name!r} is {self.checkpoint.shape(name)}, expected {shape}")
            # Called for its error: a dtype such as int8 means a quantised file.
            self.checkpoint.dtype(name)
        # Some checkpoints store the tied head as well; the embedding is the one that counts.
        ignored = {"lm_head.weight"} if self.config.tie_word_embeddings else set()
        left = [n for n in self.checkpoint.names if n not in used and n not in ignored and not NOT_WEIGHTS.search(n)]
        if left:
            raise ValueError(
                f"{self}: {len(left)} tensors have no place in the decoder, such as {left[0]!r}; "
                f"the checkpoint is not an ordinary {self.config.model_type!r} model"
            )

    def _check_supported(self) -> None:
        model_type = self.config.model_type
        if model_type not in FAMILIES:
            known = DIFFERENCES.get(model_type)
            hint = get_close_matches(model_type, FAMILIES, n=1)
            differs = f" ({known})" if known else f"; the nearest is {hint[0]!r}" if hint else ""
            raise ValueError(
                f"{self}: a decoder cannot be made of model_type={model_type!r}{differs}. Supported are "
                f"{list(FAMILIES)}"
            )
        if getattr(self.config, "clip_qkv", None) is not None:
            raise ValueError(f"{self}: clip_qkv={self.config.clip_qkv} is not supported; the decoder does not clip")
        rope = self.config.rope_parameters or {}
        if rope.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise ValueError(
                f"{self}: partial_rotary_factor={rope['partial_rotary_factor']} is not supported; the decoder rotates "
                "whole heads"
            )
