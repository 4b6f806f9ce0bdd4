"""Methods of PEFT beside LoRA: adapters that want sequences, virtual tokens, and the names of layers."""

import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from chorus_moe import ChorusForConditionalGeneration
from chorus_moe.modeling.attention import ModalityProjection
from chorus_moe.modeling.modeling_outputs import CACHE
from chorus_moe.training.lora import lora_config
from tests.conftest import tiny_batch, tiny_config

# All projections of attention by their names, those of a cross-modal layer one by one.
LAYERS = r".*(self_attn\.[qo]_proj|layers\.0\.self_attn\.[kv]_proj|self_attn\.[kv]_proj\.(text|image|audio))"
TASK = "CAUSAL_LM"
# PEFT 0.21 looks for the cache under its old name in every step of `generate`.
KNOWS_THE_CACHE = CACHE == "past_key_values" or not peft.__version__.startswith("0.21.")


def make(**text: Any) -> ChorusForConditionalGeneration:
    torch.manual_seed(0)
    # PEFT takes the first matrix with as many rows as the vocabulary for the embedding.
    config = tiny_config(vocab_size=131, num_hidden_layers=2, cross_modal_layers=[1], **text)
    model = ChorusForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    return model


def inputs(model: Any, with_labels: bool = False) -> dict[str, Tensor]:
    batch = tiny_batch(model.config)
    return batch if with_labels else {name: value for name, value in batch.items() if name != "labels"}


