"""Code exported without the package says what it lacks; all that is saved is opened without it."""

import pytest
import torch

from chorus_moe import ChorusConfig, ChorusForConditionalGeneration, ChorusVisionConfig
from chorus_moe.modeling.configuration_services import SERVICES
from tests.conftest import tiny_config


@pytest.fixture
def without_services(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(SERVICES):
        monkeypatch.delitem(SERVICES, name)


def test_a_new_vision_configuration_wants_the_package(without_services: None) -> None:
    with pytest.raises(ImportError, match="without hidden_size and num_tokens takes the whole package"):
        ChorusConfig(vision_config={"architecture": "test_efficientnet", "image_size": 32}, image_token_id=3)


def test_counting_wants_the_package_and_the_rest_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ChorusForConditionalGeneration(tiny_config()).eval()
    ids = torch.arange(5, 12)[None]
    expected = model(input_ids=ids).logits
    for name in list(SERVICES):
        monkeypatch.delitem(SERVICES, name)
    assert torch.equal(model(input_ids=ids).logits, expected)
    with pytest.raises(ImportError, match=r"output_compute=True takes the whole package.*import chorus_moe"):
        model(input_ids=ids, output_compute=True)


def test_a_saved_vision_configuration_is_opened_without_it(without_services: None) -> None:
    saved = {"hidden_size": 32, "layout": "NLC", "num_prefix_tokens": 1, "num_tokens": 4, "grid_size": [2, 2]}
    config = ChorusVisionConfig(architecture="vit_tiny_patch16_224", image_size=32, **saved)
    # `to_diff_dict` is what is written to config.json.
    assert ChorusVisionConfig(**config.to_diff_dict()).to_dict() == config.to_dict()
