"""The decoder: attention and feed-forward layers over one sequence of text, image and audio tokens."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.processing_utils import Unpack
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention import Attention, CrossModalAttention, rotary_tables
from .attention_globals import GlobalTokens, with_global_tokens
from .attention_masks import build_masks, is_packed
from .configuration_checks import check_exit
from .configuration_services import service
from .configuration_text import ChorusTextConfig
from .depth_exits import ExitRun, SequenceInputs, TokenExits
from .depth_skip import SkipGate, feed_open_tokens, straight_through, threshold_logit
from .layers import GatedMLP, RMSNorm
from .modeling_base import ChorusPreTrainedModel
from .modeling_outputs import CACHE, ChorusModelOutput, takes_cache
from .moe_banks import MixtureOfBanks
from .moe_plan import DecoderKwargs, ForwardPlan, read_routing_options

# Arguments that `read_routing_options` takes as they come.
OPTIONS_OF_ROUTING = ("expert_budget", "sample_experts", "closed_banks", "expert_width_share")


class DenseFeedForward(GatedMLP):
    """A dense layer's feed-forward, called like a mixture of banks."""

    def __init__(self, config: ChorusTextConfig):
        super().__init__(config, config.intermediate_size, config.mlp_bias)

    def forward(self, hidden_states: Tensor, plan: ForwardPlan) -> tuple[Tensor, None]:  # type: ignore[override]
        return super().forward(hidden_states), None


