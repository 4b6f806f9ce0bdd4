"""`cache-features` writes what towers give, all of it or nothing, and refuses towers that no cache can stand for."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from chorus_moe import ChorusForConditionalGeneration, ChorusProcessor
from chorus_moe.processors.processing_limits import MediaError
from chorus_moe.training.collator import ChorusDataCollator
from chorus_moe.training.data import load_rows
from chorus_moe.training.features.cache import batches, cache_features
from tests.training.conftest import make_model
from tests.training.test_cli import invoke
from tests.training.test_data import PLAIN, write_jsonl


def test_the_states_are_those_of_the_towers(
    model: ChorusForConditionalGeneration, processor: ChorusProcessor, data: Path, cache: Path
) -> None:
    row, cached = load_rows(data)[2], load_rows(cache)[2]
    inputs = ChorusDataCollator(processor)([row])
    with torch.no_grad():
        image = model.get_image_features(inputs["pixel_values"]).last_hidden_state
        sound = model.get_audio_features(inputs["input_features"], inputs["input_features_mask"]).last_hidden_state
    # Alone and in a batch: float32 sums in another order.
    torch.testing.assert_close(cached["images"][0], image[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(cached["audio"][0], sound[0], atol=1e-6, rtol=0)


def test_a_model_is_left_as_it_was(
    model: ChorusForConditionalGeneration, processor: ChorusProcessor, data: Path, tmp_path: Path
) -> None:
    model.model.audio_tower.requires_grad_(False)
    before = {name: (p.requires_grad, p.clone()) for name, p in model.named_parameters()}
    rows = {"train": load_rows(data)}
    cache_features(model, processor, rows, tmp_path / "out", source="m", progress=False)
    assert not any(module.training for module in model.modules())
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == before[name][0]
        assert torch.equal(parameter, before[name][1])


@pytest.mark.parametrize("medium", ["image", "audio"])
def test_a_tower_that_is_random_in_training_is_refused(
    medium: str, model: ChorusForConditionalGeneration, processor: ChorusProcessor, data: Path, tmp_path: Path
) -> None:
    tower = model.model.vision_tower if medium == "image" else model.model.audio_tower
    for module in tower.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    with pytest.raises(ValueError, match=rf"{medium} tower: in training its states differ by up to .* set its dropout"):
        cache_features(model, processor, {"train": load_rows(data)}, tmp_path / "out", source="m", progress=False)
    assert not (tmp_path / "out" / "features.json").exists()
    assert not tower.training


def test_a_row_that_cannot_be_read_is_an_error_or_left_out(
    model: ChorusForConditionalGeneration, processor: ChorusProcessor, data: Path, tmp_path: Path
) -> None:
    (data / "media" / "b.wav").write_bytes(b"broken")
    rows = {"train": load_rows(data)}
    with pytest.raises(MediaError):
        cache_features(model, processor, rows, tmp_path / "out", source="m", progress=False)
    facts = cache_features(model, processor, rows, tmp_path / "out", source="m", progress=False, on_bad_media="skip")
    assert facts.splits == {"train": 4}
    assert [row["labels"] for row in load_rows(tmp_path / "out")] == [
        ChorusDataCollator(processor)([rows["train"][n]])["labels"][0].tolist() for n in (0, 2, 3, 4)
    ]


def test_a_folder_that_holds_something_and_a_model_without_towers_are_refused(
    model: ChorusForConditionalGeneration, processor: ChorusProcessor, data: Path
) -> None:
    rows = {"train": load_rows(data)}
    with pytest.raises(ValueError, match="holds something; choose a new folder"):
        cache_features(model, processor, rows, data, source="m")
    model.model.vision_tower = model.model.audio_tower = None
    with pytest.raises(ValueError, match="the model has no tower"):
        cache_features(model, processor, rows, data / "new", source="m")


def test_what_a_killed_call_has_left_is_replaced(
    model: ChorusForConditionalGeneration, processor: ChorusProcessor, data: Path, tmp_path: Path
) -> None:
    left = tmp_path / "out" / "_incomplete" / "save"
    left.mkdir(parents=True)
    (left / "train.arrow").write_bytes(b"half")
    rows = {"train": load_rows(data)}
    cache_features(model, processor, rows, tmp_path / "out", source="m", progress=False)
    assert len(load_rows(tmp_path / "out")) == 6
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"features.json", "train.arrow"}


def test_text_alone_is_cached_too(
    model: ChorusForConditionalGeneration, processor: ChorusProcessor, tmp_path: Path
) -> None:
    rows = {"train": load_rows(write_jsonl(tmp_path / "train.jsonl", [{"messages": PLAIN}] * 2))}
    assert cache_features(model, processor, rows, tmp_path / "out", source="m", progress=False).splits == {"train": 2}


def test_the_command_takes_columns_of_other_names(base: Path, data: Path, tmp_path: Path) -> None:
    rows = [{"dialogue": PLAIN, "note": "kept"}] * 2
    write_jsonl(data / "other.jsonl", rows)
    words = ["cache-features", base, data / "other.jsonl", tmp_path / "out", "--columns", '{"messages": "dialogue"}']
    printed = invoke(*words, "--split", "train")
    assert printed.startswith(f"wrote {tmp_path / 'out'}: train 2 rows, ")
    facts = json.loads((tmp_path / "out" / "features.json").read_text())
    assert facts["model"] == "base"
    assert facts["splits"] == {"train": 2}
    assert load_rows(tmp_path / "out")[1]["note"] == "kept"


def test_a_vision_model_caches_no_sound(processor: ChorusProcessor, data: Path, tmp_path: Path) -> None:
    model = make_model(processor.tokenizer).eval()
    model.model.audio_tower = None
    rows = load_rows(write_jsonl(data / "seen.jsonl", [load_json(data)[0]]))
    facts = cache_features(model, processor, {"train": rows}, tmp_path / "out", source="m", progress=False)
    assert set(facts.towers) == set(facts.shapes) == {"image"}
    assert load_rows(tmp_path / "out")[0]["audio"] == []


def load_json(data: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("count", "sizes"), [(0, []), (1, [1]), (3, [3]), (4, [3, 1]), (6, [3, 3])])
def test_rows_are_taken_in_batches_the_last_one_smaller(count: int, sizes: list[int]) -> None:
    found = list(batches(iter(range(count)), 3))
    assert [len(batch) for batch in found] == sizes and sum(found, []) == list(range(count))
