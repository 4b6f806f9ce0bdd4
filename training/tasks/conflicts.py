"""Gradients of each task by itself: their cosines by bank, and one step that respects all of them.

torchjd turns the Gramian of the tasks' gradients (their scalar products) into a weight for each:

- `pcgrad` (Yu et al. 2020, arXiv 2001.06782) takes from a gradient what points against another one;
- `aligned_mtl` (Senushkin et al. 2023, arXiv 2305.19000) evens the singular values of all gradients;
- `upgrad` (Quinton and Rey 2024, arXiv 2406.16232) projects onto what no task objects to.

Unusual here:
- a tensor that the gradient of one task alone reaches (a bank of a modality that only it shows) belongs to that task:
  it takes no part in the Gramian, and its gradient is the plain one. Which ones these are is seen at each step;
- weights are taken once for a step, from sums over its micro-batches and ranks;
- losses of no task (balance of routers, further objectives) are added afterwards, as they are.

A run keeps the gradients of K tasks: K times the memory of the trained parameters. Each task costs a backward pass.

Shape suffixes: K tasks, P of them present in a step, N values of a parameter.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor, nn

from chorus_moe.surgery.parts import bank_tensor
from chorus_moe.training.tasks.plan import RESOLVED

# Tensors that belong to no bank; the hyphen keeps a bank from having this name.
ELSEWHERE = "outside-banks"


def step_weights(method: str, gramian_PP: Tensor, seed: int) -> Tensor:
    """`(P,)`: what the gradient of each task weighs in the step; 1 for all where they do not conflict.

    Args:
        method: one of `RESOLVED`.
        gramian_PP: float64 scalar products of the tasks' gradients, none of which is zero.
        seed: PCGrad goes through the others in random order; all ranks and a resumed run draw the same.
    """
    from torchjd.aggregation import AlignedMTLWeighting, PCGradWeighting, UPGradWeighting

    # torchjd's default is a mean, beside which the losses of no task would weigh more; this is the sum.
    preference_P = torch.ones(len(gramian_PP), dtype=gramian_PP.dtype, device=gramian_PP.device)
    if method == "pcgrad":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return PCGradWeighting()(gramian_PP)
    weighting = AlignedMTLWeighting if method == "aligned_mtl" else UPGradWeighting
    return weighting(preference_P)(gramian_PP)


class TaskGradients:
    """Collects the tasks' gradients of a step and writes their sum, weighed by the method, into `.grad`.

    Args:
        names: the tasks.
        parameters: what is trained, by name.
        method: one of `RESOLVED`, or "measure" for a plain sum.
        seed: of the run.
    """

    def __init__(self, names: Sequence[str], parameters: Mapping[str, nn.Parameter], method: str, seed: int):
        self.names, self.parameters, self.method, self.seed = names, dict(parameters), method, seed
        self._gradients: list[list[Tensor | None]] = [[None] * len(names) for _ in self.parameters]
        self._cosines: dict[str, list[float]] = {}

    def add(self, losses_K: Tensor, present: Sequence[bool]) -> None:
        """Differentiate each task's loss; the graph stays, for the losses of no task."""
        parameters = list(self.parameters.values())
        for task, loss in enumerate(losses_K):
            if not present[task]:
                continue
            found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            for slots, gradient in zip(self._gradients, found, strict=True):
                if gradient is not None:
                    old = slots[task]
                    slots[task] = gradient if old is None else old + gradient

    def settle(self, step: int, average: Callable[[Tensor], Tensor] | None = None) -> None:
        """Add the step's gradient to `.grad`, and begin anew.

        Args:
            step: its number.
            average: takes the mean of a tensor over the ranks; None for one process.
        """
        if average is not None:
            self._average(average)
        gramians = torch.stack([self._gramian(slots) for slots in self._gradients])
        reached = gramians.diagonal(dim1=1, dim2=2) > 0
        is_shared = reached.sum(dim=1) > 1
        weight_K = self._weights(gramians[is_shared].sum(dim=0), step)
        self._note_cosines(gramians)
        for parameter, slots, shared in zip(self.parameters.values(), self._gradients, is_shared.tolist(), strict=True):
            for task, gradient in enumerate(slots):
                if gradient is None:
                    continue
                part = gradient * weight_K[task].to(gradient.dtype) if shared else gradient
                parameter.grad = part if parameter.grad is None else parameter.grad + part
        self._gradients = [[None] * len(self.names) for _ in self.parameters]

    def _average(self, average: Callable[[Tensor], Tensor]) -> None:
        # All ranks exchange the same tensors, also those of a task or a bank that one of them has not met.
        for parameter, slots in zip(self.parameters.values(), self._gradients, strict=True):
            for task, gradient in enumerate(slots):
                slots[task] = average(torch.zeros_like(parameter) if gradient is None else gradient)
            parameter.grad = average(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)

    def _gramian(self, slots: Sequence[Tensor | None]) -> Tensor:
        """`(K, K)` float64 on the CPU."""
        known = [task for task, gradient in enumerate(slots) if gradient is not None]
        gramian_KK = torch.zeros(len(slots), len(slots), dtype=torch.float64)
        if known:
            rows_PN = torch.stack([slots[task].flatten().float() for task in known])  # type: ignore[union-attr]
            gramian_KK[torch.tensor(known)[:, None], torch.tensor(known)] = (rows_PN @ rows_PN.T).double().cpu()
        return gramian_KK

    def _weights(self, gramian_KK: Tensor, step: int) -> Tensor:
        weight_K = torch.ones(len(self.names), dtype=torch.float64)
        present = (gramian_KK.diagonal() > 0).nonzero().squeeze(1)
        # What is not finite stays so in the sum, for the scaler of float16 and the guard of steps to see.
        if self.method in RESOLVED and len(present) > 1 and torch.isfinite(gramian_KK).all():
            # A step of its own for each seed; torch takes no seeds beyond 64 bits.
            seed = (self.seed * 1_000_003 + step) % 2**63
            weight_K[present] = step_weights(self.method, gramian_KK[present][:, present], seed)
        return weight_K

    def _note_cosines(self, gramians: Tensor) -> None:
        owners = [bank_tensor(name) for name in self.parameters]
        parts = [owner.bank if owner else ELSEWHERE for owner in owners]
        for part in dict.fromkeys(parts):
            gramian_KK = gramians[torch.tensor([other == part for other in parts])].sum(dim=0)
            norm_K = gramian_KK.diagonal().sqrt()
            for a, b in combinations(range(len(self.names)), 2):
                product = float(norm_K[a] * norm_K[b])
                if 0 < product < torch.inf:
                    name = f"grad_cosine/{part}/{self.names[a]}-{self.names[b]}"
                    self._cosines.setdefault(name, []).append(float(gramian_KK[a, b]) / product)

    def take_cosines(self) -> dict[str, float]:
        """Name in the log -> mean over the steps since the last call in which both tasks reached the bank."""
        found = {name: sum(values) / len(values) for name, values in self._cosines.items()}
        self._cosines = {}
        return found
