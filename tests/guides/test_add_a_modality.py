"""Follows docs/guides/add_a_modality.md: its rows are enough for the decoder, and there is no other table to edit."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from chorus_moe.modeling.configuration_modalities import ENCODED_MODALITIES, MODALITIES, MODALITY_IDS
from chorus_moe.modeling.modeling_chorus import ENCODER_CLASSES
from chorus_moe.processors.processing_limits import MediaLimits
from chorus_moe.processors.processing_media import MEDIA

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "guides" / "add_a_modality.md"
FOLDERS = ("modeling", "processors", "fastpaths", "surgery", "training", "chorus_moe")
TABLES = {"processors/processing_media.py"}

# The rows of the page, put into the tables before anything else reads them.
PROGRAM = """
import sys
sys.argv = ["chorus-moe"]  # to the command line the package is lazy: no table has been read yet
import chorus_moe.modeling.configuration_modalities as modalities
from chorus_moe.modeling.configuration_modalities import EncodedModality
row = {model_row}
assert row.type_id not in modalities.MODALITY_IDS.values() and row.type_id != 2
modalities.ENCODED += (row,)
modalities.MODALITIES[row.name] = modalities.ENCODED_MODALITIES[row.name] = row
modalities.MODALITY_IDS[row.name] = row.type_id

import chorus_moe.processors.processing_media as media
from chorus_moe.processors.processing_media import Medium
media.MEDIA |= {{ {processor_row} }}

import torch
from chorus_moe import MODALITY_IDS, ChorusTextConfig
from chorus_moe.modeling.modeling_text import ChorusTextModel
from chorus_moe.surgery.parts import part_patterns
from chorus_moe.training.data import MEDIA_KINDS
sizes = dict(vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_experts=2,
             num_experts_per_tok=1, moe_intermediate_size=8)
config = ChorusTextConfig(**sizes, modalities=["text", "depth"])
model = ChorusTextModel(config).eval()
assert sorted(config.expert_banks) == ["common", "depth", "text"]
assert list(model.layers[1].self_attn.k_proj) == ["text", "depth"]
ids, kinds = torch.arange(6)[None], torch.tensor([[0, 4, 4, 4, 0, 0]])
with torch.no_grad():
    seen = model(input_ids=ids, mm_token_type_ids=kinds).last_hidden_state
    text = model(input_ids=ids).last_hidden_state
# The first token sees itself alone. Three rows and six are multiplied in other orders.
torch.testing.assert_close(seen[:, 0], text[:, 0], atol=1e-5, rtol=0)
assert seen.isfinite().all() and (seen[:, 1] - text[:, 1]).abs().max() > 1e-3
assert {{"depth_tower", "depth_connector"}} <= part_patterns(config).keys()
assert MEDIA_KINDS["depth"] == "depth"
"""


def blocks() -> list[str]:
    return re.findall(r"```python\n(.+?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_rows_of_the_page_make_a_decoder_that_takes_the_modality():
    model_row, processor_row = blocks()
    program = PROGRAM.format(model_row=model_row, processor_row=processor_row)
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", re.findall(r"`((?:modeling|processors)/\w+\.py)`: ", PAGE.read_text(encoding="utf-8")))
def test_the_page_names_files_and_what_they_hold(path: str):
    if "depth" in path:
        assert (ROOT / path.replace("depth", "audio")).is_file()
        return
    source = (ROOT / path).read_text(encoding="utf-8")
    step = PAGE.read_text(encoding="utf-8").split(f"`{path}`: ")[1].split("\n- ")[0].split("\n\n")[0]
    names = [name for name in re.findall(r"`(\w+)(?:\([^`]*\))?`", step) if "epth" not in name]
    assert not [name for name in names if name not in source]


def test_the_two_tables_agree():
    assert list(MEDIA) == list(ENCODED_MODALITIES) == [name for name in MODALITIES if name != "text"]
    assert len(ENCODER_CLASSES) == len(ENCODED_MODALITIES)
    assert len(set(MODALITY_IDS.values())) == len(MODALITY_IDS)
    assert all(hasattr(MediaLimits(), medium.limit) for medium in MEDIA.values())


def test_no_other_table_is_keyed_by_modality():
    found = {
        path.relative_to(ROOT).as_posix()
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
        for statement in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(statement, ast.Assign | ast.AnnAssign)
        for node in ast.walk(statement)
        if isinstance(node, ast.Dict)
        if {"audio"} < {key.value for key in node.keys if isinstance(key, ast.Constant)} & {"image", "vision", "audio"}
    }
    assert found == TABLES
