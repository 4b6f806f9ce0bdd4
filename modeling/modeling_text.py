"""The decoder: attention and feed-forward layers over one sequence of text, image and audio tokens."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention import Attention, CrossModalAttention, rotary_tables
from .attention_globals import GlobalTokens, leaves_out_global_tokens
from .attention_masks import LocalMask, build_masks, is_packed
from .configuration_checks import check_exit
from .configuration_text import ChorusTextConfig
from .depth_cost import counts_computation
from .depth_exits import ExitRun, SequenceInputs
from .depth_skip import SkipGate, feed_open_tokens, threshold_logit
from .layers import GatedMLP, RMSNorm
from .modeling_base import ChorusPreTrainedModel
from .modeling_outputs import ChorusModelOutput
from .moe_banks import MixtureOfBanks
from .moe_plan import ModalityPlan, read_routing_options


class DenseFeedForward(GatedMLP):
    """A dense layer's feed-forward, called like a mixture of banks."""

    def __init__(self, config: ChorusTextConfig):
        super().__init__(config, config.intermediate_size, config.mlp_bias)

    def forward(self, hidden_states: Tensor, plan: ModalityPlan) -> tuple[Tensor, None]:  # type: ignore[override]
        return super().forward(hidden_states), None


class ChorusDecoderLayer(GradientCheckpointingLayer):
    """norm -> attention -> residual -> norm -> feed-forward -> residual, or with the norms after what they now precede
    (`norm_placement="post"`)."""

    def __init__(self, config: ChorusTextConfig, layer_idx: int):
        super().__init__()
        is_cross_modal = layer_idx in config.cross_modal_layers
        is_sparse = config.mlp_layer_types[layer_idx] == "sparse"
        self.self_attn = (CrossModalAttention if is_cross_modal else Attention)(config, layer_idx)
        self.mlp = MixtureOfBanks(config, layer_idx) if is_sparse else DenseFeedForward(config)
        self.skip_gate = SkipGate(config.hidden_size) if layer_idx in (config.skip_layers or ()) else None
        before, after = (RMSNorm, nn.Identity) if config.norm_placement == "pre" else (nn.Identity, RMSNorm)
        self.input_layernorm = before(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = before(config.hidden_size, config.rms_norm_eps)
        self.attention_output_norm = after(config.hidden_size, config.rms_norm_eps)
        self.feed_forward_output_norm = after(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        plan: ModalityPlan,
        attention_mask: Tensor | LocalMask | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        attended, _, _ = self.self_attn(
            self.input_layernorm(hidden_states),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            plan=plan,
            past_key_values=past_key_values,
            **kwargs,
        )
        hidden_states = hidden_states + self.attention_output_norm(attended)
        del attended  # a long prefill has no room for what is added already
        fed_forward = self._feed_forward(self.post_attention_layernorm(hidden_states), plan)
        return hidden_states + self.feed_forward_output_norm(fed_forward)

    def _feed_forward(self, hidden_states: Tensor, plan: ModalityPlan) -> Tensor:
        if self.skip_gate is None:
            return self.mlp(hidden_states, plan)[0]
        return feed_open_tokens(self.mlp, hidden_states, plan, self.skip_gate(hidden_states))


class ChorusTextModel(ChorusPreTrainedModel):
    """The decoder without a head: token ids or embeddings in, hidden states out."""

    config: ChorusTextConfig
    input_modalities = ("text",)
    # `cross_modal_states` are the rotated queries and keys of the cross-modal layers.
    _can_record_outputs = {
        "hidden_states": ChorusDecoderLayer,
        "attentions": OutputRecorder(Attention, index=1),
        "router_logits": OutputRecorder(MixtureOfBanks, index=1),
        "cross_modal_states": OutputRecorder(CrossModalAttention, index=2),
        "skip_logits": OutputRecorder(SkipGate),
    }

    def __init__(self, config: ChorusTextConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([ChorusDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.global_tokens = None
        if config.num_global_tokens and not config.is_causal:
            self.global_tokens = GlobalTokens(config.num_global_tokens, config.hidden_size)
        self.banks = {bank.name: bank for bank in config.banks}
        if any(bank.balance == "bias" for bank in self.banks.values()):
            self._keep_in_fp32_modules_strict = ["e_score_correction_bias"]
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @leaves_out_global_tokens
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
        complexity_scores: Tensor | None = None,
        expert_budget: Mapping[str, int] | None = None,
        sample_experts: Collection[str] | None = None,
        closed_banks: Collection[str] | None = None,
        skip_threshold: float | None = None,
        exit_layer: int | None = None,
        exits: ExitRun | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ChorusModelOutput:
        """Run the layers.

        Args:
            attention_mask: `(B, past + S)`, 1 for real tokens, or masks by layer type as `generate` prepares them.
            mm_token_type_ids: `(B, S)`, 0 text, 1 image, 3 audio. The decoder alone has no placeholder tokens, so
                without it every token is text; [`ChorusModel`] derives it from the token ids.
            complexity_scores: `(B, S)`, between 0 and 1, sets how many experts of an adaptive bank each token visits;
                the router's entropy does without it, and where it is NaN.
            expert_budget: modality -> how many experts of each bank its tokens visit at most.
            sample_experts: names of banks that draw their experts from the router's distribution; their routing then
                carries the log-probability of the draw.
            closed_banks: names of banks that this call passes by, at no cost, as if they were not there: the output is
                that of the model without them, bit for bit where the bank has a gate of its own.
            skip_threshold: tokens pass the feed-forward of `skip_layers` by where the gate's probability is not above
                it; 0.5 if None.
            exit_layer: leave after so many layers; the final norm and the cache of those layers are as ever.
            exits: heads between the layers, by which samples may leave: `last_hidden_state` is of those that stayed.
            output_compute: also return what was spent on each sample, see [`Computation`].

        Raises:
            ValueError: both or neither of `input_ids` and `inputs_embeds`; an option of the routers that does not fit,
                see `read_routing_options`; a cache, or a mask that is not `(B, S)`, with global tokens in front of a
                bidirectional sequence; global tokens with an attention implementation that cannot show them; a
                `skip_threshold` outside 0..1 or without `skip_layers`; an `exit_layer` that the model does not have.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if skip_threshold is not None and not self.config.skip_layers:
            raise ValueError(f"skip_threshold={skip_threshold} changes nothing: the model has no skip_layers")
        if exit_layer is not None:
            check_exit("exit_layer", exit_layer, self.config.num_hidden_layers)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if self.global_tokens is not None and past_key_values is not None:
            raise ValueError("global tokens in front of a bidirectional sequence read all of it: there is no cache")
        can_cache = use_cache and past_key_values is None and self.global_tokens is None
        # With a cache, even an empty one, transformers' masks take packed sequences for one: they would see each other.
        if can_cache and not is_packed(attention_mask, position_ids):
            past_key_values = DynamicCache(config=self.config)
        is_text = mm_token_type_ids is None
        if mm_token_type_ids is None:
            mm_token_type_ids = torch.zeros(inputs_embeds.shape[:2], dtype=torch.long, device=inputs_embeds.device)
        # Positions as the caller gave them tell the routers where a packed sequence begins; global tokens have none.
        positions_of_caller = None if self.global_tokens is not None else position_ids
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen).unsqueeze(0)
        if self.global_tokens is not None:
            in_front = self.global_tokens.in_front_of(
                inputs_embeds, attention_mask, position_ids, mm_token_type_ids, complexity_scores
            )
            inputs_embeds, attention_mask, position_ids, mm_token_type_ids, complexity_scores = in_front  # type: ignore[assignment]
        inputs = SequenceInputs(mm_token_type_ids, attention_mask, position_ids, positions_of_caller, complexity_scores)
        requests = (expert_budget, sample_experts, closed_banks, skip_threshold, is_text)
        hidden_states = inputs_embeds
        plan, masks, position_embeddings = self._prepare(hidden_states, inputs, past_key_values, *requests)
        layers = zip(self.layers[:exit_layer], self.config.layer_types[:exit_layer], strict=True)
        for number, (layer, layer_type) in enumerate(layers, start=1):
            hidden_states = layer(
                hidden_states,
                plan,
                attention_mask=masks[layer_type],
                position_embeddings=position_embeddings,
                position_ids=inputs.position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
            num_in_front = 0 if self.global_tokens is None else len(self.global_tokens.weight)
            staying = None if exits is None else exits.passes(number, hidden_states, num_in_front)
            if staying is not None:
                hidden_states = hidden_states.index_select(0, staying)
                if len(staying) == 0:
                    break
                inputs = inputs.at(staying)
                plan, masks, position_embeddings = self._prepare(hidden_states, inputs, past_key_values, *requests)
        return ChorusModelOutput(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def _prepare(
        self,
        hidden_states: Tensor,
        inputs: SequenceInputs,
        past_key_values: Cache | None,
        expert_budget: Mapping[str, int] | None,
        sample_experts: Collection[str] | None,
        closed_banks: Collection[str] | None,
        skip_threshold: float | None,
        is_text: bool,
    ) -> tuple[ModalityPlan, dict[str, Any], tuple[Tensor, Tensor]]:
        """What every layer is given beside the states: the plan, masks by layer type, and rotary tables."""
        options = read_routing_options(
            self.banks,
            inputs.modality_BS,
            inputs.positions_of_caller,
            self.training,
            past_key_values,
            inputs.complexity_scores,
            expert_budget,
            sample_experts,
            closed_banks,
        )
        plan = ModalityPlan.build(inputs.modality_BS, inputs.attention_mask, options, self.config.modalities, is_text)
        plan.open_above = threshold_logit(skip_threshold)
        masks = build_masks(self.config, hidden_states, inputs.attention_mask, past_key_values, inputs.position_ids)
        return plan, masks, rotary_tables(*self.rotary_emb(hidden_states, position_ids=inputs.position_ids))
