"""One sparse layer at four sizes against transformers' own, forward and forward with backward.

Run as `python -m benchmarks.sparse_layer`. Two tables:

- one bank against the same experts through transformers' `grouped_mm` (its default) and `eager`, against Qwen3-Omni
  thinker's block and against a dense SwiGLU of equal *active* parameters. Forward also against what no program can
  leave out: `products`, the matrix products of the chosen experts alone, and `reading`, their weights read once;
- text and image banks against the ERNIE 4.5 VL block, and text, image and audio banks against ERNIE's boolean masks
  over three modalities.

All variants of a case hold the same weights; before anything is timed their outputs are compared. Every training call
frees its gradients. Whether the next gets their memory or pages that the kernel must clear first is luck, and worth 10
of 25 ms at 16 tokens: `--keep-pages` takes it out of the comparison.
"""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.ernie4_5_vl_moe import modeling_ernie4_5_vl_moe as ernie
from transformers.models.ernie4_5_vl_moe.configuration_ernie4_5_vl_moe import Ernie4_5_VLMoeTextConfig
from transformers.models.qwen3_omni_moe import modeling_qwen3_omni_moe as qwen
from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeTextConfig

from benchmarks.timing import OURS, Report, figures, keep_pages, measure, parse
from chorus_moe.fastpaths.expert_slots import few_rows
from chorus_moe.modeling.configuration_modalities import MODALITY_IDS
from chorus_moe.modeling.configuration_text import ChorusTextConfig
from chorus_moe.modeling.layers import GatedMLP
from chorus_moe.modeling.moe_banks import MixtureOfBanks
from chorus_moe.modeling.moe_plan import ForwardPlan

HIDDEN = 512
SHAPES = {8: (2, 1024), 16: (2, 512), 64: (4, 256)}  # experts -> (chosen per token, width)
TOKENS = (1, 16, 256, 8192)
SHARES = {"text": 0.3, "image": 0.6, "audio": 0.1}
BOUNDS = ("products", "reading")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


class Sizes:
    """What all variants of a case share."""

    def __init__(self, hidden: int, experts: int, top_k: int, width: int):
        self.hidden, self.experts, self.top_k, self.width = hidden, experts, top_k, width

    def chorus(self, banks: list[str], implementation: str = "cpu_mm") -> ChorusTextConfig:
        config = ChorusTextConfig(
            vocab_size=64,
            hidden_size=self.hidden,
            num_hidden_layers=1,
            mlp_layer_types=["sparse"],
            num_experts=self.experts,
            num_experts_per_tok=self.top_k,
            moe_intermediate_size=self.width,
            shared_expert_intermediate_size=0,
            expert_banks={name: {} for name in banks},
        )
        config._experts_implementation = implementation
        return config

    def ernie(self) -> Ernie4_5_VLMoeTextConfig:
        config = Ernie4_5_VLMoeTextConfig(
            hidden_size=self.hidden,
            moe_num_experts=self.experts,
            moe_k=self.top_k,
            moe_intermediate_size=[self.width, self.width],
            moe_num_shared_experts=0,
        )
        config._experts_implementation = "grouped_mm"
        return config

    def qwen(self) -> Qwen3OmniMoeTextConfig:
        config = Qwen3OmniMoeTextConfig(
            hidden_size=self.hidden,
            num_experts=self.experts,
            num_experts_per_tok=self.top_k,
            moe_intermediate_size=self.width,
        )
        config._experts_implementation = "grouped_mm"
        return config


class ErnieMasks(nn.Module):
    """ERNIE 4.5 VL's dispatch carried over to any number of modalities: boolean masks, one block after the other."""

    def __init__(self, config: Ernie4_5_VLMoeTextConfig, modalities: list[str]):
        super().__init__()
        blocks = {m: ernie.Ernie4_5_VLMoeSparseMoeBlock(config, config.moe_intermediate_size[0]) for m in modalities}
        self.blocks = nn.ModuleDict(blocks)

    def forward(self, hidden_states: Tensor, modality_BS: Tensor) -> Tensor:
        output = torch.zeros_like(hidden_states)
        for name, block in self.blocks.items():
            mask = (modality_BS == MODALITY_IDS[name])[..., None].expand_as(hidden_states)
            output[mask] = block(hidden_states[mask])[0]
        return output


