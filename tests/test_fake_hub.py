"""The loopback Hub serves the real clients: models, tokenizers, adapters, Trainer and cards."""

import os
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, model_info, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from tests.fake_hub import FakeHub
from tests.fresh_process import run_fresh

IDS = torch.tensor([[1, 2, 3, 4]])


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)).eval()


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "a": 1, "b": 2}
    backend = Tokenizer(WordLevel(words, "<pad>"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>")


def test_a_pushed_model_and_tokenizer_load_by_name(
    fake_hub: FakeHub, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    model.push_to_hub("tester/tiny")
    tokenizer.push_to_hub("tester/tiny")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(fake_hub.files("tester/tiny"))
    loaded = AutoModelForCausalLM.from_pretrained("tester/tiny")
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert AutoTokenizer.from_pretrained("tester/tiny")("a b")["input_ids"] == [1, 2]


def test_a_fresh_process_loads_by_name_through_the_environment(
    fake_hub: FakeHub, model: LlamaForCausalLM, tmp_path: Path
) -> None:
    model.push_to_hub("tiny")  # without an owner: the client asks who it is
    program = (
        "from transformers import AutoModelForCausalLM;"
        "print(sum(p.double().sum().item() for p in AutoModelForCausalLM.from_pretrained('tester/tiny').parameters()))"
    )
    environment = os.environ | fake_hub.environment(tmp_path / "other_home")
    done = run_fresh(program, cwd=tmp_path, environment=environment)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == sum(parameter.double().sum().item() for parameter in model.parameters())


def test_an_adapter_is_pushed_and_loaded_by_name(fake_hub: FakeHub, model: LlamaForCausalLM) -> None:
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    expected = adapted(IDS).logits
    adapted.push_to_hub("tester/adapter")
    assert "adapter_model.safetensors" in fake_hub.files("tester/adapter")
    loaded = PeftModel.from_pretrained(adapted.unload(), "tester/adapter").eval()
    assert torch.equal(loaded(IDS).logits, expected)


def test_a_trainer_pushes_model_and_card(fake_hub: FakeHub, model: LlamaForCausalLM, tmp_path: Path) -> None:
    settings = TrainingArguments(
        str(tmp_path / "run"),
        max_steps=1,
        report_to="none",
        hub_model_id="tester/trained",
        save_strategy="no",
        use_cpu=True,
    )
    trainer = Trainer(model, settings, train_dataset=[{"input_ids": IDS[0], "labels": IDS[0]}])
    trainer.train()
    trainer.push_to_hub()
    assert {"model.safetensors", "README.md", "training_args.bin"} <= set(fake_hub.files("tester/trained"))


def test_a_card_sets_what_the_repository_says_about_itself(fake_hub: FakeHub, model: LlamaForCausalLM) -> None:
    model.push_to_hub("tester/tiny")
    ModelCard("---\npipeline_tag: any-to-any\nlibrary_name: transformers\ntags: [moe]\n---\n# Tiny\n").push_to_hub(
        "tester/tiny"
    )
    info = model_info("tester/tiny")
    assert (info.pipeline_tag, info.library_name, info.tags) == ("any-to-any", "transformers", ["moe"])


def test_an_older_commit_stays_readable(fake_hub: FakeHub, tmp_path: Path) -> None:
    api = HfApi()
    api.create_repo("tester/files")
    api.create_repo("tester/files", exist_ok=True)
    first = api.upload_file(path_or_fileobj=b"one", path_in_repo="a/b.txt", repo_id="tester/files").oid
    api.upload_file(path_or_fileobj=b"two", path_in_repo="a/b.txt", repo_id="tester/files")
    old, new = (Path(snapshot_download("tester/files", revision=name)) / "a/b.txt" for name in (first, "main"))
    assert (old.read_text(), new.read_text()) == ("one", "two")


def test_what_is_missing_is_reported_as_the_hub_does(fake_hub: FakeHub, model: LlamaForCausalLM) -> None:
    model.push_to_hub("tester/tiny")
    with pytest.raises(RepositoryNotFoundError):
        model_info("tester/nothing")
    with pytest.raises(EntryNotFoundError):
        HfApi().hf_hub_download("tester/tiny", "nothing.json")
