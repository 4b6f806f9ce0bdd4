"""transformers' own tests of tensor and expert parallelism, in two processes on the CPU.

They feed text only; `test_distributed.py` compares a model with towers.
"""

import unittest
from unittest import mock

import pytest

from chorus_moe.modeling.modeling_generation import ChorusForConditionalGeneration
from tests import transformers_suite
from tests.modeling.test_modeling_common import ChorusModelTester

tensor = transformers_suite.load("test_tensor_parallel_mixin")
expert = transformers_suite.load("test_expert_parallel_mixin")

pytestmark = pytest.mark.slow


class ChorusTextTester(ChorusModelTester):
    """No towers: the tests feed any token id of the vocabulary, placeholders too."""

    has_vision = False
    has_audio = False


class ChorusParallelTest(tensor.TensorParallelTesterMixin, expert.ExpertParallelTesterMixin, unittest.TestCase):
    """Sharded and whole models give the same logits, gradients and text."""

    all_model_classes = (ChorusForConditionalGeneration,)
    model_tester = ChorusTextTester()

    def setUp(self) -> None:
        # By default only models of transformers' own list run in several processes.
        self.enterContext(mock.patch.object(tensor, "TP_DISTRIBUTED_TEST_MODEL_TYPES", None))
        self.enterContext(mock.patch.object(expert, "EP_DISTRIBUTED_TEST_MODEL_TYPES", None))
