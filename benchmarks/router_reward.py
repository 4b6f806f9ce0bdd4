"""Does a reward move a router that starts collapsed? Three trainings of one small model on the demo's questions.

Run as `python -m benchmarks.router_reward`. The model is the demo's, with one bank of top-1 experts in its sparse
layers, no shared experts and no z-loss. Its routers start at zero: by the rule for ties every token goes to expert 0,
and since the weight of the one chosen expert is always 1, the language loss has no gradient that could change it.
Compared, from the same weights and on the same data:

- plain: the language loss alone;
- reward: experts are sampled in training, and the routers learn from the likelihood they gain;
- switch: the Switch balance loss, which moves routers towards an even load whatever the experts are good for.

Reported on held-out pictures and voices, with the best-ranked experts: accuracy of the generated answers, load entropy
of the routers (mean over layers; 0 collapsed, 1 even), bits that an expert tells about the modality, and the processor
seconds of training. Nothing is sampled at the test. One seed shows whether routers move; accuracy wants several.
"""

import contextlib
import io
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments, set_seed

from benchmarks.digit_lessons import DECODER
from benchmarks.timing import Report, parse
from chorus_moe.modeling.configuration_chorus import ChorusConfig
from chorus_moe.modeling.modeling_generation import ChorusForConditionalGeneration
from chorus_moe.modeling.moe_routers import Router
from chorus_moe.training.collator import ChorusDataCollator
from chorus_moe.training.demo.data import DigitQuestions, corpus, handwritten_digits
from chorus_moe.training.demo.model import build_demo
from chorus_moe.training.demo.speech import TEST_VARIANTS, SpeechClips, SynthesisSettings, synthetic_digits
from chorus_moe.training.evaluate import evaluate_rows
from chorus_moe.training.recipe import TRAINER_SETTINGS
from chorus_moe.training.routing.report import count_rows
from chorus_moe.training.routing.reward import RouterRewardTrainer
from chorus_moe.training.routing.statistics import routing_metrics, summarise

SKILLS = {"written": 2.0, "spoken": 1.0}
VARIANTS = ("plain", "reward", "switch")
STEPS, QUESTIONS, BATCH, COEF = 260, 200, 24, 1.0
QUICK_STEPS, QUICK_QUESTIONS = 2, 4


def collapsed_model(balance: str, seed: int) -> tuple[ChorusForConditionalGeneration, Any]:
    """The demo's model with one bank of top-1 experts and routers that send everything to expert 0."""
    demo, processor = build_demo(corpus())
    values = demo.config.to_dict()
    values["text_config"] |= DECODER | {
        "expert_banks": {"common": {"num_experts": 4, "num_experts_per_tok": 1, "balance": balance}},
        "moe_intermediate_size": 128,
        "shared_expert_intermediate_size": 0,
        "router_z_loss_coef": 0.0,
    }
    set_seed(seed)
    model = ChorusForConditionalGeneration(ChorusConfig.from_dict(values))
    model.generation_config = demo.generation_config
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Router):
                for parameter in module.parameters():
                    parameter.zero_()
    return model, processor


def train(model: Any, processor: Any, questions: DigitQuestions, variant: str, coef: float, seed: int) -> float:
    """Processor seconds of training, with the data made on the way."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=len(questions) // BATCH,
            per_device_train_batch_size=BATCH,
            learning_rate=2e-3,
            lr_scheduler_type="cosine",
            warmup_steps=10,
            adam_beta2=0.98,
            train_sampling_strategy="sequential",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            seed=seed,
            **TRAINER_SETTINGS,
        )
        parts = {"model": model, "args": arguments, "train_dataset": questions}
        parts["data_collator"] = ChorusDataCollator(processor)
        if variant == "reward":
            trainer: Trainer = RouterRewardTrainer(**parts, router_reward_banks=["common"], router_reward_coef=coef)
        else:
            trainer = Trainer(**parts)
        started = time.process_time()
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.train()
        return time.process_time() - started


def test_rows(questions: DigitQuestions) -> list[dict[str, Any]]:
    """Questions with the answer as their last turn."""
    return [questions[index] for index in range(len(questions))]


def voices(settings: SynthesisSettings) -> SpeechClips:
    with tempfile.TemporaryDirectory() as folder:
        return synthetic_digits(settings, Path(folder))


def main(arguments: list[str] | None = None) -> None:
    options = parse(
        __doc__.splitlines()[0],
        arguments,
        ("--steps", {"type": int, "default": STEPS, "help": f"optimizer steps (default {STEPS})"}),
        ("--coef", {"type": float, "default": COEF, "help": f"weight of the reward (default {COEF})"}),
        ("--seeds", {"type": int, "default": 1, "help": "trainings of each variant (default 1)"}),
    )
    steps, count = (QUICK_STEPS, QUICK_QUESTIONS) if options.quick else (options.steps, QUESTIONS)
    pictures, test_pictures = handwritten_digits()
    clips = voices(SynthesisSettings(languages_per_variant=1, takes=1))
    test_clips = voices(SynthesisSettings(variants=TEST_VARIANTS, languages_per_variant=1, takes=1, seed=1))
    test = test_rows(DigitQuestions(test_pictures, test_clips, list(SKILLS), count, seed=7, distractors=0.0))
    report = Report("Routers that start collapsed", options)
    for seed in range(options.seeds):
        for variant in VARIANTS:
            model, processor = collapsed_model("switch" if variant == "switch" else "none", seed)
            questions = DigitQuestions(pictures, clips, SKILLS, steps * BATCH, seed=seed, distractors=0.0)
            seconds = train(model, processor, questions, variant, options.coef, seed)
            metrics = routing_metrics(summarise(count_rows(model, processor, test)))
            found = evaluate_rows(model.eval(), processor, test, max_new_tokens=8, progress=False)
            figures = {
                "accuracy": found.accuracy,
                "loss": found.loss,
                "load_entropy": metrics["routing_load_entropy"],
                "strongest_share": metrics["routing_strongest_share"],
                "expert_bits": metrics["routing_expert_information"],
                "train_seconds": seconds,
            }
            report.add(f"{variant}, seed {seed}", figures, unit="seconds")
            print("    " + ", ".join(f"{name} {value:.3f}" for name, value in figures.items()), flush=True)
    report.save()


if __name__ == "__main__":
    main()
