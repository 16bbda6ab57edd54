"""How fast `convert` writes a region database of ours in every layout, beside copying what it wrote on the same disk. Prints one table.

Megabytes are those written. The opponent is `shutil.copytree` of the same folder, run directly after; files go through the page cache in
both. Processor time is given too, since the clock of a shared machine tells of its other users.

python benchmarks/formats.py                        # 300 images with 36 regions, some 90 MB a layout
python benchmarks/formats.py --images 5000 m2 scan  # only these

About the host alone: takes no --device.
"""

import argparse
import json
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from uniter.datasets.image_db.formats.projects.layout import CAPTIONS, NUMBERS
from uniter.datasets.image_db.formats.projects.rows import LAYOUTS
from uniter.datasets.image_db.regions import RegionFeatures, normalised_boxes
from uniter.datasets.maintenance.convert import Encoded, convert
from uniter.datasets.maintenance.copying import write_regions

REGIONS, WIDTH, SIZE = 36, 2048, (480, 640)


def records(count: int) -> Iterator[tuple[str, RegionFeatures]]:
    """Images whose features differ and are zero in a third of the places, as after a ReLU."""
    dice = np.random.default_rng(0)
    base = np.maximum(dice.normal(0.4, 1, (REGIONS, WIDTH)), 0).astype(np.float16)
    ids, conf = np.zeros(REGIONS, dtype=np.int64), np.ones(REGIONS, dtype=np.float32)
    for number in range(count):
        corners = np.sort(dice.random((REGIONS, 2, 2), dtype=np.float32), axis=1).reshape(REGIONS, 4)
        boxes = corners * np.float32([SIZE[1], SIZE[0]] * 2)
        yield (
            f"COCO_val2014_{number:012d}",
            RegionFeatures(
                features=np.roll(base, number),
                norm_bb=normalised_boxes(boxes, SIZE),
                conf=conf,
                boxes=boxes,
                size=SIZE,
                object_ids=ids,
                object_conf=conf,
            ),
        )


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock and of the processor."""
    clock, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - clock, time.process_time() - processor


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("layouts", nargs="*", default=list(LAYOUTS))
    arguments.add_argument("--images", type=int, default=300)
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as root:
        ours, captions, out = Path(root, "ours.lmdb"), Path(root, "captions.jsonl"), Path(root, "out")
        encoded = Encoded(records(given.images))
        write_regions(ours, encoded, settings={}, sources={}, header=lambda: {**encoded.widths, "class_names": ["thing"]})
        rows = ({"image": f"{number}.jpg", "caption": f"text {text}"} for number in range(given.images) for text in range(5))
        captions.write_text("".join(json.dumps(row) + "\n" for row in rows))
        print("| layout | MB | MB/s | MB/s of a processor | copied, MB/s | resident, MB |\n|---|---|---|---|---|---|")
        for name in given.layouts:
            needs = LAYOUTS[name].needs
            key, told = "{id}" if NUMBERS in needs else None, captions if CAPTIONS in needs else None
            clock, processor = timed(lambda name=name, key=key, told=told: convert(ours, out, to=name, key=key, captions=told))  # type: ignore[misc]
            megabytes = sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) / 1e6
            copied, _ = timed(lambda: shutil.copytree(out, Path(root, "copy")))
            resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            rates = f"{megabytes / clock:.0f} | {megabytes / processor:.0f} | {megabytes / copied:.0f}"
            print(f"| `{name}` | {megabytes:.0f} | {rates} | {resident:.0f} |", flush=True)
            shutil.rmtree(out)
            shutil.rmtree(Path(root, "copy"))


if __name__ == "__main__":
    main()
