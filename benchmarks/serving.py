"""The server under load, on loopback: how fast it answers, and whether every client gets its own answer.

    python -m benchmarks.serving --clients 1 8 32

Unusual here:
- each request has a picture, a clip, both or a text that no other has, and the model's weights are so large that the
  answers differ. What `generate` says to it alone is known before: any other answer counts in `answers_mixed_up`;
- beside the clients one hangs in the middle of its request, and one sends a picture that claims 2.5 billion pixels;
- the last requests are on their way when the server gets SIGTERM, and must be answered.
"""

import base64
import http.client
import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from PIL import Image

from benchmarks.same_bits import AUDIO, TEXT, VISION
from benchmarks.timing import OURS, Report, parse
from chorus_moe import ChorusConfig, ChorusForConditionalGeneration, ChorusProcessor
from chorus_moe.surgery import build_tokenizer, processor_from_config
from chorus_moe.training.answers import answer_rows, user_turn

RATE = 16_000


@dataclass
class Question:
    text: str
    images: list[bytes]
    clips: list[bytes]
    expected: str = ""

    def body(self, new_tokens: int, stream: bool) -> bytes:
        """Of an OpenAI request."""
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded(file)}"}}
            for file in self.images
        ]
        content += [{"type": "input_audio", "input_audio": {"data": encoded(f), "format": "wav"}} for f in self.clips]
        content.append({"type": "text", "text": self.text})
        message = {"role": "user", "content": content}
        return json.dumps({"messages": [message], "max_tokens": new_tokens, "stream": stream}).encode()


def encoded(file: bytes) -> str:
    return base64.b64encode(file).decode()


def question(number: int) -> Question:
    """The kinds take turns: picture, clip, both, text alone."""
    rng, kind = np.random.default_rng(number), number % 4
    picture, sound = io.BytesIO(), io.BytesIO()
    colours = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(colours).resize((64, 64), Image.Resampling.NEAREST).save(picture, "PNG")
    seconds = np.arange(int(RATE * rng.uniform(0.2, 1.0))) / RATE
    tones = sum(0.1 * np.sin(2 * np.pi * hertz * seconds) for hertz in rng.uniform(200, 4_000, 3))
    soundfile.write(sound, tones, RATE, format="WAV")
    return Question(
        f"question {number}: what is it?",
        [picture.getvalue()] if kind in (0, 2) else [],
        [sound.getvalue()] if kind in (1, 2) else [],
    )


def save_model(folder: Path, hidden_size: int, layers: int) -> tuple[ChorusForConditionalGeneration, ChorusProcessor]:
    """A model of random weights, large enough that every picture and clip changes the answer."""
    tokenizer = build_tokenizer(["question 0123456789: what is it?"], vocab_size=300)
    text = TEXT | {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "moe_intermediate_size": hidden_size,
        "initializer_range": 1.6 / hidden_size**0.5,
    }
    torch.manual_seed(0)
    media = {"image_token_id": 3, "audio_token_id": 4}
    model = ChorusForConditionalGeneration(
        ChorusConfig(text_config=text, vision_config=VISION, audio_config=AUDIO, **media)
    ).eval()
    processor = processor_from_config(model.config, tokenizer)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


@contextmanager
def server(folder: Path, threads: int) -> Any:
    """(process, port) of a server in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    words = [sys.executable, "-W", "ignore", "-m", "chorus_moe.serving.commands", "serve", str(folder), "--port", "0"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"serving on http://127\.0\.0\.1:(\d+)/", line):
                yield process, int(found[1])
                break
        else:
            raise RuntimeError("the server did not start:\n" + "".join(lines[-20:]))
    finally:
        process.kill()
        process.wait()


@dataclass
class Answer:
    """What a client got: seconds to the first word and to the end; no text for a request that was lost."""

    first: float
    whole: float
    text: str | None
    tokens: int = 0


def ask(port: int, asked: Question, new_tokens: int) -> Answer:
    """One streamed request."""
    start = time.perf_counter()
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    try:
        link.request("POST", "/v1/chat/completions", asked.body(new_tokens, True), {"Content-Type": "application/json"})
        response = link.getresponse()
        if response.status != 200:
            return Answer(0.0, 0.0, None)
        text, tokens, first, is_whole = "", 0, 0.0, False
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line.removeprefix(b"data: "))
            if "error" in chunk:
                return Answer(0.0, 0.0, None)
            word = chunk["choices"][0]["delta"].get("content") or ""
            first = first or (time.perf_counter() - start if word else 0.0)
            text += word
            is_whole = is_whole or chunk["choices"][0].get("finish_reason") is not None
            tokens = chunk.get("usage", {}).get("completion_tokens", tokens)
        return Answer(first, time.perf_counter() - start, text.strip() if is_whole else None, tokens)
    except (OSError, http.client.HTTPException):
        return Answer(0.0, 0.0, None)
    finally:
        link.close()


def bomb() -> bytes:
    """A PNG of a hundred bytes that claims 50,000 x 50,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99))


