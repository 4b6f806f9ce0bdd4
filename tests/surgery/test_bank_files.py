"""A bank in a file means the same on its own base, and is refused on any other."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from chorus_moe import ChorusForConditionalGeneration, ChorusForSequenceClassification
from chorus_moe.surgery import add_bank, close_bank, load_bank, save_bank
from chorus_moe.surgery.bank_files import base_hash
from tests.conftest import tiny_config
from tests.surgery.test_banks import Batch, logits_of

CONFIGS: dict[str, dict[str, Any]] = {
    "default": {},
    "balance bias": {"expert_banks": {"text": {"router": "sigmoid", "num_experts": [3, 5]}, "image": {}, "common": {}}},
    "one bank": {"expert_banks": {"text": {}}},
    "deep experts": {"expert_banks": {"text": {"expert_depth": 2}, "image": {}, "common": {"expert_depth": 3}}},
}


SIZES = {"num_experts": 3, "num_experts_per_tok": 1, "intermediate_size": 32}


def make(seed: int = 0, **text: Any) -> ChorusForConditionalGeneration:
    torch.manual_seed(seed)
    return ChorusForConditionalGeneration(tiny_config(**text)).eval()


def disturb(model: nn.Module, bank: str) -> None:
    """Stands for training the bank: its own weights, and its row of the gates."""
    for layer in (1, 2):
        mlp = model.model.language_model.layers[layer].mlp
        for value in mlp.banks[bank].state_dict().values():
            value.add_(torch.randn_like(value), alpha=0.3)
        names = [found.name for found in mlp.bank_gate.banks]
        if mlp.bank_gate.weight is not None and bank in names:
            mlp.bank_gate.weight.data[names.index(bank)] += 0.3


def with_medical(**text: Any) -> ChorusForConditionalGeneration:
    model = make(**text)
    add_bank(model, "medical", num_experts=3, layers=[2, 1])
    disturb(model, "medical")
    return model


def test_an_added_bank_travels_to_its_base_bit_for_bit(tmp_path: Path, batch: Batch):
    model, other = with_medical(), make()
    save_bank(model, "medical", tmp_path / "bank.safetensors")
    report = load_bank(other, tmp_path / "bank.safetensors")
    assert torch.equal(logits_of(other, batch), logits_of(model, batch))
    assert other.config.text_config.expert_banks == model.config.text_config.expert_banks
    assert report.experts == {"medical": {1: (0, 3), 2: (0, 3)}}
    assert [name for name, _ in other.named_parameters()] == [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize("case", CONFIGS)
def test_a_bank_of_the_softmax_replaces_its_namesake_with_its_row_of_the_gate(case: str, tmp_path: Path, batch: Batch):
    model, other = make(**CONFIGS[case]), make(**CONFIGS[case])
    disturb(model, "text")
    assert not torch.equal(logits_of(other, batch), logits_of(model, batch))
    save_bank(model, "text", tmp_path / "bank.safetensors")
    load_bank(other, tmp_path / "bank.safetensors")
    assert torch.equal(logits_of(other, batch), logits_of(model, batch))
    other.save_pretrained(tmp_path / "model")
    loaded = ChorusForConditionalGeneration.from_pretrained(tmp_path / "model")
    assert torch.equal(logits_of(loaded, batch), logits_of(model, batch))


def test_a_bank_of_the_softmax_returns_to_a_model_without_it(tmp_path: Path, batch: Batch):
    model = make()
    without = make(expert_banks={"text": {}, "image": {}, "audio": {}})
    states = {name: value for name, value in model.state_dict().items() if ".banks.common." not in name}
    for name in (name for name in states if name.endswith("bank_gate.weight")):
        states[name] = states[name][[0, 2, 3]]
    without.load_state_dict(states)
    save_bank(model, "common", tmp_path / "bank.safetensors")
    load_bank(without, tmp_path / "bank.safetensors")
    assert torch.equal(logits_of(without, batch), logits_of(model, batch))


def test_another_base_is_refused_with_both_hashes_and_nothing_changes(tmp_path: Path, batch: Batch):
    model, other = with_medical(), make(seed=1)
    save_bank(model, "medical", tmp_path / "bank.safetensors")
    hashes = [base_hash(found, "medical") for found in (model, other)]
    before = logits_of(other, batch)
    with pytest.raises(ValueError, match=f"trained on top of sha256 {hashes[0]}, this model has {hashes[1]}"):
        load_bank(other, tmp_path / "bank.safetensors")
    assert "medical" not in other.config.text_config.expert_banks
    assert torch.equal(logits_of(other, batch), before)


def test_another_base_is_a_warning_if_asked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    save_bank(with_medical(), "medical", tmp_path / "bank.safetensors")
    report = load_bank(make(seed=1), tmp_path / "bank.safetensors", strict_base=False)
    assert "trained on top of" in report.notes[0]


def test_the_hash_is_that_of_the_saved_and_loaded_model(tmp_path: Path):
    model = with_medical(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    loaded = ChorusForConditionalGeneration.from_pretrained(tmp_path)
    assert base_hash(loaded, "medical") == base_hash(model, "medical") == base_hash(make(tie_word_embeddings=True), "x")


@pytest.mark.parametrize(
    "name",
    ["lm_head.weight", "model.vision_connector.projector.up_proj.weight", "model.language_model.norm.weight"],
)
def test_the_hash_covers_head_encoders_and_decoder(name: str):
    model = make()
    before = base_hash(model, "text")
    model.get_parameter(name).data.view(-1)[0] += 1e-6
    assert base_hash(model, "text") != before


def test_the_hash_covers_the_rows_of_the_gate_of_other_banks_only():
    model = make()
    before = base_hash(model, "common")
    gate = model.model.language_model.layers[1].mlp.bank_gate.weight.data
    gate[1] += 1  # audio, common, image, text
    assert base_hash(model, "common") == before
    gate[2] += 1
    assert base_hash(model, "common") != before


def test_banks_trained_apart_on_one_base_meet_while_the_first_is_closed(tmp_path: Path, batch: Batch):
    for name in ("one", "two"):
        model = make()
        add_bank(model, name)
        disturb(model, name)
        save_bank(model, name, tmp_path / f"{name}.safetensors")
    both = make()
    load_bank(both, tmp_path / "one.safetensors")
    with pytest.raises(ValueError, match="trained on top of"):
        load_bank(both, tmp_path / "two.safetensors")
    close_bank(both, "one")
    load_bank(both, tmp_path / "two.safetensors")
    assert torch.equal(logits_of(both, batch), logits_of(model, batch))


def test_a_bank_of_another_width_is_refused_with_both_shapes(tmp_path: Path):
    save_bank(with_medical(), "medical", tmp_path / "bank.safetensors")
    wide = make(hidden_size=128)
    with pytest.raises(ValueError, match=r"down_proj has shape \(3, 64, 32\) in the file, .* needs \(3, 128, 32\)"):
        load_bank(wide, tmp_path / "bank.safetensors", strict_base=False)


def test_a_bank_of_other_layers_than_its_namesake_is_refused(tmp_path: Path):
    save_bank(with_medical(), "medical", tmp_path / "bank.safetensors")
    other = make()
    add_bank(other, "medical", layers=[2])
    with pytest.raises(ValueError, match=r"layers \[1, 2\] in the file, .* layers \[2\] in the model"):
        load_bank(other, tmp_path / "bank.safetensors")


def rewrite(path: Path, **changes: Any) -> None:
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    dropped = changes.pop("drop", None)
    save_file({key: value for key, value in tensors.items() if key != dropped}, path, metadata={**metadata, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "pt"}, "was not written by `save_bank`: format='pt'"),
        ({"version": "2"}, "has version '2', this one reads '1'"),
        ({"config": "[1"}, "has unreadable metadata about its bank"),
        ({"config": json.dumps({"num_experts": "many"})}, "has unreadable metadata about its bank"),
        ({"config": json.dumps({"rooter": 1})}, "unknown key 'rooter'"),
        ({"config": json.dumps(SIZES | {"closed": "no"})}, "closed='no' must be of type bool"),
        ({"config": json.dumps(SIZES | {"num_groups": float("inf")})}, "num_groups=inf must be of type int"),
        ({"name": "a.b"}, "must be a Python identifier"),
        ({"drop": "layers.1.mlp.banks.medical.gate.bias"}, r"gate.bias has shape None in the file, .* needs \(1,\)"),
    ],
)
def test_a_file_that_says_something_else_is_refused(changes: dict[str, Any], message: str, tmp_path: Path):
    path = tmp_path / "bank.safetensors"
    save_bank(with_medical(), "medical", path)
    rewrite(path, **changes)
    with pytest.raises(ValueError, match=message):
        load_bank(make(), path)


@pytest.mark.parametrize(
    ("cast", "message"),
    [
        (lambda t: t.to(torch.int32), "down_proj is torch.int32 in the file"),
        (lambda t: t > 0, "down_proj is torch.bool in the file"),
        (
            lambda t: t.index_fill(0, torch.tensor([1]), torch.nan),
            "holds 2048 of 6144 values that are not finite",
        ),
        (
            lambda t: t.masked_fill(t == t.max(), torch.inf).half(),
            "holds 1 of 6144 values that are not finite",
        ),
    ],
)
def test_weights_of_another_kind_or_not_finite_are_refused_by_name(
    cast: Callable[[Tensor], Tensor], message: str, tmp_path: Path
):
    path, name = tmp_path / "bank.safetensors", "layers.1.mlp.banks.medical.experts.down_proj"
    save_bank(with_medical(), "medical", path)
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(tensors | {name: cast(tensors[name])}, path, metadata=metadata)
    other = make()
    before = other.state_dict()
    with pytest.raises(ValueError, match=message):
        load_bank(other, path)
    after = other.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_a_broken_file_is_refused(tmp_path: Path):
    path = tmp_path / "bank.safetensors"
    save_bank(with_medical(), "medical", path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is no safetensors file"):
        load_bank(make(), path)


def test_the_file_is_small_and_an_unknown_bank_has_none(tmp_path: Path):
    model = with_medical()
    report = save_bank(model, "medical", tmp_path / "bank.safetensors")
    size = sum(p.numel() for n, p in model.named_parameters() if ".banks.medical." in n)
    assert f"{size:,} numbers" in report.notes[0]
    assert (tmp_path / "bank.safetensors").stat().st_size < 4 * size + 4_000
    with pytest.raises(ValueError, match="unknown bank 'medicl'; did you mean 'medical'"):
        save_bank(model, "medicl", tmp_path / "other.safetensors")


def test_any_head_exchanges_its_banks(tmp_path: Path, batch: Batch):
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(ChorusForSequenceClassification(tiny_config()).eval())
    add_bank(models[0], "medical")
    disturb(models[0], "medical")
    save_bank(models[0], "medical", tmp_path / "bank.safetensors")
    load_bank(models[1], tmp_path / "bank.safetensors")
    assert torch.equal(logits_of(models[0], batch), logits_of(models[1], batch))
