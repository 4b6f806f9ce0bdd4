"""A LoRA group trains exactly the tensors it names, and adapters survive saving, loading and merging."""

import hashlib
from copy import deepcopy
from dataclasses import fields
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModel, LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedTokenizerFast

from chorus_moe import ChorusForConditionalGeneration, ChorusForSequenceClassification, ChorusModel, ChorusProcessor
from chorus_moe.surgery import add_exits, add_skip_gates, unfuse_experts
from chorus_moe.training.collator import ChorusDataCollator
from chorus_moe.training.lora import LoraTargets, full_path_regex, lora_config
from tests.conftest import tiny_batch, tiny_config
from tests.training.conftest import make_model, make_rows

# The same bits in other memory: equal on processors with AVX-512; on AVX2, torch's attention of the audio tower differs
# by 3e-7 at most.
LAST_BIT = 1e-6

LAYERS = "model.language_model.layers"
ATTENTION = [f"self_attn.{name}_proj" for name in "qkvo"]
CROSS_MODAL = ["q_proj", *(f"{p}_proj.{m}" for p in "kv" for m in ("text", "image", "audio")), "o_proj"]
# Each group, and what it adapts in the tiny model: three layers, the first dense, the last cross-modal.
GROUPS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "attention": ({"attention": True}, [f"{LAYERS}.{i}.{name}" for i in (0, 1) for name in ATTENTION]),
    "attention of a layer": ({"attention": [1]}, [f"{LAYERS}.1.{name}" for name in ATTENTION]),
    "cross-modal": ({"cross_modal": True}, [f"{LAYERS}.2.self_attn.{name}" for name in CROSS_MODAL]),
    "image bank": ({"banks": ["image"]}, [f"{LAYERS}.{i}.mlp.banks.image.experts" for i in (1, 2)]),
    "image bank of a layer": ({"banks": {"image": [2]}}, [f"{LAYERS}.2.mlp.banks.image.experts"]),
    "common bank": ({"banks": ["common"]}, [f"{LAYERS}.{i}.mlp.banks.common.experts" for i in (1, 2)]),
    "shared experts": (
        {"shared_experts": True},
        [f"{LAYERS}.{i}.mlp.shared_experts.{name}_proj" for i in (1, 2) for name in ("gate", "up", "down")],
    ),
    "dense": ({"dense": True}, [f"{LAYERS}.0.mlp.{name}_proj" for name in ("gate", "up", "down")]),
    "connectors": (
        {"connectors": True},
        [f"model.{m}_connector.projector.{name}_proj" for m in ("vision", "audio") for name in ("up", "down")],
    ),
    "vision tower": (
        {"towers": ["vision"]},
        [f"model.vision_tower.timm_model.blocks.0.{n}" for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")],
    ),
    "a bank and its routers": (
        {"banks": ["audio"], "router": "train"},
        [f"{LAYERS}.{i}.mlp.{n}" for i in (1, 2) for n in ("banks.audio.experts", "banks.audio.router", "bank_gate")],
    ),
}


@pytest.fixture
def batch(processor: ChorusProcessor) -> dict[str, torch.Tensor]:
    """Labels on media as well: the last layer's media banks work for the prediction of the next token only."""
    batch = ChorusDataCollator(processor)(make_rows(3))
    return {**batch, "labels": batch["input_ids"]}


def hashes(model: nn.Module) -> dict[str, str]:
    return {
        name: hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()
        for name, tensor in model.state_dict().items()
    }


def train_steps(model: nn.Module, batch: dict[str, torch.Tensor], steps: int = 5) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def plain_name(name: str) -> str:
    """The path in the base model of a tensor that PEFT renamed."""
    name = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "").replace(".base_layer", "")
    return name.split(".lora_")[0]


