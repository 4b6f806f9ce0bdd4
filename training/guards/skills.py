"""Old skills are kept: the held-out loss of each modality and task, beside what it was before training."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch.utils.data import Subset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from chorus_moe.training.data import RowDataset
from chorus_moe.training.evaluate import medium_of

MEMORY = "skill_guard"


def skills_of(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[int]]:
    """Skill -> its rows. A skill is what a row shows, as in "text" or "image+audio", and its `task` if it has one, as
    in "image.colours"."""
    skills: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        shown = medium_of(row)
        name = f"{shown}.{row['task']}" if row.get("task") else shown
        skills.setdefault(name, []).append(number)
    return skills


class SkillGuard(TrainerCallback):
    """Ends a run as soon as an evaluation finds a skill whose loss has risen too far above that before training.

    Logs `eval_SKILL_loss` of each. The checkpoint of a step that has lost one is not written, so the newest one always
    has all of them.

    Args:
        trainer: evaluates `rows`.
        tolerance: in nats per token.

    Raises:
        ValueError: a negative tolerance.
    """

    def __init__(self, trainer: Trainer, rows: RowDataset, tolerance: float):
        if tolerance < 0:
            raise ValueError(f"guards.keep_skills={tolerance} must not be negative")
        self.trainer, self.tolerance = trainer, tolerance
        self.skills = {name: Subset(rows, numbers) for name, numbers in skills_of(rows).items()}
        self.lost: dict[str, tuple[float, float]] = {}

    def measure(self) -> dict[str, float]:
        """Skill -> loss."""
        found = {}
        for name, rows in self.skills.items():
            metrics = self.trainer.evaluate(rows, metric_key_prefix=f"eval_{name}")
            found[name] = metrics[f"eval_{name}_loss"]
        return found

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # A resumed run has it from its checkpoint.
        if MEMORY not in state.stateful_callbacks:
            state.stateful_callbacks[MEMORY] = {"before": self.measure()}

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Its own evaluations have other prefixes, and one after training decides nothing.
        if "eval_loss" not in kwargs["metrics"] or not self.trainer.is_in_train:
            return
        before = state.stateful_callbacks[MEMORY]["before"]
        pairs = {name: (before[name], loss) for name, loss in self.measure().items()}
        # Turned round, so that NaN counts as lost.
        self.lost = {name: (old, new) for name, (old, new) in pairs.items() if not new <= old + self.tolerance}
        if self.lost:
            control.should_training_stop = True
            control.should_save = False

    def __str__(self) -> str:
        losses = "; ".join(f"{name} {old:.3f} -> {new:.3f}" for name, (old, new) in self.lost.items())
        return f"lost at step {self.trainer.state.global_step}, held-out loss before and now: {losses}"
