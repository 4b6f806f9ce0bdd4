"""Every head in one table: who registers, exports, freezes or lists heads reads it here."""

from typing import NamedTuple

from chorus_moe.modeling.modeling_base import ChorusPreTrainedModel
from chorus_moe.modeling.modeling_chorus import ChorusModel
from chorus_moe.modeling.modeling_generation import ChorusForConditionalGeneration
from chorus_moe.modeling.modeling_heads import ChorusForContrastive, ChorusForSequenceClassification


class Head(NamedTuple):
    """A model that can be saved as a whole.

    Args:
        kind: its class.
        auto_classes: names of transformers' Auto classes that load it.
        parts: what it has beside the inner model: modules and parameters, by name.
    """

    kind: type[ChorusPreTrainedModel]
    auto_classes: tuple[str, ...]
    parts: tuple[str, ...] = ()


HEADS: list[Head] = [
    Head(ChorusModel, ("AutoModel",)),
    # The any-to-any pipeline reads the first of these, image-text-to-text the second, text-generation the third.
    Head(
        ChorusForConditionalGeneration,
        ("AutoModelForMultimodalLM", "AutoModelForImageTextToText", "AutoModelForCausalLM"),
        ("lm_head",),
    ),
    Head(ChorusForSequenceClassification, ("AutoModelForSequenceClassification",), ("score", "exits")),
    # Shares `AutoModel` with the model without a head, as CLIP does in transformers: the architecture that the
    # configuration names decides.
    Head(ChorusForContrastive, ("AutoModel",), ("projections", "logit_scale", "logit_bias")),
]


def classes_of_auto_classes() -> dict[str, list[type[ChorusPreTrainedModel]]]:
    """Auto class -> the classes that it loads; the first where a configuration names none of them."""
    found: dict[str, list[type[ChorusPreTrainedModel]]] = {}
    for head in HEADS:
        for name in head.auto_classes:
            found.setdefault(name, []).append(head.kind)
    return found
