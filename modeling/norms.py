"""Root mean square normalisation in few operations: on the CPU, `torch.rms_norm` takes twice the time on one token."""

import torch
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension (arXiv 1910.07467), the mean at least in float32.

    As in Llama, the normalised states return to their own dtype before the weight multiplies them.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        norm = torch.linalg.vector_norm(hidden_states, dim=-1, keepdim=True, dtype=dtype)
        scale = torch.addcmul(norm.new_full((), self.eps), norm, norm, value=1 / hidden_states.shape[-1]).rsqrt()
        normed = (hidden_states * scale).to(hidden_states.dtype)
        if torch.is_grad_enabled() or normed.dtype != self.weight.dtype:
            return normed * self.weight
        return normed.mul_(self.weight)
