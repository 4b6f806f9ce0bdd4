"""A client: trains what the server asks for on its own rows, by its own recipe, and answers with what it learned.

Unusual here:
- rows, their number apart, never leave; neither do gradients, losses or metrics;
- a bank or an encoder that met no token is not sent: it is left as the others make it;
- each round is a run of its own, with a new optimizer and the recipe's whole schedule. `output_dir` is not written,
  but for the ledger of a private client;
- a private client (section `privacy`) sends what its noise covers, and its number of rows: no counts of tokens, and all
  that it trains whether or not a token reached it. All rounds spend from one ledger, which outlives the process.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, set_seed

from chorus_moe.modeling.configuration_modalities import MODALITY_IDS
from chorus_moe.processors.processing_chorus import ChorusProcessor
from chorus_moe.training.collator import ChorusDataCollator
from chorus_moe.training.contrast.setup import collator_of, is_contrastive
from chorus_moe.training.data import RowDataset
from chorus_moe.training.federated.layout import (
    Tensors,
    base_of,
    freeze_lora_a,
    layout_of,
    trained_tensors,
    write_weights,
)
from chorus_moe.training.federated.updates import STOP, TRAIN, Place, Question, Refused, Update
from chorus_moe.training.loading import ModelOrAdapter, base_model
from chorus_moe.training.objectives.objective import Objective
from chorus_moe.training.objectives.terms import build_objectives
from chorus_moe.training.privacy.accounting import BudgetSpent
from chorus_moe.training.privacy.ledger import Earlier, read_ledger
from chorus_moe.training.readiness import check_recipe
from chorus_moe.training.recipe import Recipe
from chorus_moe.training.routing.callback import RoutingCallback
from chorus_moe.training.routing.counters import RoutingCounters
from chorus_moe.training.routing.observer import RoutingObserver
from chorus_moe.training.streaming import StreamedRows, training_rows
from chorus_moe.training.train import load_or_build, new_trainer, say_choice
from chorus_moe.training.trainer import ChorusTrainer

Rows = RowDataset | Sequence[dict[str, Any]]


class Proximity(Objective):
    """FedProx (Li et al. 2020, arXiv 1812.06127): half the squared distance from where the round began."""

    def __init__(self, model: nn.Module, weight: float):
        super().__init__("proximity", weight)
        # Not modules of this objective, whose parameters would be trained twice.
        self._pairs = [(now, now.detach().clone()) for now in model.parameters() if now.requires_grad]

    def forward(self, model: nn.Module, inputs: object, outputs: object) -> Tensor:
        return 0.5 * torch.stack([(now - begun).float().square().sum() for now, begun in self._pairs]).sum()


class Learner:
    """A client's model and rows.

    Args:
        recipe: `model`, `lora` and `parts` must be those of the server; `training` is the client's own. A round takes
            its `max_steps` or `num_train_epochs`.
        model: with the adapter or the parts that are trained.
        rows: this client's.

    Raises:
        ValueError: what has no meaning in a federation, see `check_federated_recipe`.
    """

    def __init__(self, recipe: Recipe, model: ModelOrAdapter, processor: ChorusProcessor, rows: Rows):
        check_federated_recipe(recipe)
        self.recipe, self.model, self.processor, self.rows = recipe, model, processor, rows
        inner: Any = base_model(model)
        self._loss_function = inner.loss_function
        self.collator: ChorusDataCollator = collator_of(recipe, processor)
        if recipe.privacy.use_privacy:
            # What it refuses is said before a server is asked.
            self._new_trainer(Question(TRAIN))
        self._base: tuple[frozenset[str], str] | None = None

    @classmethod
    def of(cls, recipe: Recipe) -> "Learner":
        """With the model and the rows that a recipe names. Errors as in `run_training` before its first step."""
        check_federated_recipe(recipe)
        set_seed(recipe.training.seed)
        rows = training_rows(recipe)
        assert not isinstance(rows, StreamedRows)  # refused above
        model, processor = load_or_build(recipe, rows)
        say_choice(recipe, model)
        return cls(recipe, model, processor, rows)

    def answer(self, payload: bytes) -> bytes | None:
        """The update that a question asks for, None after the last question.

        Raises:
            Refused: a question that cannot be read, weights that do not fit, or another base (with both hashes).
        """
        question = Question.unpack(payload)
        if question.kind == STOP:
            return None
        if question.kind != TRAIN:
            raise Refused(f"the server asks for {question.kind!r}; this client knows {TRAIN!r} and {STOP!r}")
        if self.recipe.federated.secure_aggregation:
            raise Refused(
                "this client sends masked changes alone (federated.secure_aggregation), and the server asks for plain "
                "ones: set it at the server as well, or leave it out here"
            )
        return self.train(question).pack()

    def train(self, question: Question) -> Update:
        """One round."""
        found = self.base_hash(question)
        if found != question.base:
            raise Refused(
                f"the server trains on top of sha256 {question.base}, this client has {found} below: take the same "
                "model, and the same `model`, `lora` and `parts` sections in the recipe"
            )
        write_weights(self.model, question.weights)
        if not question.train_lora_a:
            freeze_lora_a(self.model)
        trainer = self._new_trainer(question)
        if self.recipe.privacy.use_privacy:
            return self._private_update(question, trainer)
        counting = Counting()
        # After the routing callback, whose observer asks for the routing as well.
        RoutingCallback.add_to(trainer, log_statistics=False)
        trainer.add_callback(counting)
        trainer.train()
        return self._update(question, counting.counters)

    def _new_trainer(self, question: Question) -> ChorusTrainer:
        arguments = copy.copy(self.recipe.training)
        arguments.save_strategy, arguments.seed = "no", self.recipe.training.seed + question.round
        set_seed(arguments.seed)
        if is_contrastive(self.recipe):
            arguments.label_names = []
        objectives: list[Objective] = list(build_objectives(self.recipe.objectives, self.model))
        if question.proximal_weight:
            objectives.append(Proximity(self.model, question.proximal_weight))
        # The Trainer of the round before has weighed it already.
        inner: Any = base_model(self.model)
        inner.loss_function = self._loss_function
        return new_trainer(
            self.recipe,
            model=self.model,
            args=arguments,
            train_dataset=self.rows,
            objectives=objectives,
            data_collator=self.collator,
            processing_class=self.processor,
        )

    def _learned(self, question: Question) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in trained_tensors(self.model).items() if name in question.weights}

    def _private_update(self, question: Question, trainer: Any) -> Update:
        ledger, before = trainer.ledger, read_ledger(trainer.args.output_dir)
        if type(question.rounds_left) is not int or question.rounds_left < 1:
            raise Refused(f"{question.rounds_left!r} rounds are left")
        # A server that claims fewer rounds than it asks for finds the budget spent.
        ledger.num_runs = question.rounds_left
        ledger.continue_from([] if before is None else [before])
        try:
            trainer.train()
        except BudgetSpent as error:
            raise Refused(str(error)) from error
        earlier = ledger.earlier or Earlier(0.0, 0.0)
        spent = [ledger.epsilon + earlier.epsilon, ledger.delta + earlier.delta]
        return Update(question.round, question.base, len(self.rows), self._learned(question), {}, {}, spent)

    def _update(self, question: Question, counters: RoutingCounters) -> Update:
        tokens: dict[Place, Tensor] = {
            (layer, name): bank.choices_ME.sum(dim=0).cpu()
            for layer, banks in counters.banks.items()
            for name, bank in banks.items()
        }
        seen = {
            modality: max((int(bank.tokens_M[row]) for bank in counters.all()), default=1)
            for row, modality in enumerate(MODALITY_IDS)
        }
        layout = layout_of(self.model)
        kept = {n: t for n, t in self._learned(question).items() if is_reached(layout[n], tokens, seen)}
        return Update(question.round, question.base, len(self.rows), kept, tokens, seen)

    def base_hash(self, question: Question) -> str:
        """The hash of all that the question has no weights for; computed once for each set of names."""
        names = frozenset(question.weights)
        if self._base is None or self._base[0] != names:
            self._base = names, base_of(self.model, names)
        return self._base[1]


class Counting(TrainerCallback):
    """Counts the routing of a whole run."""

    def on_train_begin(self, *arguments: object, model: nn.Module, **options: object) -> None:
        self._observer = RoutingObserver(model, training_only=True).attach()

    def on_train_end(self, *arguments: object, **options: object) -> None:
        self._observer.detach()

    @property
    def counters(self) -> RoutingCounters:
        return self._observer.counters


def is_reached(tensors: Tensors, tokens: dict[Place, Tensor], seen: dict[str, int]) -> bool:
    """Whether tokens of these rows went through it."""
    if tensors.place is not None:
        return bool(tokens[tensors.place].any())
    return tensors.modality is None or seen[tensors.modality] > 0


def check_federated_recipe(recipe: Recipe) -> None:
    """Raises ValueError for what has no meaning in a federation: a new model, a stream, tasks, a teacher."""
    check_recipe(recipe)
    if recipe.model.model_name_or_path is None:
        raise ValueError("a federation trains a model that all have: set model.model_name_or_path")
    if recipe.data.streaming:
        raise ValueError("data.streaming: a client says how many rows it has, and a stream does not end")
    if recipe.tasks.use_tasks:
        raise ValueError("tasks: a federation does not join what the tasks' own weights learn; leave the section out")
    if recipe.distillation.teachers:
        raise ValueError("distillation: a client of a federation has no teacher; leave the section out")
