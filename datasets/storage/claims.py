"""Who made a folder, from what, is it ours, is it complete: one rule for every command that writes one.

    OUT/settings.json    first: what decides the contents; "made_from" says by content what they are made from
    OUT/header.json      last (a detector's is detector.json): complete

The same command again goes on, or finds the folder complete, only where its settings *and* the contents of its sources are the same;
anything else is refused in words. What an older folder does not know is said once and taken to be the same.

What a reader would get wrong: `overwrite` does not touch OUT until its successor is whole. The work goes on in `OUT.overwriting/`, and
`Claim.publish` swaps the two; what killed it may have left in between, the next claim puts right. Several processes may hold one claim
(extraction by shards); where only one may write, it also takes `claim.alone("building")`.
"""

import contextlib
import errno
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

from uniter.datasets.errors import BadInput, SettingsDiffer, UniterError
from uniter.datasets.storage.cards import CARD_FILE, has_foreign_readme
from uniter.datasets.storage.contents import (
    MADE_FROM as MADE_FROM,
)
from uniter.datasets.storage.contents import (
    SETTINGS as SETTINGS,
)
from uniter.datasets.storage.contents import (
    Source as Source,
)
from uniter.datasets.storage.contents import (
    content_of as content_of,
)
from uniter.datasets.storage.contents import (
    contents_of,
    differences_of_settings,
    stored_contents,
)
from uniter.datasets.storage.contents import (
    source_names as source_names,
)
from uniter.datasets.storage.files import (
    REPLACED,
    UNFINISHED,
    first_json,
    first_phrases,
    read_json_object,
    remove,
    sync,
    write_json,
)
from uniter.datasets.storage.lmdb_files import full_disk_said
from uniter.datasets.storage.locks import file_lock, is_held_here, only_writer

log = logging.getLogger(__name__)

REPORT: Final = "report"
PROVENANCE: Final = "provenance"  # in a note: the detector and what else is known of the contents
MADE_BY: Final = "uniter-db convert"
NOTE: Final = "made_by.json"  # what settings.json is to us, in layouts of others
_ASIDE, _REPLACED, _CLAIMING = ".overwriting", ".replaced", ".claim"
_GOING: Final = ".replaced"  # a file in a folder that is being replaced: what is called OUT.replaced without it is somebody's own


@dataclass(frozen=True, slots=True)
class Maker:
    """What one kind of command leaves in its folder.

    Attributes:
        kind: as in the sentence "it holds regions": what `settings.json` calls "kind".
        complete: the file that is written last.
        writes: names (or glob patterns) of all that it may write at the top of its folder; what else lies there is somebody else's, and
            stays. So does a README.md that is no card.
    """

    kind: str
    complete: str
    writes: tuple[str, ...]

    def made(self, path: Path) -> bool:
        """Whether something at the top of a folder of this maker's is by its name one of its files, whole or half written."""
        if path.name == CARD_FILE:
            return CARD_FILE in self.writes and not has_foreign_readme(path.parent)
        patterns = (SETTINGS, self.complete, *self.writes)
        return any(fnmatchcase(path.name, pattern + ending) for pattern in patterns for ending in ("", ".*.tmp", ".*.first"))

    def foreign(self, folder: Path) -> list[Path]:
        """What lies in the folder and is not ours, hidden files left aside."""
        there = sorted(folder.iterdir()) if folder.is_dir() else []
        return [path for path in there if not path.name.startswith(".") and not self.made(path)]


