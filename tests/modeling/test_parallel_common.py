"""transformers' own tests of tensor and expert parallelism, in two processes on the CPU."""

import unittest
from unittest import mock

import pytest

from chorus_moe.modeling.modeling_generation import ChorusForConditionalGeneration
from tests import transformers_suite
from tests.modeling.test_modeling_common import ChorusModelTester

tensor = transformers_suite.load("test_tensor_parallel_mixin")
expert = transformers_suite.load("test_expert_parallel_mixin")

pytestmark = pytest.mark.slow


class ChorusParallelTest(tensor.TensorParallelTesterMixin, expert.ExpertParallelTesterMixin, unittest.TestCase):
    """Sharded and whole models give the same logits, gradients and text."""

    all_model_classes = (ChorusForConditionalGeneration,)
    model_tester = ChorusModelTester()

    def setUp(self) -> None:
        # By default only models of transformers' own list run in several processes.
        self.enterContext(mock.patch.object(tensor, "TP_DISTRIBUTED_TEST_MODEL_TYPES", None))
        self.enterContext(mock.patch.object(expert, "EP_DISTRIBUTED_TEST_MODEL_TYPES", None))
