"""Cards carry the metadata the Hub and `pipeline` read."""

from pathlib import Path

from huggingface_hub import ModelCard
from peft import get_peft_model

from chorus_moe import ChorusForConditionalGeneration
from chorus_moe.training.lora import lora_config
from chorus_moe.training.model_card import run_card


def test_a_card_names_the_task_and_the_measured_figures(model: ChorusForConditionalGeneration) -> None:
    card = ModelCard(run_card(model, {"eval_loss": 0.25, "note": "text"}))
    assert (card.data.pipeline_tag, card.data.library_name) == ("any-to-any", "transformers")
    assert "| eval_loss | 0.25 |" in card.text
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in card.text
    assert "note" not in card.text and "\n# Chorus model\n" in card.content
    assert card.data.tags == ["chorus", "mixture-of-experts", "multimodal"]


def test_a_card_shows_the_curves_beside_it_and_how_the_weights_came_about(
    model: ChorusForConditionalGeneration, tmp_path: Path
) -> None:
    text = run_card(model, curves=tmp_path / "curves.png", run=["## How it was trained", ""])
    assert "evaluation](curves.png)" in text
    assert text.index("## Curves") < text.index("## How it was trained")
    assert str(tmp_path) not in text
    assert "curves" not in run_card(model)


def test_the_card_of_an_adapter_names_its_base(model: ChorusForConditionalGeneration) -> None:
    model.name_or_path = "someone/base"
    card = ModelCard(run_card(get_peft_model(model, lora_config(model, dense=True, verbose=False))))
    assert (card.data.library_name, card.data.base_model) == ("peft", "someone/base")
    assert "\n# Chorus adapter\n" in card.content
    assert "The adapter holds" in card.text and "lora" in card.data.tags


def test_stages_are_a_table_in_their_order(model: ChorusForConditionalGeneration) -> None:
    stage = {"name": "first", "trained": "connectors", "data": "rows", "learning_rate": 1e-3, "steps": 40}
    text = run_card(model, stages=[stage, stage | {"name": "second", "steps": 9}])
    head = "| stage | trained | data | learning rate | steps |\n| --- | --- | --- | --- | --- |\n"
    rows = "| first | connectors | rows | 0.001 | 40 |\n| second | connectors | rows | 0.001 | 9 |\n"
    assert f"## Stages\n\n{head}{rows}" in text
