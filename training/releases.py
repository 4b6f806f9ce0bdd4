"""What the installed transformers calls things whose name changed between the releases that we support."""

from transformers import TrainingArguments

# Begins the names of arguments, methods and properties; from 5.23 on, `activation_checkpointing`.
CHECKPOINTING = next(
    name for name in ("activation_checkpointing", "gradient_checkpointing") if hasattr(TrainingArguments, name)
)
