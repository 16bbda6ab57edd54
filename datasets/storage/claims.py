"""Who made a folder, from what, is it ours, is it complete: one rule for every command that writes one.

    OUT/settings.json    first: what decides the contents; "sources" says by content what they are made from
    OUT/header.json      last (a detector's is detector.json): complete

The same command again goes on, or finds the folder complete, only where its settings *and* the contents of its sources are the same;
anything else is refused in words. What an older folder does not know is said once and taken to be the same.

What a reader would get wrong: `overwrite` does not touch OUT until its successor is whole. The work goes on in `OUT.overwriting/`, and
`Claim.publish` swaps the two; what killed it may have left in between, the next claim puts right.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from uniter.datasets.errors import BadInput, SettingsDiffer
from uniter.datasets.storage.files import (
    difference_in_words,
    first_json,
    first_phrases,
    read_json_object,
    sha256_of,
    sync_folder,
    write_json,
)
from uniter.datasets.storage.index_file import INDEX, map_arrays
from uniter.datasets.storage.lmdb_files import full_disk_said

log = logging.getLogger(__name__)

SETTINGS: Final = "settings.json"
SOURCES: Final = "sources"  # the key of settings.json
_ASIDE, _REPLACED = ".overwriting", ".replaced"


@dataclass(frozen=True, slots=True)
class Maker:
    """What one kind of command leaves in its folder.

    Attributes:
        kind: as in the sentence "it holds a text database": what `settings.json` calls "kind".
        complete: the file that is written last.
        writes: glob patterns of all that it may write at the top of its folder; what else lies there is somebody else's, and stays.
    """

    kind: str
    complete: str
    writes: tuple[str, ...]

    def foreign(self, folder: Path) -> list[Path]:
        """What lies in the folder and is not ours, hidden files left aside."""
        if not folder.is_dir():
            return []
        ours = (f"{SETTINGS}*", f"{self.complete}*", *self.writes)
        return sorted(path for path in folder.iterdir() if not path.name.startswith(".") and not any(path.match(one) for one in ours))


@dataclass(frozen=True, slots=True)
class Claim:
    """A folder that may be written to.

    Attributes:
        out: the folder as it was named.
        folder: where to write: `out`, or its successor beside it.
        maker: who writes.
        settings: what `settings.json` says.
    """

    out: Path
    folder: Path
    maker: Maker
    settings: Mapping[str, Any]

    @property
    def complete(self) -> bool:
        """Whether the folder to write to is complete already."""
        return (self.folder / self.maker.complete).is_file()

    def publish(self) -> None:
        """Put the successor, which is whole, in its place; what lay in the old folder and is not ours goes along."""
        if self.folder != self.out:
            if not self.complete:
                raise ValueError(f"{self.folder} is not complete")
            if self.out.exists():
                self.out.rename(_beside(self.out, _REPLACED))
            self.folder.rename(self.out)
            sync_folder(self.out.parent)
            _sweep(self.out, self.maker)

    def abandon(self) -> None:
        """Take away the begun folder of a command that failed for good; what stood at `out` before it, and what is not ours, stays."""
        if not self.complete:
            _remove_ours(self.folder, self.maker)


def claim(
    out: Path | str,
    settings: Mapping[str, Any],
    *,
    maker: Maker,
    sources: Mapping[str, Path] | None = None,
    overwrite: bool = False,
) -> Claim:
    """Begin a folder, or go on with it.

    Args:
        out: the folder; made if it is absent.
        settings: JSON; all that decides what is written, but for the contents of the sources.
        sources: what the contents are made from, by the names under which `settings.json` remembers them: files, databases, folders.
        overwrite: begin anew, beside what is there.

    Raises:
        SettingsDiffer: the folder was begun with other settings, or from other contents; the difference in words.
        BadInput: it holds something that this command did not make, or is itself one of the sources.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise BadInput(f"{out} is a file; expected a folder to write into, or none")
    for source in (sources or {}).values():
        refuse_source_inside(out, source)
    _recover(out, maker)
    begun = (out / SETTINGS).is_file()
    if begun:
        found = read_json_object(out / SETTINGS).get("kind", maker.kind)
        if found != maker.kind:
            raise BadInput(f"{out} holds {found}, not {maker.kind}; choose another OUT")
    elif out.is_dir() and ((there := maker.foreign(out)) or (out / maker.complete).exists()):
        name = there[0].name if there else maker.complete
        raise BadInput(f"{out} holds files that this command did not make (such as {name}), and is not overwritten; choose another OUT")
    folder = out
    if overwrite and begun:
        folder = _beside(out, _ASIDE)
        if (folder / SETTINGS).is_file() and _differences(read_json_object(folder / SETTINGS), _asked(settings, sources, folder, maker)):
            _remove_ours(folder, maker)  # an earlier attempt to overwrite, with other settings
    folder.mkdir(parents=True, exist_ok=True)
    asked = _asked(settings, sources, folder, maker)
    with full_disk_said(folder):
        stored = first_json(folder / SETTINGS, asked)
    if not isinstance(stored, dict):
        raise BadInput(f"{folder / SETTINGS} holds a JSON {type(stored).__name__}; expected an object")
    if phrases := _differences(stored, asked):
        raise SettingsDiffer(
            f"{out} was begun with other settings ({first_phrases(phrases)}): use the same ones, another folder, or --overwrite"
        )
    return Claim(out, folder, maker, _stamped(folder, stored, asked))


def refuse_source_inside(out: Path, source: Path) -> None:
    """BadInput if writing `out` would write over a source of the command."""
    if source.exists() and source.resolve().is_relative_to(out.resolve()):
        raise BadInput(f"{out} is or holds the source {source}, and would be written over; choose another OUT")


