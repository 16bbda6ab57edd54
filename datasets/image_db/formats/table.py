"""Other people's feature files: one table, each row with a way in and a way out, so that every pair composes.

A record keeps what both formats hold; what a format lacks is said, never invented: Caffe's TSV has no confidences, few besides UNITER's
formats have soft labels (MRC-KL needs them).
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from uniter.datasets.errors import BadInput, WrongUsage, unknown_name
from uniter.datasets.image_db.database import kind_of
from uniter.datasets.image_db.formats import hdf5, lmdbs, npy, npz, parquet, tsv
from uniter.datasets.image_db.formats.projects.layout import CAPTIONS as CAPTIONS
from uniter.datasets.image_db.formats.projects.layout import NAMES as NAMES
from uniter.datasets.image_db.formats.projects.layout import PIXELS as PIXELS
from uniter.datasets.image_db.formats.projects.layout import SPLITS as SPLITS
from uniter.datasets.image_db.formats.projects.layout import THIRTY_SIX, Known, Layout, read_all, write_all
from uniter.datasets.image_db.formats.projects.rows import LAYOUTS, recognise_project
from uniter.datasets.image_db.formats.records import Item, Selection, Skip
from uniter.datasets.image_db.published import refuse_pickles
from uniter.datasets.image_db.regions import RegionFeatures
from uniter.datasets.storage.claims import NOTE

__all__ = ["FORMATS", "HOLDABLE", "Format", "format_named", "listed", "read_items", "recognise"]

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
        holds: which of `HOLDABLE` the format has room for ("classes": best ones, apart from soft labels).
        place: (path, selection) -> the file or folder that is written, which may lie in `path`.
        out: what is written, in words or as patterns below OUT.
        rounds, needs: what becomes less exact, and what has to be known of the images.
        layout: of another project's code; it reads and writes by what a conversion knows beside the records.
    """

    means: str
    read: Callable[[Path, Selection], Iterator[Item]]
    write: Callable[[Path, _Records, Selection, Note, Skip], None] | None
    needs_pixels: bool
    holds: tuple[str, ...]
    place: Callable[[Path, Selection], Path] = lambda path, _: path
    out: str = "OUT"
    rounds: str = ""
    needs: tuple[str, ...] = ()
    layout: Layout | None = None

    @property
    def takes(self) -> tuple[str, ...]:
        """What it needs, or has room for, of what a conversion is told beside the records."""
        if self.layout is None:
            return () if self.write is not None else (NAMES,)  # our database says them in its header
        return (*self.layout.needs, *self.layout.takes)


def _whole(read: Callable[[Path], Iterator[Item]]) -> Callable[[Path, Selection], Iterator[Item]]:
    """A reader whose source holds the chosen rows only."""
    return lambda path, _: read(path)


def _each(read: Callable[[Path], Iterator[Item]]) -> Callable[[Path, Selection], Iterator[Item]]:
    """The same of a source that may be a folder of such files, which are read as one."""
    return lambda path, _: itertools.chain.from_iterable(map(read, _parts_of(path)))


def _parts_of(path: Path) -> list[Path]:
    """The TSV, HDF5 or parquet files in a folder (`train.tsv.0`, `train.tsv.1` too); the path itself if it is a file."""
    if not path.is_dir():
        return [path]
    found = [file for file in sorted(path.rglob("*")) if file.is_file() and not file.name.endswith(NOTE)]
    return [file for file in found if {".tsv", ".h5", ".hdf5", ".parquet"} & set(file.suffixes[-2:])]


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


HOLDABLE: Final = ("boxes", "sizes", "classes", "attributes", "confidences", "soft labels")
_UNITERS: Final = ("boxes", "confidences", "soft labels")
_LISTED: Final = ("boxes", "sizes", "classes", "attributes")
_HALVES: Final = "all but boxes and sizes (float16)"
_ALL_HALVES: Final = "everything (float16)"
_PICKLED: Final = "OUT, OUT's name with _imgid2idx.pkl"


def _of_project(layout: Layout) -> Format:
    return Format(
        means=f"{layout.means} (pickled: {layout.pickled})" if layout.pickled else layout.means,
        read=lambda path, _: read_all(layout, path, Known()),
        write=lambda path, records, _, note, skip: write_all(layout, path, records, Known(), note, skip),
        needs_pixels=PIXELS in layout.needs,
        holds=layout.holds,
        out=", ".join(layout.files),
        rounds=layout.rounds,
        needs=(*layout.needs, *(f"{one} (if given)" for one in layout.takes)),
        layout=layout,
    )