@dataclass(frozen=True, slots=True)
class Claim:
    """A folder that may be written to.

    Attributes:
        out: the folder that was named.
        folder: where to write: `out`, or its successor beside it.
        maker: who writes.
        settings: what `settings.json` says.
        identity: of the folder to write to, whatever it is called by now.
    """

    out: Path
    folder: Path
    maker: Maker
    settings: Mapping[str, Any]
    identity: tuple[int, int]

    @property
    def complete(self) -> bool:
        """Whether the folder to write to is complete already."""
        return (self.folder / self.maker.complete).is_file()

    def published(self) -> bool:
        """Whether the successor that was written to has taken its place, by this process or another one."""
        return self.folder is not self.out and self.folder != self.out and _identity(self.out) == self.identity

    @contextlib.contextmanager
    def alone(self, doing: str) -> Iterator[None]:
        """Be the only process that writes to the folder.

        Args:
            doing: as in the sentence "another process is building OUT".

        Raises:
            UniterError: somebody else is.
        """
        self._refuse_if_lost()
        with only_writer(self.folder, doing=doing):
            self._refuse_if_lost()
            yield

    def clear_half_written(self) -> None:
        """Remove what a killed process left in the middle of a file; for who is `alone`."""
        for pattern in (self.maker.complete, *self.maker.writes):
            for path in self.folder.glob(f"{pattern}.*.tmp"):
                remove(path)

    def _refuse_if_lost(self) -> None:
        if _identity(self.folder) != self.identity:
            raise UniterError(f"another process has overwritten {self.out} at this moment; look at what it wrote, or run the command again")

    def publish(self, tidy: Callable[[], None] = lambda: None) -> None:
        """Put the successor, which is whole, in its place; what lay in the old folder and is not ours goes along.

        Args:
            tidy: what is left to do in the folder, while no other process can rename it.

        Raises:
            UniterError: the folder cannot be renamed, or another process put another one in its place.
        """
        if self.folder == self.out:
            tidy()
            return
        with _changing(self.out):
            if not self.published():
                self._refuse_if_lost()
                tidy()
                _swap(self.out, self.folder, self.maker)
            else:
                tidy()
                _sweep(self.out, self.maker)  # of a process that was killed while it did
                if self.folder.is_dir() and not (self.folder / SETTINGS).exists():
                    remove(self.folder)  # locks of a process that was too late

    def abandon(self) -> None:
        """Take away the begun folder of a command that failed for good; what stood at `out` before it, and what is not ours, stays."""
        if not self.complete:
            _remove_ours(self.folder, self.maker)


def claim(
    out: Path | str,
    settings: Mapping[str, Any],
    *,
    maker: Maker,
    sources: Mapping[str, Source] | None = None,
    overwrite: bool = False,
    may_differ: Sequence[str] = (),
) -> Claim:
    """Begin a folder, or go on with it.

    Args:
        out: the folder; made if it is absent.
        settings: JSON; all that decides what is written, but for the contents of the sources.
        sources: what the contents are made from, by the names under which `settings.json` remembers them.
        overwrite: begin anew, beside what is there.
        may_differ: keys of `settings` that are remembered but refuse nothing.

    Raises:
        SettingsDiffer: the folder was begun with other settings, or from other contents; the difference in words.
        BadInput: it holds something that this command did not make, or is itself one of the sources.
    """
    out = plain(Path(out))
    if out.exists() and not out.is_dir():
        raise BadInput(f"{out} is a file; expected a folder to write into, or none")
    for source in (sources or {}).values():
        if isinstance(source, Path):
            refuse_source_inside(out, source)
    asked = _asked(settings, sources, out, maker)
    aside = _beside(out, _ASIDE)
    folder = out
    with _changing(out) if overwrite or aside.exists() or _beside(out, _REPLACED).exists() else contextlib.nullcontext():
        _recover(out, maker)
        if _begun(out, maker) and overwrite:
            folder = aside
            if _begun(aside, maker):  # an earlier attempt to overwrite
                if differences_of_settings(read_json_object(aside / SETTINGS), asked, may_differ):
                    _remove_ours(aside, maker)
                elif (aside / maker.complete).is_file():  # killed with everything done
                    _swap(out, aside, maker)
                    folder = out
        folder.mkdir(parents=True, exist_ok=True)
        with full_disk_said(folder):
            first_json(folder / SETTINGS, asked)
        stored = read_json_object(folder / SETTINGS)
        if phrases := differences_of_settings(stored, asked, may_differ):
            raise SettingsDiffer(
                f"{out} was begun with other settings ({first_phrases(phrases)}): use the same ones, another folder, or --overwrite"
            )
        status = folder.stat()
        return Claim(out, folder, maker, _stamped(folder, stored, asked), (status.st_dev, status.st_ino))


def put_in_place(out: Path, successor: Path, maker: Maker) -> None:
    """Put a whole folder that was made under another name in the place of `out`, or of none; what is there and not ours goes along.

    Safe to be killed and called again, when the successor may have taken its place already.
    """
    with _changing(out):
        _recover(out, maker)
        if successor.is_dir():
            _swap(out, successor, maker)


