"""The command line, `chorus-moe COMMAND`; `chorus-moe --help` lists the commands.

Commands import what they need when they run, so that `--help` is quick.
"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chorus_moe.training.federated.commands import federated
from chorus_moe.training.options import without

if TYPE_CHECKING:
    from chorus_moe.processors.processing_chorus import ChorusProcessor
    from chorus_moe.training.loading import ModelOrAdapter

app = typer.Typer(
    name="chorus-moe",
    help="Build, fine-tune and ship your own multimodal mixture-of-experts model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(federated, name="federated")
# Options of the recipe and of the demo are not typer's: their own parsers read them.
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
REVISION_HELP = "branch, tag or commit of that repository"
MODEL_HELP = "model or adapter: a folder or a Hub id"
ModelName = Annotated[str, typer.Argument(help=MODEL_HELP)]
ModelOption = Annotated[str, typer.Option("--model", help=MODEL_HELP)]
BaseName = Annotated[str | None, typer.Option(help="model below an adapter, when it is not where it was trained")]
DeviceName = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, ...; an accelerator if there is one and none is named")
]
DtypeName = Annotated[str, typer.Option(help="auto (as saved), float32, bfloat16 or float16")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]


@app.command(context_settings=PASS_ON)
def train(
    context: typer.Context,
    recipe: Annotated[str | None, typer.Argument(help="recipe in YAML, or one that `chorus-moe recipes` lists")] = None,
) -> None:
    """Train or fine-tune from a recipe, in all its stages; more options override it: `--learning_rate 1e-4`."""
    from chorus_moe.training.scale.faults import named_by_rank, warn_of_old_store
    from chorus_moe.training.stages import find_recipe, read_stages, run_stages

    words = list(context.args)
    if recipe is not None and recipe.startswith("-"):
        # The first option, where no recipe is given.
        words.insert(0, recipe)
        recipe = None
    warn_of_old_store()
    stages = read_stages(find_recipe(recipe) if recipe else None, words)
    with named_by_rank(is_users):
        metrics = run_stages(stages)
    if stages[-1].recipe.training.process_index == 0:
        print(json.dumps(metrics, indent=2))


@app.command(context_settings=PASS_ON)
def precompute_teacher(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="recipe with distillation.teachers and distillation.teacher_logits")],
    device: DeviceName = None,
    dtype: Annotated[str | None, typer.Option(help="numbers of the teachers, as distillation.teacher_dtype")] = None,
) -> None:
    """Ask the teachers of a recipe about its rows and keep their answers on disk; more options override the recipe."""
    from chorus_moe.training.loading import find_device
    from chorus_moe.training.objectives.precompute import precompute_teachers
    from chorus_moe.training.stages import find_recipe, read_stages

    words = [*context.args, *([] if dtype is None else ["--teacher_dtype", dtype])]
    found = precompute_teachers(read_stages(find_recipe(recipe), words), find_device(device))
    print(json.dumps(found, indent=2))


@app.command()
def recipes(name: Annotated[str | None, typer.Argument(help="print this recipe, to copy and change")] = None) -> None:
    """The recipes that come with the package, and when to use each."""
    from chorus_moe.training.stages import find_recipe, shipped_recipes

    if name is not None:
        print(find_recipe(name).read_text(encoding="utf-8"), end="")
        return
    for title, path in shipped_recipes().items():
        print(f"{title:<26}{path.read_text(encoding='utf-8').splitlines()[0].removeprefix('# ')}")


@app.command()
def evaluate(
    model: ModelOption,
    data: Annotated[str, typer.Option(help="rows that end with the right answer: file, folder or Hub id")],
    split: Annotated[str, typer.Option()] = "test",
    columns: Annotated[str | None, typer.Option(help="as data.columns in a recipe")] = None,
    base: BaseName = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    out: Annotated[Path | None, typer.Option(help="folder for every answer, mistakes first, and tables")] = None,
    task: Annotated[
        str, typer.Option(help="answers, or of pairs and a contrastive model retrieval or zero_shot")
    ] = "answers",
    labels: Annotated[str | None, typer.Option(help="zero_shot: all labels, as in red,green,blue")] = None,
    template: Annotated[str | None, typer.Option(help="zero_shot: text of a label, as in 'a photo of {}'")] = None,
    k: Annotated[list[int] | None, typer.Option(help="retrieval: recall@K; may be repeated; 1, 5 and 10")] = None,
    device: DeviceName = None,
    dtype: DtypeName = "auto",
    as_json: AsJson = False,
) -> None:
    """Exact-match accuracy by generation, in all and by task and medium, and loss; of pairs what --task asks for."""
    from chorus_moe.modeling.modeling_heads import ChorusForContrastive
    from chorus_moe.training.contrast.evaluate import evaluate_pairs, read_task
    from chorus_moe.training.contrast.pairs import load_pairs
    from chorus_moe.training.data import load_rows
    from chorus_moe.training.evaluate import evaluate_rows
    from chorus_moe.training.recipe import DataArguments
    from chorus_moe.training.results.answers import write_results
    from chorus_moe.training.results.pictures import NO_PICTURES, can_draw

    if out is not None and out.exists() and not out.is_dir():
        raise NotADirectoryError(f"--out {str(out)!r} is a file; give a folder")
    pair_task = read_task(task, ks=k, labels=labels, template=template, out=out)
    options = DataArguments(columns=columns).to_options()
    if pair_task is not None:
        pairs = load_pairs(data, split, **options)
        loaded = load(model, base, device, dtype, kind=ChorusForContrastive)
        found = evaluate_pairs(pair_task, *loaded, pairs, batch_size=batch_size, progress=not as_json)
        print_values(found, as_json)
        return
    rows = load_rows(data, split, **options)
    loaded = load(model, base, device, dtype)
    result = evaluate_rows(*loaded, rows, batch_size=batch_size, max_new_tokens=max_new_tokens, progress=not as_json)
    print_values(result.to_dict(), as_json)
    if out is not None:
        written = write_results(out, result, {"model": model, "data": data, "split": split})
        print(
            f"wrote {', '.join(map(str, written))}", *([] if can_draw() else [NO_PICTURES]), sep="\n", file=sys.stderr
        )


@app.command("cache-features")
def cache_features_command(
    model: ModelName,
    data: Annotated[str, typer.Argument(help="rows with media: file, folder or Hub id")],
    out: Annotated[Path, typer.Argument(help="new folder, which data.train_data of a recipe takes")],
    split: Annotated[list[str] | None, typer.Option(help="may be repeated; train if left out")] = None,
    columns: Annotated[str | None, typer.Option(help="as data.columns in a recipe")] = None,
    media_markers: Annotated[str, typer.Option(help="as in a recipe")] = "media",
    media_folder: Annotated[str | None, typer.Option(help="as in a recipe")] = None,
    on_bad_media: Annotated[str, typer.Option(help="raise, or skip rows that cannot be read")] = "raise",
    max_bad_samples: Annotated[int, typer.Option(min=0)] = 100,
    base: BaseName = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    device: DeviceName = None,
    dtype: DtypeName = "auto",
) -> None:
    """Run the frozen towers once over data, so that training reads their outputs instead of media."""
    from chorus_moe.training.data import load_rows
    from chorus_moe.training.features.cache import cache_features
    from chorus_moe.training.recipe import DataArguments

    options = DataArguments(columns=columns, media_markers=media_markers, media_folder=media_folder).to_options()
    splits = {name: load_rows(data, name, **options) for name in dict.fromkeys(split or ["train"])}
    loaded = load(model, base, device, dtype)
    facts = cache_features(
        *loaded,
        splits,
        out,
        source=Path(model).name,
        batch_size=batch_size,
        on_bad_media=on_bad_media,
        max_bad_samples=max_bad_samples,
    )
    rows = ", ".join(f"{name} {count:,}" for name, count in facts.splits.items())
    size = sum(path.stat().st_size for path in out.iterdir()) / 2**20
    print(f"wrote {out}: {rows} rows, {size:,.1f} MiB, features of {' and '.join(facts.towers)}")


@app.command()
def generate(
    model: ModelOption,
    text: Annotated[str, typer.Option(help="the question")],
    image: Annotated[list[Path] | None, typer.Option(help="picture file; may be repeated")] = None,
    audio: Annotated[list[Path] | None, typer.Option(help="sound file; may be repeated")] = None,
    base: BaseName = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    device: DeviceName = None,
    dtype: DtypeName = "auto",
) -> None:
    """Answer one prompt of text, pictures and sound."""
    from chorus_moe.training.answers import answer_rows, user_turn

    row = user_turn(text, [str(path) for path in image or []], [str(path) for path in audio or []])
    print(answer_rows(*load(model, base, device, dtype), [row], max_new_tokens=max_new_tokens)[0])


@app.command()
def routing(
    model: ModelOption,
    data: Annotated[str, typer.Option(help="rows to route, answers included: file, folder or Hub id")],
    out: Annotated[Path, typer.Option(help="folder for routing.json and routing.png")],
    split: Annotated[str, typer.Option()] = "test",
    base: BaseName = None,
    limit: Annotated[int | None, typer.Option(min=1, help="use only this many rows, from the first")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    device: DeviceName = None,
    dtype: DtypeName = "auto",
) -> None:
    """What the experts do: load, dead experts, overflow and modality, by layer and bank, with a heat map."""
    from chorus_moe.training.data import load_rows
    from chorus_moe.training.routing.report import FIGURES, count_rows, routing_table, write_routing
    from chorus_moe.training.routing.statistics import summarise

    rows = load_rows(data, split)
    # By number: a RowDataset takes no slices.
    chosen = [rows[index] for index in range(min(limit or len(rows), len(rows)))]
    counters = count_rows(*load(model, base, device, dtype), chosen, batch_size=batch_size, progress=True)
    print(routing_table(summarise(counters)))
    picture = write_routing(out, counters)
    print(f"wrote {out / FIGURES}" + (f" and {picture}" if picture else "; install matplotlib for the heat map"))


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="config.json, model folder or Hub id")], as_json: AsJson = False
) -> None:
    """Parameters in total and active, by bank, tower and modality; bytes on disk, in memory and in training."""
    from chorus_moe.training.inspect_model import inspect_model

    report, sizes = inspect_model(model)
    if as_json:
        print(json.dumps({**report.to_dict(), "sizes": sizes.to_dict()}, indent=2))
    else:
        print(report, sizes, sep="\n\n")


@app.command()
def doctor(
    model: ModelName,
    base: BaseName = None,
    check: Annotated[list[str] | None, typer.Option(help="run this check; may be repeated; all if left out")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="leave out the checks that copy the model")] = False,
    dtype: Annotated[str, typer.Option(help="as in generate; float32 gives sharp figures for a 16-bit model")] = "auto",
    device: DeviceName = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="also write the findings to this file")] = None,
) -> None:
    """Contract checks on a checkpoint or adapter, each with a verdict and a cure; exit status 1 if one fails."""
    from chorus_moe.training.doctor.examine import (
        chosen_checks,
        examine,
        heading,
        is_healthy,
        line_of,
        load_patient,
        summary,
        write_findings,
    )

    checks = chosen_checks(check or (), is_quick=quick)
    check_dtype(dtype)
    patient = load_patient(model, base, dtype, device)
    print_choice(model, patient.model)
    print(heading())
    findings = []
    for finding in examine(patient, checks):
        # Line by line: the checks of a large model take minutes.
        print(line_of(finding), flush=True)
        findings.append(finding)
    print(f"\n{summary(findings)}")
    if json_path is not None:
        write_findings(json_path, patient, findings)
    if not is_healthy(findings):
        raise typer.Exit(1)


@app.command()
def compose(
    text: Annotated[str, typer.Option(help="causal language model: a folder or a Hub id")],
    out: Annotated[Path | None, typer.Option(help="new folder for model, processor and card")] = None,
    vision: Annotated[
        str | None, typer.Option(help="vision model: a folder, a Hub id or the name of a timm model")
    ] = None,
    audio: Annotated[str | None, typer.Option(help="Whisper, wav2vec 2.0, HuBERT, WavLM or Chorus audio model")] = None,
    text_revision: Annotated[str | None, typer.Option(help=REVISION_HELP)] = None,
    vision_revision: Annotated[str | None, typer.Option(help=REVISION_HELP)] = None,
    audio_revision: Annotated[str | None, typer.Option(help=REVISION_HELP)] = None,
    vision_pool: Annotated[int, typer.Option(min=1, help="this many image tokens along each side become one")] = 1,
    audio_pool: Annotated[int, typer.Option(min=1, help="this many audio tokens become one")] = 1,
    audio_library: Annotated[
        str, typer.Option(help="transformers, or torchaudio's modules of the same encoder")
    ] = "transformers",
    experts: Annotated[str | None, typer.Option(help="YAML with banks and options, or a preset of banks")] = None,
    sparse_layers: Annotated[str | None, typer.Option(help="layers that get experts, such as 1,3,5")] = None,
    num_experts: Annotated[int | None, typer.Option(min=1, help="experts of a bank")] = None,
    experts_per_token: Annotated[int | None, typer.Option(min=1)] = None,
    expert_split: Annotated[int | None, typer.Option(min=1, help="experts that a copy is divided into")] = None,
    expert_noise: Annotated[float | None, typer.Option(min=0.0, help="noise on the copies, relative")] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    dtype: Annotated[str, typer.Option(help="auto (the text model's), float32, bfloat16 or float16")] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check, say how large it is, and write nothing")] = False,
    device: Annotated[str | None, without("--device", "compose copies weights on the CPU and runs no model")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a new model of a pretrained text model and encoders, its feed-forward copied into experts."""
    from chorus_moe.surgery import parameter_report
    from chorus_moe.training.compose import Parts, layer_numbers, plan, read_experts
    from chorus_moe.training.compose import compose as compose_parts
    from chorus_moe.training.inspect_model import inspect_model
    from chorus_moe.training.sizes import size_report

    if out is None and not dry_run:
        raise ValueError("--out is missing: the folder for the new model; or --dry-run")
    parts = Parts(
        text=text,
        vision=vision,
        audio=audio,
        text_revision=text_revision,
        vision_revision=vision_revision,
        audio_revision=audio_revision,
        vision_pool=vision_pool,
        audio_pool=audio_pool,
        audio_library=audio_library,
    )
    given = {
        "sparse_layers": layer_numbers(sparse_layers),
        "num_experts": num_experts,
        "num_experts_per_tok": experts_per_token,
        "expert_split": expert_split,
        "expert_noise": expert_noise,
        "seed": seed,
    }
    # Options of the command line win over the file.
    options = read_experts(experts) | {name: value for name, value in given.items() if value is not None}
    if out is None or dry_run:
        planned = plan(parts, dtype=dtype, **options).composition
        report, parameters, sizes = planned.report, parameter_report(planned.model), size_report(planned.model)
    else:
        report = compose_parts(out, parts, dtype=dtype, **options)
        parameters, sizes = inspect_model(out)
    if as_json:
        reports: dict[str, Any] = {"report": report, "parameters": parameters, "sizes": sizes}
        print(json.dumps({name: value.to_dict() for name, value in reports.items()}, indent=2))
    else:
        print(report, parameters, sizes, sep="\n\n")


