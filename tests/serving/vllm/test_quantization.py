"""Our quantised weights by their name in vLLM."""

import pytest

from chorus_moe.surgery.quantization_loading import METHOD

pytest.importorskip("vllm", reason="vLLM is not installed; `.ci/matrix vllm` installs it")
# vLLM takes a quarter of a minute to import.
pytestmark = pytest.mark.slow


def test_vllm_knows_the_method_and_leaves_every_layer_as_it_is() -> None:
    from torch import nn
    from vllm.model_executor.layers.quantization import get_quantization_config

    from chorus_moe.serving.vllm.quantization import OwnWeights

    assert get_quantization_config(METHOD) is OwnWeights
    own = OwnWeights.from_config({"quant_method": METHOD, "weights": {}})
    assert own.get_name() == METHOD and own.get_quant_method(nn.Linear(2, 2), "layer") is None
