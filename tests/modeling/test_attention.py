"""Ordinary and cross-modal attention: who projects what, and one result on every path and backend."""

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from chorus_moe import ChorusForConditionalGeneration
from chorus_moe.fastpaths import attention_blocks, attention_queries
from chorus_moe.modeling.attention import Attention, CrossModalAttention, ModalityProjection, rotary_tables, rotate
from chorus_moe.modeling.configuration_modalities import MODALITY_IDS
from chorus_moe.modeling.moe_plan import ForwardPlan
from tests.conftest import moved, tiny_batch, tiny_config
from tests.modeling.conftest import windowed_model

# float32 sums in another order: worst difference of logits between backends seen over four seeds is 2.1e-7.
ATOL = 5e-6
MODALITIES = torch.tensor([[0, 1, 1, 3, 0], [3, 0, 0, 0, 1]])


def plans() -> dict[str, ForwardPlan]:
    return {
        "rows": ForwardPlan.build(MODALITIES, None),
        "static": ForwardPlan(MODALITIES.reshape(-1), None, is_static=True),
    }


@pytest.mark.parametrize("heads", [3, 8, 16])
def test_rotated_states_are_llamas(heads: int) -> None:
    torch.manual_seed(0)
    states, angles = torch.randn(2, heads, 5, 8), torch.rand(2, 5, 4) * 6
    angles = torch.cat((angles, angles), dim=-1)
    expected, _ = apply_rotary_pos_emb(states, states, angles.cos(), angles.sin())
    # The same products, summed in another order.
    torch.testing.assert_close(rotate(states, rotary_tables(angles.cos(), angles.sin())), expected, rtol=0, atol=1e-6)


def projection() -> ModalityProjection:
    torch.manual_seed(0)
    return ModalityProjection(8, 6, True, tuple(MODALITY_IDS))


def test_a_cross_modal_layer_has_one_query_projection_and_a_key_and_value_projection_a_modality():
    layers = ChorusForConditionalGeneration(tiny_config()).model.language_model.layers
    assert [type(layer.self_attn) for layer in layers] == [Attention, Attention, CrossModalAttention]
    assert isinstance(layers[2].self_attn.q_proj, nn.Linear)
    assert list(layers[2].self_attn.k_proj) == list(layers[2].self_attn.v_proj) == ["text", "image", "audio"]


def test_the_ablation_unties_the_query():
    layers = ChorusForConditionalGeneration(tiny_config(share_cross_modal_query=False)).model.language_model.layers
    assert list(layers[2].self_attn.q_proj) == ["text", "image", "audio"]
    assert isinstance(layers[1].self_attn.q_proj, nn.Linear)


@pytest.mark.parametrize("path", ["rows", "static"])
def test_each_token_goes_through_the_projection_of_its_modality(path: str):
    module, hidden = projection(), torch.randn(2, 5, 8)
    found = module(hidden, plans()[path])
    names = {0: "text", 1: "image", 3: "audio"}
    for index, modality in enumerate(MODALITIES.flatten().tolist()):
        expected = module[names[modality]](hidden.view(-1, 8)[index])
        torch.testing.assert_close(found.view(-1, 6)[index], expected, rtol=0, atol=ATOL)


def test_both_paths_have_the_same_gradients():
    results = []
    for plan in plans().values():
        module, hidden = projection(), torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
        hidden.requires_grad_()
        module(hidden, plan).square().sum().backward()
        results.append([hidden.grad, *(parameter.grad for parameter in module.parameters())])
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=ATOL)


@pytest.mark.parametrize("modality", [0, 1])
def test_a_projection_without_tokens_stays_in_the_graph(modality: int):
    module = projection()
    module(torch.randn(1, 4, 8), ForwardPlan.build(torch.full((1, 4), modality), None)).sum().backward()
    for name, layer in module.items():
        assert layer.weight.grad is not None, name
        assert layer.weight.grad.any() == (name == ("text", "image")[modality])


def changed_tokens(model: ChorusForConditionalGeneration, batch: dict[str, Tensor], parameter: str) -> Tensor:
    """Which real tokens' keys change with a parameter of the last layer. (Padding starts from a zero embedding.)"""
    keys = []
    with torch.no_grad():
        for _ in range(2):
            output = model.model(**{k: v for k, v in batch.items() if k != "labels"}, output_cross_modal_states=True)
            keys.append(output.cross_modal_states[0][1].transpose(1, 2).flatten(2))
            model.get_parameter(f"model.language_model.layers.2.self_attn.{parameter}.weight").mul_(2.0)
    return moved(*keys)


@pytest.mark.parametrize(("name", "value"), [("text", 0), ("image", 1), ("audio", 3)])
def test_keys_of_a_modality_come_from_its_own_projection(
    model: ChorusForConditionalGeneration, batch: dict[str, Tensor], name: str, value: int
):
    changed = changed_tokens(model, batch, f"k_proj.{name}")
    real = batch["attention_mask"].bool()
    assert torch.equal(changed[real], (batch["mm_token_type_ids"] == value)[real])


