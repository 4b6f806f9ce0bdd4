"""What can be done to a model after it was built, to its banks above all: a method an operation, the work elsewhere.

Every operation changes weights and configuration together, so that a saved model loads as it stands, and returns an
[`OperationReport`]. It is refused before anything is changed while adapters are active.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from .bank_exchange import load_bank, save_bank
from .bank_growth import add_bank, add_experts, set_closed
from .depth_growth import add_exits, add_skip_gates
from .expert_conversion import export_experts, fuse_experts, unfuse_experts
from .expert_merging import merge_experts
from .expert_pruning import ExpertScores, Keep, prune_experts
from .modality_growth import add_modality
from .model_parts import set_trained
from .operation_report import OperationReport


class BankOperations:
    """Operations of a model of any head."""

    def add_bank(
        self,
        name: str,
        modalities: Sequence[str] | None = None,
        num_experts: int | list[int] | None = None,
        **settings: Any,
    ) -> OperationReport:
        """Add an expert bank with a gate of its own. Outputs stay as they are, bit for bit, until it is trained.

        Train it alone with `freeze("all")` and `unfreeze(name)`. The random numbers are torch's.

        Args:
            name: a name that no bank has.
            modalities: whose tokens may enter; those of the bank's name if it is one, else all.
            num_experts: from the configuration if None, as all other sizes.
            settings: any other field of [`ExpertBankConfig`], such as `layers` or `router`.

        Raises:
            ValueError: adapters are active, the name is taken, or no bank can be built from the settings.
        """
        return add_bank(self._as_module(), name, modalities, num_experts, settings)

    def add_experts(self, bank: str, num_experts: int | Mapping[int, int], **settings: Any) -> OperationReport:
        """Add experts to a bank. Outputs stay as they are, bit for bit, until the new experts are trained.

        They form a bank of their own, `{bank}_2` (then `_3`, ...), open to the same tokens, in the same layers and with
        the settings of the old one, beside which their own gate weighs them. Each token visits, besides the experts of
        the old bank, the best of the new ones.

        Args:
            num_experts: how many in each layer of the bank, or layer -> how many.
            settings: fields of [`ExpertBankConfig`] that are to differ from the old bank's.

        Raises:
            ValueError: adapters are active, an unknown bank, a layer without it, or a number that no bank can have.
        """
        return add_experts(self._as_module(), bank, num_experts, settings)

    def add_modality(
        self, modality: str, tower: Any, token_id: int | None = None, bank: Mapping[str, Any] | None = None
    ) -> OperationReport:
        """Add an encoder, its connector and its placeholder token. Outputs for other inputs stay as they are.

        The keys and values of the modality in the cross-modal layers start as those of text.

        Args:
            modality: "image" or "audio".
            tower: a configuration of the encoder (object or dictionary), or a trained encoder.
            token_id: the placeholder; a new token at the end of the vocabulary if None. A vocabulary that is too small
                grows by rows that are the mean of all rows.
            bank: settings of a bank for the modality, named after it. Without settings one is added if no bank takes
                the modality.

        Raises:
            ValueError: adapters are active, the model has that encoder or no place for one, the widths or the token do
                not fit.
        """
        return add_modality(self._as_module(), modality, tower, token_id, bank)

    def add_exits(self, layers: Sequence[int], exit_loss_coef: float | None = None) -> OperationReport:
        """Add exits to a classifier or a generative model. Outputs stay as they are, bit for bit.

        In a classifier each new exit has a head, which starts with copies of the final norm and of `score`: as if the
        model ended there. Train them alone with `freeze("all")` and `unfreeze("exits")`. Where `config.exit_thresholds`
        are set a new exit gets 1, at which none leaves; `calibrate_exits` finds better ones. In a generative model
        exits share the final norm and the head, so that only the configuration changes.

        Args:
            layers: after how many layers each stands, besides the exits that the model has.
            exit_loss_coef: weight of the exits in training; if None that of the exits before, 1 if there were none.

        Raises:
            ValueError: adapters are active, the head knows no exits, or no layers, one that has an exit already, or one
                after which none can stand. Nothing has been changed then.
        """
        return add_exits(self._as_module(), layers, exit_loss_coef)

    def add_skip_gates(self, layers: Sequence[int], skip_budget: float | None = None) -> OperationReport:
        """Add gates that let tokens pass the feed-forward of a layer by. New gates are open for every token: outputs
        stay as they are, bit for bit, at any `skip_threshold` below 0.73. Train them alone with `freeze("all")` and
        `unfreeze("skip_gates")`.

        Args:
            layers: indices of the layers, besides those that have a gate.
            skip_budget: the share of the tokens of all these layers that training lets pass; the model's own if None.

        Raises:
            ValueError: adapters are active, no layers, one that has a gate already or that the model does not have, or
                no budget between 0 and 1. Nothing has been changed then.
        """
        return add_skip_gates(self._as_module(), layers, skip_budget)

    def freeze(self, *names: str) -> OperationReport:
        """Keep parts from being trained.

        Args:
            names: "all", a bank, "router:BANK", "experts:BANK", "bank_gates", "attention", "cross_modal",
                "shared_experts", "dense", "vision_tower", "audio_tower", "connectors", "vision_connector",
                "audio_connector", "embeddings", "norms", "head" (with its exits), "exits", "skip_gates".

        Returns:
            A report with the trainable parameters before and after. A frozen router's balance bias rests, too.

        Raises:
            ValueError: adapters are active, or a part that the model does not have, with the nearest name.
        """
        return set_trained(self._as_module(), names, False)

    def unfreeze(self, *names: str) -> OperationReport:
        """Train parts; names and errors as in `freeze`."""
        return set_trained(self._as_module(), names, True)

    def close_bank(self, name: str) -> OperationReport:
        """Pass a bank by in every call from now on, also after saving and loading, as if it were not there; `forward`
        and `generate` take `closed_banks` for a single call.

        Raises:
            ValueError: an unknown bank.
        """
        return set_closed(self._as_module(), name, True)

    def open_bank(self, name: str) -> OperationReport:
        """Undo `close_bank`."""
        return set_closed(self._as_module(), name, False)

    def save_bank(self, name: str, path: str | os.PathLike[str]) -> OperationReport:
        """Write one bank to a small safetensors file, with its configuration and the hash of its base.

        Raises:
            ValueError: adapters are active, or an unknown bank.
        """
        return save_bank(self._as_module(), name, path)

    def load_bank(self, path: str | os.PathLike[str], strict_base: bool = True) -> OperationReport:
        """Add the bank of a file, or replace the bank of that name.

        Args:
            strict_base: refuse a bank that was trained on top of other weights; with False it is only a warning.

        Raises:
            ValueError: adapters are active, the file is none of `save_bank`, a shape disagrees (both are named), or the
                base is another (both hashes are named). Nothing has been changed then.
        """
        return load_bank(self._as_module(), path, strict_base)

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
