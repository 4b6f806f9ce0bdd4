"""What keeps the demo's decoder from learning its few speakers by heart: smoothed labels and dropped audio tokens.

Shape suffixes: N clips, P audio tokens, D width, B batch, S sequence, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from chorus_moe.modeling.modeling_generation import ChorusForConditionalGeneration


def smooth_labels(model: ChorusForConditionalGeneration, share: float) -> None:
    """From now on the language loss of `model` gives `share` of every label's probability to the whole vocabulary.

    Auxiliary losses and `num_items_in_batch` stay as they are (label smoothing: arXiv 1512.00567, section 7).
    """

    def loss(logits: Tensor, labels: Tensor, num_items_in_batch: Tensor, **_: Any) -> Tensor:
        logits_TV, labels_T = logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten()
        # A sum over labels, divided as the Trainer divides: accumulation changes nothing.
        total = nn.functional.cross_entropy(logits_TV, labels_T, label_smoothing=share, reduction="sum")
        return total / num_items_in_batch

    model.loss_function = loss


def drop_tokens(connector: nn.Module, share: float) -> RemovableHandle:
    """In training, every token of an audio connector reads zero with probability `share`; the handle takes it off."""

    def drop(module: nn.Module, _inputs: Any, outputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        tokens_NPD, mask_NP = outputs
        # The frozen connector is in training mode while the decoder learns, so tokens are dropped then and never in
        # evaluation.
        if not module.training:
            return outputs
        kept_NP = torch.rand(mask_NP.shape, device=mask_NP.device) >= share
        return tokens_NPD * kept_NP[..., None], mask_NP

    return connector.register_forward_hook(drop)
