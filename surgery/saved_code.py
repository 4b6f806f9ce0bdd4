"""What a saved configuration says of code, where the installed package stands in for the code of an export."""

import json
from pathlib import Path

from chorus_moe.modeling.configuration_services import SERVICES


def drop_absent_code(path: Path) -> None:
    """Take out of a saved configuration what names code that is not beside it, as of an export that is saved again."""
    values = json.loads(path.read_text(encoding="utf-8"))
    named = values.pop("auto_map", {})
    files = {file.stem for file in path.parent.glob("*.py")}
    # `repository--file.Class` lies on the Hub.
    kept = {auto: name for auto, name in named.items() if "--" in name or name.split(".")[0] in files}
    if kept != named:
        values |= {"auto_map": kept} if kept else {}
        path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


SERVICES["drop_absent_code"] = drop_absent_code
