"""What the experts of a model do with data: counted, as a table, as JSON and as a picture."""

import json
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
from chorus_moe.training.routing.statistics import BITS, RoutingSummary, routing_shares, summarise

PICTURE, FIGURES = "routing.png", "routing.json"


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
    head, rows = summary.table()
    name_width = max(len(str(row[1])) for row in [head, *rows])
    lines = [f"{'layer':>5}  {'bank':<{name_width}}" + "".join(f"{name:>{len(name) + 2}}" for name in head[2:])]
    for layer, bank, *cells in rows:
        row = "".join(f"{cell:>{len(name) + 2}}" for cell, name in zip(cells, head[2:], strict=True))
        lines.append(f"{layer:>5}  {bank:<{name_width}}{row}")
    return "\n".join([*lines, BITS])


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