def test_text_reads_an_image_only_where_it_follows(model: ChorusForConditionalGeneration, batch: dict[str, Tensor]):
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        before = model(**inputs).logits
        inputs["pixel_values"] = inputs["pixel_values"] + torch.randn_like(inputs["pixel_values"])
        after = model(**inputs).logits
    reached = moved(before, after)
    assert not reached[0, :2].any()
    assert reached[0, 6:].all()
    assert not reached[1].any()


def test_a_sliding_layer_sees_its_window_only():
    torch.manual_seed(0)
    kinds = ["sliding_attention"] * 2
    config = tiny_config(num_hidden_layers=2, layer_types=kinds, sliding_window=3, cross_modal_layers=[])
    model = ChorusForConditionalGeneration(config).eval()
    input_ids = torch.randint(5, 128, (1, 12))
    other = input_ids.clone()
    other[0, 0] = 9 if input_ids[0, 0] != 9 else 10
    with torch.no_grad():
        reached = moved(model(input_ids=input_ids).logits, model(input_ids=other).logits)[0]
    assert reached[:5].all()  # two layers of a window of three reach four tokens back
    assert not reached[5:].any()


def test_a_bidirectional_model_reads_what_follows():
    model = ChorusForConditionalGeneration(tiny_config(is_causal=False)).eval()
    input_ids = torch.randint(5, 128, (1, 6))
    other = input_ids.clone()
    other[0, -1] = 9 if input_ids[0, -1] != 9 else 10
    with torch.no_grad():
        assert moved(model(input_ids=input_ids).logits, model(input_ids=other).logits).all()


@pytest.mark.parametrize("num_global", [0, 3])
def test_a_long_input_of_a_bidirectional_model_with_windows_reads_what_follows(
    num_global: int, monkeypatch: pytest.MonkeyPatch
):
    """The chunks of a long prefill cut off what stands behind them, so they are for causal models alone."""
    monkeypatch.setattr(attention_queries, "CHUNK", 10)
    monkeypatch.setattr(attention_blocks, "WINDOWS_THAT_PAY", 2)
    input_ids = torch.randint(5, 128, (2, 37), generator=torch.Generator().manual_seed(0))
    options = {"is_causal": False, "num_global_tokens": num_global}
    with torch.no_grad():
        expected, in_blocks, by_rule = (
            windowed_model(name, **options)(input_ids=input_ids).logits for name in ("eager", "block_local", "sdpa")
        )
    for found in (in_blocks, by_rule):
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "attention", ["eager", pytest.param("flex_attention", marks=[pytest.mark.slow, pytest.mark.timeout(400)])]
)
@pytest.mark.parametrize("sliding", [False, True])
def test_backends_agree_on_real_tokens(attention: str, sliding: bool):
    if attention == "flex_attention" and sliding:
        pytest.skip("one compilation of flex_attention on the CPU takes minutes; the full mask covers the path")
    # torch 2.14: against a dense mask, differences of 2 and NaN in samples that are padded on the left.
    if attention == "flex_attention" and torch.backends.cpu.get_cpu_capability() == "AVX2":
        pytest.skip("flex_attention reads memory that nothing wrote on processors without AVX-512")
    kinds = ["sliding_attention", "full_attention", "sliding_attention"] if sliding else None
    logits = []
    for name in ("sdpa", attention):
        torch.manual_seed(0)
        config = tiny_config(layer_types=kinds, sliding_window=5 if sliding else None)
        model = ChorusForConditionalGeneration._from_config(config, attn_implementation=name).eval()
        assert model.model.language_model.config._attn_implementation == name
        batch = tiny_batch(config)
        with torch.no_grad():
            logits.append(model(**batch).logits[batch["attention_mask"].bool()])
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=ATOL)


def test_eager_attention_returns_the_map_of_every_layer():
    model = ChorusForConditionalGeneration._from_config(tiny_config(), attn_implementation="eager").eval()
    with torch.no_grad():
        maps = model(**tiny_batch(model.config), output_attentions=True).attentions
    assert [tuple(m.shape) for m in maps] == [(3, 4, 24, 24)] * 3


@pytest.mark.parametrize(
    "options",
    [
        {"use_qk_norm": True},
        {"use_qk_norm": True, "qk_norm_scope": "projection"},
        {"norm_placement": "post"},
        {"no_rope_layers": [1, 0, 0]},
        {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True},
        {"head_dim": 32},
    ],
)
def test_variants_of_the_llama_family_run(options: dict):
    model = ChorusForConditionalGeneration(tiny_config(**options)).train()
    model(**tiny_batch(model.config)).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_layer_without_rotation_knows_no_positions_but_the_causal_order():
    model = ChorusForConditionalGeneration(tiny_config(no_rope_layers=[0, 0, 0])).eval()
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        spread = model(input_ids=ids, position_ids=torch.arange(0, 100, 10)[None]).logits
    assert torch.equal(spread, plain)


def test_heads_with_a_common_norm_are_not_spread_over_ranks():
    plan = tiny_config(use_qk_norm=True, qk_norm_scope="projection").text_config.base_model_tp_plan
    assert not [rule for rule in plan if "self_attn" in rule]
    assert [rule for rule in tiny_config(use_qk_norm=True).text_config.base_model_tp_plan if "self_attn" in rule]
