import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.same_bits import TEXT
from chorus_moe import ChorusConfig
from chorus_moe.serving.commands import app
from chorus_moe.training.scale.layout import Layout
from chorus_moe.training.scale.plan import Planner, Question, label, make_plan, read_mix
from chorus_moe.training.scale.plan_layouts import layouts
from chorus_moe.training.scale.plan_rates import DEVICES
from tests.conftest import tiny_config


def text_config() -> ChorusConfig:
    """Without encoders, which take most of the time."""
    return ChorusConfig(text_config=TEXT | {"num_hidden_layers": 2})


def question(**settings: Any) -> Question:
    return Question(**{"gpus": 4, "memory": 10**8, "rates": DEVICES["h100"], "sequence_length": 32} | settings)


@pytest.fixture(scope="module")
def planner() -> Planner:
    return Planner(text_config(), question())


def test_the_best_layouts_fit_and_are_the_fastest(planner: Planner) -> None:
    plan = planner.plan()
    assert len(plan.fitting) == 3 and not plan.others
    seconds = [found.seconds for found in plan.fitting]
    # Three digits count: of equal ones the layout without checkpointing comes first.
    assert seconds == pytest.approx(sorted(seconds), rel=0.01)
    possible = [planner.step(*asked).seconds(planner.question.rates) for asked in planner.possible()]
    assert seconds[0] == pytest.approx(min(possible), rel=0.01)
    assert all(found.memory.total <= planner.question.memory for found in plan.fitting)
    assert len({found.layout for found in plan.fitting}) == 3


def test_a_layout_is_either_possible_or_refused_with_its_reason(planner: Planner) -> None:
    plan = planner.plan()
    refused = {layout: why for why, group in plan.refused.items() for layout in group}
    possible = {layout for layout, _ in planner.possible()}
    assert refused and possible.isdisjoint(refused)
    assert possible | set(refused) == set(layouts(planner.question.gpus))
    assert all(planner.refusal(layout) == why for layout, why in refused.items())


def test_what_does_not_fit_says_why() -> None:
    plan = make_plan(text_config(), question(memory=10**5))
    assert not plan.fitting and len(plan.others) == plan.num_possible
    assert "of 92.0 kB" in str(plan.others[0].why_not) and "are" in str(plan.others[0].why_not)
    assert "none of" in str(plan)


def test_states_are_counted_in_the_bytes_of_the_precision(planner: Planner) -> None:
    size = planner.model.size
    one = planner.states(Layout())
    # Float32 states and, for the products, a copy in bfloat16.
    assert (one.parameters, one.optimizer, one.gradients) == (6 * size, 8 * size, 4 * size)
    # ZeRO shares the moments (1), gradients (2) and weights (3) of 4 devices, rounded up by rows.
    for stage, shared in ((1, ("optimizer",)), (2, ("optimizer", "gradients"))):
        found = planner.states(Layout(4, zero=stage))
        for name in ("optimizer", "gradients"):
            expected = getattr(one, name) / (4 if name in shared else 1)
            assert expected <= getattr(found, name) < expected * 1.05
    # DDP has buckets beside the gradients.
    assert planner.states(Layout(data=4)).gradients == 2 * one.gradients


def test_frozen_towers_and_a_lora_train_less() -> None:
    whole, frozen, lora = (
        Planner(tiny_config(), question(train=train)).states(Layout()).optimizer
        for train in ("whole", "frozen_towers", "lora")
    )
    assert lora < frozen < whole


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"gpus": 12}, "gpus=12 do not divide into nodes of per_node=8"),
        ({"train": "half"}, "unknown way to train 'half'"),
        ({"precision": "float8"}, "unknown precision 'float8'"),
        ({"mix": {"text": 0.5}}, "sum to 0.5, not to 1"),
        ({"mix": {"text": 0.5, "smell": 0.5}}, "unknown modality of the model 'smell'"),
        ({"batch": -1}, "batch=-1 must be at least 1"),
    ],
)
def test_a_wrong_question_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Planner(tiny_config(), question(**settings))


def test_a_mix_is_read() -> None:
    assert read_mix("text=0.6, image=0.4") == {"text": 0.6, "image": 0.4}
    with pytest.raises(ValueError, match="expected shares such as"):
        read_mix("text")


def test_the_command_prints_a_table_or_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text_config().save_pretrained(tmp_path)
    words = ["plan", str(tmp_path), "--gpus", "2", "--memory", "1GB", "--sequence-length", "32"]
    assert not app(words, standalone_mode=False)
    table = capsys.readouterr().out
    assert "the fastest of" in table and "fsdp 2" in table
    assert not app([*words, "--json"], standalone_mode=False)
    found = json.loads(capsys.readouterr().out)
    assert len(found["best"]) == 3 and found["best"][0]["why_not"] is None


def test_a_layout_says_whether_it_is_checkpointed(planner: Planner) -> None:
    layout = next(layout for layout, _ in planner.possible())
    names = [label(planner.estimate(layout, checkpointing)) for checkpointing in (False, True)]
    assert names == [layout.name, f"{layout.name}, checkpointed"]
