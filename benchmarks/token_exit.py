"""Tokens that leave early while a text is generated, against plain decoding and against drafts.

Run as `python -m benchmarks.token_exit`. A decoder whose exits are trained learns to count in words on half of the
questions, three seeds; then it answers others greedily: `chorus` plainly, `exit_80` to `exit_99` with `exit_confidence`
.8 to .99, `calibrated` with the confidence that `calibrate_exit_confidence` finds on further questions (at most
`--max-changed` of the letters, with its margin; where none keeps that, no token leaves), `drafts` with drafts of the
first exit, which leave the text as it is (one text at a time). Rows, for one text at a time and for a batch: tokens per
second; `depth`, the share of the layers that tokens run through; `changed`, the share of the letters that differ from
the plain text; `right`, the share of the answer's letters that are right. `calibration` rows say what was found, 1 for
none: the confidence, and what it changed on the questions that it was found on.
"""

import argparse
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from benchmarks import counting
from benchmarks.timing import OURS, Report, measure, parse
from chorus_moe.modeling.modeling_generation import ChorusForConditionalGeneration
from chorus_moe.training.exit_confidence import CONFIDENCES as TRIED
from chorus_moe.training.exit_confidence import calibrate_exit_confidence

# Half of the questions are not learned: to calibrate takes a hundred of them.
ONE_IN = 2
UNITS = ("tokens_per_second", "depth", "changed", "right")
CONFIDENCES = {f"exit_{round(100 * value)}": value for value in (0.8, 0.9, 0.95, 0.99)}
Texts = list[tuple[Tensor, str]]


def questions(count: int, new_tokens: int) -> tuple[Texts, dict[str, Tensor]]:
    """Prompts `(1, S)` of one length each, so that a batch has no padding, and the answers' letters; and all other
    held-out questions as one batch, padded on the left."""
    found: dict[int, Texts] = {}
    for pair in counting.pairs(held_out=True, one_in=ONE_IN):
        asked = counting.question(*pair)
        text = counting.text_of(*pair, length=len(asked) + new_tokens)
        found.setdefault(len(asked), []).append((torch.tensor([counting.encode(asked)]), text[len(asked) :]))
    commonest = max(found.values(), key=len)
    others = [prompt[0] for texts in found.values() for prompt, _ in (texts[count:] if texts is commonest else texts)]
    longest = max(len(prompt) for prompt in others)
    ids = torch.stack([torch.nn.functional.pad(prompt, (longest - len(prompt), 0)) for prompt in others])
    return commonest[:count], {"input_ids": ids, "attention_mask": (ids != 0).long()}


def answer(model: ChorusForConditionalGeneration, ids: Tensor, new_tokens: int, **options: Any) -> Tensor:
    mask = torch.ones_like(ids)
    text = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens, **options)
    return text[:, ids.shape[1] :]


def calibrate(
    model: ChorusForConditionalGeneration, prompts: dict[str, Tensor], parsed: argparse.Namespace
) -> dict[str, float]:
    """What `calibrate_exit_confidence` finds; the model is left as it was."""
    found = calibrate_exit_confidence(
        model,
        [prompts],
        max_changed=parsed.max_changed,
        confidences=TRIED[:2] if parsed.quick else TRIED,
        max_new_tokens=parsed.new_tokens,
    )
    model.generation_config.exit_confidence = None
    values = {"found_confidence": 1.0, "found_changed": 0.0, "found_depth": 1.0}
    if (taken := found.exit_confidence) is not None:
        layers = found.layers[taken] / model.config.text_config.num_hidden_layers
        values = {"found_confidence": taken, "found_changed": found.changed[taken], "found_depth": layers}
    return {**values, "prompts": len(prompts["input_ids"])}


