"""The server as its clients see it: OpenAI's own client and bare sockets on loopback."""

import asyncio
import json
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from chorus_moe.training.answers import answer_rows, user_turn
from chorus_moe.training.loading import load_model
from tests.serving.conftest import parts, picture_file, sound_file

openai = pytest.importorskip("openai", reason="the extra `serve` is not installed")
pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

from transformers.cli.serving import chat_completion  # noqa: E402

from chorus_moe.processors.processing_chorus import ChorusProcessor  # noqa: E402
from chorus_moe.serving.batches import BatchManager  # noqa: E402
from chorus_moe.serving.server import (  # noqa: E402
    TAKES_TOOLS,
    ChatHandler,
    ServedModels,
    Server,
    build_app,
    uvicorn,
)
from chorus_moe.serving.voices import Voice, load_voices  # noqa: E402

TOKENS = 12
CONTEXT = 512  # of the test model


class Running:
    """A server on a port of its own, in a thread."""

    def __init__(self, voices: dict[str, Voice], processor: ChorusProcessor, **options: Any):
        app = build_app(voices, processor, **options)
        self.server = Server(uvicorn.Config(app, port=0, log_level="critical", lifespan="on"))
        self.thread = threading.Thread(target=lambda: asyncio.run(self.server.serve()))
        self.thread.start()
        deadline = time.monotonic() + 30
        while not self.server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0, timeout=60
        )

    def ask(self, content: Any, model: str = "tiny", **options: Any) -> str:
        options = {"max_tokens": TOKENS, **options}
        answer = self.client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": content}], **options
        )
        return answer.choices[0].message.content

    def stream(self, content: Any, **options: Any) -> str:
        options = {"max_tokens": TOKENS, "model": "tiny", **options}
        chunks = self.client.chat.completions.create(
            messages=[{"role": "user", "content": content}], stream=True, **options
        )
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    def get(self, path: str) -> tuple[int, Any]:
        return call(self.port, "GET", path)

    def stop(self) -> None:
        self.client.close()
        self.server.should_exit = True
        self.thread.join(20)


def call(port: int, method: str, path: str, body: bytes = b"") -> tuple[int, Any]:
    """One bare request; status and JSON."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as link:
        head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
        link.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        answer = b""
        while piece := link.recv(65536):
            answer += piece
    head_bytes, _, text = answer.partition(b"\r\n\r\n")
    return int(head_bytes.split()[1]), json.loads(text)


@pytest.fixture(scope="module")
def running(folder: Path, adapter: Path) -> Iterator[Running]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    server = Running(*load_voices(str(folder), {"loud": str(adapter)}), body_seconds=1.5, max_request_bytes=2**20)
    yield server
    server.stop()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def handler(folder: Path) -> ChatHandler:
    voices, processor = load_voices(str(folder))
    return ChatHandler(ServedModels(voices), processor, BatchManager(processor))


QUESTIONS: list[dict[str, Any]] = [
    {"text": f"what is it {seed}?"}
    | ({"images": [picture_file(seed)]} if seed % 4 != 3 else {})
    | ({"audio": [sound_file(seed, 0.1 + 0.02 * seed)]} if seed % 3 == 1 else {})
    for seed in range(16)
]


@pytest.fixture(scope="module")
def alone(folder: Path, adapter: Path) -> dict[str, list[str]]:
    """Name -> the answers of a model that nobody shares, one question at a time: transformers' own `generate`."""
    found = {}
    for name, source in (("tiny", folder), ("loud", adapter)):
        model, processor = load_model(source)
        rows = [
            user_turn(question["text"], question.get("images", ()), question.get("audio", ())) for question in QUESTIONS
        ]
        found[name] = [answer_rows(model, processor, [row], max_new_tokens=TOKENS)[0] for row in rows]
    return found


def content(question: dict[str, Any]) -> list[dict[str, Any]]:
    return parts(question["text"], question.get("images", []), question.get("audio", []))


