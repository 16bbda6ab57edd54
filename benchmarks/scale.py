"""What a unit of work costs, by how many units there are: locks, claiming, absorbing, finishing; with a detector that costs nothing.

Images are one small file under as many keys as are wanted, and a record has two regions of four columns: what is timed is the book-keeping.
Sizes are run in turn, each in a process of its own, and the fastest of the rounds counts, so that the ratio holds on a noisy machine.

    seconds          of processor time of the whole run, a unit (what else the machine does counts less); and by the clock
    serial           of it in what processes do one after the other (absorbing, finishing): what more of them cannot divide
    waits            for the disk under these locks, a unit; each costs a disk's time on top where FOLDER lies on one
    recognised       seconds of the same command on the complete database
    memory           the largest of the process, MiB

python benchmarks/scale.py --units 500,2000 --json                      # half a minute
python benchmarks/scale.py --units 33000 --processes 16 --kill          # and one of them killed on the way
python benchmarks/scale.py --units 33000 --ray                          # on a local Ray cluster

About the host alone: takes no --device.
"""

import argparse
import functools
import json
import logging
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from uniter.datasets.image_db import ImageDB
from uniter.datasets.image_db.writing.units import UnitStore
from uniter.extract.detector.protocol import PreparedImage, RawRegions
from uniter.extract.images.items import ImageItem
from uniter.extract.run.extraction import extract_listed
from uniter.extract.run.options import Options

AIM_SERIAL, AIM_FLAT, AIM_RECOGNISED = 0.3e-3, 1.3, 5.0
ROUNDS_UP_TO = 5_000  # units: above it, one round


@dataclass
class FreeDetector:
    """Two regions an image, always the same ones."""

    name: str = "free"
    feature_width: int = 4
    class_names: tuple[str, ...] = ("thing", "stuff")
    attribute_names: tuple[str, ...] = ()
    min_boxes: int = 1
    max_boxes: int = 2
    device: str = "cpu"
    regions: RawRegions = field(
        default_factory=lambda: RawRegions(
            np.array([[0, 0, 4, 4], [4, 4, 8, 8]], np.float32), np.eye(2, 4, dtype=np.float32), np.eye(3, dtype=np.float32)[1:]
        )
    )

    def settings(self) -> dict[str, Any]:
        return {"name": self.name, "weights": {"layout": "none", "sha256": "0" * 64}}

    def prepare(self, image: NDArray[np.uint8]) -> PreparedImage:
        return PreparedImage(image, (1.0, 1.0), image.shape[:2])

    def detect(self, images: Sequence[PreparedImage], *, boxes: Sequence[NDArray[np.floating]] | None = None) -> list[RawRegions]:
        return [self.regions] * len(images)


def build_free(device: str = "cpu") -> FreeDetector:
    """What a Ray actor calls."""
    return FreeDetector(device=device)


@dataclass(frozen=True)
class OneImageManyTimes:
    """So many units of images that are all the same file: an `ImageList` that takes no memory."""

    file: str
    units: int
    unit_images: int
    keys_sha256: str = "0" * 64

    @property
    def images(self) -> int:
        return self.units * self.unit_images

    def count(self, number: int) -> int:
        return self.unit_images

    def unit(self, number: int) -> list[ImageItem]:
        return [ImageItem(f"{number:07d}/{image:03d}", self.file, self.file) for image in range(self.unit_images)]


# ------------------------------------------------------------------------------------------------------------------------ one run


class Serial:
    """Seconds and waits for the disk inside `UnitStore.absorb` and `UnitStore.finish` while it is entered."""

    def __init__(self) -> None:
        self.seconds, self.waits, self._depth = 0.0, 0, 0

    def __enter__(self) -> "Serial":
        self._before = {name: getattr(UnitStore, name) for name in ("absorb", "finish")}
        for name, function in self._before.items():
            setattr(UnitStore, name, self._timed(function))
        self._fsync = os.fsync
        os.fsync = self._counted
        return self

    def __exit__(self, *_: object) -> None:
        for name, function in self._before.items():
            setattr(UnitStore, name, function)
        os.fsync = self._fsync

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*values: Any, **words: Any) -> Any:
            outermost, start = self._depth == 0, time.thread_time()
            self._depth, self._thread = self._depth + 1, threading.get_ident()
            try:
                return function(*values, **words)
            finally:
                self._depth -= 1
                if outermost:
                    self.seconds += time.thread_time() - start

        return timed

    def _counted(self, descriptor: Any) -> None:
        self.waits += self._depth > 0 and threading.get_ident() == self._thread
        self._fsync(descriptor)


def extract(listed: OneImageManyTimes, out: Path) -> dict[str, Any]:
    return extract_listed(listed, out, Options(batch_size=8, workers=1, check_space=False), detector=FreeDetector()).as_dict()


