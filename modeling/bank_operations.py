"""What can be done to the banks of a model after it was built: a method an operation, the work in sibling files.

Every operation changes weights and configuration together, so that a saved model loads as it stands, and returns an
[`OperationReport`]. It is refused before anything is changed while adapters are active.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from .expert_pruning import ExpertScores, Keep, prune_experts
from .operation_report import OperationReport


class BankOperations:
    """Operations of a model of any head."""

    def prune_experts(self, keep: Mapping[str, Keep], scores: ExpertScores) -> OperationReport:
        """Keep the experts with the highest scores of some banks, in each layer by itself.

        Outputs are the same, bit for bit, where no token chose what is taken away; the report names the settings of a
        bank that prevent this. `chorus_moe.training.expert_saliency` measures use and saliency.

        Args:
            keep: bank -> how many stay: a number, a fraction of the experts (a float), or "used" (all with a score
                above zero, and as many as a token visits at least); or layer -> one of these, for some layers.
            scores: layer -> bank -> `(E,)`. Ties go to the lower index. Of a bank with groups, as many stay in each.

        Raises:
            ValueError: adapters are active, an unknown bank or layer, scores that are missing or of another number, or
                a number that no bank can have. Nothing has been changed then.
        """
        return prune_experts(self._as_module(), keep, scores)

    def _as_module(self) -> Any:
        assert isinstance(self, nn.Module)
        return self
