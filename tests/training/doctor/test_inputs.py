"""The doctor's inputs show every modality the model has, in several lengths, through the model's own processor."""

import pytest
import torch

from chorus_moe.training.doctor.inputs import NUM_ANSWER_TOKENS, Patient, all_labels, answer_labels, gradient_norms


def test_rows_show_each_modality_alone_and_all_together_in_several_lengths(patient: Patient) -> None:
    media = [(len(row["images"]), len(row["audio"])) for row in patient.rows]
    assert media == [(0, 0), (0, 0), (1, 0), (0, 1), (2, 1)]
    lengths = patient.encode()["attention_mask"].sum(dim=1)
    assert len(set(lengths.tolist())) == len(patient.rows)
    frames = patient.encode()["input_features_mask"].sum(dim=1)
    assert len(set(frames.tolist())) == 2


@pytest.mark.parametrize(("modality", "name"), [("image", "pixel_values"), ("audio", "input_features")])
def test_an_exchanged_medium_differs_in_nothing_but_its_content(patient: Patient, modality: str, name: str) -> None:
    batch, other = (patient.encode([row]) for row in (patient.row_of(modality), patient.exchanged(modality)))
    assert batch.keys() == other.keys()
    assert [key for key in batch if not torch.equal(batch[key], other[key])] == [name]


@pytest.mark.parametrize(("side", "column"), [("left", 0), ("right", -1)])
def test_padding_stands_on_the_side_that_was_asked_for(patient: Patient, side: str, column: int) -> None:
    mask = patient.encode(side=side)["attention_mask"]
    assert (mask[:, column] == 0).sum() == len(mask) - 1


def test_labels_leave_padding_out_or_hold_the_last_words_alone(patient: Patient) -> None:
    batch = patient.encode()
    everything, answer = all_labels(batch), answer_labels(batch)
    assert torch.equal(everything != -100, batch["attention_mask"] == 1)
    assert (answer != -100).sum() == len(answer) * NUM_ANSWER_TOKENS
    assert not batch["mm_token_type_ids"][:, -NUM_ANSWER_TOKENS:].any()


def test_gradient_norms_are_those_of_a_backward_pass_and_nothing_is_kept(patient: Patient) -> None:
    batch, layer = patient.encode(), patient.decoder.layers[1]
    parameters = {"norm": layer.input_layernorm.weight, "query": layer.self_attn.q_proj.weight}
    norms = gradient_norms(patient, parameters, batch, all_labels(batch))
    assert all(parameter.grad is None for parameter in patient.model.parameters())
    patient.base(**batch, labels=all_labels(batch)).loss.backward()
    for name, parameter in parameters.items():
        assert norms[name] == pytest.approx(float(parameter.grad.norm()), rel=1e-5)


def test_what_is_outside_the_graph_has_no_gradient(patient: Patient) -> None:
    batch = patient.encode(patient.rows[:1])
    weight = patient.base.model.vision_connector.projector.up_proj.weight
    assert gradient_norms(patient, {"connector": weight}, batch, all_labels(batch)) == {"connector": 0.0}
