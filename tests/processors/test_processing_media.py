"""The table of media, which ships without the model's: what other tables and signatures call the same things."""

import inspect
from dataclasses import FrozenInstanceError, fields

import pytest

from chorus_moe.modeling.configuration_modalities import ENCODED_MODALITIES
from chorus_moe.modeling.modeling_chorus import ChorusModel
from chorus_moe.processors import ChorusProcessor, MediaLimits
from chorus_moe.processors.processing_media import MEDIA
from tests.processors.conftest import RATE, picture, tone

SOURCES = {"url", "path", "base64", "bytes"}


def test_a_medium_is_called_alike_wherever_it_has_a_name(processor: ChorusProcessor) -> None:
    assert list(MEDIA) == list(ENCODED_MODALITIES)
    call = inspect.signature(ChorusProcessor.__call__).parameters
    build = inspect.signature(ChorusProcessor.__init__).parameters
    forward = inspect.signature(ChorusModel.forward).parameters
    limits = {field.name for field in fields(MediaLimits)}
    for name, medium in MEDIA.items():
        assert medium.token == build[f"{name}_token"].default == getattr(processor, f"{name}_token")
        assert medium.column in call and medium.limit in limits
        assert set(medium.settings) < set(build) and set(medium.inputs) < set(forward)
        # Where a part holds the thing itself comes first, so that an error names that of several.
        assert medium.keys[0] == name and set(medium.keys) >= SOURCES
        with pytest.raises(FrozenInstanceError):
            medium.token = "<other>"  # type: ignore[misc]


def test_the_inputs_of_a_medium_are_what_the_processor_makes_of_it(processor: ChorusProcessor) -> None:
    made = {"image": processor(images=[picture()]), "audio": processor(audio=tone(0.1), sampling_rate=RATE)}
    assert {name: tuple(batch) for name, batch in made.items()} == {n: medium.inputs for n, medium in MEDIA.items()}


def test_what_errors_call_several_and_what_alone_an_array_may_be() -> None:
    assert {name: medium.plural for name, medium in MEDIA.items()} == {"image": "images", "audio": "clips"}
    assert set(MEDIA["audio"].keys) - set(MEDIA["image"].keys) == {"audio", "array"}
