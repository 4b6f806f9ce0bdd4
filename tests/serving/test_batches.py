"""Requests, their batches and their rows, without a server."""

import asyncio
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from chorus_moe.serving.batches import BatchManager, Request, Rows, join_rows, one_line, run_batch
from chorus_moe.serving.voices import Voice, load_voices


class Reads:
    """What a request's reader was given."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def take(self, token: int) -> None:
        self.tokens.append(token)


def request(voice: str = "tiny", tokens: int = 4, seed: int | None = None, **settings: Any) -> Request:
    ends: list[Exception | None] = []
    made = Request(Voice(voice, None), {}, GenerationConfig(max_new_tokens=tokens, **settings), seed, done=ends.append)  # type: ignore[arg-type]
    made.ends = ends  # type: ignore[attr-defined]
    return made


def test_who_may_share_a_batch() -> None:
    assert request(tokens=4).key == request(tokens=9).key is not None
    assert request().key != request("loud").key
    assert request().key != request(repetition_penalty=1.5).key


@pytest.mark.parametrize("settings", [{"do_sample": True}, {"stop_strings": ["."]}, {"seed": 0}], ids=str)
def test_who_runs_alone(settings: dict[str, Any]) -> None:
    assert request(**settings).key is None


def test_a_row_ends_at_its_length_and_takes_nothing_more() -> None:
    row = request(tokens=2)
    row.reader = Reads()
    for token in (5, 6, 7):
        assert row.has_ended == (token == 7)
        row.take(token)
    assert row.tokens == row.reader.tokens == [5, 6] and row.ends == [None]  # type: ignore[attr-defined]


@pytest.mark.parametrize("ends", [3, [2, 3]])
def test_a_row_ends_at_its_end_token(ends: int | list[int]) -> None:
    row = request(tokens=9, eos_token_id=ends)
    for token in (5, 3, 6):
        row.take(token)
    assert row.tokens == [5, 3] and row.is_finished


def test_a_row_without_an_end_token_goes_on() -> None:
    row = request(tokens=9)
    row.take(2)
    assert not row.is_finished


def test_a_request_that_was_left_takes_nothing_and_is_no_end_of_others() -> None:
    left, other = request(), request()
    rows = Rows([left, other])
    rows.put(torch.zeros(2, 3, dtype=torch.long))
    rows.put(torch.tensor([5, 6]))
    left.is_cancelled = True
    rows.put(torch.tensor([7, 8]))
    assert (left.tokens, other.tokens) == ([5], [6, 8])
    assert rows(torch.zeros(2, 5), torch.empty(0)).tolist() == [True, False]
    assert rows(torch.zeros(2, 7), torch.empty(0)).tolist() == [True, True]
    assert rows(torch.zeros(2, 6), torch.empty(0)).tolist() == [True, False]
    rows.end()
    assert left.is_finished and other.is_finished


def test_a_request_ends_once() -> None:
    row, error = request(), ValueError("no")
    row.finish(error)
    row.finish()
    assert row.ends == [error]  # type: ignore[attr-defined]


def test_rows_of_other_lengths_are_padded_on_the_left() -> None:
    first = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    second = {"input_ids": torch.tensor([[8]]), "attention_mask": torch.ones(1, 1, dtype=torch.long)}
    first["input_features"], second["input_features"] = torch.ones(1, 2, 4), torch.ones(1, 5, 4)
    second["pixel_values"] = torch.ones(2, 3, 8, 8)
    joined = join_rows([first, second], 9)
    assert joined["input_ids"].tolist() == [[5, 6, 7], [9, 9, 8]]
    assert joined["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert joined["input_features"].sum(dim=2).tolist() == [[0, 0, 0, 4, 4], [4, 4, 4, 4, 4]]
    assert joined["pixel_values"].shape == (2, 3, 8, 8)


def test_the_longest_wait_first_and_only_as_many_as_fit() -> None:
    manager = BatchManager.__new__(BatchManager)
    manager.max_batch = 3
    waiting = [request(), request("loud"), request(), request(do_sample=True), request(), request()]
    manager._waiting = deque(waiting)
    batches = [[waiting.index(each) for each in manager._next_batch()] for _ in range(4)]
    assert batches == [[0, 2, 4], [1], [3], [5]] and not manager._waiting


@pytest.fixture(scope="module")
def manager(folder: Path) -> BatchManager:
    voices, processor = load_voices(str(folder))
    made = BatchManager(processor)
    made.voice = voices["tiny"]  # type: ignore[attr-defined]
    return made


def inputs(manager: BatchManager, text: str) -> dict[str, torch.Tensor]:
    return dict(manager.processor(text=text, return_tensors="pt"))


def test_an_error_of_one_is_no_error_of_another(manager: BatchManager, monkeypatch: pytest.MonkeyPatch) -> None:
    """They fail together, then each is tried alone."""
    calls = []

    def run(batch: list[Request], *rest: Any) -> None:
        calls.append(len(batch))
        if any("bad" in each.inputs for each in batch):
            raise ValueError("no  \n such thing")
        run_batch(batch, *rest)

    monkeypatch.setattr("chorus_moe.serving.batches.run_batch", run)
    voice = manager.voice  # type: ignore[attr-defined]

    async def answers() -> list[Any]:
        config = GenerationConfig(max_new_tokens=3)
        with manager._changed:  # so that both wait together
            asked = [
                asyncio.ensure_future(manager.generate_non_streaming(voice, None, row, config, ""))
                for row in (inputs(manager, "what"), inputs(manager, "it") | {"bad": torch.ones(1, 1)})
            ]
            await asyncio.sleep(0)
        return await asyncio.gather(*asked, return_exceptions=True)

    (text, length, tokens), error = asyncio.run(answers())
    assert calls == [2, 1, 1] and isinstance(error, ValueError)
    assert one_line(error) == "no such thing" and one_line(ValueError()) == "ValueError"
    assert len(tokens) == 3 and length == inputs(manager, "what")["input_ids"].shape[1]
    assert text == manager.processor.decode(tokens, skip_special_tokens=True)


def test_one_that_fails_alone_is_run_once(manager: BatchManager, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def run(batch: list[Request], *rest: Any) -> None:
        calls.append(len(batch))
        raise ValueError("no")

    monkeypatch.setattr("chorus_moe.serving.batches.run_batch", run)
    config = GenerationConfig(max_new_tokens=3)
    answer = manager.generate_non_streaming(manager.voice, None, inputs(manager, "it"), config, "")  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="no"):
        asyncio.run(answer)
    assert calls == [1] and manager.is_cb_alive()


def test_one_that_has_begun_is_not_begun_again(manager: BatchManager, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(batch: list[Request], *rest: Any) -> None:
        batch[0].take(5)
        raise ValueError("half way")

    monkeypatch.setattr("chorus_moe.serving.batches.run_batch", run)
    voice = manager.voice  # type: ignore[attr-defined]

    async def streams() -> list[Any]:
        config = GenerationConfig(max_new_tokens=3)
        with manager._changed:
            pairs = [manager.generate_streaming(voice, None, inputs(manager, "it"), config, "") for _ in range(2)]
        found = []
        for queue, reader in pairs:
            items = []
            while (item := await asyncio.wait_for(queue.get(), 20)) is not None and not hasattr(item, "msg"):
                items.append(item)
            found.append((reader.request.tokens, getattr(item, "msg", None)))
        return found

    # The second had not begun: alone it is the first of its batch.
    assert asyncio.run(streams()) == [([5], "half way"), ([5], "half way")]


def test_the_longest_answer_of_a_batch_is_as_long_as_it_asked_for(manager: BatchManager) -> None:
    voice = manager.voice  # type: ignore[attr-defined]
    rows = [inputs(manager, text) for text in ("what is it?", "three")]
    batch = [Request(voice, row, GenerationConfig(max_new_tokens=n)) for row, n in zip(rows, (2, 6), strict=True)]
    run_batch(batch, manager.processor)
    assert [len(each.tokens) for each in batch] == [2, 6]
    alone = voice.model.generate(**rows[1], max_new_tokens=6, do_sample=False)[0, rows[1]["input_ids"].shape[1] :]
    assert batch[1].tokens == alone.tolist() and batch[0].config.max_new_tokens == 2
