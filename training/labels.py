"""What of a sample is learned, token by token."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from chorus_moe.processors.processing_rows import IGNORED_LABEL

Tokens = torch.Tensor | Sequence[int]


def explain_labels(tokenizer: PreTrainedTokenizerBase, input_ids: Tokens, labels: Tokens) -> str:
    """Print and return one line per token of one sample (S,): a mark where it is labelled, then the token."""
    ids = input_ids.tolist() if isinstance(input_ids, torch.Tensor) else list(input_ids)
    tokens = [str(tokenizer.decode([token])) for token in ids]
    lines = [f"{'label' if is_label else '     '} {token!r}" for token, is_label in pair_tokens(tokens, labels)]
    text = "\n".join(lines)
    print(text)
    return text


def pair_tokens(tokens: list[str], labels: Sequence[int] | torch.Tensor) -> list[tuple[str, bool]]:
    """Tokens and whether each is labelled; runs of one token with the same answer become `token x 16`."""
    pairs: list[tuple[str, bool]] = []
    runs: list[int] = []
    for token, label in zip(tokens, labels, strict=True):
        pair = (token, int(label) != IGNORED_LABEL)
        if pairs and pairs[-1] == pair:
            runs[-1] += 1
        else:
            pairs.append(pair)
            runs.append(1)
    return [
        (f"{token} x {run}" if run > 1 else token, is_label) for (token, is_label), run in zip(pairs, runs, strict=True)
    ]