FORMATS: Final[dict[str, Format]] = {
    "lmdb": Format("this project's region database", lmdbs.read, None, False, HOLDABLE, rounds=_HALVES),
    "uniter": Format(
        "UNITER's LMDB with its nbb JSON",
        lmdbs.read,
        _write_uniter,
        False,
        _UNITERS,
        lmdbs.uniter_folder,
        "feat_*/data.mdb, nbb_*.json",
        _ALL_HALVES,
    ),
    "uniter-compressed": Format(
        "the same with npz values",
        lmdbs.read,
        _write_uniter_compressed,
        False,
        _UNITERS,
        _compressed,
        "feat_*_compressed/data.mdb, nbb_*.json",
        _ALL_HALVES,
    ),
    "npz": Format(
        "a folder of .npz files, as UNITER's docker writes them", npz.read, _write_npz, False, _UNITERS, out="*.npz", rounds=_ALL_HALVES
    ),
    "butd-tsv": Format("Caffe's TSV", _each(tsv.read_caffe), _plainly(tsv.write_caffe), True, _LISTED[:2], needs=(PIXELS,)),
    "lxmert-tsv": Format("LXMERT's TSV", _each(tsv.read_lxmert), _plainly(tsv.write_lxmert), True, _LISTED, needs=(PIXELS,)),
    "hdf5": Format(
        "adaptive HDF5 (pickled: imgid2idx)",
        _each(hdf5.read),
        _plainly(hdf5.write_adaptive),
        True,
        _LISTED[:2],
        out=_PICKLED,
        needs=(PIXELS,),
    ),
    "hdf5-36": Format(
        "fixed HDF5, one file of butd_vqa (pickled: imgid2idx)",
        _each(hdf5.read),
        _plainly(hdf5.write_fixed),
        True,
        _LISTED[:2],
        out=_PICKLED,
        needs=(THIRTY_SIX, PIXELS),
    ),
    "hdf5-volta": Format("VOLTA's HDF5, one file of vlt5_h5", _each(hdf5.read), _plainly(hdf5.write_volta), True, _LISTED, needs=(PIXELS,)),
    "npy": Format(
        "plain .npy files: features and boxes of each image",
        lambda path, _: npy.read(path),
        _write_npy,
        True,
        _LISTED[:2],
        out="features/*.npy, boxes/*.npy, images.jsonl",
        needs=(PIXELS,),
    ),
    "parquet": Format(
        "a table, for Hugging Face's datasets", _each(parquet.read), _plainly(parquet.write), False, HOLDABLE, rounds=_HALVES
    ),
    **{name: _of_project(layout) for name, layout in LAYOUTS.items()},
}


def format_named(name: str) -> str:
    """The name in `FORMATS` that is meant, hyphens and underscores alike.

    Raises:
        BadInput: there is none of that name.
    """
    for spelt in (name, name.replace("-", "_"), name.replace("_", "-")):
        if spelt in FORMATS:
            return spelt
    raise WrongUsage(unknown_name("format", name, FORMATS))


def listed() -> str:
    """The table of the formats, as `uniter-db convert --list` prints it: Markdown."""
    rows = [("`--to`", "what it is", "files", "holds", "lacks", "rounds", "needs")]
    rows.append(("---",) * len(rows[0]))  # type: ignore[arg-type]
    for name, form in FORMATS.items():
        lacks = [one for one in HOLDABLE if one not in form.holds]
        cells = (form.out, ", ".join(form.holds), ", ".join(lacks), form.rounds, ", ".join(form.needs))
        rows.append((f"`{name}`", form.means, *(cell.replace("*", "\\*") or "-" for cell in cells)))  # type: ignore[arg-type]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


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
        if kind in ("complete", "unfinished"):
            return "lmdb"
        found = recognise_project(path)
        if found is not None:
            return found
        if kind == "folder":
            return "lmdb"
        if kind in ("published", "split"):
            refuse_pickles(path)
            return "uniter"
        if next(path.rglob("*.npz"), None) is not None:
            return "npz"
        if parts := _parts_of(path):
            return recognise(parts[0])
        raise BadInput(f"{path} holds neither a database nor .npz files; known formats: {', '.join(FORMATS)}")
    with open(path, "rb") as file:
        lines = [file.readline(1 << 28) for _ in range(4)]
    head = lines[0]
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith(b"\x89HDF\r\n"):
        found = recognise_project(path)
        # The files of two layouts go by their old names as well.
        return hdf5.kind_of(path) if found in (None, "butd_vqa", "vlt5_h5") else found
    for line in lines:  # the first one may be broken
        for name, expected in (("butd-tsv", tsv.CAFFE_COLUMNS), ("lxmert-tsv", tsv.LXMERT_COLUMNS)):
            if line.count(b"\t") + 1 == len(expected):
                return name
    found = recognise_project(path)
    if found is not None:
        return found
    if head.startswith(b"PK\x03\x04"):
        return "npz"
    columns = head.count(b"\t") + 1
    raise BadInput(f"{path} is of no known format (its first line has {columns} columns; known formats: {', '.join(FORMATS)})")


def read_items(path: Path, *, selection: Selection | None = None, source: str | None = None, known: Known | None = None) -> Iterator[Item]:
    """Every image of a file or folder in any format: (key, regions), or (key, BadInput) where an image is broken.

    Args:
        known: takes up what a layout says beside the records (names of classes).
    """
    form = FORMATS[format_named(source) if source else recognise(path)]
    if form.layout is not None:
        return read_all(form.layout, path, known or Known())
    return form.read(path, selection or Selection())
