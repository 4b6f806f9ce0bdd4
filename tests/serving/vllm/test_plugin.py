"""What vLLM knows once it has called the plug-in."""

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; `.ci/matrix vllm` installs it")
# vLLM takes a quarter of a minute to import.
pytestmark = pytest.mark.slow


def test_the_plugin_may_be_called_twice_and_vllm_knows_the_model_and_its_check() -> None:
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from chorus_moe.serving.vllm.plugin import ARCHITECTURE, register

    register()
    register()
    assert ARCHITECTURE in ModelRegistry.get_supported_archs()
    assert MODELS_CONFIG_MAP[ARCHITECTURE].__name__ == "CheckChorus"
