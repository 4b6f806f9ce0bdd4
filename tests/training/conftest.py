"""A tokenizer, a processor, a model and rows, small enough that a step takes some milliseconds."""

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from chorus_moe import ChorusConfig, ChorusForConditionalGeneration, ChorusProcessor
from chorus_moe.surgery.processor import processor_from_config
from chorus_moe.surgery.tokenizer import build_tokenizer
from chorus_moe.training.doctor.checks import Check
from chorus_moe.training.doctor.examine import examine
from chorus_moe.training.doctor.finding import Finding
from chorus_moe.training.doctor.inputs import Patient
from tests.conftest import tiny_config

QUESTION = "what is it?"
ANSWERS = ("three", "four", "five")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products are fastest, and sums come out bit for bit the same, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer([QUESTION, *ANSWERS], vocab_size=300)


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0, **text: Any) -> ChorusForConditionalGeneration:
    torch.manual_seed(seed)
    return ChorusForConditionalGeneration(tiny_config(vocab_size=len(tokenizer), **text))


def make_row(index: int) -> dict[str, Any]:
    """An image, a clip, or both, and a question; the answer tells which."""
    rng, kind = np.random.default_rng(index), index % 3
    row: dict[str, Any] = {"images": [], "audio": []}
    content = [{"type": "text", "text": QUESTION}]
    if kind != 1:
        content.insert(0, {"type": "image"})
        row["images"] = [Image.fromarray(rng.integers(0, 255, (24, 24), dtype=np.uint8))]
    if kind != 0:
        content.insert(0, {"type": "audio"})
        row["audio"] = [{"array": rng.normal(0, 0.1, 2_000).astype(np.float32), "sampling_rate": 16_000}]
    answer = {"role": "assistant", "content": ANSWERS[kind]}
    return {**row, "messages": [{"role": "user", "content": content}, answer]}


def make_rows(count: int) -> list[dict[str, Any]]:
    return [make_row(index) for index in range(count)]


@pytest.fixture(scope="session")
def trained_tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def tokenizer(trained_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """A test's own: a processor holds the very object it is given, and what one test sets would meet the next."""
    return copy.deepcopy(trained_tokenizer)


@pytest.fixture
def config(tokenizer: PreTrainedTokenizerFast) -> ChorusConfig:
    return tiny_config(vocab_size=len(tokenizer))


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> ChorusForConditionalGeneration:
    return make_model(tokenizer).eval()


@pytest.fixture
def processor(config: ChorusConfig, tokenizer: PreTrainedTokenizerFast) -> ChorusProcessor:
    return processor_from_config(config, tokenizer)


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    return make_rows(6)


# Banks that the labels of an answer reach in every layer: a model with which the doctor finds nothing to mind.
REACHED_BANKS = {"text": {}, "image": {"layers": [1]}, "audio": {"layers": [1]}, "common": {}}


def make_patient(tokenizer: PreTrainedTokenizerFast, **text: Any) -> Patient:
    model = make_model(tokenizer, **({"expert_banks": REACHED_BANKS} | text)).eval()
    return Patient(model, processor_from_config(model.config, tokenizer))


@pytest.fixture
def patient(tokenizer: PreTrainedTokenizerFast) -> Patient:
    return make_patient(tokenizer)


def found_by(patient: Patient, *checks: Check) -> dict[str, Finding]:
    """What some checks find, by name."""
    return {finding.name: finding for finding in examine(patient, checks)}


def failing(patient: Patient, *checks: Check) -> dict[str, str]:
    """Name -> explanation of those checks that fail."""
    findings = found_by(patient, *checks).values()
    return {finding.name: finding.explanation for finding in findings if finding.verdict == "failed"}