class Products(nn.Module):
    """The two products of each chosen expert, on as many rows as chose it, into memory that is there already. No
    routing, no gathering, no activation, no weighted sum. The choices are those of the first call. The weights are a
    copy: to read those of another variant would warm the cache for it."""

    def __init__(self, layer: MixtureOfBanks):
        super().__init__()
        self.bank = deepcopy(layer.banks["common"])
        self.buffers_of_experts: list[tuple[Tensor, ...]] = []

    def prepare(self, hidden: Tensor) -> None:
        choices = self.bank.router(hidden[0]).selected_experts.flatten().tolist()
        experts = self.bank.experts
        for expert in sorted(set(choices)):
            rows, double, single = choices.count(expert), experts.gate_up_proj.shape[1], experts.down_proj.shape[2]
            states, active = hidden.new_ones(rows, hidden.shape[2]), hidden.new_ones(rows, single)
            outputs = hidden.new_empty(rows * double), hidden.new_empty(rows * hidden.shape[2])
            self.buffers_of_experts.append(
                (experts.gate_up_proj[expert], experts.down_proj[expert], states, active, *outputs)
            )

    def forward(self, hidden: Tensor) -> None:
        if not self.buffers_of_experts:
            self.prepare(hidden)
        few = few_rows(self.bank.experts.gate_up_proj, is_training=False)
        for gate_up, down, states, active, first, second in self.buffers_of_experts:
            multiply(gate_up, states, first, len(states) < few)
            multiply(down, active, second, len(states) < few)


class Reading(Products):
    """The weights of the chosen experts, read once by a product with a vector."""

    def forward(self, hidden: Tensor) -> None:
        if not self.buffers_of_experts:
            self.prepare(hidden)
        for gate_up, down, states, active, first, second in self.buffers_of_experts:
            torch.mv(gate_up, states[0], out=first[: len(gate_up)])
            torch.mv(down, active[0], out=second[: len(down)])


def multiply(weight: Tensor, rows: Tensor, out: Tensor, is_right: bool) -> None:
    """The weight on the right or on the left of the rows, whichever is faster, into a buffer."""
    if is_right:
        torch.mm(rows, weight.t(), out=out.view(len(rows), -1))
    else:
        torch.mm(weight, rows.t(), out=out.view(-1, len(rows)))


def copy_bank(ours: MixtureOfBanks, bank: str, block: nn.Module) -> None:
    """Give a block of transformers the weights of one of our banks."""
    with torch.no_grad():
        block.gate.weight.copy_(ours.banks[bank].router.weight)
        block.experts.gate_up_proj.copy_(ours.banks[bank].experts.gate_up_proj)
        block.experts.down_proj.copy_(ours.banks[bank].experts.down_proj)


def initialised(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.05)
    return module


