"""What a device computes and sends in a second: a table with sources, and a file of measured numbers in its place."""

import re
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from math import isfinite
from pathlib import Path

from chorus_moe.training.yaml_files import read_yaml


@dataclass(frozen=True)
class Rates:
    """Of one device.

    Args:
        flops: matrix products a second in the dtype of the run, as the maker gives them, without sparsity.
        efficiency: share of them that a training step reaches where nothing is waited for.
        in_node: bytes a second that a device sends to the others of its node.
        between_nodes: bytes a second that a device sends to other nodes.
        link_efficiency: share of these two that collectives reach.
        memory: bytes.
    """

    flops: float
    in_node: float
    between_nodes: float
    memory: float
    efficiency: float = 0.4
    link_efficiency: float = 0.8


# Makers' data sheets: products in bfloat16 without sparsity; NVLink in one direction, half of what is advertised; one
# network card a device. Efficiency: 38% to 43% are reported for Llama 3 on 16,384 H100 (arXiv 2407.21783, table 4).
DEVICES = {
    # NVIDIA A100 data sheet: 312 TFLOPS, NVLink 600 GB/s; 200 Gb/s InfiniBand.
    "a100": Rates(312e12, 300e9, 25e9, 80e9),
    # NVIDIA H100 SXM data sheet: 1,979 TFLOPS with sparsity, NVLink 900 GB/s; 400 Gb/s InfiniBand.
    "h100": Rates(989.5e12, 450e9, 50e9, 80e9),
    # NVIDIA H200 data sheet: as H100, 141 GB.
    "h200": Rates(989.5e12, 450e9, 50e9, 141e9),
    # DeepSeek-V3 (arXiv 2412.19437, section 3.1 and 3.2.2): 160 GB/s of NVLink, 50 GB/s of InfiniBand.
    "h800": Rates(989.5e12, 160e9, 50e9, 80e9),
    # NVIDIA Ada whitepaper: 165 TFLOPS with sums in float32; PCIe 4.0 x16, no NVLink; 10 Gb/s Ethernet shared by eight.
    "rtx4090": Rates(165.2e12, 25e9, 0.156e9, 24e9),
}
UNITS = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def read_bytes(text: str) -> int:
    """ "80GB" -> 80000000000; GiB and its like are powers of 1,024.

    Raises:
        ValueError: no number, or a unit that is not known.
    """
    match = re.fullmatch(r"\s*([^A-Za-z]*?)\s*([A-Za-z]*)\s*", text)
    number, unit = match.groups() if match else (text, "")
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    if unit not in UNITS:
        hint = [name for name in UNITS if name.lower() == unit.lower()] or get_close_matches(unit, UNITS, n=1)
        meant = f"; did you mean {number}{hint[0]}?" if hint else ""
        raise ValueError(f"memory {text!r}: {unit!r} is no unit of {', '.join(UNITS)}{meant}")
    if not 0 < value < float("inf"):
        raise ValueError(f"memory {text!r}: expected a positive number and a unit, such as 80GB")
    return round(value * UNITS[unit])


def read_rates(device: str, path: str | Path | None = None) -> Rates:
    """The rates of a device of the table, with those of a YAML file in their place.

    Raises:
        ValueError: a device that is not in the table, no YAML, or a rate that is unknown or not positive.
    """
    if device not in DEVICES:
        raise ValueError(f"device {device!r} is not in the table of {', '.join(DEVICES)}; give its numbers in --rates")
    given = {} if path is None else read_yaml(path)
    names = [f.name for f in fields(Rates)]
    if not isinstance(given, dict):
        raise ValueError(f"{path}: expected rates such as 'flops: 3.1e+14', found {given!r:.60}")
    values = {}
    for name, value in given.items():
        if name not in names:
            hint = get_close_matches(str(name), names, n=1)
            raise ValueError(f"{path}: unknown rate {name!r}" + (f"; did you mean {hint[0]!r}?" if hint else ""))
        try:
            # YAML takes 3.1e14, without a sign, for a text.
            values[name] = read_bytes(value) if name == "memory" and isinstance(value, str) else float(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {name}: expected a positive number, found {value!r}") from error
        most = 1.0 if name.endswith("efficiency") else float("inf")
        if not (isfinite(values[name]) and 0 < values[name] <= most):
            raise ValueError(f"{path}: {name}={value!r} is outside 0..{most:g}")
    return replace(DEVICES[device], **values)