def one_run(units: int, unit_images: int, folder: Path) -> dict[str, float]:
    """An extraction by this process alone, and the same once more on what is complete then."""
    listed = OneImageManyTimes(str(folder / "image.png"), units, unit_images)
    out = folder / f"{units}.lmdb"
    start, clock = time.process_time(), time.perf_counter()
    with Serial() as serial:
        extract(listed, out)
    seconds, clock = time.process_time() - start, time.perf_counter() - clock
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    recognised = seconds_to_recognise(listed, out)
    shutil.rmtree(out)
    return {
        "seconds": seconds / units, "clock": clock / units, "serial": serial.seconds / units, "waits": serial.waits / units,
        "recognised": recognised, "memory": memory,
    }  # fmt: skip


def seconds_to_recognise(listed: OneImageManyTimes, out: Path) -> float:
    """What the same command takes on a complete database, which must hold each image once."""
    start = time.perf_counter()
    again = extract(listed, out)
    recognised = time.perf_counter() - start
    refuse_other(out, listed)
    if again["extracted"]:
        raise SystemExit("the complete database was not recognised")
    return recognised


def refuse_other(out: Path, listed: OneImageManyTimes) -> None:
    """End with an error unless the database holds each image once."""
    database = ImageDB(out)
    wanted = sorted(item.key for number in range(listed.units) for item in listed.unit(number))
    if list(database.keys_list) != wanted or not bool((database.region_counts == 2).all()):
        raise SystemExit(f"{out} holds {len(database):,} images, expected {listed.images:,}, each once")


def in_turn(sizes: Sequence[int], unit_images: int, folder: Path, rounds: int) -> dict[str, dict[str, float]]:
    """`one_run` of each size in a process of its own, the sizes in turn; the fastest of the rounds."""
    best: dict[str, dict[str, float]] = {}
    for number in range(rounds):
        for units in sizes:
            if number and units > ROUNDS_UP_TO:
                continue
            command = [sys.executable, __file__, "--one", str(units), "--images-a-unit", str(unit_images), "--folder", str(folder)]
            found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            before = best.setdefault(str(units), found)
            best[str(units)] = {name: min(before[name], value) for name, value in found.items()}
    return best


# ------------------------------------------------------------------------------------------------------------------- many processes


def share(listed: OneImageManyTimes, out: Path, index: int, count: int) -> None:
    """One process's part."""
    options = Options(batch_size=8, workers=1, check_space=False, shard=(index, count))
    extract_listed(listed, out, options, detector=FreeDetector())


