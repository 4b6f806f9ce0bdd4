"""The section `quantization`: what a recipe may say, and what it does to a model."""

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from chorus_moe.surgery.quantization_formats import is_stored
from chorus_moe.training.quantization import QuantizationArguments, quantize_below
from tests.training.conftest import make_model


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (None, None),
        ("none", None),
        ("int8", "int8"),
        ("int4", "int4"),
        ('{"experts": "int4", "head": {"bits": 8}}', {"experts": "int4", "head": {"bits": 8}}),
        ("int3", "int3"),
    ],
)
def test_a_format_or_a_mapping_is_read(said: str | None, expected: Any) -> None:
    assert QuantizationArguments(said).groups == expected


def test_by_default_nothing_is_quantised(
    tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model(tokenizer)
    quantize_below(model, QuantizationArguments())
    assert not hasattr(model.lm_head, "parametrizations") and capsys.readouterr().out == ""


@pytest.mark.parametrize("verbose", [None, True, False])
def test_groups_are_quantised_and_the_table_printed(
    verbose: bool | None, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    model, options = make_model(tokenizer), {} if verbose is None else {"verbose": verbose}
    quantize_below(model, QuantizationArguments('{"head": "int8"}'), **options)
    assert is_stored(model.lm_head, "weight")
    assert not is_stored(model.model.language_model.embed_tokens, "weight")
    assert ("stored as" in capsys.readouterr().out) == (verbose is not False)


def test_an_unknown_format_is_refused_by_name(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="unknown format 'int3'; did you mean 'int8'"):
        quantize_below(make_model(tokenizer), QuantizationArguments("int3"))
