"""A text model and encoders in their own folders become one model that answers and trains."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForMultimodalLM, AutoProcessor

from chorus_moe import ChorusForConditionalGeneration, ChorusProcessor
from chorus_moe.surgery.parent_towers import audio_parent
from chorus_moe.training import cli
from chorus_moe.training.answers import answer_rows
from chorus_moe.training.collator import ChorusDataCollator
from chorus_moe.training.compose import Parts, compose, layer_numbers, read_experts
from tests.parents import save_audio_parent, save_text_parent, save_timm_parent, save_vision_parent
from tests.surgery.test_compose_template import CHATML
from tests.training.test_cli import invoke

RATE = 16_000
# The parent's products in another order: worst difference seen over 20 seeds is 2e-7 at logits of size 0.2.
ATOL = 1e-5
PAIRS = [("siglip", "whisper"), ("dinov2", "wav2vec2"), ("timm", "wavlm_ctc"), ("clip", None), (None, "hubert")]


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    save_text_parent(tmp_path / "text")
    return tmp_path


def save_encoders(folders: Path, vision: str | None, audio: str | None) -> list[Any]:
    """Options of the command for the encoders that were saved."""
    words: list[Any] = []
    if vision is not None:
        save_timm_parent(folders / "vision") if vision == "timm" else save_vision_parent(vision, folders / "vision")
        words += ["--vision", folders / "vision"]
    if audio is not None:
        save_audio_parent(audio, folders / "audio")
        words += ["--audio", folders / "audio"]
    return words


def question(vision: str | None, audio: str | None) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    row: dict[str, Any] = {"images": [], "audio": []}
    content: list[dict[str, Any]] = [{"type": "text", "text": "what is it?"}]
    if vision is not None:
        content.insert(0, {"type": "image"})
        row["images"] = [Image.fromarray(rng.integers(0, 255, (40, 48, 3), dtype=np.uint8))]
    if audio is not None:
        content.append({"type": "audio"})
        row["audio"] = [{"array": rng.normal(0, 0.1, 2_000).astype(np.float32), "sampling_rate": RATE}]
    return {**row, "messages": [{"role": "user", "content": content}]}


@pytest.mark.parametrize(("vision", "audio"), PAIRS)
def test_the_composed_model_answers_and_learns(folders: Path, vision: str | None, audio: str | None) -> None:
    words = save_encoders(folders, vision, audio)
    printed = invoke("compose", "--text", folders / "text", *words, "--out", folders / "new", "--num-experts", 4)
    assert printed.startswith(f"compose {folders / 'text'}")
    model: Any = AutoModelForMultimodalLM.from_pretrained(folders / "new")
    processor: Any = AutoProcessor.from_pretrained(folders / "new")
    assert (type(model), type(processor)) == (ChorusForConditionalGeneration, ChorusProcessor)
    assert f"{sum(p.numel() for p in model.parameters()):,}" in printed

    row = question(vision, audio)
    assert isinstance(answer_rows(model.eval(), processor, [row], max_new_tokens=3)[0], str)
    answer = {"role": "assistant", "content": "three"}
    batch = ChorusDataCollator(processor)([{**row, "messages": [*row["messages"], answer]}])
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_text_comes_out_as_the_parent_computes_it(folders: Path) -> None:
    parent = save_text_parent(folders / "text")
    words = save_encoders(folders, "siglip", "whisper")
    invoke("compose", "--text", folders / "text", *words, "--out", folders / "new", "--num-experts", 4)
    model = AutoModelForMultimodalLM.from_pretrained(folders / "new").eval()
    processor: Any = AutoProcessor.from_pretrained(folders / "new")
    inputs = processor(text="what is it? yes or no", return_tensors="pt")
    size = parent.config.vocab_size
    expected = parent(input_ids=inputs["input_ids"]).logits
    torch.testing.assert_close(model(**inputs).logits[..., :size], expected, atol=ATOL, rtol=0)


@pytest.mark.parametrize("template", [None, CHATML])
def test_a_batch_is_answered_as_each_row_alone_after_loading(folders: Path, template: str | None) -> None:
    """The parent's tokenizer says nothing of a padding side, as most do."""
    tokens = ["<|im_start|>", "<|im_end|>"]
    save_text_parent(folders / "text", others=tokens, extra_special_tokens=tokens, chat_template=template)
    words = save_encoders(folders, "siglip", "whisper")
    printed = invoke("compose", "--text", folders / "text", *words, "--out", folders / "new", "--num-experts", 4)
    line = "the text parent has none" if template is None else "the text parent's, with media parts and marks"
    assert line in printed
    assert line in (folders / "new" / "README.md").read_text(encoding="utf-8")

    model: Any = AutoModelForMultimodalLM.from_pretrained(folders / "new").eval()
    processor: Any = AutoProcessor.from_pretrained(folders / "new")
    for parameter in model.parameters():
        # Larger than at the start, so that answers depend on their questions.
        parameter.data.mul_(1.5)
    rows = [question("siglip", "whisper"), question(None, None), question(None, "whisper")]
    short = {"images": [], "audio": [], "messages": [{"role": "user", "content": "no"}]}
    options: dict[str, Any] = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}

    def answers(given: list[dict[str, Any]]) -> list[list[int]]:
        media = {name: [row[name] for row in given] for name in ("images", "audio")}
        batch = processor.apply_chat_template([r["messages"] for r in given], **media, return_tensors="pt", **options)
        new = model.generate(**batch, max_new_tokens=4, do_sample=False, eos_token_id=None)
        return new[:, batch["input_ids"].shape[1] :].tolist()

    together = answers([*rows, short])
    assert together == [answers([row])[0] for row in [*rows, short]]
    if template is not None:
        assert "You are a helpful assistant." in processor.apply_chat_template(rows[1]["messages"])


