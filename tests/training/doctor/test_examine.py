"""The doctor as a whole: a healthy model passes, is left as it was found, and the command says so."""

import json
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from chorus_moe import ChorusForContrastive
from chorus_moe.training import cli
from chorus_moe.training.doctor import examine as doctor
from chorus_moe.training.doctor.checks import CHECKS, COPYING, name_of
from chorus_moe.training.doctor.examine import chosen_checks, examine, is_healthy, line_of, load_patient, summary
from chorus_moe.training.doctor.finding import Finding
from chorus_moe.training.doctor.inputs import Patient
from chorus_moe.training.doctor.state import CAPTURES
from chorus_moe.training.lora import lora_config
from chorus_moe.training.releases import CHECKPOINTING
from tests.training.conftest import found_by, make_patient

# All but the export, which starts another process.
IN_PROCESS = [check for check in CHECKS if name_of(check) != "hub-export"]


@pytest.fixture(scope="module")
def folder(trained_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and an adapter on it, with their processor."""
    folder, patient = tmp_path_factory.mktemp("saved"), make_patient(trained_tokenizer)
    patient.model.save_pretrained(folder / "model")
    adapted = get_peft_model(patient.model, lora_config(patient.model, dense=True, verbose=False))
    adapted.save_pretrained(folder / "adapter")
    for name in ("model", "adapter"):
        patient.processor.save_pretrained(folder / name)
    return folder


def state_of(patient: Patient) -> dict[str, object]:
    model, text = patient.model, patient.text_config
    return {
        "tensors": {n: t.clone() for n, t in (*model.named_parameters(), *model.named_buffers())},
        "trained": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "gradients": [name for name, parameter in model.named_parameters() if parameter.grad is not None],
        "modes": {name: module.training for name, module in model.named_modules()},
        "functions": (text._attn_implementation, text._experts_implementation),
        "marks": [name for name, module in model.named_modules() if CAPTURES in vars(module)],
        "hooks": [n for n, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks],
        "checkpointing": getattr(patient.base, f"is_{CHECKPOINTING}"),
        "random": torch.get_rng_state(),
        "deterministic": torch.get_deterministic_debug_mode(),
    }


def test_a_healthy_model_passes_every_check_and_is_left_as_it_was_found(tokenizer: PreTrainedTokenizerFast) -> None:
    patient = make_patient(tokenizer)
    patient.decoder.layers[0].train().requires_grad_(False)
    patient.decoder.set_experts_implementation("cpu_mm")
    before = state_of(patient)
    findings = list(examine(patient, IN_PROCESS))
    verdicts = {finding.name: finding.verdict for finding in findings}
    assert verdicts == {name_of(check): "ok" for check in IN_PROCESS} | dict.fromkeys(
        ("adapters", "whole-checkpoints"), "skipped"
    )
    after = state_of(patient)
    for name, tensor in before.pop("tensors").items():
        assert torch.equal(tensor, after["tensors"][name]), name
    assert torch.equal(before.pop("random"), after["random"])
    assert before == {name: after[name] for name in before}


@pytest.mark.slow
def test_a_healthy_model_exports(patient: Patient) -> None:
    finding = found_by(patient, CHECKS[-1])["hub-export"]
    assert finding.verdict == "ok"
    # transformers' own experts run there: float32 sums in another order, 1.3e-7 of the logits' spread were seen.
    assert finding.measured < 1e-6


def test_a_healthy_model_of_16_bits_passes(folder: Path) -> None:
    findings = list(examine(load_patient(str(folder / "model"), dtype="bfloat16"), IN_PROCESS))
    assert is_healthy(findings), summary(findings)


def test_a_check_that_raises_has_failed_and_the_others_run(patient: Patient) -> None:
    def broken(patient: Patient) -> Finding:
        patient.model.train()
        raise ZeroDivisionError("no such thing")

    def fine(patient: Patient) -> Finding:
        return Finding(verdict="ok", explanation=f"training {patient.model.training}")

    findings = found_by(patient, broken, fine)
    assert findings["broken"].verdict == "failed"
    assert findings["broken"].explanation == "ZeroDivisionError: no such thing"
    assert findings["fine"].explanation == "training False"


def test_checks_are_chosen_by_name_in_their_order() -> None:
    assert [name_of(check) for check in chosen_checks(["reload", "tensors"])] == ["tensors", "reload"]
    assert chosen_checks() == list(CHECKS)
    assert not set(chosen_checks(is_quick=True)) & set(COPYING)
    with pytest.raises(ValueError, match="unknown check 'chache'; did you mean 'cache'"):
        chosen_checks(["chache"])


def test_a_line_holds_verdict_number_and_limit() -> None:
    finding = Finding(verdict="failed", explanation="word " * 60, measured=0.25, tolerance=1e-4, name="cache")
    line = line_of(finding)
    assert line.split()[:5] == ["cache", "failed", "2.5e-01", "≤", "1.0e-04"]
    assert line.endswith("...")
    found = Finding(verdict="ok", explanation="x", measured=3.0, tolerance=1e-6, at_least=True, name="modalities")
    assert line_of(found).split()[2:5] == ["3", "≥", "1.0e-06"]


def test_the_summary_gives_each_cure_and_counts_verdicts() -> None:
    findings = [
        Finding(verdict="ok", explanation="fine", name="tensors"),
        Finding(verdict="failed", explanation="word " * 60, cure="do this", name="cache"),
    ]
    text = summary(findings)
    assert "cache (failed): word" in text and "what to do: do this" in text
    assert text.replace("\n    ", " ").count("word") == 60
    assert text.splitlines()[-1] == "2 checks: 1 ok, 0 warning, 1 failed, 0 skipped"
    assert max(map(len, text.splitlines())) <= 120


def test_another_head_is_refused(tokenizer: PreTrainedTokenizerFast, patient: Patient, tmp_path: Path) -> None:
    model = ChorusForContrastive(patient.base.config)
    with pytest.raises(ValueError, match="found ChorusForContrastive"):
        next(examine(Patient(model, patient.processor)))
    model.save_pretrained(tmp_path)
    patient.processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="was saved as ChorusForContrastive"):
        load_patient(str(tmp_path))


@pytest.fixture
def no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "CHECKS", tuple(IN_PROCESS))


def invoke(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, ["doctor", *map(str, words)], catch_exceptions=False)
    return result.exit_code, result.stdout


@pytest.mark.usefixtures("no_export")
def test_the_command_examines_an_adapter_and_writes_json(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "findings.json"
    status, printed = invoke(folder / "adapter", "--base", folder / "model", "--json", path)
    assert status == 0, printed
    assert printed.splitlines()[-1] == "15 checks: 13 ok, 1 warning, 0 failed, 1 skipped"
    values = json.loads(path.read_text())
    assert (values["model"], values["dtype"], values["is_healthy"]) == (str(folder / "adapter"), "float32", True)
    assert [finding["name"] for finding in values["findings"]] == [name_of(check) for check in IN_PROCESS]


def test_the_command_fails_where_a_check_fails(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(patient: Patient) -> Finding:
        return Finding(verdict="failed", explanation="NaN", measured=float("inf"), tolerance=1e-4, cure="none")

    monkeypatch.setattr(doctor, "CHECKS", (broken,))
    status, printed = invoke(folder / "model", "--json", tmp_path / "findings.json")
    assert status == 1
    assert "what to do: none" in printed
    (finding,) = json.loads((tmp_path / "findings.json").read_text())["findings"]
    assert (finding["verdict"], finding["measured"]) == ("failed", None)


def test_the_command_runs_what_was_chosen(folder: Path) -> None:
    status, printed = invoke(folder / "model", "--check", "tensors", "--check", "reload", "--quick")
    assert status == 0
    assert printed.splitlines()[-1] == "1 checks: 1 ok, 0 warning, 0 failed, 0 skipped"
