"""Counting in words, letter by letter: a task with text answers that a small deep decoder learns in a minute.

"by three from four: seven, ten, thirteen, ..." Spelling a word is easy, naming the next number is not; so tokens differ
in the depth that they need. A fifth of the pairs of start and step is held out.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.digit_lessons import stepper
from chorus_moe.modeling.configuration_chorus import ChorusConfig
from chorus_moe.modeling.modeling_generation import ChorusForConditionalGeneration

LETTERS = "abcdefghijklmnopqrstuvwxyz ,:"
FIRST_ID = 3
ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
STEPS = (1, 2, 3)
PAIRS = [(start, step) for start in range(100) for step in STEPS]
BATCH, LENGTH = 12, 64


def in_words(number: int) -> str:
    if number < 20:
        return ONES[number]
    ones = f" {ONES[number % 10]}" if number % 10 else ""
    return TENS[number // 10 - 2] + ones


def question(start: int, step: int) -> str:
    return f"by {in_words(step)} from {in_words(start)}: "


def text_of(start: int, step: int, length: int = LENGTH) -> str:
    """The question and so much of the answer that the text has this length."""
    text, number = question(start, step), start
    while len(text) < length:
        number = (number + step) % 100
        text += in_words(number) + ", "
    return text[:length]


def encode(text: str) -> list[int]:
    return [FIRST_ID + LETTERS.index(letter) for letter in text]


def pairs(held_out: bool, one_in: int = 5) -> list[tuple[int, int]]:
    """Of all pairs of start and step the one in so many that is held out, or the others."""
    order = torch.randperm(len(PAIRS), generator=torch.Generator().manual_seed(0)).tolist()
    cut = len(PAIRS) // one_in
    return [PAIRS[index] for index in (order[:cut] if held_out else order[cut:])]


def decoder(layers: int, hidden_size: int, seed: int = 0, **text: Any) -> ChorusForConditionalGeneration:
    """A dense text decoder, the same at the start whatever the options."""
    torch.manual_seed(seed)
    config = ChorusConfig(
        text_config={
            "vocab_size": FIRST_ID + len(LETTERS),
            "hidden_size": hidden_size,
            "intermediate_size": 3 * hidden_size,
            "num_hidden_layers": layers,
            "num_attention_heads": hidden_size // 32,
            "mlp_layer_types": ["dense"] * layers,
            "expert_banks": {"common": {}},
            "cross_modal_layers": [],
            "pad_token_id": 0,
            **text,
        }
    )
    model = ChorusForConditionalGeneration(config)
    model.generation_config.eos_token_id = None
    return model


def learn(
    models: Mapping[str, ChorusForConditionalGeneration], steps: int, lr: float = 2e-3, seed: int = 1, one_in: int = 5
) -> None:
    """Train all models on the same batches, in turns; of all pairs, one in so many is held out."""
    known = pairs(held_out=False, one_in=one_in)
    take_step = {name: stepper(model.train(), steps, lr) for name, model in models.items()}
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(known), (BATCH,), generator=generator).tolist()
        ids = torch.tensor([encode(text_of(*known[index])) for index in chosen])
        for take in take_step.values():
            take({"input_ids": ids, "labels": ids})
    for model in models.values():
        model.eval()


def held_out() -> Tensor:
    """`(texts, LENGTH)` token ids."""
    return torch.tensor([encode(text_of(*pair)) for pair in pairs(held_out=True)])


@torch.no_grad()
def quality(model: ChorusForConditionalGeneration, ids: Tensor, **options: Any) -> tuple[float, float]:
    """Nats for each letter of the held-out texts, and the share of letters of their answers that is right."""
    outputs = model(input_ids=ids, labels=ids, **options)
    colon = FIRST_ID + LETTERS.index(":")
    is_answer = (ids == colon).cumsum(dim=-1)[:, :-1].bool()
    right = outputs.logits[:, :-1].argmax(dim=-1) == ids[:, 1:]
    return outputs.loss.item(), right[is_answer].float().mean().item()
