"""A list of images that is not the one its database was begun for: what is new goes into further units, what went is kept.

    OUT/added.json    while unfinished: the keys of each further unit, and which failures are tried again in them

What a reader would get wrong: the units that were there never change, nor does what they hold; an image that failed and is tried again,
one of a tar that was mended for instance, goes into a further unit too. Which image is in which further unit is settled once, in
`added.json`, and not again where the run is killed and repeated.
"""

import itertools
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uniter.datasets.errors import BadInput, SettingsDiffer, UniterError
from uniter.datasets.image_db.writing.units import ADDED, UnitStore
from uniter.datasets.storage.files import read_json_object, write_json
from uniter.extract.images.items import CUT_TAR, ImageItem, ImageList, digest_of_keys

log = logging.getLogger(__name__)


def described(listed: ImageList) -> dict[str, Any]:
    """A list of images, as `settings.json` says it."""
    return {"count": listed.images, "units": listed.units, "unit_images": listed.unit_images, "keys_sha256": listed.keys_sha256}


@dataclass(frozen=True)
class GrownImages:
    """Further units of a database; those that were there before have nothing left to do.

    Attributes:
        listed: the list as it is now.
        begun: how many units were there before.
        places: for each further unit, in which unit of `listed` and in which place there its images are.
        added: images in further units that were not accounted for before.
        gone: images that the database accounts for and the list no longer names.
        kept: images that it accounts for.
    """

    listed: ImageList
    begun: int
    places: Sequence[Sequence[tuple[int, int]]] = ()
    added: int = 0
    gone: int = 0
    kept: int = 0

    @property
    def units(self) -> int:
        """All of them."""
        return self.begun + len(self.places)

    @property
    def images(self) -> int:
        """All that were ever asked for."""
        return self.kept + self.added

    @property
    def unit_images(self) -> int | None:
        """As of the list."""
        return self.listed.unit_images

    @property
    def keys_sha256(self) -> str:
        """As of the list."""
        return self.listed.keys_sha256

    def count(self, number: int) -> int:
        """How many images of a unit there are to do."""
        return len(self.places[number - self.begun]) if number >= self.begun else 0

    def unit(self, number: int) -> list[ImageItem]:
        """The images of a unit that there are to do, in the order of the list."""
        if number < self.begun:
            return []
        return list(_items(self.listed, self.places[number - self.begun]))


def as_asked(store: UnitStore, listed: ImageList, *, retry_failed: bool) -> ImageList:
    """What is to be done in a database whose other settings are the same: all of the list, or what is new in it.

    Raises:
        SettingsDiffer: none of the images is the database's, or its units are of another size.
        UniterError: another process is at work for another list.
    """
    stored, asked = store.settings["images"], described(listed)
    begun_growing = (store.path / ADDED).is_file()
    if stored == asked and not begun_growing:
        return listed
    if stored.get("unit_images") != asked["unit_images"]:
        words = f"images.unit_images was {json.dumps(stored.get('unit_images'))}, now {json.dumps(asked['unit_images'])}"
        raise SettingsDiffer(f"{store.path} was begun with other settings ({words}): use the same ones, another folder, or --overwrite")
    grown = stored.get("grown")
    if grown is not None and stored["keys_sha256"] == asked["keys_sha256"] and not store.is_complete():
        return _gone_on_with(store, listed, grown)
    if not store.is_complete():
        _close(store, stored)
    return _grown(store, listed, stored, retry_failed=retry_failed)


def _close(store: UnitStore, stored: Mapping[str, Any]) -> None:
    """Let the units that were begun for another list end with what they hold; the other images of this list will be new ones."""
    units = range(stored["units"])
    if any(number not in units for number in store.finished_units()):
        raise UniterError(f"{store.path} is being extended for other images; finish it with those, then add others")
    write_json(store.path / ADDED, {"closing": True})
    for number in sorted(set(units) - store.finished_units()):
        writer = store.unit(number)
        if writer is None:
            raise UniterError(f"another process is extracting into {store.path} for other images; let it end first")
        with writer:
            writer.complete()


