"""Accuracy by generation, and loss, on rows that end with the right answer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm.auto import tqdm

from chorus_moe.processors.processing_chorus import ChorusProcessor
from chorus_moe.processors.processing_media import MEDIA
from chorus_moe.training.answers import answer_rows
from chorus_moe.training.collator import ChorusDataCollator, clean_messages
from chorus_moe.training.data import RowDataset
from chorus_moe.training.layouts import standard_row
from chorus_moe.training.loading import ModelOrAdapter, device_of


@dataclass
class Evaluation:
    """Figures of one evaluation.

    Args:
        accuracy: share of answers equal to the reference, ignoring case and spaces.
        loss: mean over the labelled tokens.
        questions, tasks, media: of each row the last turn before the answer, its `task` if it has one, and what it
            shows, see `medium_of`.
    """

    accuracy: float
    loss: float
    num_rows: int
    answers: list[str] = field(repr=False)
    references: list[str] = field(repr=False)
    questions: list[str] = field(repr=False)
    tasks: list[str | None] = field(repr=False)
    media: list[str] = field(repr=False)

    def marks_by(self, group: Callable[[int], str | None]) -> dict[str | None, list[bool]]:
        """Group -> whether each answer is right; `group` names that of a row. In the order of names, None last."""
        marks: dict[str | None, list[bool]] = {}
        for number, (answer, reference) in enumerate(zip(self.answers, self.references, strict=True)):
            marks.setdefault(group(number), []).append(is_same(answer, reference))
        return {name: marks[name] for name in sorted(marks, key=lambda name: (name is None, str(name)))}

    def to_dict(self) -> dict[str, Any]:
        """Figures; accuracy by medium, and by task where rows have one (rows without one are under "")."""
        by_task = self.marks_by(lambda number: self.tasks[number]) if any(self.tasks) else {}
        by_medium = self.marks_by(lambda number: self.media[number])
        return {
            "accuracy": self.accuracy,
            "loss": self.loss,
            "num_rows": self.num_rows,
            **{
                f"accuracy_by_{title}": {name or "": sum(right) / len(right) for name, right in marks.items()}
                for title, marks in (("task", by_task), ("medium", by_medium))
                if marks
            },
        }


def evaluate_rows(
    model: ModelOrAdapter,
    processor: ChorusProcessor,
    rows: Sequence[Mapping[str, Any]] | RowDataset,
    *,
    batch_size: int = 16,
    max_new_tokens: int = 64,
    progress: bool = True,
    **options: Any,
) -> Evaluation:
    """Answer every row and compare with its last turn; the rest of the conversation is the prompt.

    Args:
        model: in evaluation mode, with or without an adapter.
        rows: as in `ChorusDataCollator`; the last turn is the assistant's.
        options: for `generate`.

    Raises:
        ValueError: no rows, or a row whose last turn is not the assistant's.
        MediaError: a row that cannot be read.
    """
    if len(rows) == 0:
        raise ValueError("there are no rows to evaluate")
    collator = ChorusDataCollator(processor)
    answers, references = [], []
    questions, tasks, media = [], [], []
    loss_sum, num_labels = 0.0, 0
    for start in tqdm(range(0, len(rows), batch_size), desc="evaluate", unit="batch", disable=not progress):
        batch = [rows[index] for index in range(start, min(start + batch_size, len(rows)))]
        split = [split_answer(row, start + number) for number, row in enumerate(batch)]
        prompts = [prompt for prompt, _ in split]
        answers += answer_rows(model, processor, prompts, max_new_tokens=max_new_tokens, **options)
        references += [reference for _, reference in split]
        questions += [text_of(prompt["messages"][-1]) if prompt["messages"] else "" for prompt in prompts]
        tasks += [None if row.get("task") is None else str(row["task"]) for row in batch]
        media += [medium_of(prompt) for prompt in prompts]
        inputs = {name: value.to(device_of(model)) for name, value in collator(batch).items()}
        # Counted as the loss counts them: the first position predicts nothing.
        labels = int((inputs["labels"][:, 1:] != -100).sum())
        with torch.inference_mode():
            # Weighted by labels: batches have different numbers of them, and a mean of means would depend on the batch
            # size.
            loss_sum += float(model(**inputs).loss) * labels
        num_labels += labels
    correct = sum(is_same(answer, reference) for answer, reference in zip(answers, references, strict=True))
    figures = (correct / len(rows), loss_sum / max(num_labels, 1), len(rows))
    return Evaluation(*figures, answers, references, questions, tasks, media)


def split_answer(row: Mapping[str, Any], index: int) -> tuple[dict[str, Any], str]:
    """The row without its last turn, and that turn's text."""
    row = standard_row(row)
    messages = clean_messages(row["messages"])
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"row {index}: the last turn must be the assistant's, found {messages[-1]['role']!r}")
    return {**row, "messages": messages[:-1]}, text_of(messages[-1])


def medium_of(row: Mapping[str, Any]) -> str:
    """What a row shows: "text", "image", "audio" or "image+audio", from its columns or from parts that hold data."""
    turns = (turn.get("content") for turn in row.get("messages") or ())
    parts = (part for content in turns if isinstance(content, list | tuple) for part in content)
    # OpenAI's types of parts: image_url, audio_url, input_audio.
    types = (str(part.get("type")) for part in parts if isinstance(part, Mapping))
    kinds = {kind.removesuffix("_url").removeprefix("input_") for kind in types}
    shown = [name for name, medium in MEDIA.items() if name in kinds or len(row.get(medium.column) or ())]
    return "+".join(shown) or "text"


def text_of(message: Mapping[str, Any]) -> str:
    """The texts of a turn, joined."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(part if isinstance(part, str) else part.get("text") or "" for part in content)


def is_same(answer: str, reference: str) -> bool:
    """Whether two answers agree up to case and white space."""
    return answer.casefold().split() == reference.casefold().split()
