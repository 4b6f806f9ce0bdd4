"""Reading a checkpoint that somebody else trained."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from chorus_moe.surgery.parent_checkpoint import ParentCheckpoint


@pytest.fixture(scope="module")
def llama():
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    return LlamaForCausalLM(config)


@pytest.fixture(params=["5GB", "8KB"])
def folder(llama, tmp_path, request):
    llama.save_pretrained(tmp_path, max_shard_size=request.param)
    return tmp_path


@pytest.fixture
def sharded(llama, tmp_path):
    llama.save_pretrained(tmp_path, max_shard_size="8KB")
    return tmp_path


def edit_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_every_tensor_is_read_by_name_from_one_file_or_from_shards(llama, folder):
    parent = ParentCheckpoint(folder)
    state = llama.state_dict()
    assert sorted(parent.names) == sorted(state)
    for name, tensor in state.items():
        assert torch.equal(parent.read(name), tensor)
        assert (parent.shape(name), parent.dtype(name)) == (tuple(tensor.shape), tensor.dtype)


def test_the_configuration_is_that_of_the_parent(llama, folder):
    assert ParentCheckpoint(folder).config.to_diff_dict() == llama.config.to_diff_dict() | {
        "architectures": ["LlamaForCausalLM"],
        "dtype": "float32",
    }


def test_another_file_is_found_or_is_none(folder):
    parent = ParentCheckpoint(folder)
    assert parent.file("generation_config.json") == str(folder / "generation_config.json")
    assert parent.file("tokenizer.json") is None


def test_an_unknown_tensor_is_named(folder):
    with pytest.raises(ValueError, match=r"no tensor 'lm_tail.weight' among the 21"):
        ParentCheckpoint(folder).read("lm_tail.weight")


def test_pickled_weights_are_refused_with_the_cure(llama, tmp_path):
    llama.config.save_pretrained(tmp_path)
    torch.save(llama.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"found neither model.safetensors.*save_pretrained"):
        ParentCheckpoint(tmp_path)


def test_a_file_that_is_not_safetensors_is_refused(llama, tmp_path):
    llama.config.save_pretrained(tmp_path)
    torch.save(llama.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="not a safetensors file"):
        ParentCheckpoint(tmp_path)


def test_an_index_may_not_name_a_file_elsewhere(sharded, tmp_path_factory):
    path = sharded / "model.safetensors.index.json"
    listed = json.loads(path.read_text())["weight_map"]
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "x.safetensors"
    shutil.copy(sharded / next(iter(listed.values())), elsewhere)
    edit_json(path, weight_map=listed | {"lm_head.weight": f"../{elsewhere.parent.name}/x.safetensors"})
    with pytest.raises(ValueError, match=r"the index names the file '\.\./"):
        ParentCheckpoint(sharded)


def test_a_tensor_that_the_index_lists_must_be_in_a_file(sharded):
    path = sharded / json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]["lm_head.weight"]
    tensors = load_file(path)
    del tensors["lm_head.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 of 21 tensors of the index are in no file, such as 'lm_head.weight'"):
        ParentCheckpoint(sharded)


def test_a_model_type_with_its_own_code_is_refused_without_running_it(sharded):
    (sharded / "own.py").write_text("raise SystemExit('ran')")
    edit_json(sharded / "config.json", model_type="own", auto_map={"AutoConfig": "own.OwnConfig"})
    with pytest.raises(ValueError, match="model_type='own' is not one that transformers knows"):
        ParentCheckpoint(sharded)


def test_a_quantised_checkpoint_is_refused(sharded):
    edit_json(sharded / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ValueError, match="quantised"):
        ParentCheckpoint(sharded)


def test_integers_have_no_place_among_the_weights(sharded):
    path = sharded / json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]["lm_head.weight"]
    save_file(load_file(path) | {"lm_head.weight": torch.zeros(50, 16, dtype=torch.int8)}, path)
    with pytest.raises(ValueError, match="'lm_head.weight' is I8"):
        ParentCheckpoint(sharded).dtype("lm_head.weight")


@pytest.fixture
def on_hub(llama, fake_hub):
    """The commits of two versions of a sharded repository, oldest first."""
    commits = []
    for value in (1.0, 2.0):
        torch.nn.init.constant_(llama.lm_head.weight, value)
        llama.push_to_hub("tester/tiny", max_shard_size="8KB")
        commits.append(next(reversed(fake_hub.repositories["tester/tiny"].snapshots)))
    return commits


def test_a_repository_is_read_at_the_newest_commit_or_at_the_one_asked_for(on_hub):
    newest, pinned = ParentCheckpoint("tester/tiny"), ParentCheckpoint("tester/tiny", revision=on_hub[0])
    assert [newest.revision, pinned.revision] == on_hub[::-1]
    assert (newest.read("lm_head.weight") == 2).all()
    assert (pinned.read("lm_head.weight") == 1).all()


def test_all_files_come_from_the_commit_of_the_configuration(on_hub, fake_hub):
    ParentCheckpoint("tester/tiny")
    asked = [path for path in fake_hub.requests if "/resolve/" in path and "safetensors" in path]
    assert asked
    assert all(on_hub[1] in path for path in asked)


def test_a_repository_in_the_cache_needs_no_network(on_hub, fake_hub):
    ParentCheckpoint("tester/tiny")
    fake_hub.requests.clear()
    parent = ParentCheckpoint("tester/tiny", local_files_only=True)
    assert (parent.read("lm_head.weight") == 2).all()
    assert parent.file("tokenizer.json") is None
    assert not fake_hub.requests


@pytest.mark.parametrize("source", ["/no/such/folder", "./nowhere", "../nowhere", "nowhere"])
def test_a_mistyped_folder_is_not_taken_for_a_repository(source: str):
    with pytest.raises(FileNotFoundError, match=f"{source}: no such folder"):
        ParentCheckpoint(source)
