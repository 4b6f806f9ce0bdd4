"""What a client is asked to leave out of its recipe, and what one with privacy sends and spends."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from chorus_moe.training.federated.learner import Learner, check_federated_recipe
from chorus_moe.training.federated.rounds import Federation
from chorus_moe.training.federated.run import run_server
from chorus_moe.training.federated.simulate import InProcess
from chorus_moe.training.federated.updates import Question, Refused, Update
from chorus_moe.training.privacy.arguments import PrivacyArguments
from chorus_moe.training.recipe import Recipe, build_recipe
from chorus_moe.training.train import load_or_build
from tests.training.federated.conftest import BANKS, CLIENTS, MakeRecipe

REASON = "a private client needs Opacus: .ci/matrix privacy has it"
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no model": ({"model": {}}, "set model.model_name_or_path"),
    "stream": ({"data": {"streaming": True}}, "a stream does not end"),
    "tasks": ({"tasks": {"task_names": ["a", "b"]}}, "a federation does not join"),
    "teacher": ({"distillation": {"teachers": ["large"]}}, "has no teacher"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_meaning_in_a_federation_is_refused(case: str) -> None:
    sections, said = REFUSED[case]
    recipe = build_recipe({"model": {"model_name_or_path": "base"}} | sections, "test")
    with pytest.raises(ValueError, match=said):
        check_federated_recipe(recipe)


def private_recipe(recipe: Recipe, folder: Path, clip: float = 0.5, **privacy: Any) -> Recipe:
    """The recipe of a client whose updates are plain steps of rate 1 under noise, four rows on average."""
    pytest.importorskip("opacus", reason=REASON)
    training = recipe.training
    training.output_dir, training.optim, training.learning_rate, training.weight_decay = str(folder), "sgd", 1.0, 0.0
    training.per_device_train_batch_size, training.max_grad_norm = 4, clip
    return recipe._replace(privacy=PrivacyArguments(use_privacy=True, delta=1e-3, **privacy))


def question_to(learner: Learner, **facts: Any) -> Question:
    """As a server asks that trains what the client trains."""
    names = {name: p.detach().clone() for name, p in learner.model.named_parameters() if p.requires_grad}
    question = Question("train", round=1, weights=names)
    return replace(question, base=learner.base_hash(question), **facts)


def test_what_a_private_client_sends_is_under_noise_and_counts_nothing(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Noise so large that it is all there is to see: in the bank of sounds too, of which these rows have none."""
    noise, clip, rows = 50.0, 0.5, 4
    learner = Learner.of(private_recipe(make_recipe(BANKS, "eyes"), tmp_path, clip, noise_multiplier=noise))
    question = question_to(learner)
    update = Update.unpack(learner.answer(question.pack()) or b"")
    assert update.examples == len(CLIENTS["eyes"])
    assert not update.tokens and not update.seen
    assert update.weights.keys() == question.weights.keys()
    for bank in ("image", "audio"):
        names = [name for name in update.weights if f".banks.{bank}." in name]
        change = torch.cat([(update.weights[name] - question.weights[name]).flatten() for name in names])
        # Two updates of rate 1, each with noise of deviation `noise * clip` over the rows on average.
        expected = 2**0.5 * noise * clip / rows
        assert len(change) > 1_000 and float(change.std()) == pytest.approx(expected, rel=0.06)


def test_all_rounds_spend_from_one_ledger_that_outlives_the_process(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = private_recipe(make_recipe(BANKS, "eyes"), tmp_path, noise_multiplier=2.0, accountant="rdp")
    from opacus.accountants import create_accountant

    spent, history = [], [(2.0, 4 / 6, 2), (2.0, 4 / 6, 4), (2.0, 4 / 6, 6)]
    first = Learner.of(recipe)
    # The third round comes after a restart.
    for learner in (first, first, None):
        asked = learner or Learner.of(recipe)
        spent.append(Update.unpack(asked.answer(question_to(asked).pack()) or b"").spent)
    for found, updates in zip(spent, history, strict=True):
        theirs = create_accountant("rdp")
        theirs.history = [updates]
        assert found == [pytest.approx(theirs.get_epsilon(delta=1e-3), rel=1e-6), 1e-3]
    assert json.loads((tmp_path / "privacy.json").read_text())["history"] == [[2.0, 4 / 6, 6]]


def test_a_budget_lasts_for_the_rounds_that_are_left_and_no_further(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    given = {"mechanism": "laplace", "epsilon": 2.0}
    learner = Learner.of(private_recipe(make_recipe(BANKS, "eyes"), tmp_path / "client", **given))
    server = make_recipe(BANKS, rounds=2, min_clients=1)
    model, _ = load_or_build(server, None)  # type: ignore[arg-type]
    federation = Federation(model, server.federated, tmp_path / "server")
    federation.run(InProcess({"eyes": learner.answer}))
    epsilons = [found.spent["eyes"][0] for found in federation.history]
    # Laplace updates add up: half of the budget in each of two rounds.
    assert epsilons == [pytest.approx(1.0, rel=0.01), pytest.approx(2.0, rel=0.01)] and epsilons[1] <= 2.0
    assert "of its rows" in str(federation.history[0])
    assert json.loads((tmp_path / "server" / "rounds.json").read_text())[1]["spent"]["eyes"] == [epsilons[1], 1e-3]
    # A server that asks for more than it said gets nothing.
    with pytest.raises(Refused, match="epsilon=2 is spent: the updates so far have spent"):
        learner.train(question_to(learner))


def test_what_a_private_run_refuses_is_said_before_a_server_is_asked(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = private_recipe(make_recipe(BANKS, "ears"), tmp_path, noise_multiplier=1.0)
    with pytest.raises(ValueError, match="an update of 4 rows on average cannot be drawn from 2 rows"):
        Learner.of(recipe)


def test_a_server_has_no_rows_to_protect(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = private_recipe(make_recipe(BANKS), tmp_path, noise_multiplier=1.0)
    with pytest.raises(ValueError, match="privacy: a server has no rows"):
        run_server(recipe, InProcess({}))
