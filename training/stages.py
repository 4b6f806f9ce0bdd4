"""Stages: one recipe that trains some parts, then others, each stage from the weights of the one before.

A stage lies in `output_dir/stages/NAME`, the last one in `output_dir` itself, with checkpoints as every run. What is
finished has a `stage.json`, which is written last, and is not repeated; the stage that was interrupted goes on from its
newest checkpoint. An adapter is merged into the weights, below its stage, before the next stage begins.

Unusual here:
- each stage loads its weights from disk, also within one run: a resumed run reads what an uninterrupted one does;
- all stages are checked, on a model without memory, before the first one starts.
"""

import gc
import json
import re
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig

from chorus_moe.modeling.configuration_chorus import ChorusConfig
from chorus_moe.modeling.modeling_base import ChorusPreTrainedModel
from chorus_moe.training.contrast.setup import kind_of, reader_of
from chorus_moe.training.features.checks import check_frozen, trained_towers
from chorus_moe.training.loading import check_source, load_model, load_processor
from chorus_moe.training.objectives.distillation import check_teachers
from chorus_moe.training.rates import Rates
from chorus_moe.training.readiness import check_recipe, prepare_parts
from chorus_moe.training.recipe import SECTIONS, PartsArguments, Recipe, build_recipe, field_names, nearest
from chorus_moe.training.saving import saved_whole
from chorus_moe.training.streaming import training_rows
from chorus_moe.training.tasks.plan import plan_tasks
from chorus_moe.training.train import read_config, run_training
from chorus_moe.training.yaml_files import read_yaml

FOLDER, RECORD, MERGED = "stages", "stage.json", "merged"
SHIPPED = Path(__file__).parent / "recipes"
LORA_GROUPS = ("banks", "attention", "cross_modal", "shared_experts", "dense", "connectors", "towers")
NAME = re.compile(r"[A-Za-z][\w-]*")
VARIABLE = re.compile(r"\$\{(\w+)\}")
# Arguments of the Trainer that decide what a stage ends with, and so may not change once it is finished.
DECISIVE = (
    *("learning_rate", "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("seed", "weight_decay", "warmup_steps"),
)


class Stage(NamedTuple):
    """A stage and its whole recipe; the name is empty for a recipe without stages."""

    name: str
    recipe: Recipe


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """The file of a recipe: a path, or the name of one that comes with the package.

    Raises:
        FileNotFoundError: it is neither, with the nearest name.
    """
    shipped = shipped_recipes()
    if Path(name).is_file():
        return Path(name)
    if name in shipped:
        return shipped[name]
    raise FileNotFoundError(f"no recipe {name!r}{nearest(name, shipped)}; a file, or one of {', '.join(shipped)}")


def read_stages(path: str | Path | None, overrides: Sequence[str] = ()) -> list[Stage]:
    """The stages of a recipe; a recipe without `stages` is one stage without a name.

    A stage has a `name`, the fields of `parts` (`train`, `freeze`, `learning_rates`, `layer_decay`), and sections,
    whose values win over those of the recipe. `--NAME value` overrides all stages, `--STAGE.NAME value` one, and
    `--VARIABLE value` a name of the section `variables`, which `${VARIABLE}` stands for in the recipe.

    Raises:
        ValueError: as `read_recipe`; no stage, or one without a name of its own.
    """
    where = str(path)
    sections = {} if path is None else read_yaml(path)
    if not isinstance(sections, Mapping):
        return [Stage("", build_recipe(sections, where, overrides))]
    sections = dict(sections)
    words = list(overrides)
    if "variables" in sections:
        sections, words = _with_variables(sections, words, where)
    if "stages" not in sections:
        return [Stage("", build_recipe(sections, where, words))]
    given = sections.pop("stages")
    if not isinstance(given, list) or not given:
        raise ValueError(f"{where}: stages must be a list of at least one stage, found {given!r:.60}")
    if "lora" in sections:
        raise ValueError(f"{where}: with stages, section 'lora' belongs to one of them")
    if "privacy" in sections:
        raise ValueError(
            f"{where}: with stages, section 'privacy' belongs to one of them: each would spend its epsilon"
        )
    names = [_name_of(stage, number, where) for number, stage in enumerate(given)]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"{where}: two stages are called {twice!r}")
    of_all, of_one = _share_out(words, names)
    stages = []
    for name, stage in zip(names, given, strict=True):
        merged = _merged(sections, stage, f"{where}, stage {name!r}")
        stages.append(Stage(name, build_recipe(merged, f"{where}, stage {name!r}", [*of_all, *of_one[name]])))
    return _chained(stages)


