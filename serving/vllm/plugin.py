"""What vLLM finds under its entry point `vllm.general_plugins` and calls in each of its processes."""

import logging
from typing import TYPE_CHECKING

import chorus_moe  # noqa: F401  # registers configurations, processors and fast paths
from chorus_moe.serving.vllm.refusals import check

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)
ARCHITECTURE = "ChorusForConditionalGeneration"


def register() -> None:
    """Tell vLLM the class that runs the architecture, and what to check before anything is loaded."""
    try:
        from vllm import ModelRegistry
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

        import chorus_moe.serving.vllm.quantization  # noqa: F401  # registers our quantised weights
    except ImportError as error:
        # vLLM stops at a plug-in that fails, whichever model it was started for.
        logger.warning("this vLLM cannot serve Chorus models, the plug-in was written for 0.32: %s", error)
        return

    class CheckChorus(VerifyAndUpdateConfig):
        @staticmethod
        def verify_and_update_config(vllm_config: "VllmConfig") -> None:
            check(vllm_config)

    # By name: vLLM looks at model classes in a process of their own, and imports the one that it runs.
    ModelRegistry.register_model(ARCHITECTURE, "chorus_moe.serving.vllm.model:PagedChorus")
    MODELS_CONFIG_MAP[ARCHITECTURE] = CheckChorus
