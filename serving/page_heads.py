"""Pages of models that write no text: the labels of a classifier, and what lies nearest in an embedding model.

Unusual here:
- files are read by the processor alone, within its limits; its one-line error is shown in the page;
- vectors of dropped files are computed anew for each question: nothing of a visitor is kept by the server.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio
import torch
from torch import Tensor

from chorus_moe.modeling.modeling_heads import ChorusForContrastive, ChorusForSequenceClassification
from chorus_moe.processors.processing_chorus import ChorusProcessor
from chorus_moe.serving.conversation import SPEAKING
from chorus_moe.serving.page import PICTURES
from chorus_moe.serving.page_views import heat_html, nearest_html
from chorus_moe.serving.trace import experts_by_layer
from chorus_moe.serving.voices import Voice
from chorus_moe.surgery.parts import decoder_of
from chorus_moe.training.contrast.embeddings import embed_media, embed_texts
from chorus_moe.training.loading import ModelOrAdapter, base_model, device_of

# Files of one question whose vectors are computed.
MAX_FILES = 200
# Bars that the page shows; the rest are small.
MAX_LABELS = 20


class LabelPage:
    """The page of a classifier and its adapters: a question, and a bar for each label."""

    def __init__(self, voices: Mapping[str, Voice], processor: ChorusProcessor):
        self.voices, self.processor = voices, processor
        config = decoder_of(next(iter(voices.values())).model).config
        self.banks = [bank.name for bank in config.banks] if config.sparse_layers else []

    def build(self, examples: Sequence[Mapping[str, Any]] = ()) -> gradio.Blocks:
        """The layout; `examples` are `{"text", "files"}`."""
        with gradio.Blocks(title="Chorus", analytics_enabled=False, delete_cache=(600, 3600)) as page:
            gradio.Markdown(f"# {next(iter(self.voices))}")
            with gradio.Row():
                with gradio.Column():
                    box = question_box("Text; drop pictures or sound, or record")
                    if examples:
                        gradio.Examples([[dict(example)] for example in examples], [box], label="Examples")
                    voice = voice_choice(self.voices)
                    closed = gradio.CheckboxGroup(self.banks, label="Closed banks")
                with gradio.Column():
                    labels = gradio.Label(label="Labels", num_top_classes=MAX_LABELS, elem_id="labels")
                    heat = gradio.HTML(label="Experts: share of a layer's visits, in percent", elem_id="heat")
            box.submit(self.classify, [box, voice, closed], [labels, heat], concurrency_limit=4, show_progress="hidden")
        return page

    def classify(
        self, asked: Mapping[str, Any], voice: str, closed: Sequence[str] = ()
    ) -> tuple[dict[str, float], str]:
        """Label -> probability, of a regressor its values; and the share of visits that each expert had."""
        files = asked.get("files") or []
        images, sounds = [f for f in files if is_picture(f)], [f for f in files if not is_picture(f)]
        with shown_in_the_page(), self.speaking(voice) as model:
            media = [self.processor.image_token] * len(images) + [self.processor.audio_token] * len(sounds)
            batch = self.processor(
                text=[" ".join([*media, asked.get("text") or ""]).strip()],
                images=[images] if images else None,
                audio=[sounds] if sounds else None,
                return_tensors="pt",
            ).to(device_of(model))
            options = {"closed_banks": list(closed)} if closed else {}
            outputs = model(**batch, **options, output_router_logits=True)
        config, logits = base_model(model).config, outputs.logits[0].float()
        experts = experts_by_layer(decoder_of(model).config, outputs.routing, batch["input_ids"].shape[1])
        if config.problem_type == "multi_label_classification":
            logits = logits.sigmoid()
        elif config.problem_type != "regression":
            logits = logits.softmax(dim=-1)
        return {config.id2label[number]: value for number, value in enumerate(logits.tolist())}, heat_html(experts)

    @contextmanager
    def speaking(self, voice: str) -> Iterator[ModelOrAdapter]:
        """The model, which answers as `voice` within."""
        with torch.inference_mode(), SPEAKING, self.voices[voice].speaking():
            yield self.voices[voice].model


class NearestPage(LabelPage):
    """The page of an embedding model and its adapters: dropped files and texts, the nearest to a question first."""

    def build(self, examples: Sequence[Mapping[str, Any]] = ()) -> gradio.Blocks:
        """The layout; `examples` are `{"text", "files"}`."""
        with gradio.Blocks(title="Chorus", analytics_enabled=False, delete_cache=(600, 3600)) as page:
            gradio.Markdown(f"# {next(iter(self.voices))}")
            with gradio.Row():
                with gradio.Column():
                    files = gradio.File(label="Files to search", file_count="multiple", elem_id="files", height=160)
                    texts = gradio.Textbox(label="Texts to search, one a line", lines=3, elem_id="texts")
                    voice = voice_choice(self.voices)
                    box = question_box("A text, a picture or a sound to look for")
                    if examples:
                        gradio.Examples([[dict(example)] for example in examples], [box], label="Examples")
                with gradio.Column():
                    ranking = gradio.HTML(label="Nearest first", elem_id="nearest")
                    pictures = gradio.Gallery(label="Pictures, nearest first", columns=4, height=300, elem_id="seen")
            box.submit(
                self.search, [box, files, texts, voice], [ranking, pictures],
                concurrency_limit=4, show_progress="hidden",
            )  # fmt: skip
        return page

    def search(
        self, asked: Mapping[str, Any], files: Sequence[str] | None, texts: str, voice: str
    ) -> tuple[str, list[tuple[str, str]]]:
        """A bar for each file and text, the nearest first, and the pictures among them."""
        lines = [line.strip() for line in (texts or "").splitlines() if line.strip()]
        images, sounds = [f for f in files or [] if is_picture(f)], [f for f in files or [] if not is_picture(f)]
        with shown_in_the_page(), self.speaking(voice) as model:
            if not lines and not images and not sounds:
                raise ValueError("there is nothing to search: drop files or write texts")
            if len(lines) + len(images) + len(sounds) > MAX_FILES:
                raise ValueError(f"{len(lines) + len(images) + len(sounds)} things to search, at most {MAX_FILES}")
            target = self.question(model, asked)
            names = [Path(file).name for file in [*images, *sounds]] + lines
            vectors = [self.vector(model, file) for file in [*images, *sounds]]
            scores = [float(vector @ target) for vector in [*vectors, *embed_texts(model, self.processor, lines)]]
        order = sorted(range(len(scores)), key=lambda number: -scores[number])
        shown = [(images[number], f"{scores[number]:.3f}") for number in order if number < len(images)]
        return nearest_html([(names[number], scores[number]) for number in order]), shown

    def question(self, model: ModelOrAdapter, asked: Mapping[str, Any]) -> Tensor:
        text, files = asked.get("text") or "", asked.get("files") or []
        if bool(text) + len(files) != 1:
            found = [text] * bool(text) + [Path(file).name for file in files]
            raise ValueError(f"a question is one text, one picture or one sound, found {found or 'nothing'}")
        return embed_texts(model, self.processor, [text])[0] if text else self.vector(model, files[0])

    def vector(self, model: ModelOrAdapter, file: str) -> Tensor:
        """`(D,)`; an error names the file."""
        # One by one: a batch of all that visitors drop could take any amount of memory.
        try:
            return embed_media(model, self.processor, "image" if is_picture(file) else "audio", [file])[0]
        except ValueError as error:
            raise ValueError(f"{Path(file).name}: {error}") from error


# What `chorus-moe page` opens for models that write no text.
PAGES: dict[type, type[LabelPage]] = {ChorusForSequenceClassification: LabelPage, ChorusForContrastive: NearestPage}


def question_box(placeholder: str) -> gradio.MultimodalTextbox:
    return gradio.MultimodalTextbox(
        sources=["upload", "microphone"], file_types=["image", "audio"], file_count="multiple",
        placeholder=placeholder, show_label=False, elem_id="ask",
    )  # fmt: skip


def voice_choice(voices: Mapping[str, Voice]) -> gradio.Dropdown:
    return gradio.Dropdown(list(voices), value=next(iter(voices)), label="Model or adapter")


def is_picture(file: str) -> bool:
    return Path(file).suffix.lower() in PICTURES


@contextmanager
def shown_in_the_page() -> Iterator[None]:
    """Errors of what a visitor gave become one line in the page."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise gradio.Error(" ".join(str(error).split()), print_exception=False) from error
