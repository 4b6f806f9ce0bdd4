"""Faster ways to compute the same numbers, registered by `import chorus_moe`.

The model imports none of them: without this folder it runs transformers' own functions, slower and equal to rounding.
"""

if __name__ == "fastpaths":
    raise ImportError("import chorus_moe.fastpaths, not fastpaths: the bare name would load every class twice")
