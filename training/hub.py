"""Folders and repositories that load where the package is not installed, code included.

Unusual here: transformers records one Auto class per class and for good; here the registration lasts for one save, and
`auto_map` names every Auto class of the model.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from huggingface_hub import HfApi
from transformers.dynamic_module_utils import get_relative_import_files

from chorus_moe.modeling.configuration_chorus import ChorusConfig
from chorus_moe.processors.processing_chorus import ChorusProcessor
from chorus_moe.surgery.heads import HEADS, classes_of_auto_classes
from chorus_moe.training.loading import ModelOrAdapter, base_model
from chorus_moe.training.model_card import run_card
from chorus_moe.training.saving import CARD, saved_whole

PROCESSOR_PARTS = {"image_processor": "AutoImageProcessor", "feature_extractor": "AutoFeatureExtractor"}


def export_for_hub(
    model: ModelOrAdapter, processor: ChorusProcessor | None, folder: str | os.PathLike[str], card: str | None = None
) -> Path:
    """Save model, processor and their code; the folder loads with `trust_remote_code` where the package is missing.

    Where the package is installed and imported, its own classes are used and no remote code runs.

    Args:
        model: any Chorus model without an adapter; merge an adapter first (`merge_and_unload`).
        processor: a ChorusProcessor, or None.
        folder: what it holds stays as it is until the export is written.
        card: text of the README; None leaves the folder's.

    Raises:
        ValueError: a model with an adapter.
    """
    # The saved code loads a whole model; PEFT has its own way to load an adapter.
    if base_model(model) is not model:
        raise ValueError("a model with an adapter carries no code of its own: export model.merge_and_unload()")
    with saved_whole(folder) as aside:
        _write_export(model, processor, aside)
        if card is not None:
            (aside / CARD).write_text(card, encoding="utf-8")
    return Path(folder)


def _write_export(model: ModelOrAdapter, processor: ChorusProcessor | None, folder: Path) -> None:
    # First: a model that is saved names only code that is there.
    copy_code(folder, processor)
    models = {"AutoConfig": ChorusConfig, **auto_map_classes(type(model))}
    with attribute_set(model.config, "auto_map", {auto: class_reference(kind) for auto, kind in models.items()}):
        model.save_pretrained(folder)
    if processor is not None:
        # Each part is loaded by its own Auto class, so each file names its own class.
        parts = {"AutoProcessor": processor} | {
            auto: getattr(processor, name) for name, auto in PROCESSOR_PARTS.items()
        }
        with ExitStack() as stack:
            for auto, part in parts.items():
                stack.enter_context(attribute_set(part, "auto_map", {auto: class_reference(type(part))}))
            processor.save_pretrained(folder)


def auto_map_classes(kind: type) -> dict[str, type]:
    """Auto class -> the class that it loads from an export of `kind`: that one itself wherever it can."""
    return {auto: kind if kind in kinds else kinds[0] for auto, kinds in classes_of_auto_classes().items()}


def class_reference(kind: type) -> str:
    """`file.Class`, as `auto_map` wants it."""
    # The code is copied into one flat folder, so packages are no part of the name.
    return f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}"


def copy_code(folder: Path, processor: ChorusProcessor | None = None) -> list[Path]:
    """Copy the files of all classes, and every sibling they import, into a flat folder."""
    parts = [] if processor is None else [type(processor), *(type(getattr(processor, p)) for p in PROCESSOR_PARTS)]
    entries = {
        str(sys.modules[kind.__module__].__file__) for kind in [ChorusConfig, *(head.kind for head in HEADS), *parts]
    }
    needed = entries | {str(path) for entry in entries for path in get_relative_import_files(entry)}
    return [Path(shutil.copyfile(path, folder / Path(path).name)) for path in sorted(needed)]


@contextmanager
def attribute_set(thing: object, name: str, value: object) -> Iterator[None]:
    """Set an attribute for the duration of the block."""
    # Of the object itself: what its class has must not become its own, which would be saved with it.
    own = vars(thing)
    missing = object()
    before = own.get(name, missing)
    setattr(thing, name, value)
    try:
        yield
    finally:
        if before is missing:
            delattr(thing, name)
        else:
            setattr(thing, name, before)


def push_to_hub(
    model: ModelOrAdapter,
    processor: ChorusProcessor | None,
    repo_id: str,
    *,
    card: str | None = None,
    files: Sequence[Path] = (),
    private: bool | None = None,
    token: str | None = None,
    include_code: bool = True,
    commit_message: str = "Upload Chorus model",
) -> str:
    """Upload a model or adapter, its processor and a card; returns the address of the commit.

    Args:
        card: text of the README; None writes one unless the repository has one.
        files: further files to upload beside the card, such as its pictures.
        include_code: also upload the code of a full model.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        # An adapter needs no code: its base model brings it.
        if include_code and base_model(model) is model:
            export_for_hub(model, processor, folder)
        else:
            model.save_pretrained(folder)
            if processor is not None:
                processor.save_pretrained(folder)
        if card is not None or not api.file_exists(repo_id, "README.md"):
            (folder / "README.md").write_text(card or run_card(model), encoding="utf-8")
        else:
            # PEFT writes a card of its own; uploaded, it would replace the repository's.
            (folder / "README.md").unlink(missing_ok=True)
        for file in files:
            shutil.copyfile(file, folder / file.name)
        return api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message).commit_url
