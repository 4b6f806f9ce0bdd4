"""What a model on the way of a compression costs and knows: bytes, memory, speed, and accuracy by task and medium."""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from chorus_moe.processors.processing_chorus import ChorusProcessor
from chorus_moe.training.answers import answer_rows, user_turn
from chorus_moe.training.compression.steps import bytes_on_disk
from chorus_moe.training.data import RowDataset
from chorus_moe.training.evaluate import evaluate_rows, split_answer
from chorus_moe.training.loading import ModelOrAdapter
from chorus_moe.training.sizes import readable

# One answer of so many tokens is timed, this often.
TIMED_TOKENS, TIMED_ANSWERS = 32, 5
QUESTION = "What do you see and hear?"


@dataclass(frozen=True)
class Measurement:
    """One row of the table.

    Args:
        step: "start", or the number and name of the step that was done.
        bytes: of the safetensors files.
        memory: bytes of weights and buffers once loaded.
        tokens_per_second: of one answer of 32 tokens at batch 1, its question included; a median of five.
        accuracy, loss, by_task, by_medium: of the evaluation rows; None and empty without.
        notes: what the step reported.
    """

    step: str
    bytes: int
    memory: int
    tokens_per_second: float
    accuracy: float | None = None
    loss: float | None = None
    by_task: dict[str, float] = field(default_factory=dict)
    by_medium: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(
    step: str,
    folder: Path,
    model: ModelOrAdapter,
    processor: ChorusProcessor,
    rows: RowDataset | None,
    *,
    batch_size: int,
    max_new_tokens: int,
    notes: Sequence[str] = (),
) -> Measurement:
    """Measure a model that was loaded from a folder.

    Args:
        rows: for accuracy; None leaves it out.
    """
    found: dict[str, Any] = {}
    prompt: Mapping[str, Any] = user_turn(QUESTION)
    if rows is not None:
        prompt, _ = split_answer(rows[0], 0)
        result = evaluate_rows(
            model, processor, rows, batch_size=batch_size, max_new_tokens=max_new_tokens, progress=False
        ).to_dict()
        found = {
            "accuracy": result["accuracy"],
            "loss": result["loss"],
            "by_task": result.get("accuracy_by_task", {}),
            "by_medium": result.get("accuracy_by_medium", {}),
        }
    return Measurement(
        step=step,
        # A model of the Hub lies in no folder of its own.
        bytes=weight_bytes(folder) or bytes_on_disk(model),
        memory=memory_of(model),
        tokens_per_second=speed_of(model, processor, prompt),
        notes=list(notes),
        **found,
    )


def weight_bytes(folder: Path) -> int:
    """Bytes of the safetensors files of a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def memory_of(model: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers, each once."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def speed_of(model: ModelOrAdapter, processor: ChorusProcessor, prompt: Mapping[str, Any]) -> float:
    """Tokens a second of one answer, greedy; the first of six is not counted."""
    seconds = []
    for _ in range(TIMED_ANSWERS + 1):
        start = time.perf_counter()
        answer_rows(model, processor, [prompt], max_new_tokens=TIMED_TOKENS, min_new_tokens=TIMED_TOKENS)
        seconds.append(time.perf_counter() - start)
    return TIMED_TOKENS / statistics.median(seconds[1:])


def table_of(rows: Sequence[Measurement]) -> str:
    """Steps as columns would be wide: a line each, and accuracy by task and medium below in lines of their own."""
    first = rows[0]
    lines = [f"{'step':<16}{'bytes':>14}{'share':>8}{'accuracy':>10}{'loss':>9}{'tokens/s':>10}{'memory':>10}"]
    for row in rows:
        accuracy = "-" if row.accuracy is None else f"{100 * row.accuracy:.1f}%"
        loss = "-" if row.loss is None else f"{row.loss:.4f}"
        lines.append(
            f"{row.step:<16}{row.bytes:>14,}{row.bytes / first.bytes:>8.3f}{accuracy:>10}{loss:>9}"
            f"{row.tokens_per_second:>10.1f}{readable(row.memory):>10}"
        )
    for title, name in (("task", "by_task"), ("medium", "by_medium")):
        if kinds := getattr(first, name):
            lines += ["", f"{'accuracy by ' + title:<24}" + "".join(f"{row.step:>14}" for row in rows)]
            for kind in kinds:
                shares = "".join(f"{100 * getattr(row, name)[kind]:>13.1f}%" for row in rows)
                lines.append(f"{kind or '(none)':<24}{shares}")
    return "\n".join(lines)


def markdown_of(rows: Sequence[Measurement], plan: str) -> list[str]:
    """Lines of a model card: the table, accuracy by task and medium, and the plan as YAML."""
    first = rows[0]
    kinds = [
        (title, kind, name)
        for title, name in (("task", "by_task"), ("medium", "by_medium"))
        for kind in getattr(first, name)
    ]
    heads = ["step", "bytes", "share", "accuracy", "tokens/s", "memory"]
    lines = ["## How it was made smaller", "", "| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for row in rows:
        accuracy = "-" if row.accuracy is None else f"{100 * row.accuracy:.1f}%"
        share = f"{row.bytes / first.bytes:.3f}"
        cells = [row.step, f"{row.bytes:,}", share, accuracy, f"{row.tokens_per_second:.1f}", readable(row.memory)]
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    if kinds:
        lines += ["| accuracy | " + " | ".join(row.step for row in rows) + " |", "| --- " * (len(rows) + 1) + "|"]
        for title, kind, name in kinds:
            shares = " | ".join(f"{100 * getattr(row, name)[kind]:.1f}%" for row in rows)
            lines.append(f"| {title} {kind or '(none)'} | {shares} |")
        lines.append("")
    return [*lines, "Plan:", "", "```yaml", plan.rstrip(), "```", ""]
