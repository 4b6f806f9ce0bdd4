"""The model card: Hub metadata, and figures that a program measured."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from chorus_moe.modeling.modeling_generation import ChorusForConditionalGeneration
from chorus_moe.surgery import parameter_report
from chorus_moe.training.model_card import experts_label, routing_section


def card_text(
    model: ChorusForConditionalGeneration, result: Mapping[str, Any], table: Sequence[str], picture: Path | None = None
) -> str:
    """The card of a model trained by the demo, as Markdown with metadata.

    Args:
        model: its config gives the architecture and the parameters.
        result: what the demo's `report.json` holds.
        table: lines of the accuracy table.
        picture: a heat map of routing, to lie beside the card.
    """
    text, parameters = model.config.text_config, parameter_report(model.config)
    vision = model.config.vision_config
    assert vision is not None  # the demo's model sees
    data = ModelCardData(
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="any-to-any",
        language=["en"],
        tags=["chorus", "mixture-of-experts", "multimodal", "lora", "timm", "torchaudio"],
    )
    banks = [
        f"| {bank.name} | {', '.join(bank.modalities)} | {experts_label(bank)} | {bank.num_experts_per_tok} | "
        f"{parameters.banks[bank.name]['total']:,} | {parameters.banks[bank.name]['active']:,} |"
        for bank in text.banks
    ]
    active = [f"| {name} | {count:,} |" for name, count in parameters.active.items()]
    voices, phrasings = result["new_voices"], result["new_phrasings"]
    lines = [
        "---",
        data.to_yaml(),
        "---",
        "",
        "# Chorus digits demo",
        "",
        "A small multimodal mixture-of-experts model made by `make demo` of the Chorus package. It answers questions",
        "about a handwritten digit, a spoken digit, or both. Every figure on this card was written by that run.",
        "",
        "## Intended use",
        "",
        "To show, on two processor cores, that a model of text, image and audio experts trains, is fine-tuned with",
        "LoRA, is saved and loads again. It knows ten digits and a few questions; it is of no other use.",
        "",
        "## Architecture",
        "",
        f"A decoder of {text.num_hidden_layers} layers of width {text.hidden_size}; layers {text.sparse_layers} are",
        f"gates over expert banks, layers {text.cross_modal_layers} have cross-modal attention on a shared query",
        f"projection. Images come through `{vision.architecture}` (timm), sound through a",
        "time-delay network on log-mel features.",
        "",
        "| expert bank | modalities | experts | per token | parameters | active a token |",
        "| --- | --- | --- | --- | --- | --- |",
        *banks,
        "",
        f"Parameters in total: {parameters.total:,}. Active, by modality of the token:",
        "",
        "| modality | active parameters |",
        "| --- | --- |",
        *active,
        "",
        "## Training data",
        "",
        "Handwriting: the optical digits of scikit-learn (UCI, 13 writers), split contiguously: writers do not leak.",
        f"Speech: {result['voices']}. Synthetic speech is not real speech.",
        "",
        "## Evaluation",
        "",
        "Exact match of the generated answer on held-out writers and voices; 95% intervals in brackets.",
        "",
        *table,
        "",
        f"Voices the base model does not know: {100 * voices['before']:.1f}% before LoRA, "
        f"{100 * voices['after']:.1f}% after ({voices['n']} questions). Old skills in phrasings never seen: "
        f"{100 * phrasings['before']:.1f}% before, {100 * phrasings['after']:.1f}% after ({phrasings['n']}).",
        "",
        *routing_section(picture),
        "## Limits",
        "",
        "Isolated English digits, 8 x 8 pixel handwriting, short clips. Accuracy on other voices, microphones, pens or",
        "questions is not known and should be expected to be low.",
        "",
    ]
    return "\n".join(lines)


def write_model_card(
    folder: Path,
    model: ChorusForConditionalGeneration,
    result: Mapping[str, Any],
    table: Sequence[str],
    picture: Path | None = None,
) -> Path:
    """Write the card as `README.md` of a model folder, where the Hub shows it, with a copy of its picture."""
    path = folder / "README.md"
    if picture is not None:
        shutil.copyfile(picture, folder / picture.name)
    path.write_text(card_text(model, result, table, picture), encoding="utf-8")
    return path
