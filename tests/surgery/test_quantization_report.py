"""Bytes of a model by group, counted by hand."""

from dataclasses import FrozenInstanceError

import pytest
import torch
from torch import Tensor, nn

from chorus_moe import ChorusForConditionalGeneration
from chorus_moe.surgery import bytes_report, quantize
from chorus_moe.surgery import quantization_report as module
from chorus_moe.surgery.quantization_report import BytesReport, GroupBytes
from tests.conftest import tiny_config


def made(dtype: torch.dtype = torch.float32) -> ChorusForConditionalGeneration:
    torch.manual_seed(0)
    return ChorusForConditionalGeneration(tiny_config()).to(dtype)


@pytest.mark.parametrize(("dtype", "kind", "size"), [(torch.float32, "float32", 4), (torch.bfloat16, "bfloat16", 2)])
def test_a_whole_model_takes_what_its_tensors_take(dtype: torch.dtype, kind: str, size: int) -> None:
    model, saved = made(dtype), made(dtype).state_dict()
    report = bytes_report(model)
    assert report.bytes == sum(tensor.numel() * tensor.element_size() for tensor in saved.values())
    weights = sum(parameter.numel() for parameter in model.parameters())
    buffers = {name for name, _ in model.named_buffers()} & saved.keys()
    weights += sum(saved[name].numel() for name in buffers)
    assert report.bytes_in_float32 == 4 * weights
    experts = report.groups["experts:text"]
    # Two sparse layers of four experts, gate, up and down of 32 x 64 each.
    layers = len(model.config.text_config.sparse_layers)
    assert experts.numbers == {kind: layers * 4 * 3 * 32 * 64} and experts.bytes == size * experts.total
    assert not experts.is_quantized and report.missed is not None


def test_groups_are_ordered_experts_first_then_by_size() -> None:
    report = bytes_report(made())
    names = list(report.groups)
    first = [name for name in names if name.startswith("experts:")]
    assert names[: len(first)] == first and len(first) == 4
    for part in (names[: len(first)], names[len(first) :]):
        totals = [report.groups[name].total for name in part]
        assert totals == sorted(totals, reverse=True)
    assert {"routers", "bank_gates", "norms", "embeddings", "heads"} <= set(names)


def test_deeper_experts_are_experts_and_routers_are_apart() -> None:
    banks = {"common": {"modalities": ["text", "image", "audio"], "expert_depth": 2}}
    model = ChorusForConditionalGeneration(tiny_config(expert_banks=banks))
    report = bytes_report(model)
    named = {name: tensor.numel() for name, tensor in model.named_parameters() if ".banks." in name}
    experts = sum(size for name, size in named.items() if ".router." not in name)
    assert report.groups["experts:common"].total == experts
    assert any(".deeper_experts." in name for name in named)
    assert report.groups["routers"].total == sum(size for name, size in named.items() if ".router." in name)


@pytest.mark.parametrize(
    ("given", "kind", "each"),
    # Of 32 rows a group at 4 bits: half a byte a weight and four bytes a scale, and as many an offset.
    [
        ({"bits": 4, "group": 32}, "int4", 0.5 + 4 / 32),
        ({"bits": 4, "group": 32, "symmetric": False}, "int4", 0.5 + 8 / 32),
        ({"bits": 8, "group": 16}, "int8", 1 + 4 / 16),
    ],
)
def test_scales_and_offsets_are_bytes_and_no_weights(given: dict[str, int], kind: str, each: float) -> None:
    model = made()
    before = bytes_report(model).groups
    quantize(model, {"experts": given}, verbose=False)  # type: ignore[dict-item]
    after = bytes_report(model).groups
    for name in (name for name in before if name.startswith("experts:")):
        assert after[name].numbers == {kind: before[name].total}
        assert after[name].bytes == each * before[name].total and after[name].is_quantized


def report_of(**groups: dict[str, int]) -> BytesReport:
    sizes = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1.0, "int4": 0.5, "Int8Tensor": 1.0}
    return BytesReport(
        {name: GroupBytes(kinds, int(sum(sizes[k] * n for k, n in kinds.items()))) for name, kinds in groups.items()}
    )


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ({}, False),
        ({"int8": 0}, False),
        ({"float32": 5}, False),
        ({"bfloat16": 5, "float16": 1}, False),
        ({"float32": 5, "int4": 1}, True),
        ({"Int8Tensor": 5}, True),
    ],
)
def test_a_group_is_quantised_if_some_of_it_is(kinds: dict[str, int], expected: bool) -> None:
    assert GroupBytes(kinds, 1).is_quantized is expected


def test_the_largest_group_is_named_if_nothing_in_it_is_quantised(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(module.logger, "warning", said.append)
    reached = report_of(a={"float32": 1}, b={"int8": 3})
    assert reached.missed is None
    reached.warn()
    missed = report_of(a={"float32": 300}, b={"int8": 100})
    assert missed.missed == "a"
    missed.warn()
    assert said == ["nothing in 'a' is quantised, and it is the largest group: 75% of the weights"]


def test_the_table_gives_weights_bytes_and_shares() -> None:
    report = report_of(experts={"int4": 4000}, head={"float32": 1000, "int8": 1000})
    assert str(report).splitlines() == [
        f"{'group':<24}{'weights':>16}{'bytes':>16}{'of float32':>12}  stored as",
        f"{'experts':<24}{'4,000':>16}{'2,000':>16}{'0.125':>12}  int4",
        f"{'head':<24}{'2,000':>16}{'5,000':>16}{'0.625':>12}  float32, int8",
        f"{'all':<24}{'6,000':>16}{'7,000':>16}{'0.292':>12}",
    ]
    assert (report.bytes, report.bytes_in_float32) == (7000, 24000)


class Inner(nn.Module):
    """Parameters, a saved and an unsaved buffer, and one shared by two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(3))
        self.b = self.a
        self.empty = nn.Parameter(torch.zeros(0))
        self.register_buffer("saved", torch.zeros(5, dtype=torch.int64))
        self.register_buffer("unsaved", torch.zeros(7), persistent=False)


def test_what_is_saved_is_counted_once() -> None:
    report = bytes_report(Inner())
    assert report.bytes == 3 * 4 + 5 * 8
    assert sum(group.total for group in report.groups.values()) == 8


class Made(Tensor):
    """A tensor of two others, as those of torchao."""

    @staticmethod
    def __new__(cls, values: Tensor, scale: Tensor) -> "Made":
        return torch.Tensor._make_wrapper_subclass(cls, (4, 8), dtype=torch.float32)  # type: ignore[attr-defined]

    def __init__(self, values: Tensor, scale: Tensor):
        self.values_, self.scale_ = values, scale

    @classmethod
    def __torch_dispatch__(cls, *given: object, **options: object) -> Tensor:
        raise NotImplementedError

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["values_", "scale_"], None


def test_tensors_made_of_others_take_the_bytes_of_these() -> None:
    tensor = Made(torch.zeros(4, 8, dtype=torch.int8), torch.zeros(4, 1))
    assert module._bytes_of(tensor) == 4 * 8 + 4 * 4
    assert module._kind_of(tensor) == "Made"
    assert module._kind_of(torch.zeros(1, dtype=torch.uint8)) == "int4"
    assert module._kind_of(torch.zeros(1, dtype=torch.int8)) == "int8"


def test_a_report_does_not_change() -> None:
    with pytest.raises(FrozenInstanceError):
        report_of(a={"int8": 1}).groups = {}  # type: ignore[misc]
