"""The demo's card says what its run measured."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard

from chorus_moe.training.demo.card import write_model_card
from chorus_moe.training.demo.model import build_demo

RESULT: dict[str, Any] = {
    "voices": "two voices",
    "new_voices": {"before": 0.913, "after": 0.987, "n": 300},
    "new_phrasings": {"before": 0.724, "after": 0.851, "n": 240},
}


def test_the_card_has_every_figure_and_its_picture(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, _ = build_demo(["one two three"])
    (tmp_path / "elsewhere").mkdir()
    picture = tmp_path / "elsewhere" / "routing.png"
    picture.write_bytes(b"png")
    text = write_model_card(tmp_path, model, RESULT, ["| skill |", "| --- |"], picture).read_text(encoding="utf-8")
    assert "base model does not know: 91.3% before LoRA, 98.7% after (300 questions)" in text
    assert "phrasings never seen: 72.4% before, 85.1% after (240)" in text
    assert "Speech: two voices." in text and "\n| skill |\n| --- |\n" in text
    assert "](routing.png)" in text and (tmp_path / "routing.png").read_bytes() == b"png"
    total = sum(parameter.numel() for parameter in model.parameters())
    assert f"Parameters in total: {total:,}." in text
    text_config = model.config.text_config
    assert f"{text_config.num_hidden_layers} layers of width {text_config.hidden_size}" in text
    card = ModelCard(text)
    assert (card.data.pipeline_tag, card.data.library_name) == ("any-to-any", "transformers")
    for bank in text_config.banks:
        assert f"| {bank.name} | {', '.join(bank.modalities)} |" in text
