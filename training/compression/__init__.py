"""Compression: what each part of a model is worth, what may go, and one recipe that makes a model smaller."""
