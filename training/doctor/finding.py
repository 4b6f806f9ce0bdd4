"""What a check of the doctor found, and how two outputs are compared."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

VERDICTS = ("ok", "warning", "failed", "skipped")
# Differences of two ways to compute the same, in units of the logits' own spread. Sums in another order differ by some
# roundings: worst seen 6e-7 in float32. In 16 bits a rounding also moves a token to its next best expert now and then,
# which is a step: 0.09 seen in bfloat16 with fresh routers of 16 experts in 16 layers. Only float32 is sharp.
TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 0.25}
ROUNDING = "In 16 bits, first run the check with --dtype float32: what passes there is a rounding"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The result of one check.

    Args:
        verdict: one of `VERDICTS`.
        explanation: what was compared, and where it is worst.
        measured, tolerance: the number and its limit; None where there is none.
        at_least: whether `tolerance` is a lower limit.
        cure: what to do; empty where nothing needs doing.
        name: of the check; whoever runs it fills it in.
    """

    verdict: str
    explanation: str
    measured: float | None = None
    tolerance: float | None = None
    at_least: bool = False
    cure: str = ""
    name: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Values for JSON, which knows no infinity: there, `measured` is None."""
        values = asdict(self)
        if self.measured is not None and not math.isfinite(self.measured):
            values["measured"] = None
        return values


def skipped(reason: str) -> Finding:
    return Finding(verdict="skipped", explanation=reason)


def counted(faults: list[str], passed: str, cure: str, warnings: Mapping[str, str] | None = None) -> Finding:
    """The finding of a check that lists what is wrong; nothing may be.

    Args:
        warnings: warning -> its cure. They count only where nothing failed.
    """
    if faults:
        return Finding(verdict="failed", explanation=listed(faults), measured=len(faults), tolerance=0, cure=cure)
    if warnings:
        explanation, cures = f"{passed}. But {listed(list(warnings))}", dict.fromkeys(warnings.values())
        return Finding(verdict="warning", explanation=explanation, measured=0, tolerance=0, cure=". ".join(cures))
    return Finding(verdict="ok", explanation=passed, measured=0, tolerance=0)


def compared(differences: Iterable[tuple[float, str]], tolerance: float, what: str, cure: str) -> Finding:
    """The finding of a check whose outputs should agree: the worst of the differences decides.

    Args:
        differences: numbers from [`difference`], each with what was compared.
        what: what should agree.
    """
    found = list(differences)
    worst, where = max(found)
    is_fine = worst <= tolerance
    # Only a 16-bit tolerance is that wide.
    if tolerance > TOLERANCES[torch.float32]:
        cure = f"{ROUNDING}. {cure}"
    return Finding(
        verdict="ok" if is_fine else "failed",
        explanation=f"{what}, {len(found)} comparisons; largest difference: {where}",
        measured=worst,
        tolerance=tolerance,
        cure="" if is_fine else cure,
    )


def difference(found: Tensor, expected: Tensor) -> float:
    """Root mean square of `found - expected`, as a share of the standard deviation of `expected`; infinite if either
    holds NaN or infinity."""
    # In half precision the squares of small gaps would vanish.
    found, expected = found.detach().double(), expected.detach().double()
    gap = (found - expected).square().mean().sqrt()
    # Logits that are all equal have no spread; the smallest float32 keeps the ratio defined.
    share = float(gap / expected.std().clamp(min=torch.finfo(torch.float32).tiny))
    # NaN would pass every comparison with a limit as false, or be lost in `max`.
    return share if math.isfinite(share) else math.inf


def listed(items: Sequence[str], limit: int = 5, separator: str = "; ") -> str:
    """The first items in one line, and the number of others."""
    more = f"{separator}and {len(items) - limit} more" if len(items) > limit else ""
    return separator.join(items[:limit]) + more
