"""Exits: what leaves, what it gets, and that nothing else changes."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from chorus_moe import ChorusForSequenceClassification
from tests.conftest import tiny_batch, tiny_config
from tests.modeling.test_modeling_heads import ATOL

EXITS = [1, 2, 3]


def classifier(thresholds: list[float] | None = None, **text: Any) -> ChorusForSequenceClassification:
    torch.manual_seed(0)
    settings = {"num_hidden_layers": 4, "exit_layers": EXITS, "exit_loss_coef": 1.0} | text
    config = tiny_config(**settings)
    config.num_labels, config.exit_thresholds = 5, thresholds
    return ChorusForSequenceClassification(config).eval()


def inputs(model: Any) -> dict[str, Tensor]:
    return {name: value for name, value in tiny_batch(model.config).items() if name != "labels"}


@torch.no_grad()
def exit_logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """`(exits and head, B, labels)`."""
    outputs = model(**batch, output_exit_logits=True)
    return torch.stack([*outputs.exit_logits, outputs.logits])


def let_one_leave(model: Any, batch: dict[str, Tensor]) -> None:
    """Thresholds by which one sample leaves at the first exit, at least one at the second, and the rest stays."""
    sure = exit_logits(model, batch).softmax(dim=-1).amax(dim=-1)
    first = sure[0].argmax()
    rest = sure[1][torch.arange(3) != first].sort().values
    model.config.exit_thresholds = [
        (sure[0].sort().values[-2:].mean().item()),
        rest.mean().item(),
        1.0,
    ]


@pytest.mark.parametrize("is_causal", [True, False])
def test_without_thresholds_the_logits_are_those_of_a_model_without_exits(is_causal: bool):
    model = classifier(is_causal=is_causal)
    plain = classifier(is_causal=is_causal, exit_layers=None, exit_loss_coef=0.0)
    plain.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        assert torch.equal(model(**inputs(model)).logits, plain(**inputs(model)).logits)


WINDOWS = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 6, "num_global_tokens": 2}


@pytest.mark.parametrize("text", [{"is_causal": True}, {"is_causal": False}, WINDOWS | {"is_causal": False}])
def test_a_sample_that_leaves_gets_the_logits_of_its_exit(text: dict[str, Any]):
    model = classifier(**text)
    batch = inputs(model)
    expected = exit_logits(model, batch)
    let_one_leave(model, batch)
    with torch.no_grad():
        outputs = model(**batch)
    assert sorted(outputs.left_after.tolist()) == [1, 2, 4]
    for row, layers in enumerate(outputs.left_after.tolist()):
        # Samples that others left behind are summed in another order; the first exit has seen the whole batch.
        atol = 0 if layers == 1 else ATOL
        torch.testing.assert_close(outputs.logits[row], expected[layers - 1, row], rtol=0, atol=atol)


def test_a_sample_leaves_alone_where_it_leaves_in_a_batch():
    model = classifier()
    batch = inputs(model)
    let_one_leave(model, batch)
    media = {"pixel_values": [[0], [], [1]], "input_features": [[], [0], [1]]}
    media["input_features_mask"] = media["input_features"]
    with torch.no_grad():
        together = model(**batch)
        for row in range(3):
            alone = {
                name: value[media[name][row]] if name in media else value[row : row + 1]
                for name, value in batch.items()
            }
            found = model(**{name: value for name, value in alone.items() if len(value)})
            assert found.left_after.item() == together.left_after[row]
            torch.testing.assert_close(found.logits[0], together.logits[row], rtol=0, atol=ATOL)


def test_padding_on_either_side_moves_nothing():
    model = classifier([0.0, 1.0, 1.0])
    ids, fill = torch.randint(5, 128, (1, 8)), torch.zeros(1, 4, dtype=torch.long)
    mask = torch.ones_like(ids)
    with torch.no_grad():
        for thresholds in ([0.0, 1.0, 1.0], [1.0, 0.0, 1.0]):
            model.config.exit_thresholds = thresholds
            expected = model(input_ids=ids).logits
            for order in (lambda a, b: (a, b), lambda a, b: (b, a)):
                padded = torch.cat(order(fill, ids), 1)
                found = model(input_ids=padded, attention_mask=torch.cat(order(fill, mask), 1)).logits
                torch.testing.assert_close(found, expected, rtol=0, atol=ATOL)


def test_layers_behind_an_exit_see_only_those_who_stayed():
    model = classifier()
    batch = inputs(model)
    let_one_leave(model, batch)
    sizes: list[int] = []
    for layer in model.model.language_model.layers:
        layer.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    with torch.no_grad():
        model(**batch)
    assert sizes == [3, 2, 1, 1]


def test_no_layer_runs_when_all_have_left():
    model = classifier([0.0, 1.0, 1.0])
    model.model.language_model.layers[1].register_forward_pre_hook(lambda *_: pytest.fail("a layer ran for nobody"))
    with torch.no_grad():
        assert model(**inputs(model)).left_after.tolist() == [1, 1, 1]


def test_training_adds_the_weighted_mean_loss_of_the_exits():
    model = classifier([0.0] * 3, exit_loss_coef=0.5, router_aux_loss_coef=0.0).train()
    labels = torch.tensor([0, 4, 2])
    outputs = model(**inputs(model), labels=labels, output_exit_logits=True)
    of_exits = torch.stack([F.cross_entropy(part, labels) for part in outputs.exit_logits]).mean()
    torch.testing.assert_close(outputs.exit_loss, of_exits, rtol=0, atol=1e-6)
    expected = F.cross_entropy(outputs.logits, labels) + 0.5 * of_exits
    torch.testing.assert_close(outputs.loss, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_parameter_gets_a_gradient(checkpointing: bool):
    model = classifier([0.5] * 3).train()
    if checkpointing:
        model.activation_checkpointing_enable()
    model(**inputs(model), labels=torch.tensor([0, 4, 2])).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_saved_and_loaded_samples_leave_as_before(tmp_path: Any):
    model = classifier()
    batch = inputs(model)
    let_one_leave(model, batch)
    model.save_pretrained(tmp_path)
    loaded = ChorusForSequenceClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        first, second = model(**batch), loaded(**batch)
    assert torch.equal(first.logits, second.logits) and torch.equal(first.left_after, second.left_after)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"output_hidden_states": True}, "output_hidden_states=True while samples leave"),
        ({"output_router_logits": True}, "output_router_logits=True while samples leave"),
        ({"use_cache": True}, "use_cache while samples leave"),
        ({"attention_mask": torch.ones(3, 1, 24, 24)}, r"\(batch, sequence\), not \(3, 1, 24, 24\)"),
    ],
)
def test_what_makes_no_sense_while_samples_leave_is_refused(request_: dict[str, Any], message: str):
    model = classifier([0.5] * 3)
    with pytest.raises(ValueError, match=message):
        model(**inputs(model) | request_)


def test_a_regressor_has_no_confidence():
    model = classifier([0.5] * 3)
    model.config.problem_type = "regression"
    with pytest.raises(ValueError, match="problem_type='regression' has none"):
        model(**inputs(model))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"exit_layers": [4]}, r"exit_layers=4 is outside 1\.\.3 of 4 layers"),
        ({"exit_layers": [0]}, r"exit_layers=0 is outside 1\.\.3"),
        ({"exit_layers": [1, 1]}, "names an exit twice"),
        ({"exit_layers": None}, "exit_loss_coef=1.0 without exit_layers"),
    ],
)
def test_exits_that_the_model_cannot_have_are_refused(text: dict[str, Any], message: str):
    with pytest.raises(Exception, match=message):
        tiny_config(**{"num_hidden_layers": 4, "exit_loss_coef": 1.0} | text)


@pytest.mark.parametrize(
    ("thresholds", "message"),
    [([0.5], "1 exit_thresholds for exit_layers"), ([0.5, 1.5, 1.0], r"exit_thresholds\[1\]=1.5 is outside 0..1")],
)
def test_thresholds_that_do_not_fit_are_refused(thresholds: list[float], message: str):
    values = classifier().config.to_dict()
    with pytest.raises(Exception, match=message):
        ChorusForSequenceClassification.config_class(**values | {"exit_thresholds": thresholds})
