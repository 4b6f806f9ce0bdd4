"""More than one process: layouts, what is saved and found again, faults; plans and launch files."""
