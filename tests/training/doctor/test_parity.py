"""Each parity check fails on a model that is broken in that one way, and its neighbours do not."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from chorus_moe.training.doctor.inputs import Patient
from chorus_moe.training.doctor.parity import batch_mates, cache, checkpointing, implementations, padding_side
from chorus_moe.training.releases import CHECKPOINTING
from tests.conftest import override
from tests.training.conftest import failing, found_by, make_patient


def test_a_cache_whose_positions_are_ignored_is_found(patient: Patient, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, forward = patient.decoder, patient.decoder.forward

    def forgetful(**inputs: Any) -> Any:
        if inputs.get("past_key_values") is not None:
            inputs["position_ids"] = torch.arange(inputs["inputs_embeds"].shape[1])[None]
        return forward(**inputs)

    monkeypatch.setattr(decoder, "forward", forgetful)
    assert failing(patient, cache, padding_side, batch_mates).keys() == {"cache"}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ({"is_causal": False}, "a bidirectional model has no cache"),
        ({"expert_banks": {"common": {"expert_capacity": 4, "capacity_in_eval": True}}}, r"['common'] have a capacity"),
    ],
)
def test_a_model_without_a_cache_is_passed_over(
    tokenizer: PreTrainedTokenizerFast, text: dict[str, Any], reason: str
) -> None:
    finding = found_by(make_patient(tokenizer, **text), cache)["cache"]
    assert finding.verdict == "skipped"
    assert reason in finding.explanation


def test_a_model_that_reads_the_last_column_is_found_by_padding_on_both_sides(patient: Patient) -> None:
    add_last = lambda module, inputs, output: output + output[:, -1:]  # noqa: E731
    patient.decoder.norm.register_forward_hook(add_last)
    assert failing(patient, padding_side, batch_mates).keys() == {"padding-side"}


def test_a_bank_that_sees_its_batch_mates_is_found(patient: Patient) -> None:
    def crowd(module: nn.Module, inputs: tuple, output: tuple) -> tuple:
        return output[0] * (1 + 0.01 * len(output[0])), output[1]

    patient.decoder.layers[1].mlp.register_forward_hook(crowd)
    assert failing(patient, padding_side, batch_mates, cache).keys() == {"batch-mates"}


def louder(function: Any, by: float = 1.01) -> Any:
    """The same implementation with a larger output."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        output = function(*args, **kwargs)
        return (output[0] * by, *output[1:]) if isinstance(output, tuple) else output * by

    return wrapped


@pytest.mark.parametrize(
    ("table", "name"),
    [(ALL_ATTENTION_FUNCTIONS, "sdpa"), (ALL_EXPERTS_FUNCTIONS, "grouped_mm"), (ALL_EXPERTS_FUNCTIONS, "batched_mm")],
)
def test_an_implementation_that_computes_something_else_is_named(
    patient: Patient, monkeypatch: pytest.MonkeyPatch, table: Any, name: str
) -> None:
    override(monkeypatch, table, name, louder(table[name]))
    found = failing(patient, implementations, padding_side)
    assert found.keys() == {"implementations"}
    assert f" {name}" in found["implementations"]


def test_an_implementation_that_cannot_run_here_is_no_failure(
    patient: Patient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*args: Any) -> Tensor:
        raise ImportError("no such kernel")

    override(monkeypatch, ALL_EXPERTS_FUNCTIONS, "grouped_mm", missing)
    finding = found_by(patient, implementations)["implementations"]
    assert finding.verdict == "ok"
    assert "not usable here: grouped_mm: no such kernel" in finding.explanation


def test_noise_that_is_not_repeated_is_found_by_checkpointing(patient: Patient) -> None:
    generator = torch.Generator().manual_seed(0)

    def noisy(module: nn.Module, inputs: tuple, output: tuple) -> tuple:
        if not module.training:
            return output
        return output[0] * (1 + 0.1 * torch.rand(output[0].shape, generator=generator)), output[1]

    patient.decoder.layers[1].mlp.register_forward_hook(noisy)
    assert failing(patient, checkpointing, batch_mates).keys() == {"checkpointing"}


def test_checkpointing_that_does_nothing_is_a_warning(patient: Patient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patient.base, f"{CHECKPOINTING}_enable", lambda options: None)
    finding = found_by(patient, checkpointing)["checkpointing"]
    assert (finding.verdict, finding.measured, finding.tolerance) == ("warning", 1, 2)
