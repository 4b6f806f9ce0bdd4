"""What a model reached, to look at: answers, tables, curves, and where a run came from."""
