"""Thresholds of a classifier's exits, found on held-out rows, with a promise about other rows.

What is promised: on rows drawn as these were, the exits cost at most `max_accuracy_drop` of accuracy, in all but
`error_rate` of calibrations. As in Learn then Test (arXiv 2110.01052), which CALM (arXiv 2207.07061) takes to exits, a
threshold is taken when a test on the rows rejects that it costs more. The thresholds are tested in an order that is
fixed beforehand, from the strictest down to the first that fails, so that many tests err no more often than one.

The test is the score test of paired proportions (Tango 1998, Statistics in Medicine 17, 891-908). It rests on the few
rows that differ: those that only the full depth gets right (`lost`) and those that only the exits get right (`won`).
Half a row is added to the lost ones; the share of wrong promises, summed exactly over many rates and numbers of rows,
then stays below `error_rate` (tests/training). A binomial test of the lost rows alone would not see the won ones.

Shape suffixes: N rows, X exits.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from chorus_moe.modeling.depth_exits import confidence
from chorus_moe.modeling.modeling_heads import ChorusForSequenceClassification
from chorus_moe.training.loading import device_of

# From 1 - 1e-6 down to 0, twenty per power of ten. Fixed before any row is seen, as the order of the tests must be.
THRESHOLDS = tuple(1 - 10 ** (step / 20) for step in range(-120, 1))


@dataclass(frozen=True)
class ExitCalibration:
    """What was found, on the rows it was found on.

    Args:
        thresholds: one per exit, shallow first.
        accuracy, full_accuracy: with the thresholds, and of all layers.
        left_after: number of layers -> share of the rows that left there, the whole depth included.
    """

    thresholds: list[float]
    accuracy: float
    full_accuracy: float
    left_after: dict[int, float]

    @property
    def mean_layers(self) -> float:
        return sum(layers * share for layers, share in self.left_after.items())


@dataclass(frozen=True)
class ExitAnswers:
    """What every exit, and last the head, says of rows.

    Args:
        layers: after how many layers each of them stands, shallow first.
        confidence_NX: of the exits and of the head.
        is_right_NX: whether the answer is the label.
    """

    layers: list[int]
    confidence_NX: Tensor
    is_right_NX: Tensor

    @classmethod
    @torch.no_grad()
    def ask(cls, model: ChorusForSequenceClassification, batches: Iterable[Mapping[str, Any]]) -> "ExitAnswers":
        """Answer all batches at every exit.

        Raises:
            ValueError: a model without exits, batches without labels, or none at all.
        """
        text = model.config.text_config
        if not text.exit_layers:
            raise ValueError("the model has no exits; add them with add_exits and train them")
        device, was_training = device_of(model), model.training
        # Dropout would make confidences random.
        model.eval()
        sure, right = [], []
        for batch in batches:
            if batch.get("labels") is None:
                raise ValueError("a batch has no labels; accuracy needs them")
            inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
            labels = inputs.pop("labels")
            outputs = model(**inputs, output_exit_logits=True)
            logits_NXL = torch.stack([*outputs.exit_logits, outputs.logits], dim=1)
            sure.append(confidence(logits_NXL).cpu())
            right.append((logits_NXL.argmax(dim=-1) == labels[:, None]).cpu())
        model.train(was_training)
        if not sure:
            raise ValueError("there are no rows to calibrate the exits on")
        return cls([*sorted(text.exit_layers), text.num_hidden_layers], torch.cat(sure), torch.cat(right))

    def at(self, rows: Tensor) -> "ExitAnswers":
        """The answers to some of the rows, by index or mask."""
        return ExitAnswers(self.layers, self.confidence_NX[rows], self.is_right_NX[rows])

    def exits_taken(self, thresholds: list[float]) -> Tensor:
        """`(N,)`: the column of the exit where each row leaves, or of the head."""
        # Every row leaves at the head at the latest: its threshold is below any confidence.
        leaves_NX = self.confidence_NX > torch.tensor([*thresholds, -1.0])
        # `argmax` gives the first of equal values, which is the shallowest exit that is sure enough.
        return leaves_NX.int().argmax(dim=1)

    def is_right(self, thresholds: list[float]) -> Tensor:
        """`(N,)`: whether each row's answer is the label."""
        return self.is_right_NX.gather(1, self.exits_taken(thresholds)[:, None]).squeeze(1)

    def accuracy(self, thresholds: list[float]) -> float:
        return self.is_right(thresholds).float().mean().item()

    def mean_layers(self, thresholds: list[float]) -> float:
        return torch.tensor(self.layers)[self.exits_taken(thresholds)].float().mean().item()

    def lost_and_won(self, thresholds: list[float]) -> tuple[int, int]:
        """Rows that only all layers get right, and rows that only the exits get right."""
        of_exits, of_all = self.is_right(thresholds), self.is_right_NX[:, -1]
        return int((of_all & ~of_exits).sum()), int((of_exits & ~of_all).sum())


