"""A checkpoint that somebody else trained, read tensor by tensor.

Unusual here:
- only safetensors files are opened, and no code of the checkpoint is ever run;
- a file is mapped for one tensor and let go with it, so a reader holds one tensor and not the parent;
- the first answer of the Hub pins the revision: all files come from the same commit.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import cached_files

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CURE = (
    "only safetensors files are read. Convert once, where you trust the files: "
    "`AutoModel.from_pretrained(folder).save_pretrained(new_folder)` writes them"
)


class ParentCheckpoint:
    """A local folder or a repository of the Hub with a configuration and safetensors files.

    Args:
        source: folder, or repository id.
        revision: branch, tag or commit of the repository; afterwards the commit that was found.
        token, cache_dir, local_files_only, subfolder: as in transformers' `from_pretrained`.

    Raises:
        OSError: nothing there, as transformers says it.
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
        self.loading: dict[str, Any] = {
            "revision": revision,
            "token": token,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
            "subfolder": subfolder,
        }
        self.config = self._read_config()
        self._files = self._find_tensors()

    def __str__(self) -> str:
        return self.source

    @property
    def revision(self) -> str | None:
        """The commit that the files come from; None for a folder."""
        return self.loading["revision"]

    @property
    def names(self) -> list[str]:
        return list(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def shape(self, name: str) -> tuple[int, ...]:
        with safe_open(self._path(name), framework="pt") as file:
            return tuple(file.get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Raises ValueError for a dtype that is no ordinary floating point number."""
        with safe_open(self._path(name), framework="pt") as file:
            kind = file.get_slice(name).get_dtype()
        if kind not in DTYPES:
            raise ValueError(f"{self}: tensor {name!r} is {kind}, expected one of {list(DTYPES)}")
        return DTYPES[kind]

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU. It may be mapped from its file: clone it before writing into it."""
        with safe_open(self._path(name), framework="pt") as file:
            return file.get_tensor(name)

    def file(self, name: str) -> str | None:
        """Path of another file of the checkpoint, such as `generation_config.json`; None where there is none."""
        return cached_file(self.source, name, _raise_exceptions_for_missing_entries=False, **self.loading)

    def _path(self, name: str) -> str:
        if name not in self._files:
            raise ValueError(f"{self}: no tensor {name!r} among the {len(self._files)} of the checkpoint")
        return self._files[name]

    def _read_config(self) -> PreTrainedConfig:
        values, _ = PreTrainedConfig.get_config_dict(self.source, **self.loading)
        if not values:
            raise OSError(f"{self}: no config.json")
        self.loading["revision"] = values.get("_commit_hash") or self.loading["revision"]
        model_type = values.get("model_type")
        if model_type not in CONFIG_MAPPING:
            raise ValueError(f"{self}: model_type={model_type!r} is not one that transformers knows without extra code")
        if values.get("quantization_config") is not None:
            raise ValueError(f"{self}: the checkpoint is quantised; compose from the original, unquantised weights")
        kept = {key: value for key, value in values.items() if key not in ("model_type", "auto_map")}
        return AutoConfig.for_model(model_type, **kept)

    def _find_tensors(self) -> dict[str, str]:
        """Name -> file of every tensor."""
        single = self.file(SAFE_WEIGHTS_NAME)
        if single is not None:
            return _tensors_within([single])
        index = self.file(SAFE_WEIGHTS_INDEX_NAME)
        if index is None:
            raise ValueError(f"{self}: found neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}, and {CURE}")
        listed = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(listed.values()))
        for name in shards:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(f"{self}: the index names the file {name!r}, and {CURE}")
        files = _tensors_within(cached_files(self.source, shards, **self.loading) or [])
        missing = sorted(set(listed) - set(files))
        if missing:
            raise ValueError(
                f"{self}: {len(missing)} of {len(listed)} tensors of the index are in no file, such as {missing[0]!r}"
            )
        return files


def _tensors_within(paths: Iterable[str]) -> dict[str, str]:
    files: dict[str, str] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                files |= dict.fromkeys(file.keys(), path)
        except SafetensorError as cause:
            raise ValueError(f"{path}: not a safetensors file ({cause}); {CURE}") from cause
    return files