def by_processes(units: int, unit_images: int, folder: Path, *, processes: int, kill: bool) -> dict[str, Any]:
    """Shares of one extraction in processes; one of them killed, and the command repeated."""
    listed, out = OneImageManyTimes(str(folder / "image.png"), units, unit_images), folder / f"{units}.lmdb"
    context = multiprocessing.get_context("fork")
    start = time.perf_counter()
    group = [context.Process(target=share, args=(listed, out, index, processes)) for index in range(processes)]
    for process in group:
        process.start()
    victim = group[processes // 2]
    if kill and victim.pid is not None:
        while done_units(out) < units // 3 and victim.is_alive():
            time.sleep(0.2)
        os.kill(victim.pid, signal.SIGKILL)
    for process in group:
        process.join()
    failed = [process.exitcode for process in group if process.exitcode and not (kill and process is victim)]
    if failed:
        raise SystemExit(f"{len(failed)} of {processes} processes failed")
    left = units - done_units(out) if not (out / "header.json").exists() else 0
    if left:
        extract(listed, out)
    seconds = time.perf_counter() - start
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    recognised = seconds_to_recognise(listed, out)
    shutil.rmtree(out)
    return {
        "processes": processes, "killed": int(kill), "left_by_the_killed": left, "seconds": seconds / units,
        "processor_seconds": (used.ru_utime + used.ru_stime) / units, "recognised": recognised, "memory": used.ru_maxrss / 1024,
    }  # fmt: skip


def done_units(out: Path) -> int:
    try:
        return sum(entry.name.isdecimal() for entry in (out / "units").iterdir())
    except FileNotFoundError:
        return 0


def on_ray(units: int, unit_images: int, folder: Path, *, kill: bool) -> dict[str, Any]:
    """One extraction on a local Ray cluster; one of its workers killed."""
    from uniter.extract.run.cluster import extract_on_ray

    listed, out = OneImageManyTimes(str(folder / "image.png"), units, unit_images), folder / f"{units}.lmdb"
    options = Options(batch_size=8, workers=1, check_space=False)
    killed: list[int] = []
    done = threading.Event()
    if kill:
        threading.Thread(target=kill_worker, args=(out, units // 3, killed, done), daemon=True).start()
    start = time.perf_counter()
    extract_on_ray(listed, out, options, build=build_free)
    seconds = time.perf_counter() - start
    done.set()
    recognised = seconds_to_recognise(listed, out)
    shutil.rmtree(out)
    return {"ray": True, "killed": len(killed), "seconds": seconds / units, "recognised": recognised}


def kill_worker(out: Path, when: int, killed: list[int], done: threading.Event) -> None:
    """End one of Ray's actors of ours with SIGKILL, once so many units are there."""
    while done_units(out) < when and not done.wait(0.2):
        pass
    for process in descendants(os.getpid()):
        if not killed and b"UnitWorker" in Path(f"/proc/{process}/cmdline").read_bytes():
            os.kill(process, signal.SIGKILL)
            killed.append(process)


def descendants(root: int) -> Iterator[int]:
    """Processes that this one started, and theirs."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            if parent == root:
                yield int(entry.name)
                yield from descendants(int(entry.name))


# ---------------------------------------------------------------------------------------------------------------------- the command


def report(best: dict[str, dict[str, float]]) -> dict[str, Any]:
    seconds = {units: found["seconds"] for units, found in best.items()}
    serial = {units: found["serial"] for units, found in best.items()}
    return {
        "seconds_a_unit": seconds,
        "serial_seconds_a_unit": serial,
        "clock_seconds_a_unit": {units: found["clock"] for units, found in best.items()},
        "waits_a_unit": {units: found["waits"] for units, found in best.items()},
        "recognised_seconds": {units: found["recognised"] for units, found in best.items()},
        "memory_mebibytes": {units: found["memory"] for units, found in best.items()},
        "flat": max(seconds.values()) / min(seconds.values()),
        "aims": {"flat": AIM_FLAT, "serial_seconds_a_unit": AIM_SERIAL, "recognised_seconds": AIM_RECOGNISED},
    }


def table(told: dict[str, Any]) -> Iterator[str]:
    yield f"{'units':>8} {'ms a unit':>10} {'serial ms':>10} {'waits':>8} {'recognised s':>13} {'MiB':>6}"
    for units in told["seconds_a_unit"]:
        seconds, serial, waits = (told[name][units] for name in ("seconds_a_unit", "serial_seconds_a_unit", "waits_a_unit"))
        recognised, memory = told["recognised_seconds"][units], told["memory_mebibytes"][units]
        yield f"{units:>8} {1e3 * seconds:10.3f} {1e3 * serial:10.3f} {waits:8.3f} {recognised:13.2f} {memory:6.0f}"
    yield f"largest / smallest: {told['flat']:.2f} (aim {AIM_FLAT}); serial aim {1e3 * AIM_SERIAL:g} ms; recognised in {AIM_RECOGNISED:g} s"


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", default="500,2000", help="how many units, several with commas")
    parser.add_argument("--images-a-unit", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help=f"for up to {ROUNDS_UP_TO:,} units; the fastest counts")
    parser.add_argument("--processes", type=int, default=1, help="shares of one extraction, side by side")
    parser.add_argument("--ray", action="store_true", help="on a local Ray cluster")
    parser.add_argument("--kill", action="store_true", help="kill one of the processes, or of Ray's workers, on the way")
    parser.add_argument(
        "--folder", type=Path, help="where to write  [default: memory (/dev/shm) where there is some, so that disks count out]"
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING)
    if options.kill and options.processes < 2 and not options.ray:
        parser.error("--kill needs --processes or --ray")
    if options.one:
        told: dict[str, Any] = one_run(options.one, options.images_a_unit, options.folder)
        print(json.dumps(told))
        return told
    sizes = [int(text) for text in options.units.split(",")]
    memory = Path("/dev/shm")
    place = options.folder or (memory if os.access(memory, os.W_OK) else None)
    with tempfile.TemporaryDirectory(dir=place) as name:
        folder = Path(name)
        cv2.imwrite(str(folder / "image.png"), np.full((8, 8, 3), 128, np.uint8))
        if options.ray:
            told = {str(units): on_ray(units, options.images_a_unit, folder, kill=options.kill) for units in sizes}
        elif options.processes > 1:
            work = functools.partial(by_processes, unit_images=options.images_a_unit, folder=folder, processes=options.processes)
            told = {str(units): work(units, kill=options.kill) for units in sizes}
        else:
            told = {"folder": str(folder.parent), "images_a_unit": options.images_a_unit}
            told |= report(in_turn(sizes, options.images_a_unit, folder, options.rounds))
    plain = options.processes == 1 and not options.ray
    print(json.dumps(told) if options.json or not plain else "\n".join(table(told)))
    return told


if __name__ == "__main__":
    main()
