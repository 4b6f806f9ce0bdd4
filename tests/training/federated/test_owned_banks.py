"""Banks of several owners in one model, and one that is withdrawn."""

import json
from pathlib import Path

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


@pytest.fixture(scope="module")
def gathered(
    files: dict[str, Path], federation_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Models of all banks and of two, gates trained, and of two as their owners have trained them."""
    folder = tmp_path_factory.mktemp("gathered")
    recipe = sections(federation_folder, {"train": ["image"]}, folder / "unused", "both")
    gates, two = {name: recipe[name] for name in ("data", "training")}, [files["clinic"], files["garage"]]
    for name, chosen, trained in (("all", list(files.values()), gates), ("two", two, gates), ("plain", two, None)):
        assert gather_banks(federation_folder / "model", chosen, folder / name, trained) == [f.stem for f in chosen]
    return {path.name: path for path in folder.iterdir()}


def test_a_withdrawn_bank_leaves_no_trace(gathered: dict[str, Path], tmp_path: Path) -> None:
    assert withdraw_bank(gathered["all"], "bakery", tmp_path / "without") == ["clinic", "garage"]
    never, without, whole = load(gathered["two"]), load(tmp_path / "without"), load(gathered["all"])
    states = without.state_dict()
    assert states.keys() == never.state_dict().keys() and not any("bakery" in name for name in states)
    assert torch.equal(logits_of(without), logits_of(never))
    assert not torch.equal(logits_of(without), logits_of(whole))
    assert not (tmp_path / "without" / BANKS / "bakery.safetensors").exists()


def test_gates_alone_are_trained(gathered: dict[str, Path]) -> None:
    before, after = (load(gathered[name]).state_dict() for name in ("plain", "two"))
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
