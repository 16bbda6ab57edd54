"""What both trainers write: the log of a run, and its checkpoints by step."""
