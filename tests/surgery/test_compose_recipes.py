"""Where each tensor of a composed model comes from, with parents that note what is read of them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from chorus_moe import ChorusForConditionalGeneration
from chorus_moe.surgery.compose_recipes import RecipeFinder, Tower, _grown
from chorus_moe.surgery.compose_upcycling import UpcyclingOptions
from chorus_moe.surgery.parent_text import ParentText
from tests.conftest import tiny_config


class Checkpoint:
    """A parent's file: each tensor is made of its name's length, and reading is noted."""

    def __init__(self, config: Any, shapes: dict[str, tuple[int, ...]]) -> None:
        self.config, self.shapes = config, shapes
        self.read_names: list[str] = []

    def read(self, name: str) -> Tensor:
        self.read_names.append(name)
        generator = torch.Generator().manual_seed(len(name) + sum(map(ord, name)))
        return torch.randn(self.shapes.get(name, (96, 64)), generator=generator)


def parent_config(**values: Any) -> Any:
    given = {"model_type": "llama", "vocab_size": 120, "hidden_size": 64, "intermediate_size": 96, "clip_qkv": None}
    given |= {"rope_parameters": None, "num_hidden_layers": 3, "tie_word_embeddings": False}
    return SimpleNamespace(**given | values)


DOWN = {f"model.layers.{layer}.mlp.down_proj.weight": (64, 96) for layer in range(3)}


def finder(
    text: dict[str, Any] | None = None, options: dict[str, Any] | None = None, **parent: Any
) -> tuple[RecipeFinder, Checkpoint]:
    config: Any = parent_config(**parent)
    checkpoint: Any = Checkpoint(config, DOWN)
    chorus = tiny_config(moe_intermediate_size=96, **(text or {}))
    towers = {"image": Tower(chorus.vision_config), "audio": Tower(chorus.audio_config)}
    found = RecipeFinder(
        ParentText(checkpoint), towers, UpcyclingOptions(**(options or {})), seed=0, config=chorus.text_config
    )
    return found, checkpoint


def model_of(found: RecipeFinder) -> ChorusForConditionalGeneration:
    config = tiny_config(moe_intermediate_size=96)
    config.text_config = found.config
    with torch.device("meta"):
        return ChorusForConditionalGeneration(config)


def test_a_dense_parent_gives_all_but_routers_gates_connectors_and_towers() -> None:
    found, _ = finder()
    model = model_of(found)
    recipes = found.recipes(model)
    new = {name for name in model.state_dict() if name not in recipes}
    marks = (".router.", ".bank_gate.", "_connector.", "_tower.")
    assert new == {name for name in model.state_dict() if any(mark in name for mark in marks)}
    # Shapes of the parent: its table has fewer rows, and of a projection by modality there is one.
    assert found.used["model.embed_tokens.weight"] == found.used["lm_head.weight"] == (120, 64)
    assert found.used["model.layers.2.self_attn.k_proj.weight"] == (32, 64)
    for layer in (1, 2):
        assert found.used[f"model.layers.{layer}.mlp.gate_proj.weight"] == (96, 64)
        assert found.used[f"model.layers.{layer}.mlp.down_proj.weight"] == (64, 96)


def test_a_mixture_gives_its_routers_and_each_expert() -> None:
    found, checkpoint = finder(
        {"shared_expert_intermediate_size": 0},
        model_type="qwen3_moe", num_experts=4, moe_intermediate_size=96, router_aux_loss_coef=0.1,
    )  # fmt: skip
    recipes = found.recipes(model_of(found))
    name = "model.language_model.layers.1.mlp.banks.text."
    (router,) = recipes[f"{name}router.weight"]()
    assert checkpoint.read_names == ["model.layers.1.mlp.gate.weight"] and found.used[checkpoint.read_names[0]] == (
        4,
        64,
    )
    assert torch.equal(router, checkpoint.read("model.layers.1.mlp.gate.weight"))
    checkpoint.read_names.clear()
    pieces = list(recipes[f"{name}experts.gate_up_proj"]())
    expected = [f"model.layers.1.mlp.experts.{e}.{kind}_proj.weight" for e in range(4) for kind in ("gate", "up")]
    assert checkpoint.read_names == expected and len(pieces) == 8
    for expert in range(4):
        for kind, shape in (("gate", (96, 64)), ("up", (96, 64)), ("down", (64, 96))):
            assert found.used[f"model.layers.2.mlp.experts.{expert}.{kind}_proj.weight"] == shape


def test_a_bias_of_a_router_a_gate_of_a_bank_and_deeper_experts_are_new() -> None:
    everyone = ["text", "image", "audio"]
    banks = {"common": {"modalities": everyone, "balance": "bias", "router": "sigmoid"},
             "late": {"modalities": everyone, "gate": "own", "expert_depth": 2}}  # fmt: skip
    found, _ = finder({"expert_banks": banks}, model_type="mixtral", num_local_experts=4, router_aux_loss_coef=0.1)
    model = model_of(found)
    recipes, names = found.recipes(model), set(model.state_dict())
    within = {name.partition(".banks.")[2] for name in names - recipes.keys() if ".banks." in name}
    assert any(name.startswith("late.gate.") for name in within)
    assert all(name.startswith(("late.gate", "late.deeper_experts", "common.router", "late.router")) for name in within)
    assert not any(name.endswith("router.weight") for name in within) and len(within) >= 3
    assert found.used["model.layers.1.block_sparse_moe.experts.3.w2.weight"] == (64, 96)


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_noise_comes_of_the_seed_and_the_name_and_a_recipe_can_be_called_twice(noise: float) -> None:
    made = []
    for _ in range(2):
        found, _ = finder(options={"expert_noise": noise})
        recipes = found.recipes(model_of(found))
        names = [f"model.language_model.layers.1.mlp.banks.{bank}.experts.down_proj" for bank in ("text", "image")]
        made += [[torch.stack(list(recipes[name]())) for name in names] for _ in range(2)]
    for other in made[1:]:
        assert all(torch.equal(a, b) for a, b in zip(made[0], other, strict=True))
    text, image = made[0]
    assert torch.equal(text, image) == (noise == 0) and torch.equal(text[0], text[1]) == (noise == 0)
    plain = Checkpoint(None, DOWN).read("model.layers.1.mlp.down_proj.weight")
    deviation = float((text[0] - plain).square().mean().sqrt() / plain.square().mean().sqrt())
    assert deviation == pytest.approx(noise, rel=0.05)


@pytest.mark.parametrize("extra", [0, -3, 1, 5])
def test_new_rows_of_a_table_are_the_mean_in_double_precision(extra: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chorus_moe.surgery.compose_recipes.ROWS_AT_ONCE", 4)
    # In bfloat16 a sum stops at 256.
    table = torch.ones(1001, 2, dtype=torch.bfloat16) * torch.tensor([1.0, 3.0], dtype=torch.bfloat16)
    checkpoint: Any = SimpleNamespace(read=lambda name: table)
    pieces = list(_grown(checkpoint, "t", extra))
    assert pieces[0] is table and len(pieces) == (2 if extra > 0 else 1)
    if extra > 0:
        assert pieces[1].tolist() == [[1.0, 3.0]] * extra and pieces[1].dtype == torch.bfloat16


class Encoder:
    def __init__(self) -> None:
        self.reads = 0

    def tensors(self) -> dict[str, Tensor]:
        self.reads += 1
        return {"a": torch.zeros(2), "b": torch.ones(3)}


def test_an_encoder_is_read_for_its_first_tensor_and_again_for_a_second_round() -> None:
    config = tiny_config().vision_config
    parent: Any = Encoder()
    tower = Tower(config, parent)
    assert tower.config is not config and tower.config.to_dict() == config.to_dict()
    for reads in (1, 2):
        assert next(tower.take("a", (2,))).tolist() == [0, 0]
        assert next(tower.take("b", (3,))).tolist() == [1, 1, 1]
        assert parent.reads == reads and not tower._left
    with pytest.raises(ValueError, match="the encoder has no tensor 'c' among 2"):
        next(tower.take("c", (1,)))
    with pytest.raises(ValueError, match=r"the encoder's tensor 'b' is \(3,\), expected \(2,\)"):
        next(tower.take("b", (2,)))


def test_a_tower_with_a_parent_is_taken_and_the_other_is_new() -> None:
    found, _ = finder()
    parent: Any = Encoder()
    found.towers["image"] = Tower(tiny_config().vision_config, parent)
    recipes = found.recipes(model_of(found))
    names = [name for name in recipes if "_tower." in name]
    assert names and all(name.startswith("model.vision_tower.") for name in names)
    with pytest.raises(ValueError, match="the encoder has no tensor 'timm_model"):
        next(recipes[names[0]]())
