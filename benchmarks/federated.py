"""Three owners of digits that may not leave: each alone, federated, and as if all rows could be put together.

Run as `python -m benchmarks.federated`. A small model learns to name handwritten digits from some public rows; that is
the base. Three clients then have unequal rows of unequal kinds (`OWNED`): none has met all digits often. All train a
LoRA on the base's banks, attention and connectors.

- `base`: no further training;
- `alone`: each client by itself, as many steps as it takes in the federation; the mean of the three;
- `federated`: rounds of local steps, joined by the product of the LoRA matrices;
- `one_side`: the same with `train_lora_a: false`, half the bytes;
- `together`: all rows in one place, and as many steps as all clients take together;
- `banks`: as `federated`, but whole banks in the place of a LoRA, that of images and the common one;
- `private_banks`: the same, and each client has a section `privacy` with epsilon 8 for each of its rows over all
  rounds. It needs `chorus-moe[privacy]`.

Accuracy is the share of held-out digits, of all ten kinds and by writers that none has met, that are named. Bytes are
those of one client's update, as sent; `bank` is that of whole image banks, `model` what all weights would be.
"""

import contextlib
import copy
import io
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import numpy as np
from transformers import set_seed

from benchmarks.multitask import Exam, Row, new_model, row_of
from benchmarks.timing import Report, parse
from chorus_moe.modeling.modeling_generation import ChorusForConditionalGeneration
from chorus_moe.training.demo.data import DigitPictures, handwritten_digits
from chorus_moe.training.federated.learner import Learner
from chorus_moe.training.federated.rounds import Federation
from chorus_moe.training.federated.simulate import InProcess
from chorus_moe.training.readiness import prepare_parts
from chorus_moe.training.recipe import Recipe, build_recipe

TASK = "digit"
# Client -> rows of each digit.
OWNED = {
    "large": {digit: 60 if digit < 4 else 4 for digit in range(10)},
    "middle": {digit: 40 if 4 <= digit < 7 else 3 for digit in range(10)},
    "small": {digit: 25 if digit >= 7 else 2 for digit in range(10)},
}
PUBLIC, BASE_STEPS = 12, 60
ROUNDS, LOCAL_STEPS, RATE, BATCH = 5, 8, 3e-3, 32
ADAPTER: dict[str, Any] = {
    "lora": {"banks": ["all"], "attention": True, "connectors": True, "router": "train", "lora_rank": 4}
}
VARIANTS: dict[str, dict[str, Any]] = {
    "federated": ADAPTER,
    "one_side": ADAPTER | {"federated": {"train_lora_a": False}},
}
BANK: dict[str, Any] = {"parts": {"train": ["image"]}}
BANKS: dict[str, Any] = {"parts": {"train": ["image", "common"]}}
EPSILON = 8.0
# Learning rate and clipping under noise.
PRIVATE_RATE, CLIP = 2e-2, 0.3
Rows = dict[str, list[Row]]


def recipe_of(
    sections: Mapping[str, Any], steps: int, rate: float = RATE, out: str = "unused", **federated: Any
) -> Recipe:
    training = {
        "max_steps": steps,
        "per_device_train_batch_size": BATCH,
        "learning_rate": rate,
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "output_dir": out,
        "logging_strategy": "no",
    }
    given = {**sections, "federated": {**sections.get("federated", {}), **federated}, "training": training}
    return build_recipe({"model": {"model_name_or_path": "base"}, **given}, "benchmark")


def deal(pictures: DigitPictures, seed: int) -> Rows:
    """The rows of each client, and the public ones; no picture is dealt twice."""
    rng, rows = np.random.default_rng(seed), Rows()
    decks = {digit: list(rng.permutation(np.flatnonzero(pictures.digits == digit))) for digit in range(10)}
    for name, counts in {"public": dict.fromkeys(range(10), PUBLIC), **OWNED}.items():
        rows[name] = [
            row_of(pictures, int(decks[digit].pop()), TASK) for digit, count in counts.items() for _ in range(count)
        ]
    return rows


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the lines of every round of every variant."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def private(rows: int, updates: int, clip: float) -> dict[str, float]:
    """A section `privacy` whose updates spend `EPSILON` together; the noise is found once, and not in each round."""
    from chorus_moe.training.privacy.accounting import noise_for

    noise = noise_for(EPSILON, 1 / (10 * rows), min(1.0, BATCH / rows), updates)
    return {"noise_multiplier": noise, "max_grad_norm": clip}


