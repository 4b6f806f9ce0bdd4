"""PEFT's own common tests, on a tiny Chorus with text, images and sound.

Each of its tests is written for one method of PEFT after the other; here are those that say something about the model.
What a test does not apply to it skips by itself, with the reason.
"""

import inspect
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from chorus_moe import ChorusForConditionalGeneration
from chorus_moe.modeling.modeling_outputs import CACHE
from chorus_moe.surgery.processor import processor_from_config
from tests import transformers_suite
from tests.conftest import AUDIO_TOKEN, IMAGE_TOKEN, tiny_config
from tests.training.conftest import make_tokenizer

common = transformers_suite.load_peft("testing_common")
utilities = transformers_suite.load_peft("testing_utils")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]

LAYERS = (
    r".*language_model.*(self_attn\.[qo]_proj|layers\.0\.self_attn\.[kv]_proj|self_attn\.[kv]_proj\.(text|image|audio))"
)
WHOLE = {"task_type": "CAUSAL_LM", "target_modules": LAYERS}
PROMPT = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "LoRA": (peft.LoraConfig, WHOLE | {"r": 8, "lora_alpha": 32}),
    "aLoRA": (peft.LoraConfig, WHOLE | {"r": 8, "lora_alpha": 32, "alora_invocation_tokens": [9]}),
    "GraLoRA": (peft.GraloraConfig, WHOLE | {"r": 4, "alpha": 16, "gralora_k": 2}),
    "C3A": (peft.C3AConfig, WHOLE | {"block_size": 1}),
    "GLoRA": (peft.GloraConfig, WHOLE),
    "IA3": (peft.IA3Config, WHOLE | {"feedforward_modules": []}),
    "VeRA": (peft.VeraConfig, {"task_type": "CAUSAL_LM", "target_modules": r".*[qo]_proj", "r": 4}),
    "prompt tuning": (peft.PromptTuningConfig, PROMPT),
    "P-tuning": (peft.PromptEncoderConfig, PROMPT | {"encoder_hidden_size": 16}),
    "prefix tuning": (peft.PrefixTuningConfig, PROMPT),
    "CPT": (
        peft.CPTConfig,
        {
            "task_type": "CAUSAL_LM",
            "cpt_token_ids": [5, 6, 7, 8],
            "cpt_mask": [1] * 4,
            "cpt_tokens_type_mask": [1, 2, 3, 4],
        },
    ),
}
TAKEN = ("self", "model_id", "config_cls", "config_kwargs")
# Further arguments, as PEFT's file for decoders gives them.
MORE = {
    "_test_generate_pos_args": {"raises_err": False},
    "_test_passing_input_embeds_works": {"test_name": ""},
    "_test_add_adapter_no_autocast_adapter_dtype": {"dtype": torch.bfloat16},
    "_test_training_gradient_checkpointing": {"use_reentrant": False},
}
# Called by another test, with a model in the place of a name.
HELPERS = ("_test_weighted_combination_of_adapters_lora", "_test_weighted_combination_of_adapters_ia3")
NAMES = [n for n in dir(common.PeftCommonTester) if n.startswith("_test_") and n not in HELPERS]
# Those that compare with and without an adapter: PEFT's file starts it away from zero for them.
DIFFERENT = ("merge", "mixed", "unload", "disable", "weighted")
SKIPPED = {
    "_test_safe_merge": "bounds of 1e-6, which PEFT sets for custom models of few layers; test_peft.py merges",
    "_test_generate_with_mixed_adapter_batches_and_beam_search": "reads `eos_token_id` of a configuration with parts",
}
PROMPT_METHODS = ("prompt tuning", "P-tuning", "prefix tuning", "CPT")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, tokenizer = tmp_path_factory.mktemp("model"), make_tokenizer()
    torch.manual_seed(0)
    text = {"num_hidden_layers": 2, "cross_modal_layers": [1], "attention_bias": True, "initializer_range": 0.2}
    model = ChorusForConditionalGeneration(tiny_config(vocab_size=len(tokenizer), **text))
    model.generation_config.max_new_tokens = 4
    model.save_pretrained(path)
    processor_from_config(model.config, tokenizer).save_pretrained(path)
    return path


class Tester(common.PeftCommonTester):
    transformers_class = AutoModelForCausalLM
    torch_device = "cpu"

    is_text = False

    def prepare_inputs_for_testing(self) -> dict[str, torch.Tensor]:
        """Two texts with an image and a clip each; of text alone where a test passes on nothing but the ids."""
        if self.is_text:
            return {"input_ids": torch.tensor([[5, 6, 7], [5, 8, 9]]), "attention_mask": torch.ones(2, 3)}
        generator = torch.Generator().manual_seed(1)
        row = [7, *[IMAGE_TOKEN] * 4, 9, 8, *[AUDIO_TOKEN] * 3, 6, 10]
        input_ids = torch.tensor([row, row[:-1] + [11]])
        return {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "mm_token_type_ids": (input_ids == IMAGE_TOKEN).long() + 3 * (input_ids == AUDIO_TOKEN).long(),
            "pixel_values": torch.randn(2, 3, 32, 32, generator=generator),
            "input_features": torch.randn(2, 12, 16, generator=generator),
        }


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_common(name: str, method: str, folder: Path) -> None:
    config_cls, config_kwargs = METHODS[method]
    if method in PROMPT_METHODS and CACHE != "past_key_values" and peft.__version__.startswith(("0.20.", "0.21.")):
        pytest.skip("PEFT up to 0.21 does not know the name of the cache in this transformers")
    if name in SKIPPED:
        pytest.skip(SKIPPED[name])
    if method in PROMPT_METHODS and name == "_test_load_model_low_cpu_mem_usage":
        pytest.skip("PEFT runs it for tuners of layers only")
    tester = Tester()
    tester.is_text = name == "_test_generate_pos_args"
    if any(part in name for part in DIFFERENT):
        config_kwargs = utilities.set_init_weights_false(config_cls, config_kwargs)
    if name == "_test_training_layer_indexing" and "target_modules" in config_kwargs:
        config_kwargs = config_kwargs | {"target_modules": ["q_proj", "o_proj"]}
    test = getattr(tester, name)
    assert set(inspect.signature(test).parameters) - {*TAKEN, *MORE.get(name, {})} <= {"safe_serialization"}
    given = {"model_id": str(folder), "config_cls": config_cls, "config_kwargs": dict(config_kwargs)}
    test(**given | MORE.get(name, {}))
