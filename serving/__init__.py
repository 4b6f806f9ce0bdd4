"""Talk to a model: an OpenAI server, a chat in the terminal, a page in the browser. Stays home."""

if __name__ == "serving":
    raise ImportError("import chorus_moe.serving, not serving: the bare name would load every class twice")
