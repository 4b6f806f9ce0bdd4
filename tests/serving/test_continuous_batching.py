"""transformers' continuous batching on text, against `generate`."""

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig

from chorus_moe import ChorusForConditionalGeneration
from tests.conftest import AUDIO_TOKEN, IMAGE_TOKEN, tiny_config

PROMPTS = [[5, 6, 7, 8], [9, 10, 11, 12, 13, 14, 15], [20, 21]]
WINDOWS = {"layer_types": ["sliding_attention", "full_attention", "full_attention"], "sliding_window": 4}


@pytest.mark.parametrize("text", [{}, WINDOWS], ids=["full", "sliding"])
def test_continuous_batching_writes_what_generate_writes(text: dict[str, object]) -> None:
    torch.manual_seed(0)
    model = ChorusForConditionalGeneration(tiny_config(initializer_range=0.2, **text)).eval()
    config = GenerationConfig(
        max_new_tokens=6, do_sample=False, suppress_tokens=[IMAGE_TOKEN, AUDIO_TOKEN], pad_token_id=0
    )
    expected = [model.generate(torch.tensor([p]), generation_config=config)[0, len(p) :].tolist() for p in PROMPTS]
    # Without sizes of its own the cache takes a share of all memory.
    sizes = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=256)
    found = model.generate_batch(PROMPTS, generation_config=config, continuous_batching_config=sizes)
    assert [answer.generated_tokens for answer in found.values()] == expected
