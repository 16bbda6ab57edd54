"""A task's head as one compiled graph."""

from typing import Any

import torch

from uniter.datasets.batches.collate import PackedBatch
from uniter.model.heads.pretraining import Outputs
from uniter.model.tasks.task import Head, Task

MOST_GRAPHS = 64  # of a task; sizes are doubled where a batch does not fit, never more often


def compiled_head(task: Task, *, backend: str = "inductor") -> Head:
    """The head of a task, compiled for filled batches (filling.py): their sizes do not change, so there is one graph.

    Raises:
        torch._dynamo.exc.Unsupported: when it is called, if a part of it cannot be compiled.
    """
    config: Any = torch._dynamo.config
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # its name until PyTorch 2.6
    setattr(config, limit, max(getattr(config, limit), MOST_GRAPHS))
    compiled: Head = torch.compile(task.head, fullgraph=True, dynamic=False, backend=backend)

    def head(model: Any, batch: PackedBatch) -> Outputs:
        if batch.masked_regions_R is not None:
            model.uniter.img_embeddings.forget_unmasked()  # which writes a parameter: not for a compiler
        return compiled(model, batch)

    return head
