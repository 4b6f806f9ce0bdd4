"""What tests of windows share with those of the model, and weights read in parts in tiny models."""

import pytest

from chorus_moe.fastpaths import quantized_weights
from tests.modeling.conftest import small_blocks

__all__ = ["small_blocks"]


@pytest.fixture(autouse=True)
def streamed_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a tiny model too some weights are read in several parts, as those of a real one are, and others in one."""
    monkeypatch.setattr(quantized_weights, "FEWEST_STREAMED", 1_000)
