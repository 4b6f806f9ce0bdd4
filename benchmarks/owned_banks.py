"""Owners of different media: one has pictures, one has sounds, and each gives away a bank, not its rows.

Run as `python -m benchmarks.owned_banks`. A small model learns handwritten digits and the ten tones of a telephone's
keypad, in noise, from public rows; of the digits 5 to 9 the public has few. That is the base. The owner of pictures
and that of sounds have many of just these. Each adds a bank to the base (open to its medium and to text), trains it
alone on its own rows, and saves it. The banks are gathered as `chorus-moe federated gather` does it.

- `base`: no bank;
- `pictures`, `sounds`: the base and one bank, as its owner has it;
- `gathered`: both banks, with the gates that their owners have trained;
- `gates`: the same, the gates trained on the public rows;
- `withdrawn`: `gates` after the owner of pictures has withdrawn its bank;
- `together`: all rows in one place train both banks at once, for as many steps as the owners take together.

Accuracy is the share of held-out media whose digit is named: pictures by writers that none has met, and new tones.
"""

import argparse
import copy
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import numpy as np
import soundfile
import torch
from PIL import Image
from transformers import AutoModelForMultimodalLM, set_seed

from benchmarks.digit_lessons import stepper
from benchmarks.federated import quiet
from benchmarks.multitask import WORDS
from benchmarks.timing import Report, parse
from chorus_moe.modeling.configuration_chorus import ChorusConfig
from chorus_moe.modeling.modeling_generation import ChorusForConditionalGeneration
from chorus_moe.surgery import add_bank, freeze, save_bank, unfreeze
from chorus_moe.surgery.processor import processor_from_config
from chorus_moe.surgery.tokenizer import build_tokenizer
from chorus_moe.training.collator import ChorusDataCollator
from chorus_moe.training.demo.data import DigitPictures, handwritten_digits
from chorus_moe.training.federated.owned_banks import gather_banks, withdraw_bank

QUESTION, SAMPLING_RATE, BATCH, RATE = "which digit", 16_000, 32, 3e-3
# Hertz of a keypad's rows and columns; digit -> its place.
LOW, HIGH, KEYS = (697, 770, 852, 941), (1209, 1336, 1477), "123456789.0"
# Rows of a digit below five, and of one above: of the public in each medium, of an owner in its own.
PUBLIC, OWNED = (20, 3), (5, 50)
OWNERS = {"pictures": "image", "sounds": "audio"}
Row = dict[str, Any]


