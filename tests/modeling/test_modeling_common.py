"""transformers' own tests of a model, on a tiny Chorus with text, images and sound.

Skips, each with its reason, are the `unittest.skip` lines below; what transformers skips by itself (accelerators,
deepspeed, mixins that its sdist leaves out) is printed at the end of a run.
"""

import unittest
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from transformers.models.auto import modeling_auto

from chorus_moe.modeling.configuration_chorus import ChorusConfig
from chorus_moe.modeling.modeling_chorus import ChorusModel
from chorus_moe.modeling.modeling_generation import ChorusForConditionalGeneration
from chorus_moe.modeling.modeling_heads import ChorusForSequenceClassification
from tests import transformers_suite

common = transformers_suite.load("test_modeling_common")
training = transformers_suite.load("test_training_mixin")

# Below the 84 tokens that are left when the tests shrink the vocabulary by 15.
IMAGE, AUDIO, VOCABULARY = 80, 81, 99

# The tests look classes up in these tables of names, which `AutoModel.register` does not fill.
NAMES = {
    "MODEL_MAPPING_NAMES": "ChorusModel",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES": "ChorusForConditionalGeneration",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": "ChorusForSequenceClassification",
}

NO_TOWER_RECORDS = "the towers are timm's and torchaudio's: they return neither hidden states nor attention maps"


