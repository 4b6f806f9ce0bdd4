"""A federation in one process: what is sent, what is refused, what is kept, and where a restart goes on."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chorus_moe.training.federated.learner import Learner
from chorus_moe.training.federated.rounds import STATE, Federation
from chorus_moe.training.federated.simulate import InProcess
from chorus_moe.training.federated.updates import Question, Update
from chorus_moe.training.train import load_or_build
from tests.training.federated.conftest import ADAPTER, BANKS, CLIENTS, MakeRecipe

MakeLearner = Callable[..., Learner]
Answer = Callable[[bytes], bytes | None]
QUICK: dict[str, Any] = {"min_clients": 1, "max_failed_rounds": 0}


@pytest.fixture
def start(make_recipe: MakeRecipe, tmp_path: Path) -> Callable[..., Federation]:
    def begin(trained: dict[str, Any], folder: str = "server", **federated: Any) -> Federation:
        recipe = make_recipe(trained, **QUICK | federated)
        torch.manual_seed(0)
        model, _ = load_or_build(recipe, None)  # type: ignore[arg-type]
        return Federation(model, recipe.federated, tmp_path / folder)

    return begin


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def of_bank(names: set[str], bank: str) -> set[str]:
    return {name for name in names if f".banks.{bank}." in name}


def answers(learners: Mapping[str, Learner]) -> dict[str, Answer]:
    return {name: learner.answer for name, learner in learners.items()}


@functools.cache
def train_once(learner: Learner, payload: bytes) -> bytes | None:
    return learner.answer(payload)


def changing(learner: Learner, **changes: Any) -> Answer:
    """A client that says something else than it found."""

    def answer(payload: bytes) -> bytes | None:
        found = train_once(learner, payload)
        if found is None:
            return None
        update = Update.unpack(found)
        made = {name: value(update) if callable(value) else value for name, value in changes.items()}
        return replace(update, **made).pack()

    return answer


def test_a_client_without_a_modality_leaves_its_bank_alone(
    make_learner: MakeLearner, start: Callable[..., Federation]
) -> None:
    federation, eyes = start(BANKS, rounds=1), make_learner("banks", "eyes")
    before, sent = weights_of(federation.model), []

    def listen(payload: bytes) -> bytes | None:
        sent.append(eyes.answer(payload))
        return sent[-1]

    federation.run(InProcess({"eyes": listen}))
    names = changed(before, weights_of(federation.model))
    assert of_bank(names, "image") == names
    update = Update.unpack(sent[0])
    assert update.examples == len(CLIENTS["eyes"]) and update.seen["image"] > 0 and update.seen["audio"] == 0
    assert not of_bank(set(update.weights), "audio") and of_bank(set(update.weights), "image")


def test_all_learn_together_and_the_base_stays(make_learner: MakeLearner, start: Callable[..., Federation]) -> None:
    federation = start(ADAPTER, rounds=1)
    before = weights_of(federation.model)
    learners = {name: make_learner("adapter", name) for name in CLIENTS}
    federation.run(InProcess(answers(learners)))
    names = changed(before, weights_of(federation.model))
    assert names and all(".lora_" in name for name in names)
    assert of_bank(names, "image") and of_bank(names, "audio")
    # What went over the wire is a small part of the model.
    whole = sum(tensor.numel() * tensor.element_size() for tensor in before.values())
    assert federation.history[0].bytes_in < 3 * whole / 4
    assert all(found.clients.keys() == set(CLIENTS) for found in federation.history)


LIES: dict[str, tuple[dict[str, Any], str]] = {
    "nan": ({"weights": lambda u: {n: t * float("nan") for n, t in u.weights.items()}}, "not finite"),
    "whole numbers": ({"weights": lambda u: {n: t.to(torch.int64) for n, t in u.weights.items()}}, "not finite"),
    "shapes": ({"weights": lambda u: {n: t[:1] for n, t in u.weights.items()}}, "has shape"),
    "names": ({"weights": {"other": torch.zeros(1)}}, "other is not trained"),
    "base": ({"base": "0" * 64}, "trained on top of sha256 0000"),
    "round": ({"round": 7}, "an update of round 7, this is round 1"),
    "examples": ({"examples": -5}, "-5 examples"),
    "tokens": ({"tokens": lambda u: {p: t * 0 - 1 for p, t in u.tokens.items()}}, "tokens of bank"),
    "no tokens": ({"tokens": {}}, "no count of tokens"),
    "spent": ({"spent": [float("nan"), 1e-5]}, "is no epsilon and delta"),
    "too many experts": ({"tokens": lambda u: {p: t.repeat(2) for p, t in u.tokens.items()}}, "no count of tokens"),
}


def test_no_client_spoils_a_round(make_learner: MakeLearner, start: Callable[..., Federation]) -> None:
    federation, alone = start(BANKS, rounds=1), start(BANKS, "alone", rounds=1)
    learner = make_learner("banks", "both")
    clients: dict[str, Answer] = {"good": learner.answer, "silent": lambda _: None, "noise": lambda _: b"\x00" * 99}
    clients |= {name: changing(learner, **changes) for name, (changes, _) in LIES.items()}
    federation.run(InProcess(clients))
    (found,) = federation.history
    assert set(found.clients) == {"good"} and set(found.refused) == set(clients) - {"good"}
    for name, (_, said) in LIES.items():
        assert said in found.refused[name], name
    alone.run(InProcess({"good": learner.answer}))
    assert not changed(weights_of(alone.model), weights_of(federation.model))


def test_half_of_a_lora_is_refused(make_learner: MakeLearner, start: Callable[..., Federation]) -> None:
    federation, learner = start(ADAPTER, rounds=1), make_learner("adapter", "both")
    half = changing(learner, weights=lambda u: {n: t for n, t in u.weights.items() if ".lora_A." not in n})
    with pytest.raises(ValueError, match="came without the other matrix"):
        federation.run(InProcess({"half": half}))


def test_another_base_is_refused_with_both_hashes(make_learner: MakeLearner, start: Callable[..., Federation]) -> None:
    federation, learner = start(BANKS, rounds=1), make_learner("banks of another base", "both")
    with torch.no_grad():
        next(p for p in learner.model.parameters() if not p.requires_grad).add_(1)
    with pytest.raises(ValueError, match=f"sha256 {federation.base}, this client has [0-9a-f]{{64}} below"):
        federation.run(InProcess({"other": learner.answer}))


def test_a_bank_is_changed_by_its_owner_alone(make_learner: MakeLearner, start: Callable[..., Federation]) -> None:
    federation = start(BANKS, rounds=1, bank_owners='{"image": "eyes"}')
    before = weights_of(federation.model)
    federation.run(InProcess(answers({name: make_learner("banks", name) for name in ("eyes", "ears", "both")})))
    assert "bank 'image' is eyes's alone" in federation.history[0].refused["both"]
    assert set(federation.history[0].clients) == {"eyes", "ears"}
    assert changed(before, weights_of(federation.model))


def test_a_restarted_server_ends_where_one_that_was_not_does(
    start: Callable[..., Federation],
) -> None:
    """Clients that go the same way wherever they start stand for training; what the rank leaves out is kept, too."""

    def step(client: int) -> Answer:
        def answer(payload: bytes) -> bytes | None:
            question = Question.unpack(payload)
            generator = torch.Generator().manual_seed(10 * question.round + client)
            weights = {
                name: w + torch.randn(w.shape, generator=generator) for name, w in sorted(question.weights.items())
            }
            return Update(question.round, question.base, 1, weights, tokens, {}).pack() if question.round else None

        return answer

    clients = InProcess({str(client): step(client) for client in range(2)})
    whole = start(ADAPTER, "whole", rounds=2)
    tokens = {place: torch.ones(count, dtype=torch.int64) for place, count in whole.experts.items()}
    whole.run(clients)
    start(ADAPTER, "killed", rounds=1).run(clients)
    again = start(ADAPTER, "killed", rounds=2)
    assert again.done == 1 and any(rest.any() for rest in again.held.rest_b.values())
    again.run(clients)
    assert again.done == 2 and not changed(weights_of(whole.model), weights_of(again.model))


def test_a_state_of_another_federation_is_refused(
    make_learner: MakeLearner, start: Callable[..., Federation], make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    start(BANKS, rounds=1).run(InProcess(answers({"both": make_learner("banks", "both")})))
    with pytest.raises(ValueError, match="was trained on top of sha256 [0-9a-f]{64}, this model has [0-9a-f]{64}"):
        start({"train": ["image"]}, rounds=1)
    assert (tmp_path / "server" / STATE).is_file()


def test_a_round_that_too_few_answer_changes_nothing(
    make_learner: MakeLearner, start: Callable[..., Federation]
) -> None:
    federation = start(BANKS, rounds=1, min_clients=2)
    before = {name: tensor.clone() for name, tensor in federation.held.weights.items()}
    clients: dict[str, Answer] = {"good": make_learner("banks", "both").answer, "dead": lambda _: b""}
    with pytest.raises(ValueError, match="round 1 failed 1 times: it needs 2 answers"):
        federation.run(InProcess(clients))
    assert not changed(before, federation.held.weights) and federation.done == 0


def test_fedprox_stays_nearer_to_where_the_round_began(
    make_learner: MakeLearner, start: Callable[..., Federation]
) -> None:
    norms = []
    for number, weight in enumerate((0.0, 30.0)):
        federation = start(BANKS, str(number), rounds=1, aggregation="fedprox", proximal_weight=weight)
        federation.run(InProcess({"both": make_learner("three steps", "both").answer}))
        norms.append(federation.history[0].clients["both"][1])
    assert norms[1] < 0.9 * norms[0]


def test_the_first_matrix_of_a_lora_can_stay_at_home(
    make_learner: MakeLearner, start: Callable[..., Federation]
) -> None:
    federation = start(ADAPTER, rounds=1, train_lora_a=False, max_update_norm=1.0, client_noise=1.0)
    before, learner = weights_of(federation.model), make_learner("adapter, one side", "both")
    sent = []
    federation.run(InProcess({"both": lambda payload: sent.append(learner.answer(payload)) or sent[-1]}))
    assert all(".lora_B." in name for name in Update.unpack(sent[0]).weights)
    names = changed(before, weights_of(federation.model))
    assert all(".lora_B." in name for name in names)
    # Noise reaches what this client did not train as well.
    assert set(federation.layout) == names
    assert federation.history[0].epsilon is not None and "epsilon" in str(federation.history[0])


def test_noise_on_both_matrices_is_refused(start: Callable[..., Federation]) -> None:
    with pytest.raises(ValueError, match="set federated.train_lora_a to false"):
        start(ADAPTER, client_noise=1.0, max_update_norm=1.0)


def test_a_question_that_cannot_be_read_is_an_error_of_the_client(make_learner: MakeLearner) -> None:
    learner = make_learner("banks", "both")
    with pytest.raises(ValueError, match="no message of a federation"):
        learner.answer(b"nonsense")
    with pytest.raises(ValueError, match="asks for 'evaluate'"):
        learner.answer(Question("evaluate").pack())
