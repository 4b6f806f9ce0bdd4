"""A training run from a recipe, on `transformers.Trainer` with whole checkpoints."""

import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, Trainer, TrainerState, TrainingArguments, set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from chorus_moe.modeling.configuration_banks import check_name
from chorus_moe.modeling.configuration_chorus import ChorusConfig
from chorus_moe.modeling.configuration_modalities import ENCODED
from chorus_moe.modeling.modeling_base import ChorusPreTrainedModel
from chorus_moe.modeling.modeling_generation import ChorusForConditionalGeneration
from chorus_moe.processors.processing_chorus import ChorusProcessor
from chorus_moe.processors.processing_media import MEDIA
from chorus_moe.surgery.processor import processor_from_config
from chorus_moe.surgery.tokenizer import add_media_tokens, build_tokenizer
from chorus_moe.training.checkpoints import STATE, fault_of, newest_whole, numbered_checkpoints
from chorus_moe.training.collator import MoreColumns
from chorus_moe.training.contrast.setup import (
    collator_of,
    is_contrastive,
    kind_of,
    loss_of,
    pretrained,
    reader_of,
    set_temperature,
)
from chorus_moe.training.data import FeatureRows, RowDataset
from chorus_moe.training.evaluate import text_of
from chorus_moe.training.features.checks import check_features
from chorus_moe.training.guards.skills import SkillGuard
from chorus_moe.training.guards.steps import StepGuard
from chorus_moe.training.label_smoothing import smooth_labels
from chorus_moe.training.loading import (
    ModelOrAdapter,
    base_model,
    check_source,
    choice_of,
    is_adapter,
    load_processor,
)
from chorus_moe.training.objectives.distillation import distillation_objectives
from chorus_moe.training.objectives.teacher_files import TaughtRows, teacher_columns
from chorus_moe.training.objectives.terms import build_objectives, weigh_tokens
from chorus_moe.training.quantization import quantize_below
from chorus_moe.training.rates import Rates
from chorus_moe.training.readiness import check_recipe, check_scaled, check_weights, four_bits, prepare_parts
from chorus_moe.training.recipe import GuardArguments, ModelArguments, Recipe
from chorus_moe.training.results.pictures import CURVES, NO_PICTURES, can_draw, curves_of, draw_curves
from chorus_moe.training.results.provenance import run_section
from chorus_moe.training.resume import check_resume
from chorus_moe.training.routing.callback import RoutingCallback
from chorus_moe.training.routing.counters import RoutingCounters
from chorus_moe.training.routing.observer import RoutingObserver
from chorus_moe.training.routing.report import write_routing
from chorus_moe.training.routing.reward import RouterRewardTrainer
from chorus_moe.training.saving import held_model
from chorus_moe.training.scale.faults import SlowRank
from chorus_moe.training.scale.hardware_share import HardwareShare
from chorus_moe.training.scale.layout import ALONE, Layout, accumulation, check_arguments, layout_of
from chorus_moe.training.scale.ranks import hold_same_rows, num_data_ranks
from chorus_moe.training.scale.spread import loading_in_shares, spread
from chorus_moe.training.scale.trackers import outlive_trackers
from chorus_moe.training.streaming import StreamedRows, skip_learned, training_rows
from chorus_moe.training.tasks.learning import check_memory, task_columns
from chorus_moe.training.tasks.plan import plan_tasks
from chorus_moe.training.trainer import ChorusTrainer


