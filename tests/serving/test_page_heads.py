"""Pages of classifiers and embedding models: their figures against the model's, and in a real browser."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

gradio = pytest.importorskip("gradio", reason="the extra `page` is not installed: .ci/matrix page runs this")
if int(gradio.__version__.split(".")[0]) < 6:
    pytest.skip("the page needs gradio 6", allow_module_level=True)

from chorus_moe import ChorusForContrastive, ChorusForSequenceClassification, ChorusProcessor  # noqa: E402
from chorus_moe.serving.page import run_page  # noqa: E402
from chorus_moe.serving.page_heads import LabelPage, NearestPage  # noqa: E402
from chorus_moe.serving.voices import load_voices, saved_kind  # noqa: E402
from chorus_moe.surgery import processor_from_config  # noqa: E402
from tests.conftest import tiny_config  # noqa: E402
from tests.serving.conftest import picture_file, sound_file  # noqa: E402
from tests.serving.test_page import browser  # noqa: E402, F401  a fixture

LABELS = {0: "cat", 1: "dog", 2: "a <bird>"}


@pytest.fixture(scope="module")
def saved(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[type, str], Path]:
    """Saves a model of a class and answers where; its processor is that of `folder`."""

    def save(kind: type, name: str) -> Path:
        tokenizer = ChorusProcessor.from_pretrained(folder).tokenizer
        config = tiny_config(vocab_size=len(tokenizer), initializer_range=0.2)
        config.id2label, config.label2id = LABELS, {label: number for number, label in LABELS.items()}
        torch.manual_seed(0)
        path = tmp_path_factory.mktemp("heads") / name
        kind(config).save_pretrained(path)  # type: ignore[attr-defined]
        processor_from_config(config, tokenizer).save_pretrained(path)
        return path

    return save


@pytest.fixture(scope="module")
def labels(saved: Callable[[type, str], Path]) -> LabelPage:
    path = saved(ChorusForSequenceClassification, "classifier")
    assert saved_kind(str(path)) is ChorusForSequenceClassification
    return LabelPage(*load_voices(str(path), kind=ChorusForSequenceClassification))


@pytest.fixture(scope="module")
def nearest(saved: Callable[[type, str], Path]) -> NearestPage:
    path = saved(ChorusForContrastive, "embeddings")
    assert saved_kind(str(path)) is ChorusForContrastive
    return NearestPage(*load_voices(str(path), kind=ChorusForContrastive))


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Two pictures and two sounds."""
    for number in range(2):
        (tmp_path / f"picture{number}.png").write_bytes(picture_file(number))
        (tmp_path / f"sound{number}.wav").write_bytes(sound_file(number))
    return sorted(str(path) for path in tmp_path.iterdir())


@torch.no_grad()
def expected_labels(page: LabelPage, text: str, closed: list[str], **media: Any) -> dict[str, float]:
    model, processor = page.voices["classifier"].model, page.processor
    batch = processor(text=[text], return_tensors="pt", **media)
    options = {"closed_banks": closed} if closed else {}
    return dict(zip(LABELS.values(), model(**batch, **options).logits.softmax(-1)[0].tolist(), strict=True))


def test_the_labels_are_those_of_the_model_with_its_closed_banks(labels: LabelPage, files: list[str]) -> None:
    asked = {"text": "what is it?", "files": files[::2]}
    for closed in ([], ["image"]):
        found, _ = labels.classify(asked, "classifier", closed)
        media = {"images": [files[:1]], "audio": [files[2:3]]}
        expected = expected_labels(labels, "<image> <audio> what is it?", closed, **media)
        assert found == pytest.approx(expected, abs=1e-6) and sum(found.values()) == pytest.approx(1)


def cell(html: str, title: str) -> str:
    """What a cell of the heat map shows."""
    return html.split(title)[1].split(">", 1)[1].split("<", 1)[0]


@torch.no_grad()
def test_the_heat_map_shows_the_visits_of_each_expert(labels: LabelPage, files: list[str]) -> None:
    """Counted from the routing of the model itself."""
    _, html = labels.classify({"text": "what is it?", "files": files[:1]}, "classifier")
    model = labels.voices["classifier"].model
    batch = labels.processor(text=["<image> what is it?"], images=[files[:1]], return_tensors="pt")
    routing = model(**batch, output_router_logits=True).routing
    layer, banks = model.config.text_config.sparse_layers[0], routing[0]
    total = sum(bank.selected_experts.numel() for bank in banks.values())
    for name, bank in banks.items():
        for expert in range(bank.router_logits.shape[-1]):
            count = int((bank.selected_experts == expert).sum())
            shown = cell(
                html, f"layer {layer}, bank {name}, expert {expert}: {100 * count / total:.1f} % of the visits"
            )
            # A half is rounded either way.
            assert bool(shown) == bool(count) and abs(int(shown or 0) - 100 * count / total) < 0.51