def test_the_towers_are_the_parents_bit_for_bit(folders: Path) -> None:
    save_encoders(folders, "siglip", "wav2vec2")
    parts = Parts(text=str(folders / "text"), vision=str(folders / "vision"), audio=str(folders / "audio"))
    compose(folders / "new", parts, num_experts=2)
    tower = ChorusForConditionalGeneration.from_pretrained(folders / "new").model.audio_tower.state_dict()
    expected = dict(audio_parent(folders / "audio").tensors())
    assert tower.keys() == expected.keys()
    assert all(torch.equal(tower[name], expected[name]) for name in expected)


def test_a_model_of_another_dtype_is_of_one_dtype(folders: Path) -> None:
    save_encoders(folders, "siglip", "whisper")
    parts = Parts(text=str(folders / "text"), vision=str(folders / "vision"), audio=str(folders / "audio"))
    compose(folders / "new", parts, dtype="bfloat16", num_experts=2)
    model = ChorusForConditionalGeneration.from_pretrained(folders / "new")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_pools_and_torchaudios_modules_reach_the_model(folders: Path) -> None:
    words = save_encoders(folders, "siglip", "hubert")
    words += ["--vision-pool", 2, "--audio-pool", 3, "--audio-library", "torchaudio", "--num-experts", 2]
    invoke("compose", "--text", folders / "text", *words, "--out", folders / "new")
    model: Any = AutoModelForMultimodalLM.from_pretrained(folders / "new")
    assert type(model.model.audio_tower.encoder.backbone).__module__.startswith("torchaudio")
    processor: Any = AutoProcessor.from_pretrained(folders / "new")
    assert processor.num_image_tokens_for() == model.config.vision_config.num_image_tokens == 4
    assert processor.num_audio_tokens_for(2_000) == model.config.audio_config.num_audio_tokens(2_000) == 33


def test_experts_come_from_a_recipe_that_options_override(folders: Path) -> None:
    recipe = folders / "experts.yaml"
    recipe.write_text("experts: {text: {modalities: [text]}}\nnum_experts: 3\nexpert_noise: 0.1\n")
    words = ["--experts", recipe, "--num-experts", 2, "--sparse-layers", "0,1", "--experts-per-token", 1]
    invoke("compose", "--text", folders / "text", *words, "--out", folders / "new")
    config: Any = AutoConfig.from_pretrained(folders / "new")
    assert [(bank.name, bank.num_experts) for bank in config.text_config.banks] == [("text", 2)]
    assert config.text_config.sparse_layers == [0, 1]


