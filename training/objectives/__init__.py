"""Further terms of the training loss, beside the model's own."""
