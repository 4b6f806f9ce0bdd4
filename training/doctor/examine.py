"""`chorus-moe doctor`: contract checks on a user's own checkpoint, with a verdict and a cure for each.

Unusual here:
- a check that raises has failed, with the error as its explanation; the doctor goes on;
- inputs are noise of every modality the model has, made by its own processor: no data are needed;
- the model is left as it was found.
"""

import json
import textwrap
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from chorus_moe.modeling.configuration_banks import check_name
from chorus_moe.modeling.modeling_generation import ChorusForConditionalGeneration
from chorus_moe.training.doctor.checks import CHECKS, COPYING, Check, name_of
from chorus_moe.training.doctor.finding import VERDICTS, Finding
from chorus_moe.training.doctor.inputs import Patient
from chorus_moe.training.doctor.state import left_as_found
from chorus_moe.training.loading import base_model, find_device, load_model

WIDTH, EXPLANATION = 120, 100


def load_patient(source: str, base: str | None = None, dtype: str = "auto", device: str | None = None) -> Patient:
    """The model, its adapter if it is one, and its processor, on an accelerator if there is one and none is named.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: no such device here, or a checkpoint that is not generative: its head would be a fresh one.
    """
    model, processor = load_model(source, base=base, device=find_device(device), dtype=dtype)
    saved_as, wanted = base_model(model).config.architectures or [], ChorusForConditionalGeneration.__name__
    # Configurations written by hand name no class.
    if saved_as and wanted not in saved_as:
        raise ValueError(f"{source!r} was saved as {saved_as[0]}; the doctor examines {wanted} and adapters on one")
    return Patient(model, processor, source)


def chosen_checks(names: Collection[str] = (), is_quick: bool = False) -> list[Check]:
    """The checks of these names (all if none), in their order; without those that copy the model if quick.

    Raises:
        ValueError: an unknown name, with the nearest one.
    """
    known = {name_of(check): check for check in CHECKS}
    for name in names:
        check_name("doctor", "check", name, known)
    return [
        check for name, check in known.items() if (not names or name in names) and not (is_quick and check in COPYING)
    ]


def examine(patient: Patient, checks: Iterable[Check] = CHECKS) -> Iterator[Finding]:
    """Run checks one after another. No error of a check escapes.

    Raises:
        ValueError: a model that is not generative.
    """
    if not isinstance(patient.base, ChorusForConditionalGeneration):
        raise ValueError(f"the doctor examines ChorusForConditionalGeneration, found {type(patient.base).__name__}")
    for check in checks:
        try:
            with left_as_found(patient):
                finding = check(patient)
        # Whatever a check raises is a finding about this model, and later checks may say why.
        except Exception as error:
            finding = Finding(
                verdict="failed",
                explanation=f"{type(error).__name__}: {error}",
                cure="The check could not finish, which a healthy model lets it do: start with the error",
            )
        # One by one, so that the caller can print each finding as it comes.
        yield replace(finding, name=name_of(check))


def is_healthy(findings: Iterable[Finding]) -> bool:
    return not any(finding.verdict == "failed" for finding in findings)


def heading() -> str:
    return f"{'check':<18}{'verdict':<9}{'measured':>10}  {'limit':<10}what was found"


def line_of(finding: Finding) -> str:
    """One row of the table; a long explanation is cut here and whole in the summary."""
    limit = "-" if finding.tolerance is None else ("≥ " if finding.at_least else "≤ ") + number(finding.tolerance)
    measured = "-" if finding.measured is None else number(finding.measured)
    text = textwrap.shorten(finding.explanation, EXPLANATION, placeholder=" ...")
    return f"{finding.name:<18}{finding.verdict:<9}{measured:>10}  {limit:<10}{text}"


def number(value: float) -> str:
    return str(int(value)) if value == value // 1 and value < 1000 else f"{value:.1e}"


def summary(findings: Sequence[Finding]) -> str:
    """What to do, by check, and a last line of counts."""
    lines = []
    for finding in findings:
        if finding.cure:
            lines += [f"{finding.name} ({finding.verdict}): {finding.explanation}", f"what to do: {finding.cure}", ""]
    counts = Counter(finding.verdict for finding in findings)
    wrapped = [part for line in lines for part in textwrap.wrap(line, WIDTH, subsequent_indent="    ") or [""]]
    return "\n".join([*wrapped, f"{len(findings)} checks: " + ", ".join(f"{counts[v]} {v}" for v in VERDICTS)])


def write_findings(path: Path, patient: Patient, findings: Sequence[Finding]) -> None:
    """The findings as JSON, with what was examined."""
    values: dict[str, Any] = {
        "model": patient.source,
        "dtype": str(patient.dtype).removeprefix("torch."),
        "device": str(patient.device),
        "is_healthy": is_healthy(findings),
        "findings": [finding.to_dict() for finding in findings],
    }
    path.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n", encoding="utf-8")
