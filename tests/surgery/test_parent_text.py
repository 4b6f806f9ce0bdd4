"""Which text models can be parents, and what is read from them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, GPT2Config, GPT2LMHeadModel

from chorus_moe.surgery.parent_checkpoint import ParentCheckpoint
from chorus_moe.surgery.parent_text import ParentText
from tests.modeling.text_parents import LLAMA3, save_parent, text_difference
from tests.parents import build


def settings_of(folder: Path, model_type: str = "llama", **settings: Any) -> dict[str, Any]:
    save_parent(folder, model_type, **settings)
    return ParentText(ParentCheckpoint(folder)).settings()


def edit_tensors(folder: Path, **changes: Any) -> None:
    """Replace tensors by name, `__` for a dot; None removes one."""
    path = folder / "model.safetensors"
    named = {name.replace("__", "."): tensor for name, tensor in changes.items()}
    kept = {name: tensor for name, tensor in load_file(path).items() if name not in named}
    save_file(kept | {name: tensor for name, tensor in named.items() if tensor is not None}, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("model_type", "settings", "expected"),
    [
        ("llama", {"attention_bias": True}, {"attention_bias": True, "attention_output_bias": True}),
        ("qwen2", {}, {"attention_bias": True, "attention_output_bias": False}),
        ("qwen3", {"head_dim": 16}, {"use_qk_norm": True, "head_dim": 16, "attention_output_bias": False}),
        ("olmo2", {}, {"use_qk_norm": True, "qk_norm_scope": "projection", "norm_placement": "post"}),
        ("mistral", {"sliding_window": 7}, {"sliding_window": 7, "layer_types": ["sliding_attention"] * 4}),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 0]}, {"no_rope_layers": [1, 0, 1, 0]}),
        ("llama", {"rope_parameters": LLAMA3}, {"rope_parameters": LLAMA3}),
        ("olmoe", {"num_experts": 4, "router_aux_loss_coef": 0.03}, {"router_aux_loss_coef": 0.03}),
    ],
)
def test_the_configuration_is_read_from_the_parent(
    model_type: str, settings: dict[str, Any], expected: dict[str, Any], tmp_path: Path
):
    found = settings_of(tmp_path, model_type, **settings)
    assert {name: found.get(name) for name in expected} == expected


def test_a_padding_token_of_minus_one_is_none(tmp_path: Path):
    save_parent(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text()) | {"pad_token_id": -1}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert "pad_token_id" not in ParentText(ParentCheckpoint(tmp_path)).settings()


def test_another_kind_of_model_is_refused_with_the_difference_and_the_list(tmp_path: Path):
    GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20)).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"model_type='gpt2' \(learned positions, .*Supported are \['llama', 'mistral'"
    ):
        ParentText(ParentCheckpoint(tmp_path))


@pytest.mark.parametrize(
    ("model_type", "settings", "message"),
    [
        ("olmoe", {"clip_qkv": 8.0, "num_experts": 4}, "clip_qkv=8.0 is not supported"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor=0.5 is not supported",
        ),
    ],
)
def test_an_option_that_the_decoder_lacks_is_refused(
    model_type: str, settings: dict[str, Any], message: str, tmp_path: Path
):
    with pytest.raises(ValueError, match=message):
        settings_of(tmp_path, model_type, **settings)


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({"model__norm__weight": None}, "no tensor 'model.norm.weight'"),
    "of another shape": (
        {"model__layers__1__mlp__up_proj__weight": torch.zeros(40, 32)},
        r"'model.layers.1.mlp.up_proj.weight' is \(40, 32\), expected \(48, 32\)",
    ),
    "left over": (
        {"model__layers__0__self_attn__q_proj__bias": torch.zeros(32)},
        "1 tensors have no place in the decoder, such as 'model.layers.0.self_attn.q_proj.bias'",
    ),
    "whole numbers": (
        {"model__norm__weight": torch.zeros(32, dtype=torch.int8)},
        "'model.norm.weight' is I8",
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_tensor_that_does_not_fit_is_named_before_anything_is_read(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    save_parent(tmp_path)
    changes, message = CHANGES[case]
    edit_tensors(tmp_path, **changes)
    monkeypatch.setattr(ParentCheckpoint, "read", lambda self, name: pytest.fail(f"read {name}"))
    with pytest.raises(ValueError, match=message):
        build(tmp_path)


def test_tables_that_old_checkpoints_store_are_passed_by(tmp_path: Path):
    parent = save_parent(tmp_path)
    edit_tensors(tmp_path, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4))
    model = build(tmp_path)
    assert text_difference(model, parent) < 1e-5


def test_a_head_stored_beside_tied_embeddings_is_passed_by(tmp_path: Path):
    parent = save_parent(tmp_path, tie_word_embeddings=True)
    edit_tensors(tmp_path, lm_head__weight=torch.ones(96, 32))
    assert text_difference(build(tmp_path), parent) < 1e-5


def test_the_sparse_layers_of_qwen3_moe_follow_its_step(tmp_path: Path):
    save_parent(tmp_path, "qwen3_moe", num_experts=4, moe_intermediate_size=8, decoder_sparse_step=2)
    parent = ParentText(ParentCheckpoint(tmp_path))
    assert (parent.sparse_layers, parent.num_experts, parent.expert_size) == ([1, 3], 4, 8)
    assert AutoConfig.from_pretrained(tmp_path).decoder_sparse_step == 2


@pytest.mark.parametrize(
    ("model_type", "settings"), [("mixtral", {"num_local_experts": 2}), ("olmoe", {"num_experts": 2})]
)
def test_the_names_of_a_mixtures_experts_are_those_of_its_file(
    model_type: str, settings: dict[str, Any], tmp_path: Path
):
    save_parent(tmp_path, model_type, **settings)
    parent = ParentText(ParentCheckpoint(tmp_path))
    saved = {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    inner, hidden = parent.config.intermediate_size, parent.config.hidden_size
    assert [saved[name] for name in parent.expert_weights(1, 1)] == [(inner, hidden), (inner, hidden), (hidden, inner)]
    assert saved[parent.router_weight(1)] == (2, hidden)
