"""The section `distillation` of a recipe."""

from dataclasses import dataclass, field

from chorus_moe.training.objectives.divergences import FORWARD, JENSEN_SHANNON, LOSSES


@dataclass
class DistillationArguments:
    """What a student learns of larger models, see `objectives/distillation.py`."""

    teachers: list[str] | None = field(
        default=None, metadata={"help": "causal or Chorus models; of several the mean of their probabilities"}
    )
    teacher_logits: str | None = field(
        default=None,
        metadata={"help": "folder that `precompute-teacher` writes, and training then reads instead of the teachers"},
    )
    teacher_dtype: str = field(default="auto", metadata={"help": "auto (as saved), float32, bfloat16 or float16"})
    teacher_top_k: int = field(
        default=64, metadata={"help": "tokens kept at each position in teacher_logits, besides the sum of the others"}
    )
    distillation_loss: str = field(default=FORWARD, metadata={"help": ", ".join(LOSSES)})
    distillation_beta: float = field(
        default=0.5, metadata={"help": "of jensen_shannon: share of the teacher in the mixture, between 0 and 1"}
    )
    distillation_temperature: float = field(default=1.0, metadata={"help": "both sides' logits are divided by it"})
    distillation_weight: float = field(
        default=1.0, metadata={"help": "weight of the divergence of the labelled tokens"}
    )
    distilled_layers: str | None = field(
        default=None,
        metadata={
            "help": "layer of the student -> layer of the teacher whose states it learns, a mapping; 0: embeddings"
        },
    )
    distilled_layers_weight: float = field(default=1.0, metadata={"help": "weight of the distance of these states"})
    distilled_routers: str | None = field(
        default=None,
        metadata={"help": "sparse layer of the student -> one of the teacher whose routers it follows, a mapping"},
    )
    distilled_routers_weight: float = field(default=1.0, metadata={"help": "weight of the divergence of these routers"})


def check_distillation(asked: DistillationArguments) -> None:
    """Refuse what no teacher can make right, before one is loaded.

    Raises:
        ValueError: an unknown loss, a number out of its range, or arguments that need a teacher and name none.
    """
    if asked == DistillationArguments():
        return
    if not asked.teachers and asked.teacher_logits is None:
        raise ValueError("distillation: name the teachers, or a folder of teacher_logits")
    if asked.distillation_loss not in LOSSES:
        raise ValueError(f"distillation_loss={asked.distillation_loss!r}; choose from {', '.join(LOSSES)}")
    if not asked.distillation_temperature > 0:
        raise ValueError(f"distillation_temperature={asked.distillation_temperature} must be above 0")
    if asked.distillation_loss == JENSEN_SHANNON and not 0 < asked.distillation_beta < 1:
        raise ValueError(
            f"distillation_beta={asked.distillation_beta} must lie between 0 and 1; at the ends jensen_shannon is "
            "0: take forward_kl or reverse_kl"
        )
    if not asked.distillation_weight >= 0:
        raise ValueError(f"distillation_weight={asked.distillation_weight} must not be negative")
    if asked.teacher_top_k < 1:
        raise ValueError(f"teacher_top_k={asked.teacher_top_k}: keep at least one token")
    if asked.teacher_logits is not None and (asked.distilled_layers or asked.distilled_routers):
        raise ValueError(
            "distilled_layers and distilled_routers need the teacher itself, teacher_logits holds probabilities alone: "
            "leave teacher_logits out"
        )