def refuse_foreign(out: Path, maker: Maker) -> None:
    """BadInput if what lies there was not made by this maker."""
    _begun(out, maker)


def refuse_source_inside(out: Path, source: Path) -> None:
    """BadInput if writing `out` would write over a source of the command."""
    if source.exists() and source.resolve().is_relative_to(out.resolve()):
        raise BadInput(f"{out} is or holds the source {source}, and would be written over; choose another OUT")


# --------------------------------------------------------------------------------------------------------- identity is content


def _asked(settings: Mapping[str, Any], sources: Mapping[str, Source] | None, out: Path, maker: Maker) -> dict[str, Any]:
    asked: dict[str, Any] = {"kind": maker.kind, **json.loads(json.dumps(settings))}
    if sources:
        known: dict[str, Any] = {}
        for folder in (out, _beside(out, _ASIDE)):
            known |= stored_contents(folder / SETTINGS)
        asked[MADE_FROM] = contents_of(sources, known, without=out)
    return asked


def _stamped(folder: Path, stored: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
    """The settings with the contents that are known now: those of an older folder are taken to be the same, and said to be."""
    if MADE_FROM not in asked or MADE_FROM in stored:
        return stored
    log.warning("what %s was made from is unknown, since an older version began it; it is taken to be what is there now", folder)
    stamped = {**stored, MADE_FROM: asked[MADE_FROM]}
    try:
        write_json(folder / SETTINGS, stamped)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):  # somebody else's database, which is only read
            raise
    return stamped


# ----------------------------------------------------------------------------------------------- what is not in a layout of ours


def note_of(out: Path) -> Path:
    """Where a file or folder in somebody else's layout has our note of what it was made from: in the folder, or beside the file."""
    return out / NOTE if out.is_dir() else out.with_name(f"{out.name}.{NOTE}")


def may_replace(out: Path, settings: Mapping[str, Any], *, sources: Mapping[str, Path], overwrite: bool) -> dict[str, Any] | None:
    """Whether to write a file or folder in somebody else's layout, which appears whole by rename.

    Returns:
        What `write_note` takes before it appears (new files), with it (folders) or after it (files that are replaced), and once more,
        with a "report", when all is done; None if it is there already, made from the same.

    Raises:
        SettingsDiffer: it is ours, made with other settings or from other contents.
        BadInput: it is not known to be ours, or is one of the sources.
    """
    for source in sources.values():
        refuse_source_inside(out, source)
    known = stored_contents(note_of(out))
    asked: dict[str, Any] = json.loads(json.dumps(settings)) | {
        MADE_FROM: {name: content_of(path, known.get(name)) for name, path in sources.items()}
    }
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return asked
    if not note_of(out).is_file():
        raise BadInput(f"{out} is there already, and is not known to be made by this command; choose another OUT, or remove it yourself")
    stored = read_json_object(note_of(out))
    if overwrite:
        return asked
    if phrases := differences_of_settings(stored, asked, (REPORT, PROVENANCE)):
        raise SettingsDiffer(f"{out} is there already, made otherwise ({first_phrases(phrases)}): choose another OUT, or --overwrite")
    return None if REPORT in stored else asked


def write_note(out: Path, note: Mapping[str, Any], report: Mapping[str, Any] | None = None) -> None:
    """Remember of a file or folder in somebody else's layout what it was made from and, when it is whole, what was reported."""
    write_json(note_of(out), note if report is None else {**note, REPORT: report})


# ------------------------------------------------------------------------------------ nothing is destroyed before its successor is whole


def _begun(folder: Path, maker: Maker) -> bool:
    """Whether a folder is this maker's; BadInput if it is somebody else's. False where there is none, or nothing in it but a README."""
    if (folder / SETTINGS).is_file():
        found = read_json_object(folder / SETTINGS).get("kind")
        if found == maker.kind or (found is None and ((folder / maker.complete).is_file() or not maker.foreign(folder))):
            return True
        raise BadInput(f"{folder} holds {found or 'files that this command did not make'}, not {maker.kind}; choose another OUT")
    there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    # Another process may be writing its settings at this moment.
    there = [name for name in there if not name.startswith((".", f"{SETTINGS}.")) and name != CARD_FILE]
    if there and not (folder / SETTINGS).is_file():
        raise BadInput(
            f"{folder} holds files that this command did not make (such as {there[0]}), and is not overwritten; choose another OUT"
        )
    return False


