"""Several questions about a handwritten digit: each learned alone, all together, and together with each method.

Run as `python -m benchmarks.multitask`. The rows are scikit-learn's digits, each with one question: which digit it is,
whether it is odd or even, whether it is larger than four, how many holes it has. Questions have unequal numbers of rows
(`ROWS`), so the rare ones have something to gain from the others, and to lose to them. A small model of an encoder, a
decoder and three banks learns from nothing.

- `alone`: a model for each task, which sees as many rows of it as `together` does;
- `together`: one model on all rows as they are, a plain sum of the losses;
- `temperature`: the same, with rows drawn in proportion to the square root of their number;
- `uncertainty`, `rate`: the losses weighed by learned log-variances, or by how slowly they fall;
- `pcgrad`, `aligned_mtl`: conflicting gradients resolved by torchjd.

All start from the same weights. Accuracy is the share of held-out questions, by writers that none has met, whose
answer is exact under greedy decoding; `mean` is over tasks. Every question is asked about every held-out digit.
`cosine` is the mean cosine of the gradients of two tasks outside of the banks, over all pairs and logged steps.
"""

import argparse
import contextlib
import io
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, pstdev
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import TrainingArguments, set_seed

from benchmarks.timing import Report, parse
from chorus_moe.modeling.configuration_chorus import ChorusConfig
from chorus_moe.modeling.modeling_generation import ChorusForConditionalGeneration
from chorus_moe.processors.processing_chorus import ChorusProcessor
from chorus_moe.surgery.processor import processor_from_config
from chorus_moe.surgery.tokenizer import build_tokenizer
from chorus_moe.training.collator import ChorusDataCollator
from chorus_moe.training.demo.data import DigitPictures, handwritten_digits
from chorus_moe.training.recipe import TRAINER_SETTINGS
from chorus_moe.training.tasks.arguments import TaskArguments
from chorus_moe.training.tasks.learning import task_columns
from chorus_moe.training.tasks.plan import plan_tasks
from chorus_moe.training.trainer import ChorusTrainer

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
HOLES = {0: "single", 6: "single", 9: "single", 8: "double"}


class Task(NamedTuple):
    question: str
    answer: Callable[[int], str]


TASKS = {
    "digit": Task("which digit", lambda digit: WORDS[digit]),
    "parity": Task("odd or even", lambda digit: "odd" if digit % 2 else "even"),
    "larger": Task("larger than four", lambda digit: "yes" if digit > 4 else "no"),
    "holes": Task("how many holes", lambda digit: HOLES.get(digit, "none")),
}
ROWS = {"digit": 600, "parity": 300, "larger": 150, "holes": 75}
VARIANTS: dict[str, dict[str, Any]] = {
    "together": {},
    "temperature": {"task_temperature": 2.0},
    "uncertainty": {"task_weighting": "uncertainty"},
    "rate": {"task_weighting": "rate", "task_rate_steps": 25},
    "pcgrad": {"task_conflicts": "pcgrad"},
    "aligned_mtl": {"task_conflicts": "aligned_mtl"},
}
STEPS, BATCH, QUICK_STEPS = 200, 32, 4
Row = dict[str, Any]


def row_of(pictures: DigitPictures, index: int, task: str) -> Row:
    question, answer = TASKS[task]
    content = [{"type": "image"}, {"type": "text", "text": question}]
    words = answer(int(pictures.digits[index]))
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": words}]
    return {"messages": turns, "images": [pictures.images[index]], "audio": [], "task": task}


def train_rows(pictures: DigitPictures, seed: int) -> list[Row]:
    """`ROWS` rows of each task, about pictures drawn without replacement for each."""
    rng = np.random.default_rng(seed)
    return [
        row_of(pictures, int(index), task)
        for task, count in ROWS.items()
        for index in rng.permutation(len(pictures))[:count]
    ]


