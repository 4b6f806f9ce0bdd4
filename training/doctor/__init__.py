"""`chorus-moe doctor`: checks on a checkpoint of the user's own."""
