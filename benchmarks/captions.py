"""Captions from a COCO JSON to a finished text database, and what opening a database of ten million examples costs. Prints one table.

The rate is by the clock, from the start of `uniter-build-db` to its end, Python's own start included. Resident memory is that of the
process and all its children together, looked at twenty times a second; pages of files that are mapped count.

python benchmarks/captions.py                                                            # 300,000 captions, a minute
python benchmarks/captions.py --captions 3000000 --opened 10000000 --folder /tmp/big     # keeps its files (6 GB) for the next time

About the host alone: takes no --device.
"""

import argparse
import contextlib
import itertools
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from uniter.datasets.text_db.building.build import build_text_db
from uniter.datasets.text_db.caption import Caption
from uniter.datasets.text_db.tokenizer import Tokenizer

CAPTIONS_OF_AN_IMAGE = 5
OPEN = """
import sys, time
import numpy, lmdb, msgpack, lz4.frame  # what any reader loads is not the database's cost
from uniter.datasets.text_db import TextDB
def megabytes():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) / 1024
before, start = megabytes(), time.perf_counter()
database = TextDB(sys.argv[1])
last = database.record(len(database) - 1), int(database.lengths[-1]), database.image_key(len(database) - 1)
print(time.perf_counter() - start, megabytes() - before)
"""


def write_captions(path: Path, count: int) -> None:
    """A COCO caption file: real word pieces by Zipf's law, 11 words on average, annotations in no order, five to an image."""
    rng = random.Random(0)
    words = [word for word in Tokenizer.load().vocabulary if word.isalpha() and len(word) > 2][:20_000]
    weights = list(itertools.accumulate(1 / (place + 10) for place in range(len(words))))
    images = max(1, count // CAPTIONS_OF_AN_IMAGE)
    ids = list(range(1, count + 1))
    rng.shuffle(ids)
    with open(path, "w") as file:
        file.write('{"info": {}, "images": [')
        for image in range(images):
            row = {"license": 1, "file_name": f"COCO_train2014_{image:012d}.jpg", "coco_url": f"http://images.cocodataset.org/{image}.jpg"}
            file.write((", " if image else "") + json.dumps({**row, "height": 480, "width": 640, "id": image}))
        file.write('], "annotations": [')
        for place, number in enumerate(ids):
            text = " ".join(rng.choices(words, cum_weights=weights, k=9 + number % 5)).capitalize()
            row = {"image_id": rng.randrange(images), "id": number, "caption": f"{text}."}
            file.write((", " if place else "") + json.dumps(row))
        file.write("]}")


def megabytes(process: int) -> float:
    """Resident memory of a process and all that descend from it, now."""
    total, waiting = 0.0, [process]
    while waiting:
        number = waiting.pop()
        with contextlib.suppress(OSError):  # it has just ended
            status = Path(f"/proc/{number}/status").read_text()
            total += next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")), 0) / 1024
            for task in Path(f"/proc/{number}/task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
    return total


def measured(words: list[str]) -> tuple[float, float, float]:
    """Seconds, seconds of processor time and peak resident megabytes of a command, its children's included."""
    start = time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, megabytes(process.pid))
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.05)
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        raise SystemExit(f"{' '.join(words)} failed")
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=300_000, help="captions in the made-up file")
    parser.add_argument("--opened", type=int, default=0, help="also open a database of so many examples")
    parser.add_argument("--folder", type=Path, help="where the files are, or will be; by default a temporary folder")
    chosen = parser.parse_args()
    rows: list[tuple[str, str, str]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = chosen.folder or Path(temporary)
        folder.mkdir(exist_ok=True)
        captions = folder / f"captions-{chosen.captions}.json"
        if not captions.exists():
            write_captions(folder / "unfinished.json", chosen.captions)
            (folder / "unfinished.json").rename(captions)
        built = captions.with_suffix(".db")
        seconds, processor, peak = measured([sys.executable, "-m", "uniter.cli.build_db", str(captions), str(built), "--overwrite"])
        rows.append((f"{chosen.captions:,} captions, COCO JSON to finished database", f"{chosen.captions / seconds:,.0f}/s", "30,000/s"))
        rows.append(("    for each second of one processor", f"{chosen.captions / processor:,.0f}/s", ""))
        rows.append(("    peak resident memory, process and children", f"{peak:,.0f} MB", "600 MB"))
        bytes_of = [captions.stat().st_size, sum(path.stat().st_size for path in built.iterdir())]
        rows.append(("    captions.json, database", f"{bytes_of[0] / 1e6:,.0f} MB, {bytes_of[1] / 1e6:,.0f} MB", ""))
        opened = built
        if chosen.opened:
            opened = folder / f"opened-{chosen.opened}.db"
            made_up = (Caption(str(number), str(number // CAPTIONS_OF_AN_IMAGE), "a dog") for number in range(chosen.opened))
            build_text_db(made_up, opened, tokenizer=Tokenizer.load())
        times: list[tuple[float, float]] = []
        for _ in range(6):  # the further processes find the pages of the first
            line = subprocess.run([sys.executable, "-c", OPEN, str(opened)], capture_output=True, text=True, check=True).stdout
            seconds, resident = map(float, line.split())
            times.append((seconds, resident))
        slowest, largest = (max(column) for column in zip(*times[1:], strict=True))
        rows.append(
            (f"opening {chosen.opened or chosen.captions:,} examples, the slowest of 5 further processes", f"{slowest:.3f} s", "0.5 s")
        )
        rows.append(("    its resident memory", f"{largest:.1f} MB", "60 MB"))
    width = max(len(row[0]) for row in rows)
    print(f"{'':<{width}}  {'measured':>20}  {'bar':>10}")
    for what, found, bar in rows:
        print(f"{what:<{width}}  {found:>20}  {bar:>10}")


if __name__ == "__main__":
    main()
