"""Early exit in `generate`: the first layers draft, all layers verify. Tokens per second against plain generation.

Run as `python -m benchmarks.draft_and_verify`. Two decoders of twelve layers learn to count in words in as many steps:
with a language loss at the exits (`trained`) and without (`untrained`). Then each answers held-out questions with
drafts (`chorus`) and in the plain way (`plain`), in turns, at batch 1; the texts must be equal. `accepted` is the share
of the drafted tokens that verification keeps, `per_check` the tokens that one verification yields. At the end: what the
loss at the exits does to the last layer.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks import counting
from benchmarks.timing import OURS, Report, measure, parse, ratio
from chorus_moe.fastpaths.early_exit_drafts import EarlyExitDrafts
from chorus_moe.modeling.modeling_generation import ChorusForConditionalGeneration


@contextmanager
def counted_drafts() -> Iterator[list[tuple[int, int]]]:
    """Drafted and accepted tokens of every verification."""
    counts: list[tuple[int, int]] = []
    update = EarlyExitDrafts.update_candidate_strategy

    def count(self: EarlyExitDrafts, input_ids: Tensor, scores: Tensor, num_matches: int) -> None:
        counts.append((scores.shape[1] - 1, int(num_matches)))
        update(self, input_ids, scores, num_matches)

    EarlyExitDrafts.update_candidate_strategy = count  # type: ignore[method-assign]
    try:
        yield counts
    finally:
        EarlyExitDrafts.update_candidate_strategy = update  # type: ignore[method-assign]


def answers(model: ChorusForConditionalGeneration, questions: list[str], new_tokens: int, **options: Any) -> list[str]:
    texts = []
    for question in questions:
        ids = torch.tensor([counting.encode(question)])
        mask = torch.ones_like(ids)
        text = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens, **options)
        texts.append(str(text[0].tolist()))
    return texts


def run_case(
    model: ChorusForConditionalGeneration, exit_layer: int, tokens: int, parsed: argparse.Namespace
) -> dict[str, float]:
    """Speed, acceptance and whether the text is the same.

    Raises:
        RuntimeError: drafts change a text.
    """
    questions = [counting.question(*pair) for pair in counting.pairs(held_out=True)[: parsed.questions]]
    options = {"assistant_early_exit": exit_layer, "num_assistant_tokens": tokens}

    def drafted() -> list[str]:
        return answers(model, questions, parsed.new_tokens, **options)

    def plain() -> list[str]:
        return answers(model, questions, parsed.new_tokens)

    with counted_drafts() as counts:
        if drafted() != plain():
            raise RuntimeError(f"drafts after {exit_layer} layers changed the text")
    timings = measure({OURS: drafted, "plain": plain}, parsed.rounds, memory=False)
    generated = len(questions) * parsed.new_tokens
    num_drafted, accepted = (sum(column) for column in zip(*counts, strict=True))
    return {
        **{f"{name}_tokens_per_second": generated / median(timing.rounds) for name, timing in timings.items()},
        "plain_ratio": ratio(timings["plain"], timings[OURS]),
        "accepted": accepted / max(num_drafted, 1),
        "per_check": generated / len(counts),
    }


def main(arguments: list[str] | None = None) -> None:
    options = (
        ("--steps", {"type": int, "default": 150}),
        ("--layers", {"type": int, "default": 12}),
        ("--hidden-size", {"type": int, "default": 128}),
        ("--exits", {"type": int, "nargs": "+", "default": [2, 4]}),
        ("--drafts", {"type": int, "nargs": "+", "default": [4, 8], "help": "longest drafts"}),
        ("--questions", {"type": int, "default": 2}),
        ("--new-tokens", {"type": int, "default": 48}),
    )
    parsed = parse("Early exit drafts against plain generation.", arguments, *options)
    if parsed.quick:
        parsed.steps, parsed.layers, parsed.hidden_size, parsed.exits, parsed.drafts = 2, 3, 32, [1], [3]
        parsed.questions, parsed.new_tokens = 1, 6
    report = Report(f"draft and verify, {parsed.layers} layers of {parsed.hidden_size}", parsed)
    models = {
        "trained": counting.decoder(parsed.layers, parsed.hidden_size, exit_layers=parsed.exits, exit_loss_coef=1.0),
        "untrained": counting.decoder(parsed.layers, parsed.hidden_size),
    }
    counting.learn(models, parsed.steps)
    for name, model in models.items():
        for exit_layer in parsed.exits:
            for tokens in parsed.drafts:
                values = run_case(model, exit_layer, tokens, parsed)
                report.add(f"{name}, exit {exit_layer}, drafts of {tokens}", values, "tokens_per_second")
                print(f"{'':<34} | accepted {values['accepted']:.2f} | {values['per_check']:.2f} tokens a check")
    ids = counting.held_out()
    results = {name: counting.quality(model, ids) for name, model in models.items()}
    report.add("all layers, held-out loss", {f"{name}_loss": loss for name, (loss, _) in results.items()}, "loss")
    report.add("all layers, right letters", {f"{name}_right": right for name, (_, right) in results.items()}, "right")
    report.save()


if __name__ == "__main__":
    main()