def new_model(seed: int) -> tuple[ChorusForConditionalGeneration, ChorusProcessor]:
    words = {word for task in TASKS.values() for digit in range(10) for word in (task.question, task.answer(digit))}
    tokenizer = build_tokenizer(sorted(words) * 4, vocab_size=400)
    config = ChorusConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "mlp_layer_types": ["sparse", "sparse"],
            # The last layer reads no image positions.
            "expert_banks": {"text": {}, "image": {"layers": [0]}, "common": {}},
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 64,
            "initializer_range": 0.08,
            "router_aux_loss_coef": 0.01,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={
            "architecture": "vit_tiny_patch16_224",
            "model_args": {"img_size": 16, "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 4},
            "image_size": 16,
            "num_channels": 1,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    set_seed(seed)
    return ChorusForConditionalGeneration(config), processor_from_config(config, tokenizer)


class Trained(NamedTuple):
    model: ChorusForConditionalGeneration
    seconds: float
    log: list[dict[str, float]]


def train(rows: Sequence[Row], options: Mapping[str, Any], steps: int, seed: int) -> Trained:
    model, processor = new_model(seed)
    plan = plan_tasks(TaskArguments(**options), rows)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=2e-3,
            lr_scheduler_type="cosine",
            warmup_steps=min(20, steps // 2),
            adam_beta2=0.98,
            weight_decay=0.05,
            save_strategy="no",
            logging_steps=max(1, min(20, steps // 2)),
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            seed=seed,
            **TRAINER_SETTINGS,
        )
        collator = ChorusDataCollator(processor, more=[task_columns(plan.names)])
        trainer = ChorusTrainer(model, arguments, data_collator=collator, train_dataset=rows, tasks=plan)
        started = time.process_time()
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.train()
        return Trained(model.eval(), time.process_time() - started, trainer.state.log_history)


class Exam:
    """Held-out questions, collated once."""

    def __init__(self, pictures: DigitPictures, processor: ChorusProcessor, count: int):
        collate, indices = ChorusDataCollator(processor), range(min(count, len(pictures)))
        self.batches = {task: collate([row_of(pictures, index, task) for index in indices]) for task in TASKS}

    @torch.no_grad()
    def accuracy(self, model: ChorusForConditionalGeneration, task: str) -> float:
        """Share of answers whose every token, the end included, ranks first after the right ones: what greedy decoding
        would say."""
        batch = self.batches[task]
        target = batch["labels"][:, 1:]
        is_right = model(**batch).logits[:, :-1].argmax(dim=-1) == target
        return float((is_right | (target == -100)).all(dim=1).float().mean())


def learn_all(pictures: DigitPictures, exam: Exam, steps: int, seed: int) -> dict[str, dict[str, float]]:
    """Variant -> accuracy of each task, their mean and seconds of training."""
    rows, found = train_rows(pictures, seed), {}
    alone: dict[str, float] = {"seconds": 0.0}
    for task in TASKS:
        # Rounded up: a task alone gets no row fewer.
        share = -(-steps * ROWS[task] // sum(ROWS.values()))
        trained = train(rows, {"task_names": [task]}, share, seed)
        alone[task], alone["seconds"] = exam.accuracy(trained.model, task), alone["seconds"] + trained.seconds
    found["alone"] = alone
    for name, options in VARIANTS.items():
        trained = train(rows, options, steps, seed)
        found[name] = {task: exam.accuracy(trained.model, task) for task in TASKS} | {"seconds": trained.seconds}
        cosines = [v for entry in trained.log for key, v in entry.items() if key.startswith("grad_cosine/outside")]
        found[name] |= {"cosine": fmean(cosines)} if cosines else {}
    return {name: values | {"mean": fmean(values[task] for task in TASKS)} for name, values in found.items()}


def table(scores: Sequence[Mapping[str, Mapping[str, float]]]) -> list[str]:
    """Mean and spread over the seeds, in percent, as a table in Markdown.

    Seeds draw other rows, which moves all variants alike; so the last but one column compares within each seed.
    """
    columns = [*TASKS, "mean"]
    lines = [f"| variant | {' | '.join(columns)} | over together | seconds |", "| --- " * (len(columns) + 3) + "|"]
    for name in scores[0]:
        cells = []
        for column in columns:
            values = [100 * score[name][column] for score in scores]
            cells.append(f"{fmean(values):.1f} ± {pstdev(values):.1f}")
        gains = [100 * (score[name]["mean"] - score["together"]["mean"]) for score in scores]
        cells.append(f"{fmean(gains):+.1f} ({min(gains):+.1f} to {max(gains):+.1f})")
        seconds = fmean(score[name]["seconds"] for score in scores)
        lines.append(f"| {name} | {' | '.join(cells)} | {seconds:.1f} |")
    return lines


def main(arguments: list[str] | None = None) -> None:
    parsed: argparse.Namespace = parse(
        __doc__.splitlines()[0],
        arguments,
        ("--steps", {"type": int, "default": STEPS, "help": f"steps of a model of all tasks (default {STEPS})"}),
        ("--seeds", {"type": int, "nargs": "+", "default": [0, 1, 2]}),
    )
    steps, seeds = (QUICK_STEPS, parsed.seeds[:1]) if parsed.quick else (parsed.steps, parsed.seeds)
    pictures, test_pictures = handwritten_digits(size=16)
    exam = Exam(test_pictures, new_model(0)[1], 4 if parsed.quick else len(test_pictures))
    report, scores = Report(f"many tasks, {steps} steps of {BATCH} rows", parsed), []
    for seed in seeds:
        scores.append(learn_all(pictures, exam, steps, seed))
        for name, values in scores[-1].items():
            case = {f"{key}_accuracy": value for key, value in values.items() if key in (*TASKS, "mean")}
            others = {key: value for key, value in values.items() if key in ("seconds", "cosine")}
            report.add(f"seed {seed} {name}", case | others, "accuracy")
    print("\n".join(table(scores)))
    report.save()


if __name__ == "__main__":
    main()
