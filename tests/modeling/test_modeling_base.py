"""The base class: which experts run, how weights start, what a misfit says, and where parameters lie."""

import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from chorus_moe import ChorusForConditionalGeneration, ChorusModel
from chorus_moe.modeling import modeling_base
from chorus_moe.modeling.attention import ModalityProjection
from chorus_moe.modeling.configuration_services import SERVICES
from chorus_moe.modeling.modeling_base import (
    ALIGNMENT,
    CheckpointError,
    align_parameters,
    check_shapes,
    describe_misfit,
    make_readable,
)
from tests.conftest import tiny_config


@pytest.fixture(scope="module")
def whole() -> ChorusForConditionalGeneration:
    torch.manual_seed(0)
    return ChorusForConditionalGeneration(tiny_config())


def test_the_registered_fast_path_runs_unless_another_is_asked_for(
    whole: ChorusForConditionalGeneration, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert whole.get_correct_experts_implementation(None) == "cpu_mm"
    assert whole.get_correct_experts_implementation("eager") == "eager"
    keys = [key for key in ALL_EXPERTS_FUNCTIONS.valid_keys() if key != "cpu_mm"]
    monkeypatch.setattr(type(ALL_EXPERTS_FUNCTIONS), "valid_keys", lambda self: keys)
    theirs = PreTrainedModel.get_correct_experts_implementation(whole, None)
    assert whole.get_correct_experts_implementation(None) == theirs != "cpu_mm"


def test_every_class_says_what_transformers_asks(whole: ChorusForConditionalGeneration) -> None:
    for part in (whole, whole.model, whole.model.language_model):
        assert part._can_set_attn_implementation() and part._can_set_experts_implementation()
    assert whole.base_model is whole.model and whole.input_modalities == ("text", "image", "audio")
    for flag in ("flash_attn", "sdpa", "flex_attn", "attention_backend"):
        assert getattr(whole, f"_supports_{flag}")
    assert whole.supports_gradient_checkpointing and whole._can_compile_fullgraph


def test_a_rule_of_a_projection_is_not_for_a_dictionary_of_projections(whole: ChorusForConditionalGeneration) -> None:
    decoder = whole.model.language_model
    plan = decoder._expand_parallel_plan(decoder.config.base_model_tp_plan)
    dictionaries = {name for name, module in decoder.named_modules() if isinstance(module, ModalityProjection)}
    linear = {name for name, module in decoder.named_modules() if isinstance(module, nn.Linear)}
    assert dictionaries and not dictionaries & set(plan)
    attention = {name for name in linear if ".self_attn." in name}
    assert attention == {name for name in plan if ".self_attn." in name and not name.endswith((".weight", ".bias"))}


def test_weights_start_as_a_module_says_with_the_range_of_the_decoder() -> None:
    given: list[float] = []

    class Own(nn.Module):
        def start_weights(self, std: float) -> None:
            given.append(std)

    model = ChorusModel(tiny_config(initializer_range=0.125))
    model._init_weights(Own())
    assert given == [0.125]
    linear = nn.Linear(400, 400)
    nn.init.ones_(linear.bias)
    model.language_model._init_weights(linear)
    assert linear.weight.std().item() == pytest.approx(0.125, rel=0.05) and not linear.bias.any()


@pytest.mark.parametrize("rights", [0o600, 0o640, 0o444])
def test_a_file_gets_the_rights_of_a_new_one(tmp_path: Path, rights: int) -> None:
    path = tmp_path / "model.safetensors"
    path.touch()
    expected = stat.S_IMODE(path.stat().st_mode)
    path.chmod(rights)
    make_readable(path)
    assert stat.S_IMODE(path.stat().st_mode) == expected
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


def test_one_process_alone_touches_what_was_saved(
    whole: ChorusForConditionalGeneration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touched: list[Any] = []
    monkeypatch.setattr(modeling_base, "make_readable", touched.append)
    monkeypatch.setitem(SERVICES, "drop_absent_code", touched.append)
    whole.save_pretrained(tmp_path)
    assert touched == [tmp_path / "model.safetensors", tmp_path / "config.json"]
    whole.save_pretrained(tmp_path, is_main_process=False)
    assert len(touched) == 2


def test_mismatched_shapes_are_named_in_order_up_to_five() -> None:
    model = nn.Linear(2, 2)
    check_shapes(model, "somewhere", [])
    pairs = [(f"w{i}", torch.Size([i, 3]), torch.Size([4])) for i in (6, 2, 1, 3, 5, 4)]
    named = "; ".join(f"w{i} ({i}, 3), expected (4,)" for i in range(1, 6))
    advice = r". Pass ignore_mismatched_sizes=True to start these tensors anew"
    for count, said in ((6, f"6 mismatched tensors: {named}; and 1 more"), (5, None)):
        some = [pair for pair in pairs if pair[0] <= f"w{count}"]
        with pytest.raises(CheckpointError) as caught:
            check_shapes(model, "somewhere", some)
        said = said or f"5 mismatched tensors: {named}"
        assert str(caught.value) == f"the checkpoint 'somewhere' does not fit Linear: {said}{advice}"
    with pytest.raises(
        RuntimeError, match=r"^the state dict does not fit Linear: 1 mismatched tensor: w1 \(1, 3\), exp"
    ):
        check_shapes(model, None, pairs[2:3])


HEAD, BODY, PART, OTHER = "lm_head.weight", "model.language_model.norm.weight", "language_model.x", "score.weight"


@pytest.mark.parametrize(
    ("saved_by", "missing", "unexpected", "said"),
    [
        ("ChorusForConditionalGeneration", [], [], None),
        ("ChorusForConditionalGeneration", [HEAD], [], "1 missing tensor: lm_head.weight. "),
        ("ChorusForConditionalGeneration", [], [OTHER], "1 unexpected tensor: score.weight. "),
        ("ChorusModel", [HEAD], [OTHER], None),
        (None, [HEAD], [OTHER], None),
        ("ChorusModel", [HEAD, BODY], [], f"1 missing tensor: {BODY}. "),
        # Below another prefix, a part of the inner model all the same.
        ("ChorusModel", [], [OTHER, PART], f"1 unexpected tensor: {PART}. "),
        ("ChorusModel", [BODY], [PART], f"1 missing tensor: {BODY}; 1 unexpected tensor: {PART}. "),
    ],
)
def test_what_does_not_fit_depends_on_who_saved_it(
    whole: ChorusForConditionalGeneration, saved_by: str | None, missing: list[str], unexpected: list[str],
    said: str | None, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(whole.config, "architectures", [saved_by] if saved_by else None)
    found = describe_misfit(whole, "here", missing, unexpected)
    if said is None:
        assert found is None
        return
    start = f"the checkpoint 'here' does not fit ChorusForConditionalGeneration: {said}"
    assert found is not None and found.startswith(f"{start}Pass output_loading_info=True to load it all the same")


def test_the_package_advises_where_tensors_are_missing_and_none_is_too_much(
    whole: ChorusForConditionalGeneration, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SERVICES, "advise_missing", lambda names: f"Add {', '.join(names)}. ")
    assert f"Add {PART}, {BODY}. Pass" in str(describe_misfit(whole, None, [BODY, PART], []))
    assert "Add" not in str(describe_misfit(whole, None, [BODY], [PART]))
    monkeypatch.delitem(SERVICES, "advise_missing")
    assert f"{BODY}. Pass" in str(describe_misfit(whole, None, [BODY], []))


def test_parameters_at_odd_places_are_copied_and_others_stay() -> None:
    memory = torch.zeros(64, dtype=torch.float32)
    shift = (-memory.data_ptr() // 4) % (ALIGNMENT // 4)
    aligned, odd = memory[shift : shift + 4], memory[shift + 2 : shift + 6]
    model = nn.Module()
    for name, data in (("aligned", aligned), ("odd", odd)):
        setattr(model, name, nn.Parameter(data.normal_()))
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    align_parameters(model)
    assert all(torch.equal(p, values[name]) for name, p in model.named_parameters())
    assert model.aligned.data_ptr() == aligned.data_ptr() and model.odd.data_ptr() % ALIGNMENT == 0


@pytest.mark.parametrize(("ignores", "refused"), [(False, True), (True, False)])
def test_what_loading_found_is_noted_for_the_caller(
    whole: ChorusForConditionalGeneration, ignores: bool, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = (HEAD, torch.Size([1]), torch.Size([2]))
    used, unused = (SimpleNamespace(was_used=lambda u=u: u) for u in (True, False))
    info = SimpleNamespace(missing_keys={BODY}, unexpected_keys=set(), mismatched_keys={shapes})
    config = SimpleNamespace(ignore_mismatched_sizes=ignores, pretrained_model_name_or_path="here")
    monkeypatch.setattr(PreTrainedModel, "_finalize_model_loading", staticmethod(lambda model, load, info: info))
    monkeypatch.setattr(whole, "_weight_conversions", [used, unused], raising=False)
    if refused:
        with pytest.raises(CheckpointError, match="1 mismatched tensor: lm_head"):
            type(whole)._finalize_model_loading(whole, config, info)
        return
    assert type(whole)._finalize_model_loading(whole, config, info) is info
    assert whole._weight_conversions == [used]
    assert (
        vars(whole).pop("_misfit").startswith(f"the checkpoint 'here' does not fit {type(whole).__name__}: 1 missing")
    )
