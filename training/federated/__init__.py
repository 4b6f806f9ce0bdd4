"""Federated learning: clients train adapters or banks on rows that stay with them, a server joins what they learned."""
