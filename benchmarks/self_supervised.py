"""Does a model learn digits from fewer labels if it has seen pictures without any? scikit-learn's handwritten digits.

Run as `python -m benchmarks.self_supervised`. For each seed a small decoder behind a frozen vision tower, which nobody
trained, learns from all training pictures without labels: it predicts what the tower says of hidden patches
(`masked_image_weight: 1`, as in docs/guides/self_supervision.md). Then copies of it, and of the same decoder before
that, learn to name the digit from some labels a class, in equally many steps. The tower stays frozen throughout. Of
scikit-learn's 1,797 pictures 1,348 are for training, so `all` is about 134 labels a class.

Tables: accuracy on pictures by writers that none has met, by seed, and its mean over seeds; the loss of hidden patches
in the first and last tenth of pre-training, and the processor seconds of it.
"""

import contextlib
import copy
import io
import tempfile
import time
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import numpy as np
from transformers import TrainingArguments, set_seed

from benchmarks.timing import Report, parse
from chorus_moe.modeling.configuration_chorus import ChorusConfig
from chorus_moe.modeling.modeling_generation import ChorusForConditionalGeneration
from chorus_moe.processors.processing_chorus import ChorusProcessor
from chorus_moe.surgery import freeze
from chorus_moe.surgery.processor import processor_from_config
from chorus_moe.surgery.tokenizer import build_tokenizer
from chorus_moe.training.collator import ChorusDataCollator
from chorus_moe.training.demo.answers import answer
from chorus_moe.training.demo.data import DigitPictures, handwritten_digits
from chorus_moe.training.layouts import DOCUMENT
from chorus_moe.training.objectives.arguments import ObjectiveArguments
from chorus_moe.training.objectives.terms import build_objectives, weigh_tokens
from chorus_moe.training.recipe import TRAINER_SETTINGS
from chorus_moe.training.trainer import ChorusTrainer

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
QUESTION = "digit?"
LABELS: tuple[int | str, ...] = (10, 50, "all")
PATCHES = {"img_size": 16, "patch_size": 4, "embed_dim": 64, "depth": 1, "num_heads": 4}
BATCH = 32


def build(seed: int) -> tuple[ChorusForConditionalGeneration, ChorusProcessor]:
    """A new model of 16 patches a picture, its tower frozen, and its processor."""
    tokenizer = build_tokenizer([QUESTION, *NAMES], vocab_size=300)
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
        "mlp_layer_types": ["dense", "sparse"],
        "intermediate_size": 128,
        "cross_modal_layers": [],
        "expert_banks": {"common": {}},
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
        "initializer_range": 0.08,
        "modalities": ["text", "image"],
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = {"architecture": "vit_tiny_patch16_224", "model_args": PATCHES, "image_size": 16, "num_channels": 1}
    config = ChorusConfig(
        text_config=text, vision_config=vision, image_token_id=tokenizer.convert_tokens_to_ids("<image>")
    )
    set_seed(seed)
    model = ChorusForConditionalGeneration(config)
    for name in ("pad", "eos", "bos"):
        setattr(model.generation_config, f"{name}_token_id", text[f"{name}_token_id"])
    freeze(model, "towers")
    return model, processor_from_config(config, tokenizer)


def document(picture: Any) -> dict[str, Any]:
    """A row without a label."""
    return {"images": [picture], "messages": [{"role": DOCUMENT, "content": [{"type": "image"}]}]}


def question(picture: Any, digit: int) -> dict[str, Any]:
    asked = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": NAMES[digit]}]
    return {"images": [picture], "audio": [], "messages": turns}


def labelled(pictures: DigitPictures, count: int | str, seed: int) -> list[dict[str, Any]]:
    """As many questions of each digit, or of all pictures."""
    order, rows = np.random.default_rng(seed).permutation(len(pictures)), []
    for digit in range(10):
        chosen = [int(index) for index in order if pictures.digits[index] == digit]
        rows += [question(pictures.images[index], digit) for index in chosen[: None if count == "all" else int(count)]]
    return rows


