"""YAML that users write, read within limits.

Unusual here: an alias costs a few letters and stands for all that its anchor holds. Nine lines of aliases of aliases
are a billion items as soon as something writes them out, so items are counted with their aliases before any is built.
"""

import os
from pathlib import Path

import yaml

# Far above any recipe: ours have some hundred items.
MAX_BYTES, MAX_ITEMS = 1_048_576, 100_000


def read_yaml(path: str | os.PathLike[str]) -> object:
    """What a YAML file holds.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is no YAML (with the line), is too large, has too many items, or an alias within its anchor.
    """
    source, size = Path(path), Path(path).stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"{source}: {size:,} bytes, at most {MAX_BYTES:,} are read")
    try:
        loader = yaml.SafeLoader(source.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        if node is None:
            return None
        items = _count(node, {})
        if items > MAX_ITEMS:
            raise ValueError(f"{source}: {items:,} items with those of its aliases, at most {MAX_ITEMS:,} are read")
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        where = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        raise ValueError(f"{source}{where}: no valid YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{source}: no valid YAML: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{source}: items within items, too deep to read") from error


def _count(node: yaml.Node, counts: dict[int, int]) -> int:
    """Items below a node and itself, those of an alias at each place where it stands; `counts` has what is known."""
    if id(node) not in counts:
        counts[id(node)] = 0  # stays so while what is below is counted
        below = node.value if isinstance(node, yaml.CollectionNode) else []
        parts = [part for pair in below for part in pair] if isinstance(node, yaml.MappingNode) else below
        counts[id(node)] = 1 + sum(_count(part, counts) for part in parts)
    elif counts[id(node)] == 0:
        raise yaml.composer.ComposerError(None, None, "an alias stands within its own anchor", node.start_mark)
    return counts[id(node)]