@app.command()
def compress(
    model: Annotated[str | None, typer.Argument(help="model: a folder or a Hub id")] = None,
    out: Annotated[Path | None, typer.Option(help="new folder for the smaller model")] = None,
    target_bytes: Annotated[
        str | None, typer.Option(help="weights on disk at most: 1900000, 1.9GB, or a share such as 0.25")
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="YAML with steps; options here win over it")] = None,
    data: Annotated[str | None, typer.Option(help="training rows, for pruning, merging and distillation")] = None,
    eval_data: Annotated[str | None, typer.Option(help="rows that end with the right answer, for accuracy")] = None,
    columns: Annotated[str | None, typer.Option(help="as data.columns in a recipe")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1)] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1)] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    keep_steps: Annotated[bool | None, typer.Option("--keep-steps", help="keep the models between steps")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the plan as a recipe, and write nothing")] = False,
    device: DeviceName = None,
    dtype: Annotated[
        str | None, without("--dtype", "steps keep the model's numbers; `chorus-moe export` has --dtype for others")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Prune, merge, distil and quantize by a recipe, or down to a size; bytes, accuracy and speed after each step."""
    import yaml

    from chorus_moe.training.compression.compress import compress as run_steps
    from chorus_moe.training.compression.compress import prepare
    from chorus_moe.training.compression.measure import table_of
    from chorus_moe.training.compression.plan import read_compression

    said: dict[str, Any] = {
        "model": model,
        "output_dir": None if out is None else str(out),
        "target_bytes": target_bytes,
    }
    said |= {"batch_size": batch_size, "max_new_tokens": max_new_tokens, "seed": seed, "keep_steps": keep_steps}
    rows = {"train_data": data, "eval_data": eval_data, "columns": columns}
    work = prepare(read_compression(recipe, {**said, "data": rows}))
    print(work.outlook, file=sys.stderr)
    if dry_run:
        print(yaml.safe_dump(work.recipe.to_dict(), sort_keys=False, allow_unicode=True), end="")
        return
    found = run_steps(work, device)
    print(json.dumps([row.to_dict() for row in found], indent=2) if as_json else table_of(found))


@app.command()
def export(
    model: ModelName,
    folder: Annotated[Path, typer.Argument(help="where the export is written")],
    base: BaseName = None,
    device: DeviceName = None,
    dtype: DtypeName = "auto",
) -> None:
    """Save a model, merged with its adapter, with the code that loads it where this package is missing."""
    from chorus_moe.training.hub import export_for_hub
    from chorus_moe.training.loading import saved_kind
    from chorus_moe.training.model_card import run_card

    loaded, processor = load(model, base, device, dtype, merge=True, kind=saved_kind(model, base))
    export_for_hub(loaded, processor, folder, card=run_card(loaded))


# `--help` is passed on as well, since the demo lists its own options.
@app.command(context_settings=PASS_ON | {"help_option_names": []})
def demo(context: typer.Context) -> None:
    """Train, fine-tune, save, reload and question a small trimodal model; `demo --help` lists its options."""
    from chorus_moe.training.demo.run import main as run_demo

    run_demo(context.args)


def load(
    source: str, base: str | None, device: str | None, dtype: str, **options: Any
) -> "tuple[ModelOrAdapter, ChorusProcessor]":
    """The model of a command and its processor; what was chosen is printed to standard error."""
    from chorus_moe.training.loading import find_device, load_model

    check_dtype(dtype)
    model, processor = load_model(source, base=base, device=find_device(device), dtype=dtype, **options)
    print_choice(source, model)
    return model, processor


def check_dtype(name: str) -> None:
    from chorus_moe.training.loading import DTYPES

    if name not in DTYPES:
        raise ValueError(f"--dtype {name!r}; choose from {', '.join(DTYPES)}")


def print_choice(source: str, model: "ModelOrAdapter") -> None:
    """Where the model is and in what numbers. On standard error: standard output is the command's answer."""
    from chorus_moe.training.loading import choice_of

    print(choice_of(source, model), file=sys.stderr)


def print_values(values: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(values, indent=2))
        return
    # What is by task or medium stands in lines of its own.
    flat = {name: value for name, value in values.items() if not isinstance(value, dict)}
    for name, group in values.items():
        if isinstance(group, dict):
            flat |= {f"{name.partition('_by_')[0]} {key or '(none)'}": value for key, value in group.items()}
    width = max(12, *(len(name) + 2 for name in flat))
    for name, value in flat.items():
        print(f"{name:<{width}}{value:>12.4f}" if isinstance(value, float) else f"{name:<{width}}{value:>12,}")


def main() -> None:
    """Entry point. An error that the user can correct is one line, without a traceback."""
    try:
        app()
    except Exception as error:
        if not is_users(error):
            raise
        # The check of a validated configuration is the cause of the library's error, which names a Python function.
        while type(error).__name__.startswith("Strict") and isinstance(error.__cause__, Exception):
            error = error.__cause__
        sys.exit(f"chorus-moe: {type(error).__name__}: {lead(error)}{' '.join(str(error).split())}")


def is_users(error: Exception) -> bool:
    """Whether the input of a command explains an error, and its words do: all of its kinds that libraries raise."""
    # Loaded by now where they were raised; `--help` needs none of them.
    from huggingface_hub.errors import StrictDataclassError
    from jinja2 import TemplateError
    from safetensors import SafetensorError

    return isinstance(
        error, (ValueError, TypeError, OSError, ImportError, StrictDataclassError, TemplateError, SafetensorError)
    )


def lead(error: Exception) -> str:
    """What is wrong, where a library says only how."""
    leads = {
        "SafetensorError": "a .safetensors file is damaged or cut short, copy it again: ",
        "TemplateSyntaxError": "the chat template is wrong: ",
        "TemplateError": "the chat template refuses the conversation: ",
        "UndefinedError": "the chat template asks for what the conversation lacks: ",
    }
    return leads.get(type(error).__name__, "")


if __name__ == "__main__":
    main()
