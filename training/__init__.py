"""Data, collators, LoRA recipes, Trainer and command line. Never ships to the Hub."""

if __name__ == "training":
    raise ImportError("import chorus_moe.training, not training: the bare name would load every class twice")
