"""`docs/guides/add_a_head.md` to the letter: its class and its line, and all that it says follows by itself."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForTokenClassification

from chorus_moe import ChorusConfig, ChorusForConditionalGeneration
from chorus_moe.modeling import modeling_heads
from chorus_moe.surgery import heads
from chorus_moe.surgery.heads import HEADS, Head
from chorus_moe.surgery.parts import freeze, parts_of
from chorus_moe.training.hub import export_for_hub
from tests.conftest import tiny_config
from tests.guides.pages import code_blocks
from tests.training.export_checks import load_without_the_package

IDS = torch.arange(5, 12)[None]


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Iterator[Head]:
    """The page's class in its module and its line in the table, for a test."""
    class_block, line = code_blocks("add_a_head.md")
    module = dict(vars(modeling_heads))
    exec(compile(class_block, "add_a_head.md", "exec"), module)
    kind = module["ChorusForTokenClassification"]
    monkeypatch.setattr(modeling_heads, kind.__name__, kind, raising=False)
    added = eval(line, {**vars(heads), kind.__name__: kind})
    HEADS.append(added)
    yield added
    HEADS.remove(added)


def make(head: Head) -> Any:
    torch.manual_seed(0)
    return head.kind(tiny_config())


def test_a_step_trains_it_with_the_losses_of_routers(head: Head) -> None:
    model = make(head).train()
    outputs = model(input_ids=IDS, labels=IDS % 2)
    assert outputs.logits.shape == (1, 7, model.config.num_labels)
    assert outputs.aux_loss is not None
    outputs.loss.backward()
    assert model.tagger.weight.grad.any()


def test_its_parts_are_the_head(head: Head) -> None:
    model = make(head)
    assert set(parts_of(model)["head"]) == {"tagger.weight", "tagger.bias"}
    freeze(model, "head")
    assert not any(parameter.requires_grad for parameter in model.tagger.parameters())


def test_another_heads_checkpoint_opens_in_it(head: Head, tmp_path: Path) -> None:
    ChorusForConditionalGeneration(tiny_config()).save_pretrained(tmp_path)
    _, info = head.kind.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {"tagger.weight", "tagger.bias"}


def test_its_auto_class_loads_it(head: Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The package registers the table when it is imported, which is over; this is the same line for the new row.
    monkeypatch.setattr(AutoModelForTokenClassification._model_mapping, "_extra_content", {ChorusConfig: head.kind})
    model = make(head)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForTokenClassification.from_pretrained(tmp_path)
    assert type(loaded) is head.kind and torch.equal(loaded.tagger.weight, model.tagger.weight)


@pytest.mark.slow
def test_its_export_loads_where_the_package_does_not_exist(head: Head, tmp_path: Path) -> None:
    model = make(head).eval()
    export_for_hub(model, None, tmp_path)
    with (tmp_path / "modeling_heads.py").open("a", encoding="utf-8") as file:
        file.write("\n\n" + code_blocks("add_a_head.md")[0])
    load_without_the_package([(model, head.auto_classes, tmp_path)], tmp_path)
