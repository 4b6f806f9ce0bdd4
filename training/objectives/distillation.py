"""Distillation: a student learns what a teacher expects, its states, and how it routes.

Three objectives, which ask one teacher once a batch (arXiv 1503.02531, 2306.13649; states as in arXiv 1412.6550):

- `teacher_tokens`: divergence of the student's probabilities where it predicts a label;
- `teacher_states`: distance of the student's states from the teacher's, through a learned map where widths differ;
- `teacher_routers`: divergence of the student's routers from the teacher's, in banks that both have.

Each is a mean over labelled positions, real tokens or rows, so the Trainer weighs it as it does the loss of the model.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from chorus_moe.modeling.configuration_banks import LayerBankConfig
from chorus_moe.modeling.modeling_generation import ChorusForConditionalGeneration
from chorus_moe.modeling.modeling_outputs import ChorusLossOutput
from chorus_moe.modeling.moe_routers import ROUTER_CLASSES
from chorus_moe.processors.processing_chorus import ChorusProcessor
from chorus_moe.training.loading import ModelOrAdapter, base_model, check_source
from chorus_moe.training.objectives.distillation_arguments import DistillationArguments, check_distillation
from chorus_moe.training.objectives.divergences import (
    TokenProbabilities,
    router_divergence,
    state_distance,
    token_divergence,
)
from chorus_moe.training.objectives.objective import Objective
from chorus_moe.training.objectives.teacher_files import BATCH_KEYS, TeacherFiles
from chorus_moe.training.objectives.teachers import (
    Teacher,
    TeacherOutput,
    label_positions,
    load_tokenizer,
    shared_vocabulary,
)
from chorus_moe.training.recipe import read_mapping


class DistilledTokens(Objective):
    """The divergence of the student from its teacher where it predicts a label, a mean over labels.

    Args:
        source: a teacher, or the files of one, whose answers then are in the batch.
        loss, beta, temperature: see `token_divergence`.
    """

    by_labels = True
    columns = BATCH_KEYS

    def __init__(
        self,
        source: Teacher | TeacherFiles,
        *,
        loss: str = "forward_kl",
        beta: float = 0.5,
        temperature: float = 1.0,
        weight: float = 1.0,
    ):
        super().__init__("teacher_tokens", weight)
        self.source = source
        self.options: dict[str, Any] = {"loss": loss, "beta": beta, "temperature": temperature}

    def check(self, model: nn.Module, processor: ChorusProcessor) -> None:
        if isinstance(self.source, Teacher):
            self.source.check(base_model(model).config, processor)

    def forward(self, model: nn.Module, inputs: Mapping[str, Any], outputs: ChorusLossOutput) -> Tensor:
        # Tokens that an adapter puts in front have logits of their own.
        logits_BSV = outputs.logits[:, -inputs["labels"].shape[1] :]
        answer = self.source.read(inputs) if isinstance(self.source, Teacher) else from_columns(inputs)
        if answer is None:
            return logits_BSV[:, :1].float().sum() * 0.0
        num_shared = self.source.num_shared
        logits_NV = logits_BSV[answer.positions.to(logits_BSV.device)][:, :num_shared]
        tokens = answer.tokens.each(lambda part: part.to(logits_NV.device))
        num_labels = (inputs["labels"][:, 1:] != -100).sum().clamp(min=1)
        return token_divergence(logits_NV, tokens, **self.options).sum() / num_labels.to(logits_NV.device)


class DistilledStates(Objective):
    """The distance of the student's states from its teacher's, a mean over real tokens and pairs of layers.

    Args:
        layers: layer of the student -> layer of the teacher; 0 are the embeddings, n the output of layer n, and the
            last one comes behind the final norm.
        widths: of the student's states and the teacher's. Where they differ, each pair of layers has a map without bias
            from the one to the other, which is trained and not part of the student.
    """

    def __init__(self, teacher: Teacher, layers: Mapping[int, int], widths: tuple[int, int], weight: float = 1.0):
        super().__init__("teacher_states", weight)
        self.teacher, self.layers = teacher, dict(layers)
        teacher.asks_hidden_states = True
        is_mapped = widths[0] != widths[1]
        self.maps = nn.ModuleDict({str(layer): nn.Linear(*widths, bias=False) for layer in layers if is_mapped})

    def check(self, model: nn.Module, processor: ChorusProcessor) -> None:
        self.teacher.check(base_model(model).config, processor)
        theirs = base_model(only(self.teacher, "distilled_layers")).config.get_text_config().num_hidden_layers
        ours = base_model(model).config.text_config.num_hidden_layers
        for side, count, numbers in (("student", ours, self.layers), ("teacher", theirs, self.layers.values())):
            for number in numbers:
                if not 0 <= number <= count:
                    raise ValueError(f"distilled_layers: the {side} has layers 0 to {count}, found {number}")

    def forward_options(self) -> dict[str, Any]:
        return {"output_hidden_states": True}

    def forward(self, model: nn.Module, inputs: Mapping[str, Any], outputs: ChorusLossOutput) -> Tensor:
        answer, length = self.teacher.read(inputs), inputs["input_ids"].shape[1]
        real_BS = inputs["attention_mask"].bool()
        # In the graph also where nothing is read: all ranks must have gradients for the same parameters.
        total = outputs.logits[:, :1].float().sum() * 0.0
        total = total + sum(parameter.sum() for parameter in self.maps.parameters()) * 0.0
        if answer is None or answer.hidden_states is None:
            return total
        read_bS = real_BS[answer.samples]
        for ours, theirs in self.layers.items():
            student = outputs.hidden_states[ours][:, -length:]
            teacher = answer.hidden_states[theirs].to(student.device)
            student = student[answer.samples.to(student.device)]
            student, teacher = student[read_bS.to(student.device)], teacher[read_bS.to(student.device)]
            if str(ours) in self.maps:
                student = self.maps[str(ours)](student.float())
            total = total + state_distance(student, teacher).sum().to(total.device)
        return total / (real_BS.sum().clamp(min=1).to(total.device) * len(self.layers))


class DistilledRouters(Objective):
    """KL(teacher | student) of the probabilities of experts, a mean over the rows of each bank, then over the banks and
    layers that had any. Banks are paired by name; a bank of one side alone is left as it is.

    Args:
        layers: sparse layer of the student -> sparse layer of the teacher, counted from 0 as in the configuration.
    """

    def __init__(self, teacher: Teacher, layers: Mapping[int, int], weight: float = 1.0):
        super().__init__("teacher_routers", weight)
        self.teacher, self.layers = teacher, dict(layers)
        teacher.asks_routing = True
        # (place in the student's routing, in the teacher's, bank of the student, of the teacher); `check` fills it.
        self.pairs: list[tuple[int, int, LayerBankConfig, LayerBankConfig]] = []

    def check(self, model: nn.Module, processor: ChorusProcessor) -> None:
        self.teacher.check(base_model(model).config, processor)
        theirs, ours = base_model(only(self.teacher, "distilled_routers")), base_model(model)
        if not isinstance(theirs, ChorusForConditionalGeneration):
            raise ValueError(f"distilled_routers: teacher {self.teacher.sources[0]!r} has no banks of a Chorus model")
        if not self.teacher.reads_media:
            raise ValueError(
                f"distilled_routers: teacher {self.teacher.sources[0]!r} reads {sorted(theirs.config.modalities)}, the "
                f"student {sorted(ours.config.modalities)}; routers are compared on whole batches"
            )
        self.pairs = []
        for layer, other in self.layers.items():
            found = []
            for side, number, text in (
                ("student", layer, ours.config.text_config),
                ("teacher", other, theirs.config.text_config),
            ):
                if number not in text.sparse_layers:
                    raise ValueError(
                        f"distilled_routers: the {side} has the sparse layers {list(text.sparse_layers)}, found "
                        f"{number}"
                    )
                found.append({bank.name: bank for bank in text.banks_of_layer(number)})
            names = [name for name in found[0] if name in found[1]]
            if not names:
                raise ValueError(
                    f"distilled_routers: no bank is in layer {layer} of the student, which has {list(found[0])}, "
                    f"and in layer {other} of the teacher, which has {list(found[1])}"
                )
            places = [model.config.text_config.sparse_layers.index(n) for model, n in ((ours, layer), (theirs, other))]
            for name in names:
                check_banks(found[0][name], found[1][name], layer)
                self.pairs.append((places[0], places[1], found[0][name], found[1][name]))

    def forward_options(self) -> dict[str, Any]:
        return {"output_router_logits": True}

    def forward(self, model: nn.Module, inputs: Mapping[str, Any], outputs: ChorusLossOutput) -> Tensor:
        answer = self.teacher.read(inputs)
        # By `check` and `forward_options`.
        assert answer is not None and answer.routing is not None and outputs.routing is not None
        losses, counts = [], []
        for place, other, bank, wanted in self.pairs:
            student, teacher = outputs.routing[place][bank.name], answer.routing[other][bank.name]
            probs_TE = ROUTER_CLASSES[bank.router].probabilities(student.router_logits)
            wanted_TE = ROUTER_CLASSES[wanted.router].probabilities(teacher.router_logits).to(probs_TE.device)
            loss_T = router_divergence(probs_TE, wanted_TE)
            counted = torch.ones_like(loss_T) if student.token_mask is None else student.token_mask.to(loss_T.dtype)
            losses.append((loss_T * counted).sum() / counted.sum().clamp(min=1))
            counts.append((counted.sum() > 0).float())
        device = losses[0].device
        # A bank without rows adds a zero with a graph, as in the balance loss.
        total = torch.stack([loss.to(device) for loss in losses]).sum()
        return total / torch.stack([count.to(device) for count in counts]).sum().clamp(min=1)


def distillation_objectives(
    asked: DistillationArguments, model: ModelOrAdapter, processor: ChorusProcessor, max_length: int | None = None
) -> tuple[list[Objective], TeacherFiles | None]:
    """The objectives that a recipe asks for, and the files that its rows then need (`TaughtRows`); nothing without a
    teacher.

    Raises:
        ValueError: what `check_distillation` refuses, a mapping that is none, files of another processor, temperature
            or teacher.
        FileNotFoundError: no teacher, or no files, under that name.
    """
    check_distillation(asked)
    options: dict[str, Any] = {
        "loss": asked.distillation_loss,
        "beta": asked.distillation_beta,
        "temperature": asked.distillation_temperature,
        "weight": asked.distillation_weight,
    }
    if asked.teacher_logits is not None:
        files = TeacherFiles(asked.teacher_logits)
        files.check(processor, max_length, asked.distillation_temperature)
        if asked.teachers:
            files.check_teachers(asked.teachers)
        return [DistilledTokens(files, **options)], files
    if not asked.teachers:
        return [], None
    layers = read_layer_map("distilled_layers", asked.distilled_layers)
    routers = read_layer_map("distilled_routers", asked.distilled_routers)
    teacher = Teacher(asked.teachers, asked.teacher_dtype, asked.distillation_temperature)
    objectives: list[Objective] = [DistilledTokens(teacher, **options)] if asked.distillation_weight else []
    if layers:
        widths = [
            base_model(one).config.get_text_config().hidden_size for one in (model, only(teacher, "distilled_layers"))
        ]
        objectives.append(DistilledStates(teacher, layers, (widths[0], widths[1]), asked.distilled_layers_weight))
    if routers:
        objectives.append(DistilledRouters(teacher, routers, asked.distilled_routers_weight))
    if not objectives:
        raise ValueError(
            "distillation: distillation_weight=0, and neither distilled_layers nor distilled_routers is set"
        )
    return objectives, None


def check_teachers(asked: DistillationArguments, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """What can be told of a later stage's teachers without loading them.

    Args:
        tokenizer: the student's; None if it is not there yet.

    Raises:
        ValueError: a teacher with another tokenizer, or mappings of layers that are none.
        FileNotFoundError: no teacher, or no files, under that name.
    """
    read_layer_map("distilled_layers", asked.distilled_layers)
    read_layer_map("distilled_routers", asked.distilled_routers)
    if asked.teacher_logits is not None:
        TeacherFiles(asked.teacher_logits)
    for source in asked.teachers or ():
        check_source(source)
        if tokenizer is not None:
            shared_vocabulary(load_tokenizer(source), tokenizer, source)


def from_columns(inputs: Mapping[str, Any]) -> TeacherOutput | None:
    """What a teacher had said of a batch, from the columns that `teacher_columns` makes; None without them."""
    if BATCH_KEYS[0] not in inputs:
        return None
    samples_B = inputs["teacher_read"]
    positions_BS = label_positions(inputs["labels"]) & samples_B[:, None]
    log_probs_BPK = inputs["teacher_log_probs"]
    # Labelled positions of a sample lie at the front of its P.
    is_one_BP = torch.arange(log_probs_BPK.shape[1], device=samples_B.device) < positions_BS.sum(dim=1, keepdim=True)
    rest_BP = inputs.get("teacher_log_rest")
    tokens = TokenProbabilities(
        log_probs_BPK[is_one_BP],
        inputs["teacher_token_ids"][is_one_BP],
        None if rest_BP is None else rest_BP[is_one_BP],
    )
    return TeacherOutput(tokens, positions_BS, samples_B)


def only(teacher: Teacher, name: str) -> ModelOrAdapter:
    """The one model of a teacher. Raises ValueError for an ensemble, whose members have layers of their own."""
    if len(teacher.models) != 1:
        raise ValueError(f"{name} needs one teacher, found {len(teacher.models)}: {', '.join(teacher.sources)}")
    return teacher.models[0]


def check_banks(ours: LayerBankConfig, theirs: LayerBankConfig, layer: int) -> None:
    where = f"distilled_routers: bank {ours.name!r} of layer {layer}"
    modalities: Sequence[Iterable[str]] = [bank.modalities or () for bank in (ours, theirs)]
    if set(modalities[0]) != set(modalities[1]):
        raise ValueError(f"{where} takes {list(modalities[0])}, the teacher's {list(modalities[1])}")
    if theirs.num_experts % ours.num_experts:
        raise ValueError(
            f"{where} has {ours.num_experts} experts, the teacher's {theirs.num_experts}, which is no multiple: "
            "only groups of equal size can be compared"
        )


def read_layer_map(name: str, text: str | None) -> dict[int, int]:
    """Layer of the student -> layer of the teacher. Raises ValueError for what is no mapping of whole numbers."""
    found = read_mapping(name, text, "{4: 12, 8: 24}") or {}
    try:
        return {int(str(key)): int(str(value)) for key, value in found.items()}
    except ValueError:
        raise ValueError(f"{name}: expected numbers of layers as in {{4: 12, 8: 24}}, found {found}") from None
