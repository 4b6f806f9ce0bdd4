"""What a run has spent: kept in its checkpoints, and after each update in `privacy.json` of its folder.

The file knows updates that no checkpoint holds: those after the newest one, when the run was killed, and those of a
branch that was left by going on from an older one. Their results may have been seen, so they count.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from chorus_moe.training.privacy.accounting import Updates, epsilon_of, noise_for
from chorus_moe.training.privacy.arguments import PrivacyArguments

FILE = "privacy.json"
INSIDE = re.compile(r"merged|checkpoint-\d+")


class Earlier(NamedTuple):
    """What a model had spent, in all its private runs, that a run starts from."""

    epsilon: float
    delta: float


class PrivacyLedger:
    """The updates of a run and their epsilon.

    Args:
        arguments: mechanism, accountant, and how much may be spent.
        num_rows: rows of the training data.
        rate: share of the rows that an update takes on average.
        earlier: of the model that the run starts from; it is told beside what the run spends.

    Raises:
        ValueError: a delta with which a whole row may be given away.
    """

    def __init__(self, arguments: PrivacyArguments, num_rows: int, rate: float, earlier: Earlier | None = None):
        self.arguments, self.num_rows, self.rate, self.earlier = arguments, num_rows, rate, earlier
        self.delta = 1 / (10 * num_rows) if arguments.delta is None else arguments.delta
        if self.delta >= 1 / num_rows:
            raise ValueError(
                f"privacy.delta={self.delta:g} must be below 1 / {num_rows:,} rows: otherwise publishing one row as it "
                "is would pass for private"
            )
        # Equal runs that the budget is for, this one included: the rounds of a federation.
        self.num_runs = 1
        self.history: list[Updates] = []
        self._epsilon: tuple[int, float] = (0, 0.0)

    @property
    def num_updates(self) -> int:
        return sum(steps for _, _, steps in self.history)

    @property
    def epsilon(self) -> float:
        """Spent so far, at `delta`."""
        if self._epsilon[0] != self.num_updates:
            given = self.arguments
            self._epsilon = (
                self.num_updates,
                epsilon_of(self.history, self.delta, given.mechanism, given.accountant),
            )
        return self._epsilon[1]

    def noise_of(self, steps: int) -> float:
        """The noise multiplier of the next `steps` updates, and of as many in each run to come. Raises ValueError as
        `noise_for`."""
        given = self.arguments
        if given.noise_multiplier is not None:
            return given.noise_multiplier
        if given.epsilon_per_update is not None:
            return 1 / given.epsilon_per_update
        assert given.epsilon is not None  # by `check_arguments`
        updates = steps * self.num_runs
        return noise_for(
            given.epsilon, self.delta, self.rate, updates, given.mechanism, given.accountant, spent=self.history
        )

    def take(self, noise: float) -> None:
        """Count one update."""
        if self.history and self.history[-1][:2] == (noise, self.rate):
            self.history[-1] = (noise, self.rate, self.history[-1][2] + 1)
        else:
            self.history.append((noise, self.rate, 1))

    def state(self) -> dict[str, Any]:
        return {
            "mechanism": self.arguments.mechanism,
            "accountant": self.arguments.accountant,
            "num_rows": self.num_rows,
            "delta": self.delta,
            "history": [list(updates) for updates in self.history],
            "earlier": None if self.earlier is None else list(self.earlier),
        }

    def continue_from(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on from the state that has most updates.

        Raises:
            ValueError: another mechanism, whose updates cannot be counted together with these.
        """
        for state in states:
            if state["mechanism"] != self.arguments.mechanism:
                raise ValueError(
                    f"privacy.mechanism={self.arguments.mechanism!r}, but the run so far had {state['mechanism']!r}; "
                    "its updates cannot be counted together with these: start a new run from its weights"
                )
            history = [(float(noise), float(rate), int(steps)) for noise, rate, steps in state["history"]]
            if sum(steps for _, _, steps in history) > self.num_updates:
                self.history = history

    def write(self, folder: Path) -> None:
        """Write the file, with the epsilon where it is known."""
        folder.mkdir(parents=True, exist_ok=True)
        values = self.state()
        if self._epsilon[0] == self.num_updates:
            values["epsilon"] = self._epsilon[1]
        aside = folder / f".{FILE}"
        aside.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        aside.replace(folder / FILE)


def read_ledger(folder: str | Path) -> dict[str, Any] | None:
    """The state in a folder's file; None without one."""
    path = Path(folder) / FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def spent_before(source: str | None) -> Earlier | None:
    """What the model in a folder had spent, also one whose adapter was merged below its run's folder; None if it was
    not trained privately."""
    if not source:
        return None
    folder = Path(source)
    # A checkpoint, or a stage's model with its adapter merged, lies in the folder of its run.
    state = read_ledger(folder.parent if INSIDE.fullmatch(folder.name) else folder)
    if state is None:
        return None
    history = [tuple(updates) for updates in state["history"]]
    spent = epsilon_of(history, state["delta"], state["mechanism"], state["accountant"])
    before = Earlier(*(state["earlier"] or (0.0, 0.0)))
    return Earlier(spent + before.epsilon, state["delta"] + before.delta)
