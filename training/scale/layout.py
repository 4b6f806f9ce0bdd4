"""The section `parallel` of a recipe: over which processes a model, its data and its experts are spread.

Processes are counted as data x fsdp x context x tensor. Experts take no processes of their own: `expert` of those that
fsdp, context and tensor together have hold different experts. Every rank of a tensor or context group sees the same
rows; all others see their own. With fsdp the processes of a context group also share the model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, NamedTuple

from transformers import HfArgumentParser, PreTrainedConfig, TrainingArguments

# As a recipe writes them below `parallel:`. Names of fields are unique over all sections: the Trainer has an `fsdp`.
KEYS = {
    "data": "data_size",
    "fsdp": "fsdp_size",
    "tensor": "tensor_size",
    "expert": "expert_size",
    "context": "context_size",
    "zero": "zero_stage",
    "rows": "rows_per_step",
    "patience": "rank_patience",
    "background": "background_saves",
}


@dataclass
class ParallelArguments:
    """Sizes of the groups of processes. Other sizes than 1 want as many processes, from torchrun or accelerate."""

    data_size: int | None = field(
        default=None, metadata={"help": "copies of the model, each with its own rows; None: whatever is left"}
    )
    fsdp_size: int = field(default=1, metadata={"help": "processes that share one copy and its optimizer (FSDP2)"})
    tensor_size: int = field(default=1, metadata={"help": "processes that share each layer, and see the same rows"})
    expert_size: int = field(
        default=1, metadata={"help": "processes with experts of their own; divides fsdp x tensor, multiple of tensor"}
    )
    context_size: int = field(default=1, metadata={"help": "processes that share each sequence"})
    zero_stage: int = field(default=0, metadata={"help": "1 to 3: DeepSpeed's ZeRO shares optimizer, gradients, model"})
    rows_per_step: int | None = field(
        default=None,
        metadata={"help": "rows of a step over all processes; accumulation follows, so a run may change their number"},
    )
    rank_patience: float = field(
        default=60.0, metadata={"help": "seconds that ranks wait for the slowest one at a step; then it is named"}
    )
    background_saves: bool = field(
        default=False, metadata={"help": "write checkpoints of fsdp and tensor while the run goes on, from a copy"}
    )
    device_flops: float | None = field(
        default=None,
        metadata={"help": "operations a second of one device, for `mfu` in the logs; None: of known GPUs in 16 bits"},
    )


def field_names_of(content: Mapping[str, Any]) -> dict[str, Any]:
    """The section as a recipe writes it, under the names of the fields."""
    return {KEYS.get(name, name): value for name, value in content.items()}


class Layout(NamedTuple):
    """How the processes of a run are shared out; see `ParallelArguments`."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    expert: int = 1
    zero: int = 0
    context: int = 1

    @property
    def shards(self) -> int:
        """Processes that share one copy of the weights, beyond those of a tensor group."""
        return self.fsdp * self.context if self.fsdp > 1 else 1

    @property
    def copies(self) -> int:
        """Neighbouring processes with the same rows."""
        return self.context * self.tensor

    @property
    def replicas(self) -> int:
        """Copies of the weights, whose gradients are summed: without fsdp each process of a context group has one."""
        return self.data * (1 if self.fsdp > 1 else self.context)

    @property
    def is_sharded(self) -> bool:
        """Whether a process holds a part of the model alone, by transformers' own means."""
        return self.fsdp > 1 or self.tensor > 1

    @property
    def name(self) -> str:
        """As in `fsdp 2 x expert 2`; `one process` without any."""
        sizes = {name: size for name, size in self._asdict().items() if name != "zero" and size > 1}
        parts = [f"{name} {size}" for name, size in sizes.items()] + ([f"zero {self.zero}"] if self.zero else [])
        return " x ".join(parts) or "one process"


ALONE = Layout()