class ChorusModelTester:
    """Tiny sizes and inputs: each sample holds one image, one clip and some words."""

    base_model_class = ChorusModel
    causal_lm_class = None
    conditional_generation_class = ChorusForConditionalGeneration
    is_training = True
    batch_size = 7  # what the attention tests fill smaller batches up to, with tokens at random
    seq_length = 20
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    image_size = 16
    num_frames = 24
    num_mel_bins = 8
    has_vision = True
    has_audio = True

    def get_config(self) -> ChorusConfig:
        text = {
            "vocab_size": VOCABULARY,
            "hidden_size": self.hidden_size,
            "intermediate_size": 40,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "mlp_layer_types": ["dense", "sparse"],
            "cross_modal_layers": [1],
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        vision = {
            "architecture": "vit_tiny_patch16_224",
            "model_args": {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "img_size": self.image_size},
            "image_size": self.image_size,
        }
        audio = {
            "num_mel_bins": self.num_mel_bins,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "conv_kernel_size": 3,
        }
        return ChorusConfig(
            text_config=text,
            vision_config=vision if self.has_vision else None,
            audio_config=audio if self.has_audio else None,
            image_token_id=IMAGE if self.has_vision else None,
            audio_token_id=AUDIO if self.has_audio else None,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[ChorusConfig, dict[str, torch.Tensor]]:
        config = self.get_config()
        num_audio_tokens = config.audio_config.num_audio_tokens(self.num_frames) if self.has_audio else 0
        input_ids = common.ids_tensor([self.batch_size, self.seq_length], IMAGE - 5) + 5
        num_image_tokens = config.vision_config.num_image_tokens if self.has_vision else 0
        input_ids[:, 1 : 1 + num_image_tokens] = IMAGE
        input_ids[:, 7 : 7 + num_audio_tokens] = AUDIO
        return config, {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "pixel_values": common.floats_tensor([self.batch_size, 3, self.image_size, self.image_size]),
            "input_features": common.floats_tensor([self.batch_size, self.num_frames, self.num_mel_bins]),
            "input_features_mask": torch.ones(self.batch_size, self.num_frames, dtype=torch.long),
        }


class ChorusModelTest(common.ModelTesterMixin, common.GenerationTesterMixin, unittest.TestCase):
    """The mixins over the inner model and the heads."""

    all_model_classes = (ChorusModel, ChorusForConditionalGeneration, ChorusForSequenceClassification)
    additional_model_inputs = ["pixel_values", "input_features", "input_features_mask"]
    _is_composite = True
    # The file of the configuration names no copyright year, which the test takes for an old model.
    test_can_init_all_missing_weights_before_2023 = True
    # The test looks for the width in `backbone_config`; test_vision_tower.py checks shapes over many architectures.
    skip_test_image_features_output_shape = True

    def setUp(self) -> None:
        self.model_tester = ChorusModelTester()
        for table, name in NAMES.items():
            self.enterContext(mock.patch.dict(getattr(modeling_auto, table), {"chorus": name}))
        self._patch("set_config_for_less_flaky_test", set_known_keys)
        self._patch("ids_tensor", words)

    def _patch(self, name: str, wrapper: Any) -> None:
        self.enterContext(mock.patch.object(common, name, partial(wrapper, getattr(common, name))))

    @unittest.skip(
        "an old name of an argument of transformers, which it maps; compared weight by weight, 50 seconds long"
    )
    def test_bc_torch_dtype(self) -> None: ...

    @unittest.skip("encoded media are in `image_hidden_states`; transformers 5.24 asks for `image_outputs`")
    def test_multimodal_outputs_are_returned(self) -> None: ...

    def test_can_init_all_missing_weights(self) -> None:
        self.model_tester.has_vision = False  # timm draws its weights itself; test_vision_tower.py covers them
        super().test_can_init_all_missing_weights()

    @unittest.skip(NO_TOWER_RECORDS)
    def test_get_image_features_hidden_states(self) -> None: ...

    @unittest.skip(NO_TOWER_RECORDS)
    def test_get_image_features_attentions(self) -> None: ...

    @unittest.skip(NO_TOWER_RECORDS)
    def test_get_audio_features_hidden_states(self) -> None: ...

    @unittest.skip(NO_TOWER_RECORDS)
    def test_get_audio_features_attentions(self) -> None: ...

    @unittest.skip("refused on purpose: reentrant checkpointing hides the routers from the balance loss")
    def test_training_gradient_checkpointing_use_reentrant_true(self) -> None: ...


class ChorusRoutingTester(ChorusModelTester):
    """A bank for every router, balance and limit."""

    def get_config(self) -> ChorusConfig:
        config = super().get_config()
        values = config.text_config.to_dict()
        values["modalities"] = None  # all, so that every bank is built also without its encoder
        values["expert_banks"] = {
            "text": {"router": "sigmoid", "num_groups": 2, "topk_groups": 1, "routed_scaling_factor": 2.0},
            "image": {"router": "attention", "balance": "cv2", "adaptive_experts": True},
            "audio": {"expert_capacity": 1.5, "capacity_overflow": "drop", "norm_topk_prob": False},
            "common": {"balance": "variance", "expert_capacity": 4, "router_jitter_noise": 0.01},
        }
        config.text_config = type(config.text_config)(**values)
        return config


@pytest.mark.slow
class ChorusRoutingTest(ChorusModelTest):
    """The same mixins with every routing option."""

    def setUp(self) -> None:
        super().setUp()
        self.model_tester = ChorusRoutingTester()


def words(original: Any, shape: list[int], vocab_size: int, *arguments: Any, **options: Any) -> torch.Tensor:
    """Random token ids without placeholders, for tests that give no images and clips."""
    return original(shape, min(vocab_size, IMAGE), *arguments, **options)


def set_known_keys(original: Any, config: ChorusConfig) -> None:
    """Change a configuration, then take back the keys that it does not know: it would refuse to load them."""
    parts = [
        part for part in (config, config.text_config, config.vision_config, config.audio_config) if part is not None
    ]
    before = [set(vars(part)) for part in parts]
    original(config)
    for part, known in zip(parts, before, strict=True):
        for key in set(vars(part)) - known:
            delattr(part, key)


# Attention does not depend on how tokens are routed: the 24 comparisons of its implementations run once.
for _name in [name for name in dir(ChorusRoutingTest) if name.startswith("test_eager_matches_sdpa_inference_")]:
    setattr(ChorusRoutingTest, _name, None)


class ChorusTextTester(ChorusModelTester):
    """The same model as a language model: the training test reads `vocab_size` from the configuration itself."""

    causal_lm_class = ChorusForConditionalGeneration

    def get_config(self) -> ChorusConfig:
        config = super().get_config()
        config.vocab_size = VOCABULARY
        return config


class ChorusTrainingTest(training.TrainingTesterMixin, unittest.TestCase):
    """The model learns one sequence by heart and repeats it."""

    model_tester = ChorusTextTester()