def test_answers_of_the_test_model_tell_the_questions_apart(alone: dict[str, list[str]]) -> None:
    """Otherwise the tests below could not see a mix-up."""
    assert len({*alone["tiny"], *alone["loud"]}) == 2 * len(QUESTIONS)


@pytest.mark.parametrize("number", [3, 0, 7, 1], ids=["text", "image", "sound", "image and sound"])
def test_text_images_and_sound_are_answered_whole_and_streamed(
    running: Running, alone: dict[str, list[str]], number: int
) -> None:
    for answer in (running.ask, running.stream):
        assert answer(content(QUESTIONS[number])).strip() == alone["tiny"][number]


def test_many_clients_at_once_get_each_its_own_answer(running: Running, alone: dict[str, list[str]]) -> None:
    """Media of all kinds, whole and streamed, with and without the adapter, and answers of several lengths."""

    def one(number: int) -> str:
        name = ("tiny", "loud")[number // 16 % 2]
        answer = running.stream if number % 2 else running.ask
        return answer(content(QUESTIONS[number % 16]), model=name).strip()

    with ThreadPoolExecutor(16) as clients:
        answers = list(clients.map(one, range(64)))
    assert answers == (alone["tiny"] + alone["loud"]) * 2


def test_a_row_of_a_batch_ends_at_its_own_length(running: Running, alone: dict[str, list[str]]) -> None:
    lengths = [1, 5, 12, 3, 9, 2, 12, 7]

    def one(number: int) -> Any:
        message = {"role": "user", "content": content(QUESTIONS[number])}
        return running.client.chat.completions.create(model="tiny", messages=[message], max_tokens=lengths[number])

    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(one, range(8)))
    assert [answer.usage.completion_tokens for answer in answers] == lengths
    assert all(answer.choices[0].finish_reason == "length" for answer in answers)
    assert answers[2].choices[0].message.content.strip() == alone["tiny"][2]


def test_models_are_listed_and_found_by_name(running: Running) -> None:
    assert [model.id for model in running.client.models.list()] == ["tiny", "loud"]
    with pytest.raises(openai.NotFoundError, match="no model 'other' here; choose from tiny, loud"):
        running.ask("what is it?", model="other")


def test_a_seed_makes_a_drawn_answer_repeatable(running: Running) -> None:
    draws = [running.ask("what is it?", temperature=1.5, seed=seed) for seed in (1, 2, 1, 2)]
    assert draws[:2] == draws[2:] and draws[0] != draws[1]


