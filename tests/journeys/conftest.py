"""A journey in a folder of its own, beside what strangers made."""

from pathlib import Path

import pytest

from tests.journeys.journey import Journey
from tests.journeys.strangers import save_parents, write_pictures, write_sounds


@pytest.fixture
def journey(tmp_path: Path) -> Journey:
    """A folder with `parents/`, `pictures/` and `sounds/`."""
    save_parents(tmp_path / "parents")
    write_pictures(tmp_path / "pictures")
    write_sounds(tmp_path / "sounds")
    return Journey(tmp_path)
