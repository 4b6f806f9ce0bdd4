"""The demo's questions: right answers, balanced deals, media that match their places in the messages."""

import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from chorus_moe.training.demo.augment import PictureAugment
from chorus_moe.training.demo.data import (
    BASE_SKILLS,
    NEW_SKILL,
    SKILLS,
    DigitPictures,
    DigitQuestions,
    best_blind_accuracy,
    corpus,
    expand,
    handwritten_digits,
    withhold,
)
from chorus_moe.training.demo.speech import SpeechClips

PICTURES = DigitPictures([Image.new("L", (8, 8), 20 * digit) for digit in range(10)], np.arange(10))
CLIPS = SpeechClips([np.full(100, digit / 10, np.float32) for digit in range(10)], np.arange(10), ["one"] * 10)


def words(texts) -> set[str]:
    return {word for text in texts for word in re.findall(r"[a-z]+", text.lower())}


def kinds(sample) -> list[str]:
    return [part["type"] for message in sample["messages"] for part in message["content"]]


@pytest.mark.parametrize("name", SKILLS)
def test_a_skill_has_phrasings_to_train_and_to_test_and_no_new_words_in_the_test(name):
    skill = SKILLS[name]
    assert len(set(skill.questions)) >= 16 and len(set(skill.held_out_questions)) >= 2
    assert not set(skill.questions) & set(skill.held_out_questions)
    assert words(skill.held_out_questions) <= words(
        text for other in SKILLS.values() if other.name in BASE_SKILLS + (name,) for text in other.questions
    )


def test_a_template_stands_for_every_choice_in_it():
    assert expand("[Add|Sum] the [two |]digits.", "Add.") == (
        "Add the two digits.",
        "Add the digits.",
        "Sum the two digits.",
        "Sum the digits.",
        "Add.",
    )


def test_no_phrasing_belongs_to_two_skills():
    texts = [text for skill in SKILLS.values() for text in skill.questions + skill.held_out_questions]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize(
    ("name", "written", "spoken", "answer"),
    [
        ("written", 3, 7, "3"),
        ("spoken", 3, 7, "7"),
        ("sum", 9, 9, "18"),
        ("larger", 3, 7, "spoken"),
        ("larger", 8, 7, "written"),
        ("larger", 7, 7, "same"),
        ("same", 7, 7, "yes"),
        ("same", 7, 1, "no"),
        ("smaller", 3, 7, "written"),
        ("smaller", 8, 7, "spoken"),
        ("smaller", 7, 7, "same"),
    ],
)
def test_answers(name, written, spoken, answer):
    assert SKILLS[name].answer(written, spoken) == answer


def test_samples_repeat_and_their_media_match_digits_and_places():
    dataset = DigitQuestions(PICTURES, CLIPS, BASE_SKILLS, 400, seed=3, picture_augment=PictureAugment())
    for index in range(400):
        sample, again = dataset[index], dataset[index]
        assert sample["messages"] == again["messages"]
        assert kinds(sample).count("image") == len(sample["images"])
        assert kinds(sample).count("audio") == len(sample["audio"])
        assert set(SKILLS[sample["skill"]].needs) <= set(kinds(sample))
        if sample["audio"]:
            assert sample["audio"][0]["array"][0] == pytest.approx(sample["spoken"] / 10)
        if sample["images"] and sample["audio"]:
            assert sample["answer"] == SKILLS[sample["skill"]].answer(sample["written"], sample["spoken"])
        assert sample["messages"][-1] == {"role": "assistant", "content": [{"type": "text", "text": sample["answer"]}]}


def test_a_picture_shows_the_digit_it_is_drawn_for():
    dataset = DigitQuestions(PICTURES, CLIPS, ["written"], 50)
    for index in range(50):
        sample = dataset[index]
        assert sample["images"][0].getpixel((0, 0)) == 20 * int(sample["answer"])


def test_media_and_text_come_in_several_orders():
    dataset = DigitQuestions(PICTURES, CLIPS, ["sum"], 200)
    assert len({tuple(kinds(dataset[index])[:3]) for index in range(200)}) == 4


def test_skills_in_a_list_take_turns_and_in_a_mapping_follow_their_weights():
    in_turn = DigitQuestions(PICTURES, CLIPS, BASE_SKILLS, 50)
    assert Counter(in_turn[index]["skill"] for index in range(50)) == dict.fromkeys(BASE_SKILLS, 10)
    weighted = DigitQuestions(PICTURES, CLIPS, {"sum": 3, "smaller": 1}, 400)
    assert 260 < Counter(weighted[index]["skill"] for index in range(400))["sum"] < 340


def test_held_out_phrasings_are_asked_only_on_request():
    for held_out in (False, True):
        dataset = DigitQuestions(PICTURES, CLIPS, ["same"], 200, held_out_questions=held_out)
        asked = {part["text"] for i in range(200) for part in dataset[i]["messages"][0]["content"] if "text" in part}
        expected = SKILLS["same"].held_out_questions if held_out else SKILLS["same"].questions
        assert asked == set(expected)


def test_deals_are_probabilities_and_yes_and_no_are_even():
    for skill in SKILLS.values():
        assert skill.joint.sum() == pytest.approx(1) and (skill.joint >= 0).all()
    assert np.trace(SKILLS["same"].joint) == pytest.approx(0.5)
    assert np.trace(SKILLS["larger"].joint) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("name", "bound"),
    [("written", 0.1), ("spoken", 0.1), ("sum", 0.1), ("larger", 0.46), ("same", 0.5), ("smaller", 0.46)],
)
def test_one_medium_alone_says_little(name, bound):
    for medium in SKILLS[name].needs:
        assert best_blind_accuracy(name, medium) <= bound + 1e-9
    assert best_blind_accuracy("written", "audio") == 1


def test_withholding_removes_the_medium_and_its_place_and_leaves_the_original():
    sample = DigitQuestions(PICTURES, CLIPS, ["sum"], 1)[0]
    silent = withhold(sample, "audio")
    assert silent["audio"] == [] and "audio" not in kinds(silent) and "image" in kinds(silent)
    assert len(sample["audio"]) == 1 and "audio" in kinds(sample)
    with pytest.raises(ValueError, match="video"):
        withhold(sample, "video")


def test_unknown_skills_missing_digits_and_indices_beyond_the_end_are_errors():
    with pytest.raises(ValueError, match="product"):
        DigitQuestions(PICTURES, CLIPS, ["product"], 1)
    with pytest.raises(ValueError, match="no digit 9"):
        DigitQuestions(PICTURES, CLIPS.select(range(9)), ["sum"], 1)
    with pytest.raises(IndexError, match="5 of 5"):
        DigitQuestions(PICTURES, CLIPS, ["sum"], 5)[5]


def test_the_corpus_holds_every_question_and_answer():
    texts = set(corpus())
    for name in (*BASE_SKILLS, NEW_SKILL):
        assert set(SKILLS[name].questions) | set(SKILLS[name].held_out_questions) <= texts
    assert {"0", "18", "yes", "no", "same", "written"} <= texts


def test_handwriting_is_split_in_writer_order():
    pytest.importorskip("sklearn")
    train, test = handwritten_digits(size=16)
    assert len(train) + len(test) == 1797 and len(test) == 449
    assert train.images[0].size == (16, 16) and train.images[0].mode == "L"
    assert min(np.bincount(test.digits)) > 30
