"""What a rank says when it fails; how others learn of it is tested with processes of their own (`test_spread`)."""

from typing import Any

import pytest
import torch.distributed as dist

from chorus_moe.training.scale.faults import named_by_rank


class Ended(BaseException):
    """In the place of `os._exit`, which would end the tests."""


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Any:
    def make(size: int | None) -> None:
        def end(status: int) -> None:
            assert status == 1
            raise Ended

        monkeypatch.setattr("os._exit", end)
        monkeypatch.setattr(dist, "is_initialized", lambda: size is not None)
        # Without a group torch refuses to say how many there are.
        if size is not None:
            monkeypatch.setattr(dist, "get_world_size", lambda: size)
            monkeypatch.setattr(dist, "get_rank", lambda: 1)

    return make


@pytest.mark.parametrize("size", [None, 1])
def test_an_error_of_one_process_stays_what_it_is(ranks: Any, size: int | None) -> None:
    ranks(size)
    with pytest.raises(KeyError, match="lost"), named_by_rank(lambda error: True):
        raise KeyError("lost")


@pytest.mark.parametrize("is_users", [True, False])
def test_one_of_several_says_its_rank_and_ends(ranks: Any, capsys: pytest.CaptureFixture[str], is_users: bool) -> None:
    ranks(4)
    with pytest.raises(Ended), named_by_rank(lambda error: is_users):
        raise ValueError("two\nlines")
    said = capsys.readouterr().err
    assert said.endswith("rank 1 of 4: ValueError: two lines\n")
    assert ("Traceback" in said) == (not is_users)


def test_the_partner_of_a_failed_rank_points_to_it(ranks: Any, capsys: pytest.CaptureFixture[str]) -> None:
    ranks(2)
    with pytest.raises(Ended), named_by_rank(lambda error: False):
        raise RuntimeError("gloo: Connection closed by peer [::1]:5")
    said = capsys.readouterr().err
    assert "another rank has ended; what it said last is the cause" in said and "Traceback" not in said


def test_nothing_is_said_of_what_ends_well(ranks: Any, capsys: pytest.CaptureFixture[str]) -> None:
    ranks(2)
    with named_by_rank(lambda error: False):
        pass
    assert capsys.readouterr() == ("", "")
