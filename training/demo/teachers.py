"""The teacher of the demo's audio encoder: a time-delay network. Alone it knew an unknown speaker better than the
Conformer did, in less time (docs/log.md, 2026-11-29).

Shape suffixes: N clips, F frames, M mel bins, C channels.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class TimeDelayTeacher(nn.Module):
    """Convolutions in time over all mel bins (Peddinti et al. 2015), a weighted mean and the largest value of each
    channel under a classifier. It learns as an [`EncoderLesson`] does, and is thrown away.

    Args:
        layers: kernel, stride and dilation of each convolution.
    """

    def __init__(
        self,
        num_mel_bins: int,
        num_classes: int,
        channels: int = 128,
        layers: Sequence[tuple[int, int, int]] = ((5, 1, 1), (3, 2, 1), (3, 1, 2), (3, 1, 3)),
        dropout: float = 0.2,
    ):
        super().__init__()
        widths = [num_mel_bins] + [channels] * len(layers)
        self.convolutions = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv1d(width, channels, kernel, stride, kernel // 2 * dilation, dilation, bias=False),
                    nn.BatchNorm1d(channels),
                    nn.ReLU(),
                )
                for width, (kernel, stride, dilation) in zip(widths, layers, strict=False)
            )
        )
        self.stride = math.prod(stride for _, stride, _ in layers)
        self.weigh = nn.Linear(channels, 1)
        self.dropout = nn.Dropout(dropout)
        self.classify = nn.Linear(2 * channels, num_classes)

    def forward(
        self, input_features: Tensor, input_features_mask: Tensor, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """`logits` `(N, num_classes)` of features `(N, F, M)`, and `loss` when there are `labels` `(N,)`."""
        mask_NF = input_features_mask.bool()
        hidden_NFC = self.convolutions((input_features * mask_NF[..., None]).transpose(1, 2)).transpose(1, 2)
        padded_NF1 = ~mask_NF[:, :: self.stride, None]
        weights_NF1 = self.weigh(hidden_NFC).masked_fill(padded_NF1, -torch.inf).softmax(dim=1)
        # Nothing is below zero behind a ReLU.
        largest_NC = hidden_NFC.masked_fill(padded_NF1, 0.0).amax(dim=1)
        pooled = torch.cat([(weights_NF1 * hidden_NFC).sum(dim=1), largest_NC], dim=1)
        outputs = {"logits": self.classify(self.dropout(pooled))}
        if labels is not None:
            outputs["loss"] = nn.functional.cross_entropy(outputs["logits"], labels, label_smoothing=0.1)
        return outputs
