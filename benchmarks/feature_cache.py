"""An epoch from cached features against one from media: how much sooner, at what cost, and with the same loss.

Run as `python -m benchmarks.feature_cache`. Rows of pictures and rows of sound lie on disk; a step reads and decodes
them, collates, runs the model forward and backward, and AdamW. `chorus` reads what `cache-features` has written. Towers
are frozen; connectors alone, or connectors and the whole decoder, are trained.

`epochs_to_even` is how many epochs pay for the caching; `difference` how far apart the losses of all rows are.
"""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from PIL import Image

from benchmarks.timing import OURS, Report, figures, measure, parse
from chorus_moe.modeling.configuration_chorus import ChorusConfig
from chorus_moe.modeling.modeling_generation import ChorusForConditionalGeneration
from chorus_moe.surgery import freeze, unfreeze
from chorus_moe.surgery.processor import processor_from_config
from chorus_moe.surgery.tokenizer import build_tokenizer
from chorus_moe.training.data import RowDataset, load_rows
from chorus_moe.training.features.cache import cache_features
from chorus_moe.training.features.collate import FeatureCollator

QUESTION, ANSWERS = "what is it?", ("three", "four", "five")
SIZES: dict[str, Any] = {
    "text": {"hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 256, "num_hidden_layers": 4},
    # A fifteenth of SigLIP base, as the decoder is a fifteenth of SmolLM2 135M.
    "vision": {"architecture": "vit_tiny_patch16_224", "image_size": 224, "pool_size": 2},
    "audio": {"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 768},
    "rows": 32,
    "pixels": 320,
    "seconds": 5.0,
}
QUICK: dict[str, Any] = {
    "text": {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 2},
    "vision": {
        "architecture": "vit_tiny_patch16_224",
        "model_args": {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2},
        "image_size": 32,
    },
    "audio": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
    "rows": 4,
    "pixels": 40,
    "seconds": 0.2,
}
BATCH_SIZE = 8
TRAINED = {"connectors": ("connectors",), "all but towers": ("all",)}


def write_rows(folder: Path, medium: str, sizes: Mapping[str, Any]) -> Path:
    """Rows of one medium on disk, as `load_rows` reads them."""
    rng, rows = np.random.default_rng(0), []
    folder.mkdir()
    for number in range(sizes["rows"]):
        column, name = ("images", f"{number}.jpg") if medium == "image" else ("audio", f"{number}.flac")
        if medium == "image":
            pixels = rng.integers(0, 255, (sizes["pixels"], sizes["pixels"], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name)
        else:
            soundfile.write(folder / name, rng.normal(0, 0.1, int(16_000 * sizes["seconds"])), 16_000)
        content = [{"type": medium}, {"type": "text", "text": QUESTION}]
        answer = {"role": "assistant", "content": ANSWERS[number % len(ANSWERS)]}
        rows.append({"messages": [{"role": "user", "content": content}, answer], column: [name]})
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


class Run:
    """A model whose towers are frozen, and one epoch over some rows."""

    def __init__(self, sizes: Mapping[str, Any]):
        torch.manual_seed(0)
        tokenizer = build_tokenizer([QUESTION, *ANSWERS], vocab_size=300)
        text = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2}
        ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<{name}>") for name in ("image", "audio")}
        config = ChorusConfig(
            text_config={**text, **sizes["text"], "vocab_size": len(tokenizer)},
            vision_config=sizes["vision"],
            audio_config=sizes["audio"],
            **ids,
        )
        self.model = ChorusForConditionalGeneration(config)
        self.processor = processor_from_config(config, tokenizer)
        self.collate = FeatureCollator(self.processor)

    def train(self, parts: tuple[str, ...]) -> None:
        """Train only these parts, and never the towers."""
        freeze(self.model, "all")
        unfreeze(self.model, *parts)
        freeze(self.model, "towers")
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        # A rate so small that every epoch meets the same model; the step costs what any step does.
        self.optimizer = torch.optim.AdamW(trained, lr=1e-12)

    def batches(self, rows: RowDataset) -> list[range]:
        return [range(start, min(start + BATCH_SIZE, len(rows))) for start in range(0, len(rows), BATCH_SIZE)]

    def epoch(self, rows: RowDataset) -> None:
        self.model.train()
        for numbers in self.batches(rows):
            self.model(**self.collate([rows[number] for number in numbers])).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def losses(self, rows: RowDataset) -> torch.Tensor:
        self.model.train()
        found = [self.model(**self.collate([rows[number] for number in ns])).loss for ns in self.batches(rows)]
        return torch.stack(found)


def main(arguments: list[str] | None = None) -> None:
    parsed = parse("An epoch from cached features against one from media.", arguments)
    sizes = QUICK if parsed.quick else SIZES
    report = Report(f"cached features of frozen towers, {sizes['rows']} rows of each medium", parsed)
    run = Run(sizes)
    with tempfile.TemporaryDirectory() as temporary:
        for medium in ("image", "audio"):
            rows = load_rows(write_rows(Path(temporary) / medium, medium, sizes))
            out, number = Path(temporary) / f"cached_{medium}", iter(range(10**6))

            def cache(rows: RowDataset = rows, out: Path = out, number: Any = number) -> None:
                folder = out / str(next(number))
                cache_features(run.model.eval(), run.processor, {"train": rows}, folder, source="", progress=False)

            caching = measure({"cache": cache}, 1, memory=False)["cache"]
            cached = load_rows(out / "0")
            for name, parts in TRAINED.items():
                run.train(parts)
                calls = {"media": lambda rows=rows: run.epoch(rows), OURS: lambda rows=cached: run.epoch(rows)}
                timings = measure(calls, parsed.rounds, memory=False)
                found = figures(timings)
                saved = max(timings["media"].seconds - timings[OURS].seconds, 1e-9)
                found |= {"cache_ms": caching.seconds * 1e3, "epochs_to_even": caching.seconds / saved}
                found["row_kib"] = (out / "0" / "train.arrow").stat().st_size / 1024 / len(rows)
                found["difference"] = float((run.losses(rows) - run.losses(cached)).abs().max())
                report.add(f"epoch of {medium}, {name} trained", found)
                extra = ", ".join(f"{key} {found[key]:.3g}" for key in ("epochs_to_even", "row_kib", "difference"))
                print(f"{'':<34} | {extra}", flush=True)
    report.save()


if __name__ == "__main__":
    main()