def _with_variables(sections: dict[str, Any], words: list[str], where: str) -> tuple[dict[str, Any], list[str]]:
    """The recipe with its variables filled in, and the words that are not about them."""
    values = sections.pop("variables")
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: section 'variables' must be a mapping, found {values!r:.60}")
    values, rest = {str(name): str(value) for name, value in values.items()}, []
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    position = 0
    while position < len(words):
        name = words[position].removeprefix("--")
        if words[position].startswith("--") and name in values and position + 1 < len(words):
            values[name] = words[position + 1]
            position += 2
        else:
            rest.append(words[position])
            position += 1

    def fill(value: Any) -> Any:
        if isinstance(value, str):
            return VARIABLE.sub(lambda match: known(match[1]), value)
        if isinstance(value, Mapping):
            return {fill(key): fill(item) for key, item in value.items()}
        return [fill(item) for item in value] if isinstance(value, list) else value

    def known(name: str) -> str:
        if name not in values:
            raise ValueError(f"{where}: ${{{name}}} is no variable{nearest(name, values)}")
        return values[name]

    return fill(sections), rest


def _name_of(stage: object, number: int, where: str) -> str:
    name = stage.get("name") if isinstance(stage, Mapping) else None
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(f"{where}: stage {number} needs a name of letters, digits, _ and -, found {stage!r:.60}")
    return name


