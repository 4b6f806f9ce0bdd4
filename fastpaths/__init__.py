"""Faster ways to run the model's own modules; nothing here describes a model, and the Hub carries none of it."""

if __name__ == "fastpaths":
    raise ImportError("import chorus_moe.fastpaths, not fastpaths: the bare name would load every class twice")
