"""Banks of several owners in one model, whose gates are then trained on public rows; and a bank that is withdrawn.

As FlexOlmo does for text (Shi et al. 2025, arXiv 2507.07024): each owner trains a bank of its own on the common base,
and the rows never meet. Unusual here:
- the files of the banks are kept beside the model, so that one can be taken out again;
- a model without a bank is gathered anew from the other files, its gates trained again by the same recipe. Closing the
  bank would leave its mark: the gates of the others were trained beside it.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import AutoModelForMultimodalLM

from chorus_moe.surgery import close_bank, load_bank, open_bank
from chorus_moe.surgery.parts import decoder_of
from chorus_moe.training.loading import load_processor
from chorus_moe.training.recipe import Recipe, build_recipe
from chorus_moe.training.saving import held_model, saved_whole
from chorus_moe.training.train import run_training
from chorus_moe.training.yaml_files import read_yaml

RECORD, BANKS = "federated_banks.json", "owned_banks"


def gather_banks(
    base: str | Path, files: Sequence[str | Path], out: str | Path, gates: dict[str, Any] | None = None
) -> list[str]:
    """Save a model of a base and the banks of several owners.

    Args:
        base: the model that all banks were trained on: a folder or a Hub id.
        files: of `save_bank`, banks with a gate of their own, as `add_bank` makes them.
        out: a new folder.
        gates: sections of a recipe with public rows, by which the gates of the banks, and nothing else, are trained;
            None leaves them as their owners have trained them.

    Returns:
        The names of the banks.

    Raises:
        ValueError: no file, a folder that holds a model, a bank that the model has already or that has no gate of its
            own, or as `load_bank`, with both hashes for a bank of another base.
    """
    target = Path(out)
    if not files:
        raise ValueError("gather: no file of a bank is given")
    if held := held_model(target):
        raise ValueError(f"gather: {target} holds a model ({', '.join(held[:3])}); choose another folder")
    model, names = AutoModelForMultimodalLM.from_pretrained(base), list[str]()
    decoder, processor = decoder_of(model), load_processor(str(base))
    for file in files:
        before = set(decoder.banks)
        report = load_bank(model, file)
        name = report.subject
        if name in before:
            raise ValueError(f"gather: {file} holds a bank {name!r}, which is there already; owners choose other names")
        if not decoder.banks[name].has_own_gate:
            raise ValueError(f"gather: bank {name!r} of {file} has no gate of its own; owners begin with `add_bank`")
        # Closed, it is no part of the base of the next one, which knows nothing of it.
        close_bank(model, name)
        names.append(name)
    for name in names:
        open_bank(model, name)
    with TemporaryDirectory() as joined:
        model.save_pretrained(joined)
        processor.save_pretrained(joined)
        if gates is None:
            with saved_whole(target) as aside:
                shutil.copytree(joined, aside, dirs_exist_ok=True)
        else:
            run_training(_gate_recipe(gates, joined, names, target))
    (target / BANKS).mkdir()
    for name, file in zip(names, files, strict=True):
        shutil.copyfile(file, target / BANKS / f"{name}.safetensors")
    record = {"base": str(base), "banks": names, "gates": gates}
    (target / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return names


def _gate_recipe(gates: dict[str, Any], model: str, names: Sequence[str], out: Path) -> Recipe:
    found = build_recipe(gates, "gather: the recipe of the gates")
    still = [f"{part}:{name}" for name in names for part in ("experts", "router")]
    parts = replace(found.parts, train=list(names), freeze=still)
    found.training.output_dir = str(out)
    return found._replace(model=replace(found.model, model_name_or_path=model), parts=parts)


def withdraw_bank(folder: str | Path, name: str, out: str | Path) -> list[str]:
    """Save the model of a folder of `gather_banks` as if a bank had never been in it.

    Its answers are, bit for bit, those of a model that was gathered without the bank on the same machine. The old
    folder is left: whoever withdraws will want it deleted.

    Returns:
        The names of the banks that are left; the base itself if there is none.

    Raises:
        ValueError: no folder of `gather_banks`, or a bank that it does not hold.
    """
    path = Path(folder) / RECORD
    if not path.is_file():
        raise ValueError(f"withdraw: {folder} was not written by `gather`: {RECORD} is missing")
    record = json.loads(path.read_text(encoding="utf-8"))
    if name not in record["banks"]:
        raise ValueError(f"withdraw: {folder} holds the banks {record['banks']}, not {name!r}")
    left = [bank for bank in record["banks"] if bank != name]
    if not left:
        raise ValueError(f"withdraw: {name!r} is the only bank; without it the model is its base, {record['base']}")
    files = [Path(folder) / BANKS / f"{bank}.safetensors" for bank in left]
    return gather_banks(record["base"], files, out, record["gates"])


def read_gates(recipe: str | Path | None) -> dict[str, Any] | None:
    """The sections of a recipe's file. Raises ValueError for a file that is none."""
    if recipe is None:
        return None
    found = read_yaml(recipe)
    if not isinstance(found, dict):
        raise ValueError(f"{recipe}: expected the sections of a recipe, found {found!r:.60}")
    return found
