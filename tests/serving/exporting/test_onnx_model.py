"""onnxruntime's answers against the model's own: text of every mixture of media, labels, embeddings."""

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("onnxruntime", reason="the extra `export` is not installed: .ci/matrix export runs this")
pytest.importorskip("onnxscript", reason="the extra `export` is not installed: .ci/matrix export runs this")

from chorus_moe import ChorusForContrastive, ChorusForSequenceClassification  # noqa: E402
from chorus_moe.serving.commands import app  # noqa: E402
from chorus_moe.serving.exporting.onnx_model import OnnxModel  # noqa: E402
from chorus_moe.serving.exporting.programs import TOLERANCE, export_model  # noqa: E402
from chorus_moe.training.answers import answer_rows, user_turn  # noqa: E402
from chorus_moe.training.loading import load_model  # noqa: E402
from tests.conftest import tiny_batch, tiny_config  # noqa: E402
from tests.serving.conftest import picture_file, sound_file  # noqa: E402
from tests.serving.exporting.test_parts import TEXT  # noqa: E402

# Also experts that a token may skip, whose slots hold sentinels.
SPARSE = TEXT | {"expert_banks": {"common": {"adaptive_experts": True}, "image": {}, "text": {"gate": "own"}}}


def test_onnxruntime_writes_what_generate_writes(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert not app(["export-graphs", str(folder), str(tmp_path / "onnx")], standalone_mode=False)
    assert "decoder.onnx" in capsys.readouterr().out
    model, processor = load_model(folder)
    pictures, sounds = [picture_file(seed) for seed in range(2)], [sound_file(3, 0.5), sound_file(4)]
    rows = [
        user_turn("what is it?", pictures[:1]),
        user_turn("what do you see and what do you hear?", pictures[1:], sounds[:1]),
        user_turn("what do you hear?", [], sounds[1:]),
        user_turn("three"),
    ]
    expected = answer_rows(model, processor, rows, max_new_tokens=12)
    assert len(set(expected)) == len(rows)
    batch = processor.apply_chat_template(
        [row["messages"] for row in rows],
        images=[row["images"] for row in rows],
        audio=[row["audio"] for row in rows],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    )
    exported = OnnxModel(tmp_path / "onnx")
    tokens = exported.generate(**batch, max_new_tokens=12)[:, batch["input_ids"].shape[1] :]
    assert [text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)] == expected
    lacking = dict(batch) | {"pixel_values": batch["pixel_values"][:1]}
    with pytest.raises(ValueError, match="image placeholders for"):
        exported.generate(**lacking)


@torch.no_grad()
def test_a_classifier_gives_its_logits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = tiny_config(**SPARSE)
    config.num_labels = 4
    model = ChorusForSequenceClassification(config).eval()
    assert max(export_model(model, None, tmp_path).values()) < TOLERANCE
    batch = tiny_batch(config)
    del batch["labels"]
    found = OnnxModel(tmp_path)(**batch)["logits"]
    np.testing.assert_allclose(found, model(**batch).logits.numpy(), atol=TOLERANCE, rtol=0)
    with pytest.raises(ValueError, match="does not generate"):
        OnnxModel(tmp_path).generate(**batch)


@torch.no_grad()
def test_an_embedding_model_gives_its_vectors(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = tiny_config(**SPARSE, is_causal=False)
    model = ChorusForContrastive(config).eval()
    export_model(model, None, tmp_path)
    batch = tiny_batch(config)
    texts = {name: batch[name][:1] * 0 + value for name, value in (("input_ids", 7), ("attention_mask", 1))}
    media = {name: batch[name] for name in ("pixel_values", "input_features", "input_features_mask")}
    found = OnnxModel(tmp_path)(**texts, **media)
    expected = {
        "text_embeds": model.get_text_features(**texts),
        "image_embeds": model.get_image_features(media["pixel_values"]),
        "audio_embeds": model.get_audio_features(media["input_features"], media["input_features_mask"]),
    }
    assert found.keys() == expected.keys()
    for name, vectors in expected.items():
        np.testing.assert_allclose(found[name], vectors.numpy(), atol=TOLERANCE, rtol=0)


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no \.onnx files"):
        OnnxModel(tmp_path)
