"""Recipes: YAML sections and command-line overrides to typed arguments.

Unusual here: YAML values become command-line words before `HfArgumentParser` reads them, so both follow the same rules
(`1e-3` is a number, lists are lists), a later word wins, and an unknown name is an error with the nearest one.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from transformers import HfArgumentParser, TrainingArguments
from transformers.training_args import OptimizerNames

from chorus_moe.training.federated.arguments import FederatedArguments
from chorus_moe.training.layouts import ALONG, LAYOUTS, MEDIA_COLUMNS, TASK
from chorus_moe.training.objectives.arguments import ObjectiveArguments
from chorus_moe.training.objectives.distillation_arguments import DistillationArguments
from chorus_moe.training.privacy.arguments import PrivacyArguments
from chorus_moe.training.quantization import QuantizationArguments
from chorus_moe.training.scale.layout import ParallelArguments, field_names_of, zero_config, zero_stage_of
from chorus_moe.training.tasks.arguments import TaskArguments
from chorus_moe.training.yaml_files import read_yaml

PRODIGY = "prodigy"
COLUMNS = sorted({name for names in LAYOUTS for name in names} | {*MEDIA_COLUMNS, *ALONG, TASK, "text"})


@dataclass
class ModelArguments:
    """What is trained: a model that exists (`model_name_or_path`) or a new one (`config`)."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "model folder or Hub id to start from"})
    config: str | None = field(
        default=None,
        metadata={"help": "configuration of a new model: a mapping in YAML, JSON text, or the path of a config.json"},
    )
    tokenizer: str | None = field(default=None, metadata={"help": "tokenizer of a new model; None: train one"})
    tokenizer_vocab_size: int = field(default=512, metadata={"help": "size of a tokenizer trained on the data"})
    add_bank: str | None = field(
        default=None,
        metadata={"help": "expert bank to add before training, what `add_bank` takes: {name: legal, num_experts: 4}"},
    )
    dtype: str = field(
        default="auto",
        metadata={"help": "numbers of the weights: auto (as saved; new ones float32), float32, bfloat16 or float16"},
    )
    load_in_4bit: bool = field(default=False, metadata={"help": "4-bit weights (bitsandbytes) below a LoRA"})
    head: str = field(
        default="generation",
        metadata={"help": "generation, or contrastive: one vector a modality, learned from rows of pairs"},
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, flex_attention, ..."})
    experts_implementation: str | None = field(default=None, metadata={"help": "eager, batched_mm, grouped_mm, ..."})


@dataclass
class DataArguments:
    """Rows with `messages`, `images` and `audio`, see `load_rows`."""

    train_data: str | None = field(default=None, metadata={"help": "file, folder or Hub id"})
    eval_data: str | None = field(default=None, metadata={"help": "file, folder or Hub id; None: no evaluation"})
    train_split: str = "train"
    eval_split: str = "test"
    columns: str | None = field(
        default=None, metadata={"help": "our name of a column -> its name in the data, a mapping in YAML or JSON text"}
    )
    media_markers: str = field(
        default="media", metadata={"help": "what <image> and <audio> in a string are: places of media, or text"}
    )
    documents: bool = field(
        default=False,
        metadata={"help": "rows of text, of media alone and of one turn without an answer are learned whole"},
    )
    streaming: bool = field(
        default=False, metadata={"help": "read train_data while training, also tar shards and folders of media"}
    )
    shuffle_buffer: int = field(
        default=1000, metadata={"help": "streamed rows among which the next one is drawn; 1: in their order"}
    )
    media_folder: str | None = field(
        default=None, metadata={"help": "where media paths begin, and all that rows may name; None: the data's folder"}
    )
    max_length: int | None = field(default=None, metadata={"help": "tokens per sample at most; only text is cut"})
    on_bad_media: str = field(default="raise", metadata={"help": "raise, or skip samples that cannot be read"})
    max_bad_samples: int = field(default=100, metadata={"help": "samples that may be skipped"})

    def to_options(self) -> dict[str, Any]:
        """Keyword arguments of `load_rows`.

        Raises:
            ValueError: `columns` that are no mapping of names that rows have.
        """
        columns = read_mapping("data.columns", self.columns, "{messages: dialogue}")
        for name in columns or ():
            if name not in COLUMNS:
                raise ValueError(f"data.columns: no column of ours is {name!r}{nearest(name, COLUMNS)}; {COLUMNS}")
        return {
            "columns": columns,
            "media_markers": self.media_markers,
            "media_folder": self.media_folder,
            "documents": self.documents,
        }


@dataclass
class LoraArguments:
    """What `lora_config` takes; layers are `true`, `false` or numbers. A `lora:` section in a recipe switches it on."""

    use_lora: bool = field(default=False, metadata={"help": "train a LoRA instead of the whole model"})
    banks: list[str] | None = field(default=None, metadata={"help": "names of expert banks, or all"})
    attention: list[str] | None = None
    cross_modal: list[str] | None = None
    shared_experts: list[str] | None = None
    dense: list[str] | None = None
    connectors: bool = False
    towers: list[str] | None = field(default=None, metadata={"help": "vision, audio"})
    router: str = field(default="frozen", metadata={"help": "frozen or train"})
    skip_gates: bool = field(default=False, metadata={"help": "also train, whole, the gates of skipped layers"})
    lora_rank: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.0
    use_rslora: bool = False

    def to_options(self) -> dict[str, Any]:
        """Keyword arguments of `lora_config`."""
        return {
            **{name: read_layers(name, getattr(self, name)) for name in LAYER_GROUPS},
            "banks": "all" if self.banks == ["all"] else self.banks or (),
            "towers": read_flag(self.towers),
            "connectors": self.connectors,
            "router": self.router,
            "skip_gates": self.skip_gates,
            "r": self.lora_rank,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "use_rslora": self.use_rslora,
        }


@dataclass
class PartsArguments:
    """What is trained, by the names that `freeze` takes, and at which rates."""

    train: list[str] | None = field(
        default=None,
        metadata={"help": "parts to train, such as connectors, image or layers:top20%; with a LoRA, trained whole"},
    )
    freeze: list[str] | None = field(default=None, metadata={"help": "parts to leave out of those"})
    learning_rates: str | None = field(
        default=None, metadata={"help": "part -> learning rate, a mapping; the last part that holds a parameter wins"}
    )
    layer_decay: float = field(
        default=1.0, metadata={"help": "each layer of the decoder learns at this share of the rate of the one above it"}
    )

    def rates(self) -> dict[str, float]:
        """Part -> learning rate.

        Raises:
            ValueError: `learning_rates` that are no mapping to positive numbers.
        """
        found = read_mapping("learning_rates", self.learning_rates, "{connectors: 1e-3}") or {}
        rates = {}
        for part, value in found.items():
            try:
                rates[part] = float(value)
            except (TypeError, ValueError):
                rates[part] = math.nan
            if not 0 < rates[part] < math.inf:
                raise ValueError(f"learning_rates: expected a positive number for {part!r}, found {value!r}")
        return rates


@dataclass
class GuardArguments:
    """What stops or turns back a run that breaks, see `guards/`."""

    norm_ratio: float | None = field(
        default=None,
        metadata={"help": "skip steps whose gradient norm is above this multiple of the median of the last 50"},
    )
    max_skipped_steps: int = field(
        default=10, metadata={"help": "skipped steps among the last 100 that a run survives; then it stops"}
    )
    keep_skills: float | None = field(
        default=None,
        metadata={"help": "nats that the held-out loss of a modality or task may rise above that before training"},
    )
    on_lost_skill: str = field(
        default="roll_back", metadata={"help": "roll_back to the last checkpoint that had all skills, or stop"}
    )


@dataclass
class RoutingArguments:
    """How routers learn beyond the losses of the configuration, see `routing/reward.py`."""

    router_reward_banks: list[str] | None = field(
        default=None, metadata={"help": "expert banks whose routers also learn from sampled experts and their reward"}
    )
    router_reward_coef: float = field(default=0.1, metadata={"help": "weight of the policy-gradient loss"})


@dataclass
class RunArguments(TrainingArguments):
    """transformers' `TrainingArguments`, with `optim: prodigy`, and whether the run may take the place of another."""

    # A text, since transformers' list of names is closed; it checks all others.
    optim: str = field(
        default=TrainingArguments.__dataclass_fields__["optim"].default,
        metadata={"help": "prodigy, or one of transformers' OptimizerNames, such as schedule_free_adamw"},
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "replace the model or adapter in output_dir, and its checkpoints"}
    )

    def __post_init__(self) -> None:
        names = [PRODIGY, *(name.value for name in OptimizerNames)]
        asked = self.optim
        if asked not in names:
            raise ValueError(f"optim={asked!r} is no optimizer{nearest(asked, names)}")
        if asked == PRODIGY:
            # transformers' list of optimizers is closed; `ChorusTrainer` builds this one.
            self.optim = "adamw_torch"
        super().__post_init__()
        if asked == PRODIGY:
            self.optim = PRODIGY


