"""The captions of each image, from a captions file or a text database, for layouts that keep them beside the regions."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from uniter.datasets.errors import BadInput
from uniter.datasets.image_db.keys import last_number
from uniter.datasets.text_db.captions.table import CAPTIONS, detect
from uniter.datasets.text_db.database import TextDB
from uniter.datasets.text_db.tokenizer import Tokenizer


def captions_by_image(path: Path, *, split: str | None = None) -> Callable[[str], Sequence[str]]:
    """A function from the key of an image to its captions, in the order of the source; none where it has none.

    An image is found by the stem of its name, else by the last number in it where that is of one image only.

    Args:
        path: a file or folder that `uniter-build-db` reads, or a text database.
        split: the part of the captions to read, where they have parts.

    Raises:
        BadInput: it is neither.
    """
    by_stem: dict[str, list[str]] = {}
    for image, text in _texts(path, split):
        by_stem.setdefault(_stem(image), []).append(text)
    if not by_stem:
        raise BadInput(f"{path} holds no captions{f' of {split}' if split else ''}")
    by_number: dict[int, str | None] = {}
    for stem in by_stem:
        number = last_number(stem)
        if number is not None:
            by_number[number] = None if number in by_number else stem

    def find(key: str) -> Sequence[str]:
        stem = _stem(key)
        if stem in by_stem:
            return by_stem[stem]
        number = last_number(stem)
        known = by_number.get(number) if number is not None else None
        return by_stem[known] if known is not None and _may_be(stem, known) else ()

    return find


def _may_be(key: str, stem: str) -> bool:
    """Names that share a number are of one image where one of them is that number, or both end in it."""
    return key.isdigit() or stem.isdigit() or key.rpartition("_")[2] == stem.rpartition("_")[2]


def _stem(name: str) -> str:
    return PurePosixPath(name).stem if PurePosixPath(name).suffix.lower() in _ENDINGS else PurePosixPath(name).name


_ENDINGS = (".jpg", ".jpeg", ".png", ".npz", ".npy", ".webp", ".gif", ".bmp")


def _texts(path: Path, split: str | None) -> Iterator[tuple[str, str]]:
    if path.is_dir() and (path / "data.mdb").is_file():
        yield from _of_database(path)
        return
    if not path.exists():
        raise BadInput(f"{path} does not exist; expected a file of captions or a text database")
    counts: Counter[str] = Counter()
    for caption in CAPTIONS[detect(path)](path, split=split, join=(), counts=counts):
        if isinstance(caption.image, str) and caption.text is not None:
            yield caption.image, caption.text


def _of_database(path: Path) -> Iterator[tuple[str, str]]:
    database = TextDB(path)
    tokenizer = Tokenizer.load(path) if (path / "vocab.txt").is_file() else None
    for row in range(len(database)):
        record, image = database.record(row), database.image_key(row)
        if not isinstance(image, str):
            continue
        raw = record.get("raw")
        if isinstance(raw, str):
            yield image, raw
        elif tokenizer is not None:
            yield image, _joined(tokenizer.tokens(record["input_ids"]))
        else:
            raise BadInput(f"text database {path} holds neither texts nor the vocabulary of its word pieces; pass the file of captions")


def _joined(pieces: Iterable[str]) -> str:
    """Word pieces as a text: what the tokenizer took apart stands apart."""
    return " ".join(pieces).replace(" ##", "")
