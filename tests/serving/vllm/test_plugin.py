"""What vLLM knows once it has called the plug-in."""

import sys

import pytest

from chorus_moe.serving.vllm.plugin import ARCHITECTURE, register


# vLLM takes a quarter of a minute to import.
@pytest.mark.slow
def test_the_plugin_may_be_called_twice_and_vllm_knows_the_model_and_its_check() -> None:
    vllm = pytest.importorskip("vllm", reason="vLLM is not installed; `.ci/matrix vllm` installs it")
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    register()
    register()
    assert ARCHITECTURE in vllm.ModelRegistry.get_supported_archs()
    assert MODELS_CONFIG_MAP[ARCHITECTURE].__name__ == "CheckChorus"


def test_a_vllm_that_does_not_fit_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its other models would not start, if the plug-in failed."""
    monkeypatch.setitem(sys.modules, "vllm", None)
    register()
    assert "this vLLM cannot serve Chorus models" in caplog.text
