"""A program: loads an export where this package does not exist, and compares its logits with stored ones.

`python -P export_probe.py EXPORT EXPECTED DEVICE THREADS`, started by the doctor on a folder that it has just written.
The export's own code runs in this process: that is what is tested.
"""

import json
import sys
from collections.abc import Sequence
from typing import Any

PACKAGE = "chorus_moe"


class Refuse:
    """Finds nothing below the package, whatever is installed."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] == PACKAGE:
            raise ModuleNotFoundError(f"{name} is hidden")


def main(arguments: Sequence[str]) -> None:
    # First in the list, so that an installed package is refused before it is found.
    sys.meta_path.insert(0, Refuse())  # type: ignore[arg-type]
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForMultimodalLM, AutoProcessor

    source, stored, device, threads = arguments
    # As many as the process that computed the expected logits: the number of threads changes the order of sums.
    torch.set_num_threads(int(threads))
    trust: dict[str, Any] = {"trust_remote_code": True}
    AutoProcessor.from_pretrained(source, **trust)
    model = AutoModelForMultimodalLM.from_pretrained(source, **trust).eval().to(device)
    batch = load_file(stored, device=device)
    expected = batch.pop("logits").double()
    with torch.no_grad():
        found = model(**batch).logits.double()
    gap = (found - expected).square().mean().sqrt() / expected.std()
    print(json.dumps({"difference": float(gap)}))


if __name__ == "__main__":
    main(sys.argv[1:])
