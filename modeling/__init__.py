"""The model: every file of this folder ships to the Hub beside config.json."""

if __name__ == "modeling":
    raise ImportError("import chorus_moe.modeling, not modeling: the bare name would load every class twice")
