"""Questions about facts that were told nearby or far away: a task whose hard questions no shallow layer can answer.

A text tells two facts, one at its start and one before its last few words; between them lies filler, and behind them a
question about one of the two. The first `SHALLOW` layers of the classifier have windows of `WINDOW` tokens, the others
see everything. So the near fact is in reach from the first layers on, and nothing of the far one reaches the question
before layer `SHALLOW + 1`: whoever answers earlier guesses among `ANSWERS`.
"""

import argparse
from typing import Any

import torch
from torch import Tensor

from benchmarks.digit_lessons import stepper
from benchmarks.timing import Timing
from chorus_moe.modeling.configuration_chorus import ChorusConfig
from chorus_moe.modeling.modeling_heads import ChorusForSequenceClassification

SHALLOW, WINDOW, FILLER, GAP, ANSWERS = 5, 6, 36, 3, 8
# Token ids: 0 pads; then the two kinds of facts, the two questions, the answers; the rest is filler.
FIRST_FACT, FIRST_QUESTION, FIRST_ANSWER, FIRST_FILLER, VOCABULARY = 1, 3, 8, 16, 64
BATCH, RATE = 44, 2e-3
Sample = dict[str, Any]


def draw(count: int, generator: torch.Generator) -> list[Sample]:
    """Rows `{"input_ids": (S,), "label", "skill": near or far}`; far ones have the odd places."""

    def numbers(low: int, high: int, columns: int) -> Tensor:
        return torch.randint(low, high, (count, columns), generator=generator)

    told = numbers(0, ANSWERS, 2)
    # Which kind is told first says nothing of which is asked for.
    first = numbers(0, 2, 1)
    is_far = torch.arange(count)[:, None] % 2
    asked = torch.where(is_far == 1, first, 1 - first)
    ids = torch.cat(
        [
            FIRST_FACT + first,
            FIRST_ANSWER + told[:, :1],
            numbers(FIRST_FILLER, VOCABULARY, FILLER),
            FIRST_FACT + 1 - first,
            FIRST_ANSWER + told[:, 1:],
            numbers(FIRST_FILLER, VOCABULARY, GAP),
            FIRST_QUESTION + asked,
        ],
        dim=1,
    )
    labels = told.gather(1, 1 - is_far).squeeze(1).tolist()
    skills = ["far" if far else "near" for far in is_far.squeeze(1).tolist()]
    return [
        {"input_ids": row, "label": label, "skill": skill}
        for row, label, skill in zip(ids, labels, skills, strict=True)
    ]


class FarLesson:
    """One seed: rows to learn, to calibrate on and to be asked; no two of them are alike.

    Args:
        layers: of the classifier.
        exits: after which layers it may be left.
    """

    def __init__(self, parsed: argparse.Namespace, layers: int, exits: list[int], seed: int):
        self.steps, count = (2, 8) if parsed.quick else (parsed.far_steps, 2 * parsed.questions)
        self.layers, self.exits, self.seed = layers, exits, seed
        self._generator = torch.Generator().manual_seed(seed)
        self.calibration, self.fresh = draw(count, self._generator), draw(count, self._generator)

    def classifier(self) -> ChorusForSequenceClassification:
        torch.manual_seed(self.seed)
        config = ChorusConfig(
            text_config={
                "vocab_size": VOCABULARY,
                "hidden_size": 64,
                "intermediate_size": 192,
                "num_hidden_layers": self.layers,
                "num_attention_heads": 4,
                "mlp_layer_types": ["dense"] * self.layers,
                "layer_types": ["sliding_attention"] * SHALLOW + ["full_attention"] * (self.layers - SHALLOW),
                "sliding_window": WINDOW,
                "cross_modal_layers": [],
                "modalities": ["text"],
                "expert_banks": {"common": {}},
                "pad_token_id": 0,
                "exit_layers": self.exits,
                "exit_loss_coef": 1.0,
            }
        )
        config.num_labels = ANSWERS
        return ChorusForSequenceClassification(config)

    def learn(self, model: ChorusForSequenceClassification) -> dict[str, Timing]:
        """Train it; rows are drawn anew for each step."""
        take = stepper(model.train(), self.steps, RATE)
        for _ in range(self.steps):
            (batch,) = self.batches(draw(BATCH, self._generator), BATCH)
            take(batch)
        return {}

    def batches(self, samples: list[Sample], size: int) -> list[dict[str, Tensor]]:
        return [
            {
                "input_ids": torch.stack([row["input_ids"] for row in samples[start : start + size]]),
                "labels": torch.tensor([row["label"] for row in samples[start : start + size]]),
            }
            for start in range(0, len(samples), size)
        ]
