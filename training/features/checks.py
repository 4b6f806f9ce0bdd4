"""Before the first step: cached features are those of this model's towers and processor, and no tower is trained."""

from collections.abc import Collection, Mapping

from chorus_moe.modeling.configuration_modalities import ENCODED
from chorus_moe.processors.processing_chorus import ChorusProcessor
from chorus_moe.training.data import FeatureRows, RowReader
from chorus_moe.training.features.identity import processor_hash, tower_hash, towers_of
from chorus_moe.training.loading import ModelOrAdapter

SHOWN = 12
TOWERS = {row.name: row.tower for row in ENCODED}


def trained_towers(model: ModelOrAdapter) -> set[str]:
    """Modalities whose tower is trained, in part or as LoRA."""
    towers = towers_of(model).items()
    return {name for name, tower in towers if any(parameter.requires_grad for parameter in tower.parameters())}


def check_frozen(
    model: ModelOrAdapter, rows: Mapping[str, RowReader | None], trained_before: Collection[str] = ()
) -> None:
    """Refuse to train a tower on its own cached outputs, which training would not change.

    Args:
        rows: what the recipe calls some rows -> the rows.
        trained_before: modalities whose tower an earlier stage trains.

    Raises:
        ValueError: naming the tower and the rows.
    """
    for where, found in rows.items():
        if isinstance(found, FeatureRows):
            for name in sorted(trained_towers(model) | set(trained_before)):
                when = "an earlier stage" if name in trained_before else "this run"
                raise ValueError(
                    f"{where} holds cached features of the {TOWERS[name]}, which {when} trains: freeze it (freeze: "
                    "[towers], or name in `train` what else is trained), or give the rows with media"
                )


def check_features(model: ModelOrAdapter, processor: ChorusProcessor, rows: Mapping[str, RowReader | None]) -> None:
    """`check_frozen`, and refuse features that another tower or processor made.

    Raises:
        ValueError: naming what differs, with both hashes.
    """
    check_frozen(model, rows)
    cached = {where: found.facts for where, found in rows.items() if isinstance(found, FeatureRows)}
    if not cached:
        return
    towers = {name: tower_hash(tower) for name, tower in towers_of(model).items()}
    settings = processor_hash(processor)
    for where, facts in cached.items():
        made_by = {**{TOWERS[name]: value for name, value in facts.towers.items()}, "processor": facts.processor}
        here = {**{TOWERS[name]: value for name, value in towers.items()}, "processor": settings}
        for part in sorted(made_by | here):
            if made_by.get(part) != here.get(part):
                then, now = (str(values.get(part, "none"))[:SHOWN] for values in (made_by, here))
                raise ValueError(
                    f"{where} holds features of the {part} {then} of {facts.model!r}, the {part} here is {now}; cache "
                    "them anew with `chorus-moe cache-features` (weights, number type and settings must be the same)"
                )
