"""What the model did for one answer: experts of each token, attention on pictures and sound, computation.

Unusual here: nothing is recorded while the model speaks. The whole sequence, prompt and answer, is read once more in
one forward, with the options and the voice of the answer, so that streaming is as fast as ever.

Shape suffixes: S tokens of prompt and answer, E experts of a bank, A tokens of the answer.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from chorus_moe.modeling.configuration_modalities import MODALITY_IDS
from chorus_moe.modeling.configuration_text import ChorusTextConfig
from chorus_moe.modeling.modeling_outputs import BankRouting
from chorus_moe.processors.processing_chorus import ChorusProcessor
from chorus_moe.serving.conversation import SPEAKING, Answer
from chorus_moe.serving.voices import Voice
from chorus_moe.surgery.parts import decoder_of
from chorus_moe.training.loading import base_model, device_of

NAMES = {number: name for name, number in MODALITY_IDS.items()}


@dataclass(frozen=True)
class Trace:
    """One answer.

    Args:
        words: the tokens as text, `<image>` and `<audio>` for media.
        modalities: of each token.
        prompt_length: tokens before the answer.
        experts: sparse layer -> bank -> `(S, E)` float32, weight of each expert, the bank's own gate included; 0 where
            the token did not visit it.
        attention_AS: mean over heads and layers of what each token of the answer looks at, or None.
        attention_layers: the layers of that mean.
        layers: those that the sequence ran through.
        visits: tokens times routed experts, over all layers.
        flops: of the decoder, for the whole sequence.
    """

    words: list[str]
    modalities: list[str]
    prompt_length: int
    experts: dict[int, dict[str, Tensor]]
    attention_AS: Tensor | None
    attention_layers: list[int]
    layers: int
    visits: int
    flops: int

    def strongest(self, position: int, layer: int) -> list[tuple[str, int, float]]:
        """(bank, expert, weight) that a token visits in a layer, strongest first."""
        found = [
            (name, int(expert), float(weight_SE[position, expert]))
            for name, weight_SE in self.experts[layer].items()
            for expert in torch.nonzero(weight_SE[position])[:, 0]
        ]
        return sorted(found, key=lambda entry: -entry[2])

    def spans(self, modality: str, lengths: Iterable[int]) -> list[range]:
        """Positions of each item of a modality, of so many tokens each; items may touch."""
        places = [position for position, name in enumerate(self.modalities) if name == modality]
        ends = accumulate(lengths, initial=0)
        return [range(places[start], places[end - 1] + 1) for start, end in pairwise(ends)]


@torch.inference_mode()
def trace_answer(voice: Voice, processor: ChorusProcessor, answer: Answer) -> Trace:
    """Read prompt and answer once more, and say what the model did."""
    model, decoder, device = base_model(voice.model), decoder_of(voice.model), device_of(voice.model)
    inputs = {name: tensor.to(device) for name, tensor in answer.inputs.items()}
    written = torch.tensor([answer.tokens], dtype=torch.long, device=device)
    prompt_length = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], written], dim=1)
    for name, value in (("attention_mask", 1), ("mm_token_type_ids", 0)):
        if name in inputs:
            inputs[name] = F.pad(inputs[name], (0, len(answer.tokens)), value=value)
    # Other implementations keep no map of the attention.
    with SPEAKING, voice.speaking():
        implementation = decoder.config._attn_implementation
        decoder.set_attn_implementation("eager")
        try:
            outputs = model(
                **inputs,
                **answer.options,
                output_router_logits=True,
                output_attentions=True,
                output_compute=True,
                use_cache=False,
                logits_to_keep=1,
            )
        finally:
            decoder.set_attn_implementation(implementation)
    ids = inputs["input_ids"][0].tolist()
    types = inputs.get("mm_token_type_ids", torch.zeros_like(inputs["input_ids"]))[0].tolist()
    layers, attention_AS = mean_attention(decoder.config, outputs.attentions or (), len(answer.tokens))
    spent = outputs.compute
    return Trace(
        words=[processor.tokenizer.decode([token]) for token in ids],
        modalities=[NAMES[number] for number in types],
        prompt_length=prompt_length,
        experts=experts_by_layer(decoder.config, outputs.routing, len(ids)),
        attention_AS=attention_AS,
        attention_layers=layers,
        layers=int(spent.layers[0]),
        visits=int(spent.experts[0]),
        flops=int(spent.flops[0]),
    )


def experts_by_layer(
    config: ChorusTextConfig, routing: Sequence[Mapping[str, BankRouting]] | None, length: int
) -> dict[int, dict[str, Tensor]]:
    """`Trace.experts` from the routing of one sequence of `length` tokens."""
    return {
        layer: {name: expert_weights(bank, length) for name, bank in banks.items()}
        for layer, banks in zip(config.sparse_layers, routing or (), strict=False)
    }


def shares(experts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bank -> `(E,)`: part of all visits of a layer that each expert had."""
    counts = {name: (weight_SE > 0).sum(dim=0) for name, weight_SE in experts.items()}
    total = max(sum(int(count.sum()) for count in counts.values()), 1)
    return {name: count / total for name, count in counts.items()}


def expert_weights(routing: BankRouting, length: int) -> Tensor:
    """`(S, E)` float32: what the output of each expert is multiplied by, for each token."""
    experts = routing.router_logits.shape[-1]
    weights_RK = routing.routing_weights.float()
    if routing.bank_weights is not None:
        weights_RK = weights_RK * routing.bank_weights[:, None].float()
    # One column more for slots that are not used.
    found_RE = weights_RK.new_zeros(len(weights_RK), experts + 1)
    found_RE.scatter_add_(1, routing.selected_experts, weights_RK)
    found_SE = weights_RK.new_zeros(length, experts)
    rows = slice(None) if routing.rows is None else routing.rows
    found_SE[rows] = found_RE[:, :experts]
    return found_SE.cpu()


def mean_attention(config: ChorusTextConfig, attentions: tuple, written: int) -> tuple[list[int], Tensor | None]:
    """The layers whose attention is shown, and its mean `(A, S)`: of the cross-modal layers, or of all."""
    layers = [layer for layer in config.cross_modal_layers or () if attentions[layer] is not None]
    layers = layers or [layer for layer, weights in enumerate(attentions) if weights is not None]
    if not layers or not written:
        return [], None
    # Row p looks at what the token after p is made of. The keys of global tokens stand before those of the tokens.
    rows = [attentions[layer][0].float().mean(dim=0)[-written - 1 : -1] for layer in layers]
    length = min(row.shape[-1] for row in rows)
    return layers, torch.stack([row[:, -length:] for row in rows]).mean(dim=0).cpu()
