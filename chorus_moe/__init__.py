"""Chorus: build, fine-tune and ship your own multimodal mixture-of-experts model.

Importing the package registers its classes with transformers' Auto classes, which takes some seconds. Only the program
`chorus-moe` waits until a command needs them, so that it answers `--help` at once.
"""

import sys
from importlib import import_module
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING or PurePath(*sys.argv[:1]).stem != "chorus-moe":
    from chorus_moe.auto_classes import *  # noqa: F403
    from chorus_moe.auto_classes import __all__ as __all__
else:

    def __getattr__(name: str) -> Any:
        if name.startswith("__") and name != "__all__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module("chorus_moe.auto_classes"), name)
