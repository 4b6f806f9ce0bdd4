"""transformers' Trainer teaches a whole model; it grows a bank, is pruned, labels pictures, and is served."""

import pytest

from tests.journeys.journey import Content, Journey
from tests.journeys.strangers import COLOURS, picture, text

PICTURES: list[Content] = [[picture(f"{name}.webp"), text("which colour?")] for name in COLOURS]


def rows(journey: Journey) -> list[dict]:
    """The layout of ms-swift."""
    return [
        {
            "query": "<image>which colour?",
            "response": name,
            "images": [str(journey.folder / f"pictures/{name}.{kind}")],
        }
        for name in COLOURS
        for kind in ("png", "jpg")
    ]


@pytest.mark.slow
@pytest.mark.timeout(1800)  # some ten processes in a row, each of which imports transformers
def test_a_trained_model_grows_is_pruned_labels_and_is_served(journey: Journey) -> None:
    parts = {"text": "parents/text", "vision": "parents/vision", "num_experts": 3}
    journey.script("compose.py", **parts, out="model")
    journey.write_rows("rows.jsonl", rows(journey))
    taught = journey.script("stock_trainer.py", model="model", rows="rows.jsonl", out="taught", steps=60,
                            learning_rate=1e-2)  # fmt: skip
    assert taught["loss"] < 1.0
    questions: list[Content] = [*PICTURES, "yes or no?"]
    answers = journey.ask("taught", questions)
    assert answers[:-1] == list(COLOURS)

    before, after = journey.script("surgery.py", model="taught", operation="add_bank", out="grown")
    assert after > before
    assert journey.ask("grown", questions) == answers
    before, after = journey.script("surgery.py", model="grown", operation="prune", rows="rows.jsonl",
                                   shares={"legal": 0.5}, out="pruned")  # fmt: skip
    assert after < before
    assert journey.ask("pruned", questions) == answers

    journey.script("stock_trainer.py", model="pruned", rows="rows.jsonl", out="classifier", steps=60,
                   learning_rate=1e-2, labels=list(COLOURS))  # fmt: skip
    labelled = journey.script("label.py", model="classifier", pictures=[f"pictures/{name}.webp" for name in COLOURS])
    assert labelled == list(COLOURS)

    with journey.served("pruned") as address:
        assert journey.script("client.py", model="pruned", address=address, questions=PICTURES) == list(COLOURS)
