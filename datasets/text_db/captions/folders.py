"""Folders of pictures with a text file beside each: `dog.jpg` and `dog.txt`. Each line of the text that is not blank is a caption."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from uniter.datasets.errors import BadInput
from uniter.datasets.image_db.photographs import IMAGE_SUFFIXES
from uniter.datasets.storage.streams import lines_of
from uniter.datasets.text_db.caption import Caption


def read_folder(path: Path, *, split: str | None, join: Sequence[Path], counts: Counter[str], row_prefix: str = "") -> Iterator[Caption]:
    """The captions by the paths of their files; an id is the path without suffix, with the number of the line where there are several.

    `counts` receives `images_without_caption`. A text without a picture beside it is about no image.
    """
    if split is not None:
        raise BadInput(f"{path} is a folder of pictures and texts, which has no parts; leave --split away")
    if join:
        raise BadInput(f"{path} is a folder of pictures with their texts beside them; leave --join away")
    if not path.is_dir():
        raise BadInput(f"{path} is no folder; expected one of pictures with a .txt file beside each")
    for stem, (picture, text) in _pairs(path).items():
        if text is None:
            counts["images_without_caption"] += 1
            continue
        lines = [line for line in lines_of(path / text) if line.strip()]
        for number, line in enumerate(lines or [""]):
            yield Caption(f"{row_prefix}{stem}#{number}" if len(lines) > 1 else f"{row_prefix}{stem}", picture or "", line)


def is_folder_of_pairs(path: Path) -> bool:
    """Whether any picture of a folder, or below it, has a text beside it."""
    return any(picture is not None and text is not None for picture, text in _pairs(path).values())


def _pairs(root: Path) -> dict[str, tuple[str | None, str | None]]:
    """Path without suffix -> (picture, text), relative and with `/`; hidden ones are left out, as `uniter-extract` leaves them out.

    Raises:
        BadInput: two pictures share a name but for the suffix, and have a text.
    """
    found: dict[str, tuple[str | None, str | None]] = {}
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root)
        suffix = path.suffix.lower()
        if (suffix != ".txt" and suffix not in IMAGE_SUFFIXES) or any(part.startswith(".") for part in relative.parts):
            continue
        stem = relative.with_suffix("").as_posix()
        picture, text = found.get(stem, (None, None))
        if suffix == ".txt":
            text = relative.as_posix()
        elif picture is not None and (root / f"{stem}.txt").is_file():
            raise BadInput(f"{root / picture} and {path} have one text between them ({stem}.txt); give them names of their own")
        else:
            picture = relative.as_posix()
        found[stem] = picture, text
    return found
