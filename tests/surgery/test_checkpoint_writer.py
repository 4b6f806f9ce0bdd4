"""A checkpoint written in pieces."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from chorus_moe.surgery import checkpoint_writer
from chorus_moe.surgery.checkpoint_writer import PlannedTensor, write_checkpoint

TENSORS = {
    "odd": torch.randn(3, 5).bfloat16(),
    "wide": torch.randn(7, 4),
    "count": torch.tensor(3),
    "flags": torch.tensor([True, False, True]),
    "empty": torch.empty(0, 4),
}


def planned(tensor: Tensor) -> PlannedTensor:
    return PlannedTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor.split(2) if tensor.dim() else [tensor])


def test_what_is_written_is_read_back(tmp_path: Path):
    assert write_checkpoint(tmp_path, {k: planned(v) for k, v in TENSORS.items()}, 10**6) == ["model.safetensors"]
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_shards_hold_no_more_than_asked_and_the_index_finds_every_tensor(tmp_path: Path):
    tensors = {f"layer{i}": torch.randn(10, 10) for i in range(5)}
    names = write_checkpoint(tmp_path, {k: planned(v) for k, v in tensors.items()}, 800)
    assert names == [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 5 * 400
    for name, tensor in tensors.items():
        assert torch.equal(load_file(tmp_path / index["weight_map"][name])[name], tensor)


class Weights(PreTrainedModel):
    config: PreTrainedConfig
    config_class = PreTrainedConfig

    def __init__(self, config: PreTrainedConfig, tensors: dict[str, Tensor]):
        super().__init__(config)
        for name, tensor in tensors.items():
            self.register_parameter(name, torch.nn.Parameter(tensor))


def test_the_index_is_that_of_save_pretrained(tmp_path: Path):
    """Text for text: names in their order, so that two models are compared line by line."""
    tensors = {f"layer{i}": torch.randn(10, 10) for i in range(5)}
    Weights(PreTrainedConfig(), tensors).save_pretrained(tmp_path / "theirs", max_shard_size=800)
    (tmp_path / "ours").mkdir()
    write_checkpoint(tmp_path / "ours", {k: planned(v) for k, v in tensors.items()}, 800)
    ours, theirs = ((tmp_path / side / "model.safetensors.index.json").read_text() for side in ("ours", "theirs"))
    # transformers counts the parameters as well.
    theirs = json.dumps({**json.loads(theirs), "metadata": json.loads(ours)["metadata"]}, indent=2, sort_keys=True)
    assert ours == theirs + "\n"
    (tmp_path / "mixed").mkdir()
    write_checkpoint(tmp_path / "mixed", {k: planned(tensors[k]) for k in sorted(tensors, reverse=True)}, 800)
    mixed = json.loads((tmp_path / "mixed" / "model.safetensors.index.json").read_text())
    assert list(mixed) == ["metadata", "weight_map"] and list(mixed["weight_map"]) == sorted(tensors)


@pytest.mark.parametrize("name", ["w" * length for length in range(1, 9)])
def test_numbers_begin_at_an_aligned_byte(tmp_path: Path, name: str):
    write_checkpoint(tmp_path, {name: planned(torch.randn(3))}, 800)
    content = (tmp_path / "model.safetensors").read_bytes()
    assert int.from_bytes(content[:8], "little") % 8 == 0 and len(content) % 8 == 12 % 8


def test_a_tensor_larger_than_a_shard_has_one_to_itself(tmp_path: Path):
    tensors = {"small": torch.zeros(2), "large": torch.zeros(100), "last": torch.zeros(2)}
    assert len(write_checkpoint(tmp_path, {k: planned(v) for k, v in tensors.items()}, 40)) == 3


def test_pieces_are_made_one_at_a_time_and_cast(tmp_path: Path):
    alive = []

    def pieces() -> Iterator[Tensor]:
        for i in range(4):
            alive.append(i)
            yield torch.full((2,), float(i))
            alive.remove(i)
            assert not alive

    write_checkpoint(tmp_path, {"x": PlannedTensor((8,), torch.float16, pieces)}, 100)
    expected = torch.arange(4).repeat_interleave(2).half()
    assert torch.equal(load_file(tmp_path / "model.safetensors")["x"], expected)


def test_pieces_that_do_not_fill_the_tensor_are_an_error(tmp_path: Path):
    tensor = PlannedTensor((3,), torch.float32, partial(iter, [torch.zeros(2)]))
    with pytest.raises(ValueError, match="'x': its pieces have 8 bytes, expected 12"):
        write_checkpoint(tmp_path, {"x": tensor}, 100)


@pytest.mark.parametrize("size", [0, 1, 8, 9, 16, 17, 40])
def test_bytes_are_written_block_by_block(size: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checkpoint_writer, "BLOCK", 8)
    tensor = torch.arange(size, dtype=torch.uint8)
    blocks = [
        bytes(block) for block in checkpoint_writer._bytes(PlannedTensor((size,), tensor.dtype, lambda: [tensor]))
    ]
    assert b"".join(blocks) == bytes(range(size))
    assert all(len(block) == 8 for block in blocks[:-1])
