"""Fewer heads, units and layers: outputs against a whole model with the cut weights at zero, saved and reloaded."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers import AutoModelForMultimodalLM, SiglipVisionConfig, ViTConfig

from chorus_moe import (
    ChorusAudioConfig,
    ChorusConfig,
    ChorusForConditionalGeneration,
    ChorusForSequenceClassification,
    ChorusVisionConfig,
)
from chorus_moe.surgery import prune_dense, unfuse_experts
from chorus_moe.surgery.dense_groups import groups_of, magnitude, owners_of, scores_of
from tests.conftest import tiny_batch, tiny_config

# float32 sums of fewer terms, at logits of size 1.
ATOL = 1e-5
ALL = {
    "heads": 1,
    "feed_forward": 0.5,
    "shared_experts": 8,
    "experts:image": 12,
    "vision_tower.feed_forward": 0.25,
    "audio_tower.feed_forward": 10,
}


def make(**text: Any) -> ChorusForConditionalGeneration:
    torch.manual_seed(0)
    return ChorusForConditionalGeneration(tiny_config(**text)).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(**tiny_batch(model.config)).logits


def with_zeros(model: Any, keep: dict[str, Any], scores: Any = None) -> Any:
    """The whole model with all weights of the units that go at zero, found by sorting anew."""
    model = deepcopy(model)
    owners = owners_of(model.model)
    for owner, module in owners.items():
        for name, group in groups_of(model.config, owner, module):
            if name not in keep:
                continue
            count = keep[name] if isinstance(keep[name], int) else int(keep[name] * group.size)
            found = (scores or {}).get(name) or scores_of(magnitude(module), group)
            for key, parameter in module.named_parameters():
                if (place := group.find(key)) is None:
                    continue
                is_cut = torch.ones_like(found[place[0]], dtype=torch.bool)
                is_cut.scatter_(-1, found[place[0]].topk(count, dim=-1).indices, False)
                opened, unit = group.opened(parameter.data, place[1])
                shape = [1] * opened.ndim
                shape[unit] = group.size
                if group.per_expert:
                    shape[0] = len(is_cut)
                opened.masked_fill_(is_cut.view(shape), 0.0)
    return model


@pytest.mark.parametrize("name", ALL)
def test_outputs_are_those_of_the_whole_model_without_the_cut_weights(name: str) -> None:
    model = make()
    expected = logits(with_zeros(model, {name: ALL[name]}))
    assert not torch.allclose(expected, logits(model), atol=1e-3 * ATOL)
    before = sum(parameter.numel() for parameter in model.parameters())
    report = prune_dense(model, {name: ALL[name]})
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=ATOL)
    assert report.parameters_after == sum(parameter.numel() for parameter in model.parameters()) < before


@pytest.mark.parametrize(
    "text",
    [
        {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True, "use_qk_norm": True},
        {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 4,
         "num_global_tokens": 2},
        {"layer_types": ["hybrid_sliding", "full_attention", "hybrid_sliding"], "sliding_window": 4,
         "num_memory_tokens": 2},
        {"share_cross_modal_query": False, "tie_word_embeddings": True},
    ],
    ids=["biases and norms", "windows", "memory", "own queries, tied"],
)  # fmt: skip
def test_every_kind_of_attention_loses_heads(text: dict[str, Any]) -> None:
    model = make(**text)
    keep = {"heads": 1, "feed_forward": 30}
    expected = logits(with_zeros(model, keep))
    prune_dense(model, keep)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=ATOL)


def test_deep_experts_lose_units_in_each_feed_forward() -> None:
    banks = {"common": {"modalities": ["text", "image", "audio"], "expert_depth": 2}}
    model = make(expert_banks=banks)
    expected = logits(with_zeros(model, {"experts:common": 9}))
    prune_dense(model, {"experts:common": 9})
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=ATOL)


def test_a_pruned_model_is_saved_loaded_trained_and_generates(tmp_path: Path) -> None:
    model = make()
    model.model.vision_tower.requires_grad_(False)
    prune_dense(model, ALL | {"layers": 2}, {"layers": {"": torch.tensor([1.0, 0.0, 2.0])}})
    text = model.config.text_config
    assert (text.num_hidden_layers, text.mlp_layer_types, text.cross_modal_layers) == (2, ["dense", "sparse"], [1])
    assert (text.num_key_value_heads, text.intermediate_size) == (1, 48)
    model.save_pretrained(tmp_path)
    again = AutoModelForMultimodalLM.from_pretrained(tmp_path)
    assert logits(again).equal(logits(model))
    batch = tiny_batch(model.config)
    labels = batch.pop("labels")
    assert model.generate(**batch, max_new_tokens=3, min_new_tokens=3).shape[1] == batch["input_ids"].shape[1] + 3
    assert not any(parameter.requires_grad for parameter in model.model.vision_tower.parameters())
    model.train()(**batch, labels=labels).loss.backward()
    assert all(parameter.grad is not None for parameter in model.model.language_model.layers.parameters())


def test_without_a_layer_the_model_passes_its_input_on() -> None:
    whole, model = make(cross_modal_layers=[1]), make(cross_modal_layers=[1])
    prune_dense(model, {"layers": 2}, {"layers": {"": torch.tensor([1.0, 3.0, 0.5])}})
    whole.model.language_model.layers = whole.model.language_model.layers[:2]
    whole.config.text_config.num_hidden_layers = 2
    assert logits(model).equal(logits(whole))


def test_what_a_configuration_says_by_layer_follows() -> None:
    counts = [4, 4, 4, 6]
    banks = {
        "common": {"modalities": ["text", "image", "audio"], "num_experts": counts},
        "late": {"modalities": ["text"], "layers": [2, 4], "num_experts": 4},
    }
    model = make(num_hidden_layers=5, mlp_layer_types=["dense", *["sparse"] * 4], expert_banks=banks,
                 no_rope_layers=[1, 0, 1, 0, 1], exit_layers=[1, 3, 4], exit_loss_coef=0.5, skip_layers=[1, 4],
                 skip_budget=0.5)  # fmt: skip
    prune_dense(model, {"layers": 3}, {"layers": {"": torch.tensor([5.0, 0.0, 0.0, 4.0, 3.0])}})
    text = model.config.text_config
    assert text.no_rope_layers == [1, 0, 1]
    assert (text.exit_layers, text.skip_layers, text.cross_modal_layers) == ([1, 2], [2], [2])
    assert text.expert_banks["common"]["num_experts"] == [4, 6]
    assert text.expert_banks["late"]["layers"] == [2]
    assert text.exit_loss_coef == 0.5
    assert logits(model).isfinite().all()


def test_a_decoder_whose_exits_all_go_has_no_loss_of_them() -> None:
    model = make(exit_layers=[1, 2], exit_loss_coef=0.5)
    prune_dense(model, {"layers": 1}, {"layers": {"": torch.tensor([0.0, 0.0, 1.0])}})
    text = model.config.text_config
    assert (text.num_hidden_layers, text.exit_layers, text.exit_loss_coef) == (1, None, 0.0)


@pytest.mark.parametrize("name", ["siglip", "vit"])
def test_hugging_face_encoders_lose_units_and_layers(name: str) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
             "image_size": 16, "patch_size": 8}  # fmt: skip
    backbone = {"siglip": SiglipVisionConfig, "vit": ViTConfig}[name](**sizes)
    config = tiny_config()
    config = ChorusConfig(
        text_config=config.text_config.to_dict(),
        vision_config=ChorusVisionConfig(backbone_config=backbone, image_size=16).to_dict(),
        image_token_id=config.image_token_id,
    )
    torch.manual_seed(0)
    model = ChorusForConditionalGeneration(config).eval()
    pixels = torch.randn(2, 3, 16, 16)
    keep: dict[str, Any] = {"vision_tower.feed_forward": 10}
    expected = with_zeros(model, keep).model.vision_tower(pixels).last_hidden_state
    prune_dense(model, keep)
    torch.testing.assert_close(model.model.vision_tower(pixels).last_hidden_state, expected, rtol=0, atol=ATOL)
    prune_dense(model, {"vision_tower.layers": 2}, {"vision_tower.layers": {"": torch.tensor([1.0, 2.0, 0.0])}})
    assert model.config.vision_config.backbone_config.num_hidden_layers == 2
    assert model.model.vision_tower(pixels).last_hidden_state.isfinite().all()


def test_a_conformer_and_a_timm_encoder_lose_layers() -> None:
    config = tiny_config()
    config.audio_config = ChorusAudioConfig(**config.audio_config.to_dict() | {"num_hidden_layers": 2})
    vision = config.vision_config.to_dict()
    config.vision_config = ChorusVisionConfig(**vision | {"model_args": vision["model_args"] | {"depth": 3}})
    torch.manual_seed(0)
    model = ChorusForConditionalGeneration(config).eval()
    audio, blocks = model.model.audio_tower.encoder.layers, model.model.vision_tower.timm_model.blocks
    kept = [audio[1].state_dict(), blocks[2].state_dict()]
    keep = {"vision_tower.layers": 1, "audio_tower.layers": 1}
    scores = {name: {"": torch.arange(count).double()} for name, count in zip(keep, (3, 2), strict=True)}
    prune_dense(model, keep, scores)
    left = [model.model.audio_tower.encoder.layers, model.model.vision_tower.timm_model.blocks]
    assert [len(layers) for layers in left] == [1, 1]
    for layers, state in zip(left, kept, strict=True):
        assert all(tensor.equal(state[name]) for name, tensor in layers[0].state_dict().items())
    assert logits(model).isfinite().all()


@pytest.mark.parametrize(
    ("keep", "scores", "text", "words"),
    [
        ({}, None, {}, "no group is named"),
        ({"neurons": 2}, None, {}, "unknown group 'neurons'"),
        ({"experts:video": 2}, None, {}, "unknown group 'experts:video'"),
        ({"heads": 3}, None, {}, "'heads': keep=3 is neither a number from 1 to 2 nor a fraction"),
        ({"heads": 0}, None, {}, "'heads': keep=0 is neither"),
        ({"heads": 0.0}, None, {}, "'heads': keep=0.0 is neither"),
        ({"heads": 1.01}, None, {}, "'heads': keep=1.01 is neither"),
        ({"heads": True}, None, {}, "'heads': keep=True is neither"),
        ({"heads": 1}, None, {"use_qk_norm": True, "qk_norm_scope": "projection"}, "norms all heads together"),
        ({"layers": 2}, None, {}, "'layers' wants scores"),
        ({"layers": 2}, {"layers": {"": torch.ones(2)}}, {}, "must be 3 finite numbers"),
        ({"layers": 1}, {"layers": {"": torch.tensor([1.0, 0, 0])}}, {}, "is in layers .1, 2., and none of them stays"),
        ({"heads": 1}, {"heads": {"0": torch.ones(3)}}, {}, r"in '0' have shape \(3,\), expected \(2,\)"),
        ({"heads": 1}, {"heads": {str(i): torch.ones(2) * torch.nan for i in range(3)}}, {}, "are not finite"),
    ],
)
def test_what_cannot_be_done_is_refused_and_nothing_changes(keep: Any, scores: Any, text: Any, words: str) -> None:
    model = make(**text)
    before, said = {k: v.clone() for k, v in model.state_dict().items()}, model.config.to_dict()
    # A group that could be cut comes first.
    with pytest.raises(ValueError, match=words):
        prune_dense(model, ({"feed_forward": 8} | keep) if keep else keep, scores)
    assert model.config.to_dict() == said
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


def test_models_that_hold_more_than_the_cut_knows_are_refused() -> None:
    torch.manual_seed(0)
    config = tiny_config(exit_layers=[1], exit_loss_coef=1.0)
    with pytest.raises(ValueError, match="exits of a classifier"):
        prune_dense(ChorusForSequenceClassification(config), {"layers": 2}, {"layers": {"": torch.ones(3)}})
    model = make()
    unfuse_experts(model)
    with pytest.raises(ValueError, match=r"'experts:text': .*fuse_experts\(\) first"):
        prune_dense(model, {"experts:text": 4})
    vision = {"architecture": "resnet10t", "image_size": 32}
    config = ChorusConfig(text_config=tiny_config().text_config.to_dict(), vision_config=vision, image_token_id=3)
    model = ChorusForConditionalGeneration(config)
    with pytest.raises(ValueError, match="unknown group 'vision_tower.feed_forward'"):
        prune_dense(model, {"vision_tower.feed_forward": 4})
    with pytest.raises(ValueError, match="has no list of layers that its configuration counts"):
        prune_dense(model, {"vision_tower.layers": 1}, {"vision_tower.layers": {"": torch.ones(4)}})


def test_magnitude_orders_units_as_torch_does() -> None:
    model = make()
    layer = model.model.language_model.layers[0].mlp
    group = dict(groups_of(model.config, "language_model", model.model.language_model))["feed_forward"]
    score = scores_of(magnitude(model.model.language_model), group)["0"]
    rows = torch.cat([layer.gate_proj.weight, layer.up_proj.weight, layer.down_proj.weight.T], dim=1)
    stack = nn.Linear(rows.shape[1], rows.shape[0], bias=False)
    stack.weight.data = rows.data
    prune.ln_structured(stack, "weight", amount=40, n=2, dim=0)
    kept = stack.weight_mask[:, 0].nonzero().flatten()
    assert score.topk(len(kept)).indices.sort().values.equal(kept)


def test_a_model_that_loses_its_memory_layers_is_one_without_memory() -> None:
    kinds = ["full_attention", "full_attention", "hybrid_sliding"]
    model = make(layer_types=kinds, sliding_window=4, num_memory_tokens=2)
    prune_dense(model, {"layers": 2}, {"layers": {"": torch.tensor([2.0, 1.0, 0.0])}})
    assert (model.config.text_config.num_memory_tokens, len(model.model.language_model.layers)) == (0, 2)
    logits(model)


def test_experts_whose_leading_part_works_alone_keep_their_units() -> None:
    with pytest.raises(ValueError, match=r"'experts:image': expert_width_shares=\[0.5, 1.0\] count the leading units"):
        prune_dense(make(expert_width_shares=[0.5, 1.0]), {"experts:image": 12})
