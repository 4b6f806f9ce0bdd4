"""Many tasks in one run: how often each is seen, what its loss weighs, and what happens where two pull apart."""