def bomb(side: int = 50_000) -> bytes:
    """A PNG of a few hundred bytes that claims `side`² pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 999)) + chunk(b"IEND", b"")
    )


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "bomb": ({"content": parts("?", [bomb()])}, "pixels, the limit is"),
    "no picture": ({"content": parts("?", [b"hello"])}, "image 0: not a readable image"),
    "no sound": ({"content": parts("?", [], [b"hello"])}, "audio 0: no readable sound"),
    "a path": (
        {"content": [{"type": "image_url", "image_url": {"url": "/etc/hostname"}}]},
        "message 0, part 0: nothing is fetched",
    ),
    "an address": (
        {"content": [{"type": "image_url", "image_url": {"url": "http://localhost/cat.png"}}]},
        "message 0, part 0: nothing is fetched",
    ),
    "our own part": ({"content": [{"type": "image", "path": "/etc/hostname"}]}, "unknown type 'image'"),
    "no content": ({"content": 3}, "message 0: content is a string or a list of parts"),
    "no tokens": ({"content": "?", "max_tokens": 0}, "max_tokens=0: expected a whole number"),
    "too many tokens": ({"content": "?", "max_tokens": 600}, "the context of the model is 512"),
    "too long": ({"content": "what is it? " * 400}, "the context of the model is 512"),
    "two answers": ({"content": "?", "extra_body": {"n": 2}}, "n=2: not supported here"),
    "settings": (
        {"content": "?", "extra_body": {"generation_config": '{"num_beams": 1000}'}},
        "generation_config",
    ),
    "template": (
        {"content": "?", "extra_body": {"chat_template_kwargs": {"images": ["/etc/hostname"]}}},
        "chat_template_kwargs: ['images']",
    ),
    "temperature": ({"content": "?", "temperature": -1}, "temperature=-1: expected a number from 0 to 2"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_cannot_be_answered_gets_one_line(running: Running, name: str, stream: bool) -> None:
    options, text = BAD[name]
    with pytest.raises(openai.BadRequestError) as caught:
        running.ask(options["content"], stream=stream, **{k: v for k, v in options.items() if k != "content"})
    message = caught.value.body["message"]
    assert text in message and "\n" not in message
    assert running.get("/health") == (200, {"status": "ok"})


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/load_model"),
        ("POST", "/reset"),
        ("POST", "/v1/responses"),
        ("GET", "/docs"),
        ("GET", "/openapi.json"),
    ],
)
def test_only_the_addresses_of_answers_exist(running: Running, method: str, path: str) -> None:
    status, body = call(running.port, method, path, b"{}")
    assert status == 404 and "Not Found" in body["error"]["message"]


@pytest.mark.parametrize("body", [b"[[", b"[]", b"3", b"[" * 100_000, b"", b'{"messages": [' + b"[" * 9_000])
def test_a_body_that_is_no_request_is_refused(running: Running, body: bytes) -> None:
    status, answer = call(running.port, "POST", "/v1/chat/completions", body)
    assert status == 400 and answer["error"]["message"]


def test_a_request_over_the_size_limit_is_refused(running: Running) -> None:
    status, answer = call(running.port, "POST", "/v1/chat/completions", b" " * (2**20 + 1))
    assert status == 413 and "the limit of a request is 1048576" in answer["error"]["message"]


def test_a_client_that_hangs_holds_up_nobody_and_is_sent_away(running: Running, alone: dict[str, list[str]]) -> None:
    with socket.create_connection(("127.0.0.1", running.port), timeout=30) as link:
        link.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 900\r\n\r\n{")
        assert running.ask(content(QUESTIONS[0])).strip() == alone["tiny"][0]
        assert link.recv(4096).startswith(b"HTTP/1.1 408")


def test_a_client_that_leaves_ends_its_answer(running: Running, alone: dict[str, list[str]]) -> None:
    chunks = running.client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "what is it?"}], max_tokens=480, stream=True,
        logit_bias={"2": -100},
    )  # fmt: skip
    next(iter(chunks))
    chunks.close()
    start = time.monotonic()
    assert running.ask(content(QUESTIONS[0])).strip() == alone["tiny"][0]
    seconds = time.monotonic() - start
    whole = time.monotonic()
    running.ask("what is it?", max_tokens=480, logit_bias={"2": -100})
    assert seconds < (time.monotonic() - whole) / 2


def test_sigterm_drains(folder: Path) -> None:
    """The answer that has begun is sent to its end, a new client is refused, and the process ends."""
    program = [sys.executable, "-W", "ignore", "-m", "chorus_moe.serving.commands", "serve", str(folder), "--port", "0"]
    process = subprocess.Popen(program, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    port = None
    for line in process.stderr:
        if found := re.search(r"serving on http://127\.0\.0\.1:(\d+)/v1", line):
            port = int(found[1])
            break
    assert port
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
        chunks = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "what is it?"}], max_tokens=200, stream=True,
            logit_bias={"2": -100},
        )  # fmt: skip
        read = iter(chunks)
        next(read)
        process.send_signal(signal.SIGTERM)
        last = list(read)[-1]
    assert last.choices[0].finish_reason == "length" and last.usage.completion_tokens == 200
    assert process.wait(timeout=20) == -signal.SIGTERM
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)


TOOLS = [{"type": "function", "function": {"name": "digit", "parameters": {"type": "object", "properties": {}}}}]


@pytest.mark.skipif(not TAKES_TOOLS, reason="this transformers hands no tools on")
def test_tools_reach_the_template_and_what_reads_calls_out_of_an_answer(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model of random weights calls no tool, so transformers' own readers of calls are asked what they were given."""
    voices, processor = load_voices(str(folder))
    assert isinstance(processor.chat_template, str)
    processor.chat_template += "{{ tools | tojson if tools }}"
    given: list[Any] = []
    for name in ("build_response_parser", "parse_assistant_message"):
        reads = getattr(chat_completion, name)

        def note(*arguments: Any, reads: Any = reads, **options: Any) -> Any:
            given.append(
                (processor.tokenizer.decode(torch.as_tensor(inputs_of(arguments, options))[0]), options["tools"])
            )
            return reads(*arguments, **options)

        monkeypatch.setattr(chat_completion, name, note)
    server = Running(voices, processor)
    try:
        server.ask("what is it?", tools=TOOLS)
        server.stream("what is it?", tools=TOOLS)
        server.ask("what is it?")
    finally:
        server.stop()
    assert [tools for _, tools in given] == [TOOLS, TOOLS, None]
    assert ['"name": "digit"' in prompt for prompt, _ in given] == [True, True, False]