class Study:
    """One seed: a base, and everybody's rows."""

    def __init__(self, pictures: DigitPictures, exam: Exam, seed: int, rounds: int, steps: int, base_steps: int):
        self.exam, self.seed, self.rounds, self.steps = exam, seed, rounds, steps
        rows = deal(pictures, seed)
        self.base, self.processor = new_model(seed)
        everything = {"parts": {"train": ["all"]}}
        self.base = self.federate(everything, {"public": rows.pop("public")}, steps=base_steps, rounds=1)[0]
        self.base.requires_grad_(True)
        self.rows = rows

    def federate(
        self, sections: Mapping[str, Any], rows: Rows, steps: int, rounds: int, rate: float = RATE, clip: float = 0.0
    ) -> tuple[ChorusForConditionalGeneration, int]:
        """The model after all rounds, and the bytes of an update; private clients where rows are clipped."""
        with tempfile.TemporaryDirectory() as folder, quiet():
            recipe = recipe_of(sections, steps, rounds=rounds, min_clients=len(rows))
            federation = Federation(self._model(recipe), recipe.federated, Path(folder))
            clients = {}
            for name, found in rows.items():
                # Each has a ledger of its own.
                privacy = {"privacy": private(len(found), steps * rounds, clip)} if clip else {}
                own = recipe_of({**sections, **privacy}, steps, rate, f"{folder}/{name}")
                clients[name] = Learner(own, self._model(own), self.processor, found).answer
            federation.run(InProcess(clients))
        model: Any = federation.model
        return model.eval(), federation.history[-1].bytes_in // len(rows)

    def _model(self, recipe: Recipe) -> Any:
        set_seed(self.seed)
        return prepare_parts(copy.deepcopy(self.base), recipe, verbose=False)

    def accuracies(self) -> tuple[dict[str, float], dict[str, int]]:
        found = {"base": self.exam.accuracy(self.base, TASK)}
        sent = {"model": sum(tensor.numel() * tensor.element_size() for tensor in self.base.state_dict().values())}
        options = {"steps": self.steps, "rounds": self.rounds}
        alone = [self.federate(ADAPTER, {name: rows}, **options)[0] for name, rows in self.rows.items()]
        found["alone"] = fmean(self.exam.accuracy(model, TASK) for model in alone)
        for name, sections in VARIANTS.items():
            model, sent[name] = self.federate(sections, self.rows, **options)
            found[name] = self.exam.accuracy(model, TASK)
        # For the bytes alone.
        _, sent["bank"] = self.federate(BANK, {"small": self.rows["small"][:2]}, steps=1, rounds=1)
        model, _ = self.federate(BANKS, self.rows, **options)
        found["banks"] = self.exam.accuracy(model, TASK)
        if find_spec("opacus"):
            model, _ = self.federate(BANKS, self.rows, rate=PRIVATE_RATE, clip=CLIP, **options)
            found["private_banks"] = self.exam.accuracy(model, TASK)
        whole = {"all": [row for rows in self.rows.values() for row in rows]}
        model, _ = self.federate(ADAPTER, whole, steps=self.steps * len(self.rows), rounds=self.rounds)
        found["together"] = self.exam.accuracy(model, TASK)
        return found, sent


def table(scores: Sequence[Mapping[str, float]]) -> list[str]:
    """Mean and spread over the seeds, in percent, as a table in Markdown."""
    cells = [
        f"{100 * fmean(s[name] for s in scores):.1f} ± {100 * pstdev(s[name] for s in scores):.1f}"
        for name in scores[0]
    ]
    return [f"| {' | '.join(scores[0])} |", "| --- " * len(cells) + "|", f"| {' | '.join(cells)} |"]


def main(arguments: list[str] | None = None) -> None:
    parsed = parse(
        (__doc__ or "").splitlines()[0],
        arguments,
        ("--fed-rounds", {"type": int, "default": ROUNDS, "help": f"rounds (default {ROUNDS})"}),
        ("--steps", {"type": int, "default": LOCAL_STEPS, "help": f"a client's steps a round (default {LOCAL_STEPS})"}),
        ("--seeds", {"type": int, "nargs": "+", "default": [0, 1, 2]}),
    )
    rounds, steps, seeds, base_steps = parsed.fed_rounds, parsed.steps, parsed.seeds, BASE_STEPS
    if parsed.quick:
        rounds, steps, seeds, base_steps = 1, 1, seeds[:1], 1
    pictures, test_pictures = handwritten_digits(size=16)
    exam = Exam(test_pictures, new_model(0)[1], 4 if parsed.quick else len(test_pictures))
    if not find_spec("opacus"):
        print("opacus is missing, so no client is private: pip install 'chorus-moe[privacy]'", file=sys.stderr)
    report, scores = Report(f"federated, {rounds} rounds of {steps} steps, rows {OWNED}", parsed), []
    sent: dict[str, int] = {}
    for seed in seeds:
        found, sent = Study(pictures, exam, seed, rounds, steps, base_steps).accuracies()
        scores.append(found)
        report.add(f"seed {seed}", {f"{name}_accuracy": value for name, value in found.items()}, "accuracy")
    report.add_named("mean", {name: fmean(score[name] for score in scores) for name in scores[0]})
    report.add_named("bytes_per_round", {name: float(value) for name, value in sent.items()})
    print("\n".join(table(scores)))
    report.save()


if __name__ == "__main__":
    main()
