"""What a source holds, so that "made from the same" can be said: by content, whatever it is called and whenever it was copied.

What a reader would get wrong: nothing large is read to learn that nothing is to do. A database is known by the digest of its index, a file
by a SHA-256 that is kept with its size and time, a photograph by its name and size.
"""

import contextlib
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from uniter.datasets.errors import BadInput
from uniter.datasets.storage.files import difference_in_words, read_json_object, sha256_of
from uniter.datasets.storage.index_file import INDEX, map_arrays

Source = Path | Mapping[str, Any]
"""A file, a database or another folder; or what `content_of` would give, of a source that is none or of which only a part counts."""

SETTINGS: Final = "settings.json"
MADE_FROM: Final = "made_from"  # the key of settings.json

BESIDE: Final = "beside"  # the name of sources that were not named, but found beside others

_PLACES: Final = ("offsets", "sizes", "data_file", "units", "failure_units")
"""Columns of an index that say where a record lies and in which order it came: no part of what a database holds."""

_READ: Final = (".npz", ".mdb", ".json", ".jsonl", ".tsv", ".csv", ".txt", ".parquet", ".h5", ".hdf5", INDEX)
"""Endings of files in a folder that are told apart by what is in them; all others, photographs and tars for instance, by their size."""


def content_of(path: Path, known: Any = None, *, without: Path | None = None) -> dict[str, Any]:
    """What a source holds, in a few fields that are equal exactly where the contents are.

    A database of ours: the digest of its index (keys, numbers, checksums). A file, or the data.mdb of a published database or of texts
    whose index has no checksums yet: SHA-256, read again only where size or time differ from those of `known`. A tar: its name and size.
    Another folder: names and sizes of photographs and tars, SHA-256 of the rest, by the same rule.

    Args:
        path: the file or folder.
        known: what this function gave for it earlier.
        without: a folder inside `path` that does not count: what is being made there.

    Raises:
        BadInput: there is no such file or folder.
    """
    if not path.exists():
        raise BadInput(f"{path} does not exist")
    known = known if isinstance(known, dict) else {}
    ours = path.is_dir() and (path / INDEX).is_file()
    if ours and (digest := _digest_of_index(path / INDEX)) is not None:
        return {"name": path.name, "index": digest}
    published = path.is_dir() and (path / "data.mdb").is_file() and not (path / SETTINGS).exists()
    file = path / "data.mdb" if ours or published else path
    if file.is_file():
        status = file.stat()
        if file.suffix.lower() == ".tar":
            named = hashlib.sha256(f"{file.name}\0{status.st_size}\n".encode(errors="surrogateescape"))
            return {"name": path.name, "bytes": status.st_size, "names_and_sizes": named.hexdigest()}
        same = (known.get("bytes"), known.get("modified")) == (status.st_size, status.st_mtime_ns)
        sha256 = known["sha256"] if same and isinstance(known.get("sha256"), str) else sha256_of(file)
        return {"name": path.name, "bytes": status.st_size, "modified": status.st_mtime_ns, "sha256": sha256}
    return {"name": path.name, **_content_of_folder(path, known, without)}


def _content_of_folder(folder: Path, known: Mapping[str, Any], without: Path | None) -> dict[str, Any]:
    named, times = hashlib.sha256(), hashlib.sha256()
    to_read: list[Path] = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "lock.mdb" and not (without is not None and path.is_relative_to(without)):
            status = path.stat()
            row = f"{path.relative_to(folder).as_posix()}\0{status.st_size}\n".encode(errors="surrogateescape")
            if path.name.endswith(_READ):
                to_read.append(path)
                times.update(row + str(status.st_mtime_ns).encode())
            else:
                named.update(row)
    told = {"names_and_sizes": named.hexdigest()}
    if not to_read:
        return told
    if known.get("modified") == times.hexdigest() and isinstance(known.get("sha256"), str):
        return {**told, "modified": times.hexdigest(), "sha256": known["sha256"]}
    content = hashlib.sha256()
    for path in to_read:
        content.update(f"{path.relative_to(folder).as_posix()}\0{sha256_of(path)}\n".encode(errors="surrogateescape"))
    return {**told, "modified": times.hexdigest(), "sha256": content.hexdigest()}


def _digest_of_index(index: Path) -> str | None:
    """SHA-256 of the columns that tell what a database holds; None where it does not tell the contents of the records."""
    digest = hashlib.sha256()
    columns = map_arrays(index)
    if "checksums" not in columns:
        return None
    for name, column in sorted(columns.items()):
        if name not in _PLACES:
            digest.update(f"{name} {column.dtype} {column.shape}\n".encode())
            if column.size:
                digest.update(column.data.cast("B"))
    return digest.hexdigest()


_CONTENT: Final = ("index", "sha256", "names_and_sizes")


def contents_of(sources: Mapping[str, Source], known: Mapping[str, Any], *, without: Path | None = None) -> dict[str, Any]:
    """`content_of` each of several sources, by their names."""
    return {
        name: content_of(source, known.get(name), without=without) if isinstance(source, Path) else dict(source)
        for name, source in sources.items()
    }


def stored_contents(path: Path) -> dict[str, Any]:
    """What a `settings.json` remembers of the contents; nothing where it cannot be read."""
    with contextlib.suppress(BadInput):
        stored = read_json_object(path).get(MADE_FROM)
        return stored if isinstance(stored, dict) else {}
    return {}


def differences_of_settings(stored: Mapping[str, Any], asked: Mapping[str, Any], may_differ: Sequence[str] = ()) -> list[str]:
    """In words; what the stored settings do not know of the contents is no difference, nor are names and times of files."""
    left = (MADE_FROM, "kind", *may_differ)
    before, wanted = ({name: value for name, value in one.items() if name not in left} for one in (stored, asked))
    phrases = difference_in_words(before, wanted)
    known, now = stored.get(MADE_FROM), asked.get(MADE_FROM)
    if not isinstance(known, dict) or not isinstance(now, dict):
        return phrases
    for name in [*known, *(name for name in now if name not in known)]:
        if name not in known and name.startswith(BESIDE):
            continue  # older versions did not remember what they read of a source's neighbours
        if name not in now or name not in known:
            phrases.append(f"{name} was {'absent' if name not in known else 'there'}, now {'there' if name not in known else 'absent'}")
        elif not isinstance(known[name], dict) or any(known[name].get(field) != now[name].get(field) for field in _CONTENT):
            phrases.append(f"{name} ({now[name]['name']}) has other contents now")
    return phrases


def source_names(paths: Sequence[Path], name: str = "source") -> dict[str, Path]:
    """Several sources under names that stay apart: "source" for one, "source 1" and so on for several."""
    return {name: paths[0]} if len(paths) == 1 else {f"{name} {number}": path for number, path in enumerate(paths, start=1)}
