"""The recipe of `chorus-moe compress`: which model, down to how many bytes, and the steps in their order.

In YAML a step is a mapping with its name: `- prune: {experts: {text: 0.5}}`. Names that nobody knows are refused.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from chorus_moe.surgery.experts_merge import SIMILARITIES
from chorus_moe.surgery.experts_prune import Keep
from chorus_moe.surgery.quantization_formats import Groups
from chorus_moe.training.recipe import SECTIONS, DataArguments, build_recipe, field_names, nearest
from chorus_moe.training.yaml_files import read_yaml

SCORES = ("saliency", "uses")
# What a distil step may say; model, data and folder are the recipe's, and an adapter would not be a smaller model.
DISTIL_SECTIONS = ("distillation", "training", "objectives", "parts", "guards", "routing")
CHOSEN_HERE = ("output_dir", "resume_from_checkpoint", "overwrite_output_dir", "push_to_hub")
UNITS = {"": 1, "b": 1, "kb": 1_000, "mb": 10**6, "gb": 10**9, "tb": 10**12}
AMOUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)", flags=re.IGNORECASE)


@dataclass(frozen=True)
class Prune:
    """Experts by what they add to the stream, and heads, units and layers by what the loss would miss.

    Args:
        experts: bank -> how many stay, as `keep` of `prune_experts`.
        dense: group -> how many stay, as `keep` of `prune_dense`.
        by: "saliency" or "uses" of experts, see `training/routing/saliency.py`.
        rows: rows of the training data that are read for the scores, from the first.
    """

    name: ClassVar[str] = "prune"
    experts: Mapping[str, Keep] = field(default_factory=dict)
    dense: Mapping[str, int | float] = field(default_factory=dict)
    by: str = SCORES[0]
    rows: int = 256


@dataclass(frozen=True)
class Merge:
    """Experts that are most alike become one, weighted by use.

    Args:
        banks: bank -> how many are left in each layer, or layer -> how many.
        similarity: as in `merge_experts`.
        rows: as in `Prune`.
    """

    name: ClassVar[str] = "merge"
    banks: Mapping[str, int | Mapping[int, int]] = field(default_factory=dict)
    similarity: str = SIMILARITIES[0]
    rows: int = 256


@dataclass(frozen=True)
class Distil:
    """Training with the uncompressed model as teacher.

    Args:
        sections: of a training recipe, see `DISTIL_SECTIONS`.
    """

    name: ClassVar[str] = "distil"
    sections: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Quantize:
    """Fewer bits a weight.

    Args:
        groups: as in `quantize`.
    """

    name: ClassVar[str] = "quantize"
    groups: Groups


Step = Prune | Merge | Distil | Quantize
STEPS: dict[str, type] = {kind.name: kind for kind in (Prune, Merge, Distil, Quantize)}


@dataclass(frozen=True)
class CompressionRecipe:
    """A model, where its smaller one goes, and how it is made.

    Args:
        model: folder or Hub id of a generative model without adapter.
        output_dir: a new folder.
        steps: in their order; none for those that the target asks for.
        target_bytes: of the weights on disk, a number (int) or a share of the model's (float below 1).
        data: section of a training recipe: training rows for scores and distillation, evaluation rows for accuracy.
        batch_size, max_new_tokens: of the evaluation.
        keep_steps: the models between steps stay in `output_dir/_steps`.
    """

    model: str
    output_dir: str
    steps: tuple[Step, ...] = ()
    target_bytes: int | float | None = None
    data: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int = 16
    max_new_tokens: int = 64
    seed: int = 0
    keep_steps: bool = False

    def data_arguments(self) -> DataArguments:
        """The section `data`, typed."""
        return build_recipe({"data": self.data}, "compress").data

    def to_dict(self) -> dict[str, Any]:
        """As YAML says it."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        given = {name: value for name, value in values.items() if value not in (None, (), {})}
        return given | {"steps": [step_values(step) for step in self.steps]}


def step_values(step: Step) -> dict[str, Any]:
    """A step as YAML says it."""
    if isinstance(step, Quantize):
        return {step.name: step.groups}
    if isinstance(step, Distil):
        return {step.name: dict(step.sections)}
    values = {item.name: getattr(step, item.name) for item in fields(step)}
    return {step.name: {name: value for name, value in values.items() if value != {}}}


