"""Which images, in which order, under which keys.

What a reader would get wrong: what is asked for is read, refused or counted aloud, never passed over. A file that is named and is neither
an image nor a list is refused at once; a folder that holds shards and images beside each other is not read as one of the two in silence.
"""

import itertools
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from uniter.datasets.errors import BadInput
from uniter.datasets.image_db.keys import key_rule
from uniter.datasets.image_db.photographs import HEIF_SUFFIXES, HEIF_WANTS, IMAGE_SUFFIXES, READS_HEIF
from uniter.datasets.image_db.tables import is_saved_dataset, is_table, tables_in
from uniter.datasets.storage.files import expand_braces
from uniter.datasets.storage.packed import Packed, sorted_names
from uniter.extract.images.decoding import refuse_no_image
from uniter.extract.images.files import FileImages, FoundFiles, packed, text
from uniter.extract.images.items import UNIT_IMAGES, ImageList
from uniter.extract.images.tables import TableImages, fetching
from uniter.extract.images.tars import TarImages

log = logging.getLogger(__name__)

_RAW = (".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf")


_TABLES = (".csv", ".tsv", ".xlsx", ".feather")


_NAMING = ("image", "path", "file_name", "filename")
"""Fields of a .jsonl list that name an image."""

_ADDRESS = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")


_VIDEOS = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")


NOT_READ = frozenset((*HEIF_SUFFIXES, ".jxl", ".jp2", ".j2k", ".svg", ".psd", ".tga", *_RAW)) - IMAGE_SUFFIXES


"""Pictures of kinds that are not read: in folders they are counted aloud, not passed over in silence."""


def list_images(
    images: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    key: str | None = None,
    unit_images: int = UNIT_IMAGES,
    notes: Path | None = None,
) -> ImageList:
    """Find the images and make their keys.

    Args:
        images: a folder (searched recursively; hidden files and folders are left out), an image, a `.txt` list (a path a line) or
            `.jsonl` list (`{"image": path, "key": optional}` or a string a line), tar shards (a `.tar`, a brace or glob pattern, a folder
            of tars), tables that hold the images' bytes (`.parquet`, a folder of them, a folder of `datasets.save_to_disk`), or several
            of one kind. Paths in a list are relative to the list's folder or, if the first is not there, to the current folder.
        key: see `keys.key_rule`; None: `stem` for files, `path` (WebDataset's `__key__`) for tars.
        unit_images: how many images make a unit, where there are no tars.
        notes: a folder in which an earlier run has noted what the headers of tars say.

    Raises:
        BadInput: there is nothing, a list is malformed, or two images would get the same key (both are named).
    """
    sources = [images] if isinstance(images, str | os.PathLike) else list(images)
    paths = [path for source in sources for path in _expanded(os.fspath(source))]
    if not paths:
        raise BadInput("no images were named; expected a folder, an image, a list or tar shards")
    tables = [_tables(path) for path in paths]
    if any(tables):
        if not all(tables):
            raise BadInput("tables of images and other images were named together; extract them one after the other")
        return TableImages(list(itertools.chain.from_iterable(tables)), key_rule(key or "stem"), unit_images=unit_images)
    shards = [_tars(path) for path in paths]
    if any(shards):
        if not all(shards):
            raise BadInput("tar shards and other images were named together; extract them one after the other")
        return TarImages(list(itertools.chain.from_iterable(shards)), key_rule(key or "path"), notes=notes)
    rule = key_rule(key or "stem")
    found: list[FoundFiles] = []
    alone: list[tuple[str, Path]] = []  # files that were named one by one, and the folder of each
    for path in paths:
        if path.is_dir():
            left_out: Counter[str] = Counter()
            files = _walk(path, left_out)
            if left_out:
                kinds = ", ".join(f"{count:,} {suffix}" for suffix, count in sorted(left_out.items()))
                heif = f", or for HEIC install {HEIF_WANTS}" if set(left_out) & set(HEIF_SUFFIXES) else ""
                log.warning(
                    "%s holds pictures of kinds that are not read: %s; convert them to JPEG or PNG if they are wanted%s", path, kinds, heif
                )
            if not files:
                raise BadInput(f"{path} holds no images (looked for {', '.join(sorted(IMAGE_SUFFIXES))}) and no tar shards")
            found += [*_together(alone), FoundFiles(str(path / "_")[:-1], path.resolve().name, files)]
        elif path.suffix.lower() in (".txt", ".jsonl", ".ndjson"):
            found += [*_together(alone), _listed(path)]
        elif path.exists():
            if len(paths) == 1:  # of several, one that is no image is a row of failures.jsonl
                _refuse_no_image(path)
            alone.append((path.resolve().parent.name, path))
        else:
            raise BadInput(f"{path} does not exist; expected a folder, an image, a list or tar shards")
    return FileImages([*found, *_together(alone)], rule, unit_images=unit_images)


