"""Compose three parents, ask, save again, use in pipelines, examine, export, load where the package is missing."""

import pytest

from tests.journeys.journey import Content, Journey
from tests.journeys.strangers import picture, sound, text

TEXTS = ["what is it?", "three four five, yes or no?", "it"]
# The same picture and the same sound in two kinds of file without loss stand side by side.
MEDIA: list[Content] = [
    [picture("red.png"), text("what is it?")],
    [picture("red.webp"), text("what is it?")],
    [sound("low.wav"), text("what is it?")],
    [sound("low.flac"), text("what is it?")],
    [text("three"), picture("blue.jpg"), text("or"), sound("high.mp3"), text("?")],
    [sound("high.ogg"), picture("green.png"), sound("low.m4a"), text("yes or no?")],
]
QUESTIONS: list[Content] = [*TEXTS, *MEDIA]


@pytest.mark.slow
@pytest.mark.timeout(1800)  # some ten processes in a row, each of which imports torch
def test_from_parents_to_the_hub(journey: Journey) -> None:
    of_parent = journey.script("ask_parent.py", model="parents/text", questions=TEXTS)
    assert len(set(of_parent)) == len(TEXTS)

    parts = ["--text", "parents/text", "--vision", "parents/vision", "--audio", "parents/audio"]
    journey.command("compose", *parts, "--num-experts", 4, "--out", "model")
    answers = journey.ask("model", QUESTIONS, save_again="again")
    assert answers[:3] == of_parent
    assert answers[3] == answers[4] != answers[5] == answers[6]

    assert journey.ask("again", QUESTIONS) == answers

    # Pictures, then sounds: transformers puts only samples with the same inputs, one clip each, into one batch.
    tasks = [("any-to-any", 2, MEDIA[:4]), ("image-text-to-text", 1, MEDIA[4:]), ("text-generation", 3, TEXTS)]
    in_pipelines = [answers[3:7], answers[7:], answers[:3]]
    assert journey.script("pipelines.py", model="again", tasks=tasks, without_package=False) == in_pipelines

    journey.command("doctor", "again")

    journey.command("export", "again", "exported")
    assert journey.ask("exported", QUESTIONS, without_package=True, save_again="abroad") == answers
    found = journey.script_without_the_package("pipelines.py", model="exported", tasks=tasks, without_package=True)
    assert found == in_pipelines
    assert journey.ask("abroad", QUESTIONS) == answers