def train(
    model: ChorusForConditionalGeneration,
    processor: ChorusProcessor,
    rows: Sequence[dict[str, Any]],
    steps: int,
    seed: int,
    objectives: ObjectiveArguments | None = None,
) -> list[dict[str, float]]:
    """Train a model in place; what was logged."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=2e-3,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, steps // 20),
            weight_decay=0.05,
            seed=seed,
            save_strategy="no",
            logging_steps=max(1, steps // 10),
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            **TRAINER_SETTINGS,
        )
        terms = [] if objectives is None else build_objectives(objectives, model)
        trainer = ChorusTrainer(
            model,
            arguments,
            data_collator=ChorusDataCollator(processor),
            train_dataset=list(rows),
            processing_class=processor,
            objectives=terms,
        )
        if objectives is not None:
            weigh_tokens(model, objectives.next_token_weight)
        trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def pretrain(
    model: ChorusForConditionalGeneration, processor: ChorusProcessor, pictures: DigitPictures, steps: int, seed: int
) -> tuple[ChorusForConditionalGeneration, dict[str, float]]:
    """A copy that has learned from pictures alone, and what that took."""
    start, student = time.thread_time(), copy.deepcopy(model)
    rows = [document(picture) for picture in pictures.images]
    logs = train(student, processor, rows, steps, seed, ObjectiveArguments(next_token_weight=0, masked_image_weight=1))
    # The weights in a model of their own: this one weighs the loss of its tokens with nothing.
    result = copy.deepcopy(model)
    result.load_state_dict(student.state_dict())
    first, last = logs[0]["masked_image"], logs[-1]["masked_image"]
    return result, {"first_loss": first, "last_loss": last, "learning_s": time.thread_time() - start}


def main(arguments: list[str] | None = None) -> None:
    options: list[tuple[str, dict[str, Any]]] = [
        ("--steps", {"type": int, "default": 250, "help": "steps without labels (default 250)"}),
        ("--label-steps", {"type": int, "default": 200, "help": "steps with labels (default 200)"}),
        ("--seeds", {"type": int, "nargs": "+", "default": [0, 1, 2]}),
    ]
    parsed = parse("Pre-training without labels, then few labels.", arguments, *options)
    steps, label_steps, seeds = (2, 2, [0]) if parsed.quick else (parsed.steps, parsed.label_steps, parsed.seeds)
    pictures, test = handwritten_digits()
    asked: Any = [question(picture, int(digit)) for picture, digit in zip(test.images, test.digits, strict=True)]
    asked = asked[:20] if parsed.quick else asked
    truth = [row["messages"][1]["content"] for row in asked]
    report = Report(f"self-supervision, {steps} steps without labels, {label_steps} with", parsed)
    found: dict[int | str, list[dict[str, float]]] = {count: [] for count in LABELS}
    for seed in seeds:
        model, processor = build(seed)
        learned, took = pretrain(model, processor, pictures, steps, seed)
        for unit in ("loss", "s"):
            report.add(
                f"seed {seed} without labels, {unit}", {k: v for k, v in took.items() if k.endswith(f"_{unit}")}, unit
            )
        for count, scores in found.items():
            rows = labelled(pictures, count, seed)
            values = {"labels": float(len(rows))}
            for name, start in (("none", model), ("pretrained", learned)):
                student = copy.deepcopy(start)
                train(student, processor, rows, label_steps, seed)
                given = answer(student, processor, asked)
                values[f"{name}_accuracy"] = fmean(a == b for a, b in zip(given, truth, strict=True))
            scores.append(values)
            report.add(f"seed {seed} {count} labels a class", values, "accuracy")
    for count, scores in found.items():
        means = {key: fmean(values[key] for values in scores) for key in scores[0]}
        report.add(f"mean {count} labels a class", means, "accuracy")
    report.save()


if __name__ == "__main__":
    main()