def inputs_of(arguments: tuple, options: dict[str, Any]) -> Any:
    """The prompt, which one of the readers takes by name."""
    return options["input_ids"] if "input_ids" in options else arguments[2]


@pytest.mark.parametrize(
    ("asked", "draws"),
    [
        ({}, False),
        ({"temperature": 0.5}, True),
        ({"temperature": 0}, False),
        ({"top_p": 0.5}, True),
        ({"top_p": 0.5, "temperature": 0}, False),
        ({"top_p": 0.5, "temperature": 1}, True),
    ],
    ids=str,
)
def test_who_asks_for_a_temperature_or_a_share_gets_a_draw(
    handler: ChatHandler, asked: dict[str, Any], draws: bool
) -> None:
    config = handler._configure(asked, handler.models.find(None), 10)
    assert bool(config.do_sample) is draws and config.seed is None
    assert (config.temperature, config.top_p) == (asked.get("temperature"), asked.get("top_p"))


@pytest.mark.parametrize(
    ("asked", "prompt", "length"),
    [
        ({}, 1, CONTEXT - 1),
        ({}, CONTEXT - 1, 1),
        ({"max_tokens": 7}, 10, 7),
        ({"max_completion_tokens": 9}, 10, 9),
        ({"max_completion_tokens": 9, "max_tokens": 7}, 10, 9),
        ({"max_tokens": 12}, CONTEXT - 12, 12),
    ],
)
def test_how_long_an_answer_may_be(handler: ChatHandler, asked: dict[str, Any], prompt: int, length: int) -> None:
    assert handler._configure(asked, handler.models.find(None), prompt).max_new_tokens == length


@pytest.mark.parametrize(("asked", "prompt"), [({}, CONTEXT), ({"max_tokens": 12}, CONTEXT - 11)])
def test_an_answer_beyond_the_context_is_refused_with_both_numbers(
    handler: ChatHandler, asked: dict[str, Any], prompt: int
) -> None:
    most = asked.get("max_tokens", 1)
    with pytest.raises(ValueError, match=f"prompt has {prompt} tokens and the answer up to {most}, .* is {CONTEXT};"):
        handler._configure(asked, handler.models.find(None), prompt)


def test_seed_and_biases_of_a_request(handler: ChatHandler) -> None:
    config = handler._configure({"seed": 3, "logit_bias": {"2": -100}}, handler.models.find("tiny"), 4)
    assert config.seed == 3 and [bias for _, bias in dict(config.sequence_bias).items()] == [-100.0]
    assert all(isinstance(bias, float) for bias in dict(config.sequence_bias).values())
