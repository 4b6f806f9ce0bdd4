"""A pretrained checkpoint, read tensor by tensor.

Unusual here:
- only safetensors files are opened, and no code of the checkpoint is ever run;
- headers are read once; each tensor is mapped from its own part of the file and freed when it is dropped, so a reader
  holds one tensor and never the whole parent;
- a revision is turned into a commit once, and all files come from that commit.
"""

import json
import math
import os
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import cached_files, resolve_revision

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CURE = (
    "only safetensors files are read. Convert once, where you trust the files: "
    "`AutoModel.from_pretrained(folder).save_pretrained(new_folder)` writes them"
)


class StoredTensor(NamedTuple):
    """Where a tensor lies: `start` is its first byte in the file."""

    path: str
    kind: str
    shape: tuple[int, ...]
    start: int


class ParentCheckpoint:
    """A local folder or a repository of the Hub with a configuration and safetensors files.

    Args:
        source: folder, or repository id.
        revision: branch, tag or commit of the repository; afterwards the commit that was found.
        token, cache_dir, local_files_only, subfolder: as in transformers' `from_pretrained`.

    Raises:
        OSError: nothing there: no such folder, or what transformers says of a repository.
        ValueError: a model type that transformers does not know, a quantised checkpoint, or files that are not
            safetensors or do not hold what their index says.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        subfolder: str = "",
    ):
        self.source = os.fspath(source)
        # A misspelt path would otherwise be asked for on the Hub and reported as a repository that does not exist.
        # A name of one part is that of a model older than the owners of repositories, of no family that is read here.
        is_name = "/" in self.source and not self.source.startswith((os.sep, ".", "~"))
        if not is_name and not os.path.isdir(self.source):
            raise FileNotFoundError(f"{self.source}: no such folder (a repository of the Hub is named OWNER/NAME)")
        access: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        pinned = resolve_revision(self.source, revision, **access)
        # Resolved once: a branch that moves between two downloads would mix files of two commits.
        commit = getattr(pinned, "resolved", pinned)
        self.loading: dict[str, Any] = {**access, "revision": commit, "subfolder": subfolder}
        self.config = self._read_config()
        self._tensors = self._find_tensors()

    def __str__(self) -> str:
        return self.source

    @property
    def revision(self) -> str | None:
        """The commit that the files come from; None for a folder."""
        return self.loading["revision"]

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer beside the weights, read once; raises as transformers does where there is none."""
        return AutoTokenizer.from_pretrained(self.source, **self.loading)

    @property
    def names(self) -> list[str]:
        return list(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Raises ValueError for a dtype that is no ordinary floating point number."""
        kind = self._stored(name).kind
        if kind not in DTYPES:
            raise ValueError(f"{self}: tensor {name!r} is {kind}, expected one of {list(DTYPES)}")
        return DTYPES[kind]

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU, mapped from its file: writing into it changes the tensor, not the file.

        Raises:
            ValueError: no such tensor, or a dtype that is no ordinary floating point number.
        """
        stored, dtype = self._stored(name), self.dtype(name)
        size = math.prod(stored.shape) * dtype.itemsize
        # An empty range cannot be mapped.
        if size == 0:
            return torch.empty(stored.shape, dtype=dtype)
        # Copy on write: whoever changes the tensor does not change the file. `safe_open` would keep the whole file
        # mapped while any tensor lives.
        mapped = np.memmap(stored.path, dtype=np.uint8, mode="c", offset=stored.start, shape=(size,))
        return torch.from_numpy(mapped).view(dtype).view(stored.shape)

    def file(self, name: str) -> str | None:
        """Path of another file of the checkpoint, such as `generation_config.json`; None where there is none."""
        return cached_file(self.source, name, _raise_exceptions_for_missing_entries=False, **self.loading)

    def _stored(self, name: str) -> StoredTensor:
        if name not in self._tensors:
            raise ValueError(f"{self}: no tensor {name!r} among the {len(self._tensors)} of the checkpoint")
        return self._tensors[name]

    def _read_config(self) -> PreTrainedConfig:
        values, _ = PreTrainedConfig.get_config_dict(self.source, **self.loading)
        if not values:
            raise OSError(f"{self}: no config.json")
        model_type = values.get("model_type")
        # Checked by hand: `AutoConfig.from_pretrained` would offer to run the code of the repository.
        if model_type not in CONFIG_MAPPING:
            raise ValueError(f"{self}: model_type={model_type!r} is not one that transformers knows without extra code")
        if values.get("quantization_config") is not None:
            raise ValueError(f"{self}: the checkpoint is quantised; compose from the original, unquantised weights")
        # `auto_map` points to remote code, which is never run.
        kept = {key: value for key, value in values.items() if key not in ("model_type", "auto_map")}
        return AutoConfig.for_model(model_type, **kept)

    def _find_tensors(self) -> dict[str, StoredTensor]:
        single = self.file(SAFE_WEIGHTS_NAME)
        if single is not None:
            return _tensors_within([single])
        index = self.file(SAFE_WEIGHTS_INDEX_NAME)
        if index is None:
            raise ValueError(f"{self}: found neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}, and {CURE}")
        listed = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(listed.values()))
        for name in shards:
            # The index is other people's: a name such as `../x` would leave the folder, and `.bin` files are pickles.
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(f"{self}: the index names the file {name!r}, and {CURE}")
        tensors = _tensors_within(cached_files(self.source, shards, **self.loading) or [])
        missing = sorted(set(listed) - set(tensors))
        if missing:
            raise ValueError(
                f"{self}: {len(missing)} of {len(listed)} tensors of the index are in no file, such as {missing[0]!r}"
            )
        return tensors


def _tensors_within(paths: Iterable[str]) -> dict[str, StoredTensor]:
    """Reads the headers. The library checks them first: sizes and offsets then agree with the file."""
    tensors: dict[str, StoredTensor] = {}
    for path in paths:
        try:
            # Opened only so that the library checks the header; the offsets below are then safe to use.
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as cause:
            raise ValueError(f"{path}: not a safetensors file ({cause}); {CURE}") from cause
        with open(path, "rb") as file:
            # The format: 8 bytes with the header's length, the header as JSON, then the data that offsets count from.
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start = 8 + length + entry["data_offsets"][0]
            tensors[name] = StoredTensor(path, entry["dtype"], tuple(entry["shape"]), start)
    return tensors