def run_training(recipe: Recipe, stages: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """Train, save and, if asked, evaluate and push; the output folder loads with the Auto classes.

    Every checkpoint holds the processor as well. With `resume_from_checkpoint: auto` an interrupted run continues from
    its newest whole checkpoint, with the learning rate and the other settings of the recipe.

    Args:
        stages: what the card tells of the stages before and of this one, see `stages.py`.

    Returns:
        The metrics of the run.

    Raises:
        ValueError: the recipe does not say what to train or nothing is trained, a weight is not finite, the output
            folder holds another run or model, no checkpoint is whole, or it belongs to a model with other parameters
            or a run with another order of rows.
        TrainingBroke: too many steps were skipped.
    """
    arguments = recipe.training
    # Before the model is built: its weights are drawn from this seed.
    set_seed(arguments.seed)
    if recipe.model.model_name_or_path is not None and recipe.model.config is None:
        check_source(recipe.model.model_name_or_path)
    check_recipe(recipe)
    layout = layout_of(recipe.parallel, arguments.world_size)
    check_arguments(layout, arguments)
    hold_same_rows(layout.copies, layout.context)
    if rows := recipe.parallel.rows_per_step:
        per_process, processes = arguments.train_batch_size, num_data_ranks(arguments)
        arguments.gradient_accumulation_steps = accumulation(rows, per_process, processes)
    options, eval_rows = recipe.data.to_options(), None
    train_rows = training_rows(recipe)
    if recipe.data.eval_data:
        eval_rows = reader_of(recipe)(recipe.data.eval_data, recipe.data.eval_split, **options)
    if is_contrastive(recipe):
        # Otherwise evaluation waits for labels before it reports a loss.
        arguments.label_names = []
    tasks = plan_tasks(recipe.tasks, train_rows) if recipe.tasks.use_tasks else None
    if tasks is not None and arguments.process_index == 0:
        print(tasks, file=sys.stderr)
    checkpoint = find_checkpoint(arguments, recipe.model.model_name_or_path)
    is_new = arguments.overwrite_output_dir and checkpoint is None
    model, processor = load_or_build(recipe, train_rows, checkpoint, layout)
    say_choice(recipe, model)
    spread(model, layout)
    check_features(model, processor, {"data.train_data": train_rows, "data.eval_data": eval_rows})
    objectives, answers = distillation_objectives(recipe.distillation, model, processor, recipe.data.max_length)
    more: list[MoreColumns] = [teacher_columns] if answers is not None else []
    more += [task_columns(tasks.names)] if tasks is not None else []
    collator = collator_of(recipe, processor, more)
    trainer = new_trainer(
        recipe,
        tasks=tasks,
        model=model,
        args=arguments,
        train_dataset=train_rows if answers is None else TaughtRows(train_rows, answers),
        objectives=[*build_objectives(recipe.objectives, model), *objectives],
        eval_dataset=eval_rows,
        data_collator=collator,
        processing_class=processor,
    )
    # In front of the trackers, so that they see its metrics.
    callback = RoutingCallback.add_to(trainer)
    HardwareShare.add_to(trainer, recipe.parallel.device_flops)
    outlive_trackers(trainer)
    trainer.add_callback(SlowRank(recipe.parallel.rank_patience))
    skills = guard_skills(trainer, recipe.guards, eval_rows)
    if checkpoint is not None:
        check_memory(tasks, TrainerState.load_from_json(str(Path(checkpoint) / STATE)).stateful_callbacks)
        # The Trainer would load an optimizer state on the wrong parameters without a word.
        check_resume(trainer, checkpoint)
        if isinstance(train_rows, StreamedRows):
            skip_learned(train_rows, checkpoint, arguments)
    if is_new and trainer.is_local_process_zero():
        # A later `auto` would take the steps of the earlier run for those of this one.
        for earlier in numbered_checkpoints(Path(arguments.output_dir)):
            shutil.rmtree(earlier)
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    if skills is not None and skills.lost:
        settle_loss(trainer, skills, recipe.guards)
    counters = callback.last
    if eval_rows is not None:
        with RoutingObserver(model) as observer:
            metrics |= trainer.evaluate()
        # On every rank, as it exchanges counts; only the first one writes.
        counters = observer.counters.over_ranks()
    metrics |= {"num_bad_samples": collator.num_bad_samples, "num_skipped_steps": trainer.num_skipped_steps}
    trainer.save_model()
    trainer.save_state()
    trainer.save_metrics("all", metrics)
    if is_new and trainer.is_local_process_zero():
        _remove_earlier(Path(arguments.output_dir), is_adapter=base_model(model) is not model)
    if trainer.is_world_process_zero():
        run = run_section(recipe, trainer, train_rows, eval_rows)
        if recipe.privacy.use_privacy:
            from chorus_moe.training.privacy.card import privacy_section

            run = [*privacy_section(trainer), *run]  # type: ignore[arg-type]  # by `new_trainer`
        if layout.zero:
            # Otherwise the model whose parameters the card counts is shared out as well, and waits for the other ranks.
            unset_hf_deepspeed_config()
        _publish(model, processor, metrics, trainer, counters, stages, run)
    return metrics


def new_trainer(recipe: Recipe, **parts: Any) -> ChorusTrainer:
    """The Trainer of a recipe, with its rates and guards, or the one that also rewards routers, or a private one."""
    guard = StepGuard(recipe.guards.norm_ratio, recipe.guards.max_skipped_steps)
    parts |= {"guard": guard, "rates": Rates.of(recipe.parts), "background_saves": recipe.parallel.background_saves}
    if recipe.privacy.use_privacy:
        from chorus_moe.training.privacy.trainer import PrivateTrainer

        trainer: ChorusTrainer = PrivateTrainer(**parts, privacy=recipe.privacy)
    elif not recipe.routing.router_reward_banks:
        trainer = ChorusTrainer(**parts)
    else:
        banks, coef = recipe.routing.router_reward_banks, recipe.routing.router_reward_coef
        trainer = RouterRewardTrainer(**parts, router_reward_banks=banks, router_reward_coef=coef)
    if trainer.rates is not None:
        # A part that is not there is found before the first step.
        trainer.rates.of_parameters(trainer.model, trainer.args.learning_rate)
    smooth_labels(trainer)
    # Last, so that a smoothed loss is weighed too.
    weigh_tokens(trainer.model, recipe.objectives.next_token_weight)
    return trainer


def guard_skills(trainer: Trainer, guards: GuardArguments, rows: RowDataset | None) -> SkillGuard | None:
    """The guard of old skills, added to a Trainer; None if the recipe asks for none.

    Raises:
        ValueError: nothing is evaluated on the way, or not where checkpoints are written.
    """
    if guards.keep_skills is None:
        return None
    arguments = trainer.args
    if rows is None or arguments.eval_strategy == "no":
        raise ValueError("guards.keep_skills needs data.eval_data, and training.eval_strategy steps or epoch")
    check_name("guards", "on_lost_skill", guards.on_lost_skill, ("roll_back", "stop"))
    steps = [(arguments.save_strategy, arguments.save_steps), (arguments.eval_strategy, arguments.eval_steps)]
    if arguments.eval_strategy == "epoch":
        steps = [(strategy, 0) for strategy, _ in steps]
    if guards.on_lost_skill == "roll_back" and steps[0] != steps[1]:
        raise ValueError(
            "guards.on_lost_skill=roll_back needs a checkpoint of each evaluation: set save_strategy and save_steps to "
            f"those of the evaluation; found {steps[0]} and {steps[1]}"
        )
    guard = SkillGuard(trainer, rows, guards.keep_skills)
    trainer.add_callback(guard)
    return guard


def settle_loss(trainer: ChorusTrainer, skills: SkillGuard, guards: GuardArguments) -> None:
    """Say what was lost, and load the last checkpoint that had it if the recipe asks for that.

    Raises:
        ValueError: there is none.
    """
    said = f"a skill was {skills}"
    if guards.on_lost_skill == "roll_back":
        good, _ = newest_whole(Path(trainer.args.output_dir))
        if good is None:
            raise ValueError(f"{said}; no checkpoint came before it: lower the learning rate, or mix old rows in")
        trainer._load_from_checkpoint(str(good))
        said += f"; the model is that of {good.name}"
    if trainer.is_world_process_zero():
        print(said, file=sys.stderr)


def _publish(
    model: ModelOrAdapter,
    processor: ChorusProcessor,
    metrics: dict[str, Any],
    trainer: Trainer,
    counters: RoutingCounters | None,
    stages: Sequence[Mapping[str, Any]],
    run: Sequence[str],
) -> None:
    """Write the card and its pictures, curves and routing (of the evaluation data, or without them of the last logged
    steps), into the output folder; upload model, processor and card when the recipe asks for it."""
    from chorus_moe.training.hub import push_to_hub
    from chorus_moe.training.model_card import run_card

    folder = Path(trainer.args.output_dir)
    picture = write_routing(folder, counters) if counters is not None and counters.num_tokens else None
    curves = draw_curves(folder / CURVES, curves_of(trainer.state.log_history))
    if not can_draw():
        print(NO_PICTURES, file=sys.stderr)
    card = run_card(model, metrics, picture=picture, stages=stages, curves=curves, run=run)
    (folder / "README.md").write_text(card, encoding="utf-8")
    if trainer.args.push_to_hub:
        pictures = [path for path in (picture, curves) if path]
        push_to_hub(model, processor, trainer.hub_model_id, card=card, files=pictures, token=trainer.args.hub_token)


def load_or_build(
    recipe: Recipe, rows: RowDataset | StreamedRows, checkpoint: str | None = None, layout: Layout = ALONE
) -> tuple[ModelOrAdapter, ChorusProcessor]:
    """The model to train, with its adapter if the recipe has one, and the processor."""
    given = recipe.model
    if (given.model_name_or_path is None) == (given.config is None):
        raise ValueError("give exactly one of model.model_name_or_path and model.config")
    if given.config is not None and isinstance(rows, FeatureRows):
        raise ValueError("data.train_data holds cached features, which new towers have not made: leave model.config")
    names = ("attn_implementation", "experts_implementation")
    options = {name: getattr(given, name) for name in names if getattr(given, name)}
    if recipe.lora.use_lora and given.model_name_or_path is None:
        raise ValueError("a LoRA needs a trained model below it: set model.model_name_or_path")
    if given.dtype != "auto":
        options["dtype"] = getattr(torch, given.dtype)
    if given.load_in_4bit:
        options["quantization_config"] = four_bits()
    if given.model_name_or_path is not None:
        # A new bank and an adapter go into a whole model, which is spread afterwards.
        if layout.is_sharded and not (recipe.lora.use_lora or given.add_bank or is_adapter(given.model_name_or_path)):
            options |= loading_in_shares(layout, kind_of(recipe), given.model_name_or_path)
        model = pretrained(recipe, **options)
        processor = load_processor(given.model_name_or_path)
    else:
        model, processor = build_model(given, rows, checkpoint, kind_of(recipe), loss_of(recipe), **options)
    if is_contrastive(recipe):
        set_temperature(model, recipe.objectives)
    check_weights(model)
    # The tables once, not once on each rank.
    is_first = recipe.training.process_index == 0
    prepared = prepare_parts(model, recipe, verbose=is_first)
    check_scaled(prepared, recipe.training)
    quantize_below(prepared, recipe.quantization, verbose=is_first)
    return prepared, processor


def say_choice(recipe: Recipe, model: ModelOrAdapter) -> None:
    """Print where a run trains and in what numbers, to standard error."""
    arguments = recipe.training
    if arguments.process_index == 0:
        source = recipe.model.model_name_or_path or "a new model"
        computes = "bfloat16" if arguments.bf16 else "float16" if arguments.fp16 else None
        products = f", products in {computes}" if computes else ""
        print(f"{choice_of(source, model, arguments.device)}{products}", file=sys.stderr)


def build_model(
    given: ModelArguments,
    rows: RowDataset | StreamedRows,
    checkpoint: str | None = None,
    kind: type[ChorusPreTrainedModel] = ChorusForConditionalGeneration,
    fields: Mapping[str, Any] | None = None,
    **options: Any,
) -> tuple[ChorusPreTrainedModel, ChorusProcessor]:
    """A new model and its processor. Vocabulary and token ids that the configuration leaves out are the tokenizer's.

    Args:
        fields: of the configuration, which win over `given.config`.

    Raises:
        ValueError: the tokenizer has more tokens than the model.
    """
    if checkpoint is not None:
        # A tokenizer trained again on changed data would give other ids than the weights know.
        tokenizer = load_processor(checkpoint).tokenizer
    elif given.tokenizer is not None:
        tokenizer = AutoTokenizer.from_pretrained(given.tokenizer)
    else:
        if isinstance(rows, StreamedRows):
            raise ValueError("data.streaming: a tokenizer cannot be trained on a stream; give model.tokenizer")
        tokenizer = build_tokenizer(texts_of(rows), given.tokenizer_vocab_size)
    add_media_tokens(tokenizer)
    assert given.config is not None  # `build_model` has checked it
    values = {**read_config(given.config), **(fields or {})}
    text = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        # Last, so that the configuration wins over the tokenizer.
        **values.get("text_config", {}),
    }
    if len(tokenizer) > text["vocab_size"]:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, text_config.vocab_size is {text['vocab_size']}")
    ids = {
        row.token_id: tokenizer.convert_tokens_to_ids(MEDIA[row.name].token)
        for row in ENCODED
        if values.get(row.config) is not None
    }
    config = ChorusConfig(**{**ids, **values, "text_config": text})
    return kind._from_config(config, **options), processor_from_config(config, tokenizer)


