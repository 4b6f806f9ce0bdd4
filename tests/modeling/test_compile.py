"""`torch.compile(fullgraph=True)` sees no data-dependent shape and computes what eager computes."""

import pytest
import torch
from torch import Tensor

from chorus_moe import ChorusForConditionalGeneration
from tests.conftest import tiny_config

# Every bank sees every row under compilation, so float32 sums run in another order, at logits of size 1.
ATOL = 1e-5


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text", "multimodal"])
def test_a_full_graph_equals_eager(model: ChorusForConditionalGeneration, batch: dict[str, Tensor], kind: str):
    if kind == "text":
        names = ("input_ids", "attention_mask")
        batch["input_ids"] = batch["input_ids"].masked_fill(batch["mm_token_type_ids"] > 0, 7)
    else:
        names = ("input_ids", "attention_mask", "mm_token_type_ids")
    inputs = {name: batch[name] for name in names}
    with torch.no_grad():
        if kind == "multimodal":
            inputs["mm_encoder_outputs"] = {
                "image": model.get_image_features(batch["pixel_values"]),
                "audio": model.get_audio_features(batch["input_features"], batch["input_features_mask"]),
            }
        expected = model(**inputs, use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        found = compiled(**inputs, use_cache=False).logits
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], rtol=0, atol=ATOL)


@pytest.mark.slow
@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm"])
def test_routing_options_compile_in_one_graph(batch: dict[str, Tensor], experts: str):
    banks = {
        "text": {"router": "sigmoid", "num_groups": 2, "topk_groups": 1},
        "image": {"router": "attention", "adaptive_experts": True},
        "common": {"balance": "bias", "adaptive_experts": True, "routed_scaling_factor": 2.0},
    }
    torch.manual_seed(0)
    model = ChorusForConditionalGeneration(tiny_config(expert_banks=banks)).eval()
    model.set_experts_implementation(experts)
    names = ("input_ids", "attention_mask", "mm_token_type_ids")
    inputs = {name: batch[name] for name in names} | {"expert_budget": {"text": 1}, "use_cache": False}
    inputs["input_ids"] = batch["input_ids"].masked_fill(batch["mm_token_type_ids"] > 0, 7)
    inputs["complexity_scores"] = torch.rand(3, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
        inputs["mm_token_type_ids"] = batch["mm_token_type_ids"]
        expected = model(**inputs).logits
        found = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs).logits
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], rtol=0, atol=ATOL)


@pytest.mark.slow
def test_raw_images_compile_in_one_graph(model: ChorusForConditionalGeneration, batch: dict[str, Tensor]):
    inputs = {name: batch[name][:1] for name in ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values")}
    with torch.no_grad():
        expected = model(**inputs, use_cache=False).logits
        found = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=ATOL)
