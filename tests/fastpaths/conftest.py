"""What tests of windows share with those of the model."""

from tests.modeling.conftest import small_blocks

__all__ = ["small_blocks"]
