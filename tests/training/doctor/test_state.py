"""What the doctor listens to and changes for a while is as it was afterwards."""

import logging

import pytest
import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.utils import logging as transformers_logging

from chorus_moe.training.doctor.inputs import Patient
from chorus_moe.training.doctor.state import left_as_found, nan_memory, recorded_calls, recorded_inputs
from tests.conftest import override


def test_the_innermost_implementation_counts(patient: Patient, monkeypatch: pytest.MonkeyPatch) -> None:
    def hand_over(*args: object) -> torch.Tensor:
        return ALL_EXPERTS_FUNCTIONS["grouped_mm"](*args)

    override(monkeypatch, ALL_EXPERTS_FUNCTIONS, "cpu_mm", hand_over)
    before = dict(ALL_EXPERTS_FUNCTIONS)
    with recorded_calls(ALL_EXPERTS_FUNCTIONS) as calls:
        patient.logits(patient.encode())
    assert set(calls.values()) == {"grouped_mm"}
    assert dict(ALL_EXPERTS_FUNCTIONS) == before


def test_inputs_are_those_of_the_last_call_and_the_hooks_go(patient: Patient) -> None:
    norm = patient.decoder.norm
    with recorded_inputs({"norm": norm}) as inputs:
        norm(torch.zeros(1, 64))
        norm(torch.ones(2, 64))
    assert torch.equal(inputs["norm"][0], torch.ones(2, 64))
    assert not norm._forward_pre_hooks


@pytest.mark.parametrize("mode", [0, 1])
def test_uninitialised_memory_is_nan_within(mode: int) -> None:
    torch.set_deterministic_debug_mode(mode)
    try:
        with nan_memory():
            assert torch.empty(1000).isnan().all()
        assert torch.get_deterministic_debug_mode() == mode
    finally:
        torch.set_deterministic_debug_mode(0)


def test_an_error_puts_everything_back(patient: Patient) -> None:
    silenced, bars = logging.root.manager.disable, transformers_logging.is_progress_bar_enabled()
    open_table = patient.decoder.layers[1].mlp.bank_gate.is_open
    before = open_table.clone()

    def spoil() -> None:
        with left_as_found(patient):
            patient.model.train().requires_grad_(False)
            patient.decoder.set_attn_implementation("eager")
            patient.decoder.layers[0].register_forward_hook(lambda *_: None)
            open_table.fill_(True)
            raise KeyError

    with pytest.raises(KeyError):
        spoil()
    assert not patient.model.training
    assert all(parameter.requires_grad for parameter in patient.model.parameters())
    assert patient.text_config._attn_implementation == "sdpa"
    assert not patient.decoder.layers[0]._forward_hooks
    assert torch.equal(open_table, before)
    assert (logging.root.manager.disable, transformers_logging.is_progress_bar_enabled()) == (silenced, bars)