# --- finding ---------------------------------------------------------------------------------------------------------------------


def _expanded(text: str) -> list[Path]:
    """Brace patterns (`{00000..00331}`, `{train,val}`) and globs to paths, in order; a path that exists is taken as it is."""
    if os.path.lexists(text):
        return [Path(text)]
    if _ADDRESS.match(text):
        raise BadInput(
            f"{text[:80]} is an address (URL), and files are read; write it into urls.txt, one a line, and download: "
            f"{fetching(Path('urls.txt'))}"
        )
    names = expand_braces(text)
    if any(character in text for character in "*?["):
        globbed = [sorted(Path(name).parent.glob(Path(name).name)) for name in names]
        if not all(globbed):
            raise BadInput(f"nothing matches {text!r}")
        return list(itertools.chain.from_iterable(globbed))
    missing = [name for name in names if not os.path.lexists(name)]
    if missing:
        others = f" (and {len(missing) - 1} more of {len(names)})" if len(missing) > 1 else ""
        raise BadInput(f"{missing[0]}{others} does not exist; expected a folder, an image, a list or tar shards")
    return [Path(name) for name in names]


def _together(alone: list[tuple[str, Path]]) -> Iterator[FoundFiles]:
    """Files named one after the other, those of folders of one name together; the list is emptied."""
    for root, group in itertools.groupby(alone, key=lambda entry: entry[0]):
        paths = [path for _, path in group]
        yield FoundFiles("", root, packed(map(str, paths)), named=packed(path.name for path in paths))
    alone.clear()


def _refuse_no_image(path: Path) -> None:
    """BadInput for a file that is named as the image and is none."""
    if not path.is_file():  # a pipe, say, which is a row too
        return
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        raise BadInput(f"{path}: the file is empty")
    suffix = path.suffix.lower()
    try:
        refuse_no_image(start)
    except BadInput as error:
        if start[:1] in (b"{", b"[") or suffix == ".json":
            raise BadInput(f"{path} is JSON and no image; a list of images is a .txt file (a path a line) or .jsonl") from None
        if suffix in _TABLES:
            raise BadInput(f"{path} is a table ({suffix[1:]}) and no image; write the paths in it into a .txt or .jsonl list") from None
        if suffix in HEIF_SUFFIXES:  # by its name at least
            raise BadInput(f"{path}: {error}" if READS_HEIF else f"{path}: HEIC pictures are read with {HEIF_WANTS}") from None
        if suffix in NOT_READ:
            raise BadInput(f"{path}: pictures of the kind {suffix[1:].upper()} are not read; convert it to JPEG or PNG") from None
        if suffix in _VIDEOS:
            raise BadInput(f"{path} is a video and no image; write its frames into a folder first") from None
        raise BadInput(f"{path}: {error}") from None


def _tables(path: Path) -> list[Path]:
    """The tables that a path names: itself, or those of a folder in which there are no images."""
    if is_saved_dataset(path):
        return tables_in(path)
    if path.is_dir():
        there = next((file for file in path.rglob("*.parquet") if not file.name.startswith(".")), None)
        return tables_in(path) if there is not None and not _tars(path) and not _walk(path, Counter()) else []
    return [path] if path.is_file() and is_table(path) else []


def _tars(path: Path) -> list[Path]:
    """The shards that a path names: itself, or those of a folder. A folder of images may hold some, which is said.

    Raises:
        BadInput: a folder holds no more images than tars, so that either may be meant.
    """
    if path.is_dir():
        with os.scandir(path) as entries:
            names = [entry.name for entry in entries if entry.name.lower().endswith(".tar") and not entry.name.startswith(".")]
        inside = [path / name for name in sorted(names)]
        images = _walk(path, Counter()) if inside else []
        if not images:
            return inside
        if len(images) <= len(inside):
            raise BadInput(
                f"{path} holds {len(inside):,} tar shards and {len(images):,} images beside them (such as {text(images[0])}): name "
                "the shards "
                f"('{path}/*.tar'), or put the images into a folder of their own"
            )
        log.warning(
            "%s: %s tars beside the images are left out (such as %s); name them if they are wanted", path, len(inside), inside[0].name
        )
        return []
    if path.name.lower().endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")):
        raise BadInput(f"{path} is a compressed tar, within which images cannot be found by their place; unpack it to a plain .tar")
    return [path] if path.suffix.lower() == ".tar" else []


