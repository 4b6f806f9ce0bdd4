"""Accuracy counts equal answers; loss is the mean over labelled tokens whatever the batch size."""

from typing import Any

import pytest
import torch

from chorus_moe import ChorusForConditionalGeneration, ChorusProcessor
from chorus_moe.training import evaluate
from chorus_moe.training.collator import ChorusDataCollator
from chorus_moe.training.evaluate import evaluate_rows, is_same, medium_of, split_answer, text_of


def test_accuracy_is_the_share_of_equal_answers(
    model: ChorusForConditionalGeneration,
    processor: ChorusProcessor,
    rows: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(evaluate, "answer_rows", lambda model, processor, prompts, **_: [" Three"] * len(prompts))
    result = evaluate_rows(model, processor, rows, batch_size=4, progress=False)
    assert result.accuracy == pytest.approx(1 / 3)
    assert result.references == ["three", "four", "five"] * 2
    assert result.to_dict().keys() == {"accuracy", "loss", "num_rows", "accuracy_by_medium"}
    # Every third row shows a picture ("three"), a sound, or both.
    assert result.to_dict()["accuracy_by_medium"] == {"audio": 0.0, "image": 1.0, "image+audio": 0.0}
    assert result.questions == ["what is it?"] * 6


def test_accuracy_by_task_tells_rows_without_one_apart(
    model: ChorusForConditionalGeneration,
    processor: ChorusProcessor,
    rows: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(evaluate, "answer_rows", lambda model, processor, prompts, **_: ["four"] * len(prompts))
    named = [{**row, "task": task} for row, task in zip(rows, ["b", "a", None, "b", "a", None], strict=True)]
    result = evaluate_rows(model, processor, named, progress=False)
    assert result.to_dict()["accuracy_by_task"] == {"a": 1.0, "b": 0.0, "": 0.0}
    assert list(result.to_dict()["accuracy_by_task"]) == ["a", "b", ""]


def test_the_medium_of_a_row_counts_columns_and_parts_with_data() -> None:
    def row(*parts: Any, **columns: Any) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": list(parts)}], **columns}

    assert medium_of(row({"type": "text", "text": "hi"}, "hi")) == "text"
    assert medium_of(row({"type": "image_url", "image_url": {"url": "a.png"}})) == "image"
    assert medium_of(row({"type": "input_audio"}, images=["a.png"])) == "image+audio"
    assert medium_of({"messages": [{"role": "user", "content": "hi"}], "images": None, "audio": []}) == "text"


def test_loss_does_not_depend_on_the_batch_size(
    model: ChorusForConditionalGeneration, processor: ChorusProcessor, rows: list[dict[str, Any]]
) -> None:
    losses = [
        evaluate_rows(model, processor, rows, batch_size=size, max_new_tokens=1, progress=False).loss
        for size in (1, 4, 6)
    ]
    with torch.no_grad():
        losses.append(model(**ChorusDataCollator(processor)(rows)).loss.item())
    assert losses == pytest.approx([losses[0]] * 4, abs=1e-5)  # float32 sums in another order


def test_only_rows_that_end_with_an_answer_can_be_evaluated(rows: list[dict[str, Any]]) -> None:
    prompt, answer = split_answer(rows[0], 0)
    assert (answer, len(prompt["messages"])) == ("three", 1)
    with pytest.raises(ValueError, match="row 7: the last turn must be the assistant's, found 'user'"):
        split_answer(prompt, 7)
    with pytest.raises(ValueError, match="no rows"):
        evaluate_rows(None, None, [])


def test_answers_are_compared_without_case_and_spaces() -> None:
    assert is_same(" The  Answer\n", "the answer")
    assert not is_same("theanswer", "the answer")
    assert text_of({"content": [{"type": "image"}, {"type": "text", "text": "a"}, "b"]}) == "ab"
