"""The demo's speech sets: speakers never cross from training to testing."""

import inspect

import numpy as np
import pytest

from chorus_moe.training.demo import speech_sets as demo_speech
from chorus_moe.training.demo.speech import OTHER_WORDS, TRAIN_VARIANTS, WORDS, SpeechClips, SynthesisSettings
from chorus_moe.training.demo.speech_sets import recorded_speech_sets, synthetic_speech_sets
from tests.training.demo.test_speech import write_recordings


def fake_voices(settings: SynthesisSettings, cache) -> SpeechClips:
    """Noise instead of speech, with the digits and voices that the settings ask for."""
    rng = np.random.default_rng(settings.seed)
    spoken = [utterance for utterance in settings.utterances() if utterance[0].endswith(settings.variants[0])]
    waveforms = [rng.uniform(-0.5, 0.5, 900).astype(np.float32) for _ in spoken]
    return SpeechClips(waveforms, np.array([digit for _, digit, *_ in spoken]), [voice for voice, *_ in spoken])


@pytest.fixture(autouse=True)
def noise_for_speech(monkeypatch):
    monkeypatch.setattr(demo_speech, "synthetic_digits", fake_voices)


def test_synthetic_test_voices_are_in_no_training_set(tmp_path):
    sets = synthetic_speech_sets(tmp_path, workers=0)
    assert not set(sets.test.speakers) & set(sets.train.speakers + sets.adaptation.speakers)
    assert not set(sets.adaptation.speakers) & set(sets.train.speakers)
    assert set(sets.adaptation_test.speakers) == set(sets.adaptation.speakers)


def test_new_voices_are_tested_on_other_readings():
    adaptation, test = demo_speech.NEW_VOICES.utterances(), demo_speech.NEW_VOICES_TEST.utterances()
    assert not set(adaptation) & set(test) and {voice for voice, *_ in adaptation} == {voice for voice, *_ in test}


def test_the_held_out_speaker_is_heard_only_in_adaptation_and_testing(tmp_path):
    write_recordings(tmp_path, ("ann", "bob", "cyd"), takes=3)
    sets = recorded_speech_sets(tmp_path, "bob", tmp_path / "cache", takes=2, copies=1, workers=0)
    assert "bob" not in sets.train.speakers and {"ann", "cyd"} < set(sets.train.speakers)
    assert set(sets.adaptation.speakers) == set(sets.test.speakers) == {"bob"}
    assert len(sets.test) == 10 and "bob held out" in sets.description
    # What known speakers are tested on are other takes of theirs.
    assert sets.known is not None and set(sets.known.speakers) == {"ann", "cyd"}
    assert np.bincount(sets.known.digits).tolist() == [2] * 10
    trained = {wave.tobytes() for wave in sets.train.waveforms}
    assert not any(wave.tobytes() in trained for wave in sets.known.waveforms)


def test_beside_synthetic_voices_three_quarters_of_the_clips_are_real():
    """Counted from the settings, for three speakers who say every digit fifty times."""
    readings = len(demo_speech.HELPING_VOICES.utterances()) + len(demo_speech.ACCENTED_VOICES.utterances())
    copies = inspect.signature(recorded_speech_sets).parameters["copies"].default
    real = 3 * 10 * 50 * (1 + copies)
    assert real / (real + readings) == pytest.approx(0.75, abs=0.02)


def test_other_words_are_said_by_synthetic_training_voices_only_and_are_no_digits(tmp_path):
    write_recordings(tmp_path, ("ann", "bob"), takes=3)
    words = recorded_speech_sets(tmp_path, "bob", tmp_path / "cache", takes=2, copies=1, workers=0).other_words
    assert words is not None and set(words.digits) == set(range(len(OTHER_WORDS)))
    assert {voice.split("+")[1] for voice in words.speakers} <= set(TRAIN_VARIANTS)
    sound_like_digits = {*WORDS, "to", "too", "for", "fore", "won", "ate"}
    assert not set(OTHER_WORDS) & sound_like_digits and len(set(OTHER_WORDS)) == len(OTHER_WORDS)


def test_the_synthetic_demo_has_no_other_words(tmp_path):
    assert synthetic_speech_sets(tmp_path, workers=0).other_words is None
