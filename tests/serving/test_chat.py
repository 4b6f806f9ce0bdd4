"""The conversation in the terminal, and what it says about experts."""

import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from chorus_moe.fastpaths.compiled_decoding import compile_decoding
from chorus_moe.serving.chat import Chat
from chorus_moe.serving.conversation import Conversation
from chorus_moe.serving.trace import trace_answer
from chorus_moe.serving.voices import load_voices
from chorus_moe.surgery.parts import decoder_of
from chorus_moe.training.answers import answer_rows, user_turn
from chorus_moe.training.loading import load_model
from tests.serving.conftest import picture_file, sound_file

TOKENS = 8


@pytest.fixture
def conversation(folder: Path) -> Conversation:
    voices, processor = load_voices(str(folder))
    return Conversation(voices["tiny"], processor, TOKENS)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    picture, sound = tmp_path / "a picture.png", tmp_path / "sound.wav"
    picture.write_bytes(picture_file(1))
    sound.write_bytes(sound_file(1))
    return picture, sound


def say(conversation: Conversation, *lines: str) -> str:
    written: list[str] = []
    Chat(conversation, written.append).run(lines)
    return "".join(written)


def test_two_turns_answer_as_generate_does(conversation: Conversation, files: tuple[Path, Path], folder: Path) -> None:
    picture, sound = files
    said = say(conversation, f"/image {picture}", "what is it?", f"/audio {sound}", "and what do you hear?")
    model, processor = load_model(folder)
    row = user_turn("what is it?", [str(picture)])
    first = answer_rows(model, processor, [row], max_new_tokens=TOKENS)[0]
    second = user_turn("and what do you hear?", [], [str(sound)])
    row["messages"] += [{"role": "assistant", "content": first}, *second["messages"]]
    row["audio"] = second["audio"]
    answers = [first, answer_rows(model, processor, [row], max_new_tokens=TOKENS)[0]]
    assert [message["content"] for message in conversation.messages[1::2]] == answers
    assert all(answer in said for answer in answers)


def test_an_answer_that_fails_is_no_turn(conversation: Conversation, monkeypatch: pytest.MonkeyPatch) -> None:
    say(conversation, "hello")
    before = list(conversation.messages)

    def fail(*arguments: object, **options: object) -> None:
        raise ValueError("no memory left")

    with monkeypatch.context() as patched:
        patched.setattr("chorus_moe.serving.conversation.run_batch", fail)
        assert say(conversation, "what is it?") == "no memory left\n"
    assert conversation.messages == before
    say(conversation, "what is it?")
    assert len(conversation.messages) == 4


@pytest.mark.slow
def test_compiled_decoding_says_the_same(conversation: Conversation, folder: Path) -> None:
    plain = say(conversation, "what is it?", "and now?")
    voices, processor = load_voices(str(folder))
    compiled = Conversation(voices["tiny"], processor, TOKENS)
    compile_decoding(compiled.voice.model)
    assert say(compiled, "what is it?", "and now?") == plain
    assert compiled.voice.model.get_compiled_call.__self__.graphs


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("/image", "/image: no such file: ''"),
        ("/image nowhere.png", "no such file: 'nowhere.png'"),
        ("/jump", "/jump: unknown, /help lists what there is"),
        ("/routing", "nothing is answered yet"),
        ("what is it? " * 400, "the context of the model is 512"),
    ],
)
def test_what_is_wrong_is_one_line_and_the_chat_goes_on(conversation: Conversation, line: str, expected: str) -> None:
    said = say(conversation, line, "/reset")
    assert expected in said.splitlines()[0] and said.endswith("forgotten\n")


def test_a_picture_that_cannot_be_read_is_not_part_of_the_next_turn(conversation: Conversation, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"hello")
    said = say(conversation, f"/image {tmp_path / 'bad.png'}", "what is it?", "what is it?")
    assert "image 0: not a readable image" in said
    assert len(conversation.messages) == 2 and not conversation.images


def test_reset_forgets(conversation: Conversation) -> None:
    say(conversation, "what is it?", "/reset")
    assert conversation.messages == []


