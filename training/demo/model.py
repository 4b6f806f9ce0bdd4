"""The demo's model: small enough to train from nothing on two processor cores."""

from collections.abc import Sequence

from chorus_moe.modeling.configuration_chorus import ChorusConfig
from chorus_moe.modeling.modeling_generation import ChorusForConditionalGeneration
from chorus_moe.processors.processing_chorus import ChorusProcessor
from chorus_moe.surgery.processor import processor_from_config
from chorus_moe.surgery.tokenizer import build_tokenizer


def build_demo(
    corpus: Sequence[str], dynamic_range: float = 8.0
) -> tuple[ChorusForConditionalGeneration, ChorusProcessor]:
    """A trimodal model with random weights and its processor, whose tokenizer is trained on `corpus`.

    Args:
        dynamic_range: powers of ten below the loudest sound of a clip that the model hears.
    """
    # Answers go up to 18: with one token for each number a sum is one choice, not two.
    tokenizer = build_tokenizer(corpus, vocab_size=512, individual_digits=False)
    config = ChorusConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            # Banks and cross-modal attention in every layer: LoRA on them then reaches a new voice where it comes in.
            "cross_modal_layers": [0, 1, 2],
            "mlp_layer_types": ["sparse", "sparse", "sparse"],
            # Nothing reads the image and audio positions of the last layer of a causal model: experts there would idle.
            "expert_banks": {"text": {}, "image": {"layers": [0, 1]}, "audio": {"layers": [0, 1]}, "common": {}},
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 128,
            "initializer_range": 0.08,
            "router_aux_loss_coef": 0.01,
            "router_z_loss_coef": 0.001,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={
            "architecture": "resnet10t",
            "model_args": {"channels": [16, 32, 64, 96], "stem_width": 16, "output_stride": 8},
            "image_size": 16,
            "num_channels": 1,
        },
        audio_config={
            "num_mel_bins": 40,
            "hop_length": 160,
            "max_seconds": 4.0,
            # With a few speakers it knows others better than a Conformer does, in less time (docs/log.md, 2026-11-29).
            "encoder_type": "time_delay",
            "hidden_size": 128,
            "num_hidden_layers": 4,
            "conv_kernel_size": 3,
            "subsampling": 2,
            "pool_size": 4,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        audio_token_id=tokenizer.convert_tokens_to_ids("<audio>"),
    )
    model = ChorusForConditionalGeneration(config)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    return model, processor_from_config(config, tokenizer, dynamic_range=dynamic_range)
