"""Connectors: neighbouring encoder tokens become one, and move to the width of the decoder.

Shape suffixes: N images or clips, L encoder tokens, P tokens after pooling, D width.
"""

import torch
from torch import nn

from .configuration_towers import ChorusAudioConfig, ChorusVisionConfig


class Projector(nn.Module):
    """LayerNorm and a two-layer GELU perceptron to the decoder's width (LLaVA 1.5, arXiv 2310.03744)."""

    def __init__(self, encoder_width: int, hidden_size: int):
        super().__init__()
        self.norm = nn.LayerNorm(encoder_width)
        self.up_proj = nn.Linear(encoder_width, hidden_size)
        self.down_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(nn.functional.gelu(self.up_proj(self.norm(hidden_states))))


class VisionConnector(nn.Module):
    """Image tokens to decoder inputs: `pool_size x pool_size` neighbours on the grid (or `pool_size ** 2` neighbours in
    a row, without a grid) are averaged."""

    def __init__(self, config: ChorusVisionConfig, hidden_size: int):
        super().__init__()
        self.pool_size = config.pool_size
        self.grid_size = None if config.grid_size is None else tuple(config.grid_size)
        self.projector = Projector(config.hidden_size, hidden_size)

    def forward(self, hidden_NLD: torch.Tensor) -> torch.Tensor:
        """Takes `(images, num_tokens, encoder width)`, returns `(images, num_image_tokens, hidden_size)`."""
        return self.projector(self.pool(hidden_NLD))

    def pool(self, hidden_NLD: torch.Tensor) -> torch.Tensor:
        if self.pool_size == 1:
            return hidden_NLD
        if self.grid_size is None:
            mask_NL = torch.ones(hidden_NLD.shape[:2], dtype=torch.bool, device=hidden_NLD.device)
            return masked_mean_pool(hidden_NLD, mask_NL, self.pool_size**2)[0]
        grid = hidden_NLD.transpose(1, 2).unflatten(2, self.grid_size)
        # A group at the border is the mean of the real tokens in it.
        grid = nn.functional.avg_pool2d(grid, self.pool_size, ceil_mode=True, count_include_pad=False)
        return grid.flatten(2).transpose(1, 2)


class AudioConnector(nn.Module):
    """Audio tokens to decoder inputs: `pool_size` neighbours in time are averaged."""

    def __init__(self, config: ChorusAudioConfig, hidden_size: int):
        super().__init__()
        self.pool_size = config.pool_size
        self.projector = Projector(config.hidden_size, hidden_size)

    def forward(self, hidden_NLD: torch.Tensor, mask_NL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Projects the tokens of each clip.

        Args:
            hidden_NLD: `(clips, tokens, encoder width)`.
            mask_NL: bool `(clips, tokens)`, True on real tokens.

        Returns:
            features `(clips, ceil(tokens / pool_size), hidden_size)`, zero where padded, and their bool mask.
        """
        pooled_NPD, mask_NP = masked_mean_pool(hidden_NLD, mask_NL, self.pool_size)
        # The projector has biases, so zeros do not stay zeros.
        return self.projector(pooled_NPD).masked_fill(~mask_NP[..., None], 0.0), mask_NP


def masked_mean_pool(
    hidden_NLD: torch.Tensor, mask_NL: torch.Tensor, pool_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Means over groups of `pool_size` neighbours, over real tokens only.

    Returns:
        `(N, ceil(L / pool_size), D)`, zero for a group without a real token, and which groups have one.
    """
    missing = -hidden_NLD.shape[1] % pool_size
    hidden_NLD = hidden_NLD.masked_fill(~mask_NL[..., None], 0.0)
    groups = nn.functional.pad(hidden_NLD, (0, 0, 0, missing)).unflatten(1, (-1, pool_size))
    count_NP = nn.functional.pad(mask_NL, (0, missing)).unflatten(1, (-1, pool_size)).sum(dim=2)
    # The mean of the real tokens, also at the end of a clip: it gives the same features alone and in any batch.
    return groups.sum(dim=2) / count_NP.clamp(min=1)[..., None], count_NP > 0
