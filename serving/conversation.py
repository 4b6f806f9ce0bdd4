"""A conversation with a model: several turns, a streaming answer that can be stopped, options of each answer."""

import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from chorus_moe.processors.processing_chorus import ChorusProcessor
from chorus_moe.serving.batches import Request, run_batch
from chorus_moe.serving.growing_text import GrowingText
from chorus_moe.serving.voices import Voice
from chorus_moe.training.answers import user_turn
from chorus_moe.training.loading import base_model

# A model answers one request at a time, whatever number of windows asks.
SPEAKING = threading.Lock()


@dataclass
class Answer:
    """One answer, growing while it is read.

    Args:
        inputs: what the model was given, one row.
        options: of the model's call, such as `closed_banks`.
    """

    inputs: Mapping[str, Tensor]
    options: Mapping[str, Any]
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    seconds: float = 0.0
    is_stopped: bool = False

    @property
    def tokens_per_second(self) -> float:
        """From the first token on: reading the prompt is not in it."""
        return max(len(self.tokens) - 1, 0) / self.seconds if self.seconds else 0.0


class Conversation:
    """Messages and media of all turns so far, and who answers.

    Args:
        voice: may be exchanged between turns.
        max_new_tokens: of an answer.
    """

    def __init__(self, voice: Voice, processor: ChorusProcessor, max_new_tokens: int = 256):
        self.voice, self.processor, self.max_new_tokens = voice, processor, max_new_tokens
        self.messages: list[dict[str, Any]] = []
        self.images: list[Any] = []
        self.audio: list[Any] = []

    def reset(self) -> None:
        self.messages, self.images, self.audio = [], [], []

    def ask(
        self,
        text: str,
        images: Sequence[str | Path | bytes] = (),
        audio: Sequence[str | Path | bytes] = (),
        **options: Any,
    ) -> tuple[Answer, Iterator[str]]:
        """The answer to one turn more, and its pieces as they come; the turn counts once the pieces are read.

        Args:
            images, audio: what this turn shows, before the text.
            options: of the model's call: `closed_banks`, `expert_budget`, `skip_threshold`.

        Raises:
            MediaError: an image or clip that cannot be used; the conversation is as before.
            ValueError: the conversation is longer than the model's context.
        """
        turn = user_turn(text, images, audio)
        messages = [*self.messages, *turn["messages"]]
        all_images, all_audio = [*self.images, *turn["images"]], [*self.audio, *turn["audio"]]
        inputs = self.processor.apply_chat_template(
            messages,
            images=all_images,
            audio=all_audio,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        room = base_model(self.voice.model).config.get_text_config().max_position_embeddings
        length = inputs["input_ids"].shape[1]
        if length >= room:
            raise ValueError(f"the conversation has {length} tokens, the context of the model is {room}; start anew")
        answer = Answer(dict(inputs), options)

        def pieces() -> Iterator[str]:
            has_failed = False
            try:
                yield from self._speak(answer, min(self.max_new_tokens, room - length))
            except Exception:
                has_failed = True
                raise
            finally:
                # Also of an answer that was stopped: the next turn goes on from what was said.
                if not has_failed:
                    self.messages = [*messages, {"role": "assistant", "content": answer.text}]
                    self.images, self.audio = all_images, all_audio

        return answer, pieces()

    def _speak(self, answer: Answer, max_new_tokens: int) -> Iterator[str]:
        config = deepcopy(base_model(self.voice.model).generation_config)
        config.max_new_tokens = max_new_tokens
        pieces: queue.Queue[str | Exception | None] = queue.Queue()
        request = Request(self.voice, dict(answer.inputs), config, done=pieces.put)
        listener = request.reader = Listener(self.processor, answer, pieces)

        def work() -> None:
            with SPEAKING:
                try:
                    run_batch([request], self.processor, **answer.options)
                except Exception as error:
                    request.finish(error)

        thread = threading.Thread(target=work, name="answer", daemon=True)
        thread.start()
        try:
            while (piece := pieces.get()) is not None:
                if isinstance(piece, Exception):
                    raise piece
                answer.text += piece
                yield piece
            rest = listener.text.rest()
            if rest:
                answer.text += rest
                yield rest
        finally:
            # The reader may leave before the end: a stop button, Ctrl-C.
            answer.is_stopped = not request.is_finished
            request.is_cancelled = True
            answer.text = answer.text.strip()


class Listener:
    """Takes the tokens of one answer, in the thread of the model."""

    def __init__(self, processor: ChorusProcessor, answer: Answer, pieces: "queue.Queue[str | Exception | None]"):
        self.answer, self.pieces, self._start = answer, pieces, 0.0
        self.text = GrowingText(partial(processor.tokenizer.decode, skip_special_tokens=True))

    def take(self, token: int) -> None:
        now = time.perf_counter()
        self._start = self._start or now
        self.answer.seconds = now - self._start
        self.answer.tokens.append(token)
        if piece := self.text.add(token):
            self.pieces.put(piece)