def owner(name: str, modules: list[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_trains_exactly_the_tensors_it_names(
    group: str, model: ChorusForConditionalGeneration, batch: dict[str, torch.Tensor]
) -> None:
    options, modules = GROUPS[group]
    base = hashes(model)
    adapted = get_peft_model(model, lora_config(model, **options, r=4))
    trainable = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    before = hashes(adapted)
    train_steps(adapted, batch)
    after = hashes(adapted)
    assert {name for name in after if after[name] != before[name]} == trainable
    assert {plain_name(name) for name in trainable if ".lora_" in name} <= set(modules)
    assert all(owner(plain_name(name), modules) for name in trainable)

    merged = hashes(adapted.merge_and_unload())
    assert merged.keys() == base.keys()
    changed = {name for name in base if merged[name] != base[name]}
    assert all(owner(name, modules) for name in changed)
    assert all(any(owner(name, [module]) for name in changed) for module in modules)


@pytest.mark.parametrize("group", GROUPS)
def test_the_table_counts_what_will_be_trained(
    group: str, model: ChorusForConditionalGeneration, capsys: pytest.CaptureFixture[str]
) -> None:
    adapted = get_peft_model(model, lora_config(model, **GROUPS[group][0], r=4, use_dora="bank" not in group))
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    last = capsys.readouterr().out.splitlines()[-1].split()
    assert (last[0], int(last[2].replace(",", ""))) == ("all", trained)


def test_the_table_gives_group_modules_trainable_and_share(
    model: ChorusForConditionalGeneration, capsys: pytest.CaptureFixture[str]
) -> None:
    lora_config(model, banks=["image"], attention=[0], r=2)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["group", "modules", "trainable", "share"]
    assert [line[0] for line in lines[1:]] == ["attention", "bank", "all"]
    assert [line[-3] for line in lines[1:]] == ["4", "4", "8"]


# Names of a layer's matrices as users write them: whole, below the head, their ends, and patterns.
@pytest.mark.parametrize(
    "key",
    [
        "language_model.layers.0.self_attn.q_proj",
        "model.language_model.layers.0.self_attn.q_proj",
        "^model.language_model.layers.0.self_attn.q_proj",
        "model.language_model.layers.1.mlp.banks.text.experts.down_proj",
        "language_model.layers.1.mlp.banks.text.experts.down_proj",
        "down_proj",
        r".*\.layers\.1\..*",
    ],
)
def test_a_rank_pattern_is_counted(
    key: str, model: ChorusForConditionalGeneration, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = []
    for head in (model, ChorusModel(model.config)):
        for pattern in ({}, {key: 2}):
            adapted = get_peft_model(
                deepcopy(head), lora_config(head, attention=True, banks="all", r=4, rank_pattern=pattern)
            )
            counts.append(sum(p.numel() for p in adapted.parameters() if p.requires_grad))
            assert f"{counts[-1]:,}" in capsys.readouterr().out.splitlines()[-1]
    # The bare model has no `model.` in front of its names, so such a key matches nothing there.
    assert counts[1] < counts[0] and (counts[3] < counts[2]) == ("model.language" not in key.removeprefix("language_"))


@pytest.mark.parametrize("exits", [False, True])
@pytest.mark.parametrize("task_type", ["SEQ_CLS", "TOKEN_CLS", None])
def test_the_table_has_the_heads_that_peft_trains_for_a_task(
    exits: bool, task_type: str | None, grown: ChorusForSequenceClassification, capsys: pytest.CaptureFixture[str]
) -> None:
    adapted = get_peft_model(grown, lora_config(grown, attention=True, exits=exits, task_type=task_type))
    table = capsys.readouterr().out
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert f"{trained:,}" in table.splitlines()[-1]
    assert (f"heads of {task_type}" in table) == (task_type is not None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"banks": ["imge"]}, r"no expert bank is named 'imge'; this model has \['audio', 'common', 'image', 'text'\]"),
        ({"banks": {"image": [0]}}, r"bank image: layer 0 is not one of its layers \[1, 2\]"),
        ({"attention": [2]}, r"attention: layer 2 is not one of its layers \[0, 1\]"),
        ({"towers": ["video"]}, "unknown tower 'video'"),
        ({"router": "thaw", "dense": True}, "router='thaw'; choose 'frozen' or 'train'"),
        ({"router": "train"}, "no group to put a LoRA on"),
        ({"skip_gates": True}, "only routers, exits or skip gates, use freeze and unfreeze"),
        ({"dense": True, "skip_gates": True}, "the group 'skip_gates' matches nothing in this model"),
        ({"dense": True, "exits": True}, "the group 'exits' matches nothing in this model"),
        ({}, "no group to put a LoRA on"),
        ({"banks": "all", "lora_dropout": 0.1}, "lora_dropout=0.1 with expert banks"),
        ({"banks": "all", "use_dora": True}, "use_dora=True with expert banks: PEFT has it for linear layers only"),
        ({"banks": "all", "lora_bias": True}, "lora_bias=True with expert banks"),
        ({"banks": "all", "fan_in_fan_out": True}, "fan_in_fan_out=True with expert banks"),
        *(
            ({"banks": "all", "init_lora_weights": start}, f"init_lora_weights='{start}' with expert banks.*unfuse_exp")
            for start in ("pissa", "pissa_niter_2", "olora", "orthogonal", "eva", "corda", "loftq")
        ),
    ],
)
def test_a_request_that_cannot_be_met_names_what_exists(
    model: ChorusForConditionalGeneration, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        lora_config(model, **options)


def test_the_targets_are_the_arguments_of_lora_config_in_their_order() -> None:
    arguments = [name for name, p in signature(lora_config).parameters.items() if p.kind is p.KEYWORD_ONLY]
    assert arguments[: len(fields(LoraTargets))] == [field.name for field in fields(LoraTargets)]


def test_a_group_this_model_lacks_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_model(tokenizer, cross_modal_layers=[], shared_expert_intermediate_size=0)
    with pytest.raises(ValueError, match="cross_modal: this model has no such layer"):
        lora_config(model, cross_modal=True)
    with pytest.raises(ValueError, match="'shared_experts' matches nothing"):
        lora_config(model, shared_experts=True)


def test_what_the_groups_decide_cannot_be_passed_beside_them(model: ChorusForConditionalGeneration) -> None:
    with pytest.raises(TypeError, match="target_modules is set by the groups"):
        lora_config(model, dense=True, target_modules="all-linear")
    adapted = get_peft_model(model, lora_config(model, dense=True))
    with pytest.raises(ValueError, match="already carries an adapter"):
        lora_config(adapted, dense=True)


def test_the_result_is_a_plain_lora_config_that_fits_every_head(model: ChorusForConditionalGeneration) -> None:
    chosen = lora_config(model, banks=["text"], cross_modal=True, verbose=False)
    assert type(chosen) is LoraConfig
    adapted = get_peft_model(ChorusModel(model.config), chosen)
    trainable = {plain_name(name) for name, p in adapted.named_parameters() if p.requires_grad}
    assert f"{LAYERS}.2.self_attn.k_proj.image".removeprefix("model.") in trainable
    assert f"{LAYERS}.1.mlp.banks.text.experts".removeprefix("model.") in trainable


def test_a_regex_matches_its_names_and_no_others() -> None:
    import re

    pattern = full_path_regex(["layers.1.a", "layers.11.a", "b"])
    assert [bool(re.fullmatch(pattern, name)) for name in ("layers.1.a", "model.layers.11.a", "b")] == [True] * 3
    assert not any(re.fullmatch(pattern, name) for name in ("layers.2.a", "layers.1.a.c", "layersx1.a", "ab"))


@pytest.fixture
def grown(model: ChorusForConditionalGeneration, tmp_path: Path) -> ChorusForSequenceClassification:
    """A classifier with exits and gates, saved in the folder `base`."""
    model.config.num_labels = 5
    torch.manual_seed(0)
    classifier = ChorusForSequenceClassification(model.config)
    add_exits(classifier, [1, 2])
    add_skip_gates(classifier, [1], skip_budget=0.4)
    classifier.save_pretrained(tmp_path / "base")
    return ChorusForSequenceClassification.from_pretrained(tmp_path / "base")


EXITS = [f"exits.{i}.{part}.weight" for i in (0, 1) for part in ("norm", "score")]
GATES = [f"{LAYERS}.1.skip_gate.{name}" for name in ("weight", "bias")]


@pytest.mark.parametrize("task_type", [None, "SEQ_CLS"])
@pytest.mark.parametrize(
    ("groups", "whole"),
    [({"exits": True}, EXITS), ({"skip_gates": True}, GATES), ({"exits": True, "skip_gates": True}, EXITS + GATES)],
    ids=["exits", "gates", "both"],
)
def test_exits_and_gates_are_trained_whole_beside_a_lora(
    groups: dict[str, bool],
    whole: list[str],
    task_type: str | None,
    grown: ChorusForSequenceClassification,
    batch: dict[str, torch.Tensor],
    tmp_path: Path,
) -> None:
    base = hashes(grown)
    adapted = get_peft_model(grown, lora_config(grown, attention=[1], r=4, **groups, task_type=task_type))
    trainable = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    batch = {**batch, "labels": torch.tensor([0, 4, 2])}
    train_steps(adapted, batch)
    adapted.save_pretrained(tmp_path / "adapter")
    expected = exit_logits(adapted, batch)
    again = ChorusForSequenceClassification.from_pretrained(tmp_path / "base")
    again = PeftModel.from_pretrained(again, tmp_path / "adapter")
    torch.testing.assert_close(exit_logits(again, batch), expected, atol=LAST_BIT, rtol=0)

    # PEFT itself trains all that ends in `score` for a task of this type: the head, and of an exit all but its norm.
    of_task = {"score.weight", EXITS[1], EXITS[3]} if task_type else set()
    assert {plain_name(name) for name in trainable if ".lora_" not in name} == {*whole} | of_task
    merged = hashes(adapted.merge_and_unload())
    changed = {name for name in base if merged[name] != base[name]}
    adapters = {f"{LAYERS}.1.{name}.weight" for name in ATTENTION}
    assert changed == {*whole} | of_task | adapters


def test_parts_are_trained_whole_beside_a_lora(
    tokenizer: PreTrainedTokenizerFast, batch: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    windows = {"num_global_tokens": 2, "layer_types": ["sliding_attention"] * 3, "sliding_window": 8}
    windows |= {"cross_modal_layers": []}
    make_model(tokenizer, **windows).save_pretrained(tmp_path / "base")
    base = ChorusForConditionalGeneration.from_pretrained(tmp_path / "base")
    whole = ["global_tokens", "layers:0"]
    with pytest.raises(ValueError, match="'layers:0' holds .*self_attn.global_tokens, which 'global_tokens'"):
        lora_config(base, attention=[2], whole=whole)
    with pytest.raises(ValueError, match="whole: 'layers:2' holds .*_proj, which 'attention' trains already"):
        lora_config(base, attention=[2], whole=["layers:2"])
    with pytest.raises(ValueError, match="whole: unknown part 'global_token'; did you mean 'global_tokens'"):
        lora_config(base, attention=[2], whole=["global_token"])
    before = hashes(base)
    adapted = get_peft_model(base, lora_config(base, attention=[2], whole=["global_tokens", "dense", "embeddings"]))
    train_steps(adapted, batch)
    adapted.save_pretrained(tmp_path / "adapter")
    expected = logits(adapted, batch)
    again = ChorusForConditionalGeneration.from_pretrained(tmp_path / "base")
    again = PeftModel.from_pretrained(again, tmp_path / "adapter")
    torch.testing.assert_close(logits(again, batch), expected, atol=LAST_BIT, rtol=0)
    merged = hashes(adapted.merge_and_unload())
    changed = {name for name in before if merged[name] != before[name]}
    marks = (".global_tokens.", f"{LAYERS}.0.mlp.", f"{LAYERS}.2.self_attn.", "embed_tokens")
    assert {mark for mark in marks if any(mark in name for name in changed)} == set(marks)
    assert not [name for name in changed if not any(mark in name for mark in marks)]


@torch.no_grad()
def exit_logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    outputs = model.eval()(**batch, output_exit_logits=True)
    return torch.stack([*outputs.exit_logits, outputs.logits])


@pytest.fixture
def trained(
    model: ChorusForConditionalGeneration, batch: dict[str, torch.Tensor], tmp_path: Path
) -> tuple[PeftModel, Path, torch.Tensor]:
    """An adapter on banks, cross-modal layers and routers, saved, with its base, and its logits."""
    model.save_pretrained(tmp_path / "base")
    base = ChorusForConditionalGeneration.from_pretrained(tmp_path / "base")
    adapted = get_peft_model(base, lora_config(base, banks=["image", "common"], cross_modal=True, router="train"))
    train_steps(adapted, batch)
    adapted.save_pretrained(tmp_path / "adapter")
    return adapted, tmp_path, logits(adapted, batch)


@torch.no_grad()
def logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model.eval()(**batch).logits


def test_an_adapter_loads_on_a_fresh_base(
    trained: tuple[PeftModel, Path, torch.Tensor], batch: dict[str, torch.Tensor]
) -> None:
    _, folder, expected = trained
    base = ChorusForConditionalGeneration.from_pretrained(folder / "base")
    assert not torch.allclose(logits(base, batch), expected, atol=1e-3)
    assert torch.equal(logits(PeftModel.from_pretrained(base, folder / "adapter"), batch), expected)


def test_an_adapter_finds_its_base_by_itself(
    trained: tuple[PeftModel, Path, torch.Tensor], batch: dict[str, torch.Tensor]
) -> None:
    _, folder, expected = trained
    allowed = ["chorus_moe.modeling.modeling_generation"]  # PEFT imports the base's module only if told that it may
    loaded = AutoPeftModel.from_pretrained(folder / "adapter", import_allowlist=allowed)
    assert torch.equal(logits(loaded, batch), expected)


def test_a_merged_adapter_gives_the_same_logits_also_after_saving(
    trained: tuple[PeftModel, Path, torch.Tensor], batch: dict[str, torch.Tensor]
) -> None:
    adapted, folder, expected = trained
    merged = adapted.merge_and_unload()
    # W x + B A x against (W + B A) x: another order of float32 sums at logits of size 3.
    torch.testing.assert_close(logits(merged, batch), expected, atol=1e-5, rtol=0)
    merged.save_pretrained(folder / "merged")
    reloaded = ChorusForConditionalGeneration.from_pretrained(folder / "merged")
    torch.testing.assert_close(logits(reloaded, batch), logits(merged, batch), atol=LAST_BIT, rtol=0)


def test_a_disabled_adapter_leaves_the_base_as_it_was(
    trained: tuple[PeftModel, Path, torch.Tensor], batch: dict[str, torch.Tensor]
) -> None:
    adapted, folder, _ = trained
    base = ChorusForConditionalGeneration.from_pretrained(folder / "base")
    with adapted.disable_adapter():
        torch.testing.assert_close(logits(adapted, batch), logits(base, batch), atol=LAST_BIT, rtol=0)


@pytest.mark.parametrize("is_linear", [False, True])
def test_a_lora_reaches_every_feed_forward_of_a_deep_expert(is_linear: bool) -> None:
    config = tiny_config(expert_banks={"common": {"expert_depth": 2}})
    torch.manual_seed(0)
    model = ChorusForConditionalGeneration(config)
    if is_linear:
        unfuse_experts(model)
    adapted = get_peft_model(model, lora_config(model, banks=["common"], r=2))
    train_steps(adapted, tiny_batch(config))
    moved = {plain_name(n) for n, p in adapted.named_parameters() if ".lora_B" in n and p.any()}
    per_bank = 2 * 4 * 3 if is_linear else 2  # stacks that PEFT nests have one plain name
    assert len(moved) == 2 * per_bank
    with torch.no_grad():
        before = adapted.eval()(**tiny_batch(config)).logits
        merged = adapted.merge_and_unload()(**tiny_batch(config)).logits
    # Float32 sums in another order.
    torch.testing.assert_close(merged, before, rtol=0, atol=1e-4)
