"""`chorus-moe doctor`: contract checks on a user's checkpoint."""
