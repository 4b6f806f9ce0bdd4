"""Expert banks: a router and its experts, open to some modalities.

A bank is addressed by name everywhere (config, LoRA, losses, statistics).

Shape suffixes: T tokens, R rows of the bank, D hidden size, N banks of the layer, E experts in the bank, K experts per
token, P choices (R * K), I expert width.
"""

from collections.abc import Collection, Sequence
from copy import copy
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation

from .configuration_banks import LayerBankConfig
from .configuration_modalities import MODALITY_IDS
from .configuration_text import ChorusTextConfig
from .layers import CHUNK, GatedMLP, TokenGate, float32_product, in_chunks, without_autocast
from .modeling_outputs import BankRouting
from .moe_plan import ForwardPlan, RowOptions, add_rows, take_rows
from .moe_routers import ROUTER_CLASSES

# Chunks of a long sequence give an expert this many rows on average, or more.
ROWS_OF_AN_EXPERT = 128


def run_one_by_one(
    experts: "ChorusExperts | LinearExperts",
    output_TD: Tensor,
    hidden_TD: Tensor,
    index_TK: Tensor,
    weights_TK: Tensor,
    runs_idle: bool = False,
) -> Tensor:
    """`output_TD` with what each expert makes of its tokens; those without tokens run on no rows or not at all."""
    for expert in range(experts.num_experts):
        token, slot = torch.where(index_TK == expert)
        if len(token) or runs_idle:
            states = experts.run_expert(expert, hidden_TD[token]) * weights_TK[token, slot, None]
            output_TD = output_TD.index_add(0, token, states.to(output_TD.dtype))
    return output_TD


@use_experts_implementation
class ChorusExperts(nn.Module):
    """The experts of one bank, stacked: `gate_up_proj (E, 2I, D)` and `down_proj (E, D, I)`.

    This forward is the reference (`experts_implementation="eager"`); the others are registered with transformers.
    """

    def __init__(self, config: ChorusTextConfig, bank: LayerBankConfig):
        super().__init__()
        self.num_experts = bank.num_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = bank.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(bank.num_experts, 2 * bank.intermediate_size, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(bank.num_experts, config.hidden_size, bank.intermediate_size))
        self.act_fn = ACT2FN[config.hidden_act]

    def start_weights(self, std: float) -> None:
        init.normal_(self.gate_up_proj, mean=0.0, std=std)
        init.normal_(self.down_proj, mean=0.0, std=std)

    def run_expert(self, expert: int, hidden_states: Tensor) -> Tensor:
        """The output of one expert, unweighted."""
        gate, up = F.linear(hidden_states, self.gate_up_proj[expert]).chunk(2, dim=-1)
        return F.linear(self.act_fn(gate) * up, self.down_proj[expert])

    def narrowed(self, width: int) -> "ChorusExperts":
        """These experts with the leading part of their width alone, for any implementation; gradients reach them."""
        part: Any = copy(self)
        # Plain tensors in the place of parameters: a copy of the weights is cut for the call and goes with it.
        part._parameters = {}
        gate_up = self.gate_up_proj.unflatten(1, (2, -1))[:, :, :width].flatten(1, 2)
        part.gate_up_proj, part.down_proj = gate_up, self.down_proj[..., :width].contiguous()
        part.intermediate_dim = width
        return part

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        # The empty sums keep both parameters and the router in the graph when the bank has no tokens.
        unused = self.gate_up_proj[:0].sum() + self.down_proj[:0].sum() + top_k_weights[:0].sum()
        output_TD = torch.zeros_like(hidden_states) + unused.to(hidden_states.dtype)
        return run_one_by_one(self, output_TD, hidden_states, top_k_index, top_k_weights)


