"""What keeps a run from breaking: steps that are skipped, and skills that must not be lost."""
