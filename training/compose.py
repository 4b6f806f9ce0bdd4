"""A composed model and its processor, straight into a folder: `chorus-moe compose`.

Unusual here:
- whatever can be wrong (folders, files, sizes, token ids, the processor) is found before a weight is read;
- revisions are pinned first, so weights, tokenizer and image settings of a part come from one commit, and the card
  names it.
"""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import chorus_moe.auto_classes  # noqa: F401  the command line has not registered them before
from chorus_moe.modeling.configuration_chorus import ChorusConfig
from chorus_moe.modeling.modeling_generation import ChorusForConditionalGeneration
from chorus_moe.processors.processing_chorus import ChorusProcessor
from chorus_moe.surgery.compose_plan import Composition, media_token_ids, plan_composition, write_composition
from chorus_moe.surgery.compose_processor import compose_processor, parent_tokenizer
from chorus_moe.surgery.parent_checkpoint import ParentCheckpoint
from chorus_moe.surgery.parent_text import ParentText
from chorus_moe.surgery.parent_towers import TowerParent, audio_parent, vision_parent
from chorus_moe.surgery.report import OperationReport
from chorus_moe.training.loading import DTYPES
from chorus_moe.training.model_card import Parent, run_card
from chorus_moe.training.recipe import nearest
from chorus_moe.training.sizes import readable
from chorus_moe.training.yaml_files import read_yaml

# What `chorus_moe.surgery.compose` takes beside the parts.
EXPERT_OPTIONS = (
    "experts",
    "sparse_layers",
    "num_experts",
    "num_experts_per_tok",
    "expert_split",
    "expert_noise",
    "cross_modal_layers",
    "seed",
)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Where a model comes from.

    Args:
        text, vision, audio: folders or Hub ids; `vision` may name a timm model.
        text_revision, vision_revision, audio_revision: branch, tag or commit of the repositories.
        vision_pool, audio_pool: neighbouring tokens that the connectors turn into one, along each side of an image.
        audio_seconds: longest window of an encoder of samples.
        audio_library: `transformers`, or `torchaudio` for its modules of the same encoder.
        token, cache_dir, local_files_only: as in transformers' `from_pretrained`.
    """

    text: str
    vision: str | None = None
    audio: str | None = None
    text_revision: str | None = None
    vision_revision: str | None = None
    audio_revision: str | None = None
    vision_pool: int = 1
    audio_pool: int = 1
    audio_seconds: float = 30.0
    audio_library: str = "transformers"
    token: str | bool | None = None
    cache_dir: str | None = None
    local_files_only: bool = False

    @property
    def access(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("token", "cache_dir", "local_files_only")}


class Plan(NamedTuple):
    """What `compose` is about to write.

    Args:
        composition: the model, on the meta device.
        processor: of the model.
        parents: of which it is made, for the card.
        notes: what became of the parents' chat template.
    """

    composition: Composition
    processor: ChorusProcessor
    parents: list[Parent]
    notes: list[str]


def plan(parts: Parts, *, dtype: str = "auto", **experts: Any) -> Plan:
    """Open the parts and check everything, without reading a weight. Arguments and errors as in `compose`."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}; choose from {', '.join(DTYPES)}")
    check_names(experts, "compose")
    # `ParentText` is built for its checks: an unsupported family is refused before an encoder is downloaded.
    text = ParentText(ParentCheckpoint(parts.text, revision=parts.text_revision, **parts.access)).checkpoint
    vision, audio = read_towers(parts)
    # The processor first: what does not fit is found in seconds, the weights take minutes.
    notes: list[str] = []
    processor = build_processor(parts, text, vision, audio, notes)
    # Encoders are handed over opened, the text part with its pinned commit: weights come from what was checked.
    options = {"revision": text.revision, "dtype": dtype, **parts.access, **experts}
    composition = plan_composition(ChorusForConditionalGeneration, text.source, vision, audio, **options)
    composition.report.notes.extend(notes)
    origins: dict[str, Any] = {"text": text, "vision": vision, "audio": audio}
    parents = [Parent(part, origin.source, origin.revision) for part, origin in origins.items() if origin is not None]
    return Plan(composition, processor, parents, notes)


