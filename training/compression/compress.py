"""Make a model smaller by the steps of a recipe, and say after each what it costs and still knows.

The model of each step lies in `output_dir/_steps` until the end, with its figures beside it, which are written last: a
run that was interrupted goes on after the last whole step, and within a distil step after its newest checkpoint.

Unusual here: each step loads what the one before has saved, through the Auto classes, so what is measured is what a
user will load.
"""

import json
import shutil
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import set_seed

from chorus_moe.modeling.configuration_chorus import ChorusConfig
from chorus_moe.training.checkpoints import numbered_checkpoints
from chorus_moe.training.compression.measure import Measurement, markdown_of, measure
from chorus_moe.training.compression.plan import CompressionRecipe, Distil, Quantize, Step
from chorus_moe.training.compression.steps import apply, distil_recipe
from chorus_moe.training.compression.target import Outlook, look_ahead
from chorus_moe.training.data import RowDataset, load_rows
from chorus_moe.training.loading import check_head, check_source, choice_of, find_device, is_adapter, load_model
from chorus_moe.training.model_card import run_card
from chorus_moe.training.saving import CARD, held_model, saved_whole
from chorus_moe.training.train import run_training

STEPS_FOLDER, PLAN, FIGURES = "_steps", "plan.json", "compression.json"


@dataclass(frozen=True)
class Work:
    """A compression that can begin.

    Args:
        recipe: with its steps, also where the default plan has chosen them.
        outlook: bytes to expect.
        train_rows, eval_rows: None where the recipe names no data.
    """

    recipe: CompressionRecipe
    outlook: Outlook
    train_rows: RowDataset | None
    eval_rows: RowDataset | None


def prepare(recipe: CompressionRecipe) -> Work:
    """Check all that can be known before the model is loaded, and choose the steps of a target.

    Raises:
        ValueError: an adapter, a model that is quantised already or of another head, steps that do not fit it or need
            rows that are not given, a target that is not reached (with both numbers), or a folder that holds a model
            or another compression.
        FileNotFoundError: no such model or data.
    """
    check_source(recipe.model)
    if is_adapter(recipe.model):
        raise ValueError(f"compress: {recipe.model!r} is an adapter; merge it first, with `chorus-moe export`")
    values, _ = ChorusConfig.get_config_dict(recipe.model)
    if values.get("model_type") != ChorusConfig.model_type:
        raise ValueError(f"{recipe.model!r} is a {values.get('model_type')!r}, expected {ChorusConfig.model_type!r}")
    if values.get("quantization_config") is not None:
        raise ValueError(f"compress: {recipe.model!r} is quantised already; take the model that it was made of")
    check_head(recipe.model)
    data = recipe.data_arguments()
    options = data.to_options()
    train = load_rows(data.train_data, data.train_split, **options) if data.train_data else None
    tested = load_rows(data.eval_data, data.eval_split, **options) if data.eval_data else None
    outlook = look_ahead(recipe, ChorusConfig.from_dict(values))
    recipe = replace(recipe, steps=outlook.steps)
    needing = [step.name for step in recipe.steps if not isinstance(step, Quantize)]
    if needing and train is None:
        raise ValueError(f"compress: {needing[0]} needs training rows: give --data, or data.train_data in the recipe")
    out = Path(recipe.output_dir)
    for number, step in enumerate(recipe.steps, start=1):
        if isinstance(step, Distil):
            distil_recipe(step, recipe, recipe.model, folder_of(out, number, step))
    check_folder(out, recipe)
    return Work(recipe, outlook, train, tested)


def check_folder(out: Path, recipe: CompressionRecipe) -> None:
    """Refuse a folder with a model, or with steps of another recipe."""
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"--out {str(out)!r} is a file; give a folder")
    if Path(recipe.model).is_dir() and out.resolve() == Path(recipe.model).resolve():
        raise ValueError(f"--out {str(out)!r} is the model itself; choose another folder")
    path = out / STEPS_FOLDER / PLAN
    if path.is_file():
        begun, now = json.loads(path.read_text(encoding="utf-8")), identity_of(recipe)
        if changed := sorted(name for name in {*begun, *now} if begun.get(name) != now.get(name)):
            raise ValueError(
                f"{str(out)!r} holds steps of a compression that differs in {', '.join(changed)}; remove its "
                f"{STEPS_FOLDER}, or choose another folder"
            )
    elif held := held_model(out):
        raise ValueError(f"{str(out)!r} holds a model ({', '.join(held[:3])}); choose another folder")


def identity_of(recipe: CompressionRecipe) -> dict[str, Any]:
    """What decides the result, as JSON: the recipe but for what is kept, and the files of a local model."""
    values = json.loads(json.dumps(recipe.to_dict()))
    values.pop("keep_steps", None)
    # Whether by a target or by hand: the steps are what is done.
    values.pop("target_bytes", None)
    weights = sorted(Path(recipe.model).glob("*.safetensors"))
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in weights]
    return values | {"weights": [list(stat) for stat in stats]}


