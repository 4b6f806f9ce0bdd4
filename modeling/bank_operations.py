"""What can be done to the banks of a model after it was built: a method an operation, the work in sibling files.

Every operation changes weights and configuration together, so that a saved model loads as it stands, and returns an
[`OperationReport`]. It is refused before anything is changed while adapters are active.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from .bank_exchange import load_bank, save_bank
from .bank_growth import add_bank, add_experts, set_closed
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

    def freeze(self, *names: str) -> OperationReport:
        """Keep parts from being trained.

        Args:
            names: "all", a bank, "router:BANK", "experts:BANK", "bank_gates", "attention", "cross_modal",
                "shared_experts", "dense", "vision_tower", "audio_tower", "connectors", "vision_connector",
                "audio_connector", "embeddings", "norms", "head".

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

    def _as_module(self) -> nn.Module:
        assert isinstance(self, nn.Module)
        return self
