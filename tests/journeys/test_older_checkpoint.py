"""A model that `from_pretrained_parts` made, before there was `compose`, answers as it did then."""

import json
import shutil
from pathlib import Path

import pytest

from tests.journeys.journey import Journey

OLDER = Path(__file__).with_name("older")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_older_checkpoint_answers_as_it_did(journey: Journey) -> None:
    """`answers.json` was written by the code that saved the folder, asked one question at a time."""
    shutil.copytree(OLDER, journey.folder / "older")
    then = json.loads((OLDER / "answers.json").read_text(encoding="utf-8"))
    assert len(set(then["answers"])) == len(then["questions"])
    assert journey.ask("older", then["questions"], save_again="again") == then["answers"]
    assert journey.ask("again", then["questions"]) == then["answers"]