def layout_of(arguments: ParallelArguments, processes: int) -> Layout:
    """The layout that a recipe asks for.

    Args:
        processes: of all machines together.

    Raises:
        ValueError: a size below 1, sizes that do not make up the processes, or what cannot be put together.
        ImportError: ZeRO without DeepSpeed.
    """
    for key, name in KEYS.items():
        value, least = getattr(arguments, name), 0 if key in ("zero", "patience", "background") else 1
        if value is not None and value < least:
            raise ValueError(f"parallel.{key} must be {least} or more, found {value}")
    fsdp, tensor, expert = arguments.fsdp_size, arguments.tensor_size, arguments.expert_size
    if arguments.zero_stage:
        check_zero(arguments)
    context = arguments.context_size
    if context > 1 and tensor > 1:
        raise ValueError(
            f"parallel.context={context} beside tensor={tensor}: both share out the heads; take one, beside fsdp"
        )
    share, parts = fsdp * context * tensor, f"fsdp {fsdp} x tensor {tensor}"
    if context > 1:
        parts = f"fsdp {fsdp} x context {context}"
    if processes % share:
        raise ValueError(
            f"parallel: {parts} = {share} does not divide the {processes} processes of this run; "
            f"start it with torchrun --nproc_per_node {share}, or change the sizes"
        )
    data = processes // share if arguments.data_size is None else arguments.data_size
    if data * share != processes:
        raise ValueError(
            f"parallel: data {data} x {parts} = {data * share}, but the run has {processes} "
            f"processes; start it with torchrun --nproc_per_node {data * share}, or leave data out"
        )
    layout = Layout(data, fsdp, tensor, expert, arguments.zero_stage, context)
    share = layout.shards * tensor
    if expert > 1 and (share % expert or expert % tensor):
        raise ValueError(
            f"parallel.expert={expert} must divide {parts if share > 1 else 'fsdp 1'} = {share}, and be a multiple of "
            f"tensor {tensor}: experts lie on the processes that share the model"
        )
    if data > 1 and tensor > 1 and fsdp == 1:
        raise ValueError(
            f"parallel: data {data} x tensor {tensor} without fsdp: nothing sums up the gradients of the {data} "
            f"copies; write fsdp: {data} and leave data out"
        )
    return layout


def check_arguments(layout: Layout, arguments: TrainingArguments) -> None:
    """Refuse arguments of the Trainer that would do something else than the layout, or wait for ever.

    Raises:
        ValueError: accelerate's FSDP beside the layout, or on a CPU; ZeRO where accelerate does not start DeepSpeed; an
            upload by one rank of what all of them hold.
    """
    state = arguments.distributed_state
    if layout.zero and (state is None or state.backend is None or state.distributed_type != "DEEPSPEED"):
        # Without a word each process would train a model of its own.
        raise ValueError(
            f"parallel.zero={layout.zero}: accelerate starts DeepSpeed on accelerators alone, in processes of torchrun "
            f"or accelerate launch; found {arguments.device.type}; take fsdp there"
        )
    spreads = layout.is_sharded or layout.context > 1
    if arguments.fsdp and (spreads or arguments.device.type == "cpu"):
        why = "beside parallel" if spreads else "on a CPU, where accelerate trains plain data parallel instead"
        raise ValueError(f"training.fsdp {why}: write parallel: {{fsdp: {layout.fsdp}}} and leave it out")
    if (layout.is_sharded or layout.zero == 3) and arguments.push_to_hub:
        raise ValueError(
            f"training.push_to_hub: {layout.name}: no process holds the model; upload the folder afterwards"
        )


def accumulation(rows: int, per_process: int, processes: int) -> int:
    """Micro-batches of a step.

    Args:
        rows: of a step, over all processes.
        per_process: rows of a micro-batch.
        processes: with rows of their own.

    Raises:
        ValueError: they do not make up the rows.
    """
    if rows % (per_process * processes):
        raise ValueError(
            f"parallel.rows={rows} is no multiple of per_device_train_batch_size {per_process} x {processes} "
            f"processes with rows of their own = {per_process * processes}"
        )
    return rows // (per_process * processes)


