"""What a run did, in figures and words."""

import contextlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from uniter.datasets.image_db.writing.units import UnitStore
from uniter.datasets.progress import human_bytes
from uniter.extract.detector.protocol import Detector
from uniter.extract.images.items import ImageList
from uniter.extract.run.options import Work
from uniter.extract.run.store import run_header, write_box_ids
from uniter.extract.run.units import Tally


@dataclass(frozen=True)
class ExtractSummary:
    """What a run did and what the database holds.

    Attributes:
        out: the database.
        complete: whether it bears its header; if not, other shards or another run have to do `units_left` units.
        requested: images asked for, of all shards.
        images, regions, failures: what the database holds where it is complete, else what this run added.
        extracted, failed: images that this run did.
        seconds, images_per_second: of this run's work, loading not counted.
        bytes_on_disk: of the folder.
        detector, box_kind, feature_width, classes: what was made.
    """

    out: str
    complete: bool
    requested: int
    images: int
    regions: int
    mean_regions: float
    failures: int
    extracted: int
    failed: int
    units_left: int
    seconds: float
    images_per_second: float
    bytes_on_disk: int
    detector: str
    weights: str
    box_kind: str
    feature_width: int
    classes: int

    def as_dict(self) -> dict[str, Any]:
        """Everything, for `--json`."""
        return asdict(self)

    def as_table(self) -> dict[str, Any]:
        """What a person wants to see."""
        return {
            "images": f"{self.images:,} of {self.requested:,}",
            "regions": self.regions,
            "regions per image": self.mean_regions,
            "failures": self.failures,
            "this run": f"{self.extracted:,} images, {self.failed:,} failures, {self.images_per_second:g} images/s",
            **({} if self.complete else {"units still to do": self.units_left}),
            "on disk": human_bytes(self.bytes_on_disk),
            "detector": self.detector,
            "weights": self.weights or "-",
            "made": f"{self.feature_width} features a region, {self.classes} classes, boxes: {self.box_kind}",
        }


def finish(store: UnitStore, listed: ImageList, detector: Detector, work: Work, tally: Tally, *, seconds: float) -> ExtractSummary:
    """Complete the database if all units are there, and say what was done."""
    if work.given is not None and not store.is_complete() and len(store.finished_units()) == listed.units:
        with contextlib.suppress(FileNotFoundError):  # another process has completed the database meanwhile, ids and all
            write_box_ids(store.path, listed, work.given)
    complete = store.finish(units=listed.units, header=run_header(detector, work))
    stored: Mapping[str, Any] = json.loads((store.path / "header.json").read_bytes()) if complete else {}
    images, regions = stored.get("images", tally.extracted), stored.get("regions", tally.regions)
    header = run_header(detector, work)
    return ExtractSummary(
        out=str(store.path),
        complete=complete,
        requested=listed.images,
        images=images,
        regions=regions,
        mean_regions=round(regions / images, 2) if images else 0.0,
        failures=stored.get("failures", tally.failed),
        extracted=tally.extracted,
        failed=tally.failed,
        units_left=0 if complete else listed.units - len(store.finished_units()),
        seconds=round(seconds, 2),
        images_per_second=round(tally.done / seconds, 2) if tally.done and seconds > 0 else 0.0,
        bytes_on_disk=folder_bytes(store.path),
        detector=detector.name,
        weights=described_weights(header["weights"]),
        box_kind=header["box_kind"],
        feature_width=detector.feature_width,
        classes=len(detector.class_names),
    )


def described_weights(weights: Mapping[str, Any]) -> str:
    """Weights in a few words, a warning included where they are random."""
    sha256 = str(weights.get("sha256", ""))[:12]
    return str(weights.get("note") or f"{weights.get('layout', 'unknown layout')}, sha256 {sha256}...")


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except OSError:  # another process has just moved it
            continue
    return total