def score(
    model: ChorusForConditionalGeneration,
    texts: Texts,
    is_batch: bool,
    confidence: float,
    parsed: argparse.Namespace,
) -> dict[str, dict[str, float]]:
    """Arm -> what the module's docstring names."""
    ids = torch.cat([prompt for prompt, _ in texts])
    truth = torch.tensor([counting.encode(answer) for _, answer in texts])
    groups = [ids] if is_batch else list(ids.split(1))
    arms: dict[str, dict[str, Any]] = {OURS: {}}
    arms |= {name: {"exit_confidence": value} for name, value in CONFIDENCES.items()}
    arms["calibrated"] = {"exit_confidence": confidence} if confidence < 1 else {}
    if not is_batch:
        drafts = {"num_assistant_tokens": 6, "assistant_confidence_threshold": 0.6}
        arms["drafts"] = {"assistant_early_exit": min(model.config.text_config.exit_layers), **drafts}
    layers = model.config.text_config.num_hidden_layers
    depths: list[float] = []
    hook = model.register_forward_hook(
        lambda _, args, output: depths.extend([] if output.left_after is None else output.left_after.tolist())
    )
    values: dict[str, dict[str, float]] = {}
    plain = None
    for name, options in arms.items():
        depths.clear()
        text = torch.cat([answer(model, group, parsed.new_tokens, **options) for group in groups])
        plain = text if plain is None else plain
        values[name] = {
            "depth": fmean(depths) / layers if depths else 1.0,
            "changed": (text != plain).float().mean().item(),
            "right": (text == truth).float().mean().item(),
        }
    hook.remove()
    calls = {
        name: lambda options=options: answer(model, groups[0], parsed.new_tokens, **options)
        for name, options in arms.items()
    }
    for name, timing in measure(calls, parsed.rounds, memory=False).items():
        values[name]["tokens_per_second"] = groups[0].shape[0] * parsed.new_tokens / timing.seconds
    return values


def main(arguments: list[str] | None = None) -> None:
    options = (
        ("--steps", {"type": int, "default": 300, "help": "training steps (default 300)"}),
        ("--seeds", {"type": int, "nargs": "+", "default": [0, 1, 2]}),
        ("--layers", {"type": int, "default": 8}),
        ("--hidden-size", {"type": int, "default": 96}),
        ("--new-tokens", {"type": int, "default": 40}),
        ("--texts", {"type": int, "default": 8, "help": "questions, and the size of the batch (default 8)"}),
        ("--max-changed", {"type": float, "default": 0.1, "help": "letters that may change (default 0.1)"}),
    )
    parsed = parse("Tokens that leave early in generation.", arguments, *options)
    if parsed.quick:
        parsed.steps, parsed.seeds, parsed.layers, parsed.hidden_size = 2, [0], 3, 32
        parsed.new_tokens, parsed.texts = 4, 2
    report = Report(f"token exit, {parsed.layers} layers of {parsed.hidden_size}", parsed)
    exits = sorted({max(1, parsed.layers // 4), max(1, parsed.layers // 2), max(1, 3 * parsed.layers // 4)})
    texts, prompts = questions(parsed.texts, parsed.new_tokens)
    found: dict[str, dict[str, list[float]]] = {}
    for seed in parsed.seeds:
        model = counting.decoder(parsed.layers, parsed.hidden_size, seed, exit_layers=exits, exit_loss_coef=1.0)
        counting.learn({OURS: model}, parsed.steps, seed=seed, one_in=ONE_IN)
        calibrated = calibrate(model, prompts, parsed)
        report.add_named(f"calibration, seed {seed}", calibrated)
        for title, is_batch in (("one text", False), (f"batch of {len(texts)}", True)):
            values = score(model, texts, is_batch, calibrated["found_confidence"], parsed)
            for unit in UNITS:
                row = {f"{name}_{unit}": of_arm[unit] for name, of_arm in values.items()}
                report.add(f"{title}, {unit}, seed {seed}", row, unit)
                for key, value in row.items():
                    found.setdefault(f"{title}, {unit}, mean", {}).setdefault(key, []).append(value)
    for row_name, of_row in found.items():
        unit = row_name.split(", ")[1]
        report.add(row_name, {key: fmean(values) for key, values in of_row.items()}, unit)
    report.save()


if __name__ == "__main__":
    main()