def p_value(lost: int, won: int, rows: int, drop: float) -> float:
    """Highest probability of this few lost rows if the exits lose `drop` of accuracy or more (0 < drop < 1)."""
    # The likeliest rate of won rows among those with lost - won = drop.
    linear = lost + won - (2 * rows + won - lost) * drop
    rate = (linear + math.sqrt(linear**2 + 8 * rows * won * drop * (1 - drop))) / (4 * rows)
    # The variance under the null hypothesis, with the rate above: this is what makes it Tango's score test.
    deviation = math.sqrt(rows * (2 * rate + drop - drop**2))
    # Half a row more lost: the normal approximation alone keeps the promise a little too seldom.
    return NormalDist().cdf((lost + 0.5 - won - rows * drop) / deviation)


def rows_needed(drop: float, error_rate: float) -> float:
    """The fewest rows that can promise `drop`: the number needed when no row is lost."""
    if drop <= 0:
        return math.inf
    # `p_value` with lost = won = 0, solved for the number of rows.
    spread = NormalDist().inv_cdf(1 - error_rate) * math.sqrt(drop * (1 - drop))
    return math.ceil(((spread + math.sqrt(spread**2 + 2 * drop)) / (2 * drop)) ** 2)


def check_rows(rows: int, drop: float, error_rate: float) -> None:
    """Raises ValueError if too few rows are given to promise `drop`."""
    needed = rows_needed(drop, error_rate)
    if rows < needed:
        raise ValueError(
            f"{rows} rows cannot promise a drop of at most {drop} on other rows, not even if none of them is lost: at "
            f"error_rate={error_rate} that takes {needed} rows, and two or three times as many let some be lost. Give "
            "more rows, allow a larger drop, or pass error_rate=None to bound the drop on these rows alone"
        )


def is_kept(lost: int, won: int, rows: int, max_accuracy_drop: float, error_rate: float | None) -> bool:
    """Whether a threshold that does this to `rows` rows may be taken."""
    # The test is defined for drops between 0 and 1 only.
    if max_accuracy_drop >= 1:
        return True
    if error_rate is None:
        return lost - won <= max_accuracy_drop * rows
    return p_value(lost, won, rows, max_accuracy_drop) <= error_rate


def lowest(keeps: Callable[[float], bool]) -> float:
    """The last of `THRESHOLDS`, falling, before the first that keeps nothing; 1 if the first fails.

    What lies below that is not tried: accuracy regained there is luck.
    """
    best = 1.0
    for value in THRESHOLDS:
        # The first failure ends the search. Only this fixed sequence lets many tests err no more often than one.
        if not keeps(value):
            break
        best = value
    return best


def find_thresholds(answers: ExitAnswers, max_accuracy_drop: float, error_rate: float | None = 0.05) -> list[float]:
    """The lowest threshold, the same for all exits, that keeps the promise.

    Args:
        error_rate: how often the promise may fail. None: the loss is bounded on these rows alone, on no others.

    Raises:
        ValueError: too few rows to promise this drop.
    """
    rows, exits = len(answers.is_right_NX), len(answers.layers) - 1
    if error_rate is not None:
        check_rows(rows, max_accuracy_drop, error_rate)

    def keeps(value: float) -> bool:
        return is_kept(*answers.lost_and_won([value] * exits), rows, max_accuracy_drop, error_rate)

    # One threshold for all exits: a search over combinations would need a correction for many tests.
    return [lowest(keeps)] * exits


