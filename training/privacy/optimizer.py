"""Optimizers that see clipped sums of rows' gradients under noise, and nothing else.

Unusual here:
- rows come one after the other, each with its own gradient of every trained parameter, so what Opacus computes from
  hooks on known kinds of layers is not needed, and memory does not grow with the rows;
- the noise is drawn from a generator that the operating system seeds and no checkpoint holds. A run's `seed` stands in
  its card: noise that followed from it could be taken off again.
"""

import secrets
from collections.abc import Callable

import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor


def secret_generator(device: torch.device | str = "cpu", seed: int | None = None) -> torch.Generator:
    """A generator whose numbers nobody can draw again.

    Args:
        seed: for tests; a run with it is not private.
    """
    return torch.Generator(device).manual_seed(secrets.randbits(63) if seed is None else seed)


class PrivateOptimizer(DPOptimizer):
    """Opacus' optimizer with Gaussian noise, for rows that are added one by one, see `add_row`.

    Args:
        optimizer: what takes the step.
        max_grad_norm: to which norm each row's gradient, over all parameters of the optimizer, is clipped.
        expected_rows: by which the sum is divided: rows of an update on average, whatever it took.
        noise_multiplier: may be set later, before the first step.
        seed: of the noise, for tests.
    """

    order = 2.0

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        max_grad_norm: float,
        expected_rows: float,
        noise_multiplier: float | None = None,
        seed: int | None = None,
    ):
        device = optimizer.param_groups[0]["params"][0].device
        super().__init__(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            expected_batch_size=expected_rows,
            generator=secret_generator(device, seed),
            # Sums of four draws: single floating-point draws can be told from their last bits (arXiv 2107.10138).
            secure_mode=True,
        )
        self.num_broken_rows = 0

    @property
    def accumulated_iterations(self) -> int:
        """By which Opacus divides besides; `expected_rows` counts all micro-batches."""
        return 1

    @torch.no_grad()
    def add_row(self) -> None:
        """Clip the gradients of one row, which lie in `grad`, add them to the sum, and clear them."""
        gradients = {p: p.grad for p in self.params if p.grad is not None}
        if not gradients:
            return
        norms = [torch.linalg.vector_norm(g, self.order, dtype=torch.float32) for g in gradients.values()]
        norm = torch.linalg.vector_norm(torch.stack(norms), self.order)
        # A row that breaks adds nothing: a NaN in the sum would tell of it, and end the run.
        is_whole = bool(torch.isfinite(norm))
        self.num_broken_rows += not is_whole
        factor = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        for parameter, gradient in gradients.items():
            if is_whole:
                clipped = gradient.mul_(factor.to(gradient.dtype))
                parameter.summed_grad = (
                    clipped if parameter.summed_grad is None else parameter.summed_grad.add_(clipped)
                )
            parameter.grad = None

    def pre_step(self, closure: Callable[[], float] | None = None) -> bool:
        for parameter in self.params:
            # An update without rows takes its noise all the same: otherwise it would tell that there were none.
            if parameter.summed_grad is None:
                parameter.summed_grad = torch.zeros_like(parameter)
        self.add_noise()
        self.scale_grad()
        if self.step_hook is not None:
            self.step_hook(self)
        for parameter in self.params:
            parameter.summed_grad = None
        return True

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter in self.params:
            parameter.summed_grad = None
        self.original_optimizer.zero_grad(set_to_none)


class LaplaceOptimizer(PrivateOptimizer):
    """With Laplace noise of scale `noise_multiplier * max_grad_norm`; gradients are clipped in the L1 norm."""

    order = 1.0

    @torch.no_grad()
    def add_noise(self) -> None:
        scale = self.noise_multiplier * self.max_grad_norm
        for parameter in self.params:
            parameter.grad = parameter.summed_grad + scale * self._laplace(parameter.summed_grad)

    def _laplace(self, like: Tensor) -> Tensor:
        """Noise of scale 1: the difference of two exponential variables."""
        draws = [torch.empty_like(like).exponential_(generator=self.generator) for _ in range(2)]
        return draws[0] - draws[1]


OPTIMIZERS: dict[str, type[PrivateOptimizer]] = {"gaussian": PrivateOptimizer, "laplace": LaplaceOptimizer}
