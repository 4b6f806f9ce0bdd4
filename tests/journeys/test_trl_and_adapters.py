"""TRL teaches a composed model answers, then preferences; its adapters are switched and merged."""

import pytest

from tests.journeys.journey import Content, Journey
from tests.journeys.strangers import COLOURS, picture, text

PICTURES: list[Content] = [[picture(f"{name}.webp"), text("which colour?")] for name in COLOURS]


def rows_for_sft(journey: Journey) -> list[dict]:
    """TRL's layout for pictures: no marker, the list of pictures beside the turns."""
    return [
        {
            "images": [str(journey.folder / f"pictures/{name}.{kind}")],
            "prompt": [{"role": "user", "content": "which colour?"}],
            "completion": [{"role": "assistant", "content": name}],
        }
        for name in COLOURS
        for kind in ("png", "jpg")
    ]


def rows_for_dpo() -> list[dict]:
    turn = {"role": "user", "content": "yes or no?"}
    yes, no = ([{"role": "assistant", "content": answer}] for answer in ("yes", "no"))
    return [{"prompt": [turn], "chosen": yes, "rejected": no}] * 8


@pytest.mark.slow
@pytest.mark.timeout(1800)  # some ten processes in a row, each of which imports torch
def test_answers_then_preferences(journey: Journey) -> None:
    parents = {"text": "parents/text", "vision": "parents/vision", "num_experts": 2}
    composed = journey.script("compose.py", **parents, out="model")
    assert composed["parameters"] == composed["reported"]
    before = journey.ask("model", [*PICTURES, "yes or no?"])

    journey.write_rows("sft.jsonl", rows_for_sft(journey))
    journey.write_rows("dpo.jsonl", rows_for_dpo())
    training = {"model": "model", "learning_rate": 2e-2}
    taught = journey.script(
        "trl_trains.py", trainer="SFT", rows="sft.jsonl", out="sft", steps=60, pictures=True, **training
    )
    assert taught["loss"] < 1.0
    preferred = journey.script(
        "trl_trains.py", trainer="DPO", rows="dpo.jsonl", out="dpo", steps=10, pictures=False, **training
    )
    assert preferred["rewards/margins"] > 0

    switched = journey.script(
        "switch_adapters.py", model="model", adapters=["sft", "dpo"], questions=[*PICTURES, "yes or no?"]
    )
    assert switched["sft"][:-1] == list(COLOURS)
    assert switched["none"] == before
    assert switched["first again"] == switched["sft"]

    journey.script("merge.py", model="model", adapter="sft", out="merged")
    assert journey.ask("merged", PICTURES) == list(COLOURS)
