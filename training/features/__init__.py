"""Outputs of frozen towers, computed once and trained on many times."""
