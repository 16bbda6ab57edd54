"""The database of a run: claimed, settled, headed."""

import contextlib
import importlib.metadata
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

from uniter.datasets.errors import UniterError
from uniter.datasets.image_db.writing.side_files import read_box_ids, write_box_ids
from uniter.datasets.image_db.writing.units import UnitStore
from uniter.datasets.progress import human_bytes
from uniter.datasets.storage.files import read_json_object
from uniter.extract.detector.protocol import Detector
from uniter.extract.images.given_boxes import GivenBoxes
from uniter.extract.images.items import ImageList
from uniter.extract.run.growth import GrownImages, as_asked, described
from uniter.extract.run.options import Options, Work
from uniter.extract.run.photographs import refuse_replaced

log = logging.getLogger(__name__)


def open_store(
    out: str | os.PathLike[str], listed: ImageList, detector: Detector, work: Work, options: Options
) -> tuple[UnitStore, ImageList]:
    """Begin or continue the database.

    Returns:
        Its write side, and the images that it is for: the list or, where that is not the one it was begun for, what is new in it.

    Raises:
        SettingsDiffer: it was begun with other settings, or for other images altogether, or a photograph was replaced.
        BadInput: `out` is a folder of other things, for instance the photographs themselves.
    """
    settings = run_settings(listed, detector, work, key=options.key)
    store = UnitStore(Path(out), settings=settings, overwrite=options.overwrite, may_differ=("images",))
    if store.is_complete():
        refuse_replaced(store.path, listed)
    images = as_asked(store, listed, retry_failed=options.retry_failed)
    if options.retry_failed and images is listed:
        numbers = store.forget_failures(lambda row: row.get("retry") is not False)
        log.info("%d units hold images that failed and are tried again", len(numbers))
    return store, images


def run_settings(listed: ImageList, detector: Detector, work: Work, *, key: str | None) -> dict[str, Any]:
    """All that changes a value or decides which values there are; `settings.json`.

    The toolkit's version is not part of it: an update in mid-run is no reason to begin anew. Nor is the device.
    """
    return {
        "kind": "regions",
        "detector": detector.settings(),
        "selection": work.selection(),
        "key": key or ("path" if listed.unit_images is None else "stem"),
        "images": described(listed),
        "batch_size": work.batch_size,
    }


def complete(store: UnitStore, listed: ImageList, detector: Detector, work: Work) -> dict[str, Any] | None:
    """Complete the database if all units are there.

    Returns:
        Its header; None where units are still to do, here or by other processes.

    Raises:
        UniterError: not one image could be used; nothing is kept then.
    """
    if not store.is_complete() and len(store.finished_units()) == listed.units:
        if not isinstance(listed, GrownImages):
            _refuse_nothing(store, listed)
        if work.given is not None:
            with contextlib.suppress(FileNotFoundError):  # another process has completed the database meanwhile, ids and all
                write_box_ids(store.path, ids_of_given(store.path, listed, work.given))
    if not store.finish(units=listed.units, header=run_header(detector, work)):
        return None
    return read_json_object(store.path / "header.json")


def _refuse_nothing(store: UnitStore, listed: ImageList) -> None:
    failed = store.failures()
    if len(failed) >= listed.images:
        first = "; ".join(f"{row['path']}: {row['error']}" for row in failed[:3])
        more = f"; and {len(failed) - 3:,} more" if len(failed) > 3 else ""
        store.claim.abandon()
        raise UniterError(f"none of {listed.images:,} images could be used ({first}{more}); nothing was extracted")


def run_header(detector: Detector, work: Work) -> dict[str, Any]:
    """What `header.json` says besides the counts."""
    settings = detector.settings()
    weights = settings.get("weights", {})
    return {
        "feature_width": detector.feature_width,
        "label_classes": len(detector.class_names) + 1,
        "detector": detector.name,
        "detector_settings": settings,
        "weights": weights,
        "weights_sha256": weights.get("sha256"),
        "box_kind": "given" if work.given is not None else settings.get("box_kind", "proposal"),
        "selection": work.selection(),
        "batch_size": work.batch_size,
        "device": kind_of(detector.device),
        "software": f"uniter-toolkit {importlib.metadata.version('uniter-toolkit')}",
        "class_names": list(detector.class_names),
        "attribute_names": list(detector.attribute_names),
    }


def kind_of(device: str) -> str:
    """What computes there, for the record: a card's name, or "cpu". To be asked where the device is; a kind's own kind is itself."""
    if device.startswith("cuda"):
        import torch

        if torch.cuda.is_available():
            return torch.cuda.get_device_name(torch.device(device))
    return re.sub(r":\d+$", "", device)


def ids_of_given(out: Path, listed: ImageList, given: GivenBoxes) -> dict[str, list[Any]]:
    """The caller's ids of given boxes by image key, in the order of the rows; of further images beside those of the earlier ones."""
    ids = read_box_ids(out) if isinstance(listed, GrownImages) else {}
    for number in range(listed.units):
        for item in listed.unit(number):
            regions = given.of(item)
            if regions is not None and regions.ids is not None:
                ids[item.key] = regions.ids
    return ids


# --- room ------------------------------------------------------------------------------------------------------------------------


def estimated_bytes(images: int, *, detector: Detector, work: Work) -> int:
    """What so many records will take, in bytes.

    How many regions an image keeps is not known before; with Bottom-Up-Attention it is near 40 of 10 to 100, and so it is estimated.
    """
    if work.given is not None:
        regions = work.given.regions_per_image()
    else:
        regions = work.min_boxes + (work.max_boxes - work.min_boxes) / 3
    attributes = len(detector.attribute_names) + 1 if detector.attribute_names else 0
    row = 2 * (detector.feature_width + 6 + 1 + len(detector.class_names) + 1 + attributes) + 4 * 4
    page = 4096
    return int(images * (regions * row + 300 + page / 2 + 100))


def refuse_full_disk(out: Path, *, images: int, detector: Detector, work: Work) -> None:
    """Raise UniterError where the disk has less room than the images will need."""
    needed = estimated_bytes(images, detector=detector, work=work)
    free = shutil.disk_usage(out).free
    log.info("%s images still to do: about %s on disk (%s free)", f"{images:,}", human_bytes(needed), human_bytes(free))
    if free < needed:
        raise UniterError(
            f"about {human_bytes(needed)} are needed for {images:,} images and {out} has {human_bytes(free)} free; make room, choose "
            "another OUT, keep fewer regions with --max-boxes, or pass --ignore-disk-space"
        )
