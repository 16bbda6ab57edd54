"""Which images pre-training must not see, because a down-stream task is tested on them.

The rules are pretrain-vl-data's (facts 7). A reader would get this wrong: Karpathy's validation images are not excluded; they are the
validation part of the pre-training data. Only their Flickr ids are, from SBU, whose photographs cannot be held out otherwise.
"""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, Final, NamedTuple

from uniter.datasets.errors import BadInput, shown
from uniter.datasets.storage.files import sha256_of
from uniter.datasets.storage.plain_pickle import load_plain_pickle
from uniter.datasets.storage.streams import first_character, json_events, json_items, lines_of, object_of, whole_json
from uniter.datasets.text_db.caption import Caption
from uniter.datasets.text_db.captions.sbu import flickr_photo

log = logging.getLogger(__name__)

LISTS = (
    "refer_val_coco_iids",
    "refer_test_coco_iids",
    "flickr30k_coco_iids",
    "flickr30k_vg_iids",
    "karpathy_train_iids",
    "karpathy_val_iids",
    "karpathy_test_iids",
    "excluded_flickr_url_ids",
)


FORBIDDEN_COCO = ("refer_val_coco_iids", "refer_test_coco_iids", "flickr30k_coco_iids", "karpathy_test_iids")


PARTS = ("train", "val")


LOOKED_AT = 1_000_000  # JSON events


_COCO_NAME: Final = re.compile(r"coco_(?:train|val|test)20[0-9]{2}_([0-9]{12})(?![0-9])", re.IGNORECASE)


class _List(NamedTuple):
    """What one file lists: ids that must not be seen by kind, "plain" where the file does not say of what, and Karpathy's validation."""

    ids: Mapping[str, set[str]]
    validation: set[str]


class Exclusion:
    """The images of some lists.

    Args:
        paths: lists; a JSON object of `LISTS` (as `exclusion_lists` and pretrain-vl-data write it), a JSON list, or text with an id or an
            image's name on each line. An id of a plain list is one of the source that is read (COCO's of COCO captions), a name an
            image's name, with or without suffix.

    Attributes:
        hashes: file name (path, where a name comes twice) -> sha256, for the header.

    Raises:
        BadInput: a file is no such list.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.hashes: dict[str, str] = {}
        self._lists: dict[str, _List] = {}
        for path in paths:
            if not path.is_file():
                raise BadInput(f"list of excluded images {path} is not there; `uniter-build-db exclude` makes one")
            name = path.name if path.name not in self.hashes else str(path)
            self.hashes[name] = sha256_of(path)
            self._lists[name] = _json_list(path) if first_character(path) in ("{", "[") else _plain_list(path)
        self._kinds = {kind: set().union(*(one.ids[kind] for one in self._lists.values())) for kind in ("coco", "vg", "flickr", "plain")}
        self._validation = set().union(*(one.validation for one in self._lists.values()))
        self._met: set[tuple[str, str]] = set()

    def leave_out(self, captions: Iterable[Caption], counts: Counter[str]) -> Iterator[Caption]:
        """The texts whose images may be seen; `counts["excluded"]` receives how many may not.

        Raises:
            BadInput: at the end, if a plain list named none of the images: they are spelt otherwise, and everything would leak. (A JSON
                object of lists is of several sources at once; that it names none of one is said aloud.)
        """
        counts["excluded"] = 0
        first = None
        for caption in captions:
            first = first or caption
            if self(caption):
                counts["excluded"] += 1
            else:
                yield caption
        if first is not None:
            self._check_that_lists_were_met(first)

    def _check_that_lists_were_met(self, first: Caption) -> None:
        image = first.image if isinstance(first.image, str) else ", ".join(first.image)
        for name, of in self._lists.items():
            if any((kind, number) in self._met for kind, numbers in of.ids.items() for number in numbers):
                continue
            entries = sum(map(len, of.ids.values()))
            if of.ids["plain"]:
                raise BadInput(
                    f"none of the {entries:,} entries of {name} is an image of these texts, whose images are called like {shown(image)}; "
                    "nothing would be left out: name the images as the texts do, or leave this list away"
                )
            if entries or not of.validation:  # the validation images alone only say what is in which part
                log.warning("%s names none of the images of these texts (%s ids); nothing is left out by it", name, f"{entries:,}")

    def __call__(self, caption: Caption) -> bool:
        """Whether this text's image must not be seen."""
        origins = _origins(caption)
        met = [(kind, number) for kind, number in origins if number in self._kinds[kind]]
        if plain := self._kinds["plain"]:
            images = (caption.image,) if isinstance(caption.image, str) else caption.image
            called = {_plain_id(name) for image in images for name in _names(image)} | {number for _, number in origins}
            met += [("plain", name) for name in called & plain]
        self._met.update(met)
        return bool(met)

    @property
    def lists_coco(self) -> bool:
        """Whether the lists are of COCO's ids, which Visual Genome's images have only in image_data.json."""
        return bool(self._kinds["coco"] or self._validation)

    @property
    def knows_parts(self) -> bool:
        """Whether the lists say which images are the validation part."""
        return bool(self._validation)

    def part(self, caption: Caption) -> str:
        """ "val" for images of Karpathy's validation split, "train" for all others (facts 7.2)."""
        return "val" if any(kind == "coco" and number in self._validation for kind, number in caption.origins) else "train"


