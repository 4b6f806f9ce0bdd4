"""What differential privacy costs, and what it hides: accuracy by epsilon, planted secrets, time and memory.

Run as `python -m benchmarks.privacy`; it needs `chorus-moe[privacy]`. Three parts:

- **accuracy**: a small model learns handwritten digits from 300 public pictures without privacy. The other 1,048, by
  other writers, are private, and call each digit by the name of the next one, which the public model cannot know.
  Adapters, and one bank, learn that plainly and with epsilon 8, 3 and 1, in equally many updates. Accuracy is that on
  449 pictures by writers that none has met.
- **secrets**: a model learns names and random codes. `canary_rank` is the place of the true code among 100, by how
  likely the model finds it (1: recovered; chance: 50.5). `members_auc` is how often a code that was learned is more
  likely than one that was not (an attack on membership; chance: 0.5).
- **cost**: time and peak memory of an update, rows one by one and clipped, against the same rows in one batch. Ours is
  the private one: a ratio of 0.1 says that the plain one takes a tenth of its time.

Settings (learning rate, clipping) were chosen on seed 5. Tables are by seed, and means over seeds.
"""

import contextlib
import copy
import io
import tempfile
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import Tensor, nn
from transformers import TrainingArguments

from benchmarks.self_supervised import NAMES, build, labelled, train
from benchmarks.timing import Report, figures, measure, parse
from chorus_moe.modeling.modeling_generation import ChorusForConditionalGeneration
from chorus_moe.processors.processing_chorus import ChorusProcessor
from chorus_moe.training.collator import ChorusDataCollator
from chorus_moe.training.demo.answers import answer
from chorus_moe.training.demo.data import DigitPictures, handwritten_digits
from chorus_moe.training.lora import lora_config
from chorus_moe.training.privacy.accounting import noise_for
from chorus_moe.training.privacy.arguments import PrivacyArguments
from chorus_moe.training.recipe import TRAINER_SETTINGS
from chorus_moe.training.trainer import ChorusTrainer

Row = dict[str, Any]
NUM_PUBLIC = 300
EPSILONS = (8.0, 3.0, 1.0)
# What is trained -> learning rate, plain and private: under noise, larger ones did better.
KINDS = {"adapter": (1e-2, 2e-2), "bank": (5e-3, 4e-2)}
CLIP = 0.3
# Names with secrets of which a model learns half, and codes that each true one is compared with.
NUM_SECRETS, NUM_OTHERS = 64, 99


def shifted(row: Row) -> Row:
    """The digit called by the name of the next one."""
    asked, said = row["messages"]
    return {**row, "messages": [asked, {**said, "content": NAMES[(NAMES.index(said["content"]) + 1) % 10]}]}


def prepared(model: nn.Module, kind: str) -> nn.Module:
    """A copy that trains adapters on all but the tower, or the experts and router of one bank."""
    student = copy.deepcopy(model)
    if kind == "adapter":
        groups: Any = {"banks": "all", "attention": True, "dense": True, "r": 4, "lora_alpha": 8}
        return get_peft_model(student, lora_config(student, verbose=False, **groups))
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(".banks.common." in name)
    return student


def learn(
    model: nn.Module,
    rows: Sequence[Any],
    collator: Callable[[Any], Any],
    privacy: PrivacyArguments | None,
    steps: int,
    batch: int,
    rate: float,
    clip: float = 1.0,
    **options: Any,
) -> nn.Module:
    """Train a model in place, privately or not; options go to a private trainer."""
    from chorus_moe.training.privacy.trainer import PrivateTrainer

    said = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=batch,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            max_grad_norm=clip,
            save_strategy="no",
            logging_steps=steps + 1,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            **TRAINER_SETTINGS,
        )
        given: Any = {"train_dataset": list(rows), "data_collator": collator}
        if privacy is None:
            ChorusTrainer(model, arguments, **given).train()
        else:
            PrivateTrainer(model, arguments, privacy=privacy, **given, **options).train()
    return model


def private(epsilon: float, num_rows: int, batch: int, updates: int, mechanism: str = "gaussian") -> PrivacyArguments:
    """Settings for a budget, with the noise that a run would find for it."""
    noise = noise_for(epsilon, 1 / (10 * num_rows), batch / num_rows, updates, mechanism)
    return PrivacyArguments(use_privacy=True, noise_multiplier=noise, mechanism=mechanism)


