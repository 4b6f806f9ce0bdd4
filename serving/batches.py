"""Requests that wait for the model are answered together, as rows of one `generate`.

Unusual here:
- one thread owns the model: adapters and seeds are set there, so no request sees those of another;
- a row ends by itself: at its end token, at its own `max_new_tokens`, or when its client has gone; the others go on;
- if a batch fails, its requests run one by one, so that what one asks is no other's error.
"""

import asyncio
import json
import threading
from collections import deque
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.cli.serving.utils import BaseGenerateManager, DirectStreamer, _StreamError, response_events_to_chunks
from transformers.utils import logging
from transformers.utils.chat_parsing import ResponseParser

from chorus_moe.processors.processing_chorus import ChorusProcessor
from chorus_moe.serving.growing_text import GrowingText
from chorus_moe.serving.voices import Voice
from chorus_moe.training.loading import device_of

logger = logging.get_logger(__name__)


class Takes(Protocol):
    """Who reads an answer along."""

    def take(self, token: int) -> None: ...


@dataclass(eq=False)
class Request:
    """One request on its way through the model.

    Args:
        inputs: of one row, on the CPU.
        config: its own.
        reader: takes each token, where the client reads along.
        done: called once, with an error or None.
    """

    voice: Voice
    inputs: dict[str, Tensor]
    config: GenerationConfig
    seed: int | None = None
    reader: "Takes | None" = None
    done: Callable[[Exception | None], object] = bool
    tokens: list[int] = field(default_factory=list)
    is_finished: bool = False
    is_cancelled: bool = False

    @property
    def key(self) -> str | None:
        """Requests of one key may share a batch; None must run alone."""
        # A drawn token depends on all draws before it, and only `generate` knows where a stop string ends.
        if self.config.do_sample or self.config.stop_strings or self.seed is not None:
            return None
        settings = {name: value for name, value in self.config.to_diff_dict().items() if name != "max_new_tokens"}
        return f"{self.voice.name} {sorted(settings.items())!r}"

    @property
    def has_ended(self) -> bool:
        return self.is_finished or self.is_cancelled

    def take(self, token: int) -> None:
        """The next token of the row; what comes after its end is padding."""
        if self.has_ended:
            return
        self.tokens.append(token)
        if self.reader is not None:
            self.reader.take(token)
        ends = self.config.eos_token_id
        if len(self.tokens) >= self.config.max_new_tokens or token in ([ends] if isinstance(ends, int) else ends or []):
            self.finish()

    def finish(self, error: Exception | None = None) -> None:
        if not self.is_finished:
            self.is_finished = True
            self.done(error)


class Rows(StoppingCriteria):
    """Ends each row where its request ends, and hands on its tokens: `generate`'s streamer and criterion in one."""

    def __init__(self, requests: Sequence[Request]):
        self.requests = requests
        self._prompt_length: int | None = None

    def put(self, tokens: Tensor) -> None:
        # `generate` hands on the prompt first.
        if self._prompt_length is None:
            self._prompt_length = tokens.shape[1]
            return
        for request, token in zip(self.requests, tokens.tolist(), strict=True):
            request.take(token)

    def end(self) -> None:
        for request in self.requests:
            request.finish()

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        # By length, not by what `put` saw: on a GPU `generate` may ask before it hands on the token.
        written = input_ids.shape[1] - (self._prompt_length or 0)
        ended = [request.is_cancelled or written >= request.config.max_new_tokens for request in self.requests]
        return torch.tensor(ended, device=input_ids.device)


