"""What a run did, in figures and words."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from uniter.datasets.image_db.writing.units import UnitStore
from uniter.datasets.progress import human_bytes
from uniter.extract.detector.protocol import Detector
from uniter.extract.images.items import ImageList
from uniter.extract.run.growth import GrownImages
from uniter.extract.run.options import Work
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
        gone: images that the database accounts for and the list no longer names; they count as requested.
        only_fillers: of the images extracted by this run, how many have no region above `conf_threshold`: theirs are fillers, kept for
            `min_boxes` alone.
        first_failures: the first images that failed in this run, as "path: why".
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
    gone: int = 0
    only_fillers: int = 0
    conf_threshold: float | None = None
    first_failures: tuple[str, ...] = ()

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
            **({"no longer there, kept": self.gone} if self.gone else {}),
            "this run": f"{self.extracted:,} images, {self.failed:,} failures, {self.images_per_second:g} images/s",
            **({} if self.complete else {"units still to do": self.units_left}),
            **({"fillers": self.fillers_in_words()} if self.only_fillers else {}),
            "on disk": human_bytes(self.bytes_on_disk),
            "detector": self.detector,
            "weights": self.weights or "-",
            "made": f"{self.feature_width} features a region, {self.classes} classes, boxes: {self.box_kind}",
        }

    def fillers_in_words(self) -> str:
        """What `only_fillers` says, as a sentence; empty where there are none."""
        if not self.only_fillers:
            return ""
        of = f"{self.only_fillers:,} of {self.extracted:,} images"
        return f"{of} have no region above {self.conf_threshold:g}; these are fillers"


def summarised(
    store: UnitStore, listed: ImageList, detector: Detector, work: Work, tally: Tally, *, header: Mapping[str, Any] | None, seconds: float
) -> ExtractSummary:
    """What was done, in figures: the database's where it is complete (it has a header), else this run's."""
    stored = header or {}
    images, regions = stored.get("images", tally.extracted), stored.get("regions", tally.regions)
    settings = detector.settings()
    return ExtractSummary(
        out=str(store.path),
        complete=header is not None,
        requested=listed.images,
        gone=listed.gone if isinstance(listed, GrownImages) else 0,
        images=images,
        regions=regions,
        mean_regions=round(regions / images, 2) if images else 0.0,
        failures=stored.get("failures", tally.failed),
        extracted=tally.extracted,
        failed=tally.failed,
        units_left=0 if header is not None else listed.units - len(store.finished_units()),
        seconds=round(seconds, 2),
        images_per_second=round(tally.done / seconds, 2) if tally.done and seconds > 0 else 0.0,
        bytes_on_disk=folder_bytes(store.path),
        detector=detector.name,
        weights=described_weights(settings.get("weights", {})),
        box_kind="given" if work.given is not None else settings.get("box_kind", "proposal"),
        feature_width=detector.feature_width,
        classes=len(detector.class_names),
        only_fillers=tally.fillers,
        conf_threshold=work.conf_threshold if work.given is None else None,
        first_failures=tuple(tally.reasons),
    )


def described_weights(weights: Mapping[str, Any]) -> str:
    """Weights in a few words, a warning included where they are random."""
    sha256 = str(weights.get("sha256", ""))[:12]
    return str(weights.get("note") or f"{weights.get('layout', 'unknown layout')}, sha256 {sha256}...")


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    total = 0
    for inner, _, names in os.walk(folder):  # which passes over a folder that another process has just taken away
        for name in names:
            try:
                total += (Path(inner) / name).stat().st_size
            except OSError:  # the same of a file
                continue
    return total