def _walk(root: Path, left_out: Counter[str]) -> Packed:
    """Paths of the images below a folder, relative and with `/`, sorted; each real folder is entered once, so that links cannot loop.

    In `left_out` pictures of kinds that are not read are counted by suffix.
    """
    return Packed(sorted_names(_walked(root, left_out)))


def _walked(root: Path, left_out: Counter[str]) -> Iterator[bytes]:
    seen: set[tuple[int, int]] = set()
    pending, links = [""], list[str]()
    while pending or links:
        # Real folders before links to folders: what is reachable both ways is listed under its own name.
        relative = pending.pop() if pending else links.pop(0)
        folder = root / relative
        inner, linked = list[str](), list[str]()
        try:
            status = folder.stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            entries = os.scandir(folder)
        except OSError as error:
            if not relative:
                raise
            log.warning("the folder %s cannot be read and is left out: %s", folder, error.strerror)
            continue
        with entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                name = f"{relative}/{entry.name}" if relative else entry.name
                if entry.is_dir(follow_symlinks=False):
                    inner.append(name)
                elif entry.is_symlink() and _leads_to_folder(entry):
                    linked.append(name)
                elif (suffix := _suffix(entry.name)) in IMAGE_SUFFIXES:
                    yield name.encode("utf-8", "surrogatepass")
                elif suffix in NOT_READ:
                    left_out[suffix] += 1
        pending += sorted(inner)
        links += sorted(linked)


def _suffix(name: str) -> str:
    """As pathlib has it, in small letters: of ".jpg" and "a." there is none."""
    dot = name.rfind(".")
    return name[dot:].lower() if 0 < dot < len(name) - 1 else ""


def _leads_to_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # links in a circle
        return False


def _listed(path: Path) -> FoundFiles:
    """The entries of a `.txt` or `.jsonl` list: file, name, key where the list gives one."""
    as_json = path.suffix.lower() != ".txt"
    entries: list[tuple[str, str | None]] = []
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
            for number, line in enumerate(lines, start=1):
                text = line.rstrip("\r\n") if not as_json else line.strip()
                if text.strip():
                    entries.append(_json_entry(text, f"{path}, line {number}") if as_json else (text.strip(), None))
    except FileNotFoundError as error:
        raise BadInput(f"the list {path} does not exist") from error
    if not entries:
        raise BadInput(f"the list {path} is empty; expected one image a line")
    address = next((name for name, _ in entries if _ADDRESS.match(name)), None)
    if address is not None:
        column = _field_of(path) if as_json else None
        raise BadInput(
            f"the list {path} names addresses (URLs, such as {address[:80]}), and files are read; download them first: "
            f"{fetching(path, column=column)}"
        )
    base = path.parent
    first = next((name for name, _ in entries if not name.startswith("/")), None)
    if first is not None and not (base / first).exists() and Path(first).exists():
        base = Path()
    root = base.resolve()
    files = packed(os.path.normpath(base / name) for name, _ in entries)
    given = Packed(b"" if key is None else b"=" + key.encode("utf-8", "surrogatepass") for _, key in entries)
    return FoundFiles("", root.name, files, packed(_below(root, name) for name, _ in entries), given if any(given) else None)


def _below(root: Path, name: str) -> str:
    """A file of a list as keys are made from it: relative to the list's folder, or its whole path where it lies elsewhere."""
    absolute = os.path.normpath(root / name)
    relative = os.path.relpath(absolute, root)
    return absolute.lstrip("/") if relative.startswith("..") else relative


def _field_of(path: Path) -> str:
    """The field of a .jsonl list that names its images."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
        first = json.loads(next(line for line in lines if line.strip()))
    return next((field for field in _NAMING if isinstance(first, dict) and isinstance(first.get(field), str)), "url")


def _json_entry(text: str, where: str) -> tuple[str, str | None]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadInput(f'{where} is not JSON; expected {{"image": path}} or a string') from error
    if isinstance(value, str):
        return value, None
    if isinstance(value, dict):
        name = next((value[field] for field in _NAMING if isinstance(value.get(field), str)), None)
        key = value.get("key")
        if name is not None and (key is None or isinstance(key, str)):
            return name, key
    raise BadInput(f'{where}: expected a string or an object with "image" and, if wanted, "key", got {text[:80]}')
