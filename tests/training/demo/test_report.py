"""The report's confusions are those of the skills whose answer is a digit."""

from chorus_moe.training.demo.report import confusions_of, loss_curves


def test_each_digit_skill_has_a_confusion_of_its_own() -> None:
    questions = [
        {"skill": skill, "answer": str(digit)} for skill in ("written", "sum", "spoken") for digit in (3, 7, 3, 7)
    ]
    answers = ["3", "7", "8", "3"] + ["10"] * 4 + ["3", "7", "3", "7"]
    found = confusions_of(questions, answers)
    assert list(found) == ["written", "spoken"]
    assert found["written"].columns == ["3", "7", "(other)"]
    assert found["written"].counts.tolist() == [[1, 0, 1], [1, 1, 0]]
    assert found["spoken"].counts.tolist() == [[2, 0], [0, 2]]
    # Too few to be a table.
    assert confusions_of(questions[:1], answers[:1]) == {}


def test_each_stage_has_a_curve() -> None:
    logs = {"one": [{"loss": 2.0, "step": 1}, {"loss": 1.0, "step": 2}], "two": [{"train_loss": 1.0, "step": 2}]}
    assert loss_curves(logs).metrics == {"loss, one": {"train": [(1, 2.0), (2, 1.0)]}}
