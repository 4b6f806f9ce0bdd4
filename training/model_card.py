"""The model card of a training run: Hub metadata, what the model is, what was trained, and the figures measured."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import ModelCard, ModelCardData

from chorus_moe.modeling.configuration_banks import ExpertBankConfig
from chorus_moe.modeling.modeling_heads import ChorusForContrastive
from chorus_moe.surgery import parameter_report
from chorus_moe.training.loading import ModelOrAdapter, base_model

PARENTS = "## Parents"


class Parent(NamedTuple):
    """A part that a model was composed of: which one, from where, at which commit (None for a folder)."""

    part: str
    source: str
    revision: str | None


def run_card(
    model: ModelOrAdapter,
    metrics: Mapping[str, Any] | None = None,
    license_id: str | None = None,
    picture: Path | None = None,
    parents: Sequence[Parent] = (),
    notes: Sequence[str] = (),
    stages: Sequence[Mapping[str, Any]] = (),
    curves: Path | None = None,
    run: Sequence[str] = (),
) -> str:
    """Markdown with metadata for a model or an adapter.

    Args:
        metrics: names and numbers for the table of figures.
        license_id: the licence of the weights, which only their owner can choose; left out if None.
        picture: a heat map of routing that lies beside the card.
        parents: of a composed model; of a folder only the last name is told.
        notes: what else to say about it, a line each.
        stages: of a run in stages, each with `name`, `trained`, `data`, `learning_rate` and `steps`.
        curves: a picture of the run's losses that lies beside the card.
        run: lines on how the weights came about, see `results/provenance.py`.
    """
    base = base_model(model)
    is_adapter = base is not model
    report, text = parameter_report(base.config), base.config.text_config
    # A local path is of no use on the Hub and may tell more than its owner wants.
    from_hub: Any = [parent.source for parent in parents if not os.path.isdir(parent.source)]
    ancestry = parents_section(parents, notes)
    if not parents:
        from_hub, ancestry = inherited(getattr(base, "name_or_path", ""))
    data = ModelCardData(
        license=license_id,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="feature-extraction" if isinstance(base, ChorusForContrastive) else "any-to-any",
        base_model=from_hub or None,
        tags=["chorus", "mixture-of-experts", "multimodal", *(["lora"] if is_adapter else [])],
    )
    rows = [f"| {name} | {value:,.4g} |" for name, value in (metrics or {}).items() if isinstance(value, int | float)]
    lines = [
        "---",
        data.to_yaml(),
        "---",
        "",
        "# Chorus adapter" if is_adapter else "# Chorus model",
        "",
        f"A mixture-of-experts model of {', '.join(base.config.modalities)}: {text.num_hidden_layers} layers of width "
        f"{text.hidden_size}, {report.total:,} parameters.",
        "",
        "| expert bank | modalities | experts | per token | parameters |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {bank.name} | {', '.join(bank.modalities)} | {experts_label(bank)} | {bank.num_experts_per_tok} | "
            f"{report.banks[bank.name]['total']:,} |"
            for bank in text.banks
        ),
        "",
        "| modality | active parameters |",
        "| --- | --- |",
        *(f"| {name} | {count:,} |" for name, count in report.active.items()),
        "",
    ]
    if is_adapter:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        lines += [f"The adapter holds {trained:,} trained parameters.", ""]
    if rows:
        lines += ["| figure | value |", "| --- | --- |", *rows, ""]
    sections = [*stages_section(stages), *curves_section(curves), *run, *ancestry, *routing_section(picture)]
    return "\n".join([*lines, *sections])


def curves_section(curves: Path | None) -> list[str]:
    """Lines of a card that show the curves of the run; none without a picture."""
    if curves is None:
        return []
    return ["## Curves", "", f"![Loss and token accuracy by step, in training and evaluation]({curves.name})", ""]


def stages_section(stages: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of a card that tell the stages of a run, in their order; none without stages."""
    if not stages:
        return []
    names = ("name", "trained", "data", "learning_rate", "steps")
    rows = ["| " + " | ".join(str(stage[name]) for name in names) + " |" for stage in stages]
    return ["## Stages", "", "| stage | trained | data | learning rate | steps |", "| --- " * 5 + "|", *rows, ""]


def inherited(source: str) -> tuple[Any, list[str]]:
    """What the card of a model says of where it comes from: `base_model`, and the lines on its parents.

    Args:
        source: what the model was loaded from. A repository is itself the base; a folder here passes on what its card
            says; a model that was built and not loaded has none.
    """
    card = Path(source) / "README.md"
    if not os.path.isdir(source):
        # A folder that is gone has a name that no repository has.
        return ([] if os.path.isabs(source) else source), []
    if not card.is_file():
        return [], []
    text = card.read_text(encoding="utf-8")
    base = getattr(ModelCard(text, ignore_metadata_errors=True).data, "base_model", None)
    _, found, rest = text.partition(f"{PARENTS}\n")
    return base, [PARENTS, *rest.split("\n## ")[0].rstrip("\n").split("\n"), ""] if found else []


def parents_section(parents: Sequence[Parent], notes: Sequence[str] = ()) -> list[str]:
    """Lines of a card that name what a model was composed of; none without parents."""
    if not parents:
        return []
    rows = [
        f"| {parent.part} | {Path(parent.source).name if os.path.isdir(parent.source) else parent.source} | "
        f"{parent.revision or 'local folder'} |"
        for parent in parents
    ]
    return [
        PARENTS,
        "",
        "Composed of these models; connectors and, of a dense text model, routers are new and want training.",
        "",
        "| part | model | revision |",
        "| --- | --- | --- |",
        *rows,
        "",
        *(f"- {note}" for note in notes),
        *([""] if notes else []),
    ]


def experts_label(bank: ExpertBankConfig) -> str:
    """The number of experts in words: `4`, or `2 to 4` where it differs between layers."""
    counts = bank.num_experts if isinstance(bank.num_experts, list) else [bank.num_experts]
    return f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else str(counts[0])


def routing_section(picture: Path | None) -> list[str]:
    """Lines of a card that show the heat map beside it; none without a picture."""
    if picture is None:
        return []
    return [
        "## Where the tokens go",
        "",
        "Share of each modality's routed weight (bank gate times router) by layer, bank and expert; grey where nothing",
        "of the modality enters.",
        "",
        f"![Bank and expert use by modality]({picture.name})",
        "",
    ]
