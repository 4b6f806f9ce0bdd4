"""What the card of a private run says of its privacy."""

from chorus_moe.training.privacy.trainer import PrivateTrainer

PER_ROW = {
    "gaussian": "L2 norm {norm:g}, Gaussian noise of deviation {noise:.4g} on the sum",
    "laplace": "L1 norm {norm:g}, Laplace noise of scale {noise:.4g} on the sum",
}


def privacy_section(trainer: PrivateTrainer) -> list[str]:
    """Lines of a card."""
    ledger, norm = trainer.ledger, trainer.args.max_grad_norm
    kind = trainer.privacy.mechanism
    rows = {f"epsilon {ledger.epsilon:.4g} at delta {ledger.delta:.3g}": "spent by this run"}
    if (before := ledger.earlier) is not None:
        rows[f"epsilon {before.epsilon:.4g} at delta {before.delta:.3g}"] = "spent by the model that it starts from"
        total = ledger.epsilon + before.epsilon, ledger.delta + before.delta
        rows[f"epsilon {total[0]:.4g} at delta {total[1]:.3g}"] = "for a row that is in the data of both"
    for noise, rate, steps in ledger.history:
        clipped = PER_ROW[kind].format(norm=norm, noise=noise * norm)
        rows[f"{steps:,} updates"] = f"each row with probability {rate:.4g}; its gradient clipped to {clipped}"
    accountant = trainer.privacy.accountant if kind == "gaussian" else "sums of pure epsilon"
    return [
        "## Privacy",
        "",
        "Trained with differential privacy of each row of the training data: what somebody learns from these weights,",
        "they learn almost as well from weights that never saw the row. Neighbours: one row more or less.",
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {key} | {value} |" for key, value in rows.items()),
        f"| accountant | {accountant} |",
        "",
        "Not covered: the number of rows, the choice of settings by runs on the same rows, other runs on them, and"
        + (" what was measured on training rows, which was logged." if trainer.privacy.log_unprotected else ""),
        "the model that training started from, unless named above.",
        "",
    ]