def _grown(store: UnitStore, listed: ImageList, stored: Mapping[str, Any], *, retry_failed: bool) -> GrownImages:
    known = {key for _, key, _ in store.keys()}  # noqa: SIM118  # a store is no mapping
    keys = {item.key for number in range(listed.units) for item in listed.unit(number)}
    if known and not known & keys:
        raise SettingsDiffer(
            f"{store.path} was begun for other images ({_some(known)} then; {_some(keys)} now), none of which are the same: choose another "
            "OUT (`uniter-db merge` joins the two), or --overwrite to begin anew"
        )
    failures = store.failures()
    mended = {str(row["path"]) for row in failures if str(row["key"]).endswith(CUT_TAR) and row["key"] not in keys}
    of_mended = {row["key"] for row in failures if any(row["path"] == tar or row["path"].startswith(f"{tar}/") for tar in mended)}
    again = keys & {row["key"] for row in failures if row["key"] in of_mended or (retry_failed and row.get("retry") is not False)}
    dropped, new = of_mended - keys, keys - known
    places = _places(listed, new | again)
    gone = known - keys - dropped
    images = GrownImages(listed, stored["units"], places, added=len(new), gone=len(gone), kept=len(known - dropped))
    _say(store.path, new, again, gone, mended)
    if places or dropped:
        plan = [[item.key for item in _items(listed, unit)] for unit in places]
        about = {"units": plan, "again": sorted(again | dropped), "added": images.added, "gone": images.gone}
        write_json(store.path / ADDED, about)
        grown = {"from": images.begun, "keys_sha256": digest_of_keys([key for unit in plan for key in unit])}
        store.extend({"images": {**described(listed), "count": images.images, "units": images.units, "grown": grown}})
        store.forget_failures(lambda row: row["key"] in again or row["key"] in dropped)
    return images


def _gone_on_with(store: UnitStore, listed: ImageList, grown: Mapping[str, Any]) -> GrownImages:
    """The further units that an earlier run has settled."""
    stored, begun = store.settings["images"], int(grown["from"])
    try:
        plan = read_json_object(store.path / ADDED)
        units, added = plan["units"], int(plan["added"])
        if digest_of_keys([key for unit in units for key in unit]) != grown["keys_sha256"]:
            raise KeyError
    except (BadInput, KeyError, TypeError):
        if store.finished_units() == set(range(stored["units"])):  # completed meanwhile by another process, or opened again in vain
            return GrownImages(listed, begun, [()] * (stored["units"] - begun), kept=stored["count"])
        raise BadInput(f"{store.path / ADDED}, which says what is to be added, is missing or another one; use --overwrite") from None
    if not any(int(path.name.removesuffix(".partial")) >= begun for path in store.units_folder.glob("[0-9]*")):
        again = set(plan["again"])  # killed before all of them were forgotten
        store.forget_failures(lambda row: row["key"] in again)
    unit_of = {key: number for number, unit in enumerate(units) for key in unit}
    places: list[list[tuple[int, int]]] = [[] for _ in units]
    for number in range(listed.units):
        for row, item in enumerate(listed.unit(number)):
            if item.key in unit_of:
                places[unit_of[item.key]].append((number, row))
    return GrownImages(listed, begun, places, added=added, gone=int(plan["gone"]), kept=stored["count"] - added)


def _places(listed: ImageList, chosen: Set[str]) -> list[list[tuple[int, int]]]:
    """Where the chosen images are in the list, cut into units: as many images as in any other, or those of a tar."""
    places = [[(number, row) for row, item in enumerate(listed.unit(number)) if item.key in chosen] for number in range(listed.units)]
    if listed.unit_images is None:
        return [unit for unit in places if unit]
    together = list(itertools.chain.from_iterable(places))
    return [together[first : first + listed.unit_images] for first in range(0, len(together), listed.unit_images)]


def _items(listed: ImageList, places: Iterable[tuple[int, int]]) -> Iterator[ImageItem]:
    for number, group in itertools.groupby(places, key=lambda place: place[0]):
        items = listed.unit(number)
        yield from (items[row] for _, row in group)


def _some(keys: Iterable[str]) -> str:
    names = sorted(keys)
    shown = ", ".join(names[:3])
    return f"{len(names):,}" + (f" ({shown}{', ...' if len(names) > 3 else ''})" if names else "")


def _say(out: Path, new: Set[str], again: Set[str], gone: Set[str], mended: Set[str]) -> None:
    if mended:
        log.info("%s can be read to the end now; what was missing is done", ", ".join(sorted(mended)[:3]))
    if new or again:
        log.info("%s has grown: new are %s; tried again are %s", out, _some(new), _some(again))
    if gone:
        log.warning("no longer there are %s; their regions are kept in %s", _some(gone), out)