def test_nothing_and_what_cannot_be_read_are_one_line(labels: LabelPage, nearest: NearestPage, tmp_path: Path) -> None:
    with pytest.raises(gradio.Error, match="no words, images or clips"):
        labels.classify({"text": "", "files": []}, "classifier")
    (tmp_path / "bad.png").write_bytes(b"hello")
    bad = {"text": "?", "files": [str(tmp_path / "bad.png")]}
    with pytest.raises(gradio.Error, match="not a readable image"):
        labels.classify(bad, "classifier")
    with pytest.raises(gradio.Error, match=r"bad\.png: .*not a readable image"):
        nearest.search({"text": "three"}, bad["files"], "", "embeddings")
    with pytest.raises(gradio.Error, match="nothing to search"):
        nearest.search({"text": "three"}, None, "", "embeddings")
    with pytest.raises(gradio.Error, match="one text, one picture or one sound"):
        nearest.search(bad, None, "four", "embeddings")


@torch.no_grad()
def test_the_nearest_comes_first(nearest: NearestPage, files: list[str]) -> None:
    html, pictures = nearest.search({"text": "", "files": [files[1]]}, files, "three\n\nfour <b>\n", "embeddings")
    # A picture is nearest to itself.
    assert pictures[0] == (files[1], "1.000") and len(pictures) == 2
    names = [line.split("</th>")[0] for line in html.split("<th>")[1:]]
    assert names[0] == "picture1.png" and sorted(names[1:]) == [
        "four &lt;b&gt;", "picture0.png", "sound0.wav", "sound1.wav", "three",
    ]  # fmt: skip
    model, processor = nearest.voices["embeddings"].model, nearest.processor
    picture = processor(text=["<image>"], images=[files[1:2]], return_tensors="pt")["pixel_values"]
    text = processor(text=["three"], return_tensors="pt")
    score = model.get_image_features(picture) @ model.get_text_features(text["input_ids"]).T
    row = next(line for line in html.split("<tr>") if "<th>three</th>" in line)
    assert f"<td>{float(score):.3f}</td>" in row


def test_a_visitor_of_a_classifier_sees_bars(labels: LabelPage, files: list[str], browser: Any) -> None:  # noqa: F811
    blocks = labels.build()
    address = run_page(blocks, port=0, wait=False)
    try:
        tab = browser.new_page(viewport={"width": 1200, "height": 700})
        tab.set_default_timeout(60_000)
        tab.goto(address)
        tab.wait_for_selector("#ask textarea")
        tab.set_input_files("#ask input[type=file]", files[:1])
        tab.wait_for_selector("#ask .thumbnail-item")
        tab.fill("#ask textarea", "what is it?")
        tab.click("#ask .submit-button:not([disabled])")
        tab.wait_for_selector("#labels >> text=dog")
        shown = tab.inner_text("#labels")
        best = max(
            (expected := labels.classify({"text": "what is it?", "files": files[:1]}, "classifier")[0]),
            key=expected.get,
        )  # type: ignore[arg-type]
        assert (
            best in shown
            and f"{round(100 * expected[best])}%" in shown
            and all(name in shown for name in LABELS.values())
        )
    finally:
        blocks.close()


def test_a_visitor_finds_the_nearest_of_dropped_files(nearest: NearestPage, files: list[str], browser: Any) -> None:  # noqa: F811
    blocks = nearest.build()
    address = run_page(blocks, port=0, wait=False)
    try:
        tab = browser.new_page(viewport={"width": 1200, "height": 700})
        tab.set_default_timeout(60_000)
        tab.goto(address)
        tab.wait_for_selector("#ask textarea")
        tab.set_input_files("#files input[type=file]", files)
        tab.wait_for_selector("#files >> text=sound1")
        tab.fill("#texts textarea", "three\nfour")
        tab.set_input_files("#ask input[type=file]", files[2:3])
        tab.wait_for_selector("#ask .thumbnail-item")
        tab.click("#ask .submit-button:not([disabled])")
        tab.wait_for_selector("#nearest >> text=sound0.wav")
        assert tab.inner_text("#nearest tr >> nth=0").split() == ["sound0.wav", "1.000"]
        assert tab.locator("#nearest tr").count() == 6 and tab.locator("#seen img").count() >= 2
    finally:
        blocks.close()