def test_the_card_names_the_parents(folders: Path) -> None:
    words = save_encoders(folders, "clip", "whisper")
    invoke("compose", "--text", folders / "text", *words, "--out", folders / "new", "--num-experts", 2)
    card = (folders / "new" / "README.md").read_text()
    assert all(f"| {part} | {part} | local folder |" in card for part in ("text", "vision", "audio"))
    assert str(folders) not in card
    assert str(folders) not in (folders / "new" / "config.json").read_text()


def test_an_optional_recipe_is_read_strictly(tmp_path: Path) -> None:
    recipe = tmp_path / "experts.yaml"
    recipe.write_text("num_expert: 3\n")
    with pytest.raises(ValueError, match="unknown option 'num_expert'; did you mean 'num_experts'"):
        read_experts(str(recipe))
    with pytest.raises(FileNotFoundError, match="no file 'none.yaml'"):
        read_experts("none.yaml")
    recipe.write_text("- 3\n")
    with pytest.raises(ValueError, match="expected names such as experts"):
        read_experts(str(recipe))
    assert read_experts("uniform") == {"experts": "uniform"}
    with pytest.raises(ValueError, match="layers are numbers"):
        layer_numbers("1,b")


def test_nothing_is_written_when_a_part_is_wrong(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_encoders(folders, "siglip", "whisper")
    (folders / "audio" / "model.safetensors").rename(folders / "audio" / "pytorch_model.bin")
    (folders / "full").mkdir()
    (folders / "full" / "file").touch()
    text, vision = ["--text", folders / "text"], ["--vision", folders / "vision"]
    wrong = {
        "only safetensors files are read": [*text, "--audio", folders / "audio"],
        "'llama' does not encode images": [*text, "--vision", folders / "text"],
        "a decoder cannot be made of model_type='siglip'": ["--text", folders / "vision"],
        "nowhere": ["--text", folders / "nowhere"],
        "dtype='int8'; choose from auto": [*text, *vision, "--dtype", "int8"],
        "not an empty folder": [*text, "--out", folders / "full"],
    }
    for message, words in wrong.items():
        arguments = ["chorus-moe", "compose", "--out", folders / "new", *words]
        monkeypatch.setattr(sys, "argv", [str(word) for word in arguments])
        with pytest.raises(SystemExit, match=message):
            cli.main()
        assert not (folders / "new").exists()


def test_a_dry_run_tells_the_sizes_and_writes_nothing(folders: Path) -> None:
    words = ["compose", "--text", folders / "text", *save_encoders(folders, "siglip", "whisper"), "--num-experts", 2]
    said = invoke(*words, "--dry-run", "--out", folders / "out")
    assert not (folders / "out").exists()
    planned = json.loads(invoke(*words, "--dry-run", "--json"))
    written = json.loads(invoke(*words, "--out", folders / "out", "--json"))
    assert planned == written
    assert f"{planned['parameters']['total']:,}" in said and "to train whole" in said
    size = planned["sizes"]["sizes"]["float32"]["disk"]
    assert 0 <= (folders / "out" / "model.safetensors").stat().st_size - size < 40_000


def test_the_size_is_told_before_the_first_weight_is_read(
    folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: Any) -> None:
        raise RuntimeError("writing begins")

    monkeypatch.setattr("chorus_moe.training.compose.write_composition", stop)
    with pytest.raises(RuntimeError, match="writing begins"):
        compose(folders / "out", Parts(text=str(folders / "text")), num_experts=2)
    assert re.fullmatch(r"composes a model of [\d,]+ parameters, \d+\.\d kB in float32\n", capsys.readouterr().err)


def test_a_disk_that_is_too_small_is_refused_in_time(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1_000))
    with pytest.raises(OSError, match=r"takes [\d,]+ bytes, and the disk has 1,000 free"):
        compose(folders / "out", Parts(text=str(folders / "text")), num_experts=2)
    assert not (folders / "out").exists()


def test_a_folder_is_asked_for(folders: Path) -> None:
    with pytest.raises(ValueError, match="--out is missing"):
        invoke("compose", "--text", folders / "text")
