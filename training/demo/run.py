"""The demo: a trimodal expert model learns from nothing, is fine-tuned with LoRA, saved, reloaded and examined.

1. real handwriting, synthetic (or real) speech and text questions;
2. each encoder learns its own medium and is frozen; stage 1 trains connectors and decoder on top, from nothing; stage 2
   adapts named banks and the cross-modal layers with LoRA to a question type and to voices that the base does not know;
3. adapter and merged model are saved and loaded in a fresh process, which answers the held-out questions;
4. a report says what was reached, what each modality is worth, and where the tokens went.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, set_seed

from chorus_moe.surgery import parameter_report
from chorus_moe.training.collator import ChorusDataCollator
from chorus_moe.training.demo.answers import load_questions, save_questions
from chorus_moe.training.demo.augment import PictureAugment
from chorus_moe.training.demo.data import (
    BASE_SKILLS,
    NEW_SKILL,
    DigitPictures,
    DigitQuestions,
    Sample,
    corpus,
    handwritten_digits,
)
from chorus_moe.training.demo.encoders import (
    EncoderLesson,
    FrozenTowers,
    LoneDigitCollator,
    LoneDigits,
    beside,
    learn_alone,
)
from chorus_moe.training.demo.model import build_demo
from chorus_moe.training.demo.regularisation import drop_tokens, smooth_labels
from chorus_moe.training.demo.report import WITHHELD, write_report
from chorus_moe.training.demo.speech import SpeechClips, recorded_digits
from chorus_moe.training.demo.speech_sets import recorded_speech_sets, synthetic_speech_sets
from chorus_moe.training.loading import ModelOrAdapter
from chorus_moe.training.lora import lora_config
from chorus_moe.training.routing.callback import RoutingCallback
from chorus_moe.training.routing.report import PICTURE
from chorus_moe.training.saving import saved_whole

# By how hard a skill is: a sum has nineteen answers, "same" two.
REASONING = {"written": 1.3, "spoken": 0.5, "sum": 2.0, "larger": 1.0, "same": 0.8}
# The old questions that the new one resembles most, in words or in sense, need the most reminding.
REPLAY = {"written": 3.0, "spoken": 1.5, "sum": 1.2, "larger": 2.5, "same": 0.8}
# A real speaker of whom there are a few recordings is learnt by listening.
REPLAY_OF_SPEAKER = REPLAY | {"written": 4.0, "spoken": 6.0}


@dataclass(frozen=True)
class DemoSettings:
    """How much of everything: the defaults take six to eight minutes on two processor cores.

    Args:
        picture_steps, sound_steps: optimizer steps of each encoder alone.
        base_steps, lora_steps: optimizer steps of the two stages.
        voice_steps: optimizer steps of the audio tower alone at the start of stage 2, as part of the adapter; 0 leaves
            it frozen.
        dynamic_range: powers of ten below the loudest sound of a clip that the model hears.
        batch_size: samples per step.
        label_smoothing, token_dropout: of both stages, see `demo/regularisation.py`.
        questions_per_skill: held-out questions of each skill.
        replay: share of old skills while the new one is learnt, so that they are kept.
    """

    picture_steps: int = 1_400
    sound_steps: int = 700
    base_steps: int = 560
    lora_steps: int = 380
    voice_steps: int = 0
    dynamic_range: float = 8.0
    batch_size: int = 44
    encoder_lr: float = 2e-3
    voice_lr: float = 1e-3
    base_lr: float = 2e-3
    lora_lr: float = 3e-3
    lora_rank: int = 32
    label_smoothing: float = 0.1
    token_dropout: float = 0.15
    questions_per_skill: int = 300
    replay: float = 0.65
    workers: int = 1
    seed: int = 0


# Real voices take more steps than synthetic ones: with fewer, "spoken" was 4 to 5 points lower (docs/log.md).
# A speaker's background is no part of a digit: what is softer than four powers of ten sounds alike in all recordings.
FOR_RECORDINGS = DemoSettings(sound_steps=1_000, base_steps=1_000, voice_steps=300, lora_steps=500, dynamic_range=4.0)


@dataclass(frozen=True)
class DemoData:
    """What the audio encoder and the two stages learn from, and held-out media."""

    clips: LoneDigits
    voice: LoneDigits
    base: Dataset
    adaptation: Dataset
    test_pictures: DigitPictures
    test_clips: SpeechClips
    new_voice_clips: SpeechClips
    voices: str
    known_clips: SpeechClips | None = None


def lone_pictures(settings: DemoSettings) -> LoneDigits:
    """What the vision encoder learns from."""
    pictures, _ = handwritten_digits()
    length = settings.picture_steps * settings.batch_size
    return LoneDigits(pictures, length, seed=settings.seed, picture_augment=PictureAugment())


def prepare_data(
    settings: DemoSettings, cache: Path, speech_dir: Path | None, held_out_speaker: str | None
) -> DemoData:
    """Voices and questions; speech is synthesised and augmented once and kept in `cache`."""
    train_pictures, test_pictures = handwritten_digits()
    # As many clips of old voices as of new ones, so that the new do not displace the old.
    replay, old_voices = REPLAY, 1.0
    if speech_dir is None:
        speech = synthetic_speech_sets(cache)
    else:
        replay, old_voices = REPLAY_OF_SPEAKER, 0.33
        speaker = held_out_speaker or sorted(set(recorded_digits(speech_dir).speakers))[-1]
        speech = recorded_speech_sets(speech_dir, speaker, cache)
    augment = PictureAugment()
    heard = settings.sound_steps * settings.batch_size
    clips = LoneDigits(speech.train, heard, seed=settings.seed, other_words=speech.other_words)
    base = DigitQuestions(
        train_pictures,
        speech.train,
        REASONING,
        settings.base_steps * settings.batch_size,
        seed=settings.seed,
        picture_augment=augment,
    )
    # Every n-th clip of the old voices.
    every = max(1, round(len(speech.train) / len(speech.adaptation) / old_voices))
    replayed = {name: settings.replay * weight / sum(replay.values()) for name, weight in replay.items()}
    voices = speech.adaptation + speech.train.select(range(0, len(speech.train), every))
    adaptation = DigitQuestions(
        train_pictures,
        voices,
        {NEW_SKILL: 1 - settings.replay} | replayed,
        settings.lora_steps * settings.batch_size,
        seed=settings.seed + 1,
        picture_augment=augment,
    )
    voice = LoneDigits(voices, settings.voice_steps * settings.batch_size, seed=settings.seed + 1)
    return DemoData(
        clips,
        voice,
        base,
        adaptation,
        test_pictures,
        speech.test,
        speech.adaptation_test,
        speech.description,
        speech.known,
    )


def held_out_questions(data: DemoData, settings: DemoSettings, folder: Path) -> dict[str, list[Sample]]:
    """Write held-out questions below `folder` and read them back, by set: of every skill, of "spoken" by new voices, in
    new phrasings, and in new phrasings by known speakers if there are clips of them."""
    # Other draws than in training.
    options: dict[str, Any] = {"seed": settings.seed + 7}
    skills = [*BASE_SKILLS, NEW_SKILL]
    length = settings.questions_per_skill * len(skills)
    few = settings.questions_per_skill
    sets = {
        "test": DigitQuestions(data.test_pictures, data.test_clips, skills, length, **options),
        "new_voices": DigitQuestions(
            data.test_pictures, data.new_voice_clips, ["spoken"], few, distractors=0.0, **options
        ),
    }
    options["held_out_questions"] = True
    for name, clips in (("new_phrasings", data.test_clips), ("known_speakers", data.known_clips)):
        if clips is not None:
            sets[name] = DigitQuestions(data.test_pictures, clips, BASE_SKILLS, few, **options)
    for name, questions in sets.items():
        save_questions((questions[i] for i in range(len(questions))), folder / name)
    return {name: load_questions(folder / name) for name in sets}


def train(
    model: "ModelOrAdapter | EncoderLesson",
    dataset: Dataset,
    collator: Callable[..., Any],
    folder: Path,
    steps: int,
    lr: float,
    settings: DemoSettings,
) -> list[dict[str, float]]:
    """One stage under the stock Trainer; what it has logged."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=lr,
        lr_scheduler_type="cosine",
        warmup_steps=min(100, steps // 10),
        weight_decay=0.05,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        logging_steps=max(1, steps // 20),
        save_strategy="no",
        remove_unused_columns=False,
        train_sampling_strategy="sequential",
        dataloader_num_workers=settings.workers,
        label_names=["labels"],
        seed=settings.seed,
        report_to="none",
        disable_tqdm=parent_process() is not None,  # one bar at a time
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=dataset, data_collator=collator)
    # A lesson has no decoder and so no routing.
    if not isinstance(model, EncoderLesson):
        RoutingCallback.add_to(trainer)
    trainer.train()
    return trainer.state.log_history


def accuracy_by_skill(samples: Sequence[dict[str, Any]], answers: Sequence[str]) -> dict[str, list[bool]]:
    """Skill -> one True or False a question: the generated text is exactly the expected answer."""
    marks: dict[str, list[bool]] = {}
    for sample, given in zip(samples, answers, strict=True):
        marks.setdefault(sample["skill"], []).append(given == sample["answer"])
    return marks


def answer_in_fresh_process(
    model: Path, questions: Sequence[Path], out: Path, *options: str
) -> dict[str, dict[str, list[str]]]:
    """Answers by set and variant from a new Python process that loads the folders through the Auto classes."""
    # A fresh process has nothing but the folders: what was not saved is missing there.
    command = [sys.executable, "-m", "chorus_moe.training.demo.answers", "--model", str(model), "--out", str(out)]
    subprocess.run([*command, *options, "--questions", *map(str, questions)], check=True)
    return json.loads(out.read_text())


def run_demo(
    out: Path,
    settings: DemoSettings | None = None,
    speech_dir: Path | None = None,
    held_out_speaker: str | None = None,
    model_card: Path | None = None,
) -> dict[str, Any]:
    """Run everything below `out` and return what `report.json` holds; `model_card` gets a copy of the model's card,
    with its picture beside it.

    Raises:
        FileNotFoundError: `speech_dir` holds no recordings.
        RuntimeError: the adapter and the merged model, loaded again, disagree.
    """
    from peft import get_peft_model

    settings = settings or (DemoSettings() if speech_dir is None else FOR_RECORDINGS)
    torch.set_num_threads(1)  # products this small gain nothing from a second thread; the other core does the rest
    started = time.monotonic()
    set_seed(settings.seed)
    out.mkdir(parents=True, exist_ok=True)
    stages: dict[str, float] = {}

    def finish(name: str) -> None:
        stages[name] = time.monotonic() - started - sum(stages.values())
        print(f"[{time.monotonic() - started:6.1f} s] {name} done", flush=True)

    model, processor = build_demo(corpus(), settings.dynamic_range)
    print(parameter_report(model.config), flush=True)

    def learn(modality: str, items: LoneDigits) -> EncoderLesson:
        steps, lr = len(items) // settings.batch_size, settings.encoder_lr
        teach = partial(train, folder=out / "encoders" / modality, steps=steps, lr=lr, settings=settings)
        return learn_alone(model, modality, items, teach, LoneDigitCollator(processor, modality))

    seeing = [model.model.vision_tower, model.model.vision_connector]
    # A lesson uses one thread, so pictures are learnt on the other core while voices are made and learnt.
    with beside(partial(learn, "image", lone_pictures(settings)), seeing, out / "pictures.safetensors"):
        data = prepare_data(settings, out / "cache", speech_dir, held_out_speaker)
        sets = held_out_questions(data, settings, out / "questions")
        finish("data, beside pictures")
        listening = learn("audio", data.clips)
    finish("encoders, each alone")
    smooth_labels(model, settings.label_smoothing)
    drop_tokens(model.model.audio_connector, settings.token_dropout)
    collate = ChorusDataCollator(processor)
    # The loader's process has time to spare, but a forked one cannot use a GPU.
    questions = collate if torch.cuda.is_available() else FrozenTowers(collate, model.model)
    logs = {
        "stage 1, base": train(
            model, data.base, questions, out / "stage1", settings.base_steps, settings.base_lr, settings
        )
    }
    model.save_pretrained(out / "base")
    processor.save_pretrained(out / "base")
    finish("stage 1, base model from nothing")

    chosen = lora_config(
        model, banks=["text", "audio", "common"], cross_modal=True, attention=False,
        whole=["audio_tower"] if settings.voice_steps else [],
        r=settings.lora_rank, lora_alpha=2 * settings.lora_rank,
    )  # fmt: skip
    adapted = get_peft_model(model, chosen)
    folders = [out / "questions" / name for name in sets]
    with ThreadPoolExecutor(1) as pool:
        # The base model is on disk, so a process of its own answers while the adapter learns.
        answered = pool.submit(answer_in_fresh_process, out / "base", folders, out / "answers_before.json")
        if settings.voice_steps:
            hear, steps, lr = LoneDigitCollator(processor, "audio"), settings.voice_steps, settings.voice_lr
            listening.repeat(lambda lesson: train(lesson, data.voice, hear, out / "voice", steps, lr, settings))
        logs["stage 2, LoRA"] = train(
            adapted, data.adaptation, questions, out / "stage2", settings.lora_steps, settings.lora_lr, settings
        )
        before = {name: accuracy_by_skill(sets[name], answers["full"]) for name, answers in answered.result().items()}
    with saved_whole(out / "adapter") as aside:
        adapted.save_pretrained(aside)
    merged = adapted.merge_and_unload()
    merged.save_pretrained(out / "merged")
    processor.save_pretrained(out / "merged")
    finish("stage 2, LoRA, beside answers before it")

    adapter_options = ("--adapter", str(out / "adapter"), "--limit", str(min(128, len(sets["test"]))))
    # Each uses one thread, so they share the cores.
    with ThreadPoolExecutor() as pool:
        after, withheld, by_adapter = pool.map(
            lambda call: answer_in_fresh_process(*call),
            [
                (out / "merged", folders, out / "answers.json"),
                (out / "merged", folders[:1], out / "answers_withheld.json", "--variants", *WITHHELD),
                (out / "base", folders[:1], out / "answers_adapter.json", *adapter_options),
            ],
        )
    after["test"] |= withheld["test"]
    by_adapter_full = by_adapter["test"]["full"]
    differing = sum(a != b for a, b in zip(by_adapter_full, after["test"]["full"], strict=False))
    # Merging rounds, which may turn a close answer: up to 2% may differ.
    if differing > len(by_adapter_full) // 50:
        raise RuntimeError(f"adapter and merged model disagree on {differing} of {len(by_adapter_full)} answers")
    finish("evaluation in a fresh process")

    marks = {
        name: {variant: accuracy_by_skill(rows, answers) for variant, answers in after[name].items()}
        for name, rows in sets.items()
    }
    result = write_report(
        out,
        model=merged,
        processor=processor,
        questions=sets["test"],
        answers=after["test"]["full"],
        before=before["test"],
        after=marks["test"],
        extra={
            name: (sum(before[name].values(), []), sum(marks[name]["full"].values(), []))
            for name in sets
            if name != "test"
        },
        new_skill=NEW_SKILL,
        voices=data.voices,
        logs=logs,
        agreement=(len(by_adapter_full) - differing, len(by_adapter_full)),
        stages=stages,
        seconds=time.monotonic() - started,
        peak_gib=max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        / 2**20,
    )
    if model_card is not None:
        shutil.copyfile(out / "merged" / "README.md", model_card)
        shutil.copyfile(out / "merged" / PICTURE, model_card.with_name(PICTURE))
    finish("report")
    print((out / "report.md").read_text(), flush=True)
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of the demo."""
    parser = argparse.ArgumentParser(prog="chorus-moe demo", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for everything that is written")
    parser.add_argument("--speech-dir", type=Path, help="folder of recordings {digit}_{speaker}_{take}.wav")
    parser.add_argument("--held-out-speaker", help="the speaker of --speech-dir kept for adaptation and testing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model-card", type=Path, help="also write the model's card here")
    for option in ("--device", "--dtype"):
        parser.add_argument(option, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.device or options.dtype:
        parser.error("the demo takes a GPU if it sees one, and float32; CUDA_VISIBLE_DEVICES= shows it none")
    settings = DemoSettings() if options.speech_dir is None else FOR_RECORDINGS
    settings = replace(settings, seed=options.seed)
    run_demo(options.out, settings, options.speech_dir, options.held_out_speaker, options.model_card)


if __name__ == "__main__":
    main()