class OwnGate(TokenGate):
    """The bank gate of a bank that stands beside the softmax over the others: `sigmoid(w x + b)`, in float32."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states).sigmoid()


class LinearExperts(nn.ModuleList):
    """The experts of one bank as feed-forwards of ordinary linear layers (`experts_layout="linear"`).

    Per-sample gradients, 4-bit loaders and several adapters at a time need `nn.Linear`. Parameters are named as in
    checkpoints with one tensor an expert: `experts.0.gate_proj.weight`. One way to compute, expert after expert.
    """

    def __init__(self, config: ChorusTextConfig, bank: LayerBankConfig):
        super().__init__(GatedMLP(config, bank.intermediate_size) for _ in range(bank.num_experts))
        self.num_experts = bank.num_experts

    def run_expert(self, expert: int, hidden_states: Tensor) -> Tensor:
        """The output of one expert, unweighted."""
        return self[expert](hidden_states)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        # Without rows they run all the same where gradients are wanted: their parameters stay in the graph.
        inputs = (torch.zeros_like(hidden_states), hidden_states, top_k_index, top_k_weights)
        return run_one_by_one(self, *inputs, runs_idle=torch.is_grad_enabled())


EXPERT_CLASSES: dict[str, type[ChorusExperts] | type[LinearExperts]] = {"fused": ChorusExperts, "linear": LinearExperts}


class ExpertBank(nn.Module):
    """A router and its experts. Adds `bank gate * bank(x)` to the output at the rows that may enter."""

    def __init__(self, config: ChorusTextConfig, bank: LayerBankConfig):
        super().__init__()
        self.name = bank.name
        self.modalities = bank.modalities
        self.num_experts = bank.num_experts
        self.router = ROUTER_CLASSES[bank.router](config.hidden_size, bank)
        stack = EXPERT_CLASSES[config.experts_layout]
        self.experts = stack(config, bank)
        # Apart from the first feed-forwards, which so keep the names that every checkpoint has.
        self.deeper_experts = nn.ModuleList(stack(config, bank) for _ in range(bank.expert_depth - 1))
        self.gate = OwnGate(config.hidden_size) if bank.has_own_gate else None
        self.may_skip_slots = bank.adaptive_experts or bank.expert_capacity is not None
        # Leading parts of the width that a token may use.
        self.widths = [round(share * bank.intermediate_size) for share in config.expert_width_shares or ()]
        self.chunk_size = config.chunk_size_feed_forward
        # As many rows as give each expert enough of them to be worth reading.
        self.automatic_chunk = max(CHUNK, ROWS_OF_AN_EXPERT * bank.num_experts // bank.num_experts_per_tok)

    @property
    def stacks(self) -> list[Any]:
        """The feed-forwards of all experts, those that come first in front; an adapter may be wrapped around each."""
        return [self.experts, *self.deeper_experts]

    @staticmethod
    def _stacked_experts(experts: nn.Module) -> ChorusExperts:
        """The experts themselves, also where an adapter is wrapped around them."""
        if isinstance(experts, ChorusExperts):
            return experts
        return next(module for module in experts.modules() if isinstance(module, ChorusExperts))

    def run_expert(self, expert: int, hidden_states: Tensor) -> Tensor:
        """The output of one expert, unweighted."""
        output = self.experts.run_expert(expert, hidden_states)
        for stack in self.stacks[1:]:
            output = output + stack.run_expert(expert, hidden_states + output)
        return output

    def _feed(self, hidden_RD: Tensor, index_RK: Tensor, weights_RK: Tensor, width: int | None = None) -> Tensor:
        stacks = self.stacks if width is None else [self._narrowed(stack, width) for stack in self.stacks]
        run = partial(self._feed_deeply, stacks) if len(stacks) > 1 else stacks[0]
        inputs = (hidden_RD, index_RK, weights_RK)
        is_stacked = not isinstance(self.experts, LinearExperts)
        if is_stacked and self._stacked_experts(self.experts).num_experts != self.num_experts:
            return run(*inputs)  # spread over ranks, which all make the same calls
        return in_chunks(run, inputs, self.chunk_size, self.automatic_chunk)

    def _narrowed(self, stack: Any, width: int) -> Any:
        """Raises ValueError for experts that are not plainly here: the leading part of a shard is another part."""
        if width == self.widths[-1]:
            return stack
        if not isinstance(stack, ChorusExperts) or stack.down_proj.shape[::2] != (self.num_experts, self.widths[-1]):
            raise ValueError(
                f"expert bank {self.name!r}: width {width} of {self.widths[-1]} takes experts as they are, with no "
                "adapter on them and not spread over ranks; merge the adapter, or use the whole width"
            )
        return stack.narrowed(width)

    def _feed_by_width(self, hidden_RD: Tensor, index_RK: Tensor, weights_RK: Tensor, width_R: Tensor | int) -> Tensor:
        """As `_feed`, each row with its own part of the width, by index in `widths`."""
        if isinstance(width_R, int):
            return self._feed(hidden_RD, index_RK, weights_RK, self.widths[width_R])
        output_RD = torch.zeros_like(hidden_RD)
        for number, width in enumerate(self.widths):
            rows = (width_R == number).nonzero().squeeze(1)
            # Without rows they run all the same in training, so that all ranks have gradients.
            if len(rows) or torch.is_grad_enabled():
                fed = self._feed(hidden_RD[rows], index_RK[rows], weights_RK[rows], width)
                output_RD = output_RD.index_copy(0, rows, fed.to(output_RD.dtype))
        return output_RD

    def _feed_deeply(self, stacks: Sequence[Any], hidden_RD: Tensor, index_RK: Tensor, weights_RK: Tensor) -> Tensor:
        """Experts of several feed-forwards. Every choice is a row of its own that visits one expert with weight 1, so
        each implementation of experts returns what the next feed-forward reads."""
        start_PD = hidden_RD.repeat_interleave(index_RK.shape[1], dim=0)
        index_P1 = index_RK.reshape(-1, 1)
        # An unused slot visits nothing, and implementations may leave anything in its row.
        used_P1 = (index_P1 < self.num_experts).to(weights_RK.dtype)
        output_PD = stacks[0](start_PD, index_P1, used_P1)
        for stack in stacks[1:]:
            output_PD = output_PD + stack(start_PD + output_PD, index_P1, used_P1)
        return (output_PD.unflatten(0, index_RK.shape) * weights_RK[..., None]).sum(dim=1)

    def _visitable(self, index_RK: Tensor) -> Tensor:
        """Choices with sentinels, as the experts can take them."""
        if isinstance(self.experts, LinearExperts):
            return index_RK
        for stack in self.stacks:
            experts: Any = self._stacked_experts(stack)
            # transformers' functions skip an id of E or more, and mask its gradient, only where this flag is set.
            if not experts._is_expert_parallel:
                experts._is_expert_parallel = True
        # Experts spread over ranks: each rank has fewer than E, and the exchange of tokens has no sentinel id. There an
        # unused slot visits expert 0 with weight 0.
        return index_RK if experts.num_experts == self.num_experts else index_RK.remainder(self.num_experts)

    def forward(
        self, output_TD: Tensor | None, hidden_TD: Tensor, gate_T: Tensor | None, plan: ForwardPlan
    ) -> tuple[Tensor | None, BankRouting]:
        # The model has found them once for all layers: looking per bank would wait for the device each time.
        rows = plan.rows_of_bank(self.name, self.modalities)
        # In training it runs on no rows and stays in the graph, so that all ranks have gradients for it.
        if rows is not None and len(rows) == 0 and not torch.is_grad_enabled():
            return output_TD, self.router.no_rows(hidden_TD)
        hidden_RD = take_rows(hidden_TD, rows)
        token_mask = plan.token_mask(self.modalities, rows)
        options = plan.row_options(self.name, self.modalities, rows, token_mask)
        choice = self.router(hidden_RD, options)
        logits_RE, weights_RK, index_RK = choice[:3]
        own_gate = self.gate
        if own_gate is not None:
            gate_R = own_gate(hidden_RD)
            # A static plan shows the bank every row.
            gate_R = gate_R * token_mask if plan.is_static and token_mask is not None else gate_R
            states_weights_RK = weights_RK * gate_R[:, None]
        elif gate_T is None:
            gate_R, states_weights_RK = logits_RE.new_ones(hidden_RD.shape[0]), weights_RK
        else:
            gate_R = take_rows(gate_T, rows)
            states_weights_RK = weights_RK * gate_R[:, None]
        visited_RK = index_RK
        if self.may_skip_slots or (options is not None and options.budget_R is not None):
            visited_RK = self._visitable(index_RK)
        # The bank's weight is multiplied into those of its choices: one product of T x K numbers, not of T x D.
        inputs = (hidden_RD, visited_RK, states_weights_RK.to(hidden_RD.dtype))
        width_R = self._widths_of(hidden_RD, options)
        states_RD = self._feed(*inputs) if width_R is None else self._feed_by_width(*inputs, width_R)
        output_TD = add_rows(output_TD, rows, states_RD, hidden_TD)
        rows = plan.in_batch(rows)
        routing = BankRouting(logits_RE, weights_RK, index_RK, token_mask, gate_R, rows, *choice[3:])
        return output_TD, routing if width_R is None else routing._replace(widths=width_R)

    def _widths_of(self, hidden_RD: Tensor, options: RowOptions | None) -> Tensor | int | None:
        """What was asked for, or what training draws; None for the whole width."""
        if options is not None and options.width_R is not None:
            return options.width_R
        if not (self.widths and self.training):
            return None
        if torch.compiler.is_compiling():
            raise ValueError("training with expert_width_shares cannot be compiled: each token draws a width")
        return torch.randint(len(self.widths), hidden_RD.shape[:1], device=hidden_RD.device)


class BankGate(nn.Module):
    """The shared bank gate: a softmax over the banks open to a token's modality, in float32.

    A token that no bank is open to gets zeros. One bank needs no weights: it gets ones where it is open. Banks with
    a bank gate of their own are none of its columns.
    """

    def __init__(self, hidden_size: int, banks: list[LayerBankConfig]):
        super().__init__()
        self.banks = banks
        self.weight = nn.Parameter(torch.empty(len(banks), hidden_size)) if len(banks) > 1 else None
        # Made of the configuration, so not saved: it could only disagree with it.
        self.is_open = nn.Buffer(self.open_table(), persistent=False)

    def start_weights(self, std: float) -> None:
        init.copy_(self.is_open, self.open_table())
        if self.weight is not None:
            init.normal_(self.weight, mean=0.0, std=std)

    def open_table(self) -> Tensor:
        """`(modality id, bank)`: True where the bank takes the modality."""
        table = torch.zeros(max(MODALITY_IDS.values()) + 1, len(self.banks), dtype=torch.bool)
        for column, bank in enumerate(self.banks):
            for modality in bank.modalities:
                table[MODALITY_IDS[modality], column] = True
        return table

    def forward(self, hidden_TD: Tensor, modality_T: Tensor, closed_banks: Collection[str] = ()) -> Tensor:
        open_TN = self.is_open[modality_T]
        for column, bank in enumerate(self.banks):
            # Before the softmax, so that the open banks share the whole weight, as if this one were not there.
            if bank.name in closed_banks:
                open_TN[:, column] = False
        if self.weight is None:
            return open_TN.float()
        with without_autocast(hidden_TD):
            logits_TN = float32_product(hidden_TD, self.weight)
            logits_TN = logits_TN.masked_fill(~open_TN, torch.finfo(torch.float32).min)
            # The lowest number, not minus infinity, whose softmax over no open bank would be NaN. The product gives 0.
            return logits_TN.softmax(dim=-1) * open_TN


class MixtureOfBanks(nn.Module):
    """Expert banks under a bank gate, the feed-forward of a sparse layer.

    1. the always-on shared experts see every token;
    2. the bank gate weighs the banks open to the token's modality, those with a gate of their own apart;
    3. each bank routes its own tokens to K experts;
    4. the weighted outputs are summed.

    Returns the output `(B, S, D)` and, by bank, what was decided ([`BankRouting`]).
    """

    def __init__(self, config: ChorusTextConfig, layer_idx: int):
        super().__init__()
        banks = config.banks_of_layer(layer_idx)
        shared_size = config.shared_expert_intermediate_size
        self.shared_experts = GatedMLP(config, shared_size) if shared_size else None
        # Banks with a bank gate of their own are none of its columns: adding one moves no weight of the others.
        self.bank_gate = BankGate(config.hidden_size, [bank for bank in banks if not bank.has_own_gate])
        self.banks = nn.ModuleDict({bank.name: ExpertBank(config, bank) for bank in banks})

    def forward(self, hidden_states: Tensor, plan: ForwardPlan) -> tuple[Tensor, dict[str, BankRouting]]:
        hidden_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        output_TD = None if self.shared_experts is None else self.shared_experts(hidden_TD)
        # A single bank is open at every row that it is shown, except by a static plan, which shows it all rows.
        alone = self.bank_gate.weight is None and not plan.is_static
        gates: dict[str, Tensor] = {}
        if not alone:
            gate_TN = self.bank_gate(hidden_TD, plan.modality_T, plan.closed_banks)
            gates = {bank.name: gate_TN[:, column] for column, bank in enumerate(self.bank_gate.banks)}
        routing = {}
        for name, bank in self.banks.items():
            output_TD, routing[name] = bank(output_TD, hidden_TD, gates.get(name), plan)
        if output_TD is None:
            output_TD = torch.zeros_like(hidden_TD)
        return output_TD.view_as(hidden_states), routing
