"""What `chorus-moe evaluate` computes of pairs: retrieval and zero-shot classification."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from chorus_moe.modeling.configuration_banks import check_name
from chorus_moe.processors.processing_chorus import ChorusProcessor
from chorus_moe.training.contrast.embeddings import check_trained, embed_pairs
from chorus_moe.training.contrast.pairs import PairDataset
from chorus_moe.training.contrast.retrieval import KS, check_ks, retrieval
from chorus_moe.training.contrast.zero_shot import zero_shot
from chorus_moe.training.loading import ModelOrAdapter

TASKS = ("answers", "retrieval", "zero_shot")


class PairTask(NamedTuple):
    """What is asked for; `ks` of retrieval, `labels` and `template` of zero-shot classification."""

    name: str
    ks: tuple[int, ...] = KS
    labels: tuple[str, ...] = ()
    template: str = "{}"


def read_task(
    name: str,
    *,
    ks: Sequence[int] | None = None,
    labels: str | None = None,
    template: str | None = None,
    out: Path | None = None,
) -> PairTask | None:
    """The task of the options of the command line; None for answers, which are not about pairs.

    Raises:
        ValueError: an unknown task, an option of another one, or no labels.
    """
    check_name("--task", "task", name, TASKS)
    needs = (
        ("--labels", "zero_shot", labels),
        ("--template", "zero_shot", template),
        ("--k", "retrieval", ks),
        ("--out", "answers", out),
    )
    for option, task, value in needs:
        if value and task != name:
            raise ValueError(f"{option} is for --task {task}, found --task {name}")
    if name == "zero_shot" and not labels:
        raise ValueError("--task zero_shot needs all labels, as in --labels red,green,blue")
    if name == "answers":
        return None
    chosen = tuple(label.strip() for label in (labels or "").split(",")) if labels else ()
    return PairTask(name, tuple(ks or KS), chosen, template or "{}")


def evaluate_pairs(
    task: PairTask,
    model: ModelOrAdapter,
    processor: ChorusProcessor,
    rows: Sequence[Mapping[str, Any]] | PairDataset,
    *,
    batch_size: int = 16,
    progress: bool = True,
) -> dict[str, Any]:
    """The figures of a task: `num_rows`, and those of `retrieval` or `zero_shot`.

    Raises:
        ValueError: the head of the model was never trained, or as `retrieval`, `zero_shot` and `embed_pairs`.
    """
    check_trained(model)
    found: dict[str, Any] = {"num_rows": len(rows)}
    if task.name == "zero_shot":
        options: dict[str, Any] = {"template": task.template, "batch_size": batch_size, "progress": progress}
        return found | zero_shot(model, processor, rows, task.labels, **options)
    # As many items as rows at most: known before the work.
    check_ks(task.ks, {"rows": len(rows)})
    return found | retrieval(embed_pairs(model, processor, rows, batch_size=batch_size, progress=progress), task.ks)
