"""What the experts of a model do with data: counted, as a table, as JSON and as a picture."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from chorus_moe.modeling.configuration_modalities import MODALITY_IDS
from chorus_moe.processors.processing_chorus import ChorusProcessor
from chorus_moe.training.collator import clean_messages
from chorus_moe.training.data import RowDataset
from chorus_moe.training.layouts import standard_row
from chorus_moe.training.loading import ModelOrAdapter, base_model, device_of
from chorus_moe.training.routing.counters import RoutingCounters
from chorus_moe.training.routing.observer import RoutingObserver
from chorus_moe.training.routing.pictures import can_draw, draw_routing
from chorus_moe.training.routing.statistics import RoutingSummary, routing_shares, summarise

PICTURE, FIGURES = "routing.png", "routing.json"
HEADS = (
    "tokens",
    "load entropy",
    "router entropy",
    "dead",
    "strongest",
    "rerouted",
    "dropped",
    "expert bits",
    "bank bits",
)


@torch.inference_mode()
def count_rows(
    model: ModelOrAdapter,
    processor: ChorusProcessor,
    rows: Sequence[Mapping[str, Any]] | RowDataset,
    *,
    batch_size: int = 16,
    progress: bool = False,
) -> RoutingCounters:
    """The routing of whole rows, question and answer, in evaluation mode; one forward per batch, without generation.

    Args:
        model: with or without an adapter.
        rows: as in `ChorusDataCollator`.

    Raises:
        ValueError: no rows, or a model without a sparse layer.
        MediaError: a row that cannot be read.
    """
    if len(rows) == 0:
        raise ValueError("there are no rows to route")
    if not base_model(model).config.text_config.sparse_layers:
        raise ValueError("the model has no sparse layer, so it routes nothing")
    was_training = model.training
    model.eval()
    with RoutingObserver(model) as observer:
        for start in tqdm(range(0, len(rows), batch_size), desc="routing", unit="batch", disable=not progress):
            batch = [standard_row(rows[index]) for index in range(start, min(start + batch_size, len(rows)))]
            inputs = processor.apply_chat_template(
                [clean_messages(row["messages"]) for row in batch],
                images=[list(row.get("images") or []) for row in batch],
                audio=[list(row.get("audio") or []) for row in batch],
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True, "padding_side": "right"},
            ).to(device_of(model))
            # The model below the head: logits over the vocabulary are not needed. Adapters act inside it all the same.
            base_model(model).base_model(**inputs, use_cache=False)
    model.train(was_training)
    return observer.counters


def routing_table(summary: RoutingSummary) -> str:
    """One line for each bank of each layer."""
    name_width = max(len("bank"), *(len(bank.bank) for bank in summary.banks))
    lines = [f"{'layer':>5}  {'bank':<{name_width}}" + "".join(f"{head:>{len(head) + 2}}" for head in HEADS)]
    shown = set()
    for bank in summary.banks:
        # Bits of a layer stand in the line of its first bank.
        information = math.nan if bank.layer in shown else summary.bank_information[bank.layer]
        shown.add(bank.layer)
        cells = (
            f"{bank.tokens:,}",
            _cell(bank.load_entropy, ".3f"),
            _cell(bank.router_entropy, ".3f"),
            f"{bank.dead_experts}/{bank.num_experts}" if bank.tokens else "-",
            _cell(bank.strongest_share, ".1%"),
            _cell(bank.rerouted, ".1%"),
            _cell(bank.dropped, ".1%"),
            _cell(bank.expert_information, ".3f"),
            _cell(information, ".3f"),
        )
        row = "".join(f"{cell:>{len(head) + 2}}" for cell, head in zip(cells, HEADS, strict=True))
        lines.append(f"{bank.layer:>5}  {bank.bank:<{name_width}}{row}")
    lines.append("bits: what an expert of the bank, and in each layer the bank, tell about the modality of a token")
    return "\n".join(lines)


def _cell(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


def routing_figures(counters: RoutingCounters) -> dict[str, Any]:
    """What `routing.json` holds: the statistics, and the exact counts behind them by modality."""
    counts = [
        {
            "layer": layer,
            "bank": name,
            "tokens": dict(zip(MODALITY_IDS, bank.tokens_M.tolist(), strict=True)),
            "choices": dict(zip(MODALITY_IDS, bank.choices_ME.tolist(), strict=True)),
            "rerouted": bank.rerouted,
            "dropped": bank.dropped,
        }
        for layer, banks in counters.banks.items()
        for name, bank in banks.items()
    ]
    # JSON has no NaN.
    shares = {
        name: np.where(np.isnan(share), np.array(None), share).tolist()
        for name, share in routing_shares(counters).items()
    }
    return {
        **summarise(counters).to_dict(),
        "counts": counts,
        "weight_shares": {"layers": list(counters.banks), "modalities": list(MODALITY_IDS), "banks": shares},
    }


def write_routing(folder: Path, counters: RoutingCounters) -> Path | None:
    """Write `routing.json` and, where matplotlib is installed, `routing.png`; returns the picture's path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FIGURES).write_text(json.dumps(routing_figures(counters), indent=2) + "\n", encoding="utf-8")
    # matplotlib is an extra.
    if not can_draw():
        return None
    draw_routing(folder / PICTURE, routing_shares(counters), list(counters.banks))
    return folder / PICTURE