def test_an_answer_can_be_stopped_and_the_next_turn_goes_on(conversation: Conversation) -> None:
    conversation.max_new_tokens = 300
    answer, pieces = conversation.ask("what is it?")
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert answer.is_stopped
    conversation.max_new_tokens = TOKENS
    assert "".join(conversation.ask("and now?")[1]) is not None
    assert len(answer.tokens) < 300 and len(conversation.messages) == 4


def test_the_trace_is_what_the_model_did(conversation: Conversation, files: tuple[Path, Path]) -> None:
    """Against a forward of the same tokens, with other functions of this house taken away."""
    answer, pieces = conversation.ask("what is it?", [str(files[0])], [str(files[1])], closed_banks=["audio"])
    list(pieces)
    trace = trace_answer(conversation.voice, conversation.processor, answer)
    model = conversation.voice.model
    ids = torch.cat([answer.inputs["input_ids"], torch.tensor([answer.tokens])], dim=1)
    inputs = {name: value for name, value in answer.inputs.items() if name in ("pixel_values", "input_features")}
    with torch.no_grad():
        outputs = model(input_ids=ids, **inputs, closed_banks=["audio"], output_router_logits=True)
    decoder = decoder_of(model)
    assert list(trace.experts) == decoder.config.sparse_layers and len(trace.words) == ids.shape[1]
    for layer, banks in zip(decoder.config.sparse_layers, outputs.routing, strict=True):
        assert list(trace.experts[layer]) == list(banks) and trace.experts[layer]["audio"].sum() == 0
        for name, routing in banks.items():
            rows = range(ids.shape[1]) if routing.rows is None else routing.rows.tolist()
            for row, position in enumerate(rows):
                chosen = {e for e in routing.selected_experts[row].tolist() if e < routing.router_logits.shape[-1]}
                shown = {e for bank, e, _ in trace.strongest(position, layer) if bank == name}
                assert shown <= chosen
    assert trace.layers == decoder.config.num_hidden_layers and trace.flops > 0
    assert trace.attention_AS is not None and trace.attention_AS.shape == (len(answer.tokens), ids.shape[1])
    torch.testing.assert_close(trace.attention_AS.sum(dim=1), torch.ones(len(answer.tokens)))
    # A causal model: a token of the answer sees nothing behind the token before it.
    assert trace.attention_AS[0, trace.prompt_length :].sum() == 0
    image = conversation.processor.num_image_tokens
    (span,) = trace.spans("image", [image])
    assert [trace.modalities[place] for place in span] == ["image"] * image
    assert decoder.config._attn_implementation != "eager"


def test_routing_is_a_table_that_adds_up(conversation: Conversation, files: tuple[Path, Path]) -> None:
    table = say(conversation, f"/image {files[0]}", "what is it?", "/routing").splitlines()
    row = next(line for line in table if line.startswith("layer"))
    assert sum(int(word) for word in row.split()[2:] if word.isdigit()) == pytest.approx(100, abs=8)
    assert "tokens a second" in table[-1]


def test_a_person_talks_through_a_terminal(folder: Path, files: tuple[Path, Path]) -> None:
    """A pseudo terminal: prompt, streaming answer, a picture, the routing, end."""
    master, worker = pty.openpty()
    program = [sys.executable, "-W", "ignore", "-m", "chorus_moe.serving.commands", "chat", str(folder)]
    process = subprocess.Popen([*program, "--max-new-tokens", "4"], stdin=worker, stdout=worker, stderr=worker)
    os.close(worker)
    seen = ""

    def wait_for(text: str) -> None:
        nonlocal seen
        deadline = time.monotonic() + 120
        while text not in seen.rpartition("\0")[2]:
            assert time.monotonic() < deadline, seen
            seen += os.read(master, 4096).decode(errors="replace")
        seen += "\0"

    try:
        wait_for("> ")
        for line, expected in (
            (f"/image {files[0]}", "next question"),
            ("what is it?", "\n> "),
            ("/routing", "written"),
        ):
            os.write(master, line.encode() + b"\n")
            wait_for(expected)
        os.write(master, b"/quit\n")
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        os.close(master)
