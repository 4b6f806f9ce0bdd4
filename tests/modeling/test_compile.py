"""`torch.compile(fullgraph=True)` sees no data-dependent shape and computes what eager computes."""

import pytest
import torch
from torch import Tensor

from chorus_moe import ChorusForConditionalGeneration

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
def test_raw_images_compile_in_one_graph(model: ChorusForConditionalGeneration, batch: dict[str, Tensor]):
    inputs = {name: batch[name][:1] for name in ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values")}
    with torch.no_grad():
        expected = model(**inputs, use_cache=False).logits
        found = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=ATOL)
