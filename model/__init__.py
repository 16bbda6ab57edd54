"""The paper: model, heads, losses, transport, tasks, training."""