def folder_of(out: Path, number: int, step: Step) -> Path:
    return out / STEPS_FOLDER / f"{number}_{step.name}"


def compress(work: Work, device: str | None = None) -> list[Measurement]:
    """Carry out the steps and write the smaller model, its card and `compression.json` into `output_dir`.

    Returns:
        The figures of the model as it was and after each step.

    Raises:
        ValueError: no such device here, or one on which a distil step does not train.
    """
    recipe, out = work.recipe, Path(work.recipe.output_dir)
    place = find_device(device)
    if place.index and any(isinstance(step, Distil) for step in recipe.steps):
        raise ValueError(
            f"--device {place}: a distil step trains on the first device that it sees; set "
            f"CUDA_VISIBLE_DEVICES={place.index} and leave --device out"
        )
    aside = out / STEPS_FOLDER
    aside.mkdir(parents=True, exist_ok=True)
    write_json(aside / PLAN, identity_of(recipe))
    rows = [_measured(work, "start", recipe.model, aside / "0_start.json", place)]
    current = recipe.model
    for number, step in enumerate(recipe.steps, start=1):
        folder, record = folder_of(out, number, step), aside / f"{number}_{step.name}.json"
        notes: list[str] = []
        if not record.is_file():
            say(f"step {number} of {len(recipe.steps)}: {step.name}")
            # What is drawn at random does not depend on which steps were done before an interruption.
            set_seed(recipe.seed + number)
            notes = _done(work, step, current, folder, place)
        rows.append(_measured(work, f"{number} {step.name}", str(folder), record, place, notes))
        current = str(folder)
    _publish(work, Path(current), rows)
    if not recipe.keep_steps:
        shutil.rmtree(aside)
    return rows


def _done(work: Work, step: Step, current: str, folder: Path, device: torch.device) -> list[str]:
    """Carry out a step on the model in `current`, and save it to `folder`; lines on what was done."""
    if isinstance(step, Distil):
        # The Trainer prints its figures where the command's answer goes.
        with redirect_stdout(sys.stderr):
            metrics = run_training(distil_recipe(step, work.recipe, current, folder, device))
        for checkpoint in numbered_checkpoints(folder):
            shutil.rmtree(checkpoint)
        return [f"distil: loss {metrics['train_loss']:.4f} in {metrics['train_runtime']:.0f} s"]
    model, processor = load_model(current, device=device)
    reports = apply(step, model, processor, work.train_rows, work.recipe.batch_size)
    folder.mkdir(parents=True, exist_ok=True)
    with saved_whole(folder) as whole:
        model.save_pretrained(whole)
        processor.save_pretrained(whole)
    return [line for report in reports for line in str(report).splitlines()]


def _measured(
    work: Work, name: str, source: str, record: Path, device: torch.device, notes: Sequence[str] = ()
) -> Measurement:
    """The figures of a saved model, from `record` if an earlier run has written them."""
    if record.is_file():
        return Measurement(**json.loads(record.read_text(encoding="utf-8")))
    recipe = work.recipe
    model, processor = load_model(source, device=device)
    say(choice_of(name, model))
    found = measure(
        name,
        Path(source),
        model,
        processor,
        work.eval_rows,
        batch_size=recipe.batch_size,
        max_new_tokens=recipe.max_new_tokens,
        notes=notes,
    )
    write_json(record, found.to_dict())
    accuracy = "" if found.accuracy is None else f", accuracy {100 * found.accuracy:.1f}%"
    say(f"{name}: {found.bytes:,} bytes{accuracy}, {found.tokens_per_second:.1f} tokens/s")
    return found


def _publish(work: Work, last: Path, rows: Sequence[Measurement]) -> None:
    """Copy the last step's model into the output folder, with its card and figures."""
    recipe, out = work.recipe, Path(work.recipe.output_dir)
    model, _ = load_model(str(last), device="cpu")
    # The parents of a model stand in its own card, which the folders between do not have.
    model.name_or_path = recipe.model
    told = replace(recipe, model=Path(recipe.model).name, output_dir=out.name)
    plan = yaml.safe_dump({"steps": told.to_dict()["steps"]}, sort_keys=False, allow_unicode=True)
    figures = rows[-1].to_dict() | {"share_of_bytes": rows[-1].bytes / rows[0].bytes}
    card = run_card(model, figures, run=markdown_of(rows, plan))
    with saved_whole(out) as whole:
        for path in sorted(last.iterdir()):
            if path.is_file() and path.name != CARD:
                shutil.copyfile(path, whole / path.name)
        (whole / CARD).write_text(card, encoding="utf-8")
        write_json(whole / FIGURES, {"recipe": recipe.to_dict(), "rows": [row.to_dict() for row in rows]})


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a file in one go: a kill leaves the old one or none."""
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    aside.replace(path)


def say(line: str) -> None:
    """Progress. On standard error: standard output is the command's answer."""
    print(line, file=sys.stderr, flush=True)