class BatchManager(BaseGenerateManager):
    """A queue of requests and the thread that answers them; both methods are those that transformers' handlers call.

    Args:
        processor: decodes; a copy of its own, since a tokenizer that encodes must not be read by another thread.
        max_batch: rows of one `generate` at most.
    """

    def __init__(self, processor: ChorusProcessor, max_batch: int = 8):
        self.processor, self.max_batch = processor, max_batch
        self._waiting: deque[Request] = deque()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="inference", daemon=True)
        self._thread.start()

    def is_cb_alive(self) -> bool:
        """What transformers' health address asks."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """Nothing to free: the thread ends with the process."""

    def generate_streaming(
        self,
        model: Voice,
        processor: object,
        inputs: dict[str, Tensor],
        gen_config: GenerationConfig,
        request_id: str,
        response_parser: ResponseParser | None = None,
    ) -> "tuple[asyncio.Queue, Reader]":
        queue: asyncio.Queue = asyncio.Queue()
        reader = Reader(self.processor, queue, response_parser)
        request = reader.request = self._request(model, inputs, gen_config)
        request.reader = reader
        request.done = lambda error: reader.end() if error is None else reader.fail(error)
        self._submit(request)
        return queue, reader

    async def generate_non_streaming(
        self,
        model: Voice,
        processor: object,
        inputs: dict[str, Tensor],
        gen_config: GenerationConfig,
        request_id: str,
    ) -> tuple[str, int, list[int]]:
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        request = self._request(model, inputs, gen_config)

        def settle(error: Exception | None) -> None:
            if not future.done():
                future.set_result(None) if error is None else future.set_exception(error)

        request.done = lambda error: loop.call_soon_threadsafe(settle, error)
        self._submit(request)
        try:
            await future
        except asyncio.CancelledError:
            request.is_cancelled = True
            raise
        text = self.processor.decode(request.tokens, skip_special_tokens=True)
        return text, inputs["input_ids"].shape[1], request.tokens

    @staticmethod
    def _request(voice: Voice, inputs: dict[str, Tensor], config: GenerationConfig) -> Request:
        return Request(voice, dict(inputs), config, seed=getattr(config, "seed", None))

    def _submit(self, request: Request) -> None:
        with self._changed:
            self._waiting.append(request)
            self._changed.notify()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                batch = self._next_batch()
            try:
                self._answer(batch)
            except Exception as error:
                if len(batch) == 1:
                    batch[0].finish(error)
                    continue
                for request in batch:
                    if not request.has_ended and not request.tokens:
                        self._alone(request)
                    # Of one that has begun, a second beginning would be sent twice.
                    request.finish(error)

    def _alone(self, request: Request) -> None:
        try:
            self._answer([request])
        except Exception as error:
            request.finish(error)

    def _next_batch(self) -> list[Request]:
        """The request that waits longest, and those behind it that may run with it."""
        first = self._waiting.popleft()
        batch = [first]
        if first.key is not None:
            others = [request for request in self._waiting if request.key == first.key][: self.max_batch - 1]
            for request in others:
                self._waiting.remove(request)
            batch += others
        return batch

    def _answer(self, batch: Sequence[Request]) -> None:
        if waiting := [request for request in batch if not request.is_cancelled]:
            run_batch(waiting, self.processor)


@torch.inference_mode()
def run_batch(batch: Sequence[Request], processor: ChorusProcessor, **options: Any) -> None:
    """Answer requests of one key.

    Args:
        options: of the model's call, such as `closed_banks`.
    """
    voice, config, rows = batch[0].voice, copy(batch[0].config), Rows(batch)
    config.max_new_tokens = max(request.config.max_new_tokens for request in batch)
    if batch[0].seed is not None:
        torch.manual_seed(batch[0].seed)
    pad = processor.tokenizer.pad_token_id
    inputs = join_rows([request.inputs for request in batch], 0 if pad is None else pad)
    device = device_of(voice.model)
    with voice.speaking():
        voice.model.generate(
            **{name: tensor.to(device) for name, tensor in inputs.items()},
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([rows]),
            streamer=rows,
            tokenizer=processor.tokenizer,
            **options,
        )


class Reader(DirectStreamer):
    """The tokens of one answer on their way to its client, who may go away before the end."""

    request: Request

    def __init__(self, processor: ChorusProcessor, queue: asyncio.Queue, parser: ResponseParser | None):
        tokenizer = processor.tokenizer
        super().__init__(tokenizer._tokenizer, asyncio.get_running_loop(), queue, response_parser=parser)
        # A parser looks for the special tokens.
        self._text = GrowingText(partial(tokenizer.decode, skip_special_tokens=parser is None))

    def take(self, token: int) -> None:
        self.total_tokens += 1
        self._send(self._text.add(token))

    def end(self) -> None:
        self._send(self._text.rest())
        super().end()

    def fail(self, error: Exception) -> None:
        # transformers writes it between quotes as it is.
        self._enqueue(_StreamError(json.dumps(one_line(error))[1:-1]))

    def cancel(self) -> None:
        # Not as transformers does, by an error in `generate`, which would end the whole batch.
        self.request.is_cancelled = True

    def _send(self, text: str) -> None:
        if text:
            for item in [text] if self._parser is None else response_events_to_chunks(self._parser.feed(text)):
                self._enqueue(item)


def join_rows(rows: Sequence[dict[str, Tensor]], pad_token_id: int) -> dict[str, Tensor]:
    """Inputs of several rows as one batch: text padded on the left, and so are clips, which the tower moves back."""
    names = dict.fromkeys(name for row in rows for name in row)
    joined = {}
    for name in names:
        tensors = [row[name] for row in rows if name in row]
        fill = pad_token_id if name == "input_ids" else 0
        # Axis 1 is tokens, frames or, where nothing has to be padded, the colours of pictures.
        longest = max(tensor.shape[1] for tensor in tensors)
        padded = [F.pad(t, [0, 0] * (t.ndim - 2) + [longest - t.shape[1], 0], value=fill) for t in tensors]
        joined[name] = torch.cat(padded)
    return joined


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