def zero_stage_of(words: Sequence[str]) -> int:
    """The stage that the words of a command line ask for, of which the last one counts; 0 for none.

    Raises:
        ValueError, ImportError: as `layout_of`, before the Trainer's arguments are made.
    """
    parser = HfArgumentParser(ParallelArguments, allow_abbrev=False)
    arguments = parser.parse_known_args([*words])[0]
    if arguments.zero_stage:
        check_zero(ParallelArguments(**vars(arguments)))
    return arguments.zero_stage


def zero_config(stage: int) -> dict[str, Any]:
    """DeepSpeed's configuration for the Trainer, which fills in `auto`."""
    sharing = {"stage": stage, "overlap_comm": True, "contiguous_gradients": True}
    if stage == 3:
        # Otherwise the saved model would be in pieces that only DeepSpeed reads.
        sharing["stage3_gather_16bit_weights_on_model_save"] = True
    auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return {"zero_optimization": sharing, "bf16": {"enabled": "auto"}, **dict.fromkeys(auto, "auto")}


def check_zero(arguments: ParallelArguments) -> None:
    """Refuse ZeRO beside another way to share out the model, and without DeepSpeed."""
    stage = arguments.zero_stage
    if stage > 3:
        raise ValueError(f"parallel.zero must be 0 to 3, found {stage}")
    others = {name: getattr(arguments, KEYS[name]) for name in ("fsdp", "tensor", "expert", "context")}
    if beside := next((name for name, size in others.items() if size > 1), None):
        raise ValueError(f"parallel.zero={stage} beside {beside}={others[beside]}: each shares out the run; take one")
    if find_spec("deepspeed") is None:
        raise ImportError(f"parallel.zero={stage}: deepspeed is not installed; pip install deepspeed, or use fsdp")


def check_layout(layout: Layout, config: PreTrainedConfig) -> None:
    """Refuse a layout that a model cannot be spread over, before it is.

    Raises:
        ValueError: naming what does not divide, with both sizes.
    """
    text = config.get_text_config()
    if layout.tensor > 1:
        for name in ("num_attention_heads", "num_key_value_heads"):
            if getattr(text, name) % layout.tensor:
                raise ValueError(f"parallel.tensor={layout.tensor} does not divide {name}={getattr(text, name)}")
    if layout.context > 1:
        check_context(layout.context, text)
    if layout.expert > 1:
        if text.experts_layout == "linear":
            raise ValueError(f"parallel.expert={layout.expert}: experts in linear layers do not travel; stack them")
        for bank in text.banks:
            if bank.num_experts % layout.expert:
                raise ValueError(
                    f"parallel.expert={layout.expert} does not divide the {bank.num_experts} experts of bank "
                    f"{bank.name!r}"
                )


def check_context(context: int, text: PreTrainedConfig) -> None:
    """Refuse to share sequences of a model that couples their tokens outside attention.

    Raises:
        ValueError: naming what does, or what does not divide.
    """
    for name in ("num_attention_heads", "num_key_value_heads"):
        if getattr(text, name) % context:
            raise ValueError(f"parallel.context={context} does not divide {name}={getattr(text, name)}")
    if text.num_memory_tokens:
        raise ValueError(
            f"parallel.context={context}: num_memory_tokens={text.num_memory_tokens} are sums over the whole sequence, "
            "which no process has"
        )
    if text.num_global_tokens and not text.is_causal:
        raise ValueError(
            f"parallel.context={context}: num_global_tokens={text.num_global_tokens} of a bidirectional model stand in "
            "front of the first slice alone"
        )
    limited = next((bank for bank in text.banks if bank.limits_capacity(True)), None)
    if limited is not None:
        raise ValueError(
            f"parallel.context={context}: expert bank {limited.name!r} has expert_capacity={limited.expert_capacity}, "
            "counted over the whole sequence, of which a process routes a slice; set it to null"
        )