def _json_list(path: Path) -> _List:
    document = whole_json(path, "lists of images")
    if isinstance(document, list):
        return _plain(path, _ids(document, str(path)))
    lists = {name: _ids(document[name], f"{name} of {path}") for name in LISTS if name in document}
    if not lists:
        raise BadInput(f"{path} holds none of {', '.join(LISTS)}; expected what `uniter-build-db exclude` writes, or a plain list")
    coco = set().union(*(lists.get(name, set()) for name in FORBIDDEN_COCO))
    vg, flickr = lists.get("flickr30k_vg_iids", set()), lists.get("excluded_flickr_url_ids", set())
    return _List({"coco": coco, "vg": vg, "flickr": flickr, "plain": set()}, lists.get("karpathy_val_iids", set()))


def _plain_list(path: Path) -> _List:
    plain: set[str] = set()
    for line in lines_of(path):
        if entry := line.strip():
            plain.add(_plain_id(entry))
            # Karpathy's own lists are "val2014/COCO_val2014_000000391895.jpg 391895".
            name, _, number = entry.rpartition(" ")
            if name and number.isdigit():
                plain |= {_plain_id(number), name.strip()}
    return _plain(path, plain)


def _plain(path: Path, plain: set[str]) -> _List:
    if not plain:
        raise BadInput(f"list of excluded images {path} is empty; expected ids or images' names")
    return _List({"coco": set(), "vg": set(), "flickr": set(), "plain": plain}, set())


def _origins(caption: Caption) -> Sequence[tuple[str, str]]:
    """What the source says of the image, or else COCO's id if it has one of COCO's names."""
    if caption.origins:
        return caption.origins
    images = (caption.image,) if isinstance(caption.image, str) else caption.image
    return [("coco", str(int(found[1]))) for image in images if (found := _COCO_NAME.search(image)) is not None]


def _names(image: str) -> tuple[str, ...]:
    path = PurePosixPath(image)
    return (image, path.name, path.stem)


def _plain_id(value: str) -> str:
    return str(int(value)) if value.isascii() and value.isdigit() and len(value) <= 18 else value


def _ids(values: Any, where: str) -> set[str]:
    if not isinstance(values, list) or not all(isinstance(value, int | str) for value in values):
        raise BadInput(f"{where} is no list of ids; expected numbers or strings")
    return {_plain_id(str(value)) for value in values}