class Recipe(NamedTuple):
    model: ModelArguments
    data: DataArguments
    lora: LoraArguments
    routing: RoutingArguments
    parts: PartsArguments
    guards: GuardArguments
    objectives: ObjectiveArguments
    distillation: DistillationArguments
    tasks: TaskArguments
    privacy: PrivacyArguments
    federated: FederatedArguments
    parallel: ParallelArguments
    quantization: QuantizationArguments
    training: RunArguments
    # Names that the file or the command line gives a value; the card lists them.
    given: frozenset[str] = frozenset()


class RecipeParser(HfArgumentParser):
    """An error is one line; argparse prints some two hundred options first."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


LAYER_GROUPS = ("attention", "cross_modal", "shared_experts", "dense")
SECTIONS: dict[str, type] = {
    "model": ModelArguments,
    "data": DataArguments,
    "lora": LoraArguments,
    "routing": RoutingArguments,
    "parts": PartsArguments,
    "guards": GuardArguments,
    "objectives": ObjectiveArguments,
    "distillation": DistillationArguments,
    "tasks": TaskArguments,
    "privacy": PrivacyArguments,
    "federated": FederatedArguments,
    "parallel": ParallelArguments,
    "quantization": QuantizationArguments,
    "training": RunArguments,
}
# Names of `training` that may stand in another section, too: for a private run `max_grad_norm` bounds each row.
BORROWED = {"privacy": {"max_grad_norm"}}
# What the stock Trainer needs with this model: raw columns reach the collator, labels have their name under any
# wrapper, and evaluation keeps no logits.
TRAINER_SETTINGS = {"remove_unused_columns": False, "label_names": ["labels"], "prediction_loss_only": True}


def read_recipe(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from a YAML file and words such as `["--learning_rate", "1e-4"]`, which win.

    Args:
        path: YAML with the sections `model`, `data`, `lora`, `routing`, `parts`, `guards`, `objectives`,
            `distillation`, `tasks`, `privacy`, `federated`, `parallel`, `quantization` and `training`, each a mapping;
            None for overrides alone.

    Raises:
        ValueError: no YAML, an unknown section or name (naming the nearest one), or a value of another type.
    """
    return build_recipe({} if path is None else read_yaml(path), str(path), overrides)


