"""The list of checks: their names, their order, and which hold a copy of the model."""

from chorus_moe.training.doctor.checks import CHECKS, COPYING, name_of


def test_checks_run_from_the_cheapest_to_the_dearest_each_once() -> None:
    assert [name_of(check) for check in CHECKS] == [
        "tensors", "whole-checkpoints", "processor", "batch-padding", "chat-template", "cache", "padding-side",
        "batch-mates", "implementations", "fast-paths", "modalities", "gradients", "checkpointing", "adapters",
        "reload", "hub-export",
    ]  # fmt: skip
    assert [name_of(check) for check in COPYING] == ["checkpointing", "adapters", "reload", "hub-export"]
    assert set(COPYING) <= set(CHECKS)