def read_config(source: str) -> dict[str, Any]:
    """The values of a configuration from JSON text, a config.json or the folder of one."""
    if source.lstrip().startswith("{"):
        return json.loads(source)
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"model.config: no configuration at {source!r}")
    return json.loads(path.read_text(encoding="utf-8"))


def texts_of(rows: RowDataset) -> Iterator[str]:
    """All texts of all rows, to train a tokenizer on."""
    for row in rows:
        # Of a pair the text itself, if it has one.
        yield from [text_of(message) for message in row["messages"]] if "messages" in row else [row.get("text") or ""]


def find_checkpoint(arguments: TrainingArguments, start: str | None = None) -> str | None:
    """The checkpoint to continue from: `resume_from_checkpoint`, or for "auto" the newest whole one, if any.

    Args:
        start: the model that the run starts from.

    Raises:
        ValueError: the checkpoint is not whole, or none is; or the output folder holds checkpoints, another model or
            the one to start from, and the recipe does not say what to do with them.
    """
    # Taken out of the arguments: the Trainer would take "auto" for a path.
    asked, arguments.resume_from_checkpoint = arguments.resume_from_checkpoint, None
    folder = Path(arguments.output_dir)
    if asked not in (None, "auto"):
        fault = fault_of(Path(asked))
        if fault is not None:
            raise ValueError(
                f"resume_from_checkpoint: {asked} {fault}; give a whole checkpoint, or auto for the newest"
            )
        if Path(asked).resolve().parent != folder.resolve():
            _check_output(folder, start, arguments)
        return str(asked)
    checkpoint, faults = newest_whole(folder) if asked == "auto" else (None, [])
    if checkpoint is not None:
        if arguments.process_index == 0:
            passed = f"; not whole: {', '.join(faults)}" if faults else ""
            print(f"the run continues from {checkpoint.name}{passed}", file=sys.stderr)
        return str(checkpoint)
    if faults:
        raise ValueError(f"{folder}: no checkpoint is whole: {', '.join(faults)}; choose another --output_dir")
    _check_output(folder, start, arguments)
    return None


def _check_output(folder: Path, start: str | None, arguments: TrainingArguments) -> None:
    """Refuse to begin where another run or model lies."""
    cure = "choose another --output_dir, or replace it with --overwrite_output_dir true"
    checkpoints, held = numbered_checkpoints(folder), held_model(folder)
    # An adapter needs the model below it, and a failed run its start.
    if start is not None and Path(start).resolve() in {path.resolve() for path in (folder, *checkpoints)}:
        raise ValueError(f"--output_dir {folder} holds the model that the run starts from; choose another folder")
    if getattr(arguments, "overwrite_output_dir", False):
        return
    if checkpoints:
        raise ValueError(
            f"{str(folder)!r} holds {checkpoints[-1].name} of an earlier run; continue it with "
            f"--resume_from_checkpoint auto, {cure}"
        )
    if held:
        raise ValueError(f"{str(folder)!r} holds a model ({', '.join(held[:3])}); {cure}")


def _remove_earlier(folder: Path, is_adapter: bool) -> None:
    """Remove what an overwritten run has left and the new one does not write: a folder with the configuration of an
    adapter would be taken for one."""
    for name in held_model(folder):
        if name.startswith("adapter") != is_adapter:
            (folder / name).unlink()