class ChorusDecoderLayer(GradientCheckpointingLayer):
    """norm -> attention -> residual -> norm -> feed-forward -> residual; with `norm_placement="post"` each norm stands
    behind attention or feed-forward, before the residual."""

    def __init__(self, config: ChorusTextConfig, layer_idx: int):
        super().__init__()
        is_cross_modal = layer_idx in config.cross_modal_layers
        is_sparse = config.mlp_layer_types[layer_idx] == "sparse"
        self.self_attn = (CrossModalAttention if is_cross_modal else Attention)(config, layer_idx)
        self.mlp = MixtureOfBanks(config, layer_idx) if is_sparse else DenseFeedForward(config)
        self.skip_gate = SkipGate(config.hidden_size) if layer_idx in (config.skip_layers or ()) else None
        self.skip_scope = config.skip_scope
        # Identities have no parameters, so either placement has the tensors of its family's checkpoints alone.
        before, after = (RMSNorm, nn.Identity) if config.norm_placement == "pre" else (nn.Identity, RMSNorm)
        self.input_layernorm = before(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = before(config.hidden_size, config.rms_norm_eps)
        self.attention_output_norm = after(config.hidden_size, config.rms_norm_eps)
        self.feed_forward_output_norm = after(config.hidden_size, config.rms_norm_eps)

    @takes_cache
    def forward(
        self,
        hidden_states: Tensor,
        plan: ForwardPlan,
        past_key_values: Cache | None = None,
        keys_alone: bool = False,
        **attention: Any,
    ) -> Tensor:
        """States `(B, S, D)` after the layer; `attention` is what [`Attention`] takes besides."""
        attention |= {"plan": plan, "past_key_values": past_key_values}
        if keys_alone:
            self.self_attn(self.input_layernorm(hidden_states), keys_alone=True, **attention)
            return hidden_states
        if self.skip_gate is not None and self.skip_scope == "layer":
            return self._run_open_tokens(hidden_states, **attention)
        return self.finish(hidden_states, self.self_attn(self.input_layernorm(hidden_states), **attention)[0], plan)

    def finish(self, hidden_states: Tensor, attended: Tensor, plan: ForwardPlan) -> Tensor:
        """States after the layer, of tokens and what their attention returned."""
        hidden_states = hidden_states + self.attention_output_norm(attended)
        del attended  # a long prefill has no room for what is added already
        fed_forward = self._feed_forward(self.post_attention_layernorm(hidden_states), plan)
        return hidden_states + self.feed_forward_output_norm(fed_forward)

    def _run_open_tokens(self, hidden_BSD: Tensor, plan: ForwardPlan, **attention: Any) -> Tensor:
        """States `(B, S, D)` after a layer that tokens with a closed skip gate leave as they came (Mixture-of-Depths,
        arXiv 2404.02258, by a threshold for each token). All keys and values are made: others see a token that skips.
        """
        assert self.skip_gate is not None
        normed = self.input_layernorm(hidden_BSD)
        logits_BS = self.skip_gate(normed)
        attend = partial(self.self_attn, normed, plan=plan, **attention)
        if self.training or torch.compiler.is_compiling():
            decision_BS1 = straight_through(logits_BS, plan.open_above).unsqueeze(-1).to(hidden_BSD.dtype)
            # Exact at either end: one of the factors is 1 and the other 0.
            return self.finish(hidden_BSD, attend()[0], plan) * decision_BS1 + hidden_BSD * (1 - decision_BS1)
        is_open_BS = logits_BS > plan.open_above
        rows = is_open_BS.flatten().nonzero().squeeze(1)
        if len(rows) == is_open_BS.numel():
            return self.finish(hidden_BSD, attend()[0], plan)
        hidden_TD = hidden_BSD.flatten(0, 1)
        if len(rows) == 0:
            # Banks run on no rows, so that their routing is recorded.
            attended_RD = attend(keys_alone=True)[0].flatten(0, 1)[rows]
        else:
            # The open tokens of each sample in order; samples with fewer of them are filled up, and the fill left out.
            most = int(is_open_BS.sum(dim=1).max())
            queries_BQ = (~is_open_BS).int().argsort(dim=1, stable=True)[:, :most]
            attended_RD = attend(queries_BQ=queries_BQ)[0][is_open_BS.gather(1, queries_BQ)]
        finished = self.finish(hidden_TD[rows].unsqueeze(0), attended_RD.unsqueeze(0), plan.at(rows)).squeeze(0)
        return hidden_TD.index_copy(0, rows, finished).view_as(hidden_BSD)

    def _feed_forward(self, hidden_states: Tensor, plan: ForwardPlan) -> Tensor:
        if self.skip_gate is None or self.skip_scope == "layer":
            return self.mlp(hidden_states, plan)[0]
        return feed_open_tokens(self.mlp, hidden_states, plan, self.skip_gate(hidden_states))


def counts_computation(forward: Callable[..., Any]) -> Callable[..., Any]:
    """For a decoder's forward with recorded outputs: adds `compute` where `output_compute=True` asks for it."""

    @wraps(forward)
    def wrapper(self: Any, *args: Any, output_compute: bool | None = None, **kwargs: Any) -> Any:
        # transformers records an output `routing` for `output_routing`; its models call the request by this name.
        if "output_router_logits" in kwargs:
            kwargs["output_routing"] = kwargs.pop("output_router_logits")
        if output_compute:
            return service("count_computation", "output_compute=True")(forward, self, *args, **kwargs)
        return forward(self, *args, **kwargs)

    return wrapper


class ChorusTextModel(ChorusPreTrainedModel):
    """The decoder without a head: token ids or embeddings in, hidden states out."""

    config: ChorusTextConfig
    input_modalities = ("text",)
    layers: Any  # a list of decoder layers, which surgery takes apart
    # `cross_modal_states` are the rotated queries and keys of the cross-modal layers.
    _can_record_outputs = {
        "hidden_states": ChorusDecoderLayer,
        "attentions": OutputRecorder(Attention, index=1),
        "routing": OutputRecorder(MixtureOfBanks, index=1),
        "cross_modal_states": OutputRecorder(CrossModalAttention, index=2),
        "skip_logits": OutputRecorder(SkipGate),
    }

    def __init__(self, config: ChorusTextConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([ChorusDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        # Under Llama's name and class, so that every `rope_parameters` of transformers works.
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        in_front = config.num_tokens_in_front
        self.global_tokens = GlobalTokens(in_front, config.hidden_size) if in_front else None
        self.banks = {bank.name: bank for bank in config.banks}
        if any(bank.balance == "bias" for bank in self.banks.values()):
            # Steps of 0.001 would be lost in bfloat16, and loading casts what is not named here.
            self._keep_in_fp32_modules_strict = ["e_score_correction_bias"]
        self.gradient_checkpointing = False
        self.post_init()

    @takes_cache
    # From the outside in: defaults, tokens in front, then counting, which counts them, around recorded outputs.
    @merge_with_config_defaults
    @with_global_tokens
    @counts_computation
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        use_cache: bool | None = None,
        exit_layer: int | None = None,
        exits: ExitRun | None = None,
        token_exits: TokenExits | None = None,
        **kwargs: Unpack[DecoderKwargs],
    ) -> ChorusModelOutput:
        """Run the layers.

        Args:
            attention_mask: `(B, past + S)`, 1 for real tokens, or masks by layer type as `generate` prepares them.
            mm_token_type_ids: `(B, S)`, 0 text, 1 image, 3 audio. The decoder alone has no placeholder tokens, so
                without it every token is text; [`ChorusModel`] derives it from the token ids.
            exit_layer: leave after this many layers; the final norm and the cache of those layers are as ever.
            exits: heads between the layers, by which samples may leave: `last_hidden_state` is of those that stayed.
            token_exits: exits of a decoding step; the state of a token that leaves is its `last_hidden_state`.
            output_compute: also return what was spent on each sample, see [`Computation`]; takes the whole package.
            kwargs: what this call asks of routers, banks and skip gates, see [`DecoderKwargs`].

        Raises:
            ValueError: both or neither of `input_ids` and `inputs_embeds`; an option of the routers that does not fit,
                see `read_routing_options`; a cache, or a mask that is not `(B, S)`, with global tokens in front of a
                bidirectional sequence; global tokens with an attention implementation that cannot show them; a
                `skip_threshold` outside 0..1 or without `skip_layers`; an `exit_layer` that the model does not have.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if exit_layer is not None:
            check_exit("exit_layer", exit_layer, self.config.num_hidden_layers)
        complexity_scores, skip_threshold = kwargs.pop("complexity_scores", None), kwargs.pop("skip_threshold", None)
        if skip_threshold is not None and not self.config.skip_layers:
            raise ValueError(f"skip_threshold={skip_threshold} changes nothing: the model has no skip_layers")
        asked = {name: kwargs.pop(name, None) for name in OPTIONS_OF_ROUTING}
        asked["width_shares"] = self.config.expert_width_shares
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        # With a cache, even an empty one, transformers' masks take packed sequences for one: they would see each other.
        if use_cache and past_key_values is None and not is_packed(attention_mask, position_ids):
            past_key_values = DynamicCache(config=self.config)
        tokens = SequenceInputs.read(
            hidden_states, attention_mask, position_ids, past_key_values, mm_token_type_ids, complexity_scores
        )
        if self.global_tokens is not None:
            # Global tokens all stand at position 0, which would look like packed sequences to the routers.
            tokens = replace(tokens, positions_of_caller=None)
        # Text alone needs no look at the modalities, so a compiled step may rely on it.
        given = (past_key_values, asked, threshold_logit(skip_threshold), mm_token_type_ids is None)
        shared = self._prepare(hidden_states, tokens, *given)
        numbers = range(1, 1 + (exit_layer or len(self.layers)))
        for number, layer, kind in zip(numbers, self.layers, self.config.layer_types, strict=False):
            before, keys_alone = hidden_states, token_exits is not None and token_exits.all_left
            hidden_states = layer(
                hidden_states,
                **shared[kind],
                use_cache=use_cache,
                **{CACHE: past_key_values},
                **({"keys_alone": True} if keys_alone else {}),
                **kwargs,
            )
            if token_exits is not None:
                hidden_states = token_exits.after(number, before, hidden_states)
            staying = None if exits is None else exits.passes(number, hidden_states)
            if staying is not None:
                # Early exit saves time only if later layers see fewer samples: all that they share is made anew.
                hidden_states, tokens = hidden_states.index_select(0, staying), tokens.at(staying)
                if len(staying) == 0:
                    break
                shared = self._prepare(hidden_states, tokens, *given)
        return ChorusModelOutput(last_hidden_state=self.norm(hidden_states), **{CACHE: past_key_values})

    def _prepare(
        self,
        hidden_states: Tensor,
        tokens: SequenceInputs,
        past_key_values: Cache | None,
        asked: dict[str, Any],
        open_above: float,
        is_text: bool,
    ) -> dict[str, dict[str, Any]]:
        """What the layers of each type are given beside the states: the plan, a mask, positions and rotary tables."""
        options = read_routing_options(
            self.banks,
            tokens.modality_BS,
            tokens.positions_of_caller,
            self.training,
            past_key_values,
            tokens.complexity_scores,
            **asked,
        )
        plan = ForwardPlan.build(tokens.modality_BS, tokens.attention_mask, options, self.config.modalities, is_text)
        plan.open_above = open_above
        masks = build_masks(self.config, hidden_states, tokens.attention_mask, past_key_values, tokens.position_ids)
        tables = rotary_tables(*self.rotary_emb(hidden_states, position_ids=tokens.position_ids))
        return {
            kind: {
                "plan": plan,
                "attention_mask": masks[kind],
                "position_embeddings": tables,
                "position_ids": tokens.position_ids,
            }
            for kind in set(self.config.layer_types)
        }
