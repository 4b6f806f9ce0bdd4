"""vLLM's server as a client sees it: a process of its own on loopback, asked through OpenAI's client.

Runs where vLLM is installed, `.ci/matrix vllm`. A budget of 32 tokens a step cuts prompts, and pictures in them, in
pieces that are answered over several steps, together with other requests.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from chorus_moe import ChorusConfig, ChorusForConditionalGeneration
from chorus_moe.surgery import build_tokenizer, processor_from_config
from chorus_moe.training.answers import user_turn
from chorus_moe.training.loading import load_model
from tests.conftest import tiny_config
from tests.processors.conftest import wav_bytes
from tests.serving.conftest import WORDS, parts, picture_file, sound_file

pytest.importorskip("vllm", reason="vLLM is not installed; `.ci/matrix vllm` installs it")
openai = pytest.importorskip("openai", reason="the extra `serve` is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1_800)]

TOKENS = 12
START_SECONDS = 1_200


def eight_kilohertz() -> bytes:
    time_T = np.arange(1_600) / 8_000
    return wav_bytes((0.3 * np.sin(2 * np.pi * 700 * time_T)).astype(np.float32), 8_000)


QUESTIONS: list[dict[str, Any]] = [
    {"text": f"what is it {seed}? " + "what do you see " * (seed % 5)}
    | ({"images": [picture_file(seed), picture_file(seed + 20)][: seed % 4]} if seed % 4 else {})
    | ({"audio": [sound_file(seed, 0.1 + 0.02 * seed)]} if seed % 3 == 1 else {})
    for seed in range(16)
] + [{"text": "what do you hear?", "audio": [eight_kilohertz()]}]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with all that is carried: cross-modal layers, windows beside full attention, gates of feed-forwards."""
    path = tmp_path_factory.mktemp("vllm") / "tiny"
    tokenizer = build_tokenizer(WORDS, vocab_size=300)
    torch.manual_seed(0)
    config = tiny_config(
        vocab_size=len(tokenizer),
        initializer_range=0.2,
        head_dim=32,
        num_hidden_layers=4,
        layer_types=["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        sliding_window=8,
        cross_modal_layers=[1, 3],
        skip_budget=0.5,
    )
    model = ChorusForConditionalGeneration(config)
    model.save_pretrained(path)
    processor_from_config(model.config, tokenizer).save_pretrained(path)
    return path


class Engine:
    """vLLM's server, which `vllm serve` starts as well, and a client."""

    def __init__(self, folder: Path, log: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        arguments = ["--model", str(folder), "--host", "127.0.0.1", "--port", str(port), "--served-model-name", "tiny"]
        sizes = ["--dtype", "float32", "--max-model-len", "256", "--max-num-batched-tokens", "32"]
        settings = {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        self.log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments, *sizes, "--enforce-eager"],
                cwd=Path(__file__).parents[3],
                env=os.environ | settings,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=START_SECONDS
        )

    def wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                self.client.models.list()
            except openai.APIConnectionError:
                time.sleep(1)
            else:
                return
        pytest.fail(f"vLLM did not start:\n{self.log.read_text()[-6_000:]}")

    def ask(self, content: Any, **options: Any) -> list[int]:
        """The ids of an answer: its text lacks letters whose last byte is missing."""
        answer = self.client.chat.completions.create(**self.request(content), **options)
        return answer.choices[0].model_extra["token_ids"]

    def stream(self, content: Any) -> list[int]:
        chunks = self.client.chat.completions.create(**self.request(content), stream=True)
        return [token for chunk in chunks for token in chunk.choices[0].model_extra.get("token_ids") or ()]

    def request(self, content: Any) -> dict[str, Any]:
        messages = [{"role": "user", "content": content}]
        extra = {"return_token_ids": True}
        return {"model": "tiny", "messages": messages, "max_tokens": TOKENS, "temperature": 0, "extra_body": extra}

    def stop(self) -> None:
        self.client.close()
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(60)
        # The engine is a child of the server: one session holds both.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def engine(served: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    if "chorus" not in {plugin.name for plugin in entry_points(group="vllm.general_plugins")}:
        pytest.fail("chorus-moe was installed before it had a plug-in for vLLM: pip install -e . again")
    engine = Engine(served, tmp_path_factory.mktemp("log") / "vllm.log")
    try:
        engine.wait()
        yield engine
    finally:
        engine.stop()


@pytest.fixture(scope="module")
def expected(served: Path) -> list[list[int]]:
    """What transformers' `generate` answers, one question at a time."""
    model, processor = load_model(str(served))
    answers = []
    for question in QUESTIONS:
        row = user_turn(question["text"], question.get("images", ()), question.get("audio", ()))
        batch = processor.apply_chat_template(
            [row["messages"]],
            images=[row["images"]],
            audio=[row["audio"]],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        tokens = model.generate(**batch, do_sample=False, max_new_tokens=TOKENS)
        answers.append(tokens[0, batch["input_ids"].shape[1] :].tolist())
    assert len(set(map(tuple, answers))) == len(QUESTIONS), "the answers must tell the questions apart"
    return answers


def content(question: dict[str, Any]) -> list[dict[str, Any]]:
    """Pictures and sound before the text, as `user_turn` places them."""
    return parts(question["text"], question.get("images", []), question.get("audio", []))


@pytest.mark.parametrize(
    "number", [0, 9, 6, 4, 1, 16], ids=["text", "a picture", "two", "sound", "both", "sound of another rate"]
)
def test_an_answer_is_that_of_generate_whole_and_streamed(
    engine: Engine, expected: list[list[int]], number: int
) -> None:
    assert [engine.ask(content(QUESTIONS[number])), engine.stream(content(QUESTIONS[number]))] == [expected[number]] * 2


def test_many_clients_at_once_get_each_its_own_answer(engine: Engine, expected: list[list[int]]) -> None:
    with ThreadPoolExecutor(16) as clients:
        answers = list(clients.map(lambda question: engine.ask(content(question)), QUESTIONS * 2))
    assert answers == expected * 2


@pytest.mark.parametrize(
    ("content", "extra", "message"),
    [
        (parts("?", [b"hello"]), {}, "image"),
        (parts("?", [], [b"hello"]), {}, "audio"),
        (parts("<image> ?", [picture_file(1)]), {}, "found 2 image placeholders in the prompt for 1 images"),
        (parts("?", [], [wav_bytes(np.zeros(4_000, dtype=np.float32))]), {}, "the clip is silent"),
        (
            parts("?", [picture_file(1)]),
            {"mm_processor_kwargs": {"num_image_tokens": 9}},
            "mm_processor_kwargs",
        ),
        (parts("what " * 300), {}, "256"),
    ],
    ids=["no picture", "no sound", "a typed placeholder", "silence", "settings", "too long"],
)
def test_a_bad_request_is_refused_and_the_engine_goes_on(
    engine: Engine, expected: list[list[int]], content: Any, extra: dict[str, Any], message: str
) -> None:
    request = engine.request(content)
    with pytest.raises(openai.BadRequestError) as raised:
        engine.client.chat.completions.create(**request | {"extra_body": extra})
    assert message in str(raised.value)
    assert engine.ask(QUESTIONS[0]["text"]) == expected[0]


def test_a_generated_token_is_never_a_placeholder(engine: Engine, served: Path) -> None:
    """With a bias that would make it the answer."""
    media = ChorusConfig.from_pretrained(served)
    ids = {media.image_token_id, media.audio_token_id}
    assert not ids & set(engine.ask("what is it?", logit_bias={str(token): 100 for token in ids}))
