"""Smaller models: bytes, accuracy and speed in 8 and 4 bits.

Run as `python -m benchmarks.compression --threads 1 --demo out/demo`, after `make demo`; some minutes, most of them the
compiler's. Three parts, each with a summary as soon as it is done:

- bytes of the model of `benchmarks.decode`, of float32;
- the demo's model, and copies of it in 8 and 4 bits, answer the demo's held-out questions: the drop is in points;
- prefill and decoding of the first model, compiled, in float32, 8 and 4 bits and, where `llama-cpp-python` and `gguf`
  are installed, llama.cpp on the same weights in Q8_0 and Q4_0. A ratio above 1: ours in that format is faster than our
  float32, or than llama.cpp's.
"""

import importlib.util
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.decode import QUICK, SIZES, WIDTH, chorus_model, generate, llama_cpp, qwen_model
from benchmarks.digit_lessons import media
from benchmarks.timing import OURS, Report, measure, parse
from chorus_moe.fastpaths.compiled_decoding import compile_decoding
from chorus_moe.modeling.modeling_generation import ChorusForConditionalGeneration
from chorus_moe.processors.processing_chorus import ChorusProcessor
from chorus_moe.surgery import bytes_report, quantize
from chorus_moe.training.demo.answers import answer, load_questions
from chorus_moe.training.demo.data import BASE_SKILLS, DigitQuestions, Sample, corpus
from chorus_moe.training.demo.model import build_demo

FORMATS = {"int8": "Q8_0", "int4": "Q4_0"}
Models = dict[str, ChorusForConditionalGeneration]


def with_copies(model: ChorusForConditionalGeneration) -> Models:
    """The model, and copies of it in fewer bits."""
    models = {OURS: model.eval()} | {name: deepcopy(model) for name in FORMATS}
    for name in FORMATS:
        quantize(models[name], name, verbose=False)
    return models


def bytes_ratios(models: Models) -> dict[str, float]:
    whole = bytes_report(models[OURS]).bytes
    return {f"bytes_ratio_{name}": bytes_report(models[name]).bytes / whole for name in FORMATS}


Demo = tuple[ChorusForConditionalGeneration, ChorusProcessor, list[Sample]]


def demo_of(parsed: Any) -> Demo:
    """The demo's model, and questions that it has not met; with `--quick` one that has learned nothing.

    Raises:
        FileNotFoundError: the folder holds no demo.
    """
    if parsed.quick:
        with media(parsed) as found:
            questions = DigitQuestions(found.test_pictures, found.test_clips, BASE_SKILLS, 2)
            return *build_demo(corpus()), [questions[index] for index in range(2)]
    model, test = parsed.demo / "merged", parsed.demo / "questions" / "test"
    for path in (model, test):
        if not path.is_dir():
            raise FileNotFoundError(
                f"{path} is not there: run `make demo`, give its folder as --demo, or --parts speed"
            )
    samples = load_questions(test)[: parsed.questions]
    return ChorusForConditionalGeneration.from_pretrained(model), ChorusProcessor.from_pretrained(model), samples


def accuracy_drops(demo: Demo, report: Report) -> dict[str, float]:
    """Points that copies in fewer bits lose on held-out questions."""
    model, processor, samples = demo
    found = {}
    for name, each in with_copies(model).items():
        answers = zip(answer(each, processor, samples), samples, strict=True)
        found[name] = sum(given == sample["answer"] for given, sample in answers) / len(samples)
    report.add(f"demo, {len(samples)} questions", {f"{n}_accuracy": share for n, share in found.items()}, "accuracy")
    return {f"accuracy_drop_{name}": 100 * (found[OURS] - found[name]) for name in FORMATS}


def speeds(models: Models, sizes: dict[str, int], width: int, parsed: Any, report: Report) -> dict[str, float]:
    """Tokens a second, and how many times as long others take."""
    prompt, count = (4, 3) if parsed.quick else (parsed.prompt, parsed.new_tokens)
    input_ids = torch.randint(1, sizes["vocab_size"], (1, prompt))
    variants: dict[str, Callable[[int], Any]] = {
        name: lambda tokens, m=model: generate(m, input_ids, tokens) for name, model in models.items()
    }
    peer = qwen_model(sizes, width, models[OURS]).eval()
    for model in models.values():
        model.generation_config.eos_token_id = None
        compile_decoding(model)
    if importlib.util.find_spec("llama_cpp") and not parsed.quick:
        variants |= {
            FORMATS[name]: llama_cpp(peer, input_ids, count + 1, FORMATS[name]) for name in models if name != OURS
        }
    calls = {f"{name} {n}": lambda v=v, n=n: v(n) for name, v in variants.items() for n in (1, 1 + count)}
    timings = measure(calls, parsed.rounds, memory=False)
    prefill = {name: timings[f"{name} 1"].rounds for name in variants}
    decode = {
        name: [b - a for a, b in zip(first, timings[f"{name} {1 + count}"].rounds, strict=True)]
        for name, first in prefill.items()
    }
    report.add("prefill", {f"{name}_ms": 1e3 * median(rounds) for name, rounds in prefill.items()})
    report.add("decode", {f"{n}_tokens_per_second": count / median(r) for n, r in decode.items()}, "tokens_per_second")

    def times_as_long(of: dict[str, list[float]], other: str, ours: str) -> float:
        return median(b / a for a, b in zip(of[ours], of[other], strict=True))

    found = {f"decode_ratio_{name}": times_as_long(decode, OURS, name) for name in models if name != OURS}
    found |= {f"prefill_ratio_{name}": times_as_long(prefill, OURS, name) for name in models if name != OURS}
    for name, key in (("int8", "llama_cpp_ratio"), ("int4", "llama_cpp_ratio_int4")):
        if FORMATS[name] in decode:
            found[key] = times_as_long(decode, FORMATS[name], name)
    return found


def main(arguments: list[str] | None = None) -> None:
    options = (
        ("--prompt", {"type": int, "default": 64, "help": "tokens of the prompt"}),
        ("--new-tokens", {"type": int, "default": 32}),
        (
            "--formats",
            {"nargs": "+", "choices": list(FORMATS), "default": list(FORMATS), "help": "whose speed is measured"},
        ),
        ("--demo", {"type": Path, "default": Path("out/demo"), "help": "folder that `make demo` wrote"}),
        ("--questions", {"type": int, "default": 600, "help": "held-out questions of the demo, from the first"}),
        ("--parts", {"nargs": "+", "choices": ["accuracy", "speed"], "default": ["accuracy", "speed"]}),
    )
    parsed = parse("Bytes, accuracy and speed in fewer bits.", arguments, *options)
    sizes, width = (QUICK, 16) if parsed.quick else (SIZES, WIDTH)
    report = Report("fewer bits", parsed)
    demo = demo_of(parsed) if "accuracy" in parsed.parts else None
    models = with_copies(chorus_model(sizes, width))
    summary: dict[str, float] = {}

    def add(found: dict[str, float]) -> None:
        figures = "  ".join(f"{name} {value:.3g}" for name, value in found.items())
        print(f"{'summary':<34} | {figures}", flush=True)
        summary.update(found)
        report.cases["summary"] = summary
        report.save()

    add(bytes_ratios(models))
    if demo is not None:
        add(accuracy_drops(demo, report))
    if "speed" in parsed.parts:
        # Each is compiled.
        timed = {OURS, "int8"} if parsed.quick else {OURS, *parsed.formats}
        add(speeds({name: models[name] for name in models if name in timed}, sizes, width, parsed, report))


if __name__ == "__main__":
    main()