def plain(out: Path) -> Path:
    """The folder that a link, "." or ".." stands for: it is what is replaced, not the link."""
    return out.resolve() if out.is_symlink() or out.name in ("", "..") else out


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        status = folder.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def is_passing(path: Path) -> bool:
    """Whether a folder is there only while the one beside it is written: its successor, or its predecessor once the successor stands."""
    stands_for = path.with_name(standing_for(path.name))
    if path.name.endswith(_ASIDE):
        return stands_for.exists() or (_beside(stands_for, _REPLACED) / _GOING).exists()
    return path.name.endswith(UNFINISHED) or (stands_for != path and stands_for.exists())


def standing_for(name: str) -> str:
    """The name of the folder whose successor or predecessor bears this one."""
    for ending in (_ASIDE, _REPLACED, REPLACED, UNFINISHED):
        if name.endswith(ending):
            return name.removesuffix(ending)
    return name


def aside_of(out: Path) -> Path:
    """Where what is to take the place of a folder is made."""
    return _beside(out, _ASIDE)


def _beside(out: Path, ending: str) -> Path:
    return out.with_name(out.name + ending)


@contextlib.contextmanager
def _changing(out: Path) -> Iterator[None]:
    """Alone while folders are swapped."""
    with file_lock(out.with_name(f".{out.name}{_CLAIMING}"), wait=True, remove=True):
        yield


def _swap(out: Path, aside: Path, maker: Maker) -> None:
    """Put `aside`, which is complete, in the place of `out`."""
    if not (aside / maker.complete).is_file():
        raise ValueError(f"{aside} is not complete")
    # Nobody's folder is taken away under his hands; what is whole in `aside` takes its place when the command is given again.
    somebody = out.is_dir() and not is_held_here(out)
    with only_writer(out, doing="writing") if somebody else contextlib.nullcontext():
        try:
            if out.exists():
                (out / _GOING).touch()
                out.rename(_beside(out, _REPLACED))
            aside.rename(out)
        except OSError as error:
            raise UniterError(f"{out} cannot be replaced ({error.strerror}); what was to take its place is whole in {aside}") from error
    sync(out.parent)
    _sweep(out, maker)


def _recover(out: Path, maker: Maker) -> None:
    """Bring what a kill inside `_swap` left into one of the two plain states."""
    replaced, aside = _beside(out, _REPLACED), _beside(out, _ASIDE)
    if (out / _GOING).exists():  # where nothing is left, nothing is touched: it may lie on a disk that can only be read
        (out / _GOING).unlink(missing_ok=True)
    if (replaced / _GOING).is_file():
        if not out.exists():
            if not (aside / maker.complete).is_file():
                replaced.rename(out)
                (out / _GOING).unlink()
            else:
                aside.rename(out)
            sync(out.parent)
        _sweep(out, maker)


def _sweep(out: Path, maker: Maker) -> None:
    """Remove the folder that was replaced, once its successor stands; what is not ours in it moves over first."""
    replaced = _beside(out, _REPLACED)
    if not (replaced / _GOING).is_file():
        return
    for path in [*maker.foreign(replaced), *replaced.glob(".*")]:
        target = out / path.name
        if path.name != _GOING and (path.name == CARD_FILE or not target.exists()):
            path.replace(target)
    _remove_ours(replaced, maker)
    (replaced / _GOING).unlink()
    if any(replaced.iterdir()):
        log.warning("%s is left of what was overwritten: it holds files of others that %s holds too", replaced, out)
    else:
        replaced.rmdir()


def _remove_ours(folder: Path, maker: Maker) -> None:
    """Remove what the maker writes, the complete file first and the settings last; and the folder, if nothing else is in it."""
    if not folder.is_dir():
        return
    (folder / maker.complete).unlink(missing_ok=True)
    sync(folder)
    for path in folder.iterdir():
        if maker.made(path) and path.name != SETTINGS:
            remove(path)
    (folder / SETTINGS).unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()
