"""NLVR2: `{train,dev,test1}.json`, one JSON object a line, a statement about two pictures.

A reader would get this wrong: the pictures' names are the identifier without its last field, "dev-850-0-1" -> "dev-850-0-img0.png".
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from uniter.datasets.errors import BadInput, shown
from uniter.datasets.storage.streams import json_lines, whole_json
from uniter.datasets.text_db.annotations.fields import no_split, text_field
from uniter.datasets.text_db.caption import Caption

LARGEST_LIST = 64 << 20  # bytes


def read_nlvr2(path: Path, *, split: str | None, join: Sequence[Path], counts: Counter[str]) -> Iterator[Caption]:
    """The statements with all their fields, in order; `target` is 1 where the label is "True", 0 otherwise, None without a label.

    Statements about a picture that a joined list names as missing are left out, `counts["image_missing"]`.

    Raises:
        BadInput: a line lacks identifier or sentence, or the list is no list of names.

    Source: UNITER `prepro.py` (facts 2.5).
    """
    no_split(path, split, "NLVR2")
    missing = {_bare(name) for companion in join for name in _missing(companion)}
    for where, entry in json_lines(path):
        identifier = text_field(entry, "identifier", where)
        pair, dash, _ = identifier.rpartition("-")
        if not dash:
            raise BadInput(f"{where} has the identifier {shown(identifier)}; expected e.g. 'dev-850-0-1', is this NLVR2?")
        images = (f"{pair}-img0.png", f"{pair}-img1.png")
        if any(_bare(name) in missing for name in images):
            counts["image_missing"] += 1
            continue
        label = entry.get("label")
        target = None if label is None else int(label == "True" or label is True)
        yield Caption(identifier, images, text_field(entry, "sentence", where), (), {**entry, "target": target})


def _missing(path: Path) -> list[str]:
    names = whole_json(path, "a list of missing images", most_bytes=LARGEST_LIST)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise BadInput(f"{path} is no list of names; --task nlvr2 takes a JSON list of missing images with --join")
    return names


def _bare(name: str) -> str:
    """ "nlvr2_dev-77-0-img0.npz" and "dev-77-0-img0.png" are one picture."""
    return PurePosixPath(name).stem.removeprefix("nlvr2_")
