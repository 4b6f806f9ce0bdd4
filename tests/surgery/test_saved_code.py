"""A saved configuration names the code that lies beside it or on the Hub, and no other."""

import json
from pathlib import Path

from chorus_moe.surgery.saved_code import drop_absent_code


def named(folder: Path, auto_map: dict[str, str]) -> dict[str, str] | None:
    (folder / "config.json").write_text(json.dumps({"hidden_size": 8, "auto_map": auto_map}))
    drop_absent_code(folder / "config.json")
    values = json.loads((folder / "config.json").read_text())
    assert values["hidden_size"] == 8
    return values.get("auto_map")


def test_code_that_is_not_there_is_not_named(tmp_path: Path) -> None:
    (tmp_path / "own.py").touch()
    here, gone, on_the_hub = ({"AutoConfig": f"{place}.Own"} for place in ("own", "other", "tester/model--other"))
    assert named(tmp_path, here | {"AutoModel": "other.Own"}) == here
    assert named(tmp_path, on_the_hub) == on_the_hub
    assert named(tmp_path, gone) is None
