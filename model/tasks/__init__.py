"""Tasks as rows of two tables."""

from uniter.model.tasks.table import DOWNSTREAM, PRETRAINING, SYNONYMS, task_name
from uniter.model.tasks.task import Task

__all__ = ["DOWNSTREAM", "PRETRAINING", "SYNONYMS", "Task", "task_name"]