# --------------------------------------------------------------------------------------------------------- identity is content


def content_of(path: Path, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a source holds, in a few fields that are equal exactly where the contents are.

    A database of ours: the digest of its index (keys, numbers, checksums). A file, or the data.mdb of a published database: SHA-256, read
    again only where size or time differ from those of `known`. Another folder: the names and sizes in it.

    Args:
        path: the file or folder.
        known: what this function gave for it earlier.

    Raises:
        BadInput: there is no such file or folder.
    """
    if not path.exists():
        raise BadInput(f"{path} does not exist")
    if path.is_dir() and (path / INDEX).is_file():
        return {"name": path.name, "index": _digest_of_index(path / INDEX)}
    file = path / "data.mdb" if path.is_dir() and (path / "data.mdb").is_file() else path
    if file.is_file():
        status = file.stat()
        same = known is not None and (known.get("bytes"), known.get("modified")) == (status.st_size, status.st_mtime_ns)
        sha256 = known["sha256"] if known is not None and same and "sha256" in known else sha256_of(file)
        return {"name": path.name, "bytes": status.st_size, "modified": status.st_mtime_ns, "sha256": sha256}
    digest = hashlib.sha256()
    for inner in sorted(path.rglob("*")):
        if inner.is_file():
            digest.update(f"{inner.relative_to(path).as_posix()}\0{inner.stat().st_size}\n".encode(errors="surrogateescape"))
    return {"name": path.name, "names_and_sizes": digest.hexdigest()}


def _digest_of_index(index: Path) -> str:
    """SHA-256 of the columns that tell what a database holds; where the records lie in data.mdb is no part of it."""
    digest = hashlib.sha256()
    for name, column in sorted(map_arrays(index).items()):
        if not name.startswith("value_"):
            digest.update(f"{name} {column.dtype} {column.shape}\n".encode())
            digest.update(column.tobytes())
    return digest.hexdigest()


_CONTENT = ("index", "sha256", "names_and_sizes")


def _asked(settings: Mapping[str, Any], sources: Mapping[str, Path] | None, folder: Path, maker: Maker) -> dict[str, Any]:
    asked: dict[str, Any] = {"kind": maker.kind, **json.loads(json.dumps(settings))}
    if sources:
        known: Mapping[str, Any] = {}
        if (folder / SETTINGS).is_file():
            known = read_json_object(folder / SETTINGS).get(SOURCES) or {}
        asked[SOURCES] = {name: content_of(path, known.get(name)) for name, path in sources.items()}
    return asked


def _differences(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """In words; what the stored settings do not know of the contents is no difference, nor are names and times of files."""
    before, wanted = ({name: value for name, value in one.items() if name not in (SOURCES, "kind")} for one in (stored, asked))
    phrases = difference_in_words(before, wanted)
    known, now = stored.get(SOURCES), asked.get(SOURCES)
    if not isinstance(known, dict) or not isinstance(now, dict):
        return phrases
    for name in [*known, *(name for name in now if name not in known)]:
        if name not in now or name not in known:
            phrases.append(f"{name} was {'absent' if name not in known else 'there'}, now {'there' if name not in known else 'absent'}")
        elif any(known[name].get(field) != now[name].get(field) for field in _CONTENT if field in known[name] or field in now[name]):
            phrases.append(f"{name} ({now[name]['name']}) has other contents now")
    return phrases


def _stamped(folder: Path, stored: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
    """The settings with the contents that are known now: those of an older folder are taken to be the same, and said to be."""
    if SOURCES not in asked or stored.get(SOURCES) == asked[SOURCES]:
        return stored
    if SOURCES not in stored:
        log.warning("%s does not know the contents of what it was made from; they are taken to be what they are now", folder)
    stamped = {**stored, SOURCES: asked[SOURCES]}
    write_json(folder / SETTINGS, stamped)
    return stamped


# ------------------------------------------------------------------------------------ nothing is destroyed before its successor is whole


def _beside(out: Path, ending: str) -> Path:
    return out.with_name(out.name + ending)


def _recover(out: Path, maker: Maker) -> None:
    """Bring what a kill inside `publish` left into one of the two plain states."""
    replaced, aside = _beside(out, _REPLACED), _beside(out, _ASIDE)
    if replaced.is_dir() and (replaced / SETTINGS).is_file():
        if not out.exists():
            (aside if (aside / maker.complete).is_file() else replaced).rename(out)
            sync_folder(out.parent)
        _sweep(out, maker)


def _sweep(out: Path, maker: Maker) -> None:
    """Remove the folder that was replaced, once its successor stands; what is not ours in it moves over first."""
    replaced = _beside(out, _REPLACED)
    if replaced.is_dir():
        for path in [*maker.foreign(replaced), *replaced.glob(".*")]:
            if not (out / path.name).exists():
                path.rename(out / path.name)
        shutil.rmtree(replaced, ignore_errors=True)


def _remove_ours(folder: Path, maker: Maker) -> None:
    """Remove what the maker writes, the complete file first and the settings last; and the folder, if nothing else is in it."""
    if not folder.is_dir():
        return
    (folder / maker.complete).unlink(missing_ok=True)
    sync_folder(folder)
    for pattern in (f"{maker.complete}.*", *maker.writes, f"{SETTINGS}.*", SETTINGS):
        for path in folder.glob(pattern):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def source_names(paths: Sequence[Path], name: str = "source") -> dict[str, Path]:
    """Several sources under names that stay apart: "source" for one, "source 1" and so on for several."""
    return {name: paths[0]} if len(paths) == 1 else {f"{name} {number}": path for number, path in enumerate(paths, start=1)}