def _share_out(words: Iterable[str], names: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """The words for all stages, and those for each: what follows `--STAGE.NAME` until the next option."""
    of_all: list[str] = []
    of_one: dict[str, list[str]] = {name: [] for name in names}
    target = of_all
    for word in words:
        if word.startswith("--"):
            stage, dot, option = word[2:].partition("=")[0].partition(".")
            target, is_one = of_all, dot and "." not in option
            if is_one:
                if stage not in of_one:
                    raise ValueError(f"{word}: no stage is called {stage!r}{nearest(stage, names)}; {list(names)}")
                target, word = of_one[stage], f"--{word[3 + len(stage) :]}"
        target.append(word)
    return of_all, of_one


def _merged(sections: Mapping[str, Any], stage: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The sections of a stage, over those of the recipe."""
    parts = field_names(PartsArguments)
    unknown = [key for key in stage if key not in {"name", *SECTIONS, *parts}]
    if unknown:
        raise ValueError(f"{where}: unknown name {unknown[0]!r}{nearest(unknown[0], [*parts, *SECTIONS])}")
    found = dict(sections)
    found["parts"] = {**(sections.get("parts") or {}), **{key: stage[key] for key in parts if key in stage}}
    for section in SECTIONS:
        if section in stage:
            content = stage[section]
            if not isinstance(content, Mapping) or not isinstance(found.get(section, {}), Mapping):
                raise ValueError(f"{where}: section {section!r} must be a mapping, found {content!r:.60}")
            found[section] = {**found.get(section, {}), **content}
    return found


def _chained(stages: list[Stage]) -> list[Stage]:
    """The stages, each with its folder, and the model of the one before to start from."""
    out = Path(stages[-1].recipe.training.output_dir)
    for number, (name, recipe) in enumerate(stages):
        if number < len(stages) - 1:
            recipe.training.output_dir = str(out / FOLDER / name)
            recipe.training.push_to_hub = False
        if number > 0:
            recipe.model.model_name_or_path = str(_result(stages[number - 1]))
            recipe.model.config = recipe.model.tokenizer = None
    return stages


def _result(stage: Stage) -> Path:
    """Where the model lies that the next stage starts from."""
    folder = Path(stage.recipe.training.output_dir)
    return folder / MERGED if stage.recipe.lora.use_lora else folder


def run_stages(stages: Sequence[Stage]) -> dict[str, Any]:
    """Run what is not finished, in order; the metrics of the last stage.

    Raises:
        ValueError: a stage that cannot run (before the first one starts), or that was finished with other settings;
            the folder holds an earlier run and the recipe does not say what to do with it.
    """
    if not stages[0].name:
        return run_training(stages[0].recipe)
    out, asked = Path(stages[-1].recipe.training.output_dir), stages[0].recipe.training
    is_resumed = asked.resume_from_checkpoint == "auto"
    if asked.resume_from_checkpoint not in (None, "auto"):
        raise ValueError("with stages, resume_from_checkpoint is auto: each stage has checkpoints of its own")
    check_stages(stages)
    # One process looks and removes, then the others look.
    with asked.main_process_first(local=False, desc="earlier stages"):
        if (out / FOLDER).exists() and not is_resumed:
            if not asked.overwrite_output_dir:
                raise ValueError(
                    f"{str(out)!r} holds stages of an earlier run; continue it with --resume_from_checkpoint auto, "
                    "choose another --output_dir, or replace it with --overwrite_output_dir true"
                )
            shutil.rmtree(out / FOLDER)
    told: list[dict[str, Any]] = []
    metrics: dict[str, Any] = {}
    for number, stage in enumerate(stages):
        path = out / FOLDER / stage.name / RECORD
        if path.is_file():
            record = json.loads(path.read_text(encoding="utf-8"))
            _check_record(stage, record)
            print(f"stage {stage.name} is finished", file=sys.stderr)
            told, metrics = [*told, record["told"]], record["metrics"]
            continue
        print(f"stage {stage.name} ({number + 1} of {len(stages)})", file=sys.stderr)
        told.append(_told(stage))
        metrics = run_training(stage.recipe, told)
        # One process merges and writes; the next stage of all starts from what it wrote.
        with stage.recipe.training.main_process_first(local=False, desc="saving the stage"):
            if stage.recipe.training.process_index == 0:
                if number < len(stages) - 1 and stage.recipe.lora.use_lora:
                    _merge(stage)
                _write(path, {"asked": _asked(stage.recipe), "told": told[-1], "metrics": metrics})
        gc.collect()
    return metrics


def check_stages(stages: Sequence[Stage]) -> None:
    """Refuse a stage that cannot run, by its name, before any work.

    Raises:
        ValueError: no data, an unknown part, nothing to train, a teacher with another tokenizer, and all else that
            `check_recipe` refuses.
        FileNotFoundError: data or a teacher that are not there.
    """
    heads = {stage.recipe.model.head: stage.name for stage in reversed(stages)}
    if len(heads) > 1:
        named = ", ".join(f"{name!r} trains {head}" for head, name in sorted(heads.items()))
        raise ValueError(f"the stages of a recipe train one head: {named}; write a recipe for each")
    model, trained = _skeleton(stages[0].recipe), set[str]()
    start = stages[0].recipe.model.model_name_or_path
    teaches = any(stage.recipe.distillation.teachers for stage in stages)
    tokenizer = load_processor(start).tokenizer if start is not None and teaches else None
    for stage in stages:
        try:
            check_recipe(stage.recipe)
            check_teachers(stage.recipe.distillation, tokenizer)
            data = stage.recipe.data
            loaded = training_rows(stage.recipe)
            rows: dict[str, Any] = {str(data.train_data): loaded}
            if stage.recipe.tasks.use_tasks:
                plan_tasks(stage.recipe.tasks, loaded)
            if data.eval_data:
                rows[data.eval_data] = reader_of(stage.recipe)(data.eval_data, data.eval_split, **data.to_options())
            prepared = prepare_parts(model, stage.recipe, verbose=False)
            check_frozen(prepared, rows, trained)
            trained |= trained_towers(prepared)
            if rates := Rates.of(stage.recipe.parts):
                rates.of_parameters(prepared, stage.recipe.training.learning_rate)
        except (ValueError, TypeError, ImportError, FileNotFoundError) as error:
            raise type(error)(f"stage {stage.name!r}: {error}") from error
        # As the stage will leave it: with its bank, without its adapter.
        model = prepared.unload() if stage.recipe.lora.use_lora else prepared


def _skeleton(recipe: Recipe) -> ChorusPreTrainedModel:
    """The model of the first stage without memory."""
    given = recipe.model
    if (given.model_name_or_path is None) == (given.config is None):
        raise ValueError("give exactly one of model.model_name_or_path and model.config")
    if given.model_name_or_path is not None:
        check_source(given.model_name_or_path)
        config = AutoConfig.from_pretrained(given.model_name_or_path)
    else:
        assert given.config is not None  # by the check above
        values = read_config(given.config)
        # Ids of tokens come from the tokenizer, which is not there yet.
        text = {"vocab_size": 1024, **values.get("text_config", {})}
        config = ChorusConfig(**{"image_token_id": 1, "audio_token_id": 2, **values, "text_config": text})
    with torch.device("meta"):
        return kind_of(recipe)._from_config(config)


def _told(stage: Stage) -> dict[str, Any]:
    """What the card says of a stage."""
    recipe, arguments = stage.recipe, stage.recipe.training
    whole = recipe.parts.train or ([] if recipe.lora.use_lora else ["all"])
    groups = recipe.lora.to_options() if recipe.lora.use_lora else {}
    adapted = [f"{name} as LoRA" for name in LORA_GROUPS if groups.get(name)]
    without = [f"without {', '.join(recipe.parts.freeze)}"] if recipe.parts.freeze else []
    rates = [f"{part} {rate:g}" for part, rate in recipe.parts.rates().items()]
    return {
        "name": stage.name,
        "trained": ", ".join([*whole, *adapted, *without]),
        "data": Path(str(recipe.data.train_data)).name,
        "learning_rate": ", ".join([f"{arguments.learning_rate:g}", *rates]),
        "steps": arguments.max_steps if arguments.max_steps > 0 else f"{arguments.num_train_epochs:g} epochs",
    }


def _asked(recipe: Recipe) -> dict[str, Any]:
    """What decides what a stage ends with, by name."""
    sections = {"data": recipe.data, "lora": recipe.lora, "routing": recipe.routing, "parts": recipe.parts}
    sections |= {"objectives": recipe.objectives, "distillation": recipe.distillation, "tasks": recipe.tasks}
    sections |= {"privacy": recipe.privacy}
    found = {f"{section}.{key}": value for section, kind in sections.items() for key, value in vars(kind).items()}
    found |= {f"training.{name}": getattr(recipe.training, name) for name in DECISIVE}
    found["training.optim"] = str(getattr(recipe.training.optim, "value", recipe.training.optim))
    found["model.head"] = recipe.model.head
    found["model.add_bank"] = recipe.model.add_bank
    return json.loads(json.dumps(found))


def _check_record(stage: Stage, record: Mapping[str, Any]) -> None:
    now = _asked(stage.recipe)
    for name, value in record["asked"].items():
        if now.get(name) != value:
            raise ValueError(
                f"stage {stage.name!r} is finished, with {name}={value!r}; now it is {now.get(name)!r}: choose another "
                "--output_dir, or put it back"
            )


def _merge(stage: Stage) -> None:
    """Save the model of a stage with its adapter merged into the weights."""
    model, processor = load_model(stage.recipe.training.output_dir, kind=kind_of(stage.recipe), merge=True)
    with saved_whole(_result(stage)) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)


def _write(path: Path, record: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    aside.replace(path)
