"""How differences are measured, and what they are called."""

import math

import pytest
import torch

from chorus_moe.training.doctor.finding import ROUNDING, TOLERANCES, Finding, compared, counted, difference, listed


def test_a_difference_is_a_share_of_the_spread() -> None:
    expected = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 7 + 100
    assert difference(expected + 0.07, expected) == pytest.approx(0.01, rel=0.05)
    assert difference(expected.bfloat16(), expected.bfloat16()) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_number_that_is_none_differs_without_limit(bad: float) -> None:
    good = torch.tensor([1.0, 2.0])
    assert difference(torch.tensor([1.0, bad]), good) == math.inf
    assert difference(good, torch.tensor([1.0, bad])) == math.inf


def test_equal_constants_do_not_differ_and_others_do() -> None:
    assert difference(torch.ones(4), torch.ones(4)) == 0
    assert difference(torch.ones(4) + 1e-3, torch.ones(4)) > 1


def test_the_worst_difference_decides() -> None:
    pairs = [(1e-6, "first"), (2e-3, "second")]
    finding = compared(pairs, 1e-4, "both ways", "cure")
    assert (finding.verdict, finding.measured, finding.cure) == ("failed", 2e-3, "cure")
    assert finding.explanation == "both ways, 2 comparisons; largest difference: second"
    assert compared(pairs, 1e-2, "both ways", "cure").verdict == "ok"


def test_a_failure_in_16_bits_says_how_to_be_sure() -> None:
    assert compared([(1.0, "all")], TOLERANCES[torch.bfloat16], "ways", "cure").cure == f"{ROUNDING}. cure"


def test_faults_outweigh_warnings_and_warnings_bring_their_cures() -> None:
    warnings = {"a is odd": "Mind a", "b is odd": "Mind b", "c is odd": "Mind a"}
    assert counted(["x"], "fine", "cure", warnings).cure == "cure"
    finding = counted([], "fine", "cure", warnings)
    assert (finding.verdict, finding.cure) == ("warning", "Mind a. Mind b")
    assert finding.explanation == "fine. But a is odd; b is odd; c is odd"
    assert counted([], "fine", "cure").verdict == "ok"


def test_a_long_list_is_cut_and_counted() -> None:
    assert listed(list("abc"), limit=2) == "a; b; and 1 more"


def test_json_holds_no_infinity() -> None:
    finding = Finding(verdict="failed", explanation="", measured=math.inf)
    assert finding.to_dict()["measured"] is None