def find_depth_thresholds(
    answers: ExitAnswers, layers: int, share: float, error_rate: float | None = 0.05
) -> list[float]:
    """The lowest threshold, the same for all exits, by which `share` of such rows run through more than `layers`.

    Args:
        error_rate: as in [`find_thresholds`].

    Raises:
        ValueError: as in [`find_thresholds`].
    """
    rows, exits = len(answers.is_right_NX), len(answers.layers) - 1
    if error_rate is not None:
        check_rows(rows, 1 - share, error_rate)
    depth = torch.tensor(answers.layers)

    def is_deep(value: float) -> bool:
        # A row that leaves too early counts as lost, and none can be won.
        left = int((depth[answers.exits_taken([value] * exits)] <= layers).sum())
        return is_kept(left, 0, rows, 1 - share, error_rate)

    return [lowest(is_deep)] * exits


def _taken(model: ChorusForSequenceClassification, answers: ExitAnswers, thresholds: list[float]) -> ExitCalibration:
    """Give the model its thresholds."""
    taken = answers.exits_taken(thresholds)
    model.config.exit_thresholds = thresholds
    return ExitCalibration(
        thresholds,
        answers.accuracy(thresholds),
        answers.is_right_NX[:, -1].float().mean().item(),
        {layers: (taken == column).float().mean().item() for column, layers in enumerate(answers.layers)},
    )


def calibrate_exits(
    model: ChorusForSequenceClassification,
    batches: Iterable[Mapping[str, Any]],
    max_accuracy_drop: float = 0.005,
    error_rate: float | None = 0.05,
) -> ExitCalibration:
    """Find the exits' thresholds on held-out rows and write them into `model.config.exit_thresholds`.

    Args:
        model: [`ChorusForSequenceClassification`] with trained exits.
        batches: inputs of the model with `labels` `(B,)`, such as a `DataLoader`; of rows it was not trained on, drawn
            one by one as those to come. 725 are the least for half a point, two thousand are better.
        max_accuracy_drop: how much accuracy may fall, between 0 and 1.
        error_rate: in what share of calibrations the accuracy on other rows may fall by more, at most half. None: the
            drop is bounded on these rows alone, on no others.

    Raises:
        ValueError: a drop or error rate outside its range, no exits, no rows, too few rows, or rows without labels.
    """
    if not 0 <= max_accuracy_drop <= 1:
        raise ValueError(f"max_accuracy_drop={max_accuracy_drop} is outside 0..1")
    if error_rate is not None and not 0 < error_rate <= 0.5:
        raise ValueError(f"error_rate={error_rate} is not in 0..0.5")
    answers = ExitAnswers.ask(model, batches)
    thresholds = find_thresholds(answers, max_accuracy_drop, error_rate)
    if (answers.exits_taken(thresholds) == len(thresholds)).all():
        warnings.warn(
            f"no sample leaves early: {len(answers.is_right_NX)} rows show no threshold that loses at most "
            f"{max_accuracy_drop} of accuracy with the margin asked for. Train the exits longer, give more rows, or "
            "allow more",
            stacklevel=2,
        )
    return _taken(model, answers, thresholds)


def calibrate_depth(
    model: ChorusForSequenceClassification,
    batches: Iterable[Mapping[str, Any]],
    layers: int,
    share: float = 0.98,
    error_rate: float | None = 0.05,
) -> ExitCalibration:
    """Find the lowest threshold that sends hard rows deep, and write it into `model.config.exit_thresholds`.

    On rows drawn as these were, at least `share` of them run through more than `layers` layers, in all but `error_rate`
    of calibrations: the promise of [`calibrate_exits`], with depth in the place of accuracy.

    Args:
        batches: inputs with `labels` of rows that are to go deep, and of no others.

    Raises:
        ValueError: as in [`calibrate_exits`].
    """
    answers = ExitAnswers.ask(model, batches)
    return _taken(model, answers, find_depth_thresholds(answers, layers, share, error_rate))
