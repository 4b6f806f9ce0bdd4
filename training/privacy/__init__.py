"""Differential privacy: training whose result says next to nothing of any one row."""
