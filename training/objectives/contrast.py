"""Contrast between the text, the image and the sound of a row, beside the loss of its labelled tokens.

Unusual here:
- the text of a row is its labelled tokens; of image and sound it is what the connectors made of them in the model's
  own forward, so no tower runs twice;
- each modality runs through the decoder alone: a token that has seen its partner is easy to tell from others;
- rows need not have all modalities: a pair of modalities learns from the rows that have both.

Shape suffixes: B batch, S sequence, N rows with a modality, L their tokens, D hidden size, P width of a vector.
"""

import math
from collections.abc import Mapping
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence

from chorus_moe.modeling.configuration_modalities import ENCODED_MODALITIES, MODALITY_IDS
from chorus_moe.modeling.depth_exits import pool_tokens
from chorus_moe.modeling.losses import infonce_loss, rows_of_all_ranks
from chorus_moe.modeling.modeling_chorus import ChorusModel
from chorus_moe.modeling.modeling_outputs import ChorusLossOutput
from chorus_moe.processors.processing_rows import IGNORED_LABEL
from chorus_moe.training.loading import ModelOrAdapter, base_model
from chorus_moe.training.objectives.masked import on_any_rank
from chorus_moe.training.objectives.objective import Objective


class Contrast(Objective):
    """InfoNCE over the rows of all ranks, the mean over pairs of modalities that two rows or more have. Projections and
    temperature are trained along.

    Raises:
        ValueError: a model of text alone.
    """

    def __init__(self, model: ModelOrAdapter, weight: float = 1.0):
        super().__init__("contrast", weight)
        config: Any = base_model(model).config
        if len(config.modalities) < 2:
            raise ValueError(f"objectives.contrast_weight={weight}: the model reads text alone, which has no partner")
        width = config.text_config.hidden_size
        self.projections = nn.ModuleDict(
            {name: nn.Linear(width, config.projection_dim, bias=False) for name in config.modalities}
        )
        # CLIP starts at a temperature of 0.07.
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(0.07)))

    def forward(self, model: nn.Module, inputs: Mapping[str, Any], outputs: ChorusLossOutput) -> Tensor:
        inner: Any = model.module if isinstance(model, DistributedDataParallel) else model
        decoder: ChorusModel = base_model(inner).model
        labels_BS = inputs["labels"]
        places = {"text": labels_BS != IGNORED_LABEL}
        places |= {name: inputs["mm_token_type_ids"] == MODALITY_IDS[name] for name in ENCODED_MODALITIES}
        has = {name: places[name].any(dim=1) for name in self.projections}
        # Every rank runs the decoder, or none: shards are gathered in step.
        vectors = {
            name: self._vectors(decoder, name, self._tokens(decoder, name, places[name], inputs, outputs))
            for name in self.projections
            if on_any_rank(bool(has[name].any()), labels_BS.device)
        }
        scale, losses = self.logit_scale.exp().clamp(max=100.0), []
        for first, second in combinations(vectors, 2):
            both_B = has[first] & has[second]
            left_NP, right_NP = (rows_of_all_ranks(vectors[name][both_B[has[name]]]) for name in (first, second))
            if len(left_NP) > 1:
                losses.append(infonce_loss(left_NP @ right_NP.T * scale))
        return torch.stack(losses).mean() if losses else scale * 0.0

    @staticmethod
    def _tokens(
        decoder: ChorusModel, name: str, is_token_BS: Tensor, inputs: Mapping[str, Any], outputs: ChorusLossOutput
    ) -> list[Tensor]:
        """The embeddings `(L, D)` of each row that has the modality."""
        if name == "text":
            tokens_TD = decoder.get_input_embeddings()(inputs["input_ids"][is_token_BS])
        else:
            tokens_TD = getattr(outputs, f"{name}_hidden_states")
            tokens_TD = tokens_TD.reshape(-1, tokens_TD.shape[-1]) if tokens_TD is not None else torch.empty(0)
        return list(tokens_TD.split([size for size in is_token_BS.sum(dim=1).tolist() if size]))

    def _vectors(self, decoder: ChorusModel, name: str, pieces: list[Tensor]) -> Tensor:
        """Unit vectors `(N, P)`."""
        projection: Any = self.projections[name]
        # A rank without the modality runs one idle token.
        rows = pieces or [projection.weight.new_zeros(1, projection.weight.shape[1])]
        tokens_NLD = pad_sequence(rows, batch_first=True)
        lengths_N = torch.tensor([len(row) for row in rows], device=tokens_NLD.device)
        mask_NL = (torch.arange(tokens_NLD.shape[1], device=tokens_NLD.device) < lengths_N[:, None]).long()
        hidden_NLD = decoder.language_model(
            inputs_embeds=tokens_NLD,
            attention_mask=mask_NL,
            mm_token_type_ids=torch.full_like(mask_NL, MODALITY_IDS[name]),
        ).last_hidden_state
        pooled_ND = pool_tokens(hidden_NLD, mask_NL, decoder.config.text_config.is_causal)
        return F.normalize(projection(pooled_ND.to(projection.weight)), dim=-1)[: len(pieces)]
