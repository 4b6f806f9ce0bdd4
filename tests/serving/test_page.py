"""The page: its answers against `generate`, and in a real browser that uploads, records, asks and switches."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

gradio = pytest.importorskip("gradio", reason="the extra `page` is not installed: .ci/matrix page runs this")
if int(gradio.__version__.split(".")[0]) < 6:
    pytest.skip("the page needs gradio 6", allow_module_level=True)

from chorus_moe.serving.page import Page, run_page  # noqa: E402
from chorus_moe.serving.voices import load_voices  # noqa: E402
from chorus_moe.training.answers import answer_rows, user_turn  # noqa: E402
from chorus_moe.training.loading import load_model  # noqa: E402
from tests.serving.conftest import picture_file  # noqa: E402

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
TOKENS = 6


@pytest.fixture(scope="module")
def page(folder: Path, adapter: Path) -> Page:
    return Page(*load_voices(str(folder), {"loud": str(adapter)}), TOKENS)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    path.write_bytes(picture_file(3))
    return path


def ask(page: Page, text: str, files: list[str], both: bool, *settings: Any) -> list[tuple[Any, ...]]:
    return list(page.answer({"text": text, "files": files}, None, both, None, None, *settings))


def test_two_settings_answer_side_by_side_as_generate_does(
    page: Page, picture: Path, folder: Path, adapter: Path
) -> None:
    steps = ask(page, "what is it?", [str(picture)], True, "tiny", [], 0, "loud", [], 0)
    row = user_turn("what is it?", [str(picture)])
    for chat, source in zip(steps[-1][:2], (folder, adapter), strict=True):
        expected = answer_rows(*load_model(source), [row], max_new_tokens=TOKENS)[0]
        assert chat[-1] == {"role": "assistant", "content": expected or "(no words)"}


def test_closed_banks_and_budgets_reach_the_model(page: Page, picture: Path, folder: Path) -> None:
    steps = ask(page, "what is it?", [str(picture)], False, "tiny", ["image"], 1, "tiny", [], 0)
    row, names = user_turn("what is it?", [str(picture)]), ("text", "image", "audio")
    options = {"closed_banks": ["image"], "expert_budget": dict.fromkeys(names, 1)}
    expected = answer_rows(*load_model(folder), [row], max_new_tokens=TOKENS, **options)[0]
    assert steps[-1][0][-1]["content"] == expected
    assert "layer 1, common" in steps[-1][7] and "tokens a second" in steps[-1][6] and len(steps[-1][9]) == 1


def test_a_photograph_goes_with_one_question(page: Page, picture: Path, folder: Path) -> None:
    steps = list(page.answer({"text": "what is it?"}, str(picture), False, None, None, *["tiny", [], 0] * 2))
    expected = answer_rows(*load_model(folder), [user_turn("what is it?", [str(picture)])], max_new_tokens=TOKENS)[0]
    assert steps[-1][0][-1]["content"] == (expected or "(no words)")
    camera = 5
    assert all(step[camera] is None for step in steps)


def test_a_file_that_cannot_be_read_is_the_processors_one_line(page: Page, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"hello")
    with pytest.raises(gradio.Error, match="image 0: not a readable image"):
        ask(page, "?", [str(tmp_path / "bad.png")], False, "tiny", [], 0, "tiny", [], 0)


@pytest.fixture
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no chromium here (apt-get install chromium), so the page was not opened in a browser")
    with playwright.sync_playwright() as engine:
        running = engine.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield running
        running.close()


def test_a_visitor_uploads_records_asks_and_switches(
    page: Page, picture: Path, adapter: Path, tmp_path: Path, browser: Any
) -> None:
    blocks = page.build()
    address = run_page(blocks, port=0, wait=False)
    try:
        assert "127.0.0.1" in address
        tab = browser.new_page(viewport={"width": 1400, "height": 1100})
        tab.set_default_timeout(60_000)
        tab.goto(address)

        def send(text: str, read: str) -> None:
            tab.fill("#ask textarea", text)
            tab.click("#ask .submit-button:not([disabled])")
            tab.wait_for_selector(f"#spent >> text={read}")

        tab.wait_for_selector("#ask textarea")
        tab.set_input_files("#ask input[type=file]", [str(picture)])
        tab.wait_for_selector("#ask .thumbnail-item")
        send("what is it?", "tokens a second")
        assert tab.locator("#words span[title*='layer 1']").count() > 10
        assert tab.locator("#seen img").count() >= 1
        first = tab.inner_text("#spent").split()[0]

        tab.click("#new")
        tab.click("#ask .microphone-button")
        tab.click("#ask .record-button")
        tab.wait_for_timeout(1_000)
        tab.click("#ask .stop-button")
        tab.click("#ask .confirm-button")
        tab.wait_for_selector("#ask .thumbnail-item")
        send("what do you hear?", "tokens a second")
        assert tab.inner_text("#spent").split()[0] != first

        tab.click("#new")
        (tmp_path / "bad.png").write_bytes(b"hello")
        tab.set_input_files("#ask input[type=file]", [str(tmp_path / "bad.png")])
        tab.wait_for_selector("#ask .thumbnail-item")
        tab.fill("#ask textarea", "?")
        tab.click("#ask .submit-button:not([disabled])")
        tab.wait_for_selector("text=not a readable image")

        tab.click("#new")
        tab.get_by_label("Model or adapter (this setting)").click()
        tab.get_by_role("option", name="loud").click()
        tab.click("#ask .delete-button")
        send("what is it?", "tokens a second")
        expected = answer_rows(*load_model(adapter), [user_turn("what is it?")], max_new_tokens=TOKENS)[0]
        assert tab.locator(".bot.message").last.inner_text().split() == expected.split()
    finally:
        blocks.close()
