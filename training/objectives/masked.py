"""Masked features: what a frozen tower says of hidden image or audio tokens, predicted by the decoder.

Unusual here:
- tokens are hidden behind the tower and the connector, so any tower will do, and each runs once a step;
- what is predicted does not move, as the tower is frozen: the model cannot win by making all features alike;
- the labelled tokens are learned in a pass of their own, in which nothing is hidden.

Shape suffixes: B batch, S sequence, T image or audio tokens of a batch, D hidden size, E width of the tower.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from chorus_moe.modeling.configuration_modalities import ENCODED_MODALITIES, MODALITY_IDS
from chorus_moe.modeling.modeling_outputs import ChorusLossOutput
from chorus_moe.modeling.tower_connectors import masked_mean_pool
from chorus_moe.processors.processing_chorus import ChorusProcessor
from chorus_moe.processors.processing_media import MEDIA
from chorus_moe.training.loading import ModelOrAdapter, base_model
from chorus_moe.training.objectives.objective import Objective


class MaskedFeatures(Objective):
    """Smooth L1 distance of the tower's features of hidden tokens, each brought to mean 0 and variance 1, from a linear
    prediction (data2vec, arXiv 2202.03555). The prediction and the embedding of hidden tokens are trained along.

    Args:
        modality: "image" or "audio".
        share: of the tokens of each row that is hidden, between 0 and 1; at least one is.

    Raises:
        ValueError: a model that has no tower of the modality.
    """

    def __init__(self, modality: str, model: ModelOrAdapter, share: float = 0.5, weight: float = 1.0):
        super().__init__(f"masked_{modality}", weight)
        self.row, self.share = ENCODED_MODALITIES[modality], share
        config: Any = base_model(model).config
        if getattr(config, self.row.config) is None:
            raise ValueError(
                f"objectives.masked_{modality}_weight={weight}: the model has no {self.row.tower}, so there are no "
                f"{modality} features to predict"
            )
        width = config.text_config.hidden_size
        self.mask_token = nn.Parameter(torch.randn(width) * width**-0.5)
        self.prediction = nn.Linear(width, getattr(config, self.row.config).hidden_size)
        # What the tower said in the last forward of the model.
        self._told: Any = None

    def check(self, model: nn.Module, processor: ChorusProcessor) -> None:
        """Refuse a trained tower, and listen to a frozen one."""
        tower = getattr(base_model(model).model, self.row.tower)
        trained = sum(parameter.requires_grad for parameter in tower.parameters())
        if trained:
            raise ValueError(
                f"objectives.masked_{self.row.name}_weight={self.weight}: {trained} tensors of the {self.row.tower} "
                f"are trained, and it could make its features easy to predict; add {self.row.tower} to parts.freeze"
            )
        tower.register_forward_hook(self._listen)

    def _listen(self, tower: nn.Module, inputs: Any, output: Any) -> None:
        self._told = output

    def forward(self, model: nn.Module, inputs: Mapping[str, Any], outputs: ChorusLossOutput) -> Tensor:
        told, self._told = self._told, None
        # Every rank runs the model, or none: shards are gathered in step.
        if not on_any_rank(inputs.get(MEDIA[self.row.name].inputs[0]) is not None, outputs.logits.device):
            return self.mask_token.sum() * 0.0
        left_out = {"labels", *(name for medium in MEDIA.values() for name in medium.inputs)}
        given = {name: value for name, value in inputs.items() if name not in left_out}
        modality_BS = inputs["mm_token_type_ids"]
        features, hidden_BS = {}, None
        for name, row in ENCODED_MODALITIES.items():
            tokens = getattr(outputs, f"{name}_hidden_states")
            if tokens is None:
                continue
            tokens_TD, is_token_BS = tokens.reshape(-1, tokens.shape[-1]), modality_BS == MODALITY_IDS[name]
            if row is self.row:
                hidden_BS = draw(is_token_BS, self.share)
                is_hidden_T = hidden_BS[is_token_BS]
                tokens_TD = torch.where(is_hidden_T[:, None], self.mask_token.to(tokens_TD), tokens_TD)
            # Each row's tokens count as one medium: the model wants whole ones.
            sizes = [size for size in is_token_BS.sum(dim=1).tolist() if size]
            features[name] = BaseModelOutputWithPooling(pooler_output=list(tokens_TD.split(sizes)))
        # Not through the wrapper of DDP, which counts on one forward a step; gradients meet in it all the same.
        inner: Any = model.module if isinstance(model, DistributedDataParallel) else model
        states = inner(**given, mm_encoder_outputs=features, output_hidden_states=True, logits_to_keep=1).hidden_states
        if hidden_BS is None:
            return (states[-1] * 0.0).sum() + self.mask_token.sum() * 0.0
        target_TE = self._pooled(inner, told)[is_hidden_T]
        target_TE = F.layer_norm(target_TE.float(), target_TE.shape[-1:])
        return F.smooth_l1_loss(self.prediction(states[-1][hidden_BS].to(self.prediction.weight)), target_TE)

    def _pooled(self, model: ModelOrAdapter, told: Any) -> Tensor:
        """`(T, E)`: the tower's features, averaged over those that the connector makes one token of."""
        connector = getattr(base_model(model).model, self.row.connector)
        features = told.last_hidden_state.detach()
        if self.row.name == "image":
            return connector.pool(features).flatten(0, 1)
        pooled, is_real = masked_mean_pool(features, told.attention_mask.bool(), connector.pool_size)
        return pooled[is_real]


def draw(is_token_BS: Tensor, share: float) -> Tensor:
    """Tokens drawn at random, the same share of each row, rounded, at least one and not all where there are several.

    Args:
        is_token_BS: bool, what can be drawn.
    """
    count_B = is_token_BS.sum(dim=1)
    wanted_B = (count_B * share).round().clamp(min=1)
    wanted_B = torch.minimum(wanted_B, (count_B - 1).clamp(min=1))
    # Others come last, whatever they draw.
    noise_BS = torch.rand(is_token_BS.shape, device=is_token_BS.device).masked_fill(~is_token_BS, 2.0)
    rank_BS = noise_BS.argsort(dim=1).argsort(dim=1)
    return is_token_BS & (rank_BS < wanted_B[:, None])


def on_any_rank(is_here: bool, device: torch.device) -> bool:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return is_here
    found = torch.tensor(float(is_here), device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found)
