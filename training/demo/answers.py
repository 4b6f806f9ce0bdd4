"""The demo's questions on disk, and the answers of a model loaded from a folder.

Run as a program this is the demo's fresh process: it knows nothing but two folders, loads the model through the Auto
classes and writes its answers.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import soundfile
import torch
from tqdm.auto import tqdm
from transformers import AutoModelForMultimodalLM, AutoProcessor
from transformers.utils.logging import disable_progress_bar

from chorus_moe.processors.processing_chorus import ChorusProcessor
from chorus_moe.training.demo.data import MEDIA_COLUMNS, Sample, withhold
from chorus_moe.training.loading import ModelOrAdapter

VARIANTS = ("full", "image_withheld", "audio_withheld")
MAX_NEW_TOKENS = 5


def save_questions(samples: Iterable[Sample], folder: Path) -> None:
    """Write samples as `questions.jsonl` with PNG and WAV files beside it, the rows `chorus-moe evaluate` reads."""
    media = folder / "media"
    media.mkdir(parents=True, exist_ok=True)
    with (folder / "questions.jsonl").open("w", encoding="utf-8") as file:
        for index, sample in enumerate(samples):
            row = dict(sample)
            for column, suffix in (("images", "png"), ("audio", "wav")):
                row[column] = [f"media/{index:05d}_{i}.{suffix}" for i in range(len(sample[column]))]
            for image, name in zip(sample["images"], row["images"], strict=True):
                image.save(folder / name)
            for clip, name in zip(sample["audio"], row["audio"], strict=True):
                soundfile.write(folder / name, clip["array"], clip["sampling_rate"], subtype="PCM_16")
            file.write(json.dumps(row) + "\n")


def load_questions(folder: Path) -> list[Sample]:
    """The rows of `save_questions`, media as absolute paths."""
    rows = []
    for line in (folder / "questions.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for column in MEDIA_COLUMNS.values():
            row[column] = [str(folder / name) for name in row[column]]
        rows.append(row)
    return rows


@torch.inference_mode()
def answer(
    model: ModelOrAdapter,
    processor: ChorusProcessor,
    samples: Sequence[Sample],
    batch_size: int = 64,
    progress: tqdm | None = None,
) -> list[str]:
    """Greedy answers, one per sample, in order."""
    model.eval()
    answers: list[str] = []
    for start in range(0, len(samples), batch_size):
        batch = samples[start : start + batch_size]
        inputs = processor.apply_chat_template(
            # The prompt is what comes before the answer.
            [[turn for turn in sample["messages"] if turn["role"] != "assistant"] for sample in batch],
            images=[sample["images"] for sample in batch],
            audio=[sample["audio"] for sample in batch],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        generated = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        new_tokens = generated[:, inputs["input_ids"].shape[1] :]
        answers += [text.strip() for text in processor.batch_decode(new_tokens, skip_special_tokens=True)]
        if progress is not None:
            progress.update(len(batch))
    return answers


def variants_of(samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    """The samples as they are, without their images, and without their sounds."""
    return {
        "full": list(samples),
        "image_withheld": [withhold(sample, "image") for sample in samples],
        "audio_withheld": [withhold(sample, "audio") for sample in samples],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Answer the questions of some folders with a saved model.")
    parser.add_argument("--model", required=True, help="folder of a model and its processor")
    parser.add_argument("--adapter", help="folder of a LoRA adapter of that model")
    parser.add_argument("--questions", required=True, nargs="+", type=Path, help="folders written by save_questions")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS[:1], help="what each folder gives")
    parser.add_argument("--limit", type=int, help="answer only this many questions, from the first")
    parser.add_argument("--out", required=True, type=Path, help="JSON file to write: folder -> variant -> answers")
    options = parser.parse_args(arguments)

    import chorus_moe  # noqa: F401  registers the Auto classes

    disable_progress_bar()
    # As in training: products this small gain nothing from a second thread.
    torch.set_num_threads(1)
    model = AutoModelForMultimodalLM.from_pretrained(options.model)
    processor = AutoProcessor.from_pretrained(options.model)
    if options.adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, options.adapter)
    answers: dict[str, dict[str, list[str]]] = {}
    for folder in options.questions:
        variants = variants_of(load_questions(folder)[: options.limit])
        answers[folder.name] = {name: answer(model, processor, variants[name]) for name in options.variants}
    options.out.write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
