"""A whole federation from recipes: the server's side, and one in a single process."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import set_seed

from chorus_moe.processors.processing_chorus import ChorusProcessor
from chorus_moe.training.federated.exchange import Exchange, need_flower
from chorus_moe.training.federated.learner import Learner, check_federated_recipe
from chorus_moe.training.federated.rounds import Federation
from chorus_moe.training.federated.simulate import InProcess
from chorus_moe.training.loading import ModelOrAdapter
from chorus_moe.training.model_card import run_card
from chorus_moe.training.recipe import Recipe
from chorus_moe.training.saving import CARD, saved_whole
from chorus_moe.training.train import load_or_build


def run_server(recipe: Recipe, exchange: Exchange) -> dict[str, float]:
    """All rounds of a recipe's `federated` section; the model or adapter that comes of them is saved in `output_dir`.

    The recipe needs no rows. Called again with the same `output_dir`, it goes on after the last round.

    Returns:
        Rounds, clients of the last round, bytes received in all, and epsilon where there is noise.

    Raises:
        ValueError: as `Federation`, and as `run_training` before its first step.
    """
    check_federated_recipe(recipe)
    if recipe.privacy.use_privacy:
        raise ValueError("privacy: a server has no rows to protect; clients have the section in their recipes")
    set_seed(recipe.training.seed)
    # A model that exists is not built from rows.
    model, processor = load_or_build(recipe, None)  # type: ignore[arg-type]
    folder = Path(recipe.training.output_dir)
    federation = Federation(model, recipe.federated, folder)
    federation.run(exchange)
    last = federation.history[-1]
    metrics: dict[str, float] = {
        "rounds": federation.done,
        "clients": len(last.names),
        "bytes_received": sum(found.bytes_in for found in federation.history),
    }
    if last.epsilon is not None:
        metrics["epsilon"] = last.epsilon
    save(model, processor, folder, metrics)
    return metrics


def save(model: ModelOrAdapter, processor: ChorusProcessor, folder: Path, metrics: Mapping[str, float]) -> None:
    with saved_whole(folder) as aside:
        model.save_pretrained(aside)
        processor.save_pretrained(aside)
        (aside / CARD).write_text(run_card(model, dict(metrics)), encoding="utf-8")


def simulate(recipe: Recipe, clients: Mapping[str, Recipe] | Sequence[Recipe]) -> dict[str, float]:
    """Server and clients in one process; each client has a model of its own in memory.

    Args:
        clients: by name, or `client_0`, `client_1`, ...
    """
    named = clients if isinstance(clients, Mapping) else {f"client_{i}": found for i, found in enumerate(clients)}
    learners = {name: Learner.of(found) for name, found in named.items()}
    answers = {name: learner.answer for name, learner in learners.items()}
    if recipe.federated.secure_aggregation:
        need_flower()
        from chorus_moe.training.federated.secure_client import SecureLearner

        answers = {name: SecureLearner(learner).answer for name, learner in learners.items()}
    return run_server(recipe, InProcess(answers))