def exclusion_lists(
    *,
    coco: Sequence[Path] = (),
    karpathy: Sequence[Path] = (),
    refcoco: Sequence[Path] = (),
    refcocog: Sequence[Path] = (),
    flickr30k: Sequence[Path] = (),
    visual_genome: Path | None = None,
) -> dict[str, list[int] | list[str]]:
    """The lists of facts 7.1, each sorted, from the annotation files that people have.

    Args:
        coco: instances or captions of train2014 and val2014 (for the images' Flickr urls).
        karpathy: dataset_coco.json, or karpathy_{train,val,test}_images.txt (an image's id is each line's second field).
        refcoco: `refs(unc).p` of RefCOCO (RefCOCO+ has the same images), or the same as JSON.
        refcocog: `refs(umd).p` of RefCOCOg.
        flickr30k: train.txt, val.txt, test.txt of Flickr30k Entities (photo ids), or dataset_flickr30k.json.
        visual_genome: image_data.json.

    Raises:
        BadInput: a file is not what it should be.
    """
    photos = {photo for path in flickr30k for photo in _flickr30k_photos(path)}
    parts = _karpathy_parts(karpathy)
    refer: dict[str, set[int]] = {"val": set(), "test": set()}
    for paths, tests in ((refcoco, ("testA", "testB", "test")), (refcocog, ("test",))):
        for path in paths:
            for image, split in _referred(path):
                if split == "val" or split in tests:
                    refer["val" if split == "val" else "test"].add(image)
    photo_of = {image: photo for path in coco for image, photo in _coco_photos(path)}
    kept_out = refer["val"] | refer["test"] | parts["val"] | parts["test"]
    return {
        "refer_val_coco_iids": sorted(refer["val"]),
        "refer_test_coco_iids": sorted(refer["test"]),
        "flickr30k_coco_iids": sorted(image for image, photo in photo_of.items() if photo in photos),
        "flickr30k_vg_iids": sorted(_visual_genome_images(visual_genome, photos)) if visual_genome is not None else [],
        "karpathy_train_iids": sorted(parts["train"]),
        "karpathy_val_iids": sorted(parts["val"]),
        "karpathy_test_iids": sorted(parts["test"]),
        "excluded_flickr_url_ids": sorted(photos | {photo_of[image] for image in kept_out if photo_of.get(image)}),
    }


def kind_of_annotations(path: Path) -> str:
    """Which argument of `exclusion_lists` a file is for, by its content ("refcoco" for RefCOCOg too: its rule is part of RefCOCO's).

    Raises:
        BadInput: it is none of them.
    """
    first = first_character(path)
    if first == "{":
        for prefix, event, value in islice(json_events(path), LOOKED_AT):
            if prefix == "images.item" and event == "map_key" and value in ("cocoid", "sentences", "sentids"):
                image = object_of(next(json_items(path, "images.item")), f"image 0 of {path}")
                return "karpathy" if "cocoid" in image else "flickr30k"
            if prefix == "images.item" and event == "end_map":
                return "coco"
    elif first == "[":
        keys = next((object_of(value, f"entry 0 of {path}") for value in json_items(path, "item")), {})
        if "split" in keys and "image_id" in keys:
            return "refcoco"
        if "image_id" in keys or "coco_id" in keys:
            return "visual_genome"
    elif path.suffix in (".p", ".pkl", ".pickle"):
        return "refcoco"
    else:
        fields = next((line.split() for line in lines_of(path) if line.strip()), [])
        if len(fields) == 1 and fields[0].isdigit():
            return "flickr30k"
        if len(fields) == 2 and fields[1].isdigit():
            return "karpathy"
    raise BadInput(
        f"{path} is none of the files that the lists are made from; expected COCO's instances or captions, Karpathy's splits, "
        "RefCOCO's refs, Flickr30k's photo ids or Visual Genome's image_data.json"
    )


