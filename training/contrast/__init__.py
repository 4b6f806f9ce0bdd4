"""Pairs of modalities: rows, batches, one vector for each item, and what is found with them."""