def one_bank(sizes: Sizes, modality_BS: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """Variant -> module, all called with hidden states; the dense one and the bounds have no equal output."""
    plan = ForwardPlan.build(modality_BS, None)
    ours = {
        name: MixtureOfBanks(sizes.chorus(["common"], kind), 0).to(dtype)
        for name, kind in ((OURS, "cpu_mm"), ("grouped_mm", "grouped_mm"), ("eager", "eager"))
    }
    initialised(ours[OURS])
    for module in ours.values():
        module.load_state_dict(ours[OURS].state_dict())
    omni = qwen.Qwen3OmniMoeThinkerTextSparseMoeBlock(sizes.qwen()).to(dtype)
    copy_bank(ours[OURS], "common", omni)
    dense = initialised(GatedMLP(sizes.chorus(["common"]), sizes.top_k * sizes.width).to(dtype))
    calls = {name: (module, lambda x, m=module: m(x, plan)[0]) for name, module in ours.items()}
    bounds = {name: kind(ours[OURS]) for name, kind in zip(BOUNDS, (Products, Reading), strict=True)}
    others = {"qwen3_omni": omni, "dense_active": dense} | bounds
    return calls | {name: (module, module) for name, module in others.items()}


def two_modalities(sizes: Sizes, modality_BS: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    plan = ForwardPlan.build(modality_BS, None)
    ours = initialised(MixtureOfBanks(sizes.chorus(["text", "image"]), 0).to(dtype))
    block = ernie.Ernie4_5_VLMoeMoeBlock(sizes.ernie()).to(dtype)
    copy_bank(ours, "text", block.text_moe)
    copy_bank(ours, "image", block.vision_moe)
    return {OURS: (ours, lambda x: ours(x, plan)[0]), "ernie_vl": (block, lambda x: block(x, modality_BS)[0])}


def three_modalities(sizes: Sizes, modality_BS: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    plan = ForwardPlan.build(modality_BS, None)
    ours = initialised(MixtureOfBanks(sizes.chorus(list(SHARES)), 0).to(dtype))
    masks = ErnieMasks(sizes.ernie(), list(SHARES)).to(dtype)
    for name in SHARES:
        copy_bank(ours, name, masks.blocks[name])
    return {OURS: (ours, lambda x: ours(x, plan)[0]), "ernie_masks": (masks, lambda x: masks(x, modality_BS))}


def spans(tokens: int, modalities: list[str]) -> Tensor:
    """`(1, tokens)`: one span a modality, in the proportions of `SHARES`."""
    total = sum(SHARES[name] for name in modalities)
    counts = [round(tokens * SHARES[name] / total) for name in modalities]
    counts[0] += tokens - sum(counts)
    ids = [torch.full((count,), MODALITY_IDS[name]) for name, count in zip(modalities, counts, strict=True)]
    return torch.cat(ids)[None]


def check_equal(variants: dict[str, Any], hidden: Tensor) -> None:
    """All variants but the dense one and the bounds compute the same. In 16 bits a rounding may move a token to another
    expert: one token in a hundred may differ."""
    with torch.no_grad():
        expected = variants[OURS][1](hidden)
        for name, (_, call) in variants.items():
            if name not in ("dense_active", *BOUNDS):
                of_tokens = (call(hidden) - expected).abs().amax(dim=-1).flatten() / expected.abs().max()
                strays = len(of_tokens) // 100 if hidden.dtype.itemsize < 4 else 0
                error = of_tokens.sort(descending=True).values[strays].item()
                if error > TOLERANCE[hidden.dtype]:
                    raise RuntimeError(f"{name}: output differs from {OURS} by {error:.1e} of its largest value")


def run_case(variants: dict[str, Any], hidden: Tensor, is_training: bool, rounds: int) -> dict[str, float]:
    def forward(call: Any) -> None:
        with torch.no_grad():
            call(hidden)

    def train(module: nn.Module, call: Any) -> None:
        leaf = hidden.detach().requires_grad_()
        call(leaf).sum().backward()
        module.zero_grad(set_to_none=True)

    calls = {
        name: (lambda m=module, c=call: train(m, c)) if is_training else (lambda c=call: forward(c))
        for name, (module, call) in variants.items()
        if not (is_training and name in BOUNDS)
    }
    return figures(measure(calls, rounds))


def cases(quick: bool, shapes: dict[int, tuple[int, int]]) -> Iterator[tuple[str, Any, Sizes, Tensor]]:
    hidden = 32 if quick else HIDDEN
    tokens = (6,) if quick else TOKENS
    for experts, (top_k, width) in shapes.items():
        sizes = Sizes(hidden, experts, top_k, 16 if quick else width)
        for count in tokens:
            yield f"E{experts} T{count} one bank", one_bank, sizes, torch.zeros(1, count, dtype=torch.long)
    sizes = Sizes(hidden, 8, 2, 16 if quick else 512)
    for count in tokens:
        yield f"E8 T{count} two modalities", two_modalities, sizes, spans(count, ["text", "image"])
        yield f"E8 T{count} three modalities", three_modalities, sizes, spans(count, list(SHARES))


def main(arguments: list[str] | None = None) -> None:
    options = (
        ("--experts", {"type": int, "nargs": "+", "default": list(SHAPES), "choices": list(SHAPES)}),
        ("--passes", {"nargs": "+", "default": ["forward", "training"], "choices": ["forward", "training"]}),
        ("--only", {"default": "", "help": "run only the cases whose name holds this"}),
        ("--keep-pages", {"action": "store_true", "help": "no fresh pages for any variant (glibc)"}),
    )
    parsed = parse("One sparse layer against transformers' own.", arguments, *options)
    if parsed.keep_pages:
        keep_pages()
    dtype = getattr(torch, parsed.dtype)
    report = Report(f"sparse layer, {parsed.dtype}", parsed)
    shapes = {8: SHAPES[8]} if parsed.quick else {experts: SHAPES[experts] for experts in parsed.experts}
    for name, build, sizes, modality_BS in cases(parsed.quick, shapes):
        for kind in parsed.passes:
            case = f"{name} {kind}"
            if parsed.only not in case:
                continue
            variants = build(sizes, modality_BS, dtype)
            hidden = torch.randn(1, modality_BS.shape[1], sizes.hidden, dtype=dtype)
            check_equal(variants, hidden)
            report.add(case, run_case(variants, hidden, kind == "training", parsed.rounds))
    report.save()


if __name__ == "__main__":
    main()
