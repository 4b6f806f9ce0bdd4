"""The table of heads: what it says of each class is so."""

import inspect

import pytest
import torch
import transformers

from chorus_moe import ChorusForContrastive, ChorusForSequenceClassification, ChorusModel
from chorus_moe.modeling.modeling_generation import ChorusForConditionalGeneration
from chorus_moe.surgery.heads import HEADS, Head, classes_of_auto_classes
from tests.conftest import tiny_config


def test_auto_classes_load_the_class_that_stands_first() -> None:
    generation = "AutoModelForMultimodalLM", "AutoModelForImageTextToText", "AutoModelForCausalLM"
    assert classes_of_auto_classes() == {
        "AutoModel": [ChorusModel, ChorusForContrastive],
        **dict.fromkeys(generation, [ChorusForConditionalGeneration]),
        "AutoModelForSequenceClassification": [ChorusForSequenceClassification],
    }
    for name, kinds in classes_of_auto_classes().items():
        assert getattr(transformers, name)._model_mapping[type(tiny_config())] is not None
        assert kinds[0] in {head.kind for head in HEADS}


@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.kind.__name__)
def test_a_heads_own_parts_are_those_of_the_table(head: Head) -> None:
    config = tiny_config(exit_layers=[1]) if "exits" in head.parts else tiny_config()
    # A weight and a bias of the contrastive scale belong to different losses.
    found: set[str] = set()
    for loss in ("infonce", "sigmoid"):
        config.contrastive_loss = loss
        with torch.device("meta"):
            model = head.kind(config)
        names = {name.partition(".")[0] for name, _ in model.named_parameters()}
        found |= names - ({"model"} if head.kind is not ChorusModel else names)
    assert found == set(head.parts)
    assert inspect.isclass(head.kind) and Head(head.kind, ()).parts == ()