def tone(digit: int, rng: np.random.Generator) -> dict[str, Any]:
    """A fifth of a second of a key's two frequencies, off by a few percent, in noise louder than they are."""
    place = KEYS.index(str(digit))
    seconds = np.arange(int(SAMPLING_RATE * rng.uniform(0.16, 0.24))) / SAMPLING_RATE
    off = rng.uniform(0.97, 1.03)
    waves = [np.sin(2 * np.pi * off * hertz * seconds) for hertz in (LOW[place // 3], HIGH[place % 3])]
    noise = rng.normal(0, 1.5, len(seconds))
    return {"array": (0.1 * (waves[0] + waves[1] + noise)).astype(np.float32), "sampling_rate": SAMPLING_RATE}


def row_of(digit: int, picture: Any = None, clip: Any = None) -> Row:
    kind = "image" if clip is None else "audio"
    content = [{"type": kind}, {"type": "text", "text": QUESTION}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": WORDS[digit]}]
    return {"messages": turns, "images": [] if clip else [picture], "audio": [clip] if clip else []}


def deal(pictures: DigitPictures, seed: int) -> dict[str, list[Row]]:
    """Rows of the public and of both owners; no picture is dealt twice."""
    rng = np.random.default_rng(seed)
    decks = {digit: list(rng.permutation(np.flatnonzero(pictures.digits == digit))) for digit in range(10)}

    def some(counts: tuple[int, int], medium: str) -> list[Row]:
        digits = [digit for digit in range(10) for _ in range(counts[digit >= 5])]
        if medium == "audio":
            return [row_of(digit, clip=tone(digit, rng)) for digit in digits]
        return [row_of(digit, picture=pictures.images[decks[digit].pop()]) for digit in digits]

    public = [row for medium in OWNERS.values() for row in some(PUBLIC, medium)]
    return {"public": public} | {owner: some(OWNED, medium) for owner, medium in OWNERS.items()}


def new_model(seed: int) -> tuple[ChorusForConditionalGeneration, Any]:
    tokenizer = build_tokenizer([*WORDS, QUESTION] * 4, vocab_size=400)
    config = ChorusConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "mlp_layer_types": ["sparse", "sparse"],
            # The last layer reads no positions of media.
            "expert_banks": {"text": {}, "image": {"layers": [0]}, "audio": {"layers": [0]}, "common": {}},
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 64,
            "initializer_range": 0.08,
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
        audio_config={
            "num_mel_bins": 40,
            "max_seconds": 1.0,
            "hidden_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "intermediate_size": 96,
            "conv_kernel_size": 7,
            "subsampling": 4,
            "pool_size": 2,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        audio_token_id=tokenizer.convert_tokens_to_ids("<audio>"),
    )
    set_seed(seed)
    return ChorusForConditionalGeneration(config), processor_from_config(config, tokenizer)


def write(rows: Sequence[Row], folder: Path) -> Path:
    """Rows as a file, media beside it."""
    folder.mkdir()
    lines = []
    for number, row in enumerate(rows):
        found = dict(row)
        for picture in row["images"]:
            found["images"] = [f"{number}.png"]
            (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(folder / f"{number}.png")
        for clip in row["audio"]:
            found["audio"] = [f"{number}.wav"]
            soundfile.write(folder / f"{number}.wav", clip["array"], clip["sampling_rate"])
        lines.append(json.dumps(found))
    path = folder / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


class Study:
    """One seed: a base in a folder, everybody's rows, and held-out media."""

    def __init__(self, folder: Path, parsed: argparse.Namespace, seed: int):
        pictures, unseen = handwritten_digits(size=16)
        self.parsed, self.seed, self.folder = parsed, seed, folder
        self.rows, rng = deal(pictures, seed), np.random.default_rng(10_000 + seed)
        self.base, self.processor = new_model(seed)
        self.collate, self.path = ChorusDataCollator(self.processor), folder / "base"
        count = 10 if parsed.quick else len(unseen)
        asked = {
            "image": [row_of(int(unseen.digits[place]), picture=unseen.images[place]) for place in range(count)],
            "audio": [row_of(place % 10, clip=tone(place % 10, rng)) for place in range(count)],
        }
        self.exam = {medium: self.collate(rows) for medium, rows in asked.items()}
        self.learn(self.base, self.rows["public"], parsed.base_steps)
        with quiet():
            self.base.save_pretrained(self.path)
            self.processor.save_pretrained(self.path)

    def learn(self, model: Any, rows: Sequence[Row], steps: int) -> None:
        take, rng = stepper(model.train(), steps, RATE), np.random.default_rng(self.seed)
        for _ in range(steps):
            take(self.collate([rows[place] for place in rng.integers(len(rows), size=BATCH)]))
        model.eval()

    def with_banks(self, owners: Sequence[str], steps: int) -> Any:
        """The base with a bank for each owner, which alone is trained, on all their rows."""
        model = copy.deepcopy(self.base)
        torch.manual_seed(self.seed)
        for owner in owners:
            add_bank(model, owner, modalities=["text", OWNERS[owner]], num_experts=4)
        freeze(model, "all")
        unfreeze(model, *owners)
        self.learn(model, [row for owner in owners for row in self.rows[owner]], steps)
        return model

    @torch.no_grad()
    def accuracies(self, model: Any) -> dict[str, float]:
        """Share of answers whose every token, the end included, ranks first after the right ones."""
        found = {}
        for medium, batch in self.exam.items():
            target = batch["labels"][:, 1:]
            is_right = model.eval()(**batch).logits[:, :-1].argmax(dim=-1) == target
            found[medium] = float((is_right | (target == -100)).all(dim=1).float().mean())
        return found | {"mean": fmean(found.values())}

    def arms(self) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
        """Arm -> accuracies; and what is sent, in bytes."""
        found, files = {"base": self.accuracies(self.base)}, []
        for owner in OWNERS:
            model = self.with_banks([owner], self.parsed.steps)
            found[owner] = self.accuracies(model)
            files.append(self.folder / f"{owner}.safetensors")
            save_bank(model, owner, files[-1])
        training = {"max_steps": self.parsed.gate_steps, "per_device_train_batch_size": BATCH, "learning_rate": 1e-2}
        training |= {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
        public = write(self.rows["public"], self.folder / "public")
        gates = {"data": {"train_data": str(public)}, "training": training}
        with quiet():
            gather_banks(self.path, files, self.folder / "gathered")
            gather_banks(self.path, files, self.folder / "gates", gates)
            withdraw_bank(self.folder / "gates", "pictures", self.folder / "withdrawn")
            for arm in ("gathered", "gates", "withdrawn"):
                found[arm] = self.accuracies(AutoModelForMultimodalLM.from_pretrained(self.folder / arm))
        found["together"] = self.accuracies(self.with_banks(list(OWNERS), len(OWNERS) * self.parsed.steps))
        whole = sum(tensor.numel() * tensor.element_size() for tensor in self.base.state_dict().values())
        return found, {"model_bytes": float(whole), "bank_bytes": float(files[0].stat().st_size)}


def table(scores: Sequence[Mapping[str, Mapping[str, float]]]) -> list[str]:
    """Mean and spread over the seeds, in percent, as a table in Markdown."""
    lines = ["| | pictures | sounds | mean |", "| --- | --- | --- | --- |"]
    for arm, values in scores[0].items():
        cells = [
            f"{100 * fmean(s[arm][name] for s in scores):.1f} ± {100 * pstdev(s[arm][name] for s in scores):.1f}"
            for name in values
        ]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return lines


def main(arguments: list[str] | None = None) -> None:
    parsed = parse(
        (__doc__ or "").splitlines()[0],
        arguments,
        ("--base-steps", {"type": int, "default": 150, "help": "steps on public rows (default 150)"}),
        ("--steps", {"type": int, "default": 80, "help": "steps of an owner (default 80)"}),
        ("--gate-steps", {"type": int, "default": 40, "help": "steps of the gates (default 40)"}),
        ("--seeds", {"type": int, "nargs": "+", "default": [0, 1, 2]}),
    )
    if parsed.quick:
        parsed.base_steps, parsed.steps, parsed.gate_steps, parsed.seeds = 1, 1, 1, [0]
    report, scores = Report("banks of owners with different media", parsed), []
    for seed in parsed.seeds:
        with tempfile.TemporaryDirectory() as folder:
            found, sent = Study(Path(folder), parsed, seed).arms()
        scores.append(found)
        for medium in ("image", "audio", "mean"):
            values = {f"{arm}_accuracy": of_arm[medium] for arm, of_arm in found.items()}
            report.add(f"{medium}, seed {seed}", values, "accuracy")
    report.add_named("sent", sent)
    print("\n".join(table(scores)))
    report.save()


if __name__ == "__main__":
    main()
