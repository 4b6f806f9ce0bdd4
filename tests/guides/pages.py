"""The code blocks of a guide, as they stand there."""

import re
from pathlib import Path

GUIDES = Path(__file__).parents[2] / "docs" / "guides"


def code_blocks(page: str) -> list[str]:
    """The Python blocks of a page, in order."""
    return re.findall(r"^```python\n(.*?)^```$", (GUIDES / page).read_text(encoding="utf-8"), flags=re.S | re.M)
