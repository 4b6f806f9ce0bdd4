"""What can be done to the banks of a model after it was built: a method an operation, the work in sibling files.

Every operation changes weights and configuration together, so that a saved model loads as it stands, and returns an
[`OperationReport`]. It is refused before anything is changed while adapters are active.
"""

import os
from collections.abc import Mapping
from typing import Any

from torch import nn

from .expert_conversion import export_experts, fuse_experts, unfuse_experts
from .expert_merging import merge_experts
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

    def merge_experts(
        self,
        bank: str,
        num_experts: int | Mapping[int, int],
        usage: ExpertScores | None = None,
        similarity: str = "weights",
    ) -> OperationReport:
        """Merge the experts of a bank that are most alike until so many are left; see `expert_merging`.

        Outputs change; a short training afterwards wins back most of what is lost.

        Args:
            num_experts: how many are left in each layer of the bank, or layer -> how many.
            usage: layer -> bank -> `(E,)`, how often each expert was chosen; all alike if None.
            similarity: what makes two experts alike: their `weights` after alignment, or the rows of the `router`,
                which is quick where there are very many experts.

        Raises:
            ValueError: adapters are active, an unknown bank or layer, counts that are missing or of another number, or
                a number that no bank can have. Nothing has been changed then.
            ImportError: scipy is not installed.
        """
        return merge_experts(self._as_module(), bank, num_experts, usage, similarity)

    def unfuse_experts(self) -> OperationReport:
        """Make every expert a feed-forward of linear layers, with the same weights (`experts_layout="linear"`).

        The weights are the same bits, and `fuse_experts` gives back the same model. Outputs agree to rounding: the two
        halves of the first product are two products now.

        Raises:
            ValueError: adapters are active, or the experts are linear layers already.
        """
        return unfuse_experts(self._as_module())

    def fuse_experts(self) -> OperationReport:
        """Undo `unfuse_experts`: stack the experts of each bank (`experts_layout="fused"`), which is far quicker.

        Raises:
            ValueError: adapters are active, a weight is quantised, or the experts are stacked already.
        """
        return fuse_experts(self._as_module())

    def export_experts(self, folder: str | os.PathLike[str], max_shard_bytes: int = 5_000_000_000) -> list[str]:
        """Write a checkpoint with one tensor an expert, as other engines name them, shard by shard.

        Names end in `mlp.banks.{bank}.experts.{e}.gate_proj.weight`, `up_proj` and `down_proj`, as those of Qwen3-MoE
        checkpoints do below `mlp`. `from_pretrained` reads the folder as a model with `experts_layout="linear"`, of
        which `fuse_experts` makes the same as this one. Besides this model memory holds one shard.

        Returns:
            The names of the files that hold weights.

        Raises:
            ValueError: adapters are active.
        """
        return export_experts(self._as_module(), folder, max_shard_bytes)

    def _as_module(self) -> Any:
        assert isinstance(self, nn.Module)
        return self
