"""`chorus-moe page MODEL`: talk to a model in the browser, and see what its experts do.

Unusual here:
- nothing of a visitor is kept by the server: a conversation is in gradio's state of that visitor;
- files are read by the processor alone, within its limits; its one-line error is shown in the page.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio

from chorus_moe.processors.processing_chorus import ChorusProcessor
from chorus_moe.serving.conversation import Answer, Conversation
from chorus_moe.serving.page_views import STYLE, heat_html, picture_attention, sound_attention, spent_text, words_html
from chorus_moe.serving.trace import Trace, trace_answer
from chorus_moe.serving.voices import Voice
from chorus_moe.surgery.parts import decoder_of

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tiff", ".avif")
# A file of the processor's own limit would fill the disk of gradio's cache first.
MAX_FILE_SIZE = "64mb"


class Page:
    """The page of one model and its adapters."""

    def __init__(self, voices: Mapping[str, Voice], processor: ChorusProcessor, max_new_tokens: int = 256):
        self.voices, self.processor, self.max_new_tokens = voices, processor, max_new_tokens
        config = decoder_of(next(iter(voices.values())).model).config
        self.banks = [bank.name for bank in config.banks] if config.sparse_layers else []

    def build(self, examples: Sequence[Mapping[str, Any]] = ()) -> gradio.Blocks:
        """The layout; `examples` are `{"text", "files"}`."""
        with gradio.Blocks(title="Chorus", analytics_enabled=False, delete_cache=(600, 3600)) as page:
            gradio.Markdown(f"# {next(iter(self.voices))}")
            with gradio.Row():
                with gradio.Column(scale=3):
                    chats = []
                    with gradio.Row():
                        for name in ("this setting", "the other setting"):
                            chats.append(gradio.Chatbot(label=name, height=380, visible=name == "this setting"))
                    box = gradio.MultimodalTextbox(
                        sources=["upload", "microphone"], file_types=["image", "audio"], file_count="multiple",
                        placeholder="Ask; drop pictures or sound, or record", show_label=False, elem_id="ask",
                    )  # fmt: skip
                    with gradio.Row():
                        stop = gradio.Button("Stop", elem_id="stop")
                        new = gradio.Button("New conversation", elem_id="new")
                    camera = gradio.Image(sources=["webcam"], type="filepath", label="Photograph", height=200)
                    if examples:
                        gradio.Examples([[dict(example)] for example in examples], [box], label="Examples")
                with gradio.Column(scale=2):
                    settings = [self.settings(name) for name in ("This setting", "The other setting")]
                    both = gradio.Checkbox(label="Answer with both settings", elem_id="both")
                    spent = gradio.Markdown(elem_id="spent")
                    heat, words = (
                        gradio.HTML(label="Experts by layer and bank"),
                        gradio.HTML(label="Tokens", elem_id="words"),
                    )
                    seen = gradio.Gallery(
                        label="What the answer looked at and listened to",
                        height=300,
                        columns=2,
                        object_fit="contain",
                        elem_id="seen",
                    )
            states = [gradio.State(), gradio.State()]
            asked = box.submit(
                self.answer,
                [box, camera, both, *states, *settings[0], *settings[1]],
                [*chats, *states, box, camera, spent, heat, words, seen],
                # Visitors share the model: a conversation waits until it is free.
                concurrency_limit=4,
                # Its veil would stay over the box after an error.
                show_progress="hidden",
            )
            stop.click(None, cancels=[asked])
            new.click(lambda: ([], [], None, None, "", "", "", []), None, [*chats, *states, spent, heat, words, seen])
            both.change(lambda on: gradio.update(visible=on), both, chats[1])
        return page

    def settings(self, title: str) -> list[Any]:
        """Voice, closed banks and expert budget."""
        with gradio.Accordion(title, open=title == "This setting"):
            names = list(self.voices)
            return [
                gradio.Dropdown(names, value=names[0], label=f"Model or adapter ({title.lower()})"),
                gradio.CheckboxGroup(self.banks, label="Closed banks"),
                gradio.Slider(0, 8, 0, step=1, label="Experts per token at most (0: as trained)"),
            ]

    def answer(
        self,
        asked: dict[str, Any],
        photograph: str | None,
        both: bool,
        first: Conversation | None,
        second: Conversation | None,
        *settings: Any,
    ) -> Iterator[tuple[Any, ...]]:
        """Streams the answers of one or two settings, then what the experts did for the first."""
        text, files = asked.get("text") or "", [*(asked.get("files") or []), *([photograph] if photograph else [])]
        talks = [first or self.talk(), second or self.talk()]
        images = [file for file in files if Path(file).suffix.lower() in PICTURES]
        sounds = [file for file in files if file not in images]
        shown: list[Any] = [gradio.skip(), gradio.skip()]
        traced: list[Any] = ["", "", "", []]
        answers: list[tuple[Conversation, Answer]] = []
        # Also the photograph: it goes with one question.
        empty = (gradio.MultimodalTextbox(value=None), None)
        if not text and not files:
            return
        try:
            for number in range(1 + both):
                voice, closed, budget = settings[3 * number : 3 * number + 3]
                talk = talks[number]
                talk.voice = self.voices[voice]
                before = history(talk)
                answer, pieces = talk.ask(text, images, sounds, **options(closed, budget, talk))
                answers.append((talk, answer))
                turn = [{"role": "user", "content": {"path": file}} for file in files]
                turn += [{"role": "user", "content": text}] if text else []
                said = ""
                for piece in pieces:
                    said += piece
                    shown[number] = [*before, *turn, {"role": "assistant", "content": said}]
                    yield (*shown, *talks, *empty, *traced)
                shown[number] = [*before, *turn, {"role": "assistant", "content": answer.text or "(no words)"}]
            talk, answer = answers[0]
            trace = trace_answer(talk.voice, self.processor, answer)
            traced = [
                spent_text(trace, answer.tokens_per_second), heat_html(trace.experts), words_html(trace),
                self.looks(trace, talk, answer),
            ]  # fmt: skip
            yield (*shown, *talks, *empty, *traced)
        except (ValueError, OSError) as error:
            raise gradio.Error(" ".join(str(error).split()), print_exception=False) from error

    def talk(self) -> Conversation:
        return Conversation(next(iter(self.voices.values())), self.processor, self.max_new_tokens)

    def looks(self, trace: Trace, talk: Conversation, answer: Answer) -> list[Any]:
        """Every picture and clip of the conversation with the answer's attention over it."""
        is_padded = self.processor.image_processor.do_pad_to_square
        spans = trace.spans("image", [self.processor.num_image_tokens_for()] * len(talk.images) if talk.images else [])
        found = [picture_attention(trace, *pair, is_padded) for pair in zip(spans, talk.images, strict=True)]
        features = answer.inputs.get("input_features")
        if features is not None and features.ndim == 3:
            # A long clip has several windows, each a row of frames, padded to the longest.
            windows = [
                row[mask.bool()] for row, mask in zip(features, answer.inputs["input_features_mask"], strict=True)
            ]
            hop = self.processor.feature_extractor.hop_length
            spans = trace.spans("audio", [self.processor.num_audio_tokens_for(len(window) * hop) for window in windows])
            found += [sound_attention(trace, *pair) for pair in zip(spans, windows, strict=True)]
        return [picture for picture in found if picture is not None]


