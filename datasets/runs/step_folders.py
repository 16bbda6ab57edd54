"""Checkpoint folders by step: complete or absent, the latest and the best pointed to."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from uniter.datasets.storage.files import sync as sync

CHECKPOINTS, LATEST, BEST = "checkpoints", "latest", "best"


ASIDE, _LEAVING = ".incoming-", ".leaving-"


def checkpoint_steps(run: Path) -> list[int]:
    """The steps of the complete checkpoints of a run, rising."""
    folder = run / CHECKPOINTS
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name.removeprefix("step-")) for name in names if name.startswith("step-") and name.removeprefix("step-").isdigit())


def checkpoint_path(run: Path, step: int) -> Path:
    """The folder of the checkpoint after update `step`."""
    return run / CHECKPOINTS / f"step-{step}"


def write_step(run: Path, step: int, fill: Callable[[Path], None], *, keep: int, best: bool = False) -> Path:
    """Write the checkpoint of a step unless it is there, point `latest` to it, and `best` where it is that; remove old ones.

    Args:
        run: the run directory.
        step: finished updates.
        fill: writes a checkpoint's files into a folder.
        keep: how many of the newest checkpoints stay; the best one stays besides.
        best: whether it is the best so far.
    """
    folder = run / CHECKPOINTS
    folder.mkdir(parents=True, exist_ok=True)
    target = checkpoint_path(run, step)
    if not target.exists():
        aside = folder / f"{ASIDE}{step}-{os.getpid()}"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        fill(aside)
        make_durable(aside)
        aside.rename(target)
        sync(folder)
    point(folder / LATEST, target.name)
    if best:
        point(folder / BEST, target.name)
    remove_old(run, keep=keep)
    return target


def remove_old(run: Path, *, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints and the best; also what killed runs left half written."""
    folder = run / CHECKPOINTS
    if not folder.is_dir():
        return
    best = (folder / BEST).readlink().name if (folder / BEST).is_symlink() else None
    for step in checkpoint_steps(run)[: -max(keep, 1)]:
        path = checkpoint_path(run, step)
        if path.name != best:
            # First out of sight by rename: a folder called step-N is never half removed.
            path.rename(folder / f"{_LEAVING}{path.name}-{os.getpid()}")
    for path in folder.iterdir():
        if path.name.startswith((ASIDE, _LEAVING)):
            if path.is_symlink():
                path.unlink()
            else:
                shutil.rmtree(path, ignore_errors=True)


def make_durable(folder: Path) -> None:
    """Have the disk confirm every file of a folder, and the folder itself."""
    for path in _files(folder):
        sync(path)
    sync(folder)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def point(link: Path, name: str) -> None:
    """Let `link` name its sibling `name`, in one step."""
    aside = link.with_name(f"{ASIDE}{link.name}-{os.getpid()}")
    aside.unlink(missing_ok=True)
    aside.symlink_to(name)
    aside.replace(link)
