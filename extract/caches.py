"""What the toolkit keeps between runs, and how to be rid of it: fetched weights, converted ones, regions of photographs asked about.

What a reader would get wrong: a folder of the cache may hold files of somebody else ($UNITER_CACHE names any folder). Only what bears
one of our names, or our settings, is counted and deleted; whatever else is there stays, and is said. Vocabularies and weights from the
hub lie in Hugging Face's own cache, which is theirs to clear (`hf cache`).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from uniter.datasets.errors import BadInput, WrongUsage, unknown_name
from uniter.datasets.storage.files import read_json_object
from uniter.datasets.storage.locks import file_lock
from uniter.extract.region_cache import KEEPER
from uniter.extract.weights.cache import cache_folder

_DOWNLOAD: Final = re.compile(r"([0-9a-f]{16}-[\w.-]+?)(\.part)?(\.json)?")
_WEIGHTS: Final = re.compile(r"([0-9a-f]{64}-\d+)\.(safetensors|json)")
_REGIONS: Final = re.compile(r"[0-9a-f]{16}")

USED_BY: Final = {
    "downloads": "uniter-extract --fetch, and whatever is given a detector or --weights by its address",
    "weights": "every command with a detector whose weights had to be converted",
    "regions": "uniter-train predict match|answer|ground|rank, unless --cache or --no-cache says otherwise",
}


@dataclass(frozen=True)
class Kept:
    """One thing that is kept.

    Attributes:
        cache: of which cache, a key of `USED_BY`.
        name: what it is, for people.
        files: all that belong to it.
        size: bytes on disk; a file that is not wholly written takes what is written.
    """

    cache: str
    name: str
    files: tuple[Path, ...]
    size: int

    def delete(self) -> bool:
        """Delete it; False where another process is fetching it at this moment, and it stays."""
        if self.cache != "downloads":
            self._unlink()
            if self.cache == "regions" and not any(self.files[0].parent.iterdir()):
                self.files[0].parent.rmdir()
            return True
        first = self.files[0]
        target = first.with_name(first.name.removesuffix(".json").removesuffix(".part"))
        with file_lock(target.with_name(f".{target.name}.lock"), wait=False, remove=True) as mine:
            if mine:
                self._unlink()
        return mine

    def _unlink(self) -> None:
        for file in self.files:
            file.unlink(missing_ok=True)


def caches(folder: Path | None = None) -> dict[str, list[Kept]]:
    """What is kept, by the name of the cache (the keys of `USED_BY`), in the order of names.

    Args:
        folder: the toolkit's cache folder; None: $UNITER_CACHE, else `uniter` in $XDG_CACHE_HOME or ~/.cache.
    """
    folder = folder or cache_folder()
    return {
        "downloads": _grouped("downloads", folder, _DOWNLOAD),
        "weights": _grouped("weights", folder, _WEIGHTS),
        "regions": _regions(folder),
    }


def others(folder: Path | None = None) -> list[Path]:
    """Files in the caches' folders that are not the toolkit's."""
    folder = folder or cache_folder()
    ours = {file for kept in caches(folder).values() for one in kept for file in one.files}
    there = [file for name in USED_BY for file in sorted((folder / name).rglob("*")) if not file.is_dir() or file.is_symlink()]
    return [file for file in there if file not in ours]


def kept_in(names: Sequence[str] = (), folder: Path | None = None) -> list[Kept]:
    """What is kept in the named caches; none: in all.

    Raises:
        WrongUsage: there is no cache of that name.
    """
    for name in names:
        if name not in USED_BY:
            raise WrongUsage(unknown_name("cache", name, USED_BY))
    return [one for name, kept in caches(folder).items() if not names or name in names for one in kept]


def clear(names: Sequence[str] = (), folder: Path | None = None) -> tuple[list[Kept], list[Kept]]:
    """Delete caches; what was deleted, and what was left because another process is fetching it.

    Args:
        names: which; none: all.
        folder: as for `caches`.

    Raises:
        WrongUsage: there is no cache of that name.
    """
    chosen = kept_in(names, folder)
    deleted = [one for one in chosen if one.delete()]
    return deleted, [one for one in chosen if one not in deleted]


def _grouped(cache: str, folder: Path, pattern: re.Pattern[str]) -> list[Kept]:
    """Files whose names the pattern knows, those of one thing (its first group) together."""
    files: dict[str, list[Path]] = {}
    for file in sorted((folder / cache).glob("*")):
        found = pattern.fullmatch(file.name)
        if found is not None and file.is_file() and not file.is_symlink():
            files.setdefault(found[1], []).append(file)
    return [Kept(cache, _told(cache, name, own), tuple(own), sum(map(_size, own))) for name, own in files.items()]


def _told(cache: str, name: str, files: Sequence[Path]) -> str:
    facts = next((_facts(file) for file in files if file.suffix == ".json"), {})
    if cache == "downloads":
        begun = "" if any(file.name == name for file in files) else " (begun)"
        return f"{facts.get('url', name)}{begun}"
    return f"{facts['layout']} weights, source sha256 {name[:12]}..." if isinstance(facts.get("layout"), str) else name


def _regions(folder: Path) -> list[Kept]:
    found: list[Kept] = []
    for child in sorted((folder / "regions").glob("*")):
        facts = _facts(child / "settings.json")
        if not _REGIONS.fullmatch(child.name) or child.is_symlink() or facts.get("kind") != KEEPER.kind:
            continue
        files = [file for name in ("settings.json", *KEEPER.writes) if (file := child / name).is_file()]
        detector = facts.get("detector")
        of = detector.get("detector", detector.get("name", "?")) if isinstance(detector, dict) else "?"  # ours say it so, or of their own
        found.append(Kept("regions", f"regions of {of}, {child.name}", tuple(files), sum(map(_size, files))))
    return found


def _facts(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path)
    except (OSError, BadInput):
        return {}


def _size(file: Path) -> int:
    status = file.stat()
    return min(status.st_size, status.st_blocks * 512) if hasattr(status, "st_blocks") else status.st_size