def read_compression(path: str | Path | None, given: Mapping[str, Any]) -> CompressionRecipe:
    """A recipe from a YAML file and what the command line says, which wins.

    Raises:
        ValueError: an unknown name (with the nearest one), a value of another type, no model or folder, or neither
            steps nor a target.
    """
    where, values = ("compress", {}) if path is None else (str(path), read_yaml(path))
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: expected a mapping with {', '.join(known_names())}; found {values!r:.60}")
    check_names(where, values, known_names())
    data = values.get("data") or {}
    if not isinstance(data, Mapping):
        raise ValueError(f"{where}: section 'data' must be a mapping, found {data!r:.60}")
    merged = {**values, **{name: value for name, value in given.items() if value is not None and name != "data"}}
    merged["data"] = {**data, **{name: value for name, value in given.get("data", {}).items() if value is not None}}
    merged["steps"] = read_steps(where, merged.get("steps") or ())
    for name in ("model", "output_dir"):
        if not isinstance(merged.get(name), str):
            option = {"model": "MODEL", "output_dir": "--out"}[name]
            raise ValueError(f"{where}: {name} ({option}) is missing" if name not in merged else f"{where}: {name}?")
    for name in ("batch_size", "max_new_tokens"):
        if name in merged:
            check_count(f"{where}: {name}", merged[name])
    for name, kind in (("seed", int), ("keep_steps", bool)):
        if name in merged and type(merged[name]) is not kind:
            raise ValueError(f"{where}: {name}={merged[name]!r} is no {kind.__name__}")
    if merged.get("target_bytes") is not None:
        merged["target_bytes"] = read_target(merged["target_bytes"])
    if not merged["steps"] and merged.get("target_bytes") is None:
        raise ValueError(f"{where}: give target_bytes (--target-bytes), steps in a recipe, or both")
    recipe = CompressionRecipe(**merged)
    recipe.data_arguments().to_options()
    return recipe


def known_names() -> list[str]:
    return [item.name for item in fields(CompressionRecipe)]


def read_target(given: object) -> int | float:
    """Bytes as an int, or a share of the model's as a float: `1900000`, `"1.9MB"`, `0.25`.

    Raises:
        ValueError: neither.
    """
    match = AMOUNT.fullmatch(str(given).strip().replace("_", ""))
    unit = UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None or isinstance(given, bool):
        raise ValueError(f"target_bytes={given!r}: expected bytes, such as 1900000 or 1.9MB, or a share such as 0.25")
    amount = float(match[1])
    if not match[2] and "." in match[1]:
        if not 0 < amount < 1:
            raise ValueError(f"target_bytes={given!r}: a share of the model's bytes lies between 0 and 1")
        return amount
    if amount * unit < 1:
        raise ValueError(f"target_bytes={given!r}: expected at least one byte")
    return round(amount * unit)


def read_steps(where: str, given: object) -> tuple[Step, ...]:
    """The steps of a recipe.

    Raises:
        ValueError: as in [`read_compression`].
    """
    if isinstance(given, Mapping | str) or not isinstance(given, Sequence):
        raise ValueError(f"{where}: steps must be a list such as [quantize: {{experts: int8}}], found {given!r:.60}")
    return tuple(read_step(f"{where}, step {number}", step) for number, step in enumerate(given, start=1))


def read_step(where: str, given: object) -> Step:
    if not isinstance(given, Mapping) or len(given) != 1:
        raise ValueError(f"{where}: expected one of {', '.join(STEPS)} with what it does, found {given!r:.60}")
    name, content = next(iter(given.items()))
    check_names(where, [name], STEPS)
    where = f"{where} ({name})"
    if name == Quantize.name:
        # Groups and formats are checked on the model.
        if not content or not isinstance(content, Mapping | str):
            raise ValueError(f"{where}: expected groups such as {{experts: int4}}, found {content!r:.60}")
        return Quantize(content)
    content = {} if content is None else content
    if not isinstance(content, Mapping):
        raise ValueError(f"{where}: expected a mapping, found {content!r:.60}")
    if name == Distil.name:
        return read_distil(where, content)
    kind = STEPS[name]
    check_names(where, content, [item.name for item in fields(kind)])
    for part in ("experts", "dense", "banks"):
        if part in content and not isinstance(content[part], Mapping):
            raise ValueError(f"{where}: {part} must be a mapping, found {content[part]!r:.60}")
    step = kind(**content)
    check_count(f"{where}: rows", step.rows)
    if isinstance(step, Merge):
        check_names(where, [step.similarity], SIMILARITIES)
        if not step.banks:
            raise ValueError(f"{where}: banks names none, as in {{banks: {{text: 2}}}}")
        return step
    check_names(where, [step.by], SCORES)
    if not (step.experts or step.dense):
        raise ValueError(f"{where}: name banks in experts, groups in dense, or both")
    return step


def read_distil(where: str, content: Mapping[str, Any]) -> Distil:
    check_names(where, content, DISTIL_SECTIONS)
    for section, values in content.items():
        if not isinstance(values, Mapping):
            raise ValueError(f"{where}: section {section!r} must be a mapping, found {values!r:.60}")
        check_names(f"{where}, {section}", values, field_names(SECTIONS[section]))
        if chosen := [name for name in CHOSEN_HERE if section == "training" and name in values]:
            raise ValueError(f"{where}: training.{chosen[0]} is chosen by compress; leave it out")
    return Distil({section: dict(values) for section, values in content.items()})


def check_names(where: str, found: Iterable[str], known: Collection[str]) -> None:
    """Raises ValueError naming the first unknown name and the nearest known one."""
    for name in found:
        if name not in known:
            raise ValueError(f"{where}: unknown name {name!r}{nearest(name, known)}; known are {', '.join(known)}")


def check_count(where: str, value: object) -> None:
    if type(value) is not int or value < 1:
        raise ValueError(f"{where}={value!r}: expected a whole number of at least 1")
