"""Saving over a folder that is good: it stays as it is until everything new has been written.

Unusual here:
- new files are written aside, below `_incomplete` in the folder itself, and take their places one by one once all are
  there. A folder beside it would lie on another disk where the folder is a mount point; uploads leave `_*` out;
- the writer of safetensors leaves a file to its owner alone; here weights can be read by whoever reads the rest.
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from chorus_moe.modeling.modeling_base import make_readable

INCOMPLETE = "_incomplete"
CARD = "README.md"
# Weights of a model or of an adapter: one file, shards, and their index.
WEIGHTS = re.compile(r"(model|adapter_model)(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


@contextmanager
def saved_whole(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """An empty folder to save into; after the block its files take the places of those in `folder`.

    An error or a kill within the block (a full disk, say) leaves what `folder` holds.
    """
    aside = begin_aside(folder, "save")
    try:
        yield aside
    except BaseException:
        drop_aside(aside)
        raise
    take_places(aside, folder)


def begin_aside(folder: str | os.PathLike[str], name: str) -> Path:
    """A new folder below `_incomplete`, with a copy of the card, which PEFT reads and extends; what an earlier save
    of this name left there is removed."""
    aside = Path(folder) / INCOMPLETE / name
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    if (Path(folder) / CARD).is_file():
        shutil.copyfile(Path(folder) / CARD, aside / CARD)
    return aside


def drop_aside(aside: Path) -> None:
    """Remove what was written aside, and `_incomplete` if nothing else is there."""
    shutil.rmtree(aside, ignore_errors=True)
    with suppress(OSError):
        aside.parent.rmdir()


def take_places(aside: Path, folder: str | os.PathLike[str]) -> None:
    """Move every file to its place in `folder`, and remove shards that the new weights do not have."""
    folder, new = Path(folder), files_below(aside)
    for path in new:
        make_readable(path)
        put_on_disk(path)
    kinds = {match[1] for path in new if (match := WEIGHTS.fullmatch(path.name))}
    names = {path.relative_to(aside) for path in new}
    # Old shards last: a kill in between leaves files too many, which an index does not name, and none too few.
    for path in new:
        target = folder / path.relative_to(aside)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
    for path in sorted(folder.iterdir()):
        match = WEIGHTS.fullmatch(path.name)
        if match and match[1] in kinds and path.relative_to(folder) not in names:
            path.unlink()
    drop_aside(aside)


def put_on_disk(path: Path) -> None:
    """Wait until a file is stored: after a power failure a name must not stand for an empty file."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def files_below(folder: Path) -> list[Path]:
    """All files, in the order of their names, weights before the configuration and the index that name them."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return sorted(found, key=lambda path: path.suffix != ".safetensors")


def held_model(folder: Path) -> list[str]:
    """Names of the files in a folder that make it a model or an adapter; none if it is neither."""
    marks = ("config.json", "adapter_config.json")
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path.name for path in found if path.name in marks or WEIGHTS.fullmatch(path.name))