def compose(
    folder: str | os.PathLike[str],
    parts: Parts,
    *,
    dtype: str = "auto",
    max_shard_size: int | str = "5GB",
    **experts: Any,
) -> OperationReport:
    """Write model, processor and card into a new folder; `AutoModelForMultimodalLM` and `AutoProcessor` load it.

    How large the model is goes to standard error before the first weight is read.

    Args:
        folder: empty, or not there yet.
        dtype: of the new model; `auto` for that of the text part.
        max_shard_size: as in `save_pretrained`.
        experts: as in `chorus_moe.surgery.compose` (`EXPERT_OPTIONS`).

    Raises:
        OSError: a part is not there, or lacks a file, as transformers says it; the disk is too small.
        ValueError: a part or a setting that does not fit, before any weight is read.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: not an empty folder")
    planned = plan(parts, dtype=dtype, **experts)
    print(size_line(planned.composition), file=sys.stderr)
    write_composition(planned.composition, folder, max_shard_size)
    planned.processor.save_pretrained(folder)
    config = ChorusConfig.from_pretrained(folder)
    # The card needs the configuration only, so no model is built for it.
    card = run_card(SimpleNamespace(config=config), parents=planned.parents, notes=planned.notes)
    (folder / "README.md").write_text(card, encoding="utf-8")
    return planned.composition.report


def size_line(composition: Composition) -> str:
    """Parameters and bytes of a planned model, as in "1,234 parameters, 4.9 kB in float32"."""
    tensors = composition.tensors().values()
    # Buffers that are saved have types of their own.
    dtype = str(composition.model.dtype).removeprefix("torch.")
    count = sum(parameter.numel() for parameter in composition.model.parameters())
    return f"composes a model of {count:,} parameters, {readable(sum(tensor.size for tensor in tensors))} in {dtype}"


def read_towers(parts: Parts) -> tuple[TowerParent | None, TowerParent | None]:
    """The encoders: their configurations are read, their weights are not."""
    vision = audio = None
    if parts.vision is not None:
        vision = vision_parent(
            parts.vision, pool_size=parts.vision_pool, revision=parts.vision_revision, **parts.access
        )
    if parts.audio is not None:
        audio = audio_parent(
            parts.audio,
            pool_size=parts.audio_pool,
            max_seconds=parts.audio_seconds,
            backbone_library=parts.audio_library,
            revision=parts.audio_revision,
            **parts.access,
        )
    return vision, audio


def build_processor(
    parts: Parts, text: ParentCheckpoint, vision: TowerParent | None, audio: TowerParent | None, notes: list[str]
) -> ChorusProcessor:
    """The processor of the planned model; what became of the parent's chat template goes into `notes`."""
    ids = media_token_ids(text) if vision is not None or audio is not None else {}
    # Stands for the configuration of a model that does not exist yet.
    future = SimpleNamespace(
        vision_config=vision and vision.config,
        audio_config=audio and audio.config,
        image_token_id=ids.get("image"),
        audio_token_id=ids.get("audio"),
    )
    return compose_processor(
        future,
        parent_tokenizer(text),
        parts.vision,
        vision_loading={"revision": vision and vision.revision, **parts.access},
        notes=notes,
    )


def read_experts(source: str | None) -> dict[str, Any]:
    """What `--experts` says: a YAML file with any of `EXPERT_OPTIONS`, or the name of a preset of banks.

    Raises:
        FileNotFoundError: a YAML file that is not there.
        ValueError: an unknown name, with the nearest one.
    """
    if source is None:
        return {}
    path = Path(source)
    # Anything without this suffix is the name of a preset; `compose` refuses an unknown one.
    if path.suffix not in (".yaml", ".yml"):
        return {"experts": source}
    if not path.is_file():
        raise FileNotFoundError(f"--experts: no file {source!r}")
    values = read_yaml(path)
    if not isinstance(values, Mapping):
        raise ValueError(f"{source}: expected names such as {', '.join(EXPERT_OPTIONS[:3])}, found {values!r:.60}")
    check_names(values, source)
    return dict(values)


def check_names(values: Mapping[str, Any], where: str) -> None:
    for name in values:
        if name not in EXPERT_OPTIONS:
            raise ValueError(f"{where}: unknown option {name!r}{nearest(name, EXPERT_OPTIONS)}")


def layer_numbers(words: str | None) -> list[int] | None:
    """`1,3,5` as numbers.

    Raises:
        ValueError: a word that is no number.
    """
    if words is None:
        return None
    parts = [word.strip() for word in words.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"layers are numbers such as 1,3,5, found {words!r}")
    return [int(part) for part in parts]
