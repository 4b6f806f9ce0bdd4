"""The public classes, registered with transformers' Auto classes when this file is imported.

Registration takes the classes themselves, so it costs what they import: torch, torchvision and most of transformers.
"""

import transformers
from transformers import AutoConfig, AutoFeatureExtractor, AutoImageProcessor, AutoModel, AutoProcessor

import chorus_moe.fastpaths.attention_blocks  # noqa: F401  registers `block_local`, windows in blocks
import chorus_moe.fastpaths.attention_queries  # noqa: F401  registers attention without the queries nobody reads
import chorus_moe.fastpaths.early_exit_drafts  # noqa: F401  registers drafts of the first layers
import chorus_moe.fastpaths.experts_cpu  # noqa: F401  registers `cpu_mm` and `gpu_mm`
import chorus_moe.fastpaths.narrow_product  # noqa: F401  registers products of 16-bit numbers on a GPU
import chorus_moe.surgery.depth  # noqa: F401  registers advice for checkpoints without exits or gates
import chorus_moe.surgery.printing  # noqa: F401  registers how configurations print
import chorus_moe.surgery.quantization_loading  # noqa: F401  registers quantised checkpoints with transformers
import chorus_moe.surgery.saved_code  # noqa: F401  registers what a saved configuration says of code
import chorus_moe.surgery.template_limits  # noqa: F401  registers the limits of a chat template
import chorus_moe.surgery.vision_probe  # noqa: F401  registers what measures a new vision encoder
import chorus_moe.training.alignment_kinds  # noqa: F401  registers kinds of alignment that are there for comparison
import chorus_moe.training.depth_cost  # noqa: F401  registers what counts for `output_compute`
import chorus_moe.training.expert_draws  # noqa: F401  registers draws for `sample_experts`
import chorus_moe.training.label_watch  # noqa: F401  registers the look at the labels of a training run
import chorus_moe.training.trl_losses  # noqa: F401  registers what gives TRL's forward our losses
from chorus_moe.modeling.configuration_banks import ExpertBankConfig
from chorus_moe.modeling.configuration_chorus import ChorusConfig
from chorus_moe.modeling.configuration_modalities import MODALITY_IDS
from chorus_moe.modeling.configuration_text import ChorusTextConfig
from chorus_moe.modeling.configuration_towers import ChorusAudioConfig, ChorusVisionConfig
from chorus_moe.modeling.modeling_chorus import ChorusModel
from chorus_moe.modeling.modeling_generation import ChorusForConditionalGeneration
from chorus_moe.modeling.modeling_heads import ChorusForContrastive, ChorusForSequenceClassification
from chorus_moe.modeling.modeling_text import ChorusTextModel
from chorus_moe.modeling.tower_audio import ChorusAudioModel
from chorus_moe.modeling.tower_vision import ChorusVisionModel
from chorus_moe.processors.feature_extraction_chorus import ChorusFeatureExtractor
from chorus_moe.processors.image_processing_chorus import ChorusImageProcessor
from chorus_moe.processors.processing_chorus import ChorusProcessor
from chorus_moe.surgery.heads import classes_of_auto_classes

for _config in (ChorusConfig, ChorusTextConfig, ChorusVisionConfig, ChorusAudioConfig):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
for _name, _kinds in classes_of_auto_classes().items():
    # Of several, transformers takes the one that the configuration names as its architecture.
    _registered = _kinds[0] if len(_kinds) == 1 else tuple(_kinds)
    getattr(transformers, _name).register(ChorusConfig, _registered, exist_ok=True)
AutoModel.register(ChorusTextConfig, ChorusTextModel, exist_ok=True)
AutoModel.register(ChorusVisionConfig, ChorusVisionModel, exist_ok=True)
AutoModel.register(ChorusAudioConfig, ChorusAudioModel, exist_ok=True)
AutoImageProcessor.register(ChorusConfig, image_processor_classes={"torchvision": ChorusImageProcessor}, exist_ok=True)
AutoFeatureExtractor.register(ChorusConfig, ChorusFeatureExtractor, exist_ok=True)
AutoProcessor.register(ChorusConfig, ChorusProcessor, exist_ok=True)

__all__ = [
    "MODALITY_IDS",
    "ChorusAudioConfig",
    "ChorusAudioModel",
    "ChorusConfig",
    "ChorusFeatureExtractor",
    "ChorusForConditionalGeneration",
    "ChorusForContrastive",
    "ChorusForSequenceClassification",
    "ChorusImageProcessor",
    "ChorusModel",
    "ChorusProcessor",
    "ChorusTextConfig",
    "ChorusTextModel",
    "ChorusVisionConfig",
    "ChorusVisionModel",
    "ExpertBankConfig",
]