ADAPTERS: dict[str, Any] = {
    "LoRA": lambda names: peft.LoraConfig(target_modules=names, init_lora_weights=False),
    "aLoRA": lambda names: peft.LoraConfig(
        target_modules=names, init_lora_weights=False, task_type=TASK, alora_invocation_tokens=[7]
    ),
    "GraLoRA": lambda names: peft.GraloraConfig(target_modules=names, r=4, gralora_k=2, init_weights=False),
    "C3A": lambda names: peft.C3AConfig(target_modules=names, block_size=16, init_weights="gaussian"),
    "GLoRA": lambda names: peft.GloraConfig(target_modules=names, init_weights=False),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_on_every_projection_trains_and_merges(name: str):
    model = make()
    batch = inputs(model, with_labels=True)
    batch["input_ids"] = batch["input_ids"].index_fill(1, torch.tensor([18]), 7)  # where aLoRA begins
    with torch.no_grad():
        before = model(**batch).logits
    adapted = peft.get_peft_model(model, ADAPTERS[name](LAYERS))
    adapted(**batch).loss.backward()
    gradients = {n: p.grad for n, p in adapted.named_parameters() if p.requires_grad}
    assert any("v_proj.image" in n for n in gradients) and any("layers.0.self_attn.k_proj" in n for n in gradients)
    assert all(gradient is not None for gradient in gradients.values())
    with torch.no_grad():
        found = adapted(**batch).logits
    assert not torch.allclose(found, before, atol=1e-4)
    if name == "aLoRA":  # it holds from its token on, which no merged weight can
        assert torch.equal(found[:, :18], before[:, :18])
        return
    merged = adapted.merge_and_unload()
    with torch.no_grad():
        # float32 products in another order.
        torch.testing.assert_close(merged(**batch).logits, found, rtol=0, atol=1e-4)


def test_each_sample_of_a_batch_has_its_own_adapter():
    adapted = peft.get_peft_model(make(), ADAPTERS["LoRA"](LAYERS), adapter_name="a")
    adapted.add_adapter("b", ADAPTERS["LoRA"](LAYERS))
    adapted.eval()
    batch, names = inputs(adapted), ["a", "__base__", "b"]
    with torch.no_grad():
        found = adapted(**batch, adapter_names=names).logits
        for sample, name in enumerate(names):
            if name == "__base__":
                with adapted.disable_adapter():
                    expected = adapted(**batch).logits
            else:
                adapted.set_adapter(name)
                expected = adapted(**batch).logits
            torch.testing.assert_close(found[sample], expected[sample], rtol=0, atol=1e-5)


VIRTUAL: dict[str, Any] = {
    "prompt tuning": peft.PromptTuningConfig(task_type=TASK, num_virtual_tokens=4),
    "P-tuning": peft.PromptEncoderConfig(task_type=TASK, num_virtual_tokens=4, encoder_hidden_size=16),
    "CPT": peft.CPTConfig(
        task_type=TASK, cpt_token_ids=[5, 6, 7, 8], cpt_mask=[1] * 4, cpt_tokens_type_mask=[1, 2, 3, 4]
    ),
    "prefix tuning": peft.PrefixTuningConfig(task_type=TASK, num_virtual_tokens=4),
}


@pytest.mark.parametrize("name", VIRTUAL)
@pytest.mark.parametrize("given", [True, False], ids=["modalities given", "modalities found"])
def test_virtual_tokens_stand_before_a_text_with_media(name: str, given: bool):
    adapted = peft.get_peft_model(make(), VIRTUAL[name]).eval()
    batch = inputs(adapted)
    if not given:
        if name != "prefix tuning":
            pytest.skip("PEFT gives embeddings, where only mm_token_type_ids say what is an image")
        del batch["mm_token_type_ids"]
    with torch.no_grad():
        forward = adapted(**batch).logits[:, -1]
    if not KNOWS_THE_CACHE and name == "prefix tuning":
        # PEFT hands over its prefix beside the cache that `generate` made.
        with pytest.raises(ValueError, match="both given"):
            adapted.generate(**batch, max_new_tokens=3)
        return
    if not KNOWS_THE_CACHE:
        pytest.skip("this PEFT does not know the cache of this transformers")
    options = {"do_sample": False, "max_new_tokens": 3, "return_dict_in_generate": True, "output_logits": True}
    found = adapted.generate(**batch, **options)
    # The third sample has padding in front, which is no position in `generate`: a prefix is as far as positions say.
    torch.testing.assert_close(found.logits[0][:2], forward[:2], rtol=0, atol=1e-4)
    assert found.sequences.shape == (3, batch["input_ids"].shape[1] + 3)
    if name != "prefix tuning":  # which is a cache
        without_cache = adapted.generate(**batch, **options | {"use_cache": False})
        assert torch.equal(found.sequences, without_cache.sequences)


@pytest.mark.parametrize("name", ["prompt tuning", "P-tuning"])
def test_virtual_tokens_are_trained_beside_every_loss(name: str):
    adapted = peft.get_peft_model(make(alignment_loss_coef=0.1, router_z_loss_coef=0.1), VIRTUAL[name]).train()
    adapted(**inputs(adapted, with_labels=True)).loss.backward()
    gradients = [p.grad for p in adapted.parameters() if p.requires_grad]
    assert gradients and all(gradient.abs().sum() > 0 for gradient in gradients)


def test_virtual_tokens_are_text():
    """Their rows go where the rows of text go: the embeddings of real words in their place give the same."""
    model = make()
    batch = inputs(model)
    words = torch.tensor([[5, 6, 7, 8]]).expand(3, -1)
    adapted = peft.get_peft_model(make(), VIRTUAL["prompt tuning"]).eval()
    embeddings = adapted.prompt_encoder["default"].embedding.weight
    embeddings.data.copy_(model.get_input_embeddings().weight[words[0]])
    longer = dict(batch)
    longer["input_ids"] = torch.cat((words, batch["input_ids"]), dim=1)
    longer["attention_mask"] = torch.cat((torch.ones_like(words), batch["attention_mask"]), dim=1)
    del longer["mm_token_type_ids"]
    with torch.no_grad():
        found, expected = adapted(**batch).logits, model(**longer).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_usual_names_work_where_no_layer_is_cross_modal():
    model = ChorusForConditionalGeneration(tiny_config(cross_modal_layers=[]))
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    assert sum(hasattr(module, "lora_A") for module in adapted.modules()) == 2 * 3


def test_the_error_about_usual_names_says_which_names_work():
    names = ["q_proj", "v_proj"]
    with pytest.raises(ValueError, match="ModalityProjection") as caught:
        peft.get_peft_model(make(), peft.LoraConfig(target_modules=names))
    example = re.search(r"k_proj\.\w+", str(caught.value)).group()
    assert example == "k_proj.text"
    model = make()
    own = [f"v_proj.{name}" for name in next(m for m in model.modules() if isinstance(m, ModalityProjection))]
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", *own]))
    assert sum(hasattr(module, "lora_A") for module in adapted.modules()) == 2 + 3


# Attributes of PEFT's layers, of its models, and parts of ours.
NAMES = [
    "router",
    "base_layer",
    "experts",
    "gate",
    "lora_A",
    "lora_B",
    "modules_to_save",
    "original_module",
    "base_model",
]
NAMES += ["model", "weight", "q_proj", "gate_up_proj", "text", "active_adapter", "scaling", "default"]


def every_lora(model: ChorusForConditionalGeneration) -> peft.LoraConfig:
    settings = lora_config(model, banks=list(model.config.text_config.expert_banks), attention=True)
    settings.init_lora_weights = False
    return settings


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_may_be_named_like_a_part_of_the_model(name: str, tmp_path: Path):
    model = make()
    batch = inputs(model)
    with torch.no_grad():
        before = model(**batch).logits
        adapted = peft.get_peft_model(model, every_lora(model), adapter_name=name)
        found = adapted(**batch).logits
        assert not torch.allclose(found, before, atol=1e-4)
        with adapted.disable_adapter():
            torch.testing.assert_close(adapted(**batch).logits, before, rtol=0, atol=1e-5)
        adapted.save_pretrained(tmp_path)
        folder = tmp_path if name == "default" else tmp_path / name
        for other in (name, "default"):
            loaded = peft.PeftModel.from_pretrained(make(), folder, adapter_name=other)
            assert torch.equal(loaded(**batch).logits, found)
        torch.testing.assert_close(adapted.merge_and_unload()(**batch).logits, found, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_bank_named_like_a_part_of_peft_is_refused_and_of_the_model_works(name: str, tmp_path: Path):
    banks = {name: {"num_experts": 4}, "other": {"num_experts": 2, "num_experts_per_tok": 1}}
    if name in ("router", "base_layer", "lora_A", "lora_B", "modules_to_save", "original_module"):
        with pytest.raises(Exception, match=f"expert bank '{name}': torch or PEFT uses this name"):
            make(expert_banks=banks)
        return
    model = make(expert_banks=banks)
    batch = inputs(model)
    model.save_pretrained(tmp_path)
    again = ChorusForConditionalGeneration.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        before = model(**batch).logits
        assert torch.equal(again(**batch).logits, before)
        adapted = peft.get_peft_model(model, every_lora(model))
        found = adapted(**batch).logits
        assert not torch.allclose(found, before, atol=1e-4)
        adapted.save_pretrained(tmp_path / "adapter")
        assert torch.equal(peft.PeftModel.from_pretrained(again, tmp_path / "adapter")(**batch).logits, found)
        torch.testing.assert_close(adapted.merge_and_unload()(**batch).logits, found, rtol=0, atol=1e-4)
