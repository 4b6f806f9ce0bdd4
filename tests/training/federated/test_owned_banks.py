"""Banks of several owners in one model, and one that is withdrawn."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForMultimodalLM

from chorus_moe.surgery import add_bank, save_bank
from chorus_moe.training.federated.owned_banks import BANKS, gather_banks, withdraw_bank
from tests.conftest import tiny_batch
from tests.training.federated.conftest import sections

OWNERS = ("clinic", "bakery", "garage")


@pytest.fixture(scope="module")
def files(federation_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A bank of each owner, trained (moved at random) on the common base."""
    folder, found = tmp_path_factory.mktemp("owners"), {}
    for seed, name in enumerate(OWNERS):
        model = AutoModelForMultimodalLM.from_pretrained(federation_folder / "model")
        torch.manual_seed(seed)
        add_bank(model, name, modalities=["text", "image"], num_experts=2, intermediate_size=8, layers=[1])
        for tensor in model.model.language_model.layers[1].mlp.banks[name].state_dict().values():
            tensor.add_(torch.randn_like(tensor), alpha=0.3)
        found[name] = folder / f"{name}.safetensors"
        save_bank(model, name, found[name])
    return found


@torch.no_grad()
def logits_of(model: nn.Module) -> Tensor:
    return model.eval()(**tiny_batch(model.config)).logits  # type: ignore[union-attr,arg-type]


def load(folder: Path) -> nn.Module:
    return AutoModelForMultimodalLM.from_pretrained(folder)


@pytest.fixture
def gates(federation_folder: Path, tmp_path: Path) -> dict[str, Any]:
    found = sections(federation_folder, {"train": ["image"]}, tmp_path / "unused", "both")
    return {name: found[name] for name in ("data", "training")}


def test_a_withdrawn_bank_leaves_no_trace(
    files: dict[str, Path], federation_folder: Path, gates: dict[str, Any], tmp_path: Path
) -> None:
    base = federation_folder / "model"
    names = gather_banks(base, list(files.values()), tmp_path / "all", gates)
    assert names == list(OWNERS)
    gather_banks(base, [files["clinic"], files["garage"]], tmp_path / "never", gates)
    assert withdraw_bank(tmp_path / "all", "bakery", tmp_path / "without") == ["clinic", "garage"]
    never, without, whole = (load(tmp_path / name) for name in ("never", "without", "all"))
    states = without.state_dict()
    assert states.keys() == never.state_dict().keys() and not any("bakery" in name for name in states)
    assert torch.equal(logits_of(without), logits_of(never))
    assert not torch.equal(logits_of(without), logits_of(whole))
    assert not (tmp_path / "without" / BANKS / "bakery.safetensors").exists()


def test_gates_alone_are_trained(
    files: dict[str, Path], federation_folder: Path, gates: dict[str, Any], tmp_path: Path
) -> None:
    pair = [files["clinic"], files["garage"]]
    gather_banks(federation_folder / "model", pair, tmp_path / "plain")
    gather_banks(federation_folder / "model", pair, tmp_path / "trained", gates)
    before, after = (load(tmp_path / name).state_dict() for name in ("plain", "trained"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(".gate." in name and name.split(".banks.")[1].startswith(OWNERS) for name in changed)


def test_the_order_of_owners_does_not_matter(files: dict[str, Path], federation_folder: Path, tmp_path: Path) -> None:
    for name, chosen in (("one", OWNERS), ("other", OWNERS[::-1])):
        gather_banks(federation_folder / "model", [files[owner] for owner in chosen], tmp_path / name)
    assert torch.equal(logits_of(load(tmp_path / "one")), logits_of(load(tmp_path / "other")))


def test_what_cannot_be_gathered_is_refused(files: dict[str, Path], federation_folder: Path, tmp_path: Path) -> None:
    base, out = federation_folder / "model", tmp_path / "out"
    with pytest.raises(ValueError, match="no file"):
        gather_banks(base, [], out)
    with pytest.raises(ValueError, match="'clinic', which is there already"):
        gather_banks(base, [files["clinic"], files["clinic"]], out)
    other = AutoModelForMultimodalLM.from_pretrained(base)
    with torch.no_grad():
        other.model.language_model.norm.weight.add_(1)
    add_bank(other, "shop", num_experts=2, intermediate_size=8, layers=[1])
    save_bank(other, "shop", tmp_path / "shop.safetensors")
    with pytest.raises(ValueError, match=r"sha256 [0-9a-f]{64}, this model has [0-9a-f]{64} below it"):
        gather_banks(base, [tmp_path / "shop.safetensors"], out)
    save_bank(load(base), "text", tmp_path / "text.safetensors")
    with pytest.raises(ValueError, match="bank 'text', which is there already"):
        gather_banks(base, [tmp_path / "text.safetensors"], out)
    with pytest.raises(ValueError, match="was not written by `gather`"):
        withdraw_bank(base, "clinic", out)
    assert not out.exists()


def test_a_bank_that_is_not_there_cannot_be_withdrawn(
    files: dict[str, Path], federation_folder: Path, tmp_path: Path
) -> None:
    gather_banks(federation_folder / "model", [files["clinic"]], tmp_path / "all")
    with pytest.raises(ValueError, match=r"holds the banks \['clinic'\], not 'garage'"):
        withdraw_bank(tmp_path / "all", "garage", tmp_path / "out")
    with pytest.raises(ValueError, match="is the only bank"):
        withdraw_bank(tmp_path / "all", "clinic", tmp_path / "out")
    assert json.loads((tmp_path / "all" / "federated_banks.json").read_text())["gates"] is None
