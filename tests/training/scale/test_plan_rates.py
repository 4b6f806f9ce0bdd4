from pathlib import Path

import pytest

from chorus_moe.training.scale.plan_rates import DEVICES, read_bytes, read_rates


@pytest.mark.parametrize(("text", "expected"), [("80GB", 80 * 10**9), ("1.5 GiB", 3 * 2**29), ("16kB", 16_000)])
def test_bytes_have_units(text: str, expected: int) -> None:
    assert read_bytes(text) == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [("80gb", "did you mean 80GB"), ("80", "'' is no unit"), ("GB", "positive number"), ("-4GB", "positive number")],
)
def test_a_memory_without_number_or_unit_is_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_bytes(text)


def test_measured_rates_take_the_place_of_the_tables(tmp_path: Path) -> None:
    path = tmp_path / "rates.yaml"
    path.write_text("flops: 4.2e14\nmemory: 96GB\n", encoding="utf-8")
    found = read_rates("h100", path)
    assert (found.flops, found.memory, found.in_node) == (4.2e14, 96e9, DEVICES["h100"].in_node)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("flop: 1.0", "did you mean 'flops'"),
        ("efficiency: 1.5", r"efficiency=1.5 is outside 0..1"),
        ("in_node: fast", "expected a positive number, found 'fast'"),
        ("- 1", "expected rates such as"),
    ],
)
def test_a_wrong_rate_is_named(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "rates.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=said):
        read_rates("h100", path)


def test_a_device_that_is_not_in_the_table_is_refused() -> None:
    with pytest.raises(ValueError, match="'h1000' is not in the table"):
        read_rates("h1000")
