"""Which part of the work is this process's: `--shard`, torchrun or Slurm."""

from collections.abc import Mapping
from dataclasses import dataclass

from uniter.datasets.errors import BadInput


def check_share(shard: tuple[int, int], *, overwrite: bool, retry_failed: bool) -> None:
    """BadInput for a share that does not exist or that would undo what others do."""
    index, shards = shard
    if not 0 <= index < shards:
        raise BadInput(f"--shard {index}/{shards}: expected I/N with 0 <= I < N")
    if shards > 1 and (overwrite or retry_failed):
        raise BadInput("--overwrite and --retry-failed undo what other processes do; run them with one process, or delete the folder first")


# --- shares ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Share:
    """This process's part of the work: shard `index` of `count`, its number on this machine, and where that was read."""

    index: int = 0
    count: int = 1
    local_index: int = 0
    source: str = ""


def share_from_environment(environment: Mapping[str, str]) -> Share:
    """What torchrun or Slurm says about this process.

    torchrun: RANK of WORLD_SIZE. Slurm: tasks that `srun` started (a batch script's own shell is none of them), times array jobs.
    """

    def number(name: str, default: int | None = None) -> int | None:
        text = environment.get(name, "")
        return int(text) if text.lstrip("-").isdigit() else default

    world, rank = number("WORLD_SIZE"), number("RANK")
    if world is not None and rank is not None:
        return Share(rank, world, number("LOCAL_RANK", 0) or 0, "torchrun's RANK and WORLD_SIZE") if world > 1 else Share()
    index, count, sources = 0, 1, []
    job, jobs = number("SLURM_ARRAY_TASK_ID"), number("SLURM_ARRAY_TASK_COUNT", 1) or 1
    if job is not None and jobs > 1:
        first, step = number("SLURM_ARRAY_TASK_MIN", 0) or 0, number("SLURM_ARRAY_TASK_STEP", 1) or 1
        index, count = (job - first) // step, jobs
        if not 0 <= index < count or (job - first) % step:
            raise BadInput(f"SLURM_ARRAY_TASK_ID {job} does not fit an evenly numbered array of {jobs} jobs; pass --shard I/N")
        sources.append("SLURM_ARRAY_TASK_ID")
    tasks, task = number("SLURM_STEP_NUM_TASKS", 1) or 1, number("SLURM_PROCID", 0) or 0
    if tasks > 1:
        index, count = index * tasks + task, count * tasks
        sources.append("SLURM_PROCID")
    return Share(index, count, number("SLURM_LOCALID", 0) or 0, "Slurm's " + " and ".join(sources)) if sources else Share()