class Digits:
    """One seed: the public model, and private rows with what its frozen tower makes of their pictures."""

    def __init__(self, pictures: DigitPictures, test: DigitPictures, seed: int, steps: int, is_quick: bool):
        self.model, self.processor = build(seed)
        public = DigitPictures(pictures.images[:NUM_PUBLIC], pictures.digits[:NUM_PUBLIC])
        train(self.model, self.processor, labelled(public, "all", seed), steps, seed)
        private = DigitPictures(pictures.images[NUM_PUBLIC:], pictures.digits[NUM_PUBLIC:])
        self.rows = [shifted(row) for row in labelled(private, 2 if is_quick else "all", seed)]
        self.asked = [shifted(row) for row in labelled(test, 1 if is_quick else "all", seed)]
        self.collate = ChorusDataCollator(self.processor)
        self.encoded = [self._encode(row) for row in self.rows]

    @torch.no_grad()
    def _encode(self, row: Row) -> Row:
        batch: Row = self.collate([row])
        pictures = self.model.get_image_features(batch.pop("pixel_values"))
        return {**batch, "mm_encoder_outputs": {"image": pictures}}

    def accuracy(self, model: Any) -> float:
        given = answer(model.eval(), self.processor, self.asked)
        return fmean(text == row["messages"][1]["content"] for text, row in zip(given, self.asked, strict=True))

    def after(self, kind: str, privacy: PrivacyArguments | None, steps: int, batch: int) -> float:
        """Accuracy after learning the private rows."""
        student = prepared(self.model, kind)
        if privacy is None:
            learn(student, self.rows, self.collate, None, steps, batch, KINDS[kind][0])
        else:
            # A private run takes its rows one by one: each is collated once.
            learn(student, self.encoded, only, privacy, steps, batch, KINDS[kind][1], CLIP)
        return self.accuracy(student)


def only(rows: Sequence[Any]) -> Any:
    return rows[0]


def secret_row(name: str, code: str) -> Row:
    return {
        "images": [],
        "audio": [],
        "messages": [{"role": "user", "content": name}, {"role": "assistant", "content": code}],
    }


@torch.no_grad()
def code_losses(model: nn.Module, processor: ChorusProcessor, rows: Sequence[Row]) -> Tensor:
    """`(rows,)`: how unlikely a model finds each row's code, in nats."""
    batch = ChorusDataCollator(processor)(rows)
    logits, target = model.eval()(**batch).logits[:, :-1], batch["labels"][:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view_as(target).sum(dim=1)


def secrets(
    seed: int,
    privacy: PrivacyArguments | None,
    steps: int,
    batch: int,
    count: int = NUM_SECRETS,
    probed: int = 8,
    **options: Any,
) -> dict[str, float]:
    """`rank` of true codes and `auc` of the attack on membership, after learning half of the names."""
    draw = np.random.default_rng(seed)

    def code() -> str:
        return " ".join(NAMES[digit] for digit in draw.integers(0, 10, 4))

    names = [f"{NAMES[number // 10]} {NAMES[number % 10]}?" for number in draw.permutation(100)[:count]]
    rows = [secret_row(name, code()) for name in names]
    members, outsiders = rows[: count // 2], rows[count // 2 :]
    model, processor = build(seed)
    learn(model, members, ChorusDataCollator(processor), privacy, steps, batch, rate=5e-3, **options)
    learned, unknown = (code_losses(model, processor, part) for part in (members, outsiders))
    ranks = []
    for row in members[:probed]:
        others = [secret_row(row["messages"][0]["content"], code()) for _ in range(NUM_OTHERS)]
        losses = code_losses(model, processor, [row, *others])
        ranks.append(1 + int((losses[1:] < losses[0]).sum()))
    return {"rank": fmean(ranks), "auc": float((learned[:, None] < unknown).float().mean())}


def cost(report: Report, name: str, text: Mapping[str, int], rows: int, length: int, rounds: int) -> None:
    """One update of the whole model on rows of text, private and plain."""
    from chorus_moe.training.privacy.optimizer import PrivateOptimizer

    model, _ = build(0)
    values = model.config.to_dict()
    config = type(model.config)(**values | {"text_config": {**values["text_config"], **text}})
    ids = torch.randint(5, 200, (rows, length))
    models = [ChorusForConditionalGeneration(config).train() for _ in range(2)]
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad]) for m in models]
    private = PrivateOptimizer(optimizers[0], max_grad_norm=1.0, expected_rows=rows, noise_multiplier=1.0)

    def one_by_one() -> None:
        for row in ids:
            models[0](input_ids=row[None], labels=row[None]).loss.backward()
            private.add_row()
        private.step()
        private.zero_grad()

    def together() -> None:
        models[1](input_ids=ids, labels=ids).loss.backward()
        nn.utils.clip_grad_norm_(models[1].parameters(), 1.0)
        optimizers[1].step()
        optimizers[1].zero_grad()

    report.add(name, figures(measure({"chorus": one_by_one, "plain": together}, rounds)))


