"""The configuration of the decoder: attention, dense layers and sparse layers of expert banks."""

from typing import TYPE_CHECKING, Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .configuration_banks import ExpertBankConfig, LayerBankConfig, check_name, preset_banks, read_expert_banks
from .configuration_checks import (
    MAX_BANKS,
    MAX_LAYERS,
    MAX_POSITIONS,
    MAX_VOCABULARY,
    MAX_WIDTH,
    check_divides,
    check_exit,
    check_range,
    refuse_unknown_keys,
)
from .configuration_modalities import MODALITY_IDS, TEXT, UNNAMED, in_order
from .configuration_parallel import expert_parallel_plan, tensor_parallel_plan

# Those with windows; `hybrid_sliding`, transformers' name for windows beside a running sum, has memory tokens besides.
WINDOW_TYPES = ("sliding_attention", "hybrid_sliding")
LAYER_TYPES = ("full_attention", *WINDOW_TYPES)
QK_NORM_SCOPES = ("head", "projection")
NORM_PLACEMENTS = ("pre", "post")
SKIP_SCOPES = ("feed_forward", "layer")
EXPERT_LAYOUTS = ("fused", "linear")
# Those that compare the text's map of an image with the image's map of the text, and those that a causal model takes.
TWO_MAPS = ("log_odds", "entropy_floor", "pooled")
ALIGNMENTS = (*TWO_MAPS, "contrastive", "maps")


