"""Which part of the work is this process's: `--shard`, torchrun or Slurm."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from uniter.datasets.errors import BadInput


@dataclass(frozen=True)
class Share:
    """This process's part of the work: shard `index` of `count`, its number on this machine, and where that was read."""

    index: int = 0
    count: int = 1
    local_index: int = 0
    source: str = ""


def local_index(environment: Mapping[str, str]) -> int:
    """This process's number on its machine, as torchrun or Slurm says it; 0 where neither does."""
    return _number(environment, "LOCAL_RANK") or _number(environment, "SLURM_LOCALID") or 0


def processes_here(environment: Mapping[str, str]) -> int:
    """How many processes torchrun or `srun` started on each machine; 1 where neither did."""
    nodes, tasks = _number(environment, "SLURM_STEP_NUM_NODES", 1) or 1, _number(environment, "SLURM_STEP_NUM_TASKS", 1) or 1
    return max(_number(environment, "LOCAL_WORLD_SIZE", 1) or 1, -(-tasks // nodes))


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int | None:
    text = environment.get(name, "")
    return int(text) if text.lstrip("-").isdigit() else default


def share_from_environment(environment: Mapping[str, str]) -> Share:
    """What torchrun or Slurm says about this process.

    torchrun: RANK of WORLD_SIZE. Slurm: tasks that `srun` started (a batch script's own shell is none of them), times array jobs.
    """

    number = functools.partial(_number, environment)

    world, rank = number("WORLD_SIZE"), number("RANK")
    if world is not None and rank is not None:
        return Share(rank, world, number("LOCAL_RANK", 0) or 0, "torchrun's RANK and WORLD_SIZE") if world > 1 else Share()
    index, count, sources = 0, 1, []
    job, jobs = number("SLURM_ARRAY_TASK_ID"), number("SLURM_ARRAY_TASK_COUNT", 1) or 1
    if job is not None and jobs > 1:
        first, step = number("SLURM_ARRAY_TASK_MIN", 0) or 0, number("SLURM_ARRAY_TASK_STEP", 1) or 1
        index, count = (job - first) // step, jobs
        if not 0 <= index < count or (job - first) % step:
            raise BadInput(
                f"SLURM_ARRAY_TASK_ID {job} does not fit an evenly numbered array of {jobs} jobs; pass --shard I/N, "
                "for instance --shard 0/1 to do everything here"
            )
        sources.append("SLURM_ARRAY_TASK_ID")
    tasks, task = number("SLURM_STEP_NUM_TASKS", 1) or 1, number("SLURM_PROCID", 0) or 0
    if tasks > 1:
        index, count = index * tasks + task, count * tasks
        sources.append("SLURM_PROCID")
    return Share(index, count, number("SLURM_LOCALID", 0) or 0, "Slurm's " + " and ".join(sources)) if sources else Share()
