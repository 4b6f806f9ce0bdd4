"""`make demo`: a small trimodal model, trained, adapted, reloaded and questioned."""