def options(closed: Sequence[str], budget: float, talk: Conversation) -> dict[str, Any]:
    """Those of the model's call."""
    found: dict[str, Any] = {"closed_banks": list(closed)} if closed else {}
    if budget:
        names = decoder_of(talk.voice.model).config.modalities
        found["expert_budget"] = dict.fromkeys(names, int(budget))
    return found


def history(talk: Conversation) -> list[dict[str, Any]]:
    """A conversation as gradio shows it."""
    shown, files = [], {"image": iter(talk.images), "audio": iter(talk.audio)}
    for message in talk.messages:
        content = message["content"]
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            value = part["text"] if part["type"] == "text" else {"path": str(next(files[part["type"]]))}
            if value:
                shown.append({"role": message["role"], "content": value})
    return shown


def read_examples(path: Path, count: int = 5) -> list[dict[str, Any]]:
    """The questions of the first rows of a data file, media as paths beside it."""
    found = []
    for row in (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:count]):
        content = row["messages"][0]["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        files = [str(path.parent / name) for name in [*row.get("images", []), *row.get("audio", [])]]
        found.append({"text": " ".join(part["text"] for part in parts if part["type"] == "text"), "files": files})
    return found


def run_page(page: gradio.Blocks, host: str = "127.0.0.1", port: int = 7860, wait: bool = True) -> str:
    """Open the page to browsers; its address."""
    _, address, _ = page.queue().launch(
        server_name=host, server_port=port or None, prevent_thread_lock=not wait, share=False, quiet=True,
        max_file_size=MAX_FILE_SIZE, css=STYLE, footer_links=[], show_error=True,
    )  # fmt: skip
    return address
