"""A saved teacher, which no test changes."""

import copy

import pytest
from transformers import PreTrainedTokenizerFast

from tests.training.objectives.test_teachers import save_chorus


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory, trained_tokenizer: PreTrainedTokenizerFast) -> str:
    folder = tmp_path_factory.mktemp("teacher")
    save_chorus(folder, copy.deepcopy(trained_tokenizer))
    return str(folder)
