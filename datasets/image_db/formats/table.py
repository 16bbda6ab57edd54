"""Other people's feature files: one table, each row with a way in and a way out, so that every pair composes.

`convert` is the whole of `uniter-db convert`. A record keeps what both formats hold; what a format lacks is said, never
invented: Caffe's TSV has no confidences, only UNITER's formats have soft labels (MRC-KL needs them).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from uniter.datasets.errors import BadInput, unknown_name
from uniter.datasets.image_db.database import kind_of
from uniter.datasets.image_db.formats import hdf5, lmdbs, npy, npz, parquet, tsv
from uniter.datasets.image_db.formats.records import Item, Selection, Skip
from uniter.datasets.image_db.published import refuse_pickles
from uniter.datasets.image_db.regions import RegionFeatures

__all__ = ["FORMATS", "Format", "read_items", "recognise"]

Note = Mapping[str, Any]


_Records = Iterable[tuple[str, RegionFeatures]]


@dataclass(frozen=True)
class Format:
    """One row of the table.

    Attributes:
        means: in words.
        read: (path, selection) -> items; a broken image is an item, a broken file an exception.
        write: (path, records, selection, note, skip), replacing what is at `place`; a folder gets the note (`claims.write_note`). None for
            our own database, which `convert` writes itself (it alone can be resumed).
        needs_pixels: whether writing needs the size of each image.
        place: (path, selection) -> the file or folder that is written, which may lie in `path`.
        holds: which of "soft labels", "classes" (best ones, apart from soft labels), "confidences" the format has room for.
    """

    means: str
    read: Callable[[Path, Selection], Iterator[Item]]
    write: Callable[[Path, _Records, Selection, Note, Skip], None] | None
    needs_pixels: bool
    holds: tuple[str, ...]
    place: Callable[[Path, Selection], Path] = lambda path, _: path


def _whole(read: Callable[[Path], Iterator[Item]]) -> Callable[[Path, Selection], Iterator[Item]]:
    """A reader whose source holds the chosen rows only."""
    return lambda path, _: read(path)


class _Write(Protocol):
    def __call__(self, path: Path, items: _Records, *, skip: Skip) -> None: ...


def _plainly(write: _Write) -> Callable[[Path, _Records, Selection, Note, Skip], None]:
    """A writer of one file, to which the selection makes no difference."""
    return lambda path, records, _, __, skip: write(path, records, skip=skip)


def _write_npz(path: Path, records: _Records, _: Selection, note: Note, skip: Skip) -> None:
    npz.write(path, records, note=note, skip=skip)


def _write_uniter(path: Path, records: _Records, selection: Selection, note: Note, skip: Skip) -> None:
    lmdbs.write_uniter(path, records, selection=selection, note=note, skip=skip)


def _write_uniter_compressed(path: Path, records: _Records, selection: Selection, note: Note, skip: Skip) -> None:
    lmdbs.write_uniter(path, records, selection=selection, compressed=True, note=note, skip=skip)


def _compressed(path: Path, selection: Selection) -> Path:
    return lmdbs.uniter_folder(path, selection, compressed=True)


def _write_npy(path: Path, records: _Records, _: Selection, note: Note, skip: Skip) -> None:
    npy.write(path, records, note=note, skip=skip)


_LABELS: Final = ("soft labels", "classes", "confidences")


_IN_TABLES: Final = ("boxes", "sizes", "classes", "attributes", "confidences", "soft labels")


_NO_IDS: Final = ("soft labels", "confidences")


FORMATS: Final[dict[str, Format]] = {
    "lmdb": Format("this project's region database", lmdbs.read, None, False, _LABELS),
    "uniter": Format("UNITER's LMDB with its nbb JSON", lmdbs.read, _write_uniter, False, _NO_IDS, lmdbs.uniter_folder),
    "uniter-compressed": Format("the same with npz values", lmdbs.read, _write_uniter_compressed, False, _NO_IDS, _compressed),
    "npz": Format("a folder of .npz files, as UNITER's docker writes them", npz.read, _write_npz, False, _NO_IDS),
    "butd-tsv": Format("Caffe's TSV", _whole(tsv.read_caffe), _plainly(tsv.write_caffe), True, ()),
    "lxmert-tsv": Format("LXMERT's TSV", _whole(tsv.read_lxmert), _plainly(tsv.write_lxmert), True, _LABELS[1:]),
    "hdf5": Format("adaptive HDF5", _whole(hdf5.read), _plainly(hdf5.write_adaptive), True, ()),
    "hdf5-36": Format("fixed HDF5", _whole(hdf5.read), _plainly(hdf5.write_fixed), True, ()),
    "hdf5-volta": Format("VOLTA's HDF5", _whole(hdf5.read), _plainly(hdf5.write_volta), True, _LABELS[1:]),
    "npy": Format("plain .npy files: features and boxes of each image", _whole(npy.read), _write_npy, True, ("boxes", "sizes")),
    "parquet": Format("a table, for Hugging Face's datasets", _whole(parquet.read), _plainly(parquet.write), False, _IN_TABLES),
}


def recognise(path: Path) -> str:
    """The name in `FORMATS` of what lies at `path`, by its content.

    Raises:
        BadInput: nothing is there, or nothing known.
    """
    if not path.exists():
        raise BadInput(f"{path} does not exist")
    if path.is_dir():
        if npy.is_npy_folder(path):
            return "npy"
        kind = kind_of(path)
        if kind in ("complete", "unfinished", "folder"):
            return "lmdb"
        if kind in ("published", "split"):
            refuse_pickles(path)
            return "uniter"
        if next(path.rglob("*.npz"), None) is not None:
            return "npz"
        raise BadInput(f"{path} holds neither a database nor .npz files; known formats: {', '.join(FORMATS)}")
    with open(path, "rb") as file:
        lines = [file.readline(1 << 28) for _ in range(4)]
    head = lines[0]
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith(b"\x89HDF\r\n"):
        return hdf5.kind_of(path)
    if head.startswith(b"PK\x03\x04"):
        return "npz"
    for line in lines:  # the first one may be broken
        for name, expected in (("butd-tsv", tsv.CAFFE_COLUMNS), ("lxmert-tsv", tsv.LXMERT_COLUMNS)):
            if line.count(b"\t") + 1 == len(expected):
                return name
    columns = head.count(b"\t") + 1
    raise BadInput(f"{path} is of no known format (its first line has {columns} columns; known formats: {', '.join(FORMATS)})")


def read_items(path: Path, *, selection: Selection | None = None, source: str | None = None) -> Iterator[Item]:
    """Every image of a file or folder in any format: (key, regions), or (key, BadInput) where an image is broken."""
    name = source or recognise(path)
    if name not in FORMATS:
        raise BadInput(unknown_name("format", name, FORMATS))
    return FORMATS[name].read(path, selection or Selection())