@strict
class ChorusTextConfig(PreTrainedConfig):
    r"""The decoder: attention, dense layers and sparse layers of expert banks.

    Args:
        modalities: whose tokens the decoder takes, `text` among them: they get banks of presets and projections in
            cross-modal layers. Text, image and audio if None; [`ChorusConfig`] names those that it has.
        intermediate_size: width of the feed-forward of `dense` layers.
        head_dim: width of one head; `hidden_size // num_attention_heads` if None.
        attention_bias, attention_output_bias: biases on the query, key and value projections; on the output projection.
        mlp_bias: biases in the feed-forward of `dense` layers.
        use_qk_norm: RMSNorm on queries and keys.
        qk_norm_scope: what a query or key norm covers: a `head` (Qwen3) or all heads, the whole `projection` (OLMo 2).
        norm_placement: norms before attention and feed-forward (`pre`), or after (`post`, OLMo 2, arXiv 2501.00656).
        no_rope_layers: as in SmolLM3, 1 for a layer with rotary positions and 0 for one without; all 1 if None.
        sliding_window: tokens that a layer with windows sees; on either side, if nothing is causal.
        num_global_tokens: learned tokens that every window sees besides: tokens in front of the sequence in a
            bidirectional model, keys and values of each layer with windows in a causal one.
        num_memory_tokens: keys and values that each `hybrid_sliding` layer of a causal model makes of all tokens so
            far, by which what no window reaches can be found again, see `MemoryTokens`.
        layer_types: one of `LAYER_TYPES` for each layer; all full if None.
        mlp_layer_types: `dense` or `sparse` for each layer; the first dense and all others sparse if None.
        cross_modal_layers: layers with cross-modal attention on a shared query projection. If None: the full-attention
            layers of a sliding-window model, otherwise the last layer.
        share_cross_modal_query: one query projection for all modalities; False unties it, for ablation.
        expert_banks: name -> settings, see [`ExpertBankConfig`]; sizes left out come from `num_experts`,
            `num_experts_per_tok` and `moe_intermediate_size`. Or the name of a preset, see `preset_banks`: `uniform`
            (the default) or `specific_then_common`.
        expert_width_shares: leading shares of an expert's width that a token may use, rising to 1. While training each
            token draws one (nested dropout, arXiv 1402.0915; MatFormer, arXiv 2310.07707), elsewhere a call asks for
            one by `expert_width_share`. Always the whole if None.
        experts_layout: `fused`, the experts of a bank stacked in two parameters, or `linear`, a feed-forward of linear
            layers for each; `fuse_experts` and `unfuse_experts` of a model change it.
        shared_expert_intermediate_size: width of the always-on dense experts of a sparse layer; 0 for none.
        router_aux_loss_coef: weight of the balance losses in training, whatever the accumulation steps and ranks.
        router_z_loss_coef: weight of the router z-loss (ST-MoE, arXiv 2202.08906) while training.
        expert_budget_loss_coef: weight, in training, of the squared distance from the `mean_experts` of banks.
        alignment_loss_coef: weight, in training, of aligning text with images and sound in cross-modal attention.
        alignment: what is aligned, one of `ALIGNMENTS`, see `alignment_loss`. If None: `contrastive` in a causal model,
            where no layer computes both directions, otherwise `log_odds`.
        chunk_size_feed_forward: feed-forwards take this many tokens at a time, also in training, where each chunk is
            then computed again in the backward. 0 leaves it to the model: chunks for long inputs, at inference only.
        exit_layers: numbers of layers after which an exit stands, fewer than all. In a classifier each has a head; in a
            generative model they share the final norm and the head (LayerSkip, arXiv 2404.16710).
        exit_loss_coef: weight, while training, of the mean loss of the exits. A classifier wants 1. It makes exits that
            draft well in `generate(assistant_early_exit=...)`.
        skip_layers: layers whose skip gate lets tokens skip; with a `skip_budget`, all but the first if None.
        skip_budget: the share of tokens that training lets skip in these layers, between 0 and 1.
        skip_scope: what a token skips: the `feed_forward`, or the `layer`, which then makes its keys and values alone.
        skip_loss_coef: weight of the squared distance from the budget while training.
        is_causal: False for a bidirectional model (classification, embedding).

    Raises:
        ValueError: a size that cannot be built, naming the field and both numbers.
    """

    model_type = "chorus_text"
    base_config_key = "text_config"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    # What the decoder records as `routing` is asked for by the name that transformers has for it.
    attribute_map = {"output_routing": "output_router_logits"}

    if TYPE_CHECKING:  # what they are once `__post_init__` has filled in what was None
        modalities: list[str]
        num_key_value_heads: int
        head_dim: int
        layer_types: list[str]
        mlp_layer_types: list[str]
        cross_modal_layers: list[int]
        expert_banks: dict[str, dict]
        alignment: str
    else:
        modalities: list[str] | None = None
        num_key_value_heads: int | None = None
        head_dim: int | None = None
        layer_types: list[str] | None = None
        mlp_layer_types: list[str] | None = None
        cross_modal_layers: list[int] | None = None
        expert_banks: dict[str, dict] | str | None = None
        alignment: str | None = None
    vocab_size: int = 32_000
    hidden_size: int = 512
    intermediate_size: int = 1_536
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    hidden_act: str = "silu"
    max_position_embeddings: int = 32_768
    initializer_range: int | float = 0.02
    rms_norm_eps: int | float = 1e-6
    rope_parameters: dict | None = None
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: int | float = 0.0
    use_qk_norm: bool = False
    qk_norm_scope: str = "head"
    norm_placement: str = "pre"
    no_rope_layers: list[int] | None = None
    sliding_window: int | None = None
    num_global_tokens: int = 0
    num_memory_tokens: int = 0
    share_cross_modal_query: bool = True
    num_experts: int = 8
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 512
    shared_expert_intermediate_size: int = 512
    expert_width_shares: list[int | float] | None = None
    experts_layout: str = "fused"
    router_aux_loss_coef: int | float = 0.01
    router_z_loss_coef: int | float = 0.0
    expert_budget_loss_coef: int | float = 1.0
    alignment_loss_coef: int | float = 0.0
    exit_layers: list[int] | None = None
    exit_loss_coef: int | float = 0.0
    skip_layers: list[int] | None = None
    skip_budget: int | float | None = None
    skip_scope: str = "feed_forward"
    skip_loss_coef: int | float = 1.0
    output_router_logits: bool = False
    is_causal: bool = True
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        refuse_unknown_keys(self, kwargs)
        # Not text alone: configurations saved before this field existed built parts for all three.
        names = list(UNNAMED) if self.modalities is None else self.modalities
        for name in names:
            check_name("ChorusTextConfig", "modality", name, MODALITY_IDS)
        # Placeholders, prompts and global tokens are text, whatever else the model takes.
        if TEXT.name not in names:
            raise ValueError(f"ChorusTextConfig: modalities={names} lacks 'text', which every model has")
        self.modalities = in_order(names)
        # Now and not in `validate_sizes`: the defaults below make lists of this length and divide by this number.
        check_range(self, {"num_hidden_layers": (1, MAX_LAYERS), "num_attention_heads": (1, MAX_WIDTH)})
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            check_divides(self, "hidden_size", "num_attention_heads")
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.layer_types is None:
            self.layer_types = ["full_attention"] * self.num_hidden_layers
        if self.mlp_layer_types is None:
            # As in DeepSeekMoE (arXiv 2401.06066): the load of the first layer's experts evens out last.
            self.mlp_layer_types = ["dense"] + ["sparse"] * (self.num_hidden_layers - 1)
        if self.cross_modal_layers is None:
            # Beside windows, only full attention reaches a picture far back in the sequence.
            full = [i for i, kind in enumerate(self.layer_types) if kind == "full_attention"]
            mixed = len(full) < self.num_hidden_layers
            self.cross_modal_layers = full if mixed else [self.num_hidden_layers - 1]
        if self.alignment is None:
            self.alignment = "contrastive" if self.is_causal else "log_odds"
        if self.skip_layers is None and self.skip_budget is not None:
            self.skip_layers = list(range(1, self.num_hidden_layers))
        if self.expert_banks is None or isinstance(self.expert_banks, str):
            self.expert_banks = preset_banks(self.expert_banks or "uniform", self.sparse_layers, self.modalities)
        # Saved with every field, so that a later change of a default leaves saved models as they are.
        if len(self.expert_banks) > MAX_BANKS:
            raise ValueError(f"ChorusTextConfig: {len(self.expert_banks)} expert_banks, at most {MAX_BANKS}")
        self.expert_banks = {bank.name: bank.to_dict() for bank in self.banks}
        super().__post_init__(**kwargs)

    # Class attributes in transformers; which rules match depends on the banks and modalities of this configuration.
    @property
    def base_model_tp_plan(self) -> dict[str, str]:
        return tensor_parallel_plan(self)

    @property
    def base_model_ep_plan(self) -> dict[str, str]:
        return expert_parallel_plan(self)

    @property
    def bank_defaults(self) -> dict[str, Any]:
        """The sizes, and the modalities, of a bank that gives none."""
        return {
            "modalities": self.modalities,
            "num_experts": self.num_experts,
            "num_experts_per_tok": self.num_experts_per_tok,
            "intermediate_size": self.moe_intermediate_size,
        }

    @property
    def banks(self) -> list[ExpertBankConfig]:
        """The expert banks by name; those without a gate of their own are the bank gate's columns in this order."""
        return read_expert_banks(self.expert_banks or {}, self.bank_defaults)

    @property
    def num_tokens_in_front(self) -> int:
        """Global tokens that stand in front of the sequence: those of a bidirectional model."""
        return 0 if self.is_causal else self.num_global_tokens

    @property
    def sparse_layers(self) -> list[int]:
        return [i for i, kind in enumerate(self.mlp_layer_types or []) if kind == "sparse"]

    def banks_of_layer(self, layer_idx: int) -> list[LayerBankConfig]:
        """The banks that live in a sparse layer, each with the number of experts it has there."""
        sparse = self.sparse_layers
        return [bank.of_layer(layer_idx, sparse) for bank in self.banks if layer_idx in bank.layers_among(sparse)]

    def validate_sizes(self) -> None:
        """Part of `@strict` validation: nothing is allocated for sizes that cannot be built."""
        widths = ["hidden_size", "intermediate_size", "head_dim", "moe_intermediate_size"]
        widths += ["num_attention_heads", "num_key_value_heads"]
        may_be_zero = ["num_global_tokens", "num_memory_tokens", "shared_expert_intermediate_size"]
        check_range(self, dict.fromkeys(widths, (1, MAX_WIDTH)) | dict.fromkeys(may_be_zero, (0, MAX_WIDTH)))
        check_range(self, dict.fromkeys(["max_position_embeddings", "sliding_window"], (1, MAX_POSITIONS)))
        check_range(self, {"num_hidden_layers": (1, MAX_LAYERS), "vocab_size": (1, MAX_VOCABULARY)})
        check_range(self, {"chunk_size_feed_forward": (0, MAX_POSITIONS)})
        check_range(self, dict.fromkeys(["pad_token_id", "bos_token_id"], (0, self.vocab_size - 1)))
        for token in self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id or 0]:
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"ChorusTextConfig: eos_token_id={token} is outside 0..{self.vocab_size - 1}")
        check_divides(self, "num_attention_heads", "num_key_value_heads")
        check_name("ChorusTextConfig", "alignment", self.alignment, ALIGNMENTS)
        if self.is_causal and self.alignment in TWO_MAPS and self.alignment_loss_coef > 0:
            raise ValueError(
                f"ChorusTextConfig: alignment={self.alignment!r} compares how text sees an image with how the image "
                "sees the text, and is_causal=True computes one of the two; choose 'contrastive' or is_causal=False"
            )

    def validate_rope(self) -> None:
        """As in transformers, which knows no unknown `rope_type` and raises a KeyError for a key that is missing."""
        rope = self.rope_parameters or {}
        kind, low, high = rope.get("rope_type", "default"), rope.get("low_freq_factor"), rope.get("high_freq_factor")
        check_name("ChorusTextConfig", "rope_type", kind, ["default", *ROPE_INIT_FUNCTIONS])
        if low is not None and high is not None and low >= high:
            raise ValueError(f"ChorusTextConfig: low_freq_factor={low} must be below high_freq_factor={high}")
        try:
            super().validate_rope()
        except KeyError as error:
            raise ValueError(f"ChorusTextConfig: {error.args[0]}") from error

    def validate_layers(self) -> None:
        """Part of `@strict` validation: banks fit the layers they name. transformers has checked the lists' lengths."""
        for kind in self.layer_types:
            check_name("ChorusTextConfig", "layer_types", kind, LAYER_TYPES)
        windows = [kind for kind in WINDOW_TYPES if kind in self.layer_types]
        if windows and self.sliding_window is None:
            raise ValueError(f"ChorusTextConfig: layer_types asks for {windows[0]} but sliding_window is None")
        if (self.num_memory_tokens > 0) != ("hybrid_sliding" in self.layer_types):
            raise ValueError(
                f"ChorusTextConfig: num_memory_tokens={self.num_memory_tokens} and "
                f"{self.layer_types.count('hybrid_sliding')} hybrid_sliding layers in layer_types: one needs the other"
            )
        if self.num_memory_tokens and not self.is_causal:
            raise ValueError(
                f"ChorusTextConfig: num_memory_tokens={self.num_memory_tokens} with is_causal=False, where "
                "num_global_tokens carry what windows cannot reach"
            )
        check_name("ChorusTextConfig", "hidden_act", self.hidden_act, ACT2FN)
        check_name("ChorusTextConfig", "qk_norm_scope", self.qk_norm_scope, QK_NORM_SCOPES)
        check_name("ChorusTextConfig", "norm_placement", self.norm_placement, NORM_PLACEMENTS)
        if self.no_rope_layers is not None and len(self.no_rope_layers) != self.num_hidden_layers:
            raise ValueError(
                f"ChorusTextConfig: no_rope_layers has {len(self.no_rope_layers)} entries for num_hidden_layers="
                f"{self.num_hidden_layers}"
            )
        if self.num_global_tokens > 0 and not windows:
            raise ValueError(
                f"ChorusTextConfig: num_global_tokens={self.num_global_tokens} serve windows, but no layer of "
                "layer_types is sliding_attention"
            )
        for name in ("cross_modal_layers", "skip_layers"):
            for layer in getattr(self, name) or []:
                if not 0 <= layer < self.num_hidden_layers:
                    raise ValueError(f"ChorusTextConfig: {name} names layer {layer} of {self.num_hidden_layers}")
        check_name("ChorusTextConfig", "experts_layout", self.experts_layout, EXPERT_LAYOUTS)
        for bank in self.banks:
            bank.validate(self.sparse_layers, self.modalities)
        self._validate_widths(self.expert_width_shares)
        for layer in self.sparse_layers:
            if not self.banks_of_layer(layer):
                raise ValueError(f"ChorusTextConfig: sparse layer {layer} holds no expert bank")

    def _validate_widths(self, shares: list[int | float] | None) -> None:
        if shares is None:
            return
        if len(shares) < 2 or shares[-1] != 1 or shares[0] <= 0 or sorted(set(shares)) != shares:
            raise ValueError(f"ChorusTextConfig: expert_width_shares={shares} must rise from above 0 to 1, two or more")
        if self.experts_layout == "linear":
            raise ValueError("ChorusTextConfig: expert_width_shares with experts_layout='linear', which runs whole")
        for share in shares:
            for bank in self.banks:
                if bank.intermediate_size * share % 1:
                    raise ValueError(
                        f"ChorusTextConfig: {share} of expert_width_shares is {bank.intermediate_size * share:g} of "
                        f"intermediate_size={bank.intermediate_size} of bank {bank.name!r}, no whole number"
                    )

    def validate_depth(self) -> None:
        """Part of `@strict` validation: exits stand within the model, skipped layers and their budget go together."""
        exits = self.exit_layers or []
        for layers in exits:
            check_exit("ChorusTextConfig: exit_layers", layers, self.num_hidden_layers)
        if len(set(exits)) != len(exits):
            raise ValueError(f"ChorusTextConfig: exit_layers={exits} names an exit twice")
        # Here and below: one setting without its other half would do nothing, in silence.
        if self.exit_loss_coef > 0 and not exits:
            raise ValueError(f"ChorusTextConfig: exit_loss_coef={self.exit_loss_coef} without exit_layers")
        check_name("ChorusTextConfig", "skip_scope", self.skip_scope, SKIP_SCOPES)
        if self.skip_scope == "layer" and not self.skip_layers:
            raise ValueError("ChorusTextConfig: skip_scope='layer' without skip_layers; a skip_budget gives them")
        if self.skip_layers and self.skip_budget is None:
            raise ValueError(f"ChorusTextConfig: skip_layers={self.skip_layers} without a skip_budget")
        if self.skip_budget is not None and not self.skip_layers:
            raise ValueError(f"ChorusTextConfig: skip_budget={self.skip_budget} without any layer to skip")