def forbidden_coco(lists: dict[str, list[int] | list[str]]) -> set[int]:
    """COCO images that no pre-training part may hold: referring expressions' val and test, Flickr30k's, Karpathy's test."""
    return {int(image) for name in FORBIDDEN_COCO for image in lists[name]}


def _integer(value: Any, where: str) -> int:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | str)
        or (isinstance(value, str) and not (value.isascii() and value.isdigit()))
    ):
        raise BadInput(f"{where} is {shown(value)}; expected a whole number")
    return int(value)


def _coco_photos(path: Path) -> Iterable[tuple[int, str]]:
    found = False
    for row, value in enumerate(json_items(path, "images.item")):
        found = True
        image = object_of(value, f"entry {row} of images in {path}")
        url = image.get("flickr_url")
        yield _integer(image.get("id"), f"the id of entry {row} of images in {path}"), flickr_photo(url) if isinstance(url, str) else ""
    if not found:
        raise BadInput(f"{path} lists no images; expected COCO's instances_*.json or captions_*.json")


def _karpathy_parts(paths: Sequence[Path]) -> dict[str, set[int]]:
    parts: dict[str, set[int]] = {"train": set(), "val": set(), "test": set()}
    for path in paths:
        if path.suffix != ".json":
            part = next((part for part in parts if f"_{part}_" in path.name or path.stem == part), None)
            if part is None:
                raise BadInput(f"{path} does not say which part it is; expected karpathy_train_images.txt, ..._val_... or ..._test_...")
            for number, line in enumerate(lines_of(path)):
                if fields := line.split():
                    parts[part].add(_integer(fields[-1], f"the id in line {number + 1} of {path}"))
            continue
        found = False
        for row, value in enumerate(json_items(path, "images.item")):
            found = True
            image = object_of(value, f"image {row} of {path}")
            part = "train" if image.get("split") == "restval" else image.get("split")
            if not isinstance(part, str) or part not in parts:
                raise BadInput(f"image {row} of {path} is of the split {shown(part)}; expected train, restval, val or test")
            parts[part].add(_integer(image.get("cocoid"), f"the cocoid of image {row} of {path}"))
        if not found:
            raise BadInput(f"{path} lists no images; expected Karpathy's dataset_coco.json")
    return parts


def _referred(path: Path) -> Iterable[tuple[int, str]]:
    if path.suffix == ".json":
        refs = list(json_items(path, "item"))
    else:
        refs = load_plain_pickle(path)
    if not isinstance(refs, list) or not refs:
        raise BadInput(f"{path} holds no list of referring expressions; expected RefCOCO's refs(unc).p or RefCOCOg's refs(umd).p")
    for row, value in enumerate(refs):
        ref = object_of(value, f"entry {row} of {path}")
        split = ref.get("split")
        if not isinstance(split, str):
            raise BadInput(f"entry {row} of {path} is of the split {shown(split)}; expected train, val, test, testA or testB")
        yield _integer(ref.get("image_id"), f"the image_id of entry {row} of {path}"), split


def _flickr30k_photos(path: Path) -> Iterable[str]:
    if path.suffix == ".json":
        for row, value in enumerate(json_items(path, "images.item")):
            name = object_of(value, f"image {row} of {path}").get("filename")
            if not isinstance(name, str):
                raise BadInput(f"image {row} of {path} has the filename {shown(name)}; expected Karpathy's dataset_flickr30k.json")
            yield flickr_photo(name)
        return
    for line in lines_of(path):
        if line.strip():
            yield flickr_photo(line.strip())


def _visual_genome_images(path: Path, photos: set[str]) -> Iterable[int]:
    for row, value in enumerate(json_items(path, "item")):
        image = object_of(value, f"image {row} of {path}")
        if image.get("flickr_id") is not None and str(image["flickr_id"]) in photos:
            yield _integer(image.get("image_id", image.get("id")), f"the id of image {row} of {path}")
