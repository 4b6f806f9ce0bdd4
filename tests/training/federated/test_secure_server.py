"""Secure aggregation in one process: the sum, what the server sees, who goes away or lies, and what is refused."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from chorus_moe.training.federated.arguments import FederatedArguments, check_federated
from chorus_moe.training.federated.layout import Layout, Tensors
from chorus_moe.training.federated.masked_sums import STEP
from chorus_moe.training.federated.simulate import InProcess
from chorus_moe.training.federated.updates import MASKED, MaskedMessage, Question, Refused, Update, kind_of
from tests.training.federated.conftest import ADAPTER, BANKS, CLIENTS, MakeRecipe, by_rows

pytest.importorskip("flwr", reason="Flower is not installed: `.ci/matrix federated` runs this")

from flwr.common import bytes_to_ndarray, ndarray_to_bytes
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
from torch import nn

from chorus_moe.training.federated import secure_client
from chorus_moe.training.federated.flower_masks import record_bytes, record_of
from chorus_moe.training.federated.secure_client import SecureLearner
from chorus_moe.training.federated.secure_server import MaskedRound, ask_masked

LAYOUT: Layout = {"weight": Tensors((50, 40)), "bias": Tensors((50,))}
OLD = {name: torch.zeros(tensors.shape) for name, tensors in LAYOUT.items()}
QUESTION = Question("train", 1, "base", weights=OLD).pack()
BOUND = 100.0
Answer = Callable[[bytes], bytes | None]


@dataclass
class Stub:
    """A learner that has learned something already."""

    weights: dict[str, Tensor]
    examples: int = 500
    min_clients: int = 2

    def __post_init__(self) -> None:
        self.model = nn.Linear(40, 50)
        self.recipe: Any = SimpleNamespace(federated=FederatedArguments(min_clients=self.min_clients))

    def train(self, question: Question) -> Update:
        return Update(question.round, question.base, self.examples, self.weights, {}, {})

    def answer(self, payload: bytes) -> bytes | None:
        raise AssertionError("a plain question")


def learned(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(tensors.shape, generator=generator) for name, tensors in LAYOUT.items()}


def settings(**changes: Any) -> FederatedArguments:
    given = FederatedArguments(**{"secure_aggregation": True, "max_update_norm": BOUND} | changes)
    check_federated(given)
    return given


def clients(number: int = 3, **changes: Any) -> dict[str, Answer]:
    return {f"c{seed}": SecureLearner(Stub(learned(seed), **changes)).answer for seed in range(number)}  # type: ignore[arg-type]


def ask(answers: dict[str, Answer], **changes: Any) -> MaskedRound:
    return ask_masked(InProcess(answers), sorted(answers), QUESTION, settings(**changes), LAYOUT, 1)


def stage_of(payload: bytes) -> str:
    return record_of(MaskedMessage.unpack(payload).record).config_records[RECORD_KEY_CONFIGS][Key.STAGE]


def quitting(answer: Answer, stage: str) -> Answer:
    """A client that is gone from a stage on."""
    gone = []

    def quit(payload: bytes) -> bytes | None:
        if gone or stage_of(payload) == stage:
            gone.append(True)
            return None
        return answer(payload)

    return quit


def assert_is_mean(found: MaskedRound, seeds: list[int], weights: list[float]) -> None:
    """Of the clients in the sum, within what rounding can do."""
    assert found.mean is not None, found.refused
    assert found.clients == [f"c{seed}" for seed in seeds]
    total = sum(weights)
    for name in LAYOUT:
        wanted = sum(weight * learned(seed)[name].double() for seed, weight in zip(seeds, weights, strict=True)) / total
        # A step for each client, up or down, over the sum of weights.
        worst = (found.mean.changes[name] - wanted).abs().max()
        assert 0 < worst <= BOUND * STEP * len(seeds) / total, name


def test_the_sum_of_masked_changes_is_the_plain_mean_within_a_step_of_quantisation() -> None:
    found = ask(clients())
    assert_is_mean(found, [0, 1, 2], [0.5, 0.5, 0.5])
    assert not found.refused and found.bytes_in > 0


def test_clients_weigh_by_their_rows_up_to_a_bound() -> None:
    answers = {
        f"c{seed}": SecureLearner(Stub(learned(seed), examples)).answer  # type: ignore[arg-type]
        for seed, examples in enumerate((250, 500, 10_000))
    }
    assert_is_mean(ask(answers), [0, 1, 2], [0.25, 0.5, 1.0])


@pytest.mark.parametrize(
    "stage", [Stage.SETUP, Stage.SHARE_KEYS, Stage.COLLECT_MASKED_VECTORS], ids=("keys", "shares", "training")
)
def test_a_client_that_goes_away_does_not_spoil_the_sum(stage: str) -> None:
    answers = clients(4)
    answers["c1"] = quitting(answers["c1"], stage)
    found = ask(answers)
    assert_is_mean(found, [0, 2, 3], [0.5, 0.5, 0.5])
    assert set(found.refused) == {"c1"}


def test_a_client_that_goes_away_after_its_vector_is_in_the_sum() -> None:
    answers = clients(4)
    answers["c1"] = quitting(answers["c1"], Stage.UNMASK)
    assert_is_mean(ask(answers, min_clients=4), [0, 1, 2, 3], [0.5] * 4)


def test_a_ring_of_shares_is_enough_for_many_clients() -> None:
    answers = clients(7)
    answers["c3"] = quitting(answers["c3"], Stage.COLLECT_MASKED_VECTORS)
    assert_is_mean(ask(answers, num_shares=5), [0, 1, 2, 4, 5, 6], [0.5] * 6)


def test_a_round_that_too_few_are_left_of_is_given_up_in_one_line() -> None:
    answers = clients(3)
    for name in ("c0", "c1"):
        answers[name] = quitting(answers[name], Stage.COLLECT_MASKED_VECTORS)
    found = ask(answers)
    assert found.mean is None and not found.clients
    assert found.refused["c2"] == (
        "the round is asked again: 1 clients are left of those that were asked for masked changes, and 2 are needed"
    )


def vectors_of(answer: bytes) -> list[np.ndarray]:
    configs = record_of(MaskedMessage.unpack(answer).record).config_records[RECORD_KEY_CONFIGS]
    return [bytes_to_ndarray(part) for part in configs[Key.MASKED_PARAMETERS]]


def listening(answer: Answer, heard: list[bytes], stage: str) -> Answer:
    def listen(payload: bytes) -> bytes | None:
        found = answer(payload)
        if found is not None and stage_of(payload) == stage:
            heard.append(found)
        return found

    return listen


def test_what_a_client_sends_looks_like_noise_and_tells_nothing_else() -> None:
    heard: list[bytes] = []
    answers = clients(3)
    answers["c0"] = listening(answers["c0"], heard, Stage.COLLECT_MASKED_VECTORS)
    ask(answers)
    (factor, change_P, weight_Q) = vectors_of(heard[0])
    own = torch.cat([learned(0)[name].flatten() for name in sorted(LAYOUT)]).numpy()
    plain = (own * 0.5 / BOUND + 1) / STEP
    # Without masks the first halves of all numbers would be the same few.
    assert np.abs(change_P - plain).min() > 1 and np.unique(np.rint(plain).astype(int) >> 16).size < 40
    for shift in (0, 8, 16, 24):
        counts = np.bincount((change_P >> shift) & 0xFF, minlength=256)
        expected = len(change_P) / 256
        # Chi-squared of 255 degrees of freedom: 450 is exceeded once in 10^12 times.
        assert ((counts - expected) ** 2 / expected).sum() < 450
    # Of 2,050 numbers: five deviations.
    assert abs(np.corrcoef(change_P, own)[0, 1]) < 5 / np.sqrt(len(own))
    assert factor[0] != 2**22 and set(weight_Q) != {round(1.5 / STEP)}
    content = record_of(MaskedMessage.unpack(heard[0]).record)
    assert content.metric_records["fitres.num_examples"]["num_examples"] == 1
    assert not content.array_records["fitres.parameters"] and not content.config_records["fitres.metrics"]
    # Two runs, two masks.
    ask(answers)
    assert (vectors_of(heard[1])[1] != change_P).mean() > 0.99


def changing(answer: Answer, stage: str, change: Callable[[Any], None]) -> Answer:
    """A client that says something else in a stage."""

    def lie(payload: bytes) -> bytes | None:
        found = answer(payload)
        if found is None or stage_of(payload) != stage:
            return found
        message = MaskedMessage.unpack(found)
        record = record_of(message.record)
        change(record.config_records[RECORD_KEY_CONFIGS])
        return MaskedMessage(message.round, message.node, record_bytes(record)).pack()

    return lie


def put(key: str, value: Any) -> Callable[[Any], None]:
    return lambda configs: configs.__setitem__(key, value)


LEFT_OUT = {
    "no key": (Stage.SETUP, put(Key.PUBLIC_KEY_1, b"none"), ""),
    "no shares": (Stage.SHARE_KEYS, put(Key.CIPHERTEXT_LIST, [b"x"]), "shares for 3 other clients"),
    "text": (Stage.COLLECT_MASKED_VECTORS, put(Key.MASKED_PARAMETERS, ["x"]), "in the place of bytes"),
    "shapes": (Stage.COLLECT_MASKED_VECTORS, lambda c: c[Key.MASKED_PARAMETERS].pop(), "masked vectors have shapes"),
    "no pickles": (Stage.COLLECT_MASKED_VECTORS, put(Key.MASKED_PARAMETERS, [b"\x80\x04."] * 3), ""),
}


@pytest.mark.parametrize("lie", LEFT_OUT)
def test_a_message_that_does_not_fit_is_left_out_as_one_that_did_not_come(lie: str) -> None:
    stage, change, said = LEFT_OUT[lie]
    answers = clients(4)
    answers["c1"] = changing(answers["c1"], stage, change)
    found = ask(answers)
    assert_is_mean(found, [0, 2, 3], [0.5, 0.5, 0.5])
    assert said in found.refused["c1"]


def test_a_vector_of_nonsense_costs_the_round_and_nothing_more() -> None:
    answers = clients(3)

    def lie(configs: Any) -> None:
        # Any other numbers: here the vectors backwards.
        parts = [bytes_to_ndarray(part)[::-1] for part in configs[Key.MASKED_PARAMETERS]]
        configs[Key.MASKED_PARAMETERS] = [ndarray_to_bytes(np.ascontiguousarray(part)) for part in parts]

    answers["c1"] = changing(answers["c1"], Stage.COLLECT_MASKED_VECTORS, lie)
    found = ask(answers)
    assert found.mean is None and "the round is asked again" in found.refused["c0"]
    assert "norm" in found.refused["c0"] or "weights in the sum" in found.refused["c0"]


def test_a_client_without_numbers_leaves_the_round_out_by_itself() -> None:
    answers = clients(4)
    broken = {name: weight * float("nan") for name, weight in learned(1).items()}
    answers["c1"] = SecureLearner(Stub(broken)).answer  # type: ignore[arg-type]
    found = ask(answers)
    assert_is_mean(found, [0, 2, 3], [0.5, 0.5, 0.5])
    assert "values that are not finite" in found.refused["c1"]


def server_that(change: Callable[[str, Any], None]) -> Callable[[Answer], Answer]:
    """Between a server and a client: changes what the server asks."""

    def between(answer: Answer) -> Answer:
        def asked(payload: bytes) -> bytes | None:
            message = MaskedMessage.unpack(payload)
            record = record_of(message.record)
            configs = record.config_records[RECORD_KEY_CONFIGS]
            change(configs[Key.STAGE], configs)
            return answer(MaskedMessage(message.round, message.node, record_bytes(record)).pack())

        return asked

    return between


def open_both(stage: str, configs: Any) -> None:
    """Ask for both kinds of shares of the same client: together they take its masks off."""
    if stage == Stage.UNMASK:
        configs[Key.DEAD_NODE_ID_LIST] = [1]


def open_one(stage: str, configs: Any) -> None:
    if stage == Stage.UNMASK:
        configs[Key.DEAD_NODE_ID_LIST] = configs[Key.ACTIVE_NODE_ID_LIST][1:]
        configs[Key.ACTIVE_NODE_ID_LIST] = configs[Key.ACTIVE_NODE_ID_LIST][:1]


def minority(stage: str, configs: Any) -> None:
    if stage == Stage.SETUP:
        configs[Key.THRESHOLD] = 1


def coarse(stage: str, configs: Any) -> None:
    if stage == Stage.SETUP:
        configs[Key.MOD_RANGE] = 2**23


def doubled(stage: str, configs: Any) -> None:
    if stage == Stage.COLLECT_MASKED_VECTORS:
        for key in (Key.SOURCE_LIST, Key.CIPHERTEXT_LIST):
            configs[key] = configs[key][:1] * 2


NOSY = {
    open_both: "said to be there and gone at once",
    open_one: "a sum of 1 clients is to be opened, and this client wants 2",
    minority: "1 of 3 shares would take masks off",
    coarse: "mod_range is 8388608 at the server",
    doubled: "shares came twice",
}


@pytest.mark.parametrize("change", NOSY, ids=lambda change: change.__name__)
def test_a_client_does_not_help_a_server_that_wants_more_than_the_sum(change: Callable[[str, Any], None]) -> None:
    found = ask({name: server_that(change)(answer) for name, answer in clients(3).items()})
    assert found.mean is None and any(NOSY[change] in said for said in found.refused.values()), found.refused


def test_a_client_opens_no_sum_of_fewer_than_it_wants() -> None:
    four = clients(4, min_clients=4)
    four["c3"] = quitting(four["c3"], Stage.COLLECT_MASKED_VECTORS)
    found = ask(four)
    assert found.mean is None and "this client wants 4" in found.refused["c0"]


def test_a_stage_without_its_beginning_is_refused() -> None:
    first: list[bytes] = []

    def listen(payload: bytes) -> bytes | None:
        first.append(payload)
        return answers["c0"](payload)

    answers = clients(3)
    ask({**answers, "c0": listen})
    (last,) = [payload for payload in first if stage_of(payload) == Stage.UNMASK]
    with pytest.raises(Refused, match="stage 'unmask' of round 1 came without its beginning"):
        answers["c0"](last)
    assert kind_of(last) == MASKED and kind_of(b"x" * 40) is None


@pytest.mark.parametrize("trained", ["adapter, one side", "banks"])
def test_a_federation_under_masks_ends_where_a_plain_one_does(
    trained: str, make_learner: Callable[..., Any], make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    from chorus_moe.training.federated.rounds import Federation
    from chorus_moe.training.train import load_or_build

    answers: dict[str, Answer] = {name: make_learner(trained, name).answer for name in CLIENTS}
    options: dict[str, Any] = {"rounds": 1, "min_clients": 3, "max_update_norm": 10.0, "train_lora_a": False}
    options["max_examples"] = 10
    sections = BANKS if trained == "banks" else ADAPTER
    ends = []
    for is_masked in (False, True):
        recipe = make_recipe(sections, **options, secure_aggregation=is_masked)
        torch.manual_seed(0)
        model, _ = load_or_build(recipe, None)  # type: ignore[arg-type]
        federation = Federation(model, recipe.federated, tmp_path / f"{is_masked}")
        if is_masked:
            answers = {name: SecureLearner(make_learner(trained, name)).answer for name in CLIENTS}
        else:
            # Experts by rows, as under masks.
            answers = {name: by_rows(answer) for name, answer in answers.items()}
        federation.run(InProcess(answers))
        ends.append({name: tensor.clone() for name, tensor in federation.held.weights.items()})
    found = federation.history[0]
    assert found.masked == sorted(CLIENTS) and found.norm is not None and "eyes masked" in str(found)
    plain, masked = ends
    for name in plain:
        # max_update_norm times a step, for each client, over the smallest weight (2 rows of 10) of one alone.
        assert (plain[name] - masked[name]).abs().max() <= 10.0 * STEP * 3 / 0.2, name
    torch.manual_seed(0)
    # A new one: the first matrices of this one are frozen already, and would pass for its base.
    model, _ = load_or_build(recipe, None)  # type: ignore[arg-type]
    again = Federation(model, recipe.federated, tmp_path / "True")
    assert again.done == 1 and again.history[0].masked == found.masked


def test_a_client_that_wants_masks_refuses_a_plain_question(make_recipe: MakeRecipe) -> None:
    from chorus_moe.training.federated.learner import Learner

    learner = Learner.of(make_recipe(BANKS, "both", secure_aggregation=True))
    with pytest.raises(Refused, match="sends masked changes alone"):
        SecureLearner(learner).answer(Question("train", 1, "base").pack())


def test_products_of_two_matrices_are_refused_before_the_start(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    from chorus_moe.training.federated.rounds import Federation
    from chorus_moe.training.train import load_or_build

    recipe = make_recipe(ADAPTER, secure_aggregation=True, max_update_norm=1.0)
    model, _ = load_or_build(recipe, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="secure_aggregation: the mean product of a LoRA"):
        Federation(model, recipe.federated, tmp_path)


def test_the_mod_is_flowers_own() -> None:
    assert secure_client.secaggplus_mod.__module__.startswith("flwr.")