def build_recipe(sections: object, where: str, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from its sections; `where` names them in an error. Errors as in `read_recipe`."""
    values = read_sections(sections, where)
    # In rising order of weight: for argparse the last word counts.
    words = to_words(TRAINER_SETTINGS) + to_words(values) + with_underscores(overrides)
    # Abbreviations would make a misspelt option a valid one.
    parser = RecipeParser(list(SECTIONS.values()), allow_abbrev=False)
    if stage := zero_stage_of(words):
        # The Trainer's arguments must have it when they are made.
        words += to_words({"deepspeed": zero_config(stage)})
    parsed = parser.parse_args_into_dataclasses(args=words)
    said = {word[2:] for word in with_underscores(overrides) if word.startswith("--")}
    names = {name for kind in SECTIONS.values() for name in field_names(kind)}
    # `--no_NAME` says something about NAME.
    given = frozenset({*values, *(name if name in names else name.removeprefix("no_") for name in said)})
    return Recipe(*parsed)._replace(given=given)


def read_sections(sections: object, where: str) -> dict[str, Any]:
    """The names and values of all sections, checked; a `lora`, `tasks` or `privacy` section switches itself
    on."""
    if not isinstance(sections, Mapping):
        raise ValueError(f"{where}: expected the sections {', '.join(SECTIONS)}, found {sections!r:.60}")
    values: dict[str, Any] = {}
    for section, content in sections.items():
        if section not in SECTIONS:
            raise ValueError(f"{where}: unknown section {section!r}{nearest(section, SECTIONS)}")
        if not isinstance(content, Mapping):
            raise ValueError(f"{where}: section {section!r} must be a mapping, found {content!r:.60}")
        for name, value in (field_names_of(content) if section == "parallel" else content).items():
            if name not in field_names(SECTIONS[section]) | BORROWED.get(section, set()):
                home = next((s for s, kind in SECTIONS.items() if name in field_names(kind)), None)
                hint = f"; it belongs to {home!r}" if home else nearest(name, field_names(SECTIONS[section]))
                raise ValueError(f"{where}: section {section!r} has no {name!r}{hint}")
            if values.get(name, value) != value:
                raise ValueError(f"{where}: {name} is {values[name]!r} in one section and {value!r} in {section!r}")
            values[name] = value
    if values.get("train") == []:
        raise ValueError(f"{where}: nothing is trained: train=[]")
    if "lora" in sections:
        # `use_lora: false` in the section still switches it off.
        values.setdefault("use_lora", True)
    if "tasks" in sections:
        values.setdefault("use_tasks", True)
    if "privacy" in sections:
        values.setdefault("use_privacy", True)
    return values


def to_words(values: Mapping[str, Any]) -> list[str]:
    """Command-line words that say the same: `{"r": 8, "banks": ["a", "b"]}` -> `--r 8 --banks a b`."""
    words = []
    for name, value in values.items():
        # An option without a word would be an error for argparse; left out, it has its default.
        if value is None or value == []:
            continue
        if isinstance(value, Mapping):
            # Such as `config`, `lr_scheduler_kwargs`: the Trainer's arguments read JSON.
            value = json.dumps(value)
        items = value if isinstance(value, list) else [value]
        words += [f"--{name}", *(str(item).lower() if isinstance(item, bool) else str(item) for item in items)]
    return words


def with_underscores(words: Sequence[str]) -> list[str]:
    """The words, every option checked and spelt with underscores.

    Raises:
        ValueError: an option that does not exist, or a word before the first option.
    """
    known = {name for kind in SECTIONS.values() for name in field_names(kind)}
    checked = []
    for position, word in enumerate(words):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            # `HfArgumentParser` adds `--no_...` for flags that are on by default.
            if name not in known and name.removeprefix("no_") not in known:
                raise ValueError(f"unknown option --{name}{nearest(name, known, '--')}")
            checked += [f"--{name}", value] if equals else [f"--{name}"]
        elif position == 0:
            raise ValueError(f"expected an option such as --learning_rate, found {word!r}")
        else:
            checked.append(word)
    return checked


def field_names(kind: type) -> set[str]:
    return {f.name for f in dataclasses.fields(kind) if f.init}


# Options of other commands, which a run has under another name.
ELSEWHERE = {
    "device": "a run takes what CUDA_VISIBLE_DEVICES shows it, and the CPU with --use_cpu true",
}


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    if name in ELSEWHERE:
        return f"; {ELSEWHERE[name]}"
    hint = get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {prefix + hint[0]!r}?" if hint else ""


def read_mapping(name: str, text: str | None, example: str) -> dict[str, Any] | None:
    """A mapping that was written in YAML, or as JSON text on the command line.

    Raises:
        ValueError: it is none.
    """
    if text is None:
        return None
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{name}: expected a mapping such as {example}, found {text!r}")
    return found


def read_flag(words: Sequence[str] | None) -> bool | list[str]:
    """`true` and `false` as bools, anything else as the list it is."""
    if not words or [word.lower() for word in words] == ["false"]:
        return False
    return True if [word.lower() for word in words] == ["true"] else list(words)


def read_layers(name: str, words: Sequence[str] | None) -> bool | list[int]:
    """`true`, `false` or layer numbers.

    Raises:
        ValueError: a word that is none of these.
    """
    flag = read_flag(words)
    if isinstance(flag, bool):
        return flag
    wrong = [word for word in flag if not word.isdecimal()]
    if wrong:
        raise ValueError(f"{name}: expected true, false or layer numbers, found {wrong[0]!r}")
    return [int(word) for word in flag]