def is_refused(port: int) -> bool:
    """Whether a bomb is answered with status 400."""
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    body = Question("?", [bomb()], []).body(1, False)
    link.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    status = link.getresponse().status
    link.close()
    return status == 400


def load(port: int, questions: list[Question], clients: int, new_tokens: int) -> dict[str, float]:
    """Figures of `clients` that ask at once, one question after another each, beside one that hangs and one bomb."""
    with (
        socket.create_connection(("127.0.0.1", port)) as hanging,
        ThreadPoolExecutor(clients) as pool,
        ThreadPoolExecutor(1) as beside,
    ):
        hanging.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 900\r\n\r\n{")
        start = time.perf_counter()
        refused = beside.submit(is_refused, port)
        answers = list(pool.map(lambda asked: ask(port, asked, new_tokens), questions))
        seconds = time.perf_counter() - start
    return figures(questions, answers) | {
        "tokens_per_second": sum(answer.tokens for answer in answers) / seconds,
        "bombs_refused": float(refused.result()),
    }


def figures(questions: list[Question], answers: list[Answer]) -> dict[str, float]:
    pairs = list(zip(questions, answers, strict=True))
    got = [answer for answer in answers if answer.text is not None] or [Answer(0.0, 0.0, None)]
    return {
        "requests": len(answers),
        "requests_lost": sum(answer.text is None for answer in answers),
        "answers_mixed_up": sum(answer.text not in (None, asked.expected) for asked, answer in pairs),
        "p50_ms": 1_000 * float(np.quantile([answer.whole for answer in got], 0.5)),
        "p99_ms": 1_000 * float(np.quantile([answer.whole for answer in got], 0.99)),
        "first_word_p50_ms": 1_000 * float(np.quantile([answer.first for answer in got], 0.5)),
    }


def drain(process: Any, port: int, questions: list[Question], new_tokens: int) -> dict[str, float]:
    """Figures of requests that are on their way when the server is told to end."""
    with ThreadPoolExecutor(len(questions)) as pool:
        futures = [pool.submit(ask, port, asked, new_tokens) for asked in questions]
        # All have arrived, and hardly one is answered.
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        answers = [future.result() for future in futures]
    process.wait(timeout=60)
    return figures(questions, answers) | {"ended_by_sigterm": float(process.returncode == -signal.SIGTERM)}


def add(report: Report, case: str, values: dict[str, float]) -> None:
    report.add(case, values)
    counted = ("tokens_per_second", "requests", "requests_lost", "answers_mixed_up", "bombs_refused")
    print(" " * 37 + ", ".join(f"{name} {values[name]:.4g}" for name in counted if name in values), flush=True)


def main(arguments: list[str] | None = None) -> None:
    options = (
        ("--clients", {"type": int, "nargs": "+", "default": [1, 8, 32]}),
        ("--requests", {"type": int, "default": 64, "help": "of each number of clients"}),
        ("--new-tokens", {"type": int, "default": 24}),
        ("--hidden-size", {"type": int, "default": 256}),
        ("--layers", {"type": int, "default": 4}),
    )
    parsed = parse("The server under load.", arguments, *options)
    if parsed.quick:
        parsed.clients, parsed.requests, parsed.new_tokens, parsed.hidden_size, parsed.layers = [4], 8, 6, 64, 2
    report = Report(f"server, {parsed.layers} layers of {parsed.hidden_size}, {parsed.new_tokens} new tokens", parsed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / OURS
        model, processor = save_model(folder, parsed.hidden_size, parsed.layers)
        questions = [question(number) for number in range(parsed.requests)]
        for asked in questions:
            row = user_turn(asked.text, asked.images, asked.clips)
            asked.expected = answer_rows(model, processor, [row], max_new_tokens=parsed.new_tokens)[0]
        same = parsed.requests - len({asked.expected for asked in questions})
        assert same == 0, f"{same} questions share an answer: a mix-up would not be seen"
        with server(folder, parsed.threads) as (process, port):
            ask(port, questions[0], parsed.new_tokens)
            for clients in parsed.clients:
                case = f"{clients} clients" if clients > 1 else "1 client"
                add(report, case, load(port, questions, clients, parsed.new_tokens))
            last = questions[: max(parsed.clients)]
            add(report, "SIGTERM", drain(process, port, last, parsed.new_tokens))
    report.save()


if __name__ == "__main__":
    main()
