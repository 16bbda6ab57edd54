"""Flickr30k Entities: which boxes of a photograph a phrase of its captions is about.

FILE is a list of photographs (`train.txt`, `val.txt`, `test.txt`, a number a line); `Annotations/{id}.xml` and `Sentences/{id}.txt` lie
beside it, or in a folder that is joined.

What a reader would get wrong: a phrase may have several boxes (a group), and any of them is right; a phrase whose entity has none ("nobox",
a scene, or no annotation at all) is no example. Boxes are kept as x, y, width, height in pixels, counted as published (both ends inside).

Source: github.com/BryanPlummer/flickr30k_entities.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple
from xml.etree import ElementTree

from uniter.datasets.errors import BadInput, shown
from uniter.datasets.storage.streams import lines_of
from uniter.datasets.text_db.annotations.fields import no_split
from uniter.datasets.text_db.caption import Caption

# "[/EN#283585/people Two young guys] with ..."; EN#0 is what has no entity.
_PHRASE: Final = re.compile(r"\[/EN#(\d+)((?:/[^/\s\]]+)+) ([^\]]*)\]")
_LARGEST_XML: Final = 4 << 20  # bytes; the published ones have some thousand


class _Picture(NamedTuple):
    """Height and width in pixels, and the boxes (x, y, width, height) of each entity."""

    size: tuple[int, int]
    boxes: dict[str, list[list[int]]]


def read_entities(path: Path, *, split: str | None, join: Sequence[Path], counts: Counter[str]) -> Iterator[Caption]:
    """One example a phrase that has a box: `image_id`, `sentence`, `entity`, `kinds`, `boxes` and the photograph's `size` (height, width).

    An id is that of the photograph, the sentence's number and the phrase's ("1000092795-0-2"). `counts` receives `phrases_without_box`.

    Raises:
        BadInput: it is no list of photographs, or one of them has no annotations or sentences, or damaged ones.
    """
    no_split(path, split, "Flickr30k Entities")
    folder = _folder(path, join)
    found = False
    for number, line in enumerate(lines_of(path)):
        photo = line.strip().removesuffix(".jpg")
        if not photo:
            continue
        if not photo.isascii() or not photo.replace("_", "").isalnum():
            raise BadInput(f"line {number + 1} of {path} is {shown(photo)}; expected the number of a photograph, as in test.txt")
        found = True
        picture = _picture(folder / "Annotations" / f"{photo}.xml")
        for place, sentence in enumerate(_sentences(folder / "Sentences" / f"{photo}.txt")):
            words = _PHRASE.sub(r"\3", sentence)
            for order, phrase in enumerate(_PHRASE.finditer(sentence)):
                entity, kinds, text = phrase[1], phrase[2].strip("/").split("/"), phrase[3].strip()
                boxes = picture.boxes.get(entity)
                if not boxes or not text:
                    counts["phrases_without_box"] += 1
                    continue
                fields = {"image_id": photo, "sentence": words, "entity": entity, "kinds": kinds, "boxes": boxes, "size": picture.size}
                yield Caption(f"{photo}-{place}-{order}", f"{photo}.jpg", text, (("flickr", photo),), fields)
    if not found:
        raise BadInput(f"{path} lists no photograph; expected train.txt, val.txt or test.txt of Flickr30k Entities")


def folders_beside(path: Path, join: Sequence[Path]) -> Sequence[Path]:
    """The folders beside a list that are read where none is named."""
    return () if join else [path.parent / name for name in ("Annotations", "Sentences") if (path.parent / name).is_dir()]


def _folder(path: Path, join: Sequence[Path]) -> Path:
    """Where Annotations/ and Sentences/ lie."""
    if len(join) > 1:
        raise BadInput(f"{join[1]} was given with --join besides {join[0]}; expected the one folder that holds Annotations/ and Sentences/")
    folder = join[0] if join else path.parent
    for name in ("Annotations", "Sentences"):
        if not (folder / name).is_dir():
            raise BadInput(f"{folder} holds no folder {name}; unpack annotations.zip of Flickr30k Entities, and --join its folder")
    return folder


def _sentences(path: Path) -> list[str]:
    if not path.is_file():
        raise BadInput(f"{path} is not there; are the sentences of this photograph unpacked?")
    return [line for line in lines_of(path) if line.strip()]


def _picture(path: Path) -> _Picture:
    if not path.is_file():
        raise BadInput(f"{path} is not there; are the annotations of this photograph unpacked?")
    content = path.read_bytes() if path.stat().st_size <= _LARGEST_XML else b""
    if not content or b"<!DOCTYPE" in content or b"<!ENTITY" in content:
        raise BadInput(f"{path} is empty, larger than {_LARGEST_XML:,} bytes, or declares entities; expected an annotation of a photograph")
    try:
        root = ElementTree.fromstring(content)
        size = tuple(_whole(root.find(f"size/{name}"), path) for name in ("height", "width"))
        boxes: dict[str, list[list[int]]] = defaultdict(list)
        for item in root.iter("object"):
            box = item.find("bndbox")
            if box is None:
                continue
            left, top, right, bottom = (_whole(box.find(name), path) for name in ("xmin", "ymin", "xmax", "ymax"))
            if right < left or bottom < top:
                raise BadInput(f"{path} has the box {left}, {top}, {right}, {bottom}; expected xmin, ymin, xmax, ymax in pixels")
            for name in item.findall("name"):
                boxes[(name.text or "").strip()].append([left, top, right - left + 1, bottom - top + 1])
    except (ElementTree.ParseError, ValueError) as error:
        raise BadInput(f"{path} is no readable XML ({error}); was it cut off?") from None
    if min(size) < 1:
        raise BadInput(f"{path} says that the photograph is {size[0]} pixels high and {size[1]} wide; expected at least one each")
    return _Picture((size[0], size[1]), dict(boxes))


def _whole(element: Any, path: Path) -> int:
    text = (element.text or "").strip() if element is not None else ""
    if not re.fullmatch(r"-?\d{1,9}", text):
        raise BadInput(f"{path} says {shown(text)} where a whole number of pixels is expected")
    return int(text)