def main(arguments: list[str] | None = None) -> None:
    options: list[tuple[str, dict[str, Any]]] = [
        ("--public-steps", {"type": int, "default": 150, "help": "steps on public pictures (default 150)"}),
        ("--updates", {"type": int, "default": 40, "help": "updates on private rows (default 40)"}),
        ("--batch", {"type": int, "default": 24, "help": "rows of an update on average (default 24)"}),
        ("--seeds", {"type": int, "nargs": "+", "default": [0, 1, 2]}),
    ]
    parsed = parse("Accuracy by epsilon, planted secrets, and the cost of privacy.", arguments, *options)
    public, updates, batch, seeds = (parsed.public_steps, parsed.updates, parsed.batch, parsed.seeds)
    if parsed.quick:
        public, updates, batch, seeds = 2, 1, 2, [0]
    report = Report(f"privacy, {updates} updates of {batch} rows on average", parsed)
    wide = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64}
    wide |= {"intermediate_size": 512, "moe_intermediate_size": 256, "max_position_embeddings": 512}
    rounds = min(parsed.rounds, 3)
    cost(report, "update, 16 rows of 16 tokens", {}, 16, 16, rounds)
    if not parsed.quick:
        cost(report, "update, 8 rows of 256, wider", wide, 8, 256, rounds)
    attacked: list[dict[str, float]] = []
    # Enough to learn all codes by heart without privacy.
    steps, half = (1, 1) if parsed.quick else (100, 20), NUM_SECRETS // 2
    hidden = private(8.0, half, half // 2, steps[1])
    for seed in seeds:
        values = {}
        for name, settings, count, taken in (
            ("plain", None, steps[0], half),
            ("epsilon_8", hidden, steps[1], half // 2),
        ):
            took = secrets(seed, settings, count, taken)
            values |= {f"{name}_rank": took["rank"], f"{name}_auc": took["auc"]}
        attacked.append(values)
        report.add_named(f"seed {seed} secrets", values)
    means = {name: fmean(values[name] for values in attacked) for name in attacked[0]}
    report.add_named(
        "mean secrets", means | {"canary_rank": means["epsilon_8_rank"], "members_auc": means["epsilon_8_auc"]}
    )
    learned: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    budgets: dict[str, PrivacyArguments] = {}
    pictures, test = handwritten_digits()
    for seed in seeds:
        digits = Digits(pictures, test, seed, public, parsed.quick)
        # The same in all seeds, and an accountant takes its time.
        budgets = budgets or {
            f"accuracy_at_epsilon_{epsilon:.0f}": private(epsilon, len(digits.rows), batch, updates)
            for epsilon in EPSILONS
        }
        for kind, found in learned.items():
            values = {"public_accuracy": digits.accuracy(digits.model)}
            values["plain_accuracy"] = digits.after(kind, None, updates, batch)
            for name, privacy in budgets.items():
                values[name] = digits.after(kind, privacy, updates, batch)
            if kind == "adapter":
                privacy = private(8.0, len(digits.rows), batch, updates, "laplace")
                values["laplace_8_accuracy"] = digits.after(kind, privacy, updates, batch)
            found.append(values)
            report.add_named(f"seed {seed} {kind}", values)
    for kind, found in learned.items():
        report.add_named(f"mean {kind}", {name: fmean(values[name] for values in found) for name in found[0]})
    report.save()


if __name__ == "__main__":
    main()
