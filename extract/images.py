"""Which images, in which order, under which keys; and from an image file to upright BGR pixels.

Pixels are those of `cv2.imread`: BGR, 8 bit, turned as EXIF says, 16 bit scaled by 1/256, colour profiles left alone. Two things differ:
transparent pixels are laid on white (cv2 shows whatever colour is hidden under them), and a JPEG that ends too early is refused
instead of being filled with grey. Files are opened by their content, never by their suffix, and only in the formats listed here.
"""

import hashlib
import io
import itertools
import json
import logging
import os
import re
import stat
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from uniter.datasets.errors import BadInput, UniterError
from uniter.datasets.keys import KeyRule, NameParts, key_fault, key_rule

log = logging.getLogger(__name__)

_JPEG, _PNG, _TIFF, _BMP = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"), (".png", ".apng"), (".tif", ".tiff"), (".bmp", ".dib")
IMAGE_SUFFIXES = frozenset((*_JPEG, *_PNG, ".webp", ".gif", *_BMP, *_TIFF, ".ppm", ".pgm", ".pbm", ".pnm", ".avif"))
"""What counts as an image in folders and tars, in upper or lower case; in lists every entry does."""

_RAW = (".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf")
NOT_READ = frozenset((".heic", ".heif", ".jxl", ".jp2", ".j2k", ".svg", ".psd", ".tga", *_RAW))
"""Pictures of kinds that are not read: in folders they are counted aloud, not passed over in silence."""

MAX_PIXELS = 178_956_970
"""The most pixels an image may claim before it is refused unread: where Pillow, too, refuses; 512 MiB of RGB."""

UNIT_IMAGES = 128
"""Images of a unit, where there are no tars. It decides which images share a batch, so it stands in settings.json."""


@dataclass(frozen=True, slots=True)
class ImageItem:
    """One requested image.

    Attributes:
        key: under which it is stored.
        path: as messages show it; `shard.tar/member` within a tar.
        file: the file to open.
        offset, size: the bytes within the file; size -1 means the whole file.
        fault: why it cannot be read, where that is known already.
    """

    key: str
    path: str
    file: str
    offset: int = 0
    size: int = -1
    fault: str | None = None


class ImageList(Protocol):
    """All requested images in their order, cut into fixed units."""

    @property
    def units(self) -> int: ...

    @property
    def images(self) -> int: ...

    @property
    def unit_images(self) -> int | None:
        """Images of a unit; None where a unit is a tar."""

    @property
    def keys_sha256(self) -> str: ...

    def count(self, number: int) -> int:
        """How many images a unit has."""
        ...

    def unit(self, number: int) -> list[ImageItem]:
        """The images of a unit, in order."""
        ...


def list_images(
    images: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], *, key: str | None = None, unit_images: int = UNIT_IMAGES
) -> ImageList:
    """Find the images and make their keys.

    Args:
        images: a folder (searched recursively; hidden files and folders are left out), an image, a `.txt` list (a path a line) or
            `.jsonl` list (`{"image": path, "key": optional}` or a string a line), tar shards (a `.tar`, a brace or glob pattern, a folder
            of tars), or several of one kind. Paths in a list are relative to the list's folder or, if the first is not there, to the
            current folder.
        key: see `keys.key_rule`; None: `stem` for files, `path` (WebDataset's `__key__`) for tars.
        unit_images: how many images make a unit, where there are no tars.

    Raises:
        BadInput: there is nothing, a list is malformed, or two images would get the same key (both are named).
    """
    sources = [images] if isinstance(images, str | os.PathLike) else list(images)
    paths = [path for source in sources for path in _expanded(os.fspath(source))]
    if not paths:
        raise BadInput("no images were named; expected a folder, an image, a list or tar shards")
    tars = [found for path in paths for found in _tars(path)]
    if tars:
        if any(not _tars(path) for path in paths):
            raise BadInput("tar shards and other images were named together; extract them one after the other")
        return TarImages(tars, key_rule(key or "path"))
    rule = key_rule(key or "stem")
    found: list[tuple[str, NameParts, str | None]] = []
    for path in paths:
        if path.is_dir():
            left_out: Counter[str] = Counter()
            files = _walk(path, left_out)
            if left_out:
                kinds = ", ".join(f"{count:,} {suffix}" for suffix, count in sorted(left_out.items()))
                log.warning("%s holds pictures of kinds that are not read: %s; convert them to JPEG or PNG if they are wanted", path, kinds)
            if not files:
                raise BadInput(f"{path} holds no images (looked for {', '.join(sorted(IMAGE_SUFFIXES))}) and no tar shards")
            found += [(str(path / name), NameParts.of_file(name, root=path.resolve().name), None) for name in files]
        elif path.suffix.lower() in (".txt", ".jsonl", ".ndjson"):
            found += _listed(path)
        elif path.exists():
            found.append((str(path), NameParts.of_file(path.name, root=path.resolve().parent.name), None))
        else:
            raise BadInput(f"{path} does not exist; expected a folder, an image, a list or tar shards")
    return FileImages(found, rule, unit_images=unit_images)


class FileImages:
    """Image files, so many to a unit."""

    def __init__(self, found: Sequence[tuple[str, NameParts, str | None]], rule: KeyRule, *, unit_images: int) -> None:
        self._files = [file for file, _, _ in found]
        self._keys = [_text(given) if given is not None else _text(rule(parts)) for _, parts, given in found]
        self.unit_images: int = unit_images
        digests = _digests(self._keys)
        _refuse_equal_keys(digests, lambda: zip(self._keys, self._files, strict=True), otherwise="path")
        self.keys_sha256 = _keys_sha256(self._keys)

    @property
    def units(self) -> int:
        return -(-len(self._files) // self.unit_images)

    @property
    def images(self) -> int:
        return len(self._files)

    def count(self, number: int) -> int:
        """How many images a unit has."""
        return len(self._rows(number))

    def unit(self, number: int) -> list[ImageItem]:
        """The images of a unit, in order."""
        return [_item(self._keys[row], self._files[row], self._files[row]) for row in self._rows(number)]

    def _rows(self, number: int) -> range:
        return range(number * self.unit_images, min((number + 1) * self.unit_images, len(self._files)))


class TarImages:
    """The images of tar shards, a unit a tar. Only the headers are read here, and only numbers are kept."""

    unit_images: int | None = None

    def __init__(self, tars: Sequence[Path], rule: KeyRule) -> None:
        self._tars, self._rule = list(tars), rule
        digests: list[NDArray[np.uint64]] = []
        sha = hashlib.sha256()
        for number in range(len(self._tars)):
            keys = [item.key for item in self.unit(number)]
            digests.append(_digests(keys))
            sha.update(bytes.fromhex(_keys_sha256(keys)))
        together = np.concatenate(digests)
        if not len(together):
            raise BadInput(f"{self._tars[0]}{' and the other shards' if len(self._tars) > 1 else ''}: no images inside")
        _refuse_equal_keys(
            together, lambda: ((item.key, item.path) for n in range(self.units) for item in self.unit(n)), otherwise="'{parent}/{stem}'"
        )
        self.images = len(together)
        self.keys_sha256 = sha.hexdigest()
        self._counts = [len(keys) for keys in digests]

    @property
    def units(self) -> int:
        return len(self._tars)

    def count(self, number: int) -> int:
        """How many images a tar has."""
        return self._counts[number]

    def unit(self, number: int) -> list[ImageItem]:
        """The images of a tar in its order; one more item, with a fault, where the tar is cut off."""
        return list(_tar_items(self._tars[number], self._rule))


# --- finding ---------------------------------------------------------------------------------------------------------------------


def _expanded(text: str) -> list[Path]:
    """Brace patterns (`{00000..00331}`, `{train,val}`) and globs to paths, in order; a path that exists is taken as it is."""
    if os.path.lexists(text):
        return [Path(text)]
    names = _braces(text)
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


def _braces(text: str) -> list[str]:
    match = re.search(r"\{([^{}]*)\}", text)
    if match is None:
        return [text]
    inner = match.group(1)
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", inner)
    if numbers:
        first, last = int(numbers[1]), int(numbers[2])
        if last < first or last - first >= 10_000_000:
            raise BadInput(f"the pattern {{{inner}}} in {text!r} counts from {first} to {last}; expected a rising range")
        width = len(numbers[1]) if len(numbers[1]) > 1 else 0
        choices = [f"{number:0{width}d}" if width else str(number) for number in range(first, last + 1)]
    else:
        choices = inner.split(",")
    return [text[: match.start()] + choice + rest for choice in choices for rest in _braces(text[match.end() :])]


def _tars(path: Path) -> list[Path]:
    """The shards that a path names: itself, or those of a folder that holds tars and no images."""
    if path.is_dir():
        inside = sorted(entry for entry in path.iterdir() if entry.suffix.lower() == ".tar" and not entry.name.startswith("."))
        return [] if not inside or _walk(path, Counter()) else inside
    if path.name.lower().endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")):
        raise BadInput(f"{path} is a compressed tar, within which images cannot be found by their place; unpack it to a plain .tar")
    return [path] if path.suffix.lower() == ".tar" else []


def _walk(root: Path, left_out: Counter[str]) -> list[str]:
    """Paths of the images below a folder, relative and with `/`, sorted; each real folder is entered once, so that links cannot loop.

    In `left_out` pictures of kinds that are not read are counted by suffix.
    """
    found: list[str] = []
    seen: set[tuple[int, int]] = set()
    pending, links = [""], list[str]()
    while pending or links:
        # Real folders before links to folders: what is reachable both ways is listed under its own name.
        relative = pending.pop() if pending else links.pop(0)
        folder = root / relative
        try:
            status = folder.stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            if not relative:
                raise
            log.warning("the folder %s cannot be read and is left out: %s", folder, error.strerror)
            continue
        for entry in entries:
            name = f"{relative}/{entry.name}" if relative else entry.name
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                pending.append(name)
            elif entry.is_symlink() and _leads_to_folder(entry):
                links.append(name)
            elif (suffix := PurePosixPath(entry.name).suffix.lower()) in IMAGE_SUFFIXES:
                found.append(name)
            elif suffix in NOT_READ:
                left_out[suffix] += 1
    return sorted(found)


def _leads_to_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # links in a circle
        return False


def _listed(path: Path) -> list[tuple[str, NameParts, str | None]]:
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
    base = path.parent
    first = next((name for name, _ in entries if not name.startswith("/")), None)
    if first is not None and not (base / first).exists() and Path(first).exists():
        base = Path()
    root = base.resolve()
    found = []
    for name, key in entries:
        file = os.path.normpath(base / name)
        absolute = os.path.normpath(root / name)
        relative = os.path.relpath(absolute, root)
        named = absolute.lstrip("/") if relative.startswith("..") else relative
        found.append((file, NameParts.of_file(named, root=root.name), key))
    return found


def _json_entry(text: str, where: str) -> tuple[str, str | None]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise BadInput(f'{where} is not JSON; expected {{"image": path}} or a string') from error
    if isinstance(value, str):
        return value, None
    if isinstance(value, dict):
        name = next((value[field] for field in ("image", "path", "file_name", "filename") if isinstance(value.get(field), str)), None)
        key = value.get("key")
        if name is not None and (key is None or isinstance(key, str)):
            return name, key
    raise BadInput(f'{where}: expected a string or an object with "image" and, if wanted, "key", got {text[:80]}')


def _tar_items(path: Path, rule: KeyRule) -> Iterator[ImageItem]:
    """The images of a tar, by WebDataset's convention: the key is the path up to the first dot of the last part."""
    shown = _text(str(path))
    last_position = -1
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # the library keeps every header otherwise
                if member.offset <= last_position:
                    raise tarfile.ReadError("its headers run in a circle")
                last_position = member.offset
                item = _tar_item(member, path, shown, rule)
                if item is not None:
                    yield item
    except (tarfile.TarError, EOFError, ValueError) as error:
        # Downloads that were stopped leave such files: what precedes the cut is used.
        yield ImageItem(f"{_text(path.name)}#end", shown, str(path), fault=f"the tar cannot be read to its end ({error}); write it again")


def _tar_item(member: tarfile.TarInfo, path: Path, shown: str, rule: KeyRule) -> ImageItem | None:
    name = _text(member.name.removeprefix("./"))
    folders, _, last = name.rpartition("/")
    if member.isdir() or last.startswith(".") or PurePosixPath(last).suffix.lower() not in IMAGE_SUFFIXES:
        return None
    stem = last.split(".", 1)[0]
    parts = NameParts(last, stem, folders.rpartition("/")[2] or _text(path.stem), f"{folders}/{stem}" if folders else stem)
    fault = None
    if name.startswith("/") or ".." in name.split("/"):
        fault = "its name in the tar leads outside the tar"
    elif not member.isreg() or member.issparse():
        fault = "it is a link or a special file in the tar, not an image"
    return _item(rule(parts), f"{shown}/{name}", str(path), member.offset_data, member.size, fault)


def _item(key: str, path: str, file: str, offset: int = 0, size: int = -1, fault: str | None = None) -> ImageItem:
    key = _text(key)
    return ImageItem(key, _text(path), file, offset, size, fault or key_fault(key))


def _text(name: str) -> str:
    """A file name as text: bytes that are not UTF-8 become `\\udcXX`, visibly."""
    return name.encode("utf-8", "backslashreplace").decode()


def _digests(keys: Sequence[str]) -> NDArray[np.uint64]:
    packed = b"".join(hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)
    return np.frombuffer(packed, dtype=np.uint64)


def _keys_sha256(keys: Sequence[str]) -> str:
    sha = hashlib.sha256()
    for key in keys:
        encoded = key.encode()
        sha.update(len(encoded).to_bytes(4, "little") + encoded)
    return sha.hexdigest()


def _refuse_equal_keys(digests: NDArray[np.uint64], pairs: Callable[[], Iterator[tuple[str, str]]], *, otherwise: str) -> None:
    """BadInput where images share a key; `otherwise` is the rule that tells images of different folders or tars apart."""
    values, counts = np.unique(digests, return_counts=True)
    suspects = set(values[counts > 1].tolist())
    if not suspects:
        return
    files: dict[str, list[str]] = {}
    for (key, file), digest in zip(pairs(), digests.tolist(), strict=True):
        if digest in suspects:
            files.setdefault(key, []).append(file)
    equal = {key: names for key, names in files.items() if len(names) > 1}
    if equal:
        key, names = next(iter(equal.items()))
        others = f" ({len(equal)} keys are not unique)" if len(equal) > 1 else ""
        if len(set(names)) < len(names):
            raise BadInput(f"{_text(names[0])} is named {names.count(names[0])} times{others}; name it once")
        beside = len({name.rpartition("/")[0] for name in names}) < len(names)
        other = "'{name}'" if beside else otherwise
        raise BadInput(
            f"{' and '.join(_text(name) for name in names[:3])} would all get the key {key!r}{others}; choose another --key, "
            f"for instance --key {other}"
        )


# --- reading ---------------------------------------------------------------------------------------------------------------------


def read_bytes(item: ImageItem, *, max_pixels: int = MAX_PIXELS) -> bytes:
    """The bytes of an image, refused unread where the file is larger than any image of `max_pixels` pixels.

    Raises:
        BadInput: a known fault, an empty or oversized file, no ordinary file, or the tar changed.
        OSError: the file cannot be opened or read.
    """
    if item.fault is not None:
        raise BadInput(item.fault)
    limit = 8 * max_pixels + (16 << 20)  # four channels of 16 bit, and whatever stands beside the pixels
    # Opening a named pipe would wait for ever.
    with open(os.open(item.file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise BadInput("it is no ordinary file")
        size = item.size if item.size >= 0 else status.st_size
        if size > limit:
            raise BadInput(f"the file has {size:,} bytes, more than {max_pixels:,} pixels need; raise --max-pixels if it is an image")
        file.seek(item.offset)
        data = file.read(size)
    if len(data) < size:
        raise BadInput(f"the file ends after {len(data):,} of {size:,} bytes; copy it again")
    if not data:
        raise BadInput("the file is empty")
    return data


_WITH_ALPHA = ("RGBA", "LA", "PA", "La", "RGBa")
_TURNS: dict[int, Callable[[NDArray[np.uint8]], NDArray[np.uint8]]] = {
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.transpose(1, 0, 2),
    6: lambda image: image.transpose(1, 0, 2)[:, ::-1],
    7: lambda image: image.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda image: image.transpose(1, 0, 2)[::-1],
}
"""EXIF orientation to upright."""


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Decode to upright BGR.

    JPEG, PNG, WebP, GIF and other animations (the first picture), BMP, TIFF, PNM, AVIF. Equal to `cv2.imread` but for transparency, which
    is laid on white, and for CMYK JPEGs without Adobe's marker, whose values are not inverted. 16 bit is scaled by 1/256.

    Args:
        data: the file.
        max_pixels: an image that claims more is refused before anything is decoded.

    Returns:
        (H, W, 3) uint8, contiguous.

    Raises:
        BadInput: it is no image, it is damaged or cut off, it has too many pixels, or its pixels are 32-bit numbers.
    """
    header = _opened(data)
    width, height = header.size
    if width < 1 or height < 1:
        raise BadInput(f"an image of {width} x {height} pixels")
    if width * height > max_pixels:
        raise BadInput(f"it claims {width} x {height} pixels and at most {max_pixels:,} are read; raise --max-pixels if that is right")
    kind = header.format or "image"
    if header.mode in ("F", "I") and kind == "TIFF":
        raise BadInput("its pixels are 32-bit numbers of unknown range; convert it to 8 or 16 bit")
    try:
        if _has_alpha(header):
            return _with_pillow(header, data)
        if kind == "AVIF" and not cv2.haveImageWriter(".avif"):  # OpenCV was built without it
            return _with_pillow(header, data)
        if kind == "TIFF":
            # Both libraries turn a TIFF by themselves.
            return _with_cv2(data) if header.mode in ("1", "L", "RGB", "P", "I;16", "I;16B") else _with_pillow(header, data)
        if kind == "JPEG":
            _refuse_cut_jpeg(data, header)
            if header.mode == "CMYK" and "adobe" not in header.info:
                return _upright(_straight_cmyk(header), _orientation(header, data))
        return _upright(_with_cv2(data), _orientation(header, data))
    except (UniterError, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise many kinds
        raise BadInput(f"the {kind} file is damaged ({_sentence(error)})") from error


def _opened(data: bytes) -> ImageFile.ImageFile:
    """Read the header only. The classes are called directly: `Image.open` has one limit on pixels for the whole process."""
    plugin = next((plugin for begins, plugin in _PLUGINS if begins(data)), None)
    if plugin is None:
        start = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
        if start.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"{")):
            raise BadInput(f"it is no image but text that begins with {start[:20].decode('ascii', 'replace')!r}; was an error page saved?")
        raise BadInput(f"it is no image of a known kind (it begins with {data[:8]!r}; read are JPEG, PNG, WebP, GIF, BMP, TIFF, PNM, AVIF)")
    try:
        return plugin(io.BytesIO(data))
    except Exception as error:  # Pillow's decoders raise many kinds
        raise BadInput(f"the file is damaged at its beginning ({_sentence(error)})") from error


def _begins(*starts: bytes) -> Callable[[bytes], bool]:
    return lambda data: data.startswith(starts)


_PLUGINS: list[tuple[Callable[[bytes], bool], Callable[[io.BytesIO], ImageFile.ImageFile]]] = [
    (_begins(b"\xff\xd8\xff"), JpegImagePlugin.JpegImageFile),
    (_begins(b"\x89PNG\r\n\x1a\n"), PngImagePlugin.PngImageFile),
    (lambda data: data[:4] == b"RIFF" and data[8:12] == b"WEBP", WebPImagePlugin.WebPImageFile),
    (_begins(b"GIF87a", b"GIF89a"), GifImagePlugin.GifImageFile),
    (_begins(b"BM"), BmpImagePlugin.BmpImageFile),
    (_begins(b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), TiffImagePlugin.TiffImageFile),
    (lambda data: data[:1] == b"P" and data[1:2] in b"123456" and data[2:3] in b" \t\r\n", PpmImagePlugin.PpmImageFile),
]
try:
    from PIL import AvifImagePlugin
except ImportError:  # Pillow before 11.3
    pass
else:
    _PLUGINS.append((lambda data: data[4:8] == b"ftyp" and b"avif" in data[8:64], AvifImagePlugin.AvifImageFile))


def _has_alpha(header: Image.Image) -> bool:
    return header.mode in _WITH_ALPHA or ("transparency" in header.info and not header.mode.startswith("I"))


def _with_cv2(data: bytes) -> NDArray[np.uint8]:
    try:
        image = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error as error:
        raise BadInput(f"the file cannot be decoded ({_sentence(error)})") from error
    if image is None:
        raise BadInput("the file is damaged or cut off")
    return np.asarray(image, dtype=np.uint8)


def _with_pillow(header: ImageFile.ImageFile, data: bytes) -> NDArray[np.uint8]:
    turned = header.format == "TIFF"
    if _has_alpha(header):
        layer = header.convert("RGBA")
        paper = Image.new("RGBA", layer.size, "white")
        flat = Image.alpha_composite(paper, layer).convert("RGB")
    else:
        flat = header.convert("RGB")
    image = np.asarray(flat)[:, :, ::-1]
    return np.ascontiguousarray(image) if turned else _upright(image, _orientation(header, data))


def _straight_cmyk(header: ImageFile.ImageFile) -> NDArray[np.uint8]:
    """CMYK without Adobe's marker is stored as ink, 255 the most; Pillow and cv2 take every CMYK JPEG for Adobe's inverted kind."""
    header.load()
    ink = Image.fromarray(255 - np.asarray(header), mode="CMYK")
    return np.asarray(ink.convert("RGB"))[:, :, ::-1]


def _refuse_cut_jpeg(data: bytes, header: ImageFile.ImageFile) -> None:
    """Some decoders fill what is missing with grey. Within the scan no end marker can occur, so its absence shows the cut."""
    scan = header.fp.tell() if header.fp is not None else 0
    if data.find(b"\xff\xd9", max(scan - 2, 0)) < 0:
        try:
            header.copy()  # a few cameras leave out the marker: all rows are there then
        except OSError as error:
            raise BadInput("the JPEG file is cut off") from error


def _orientation(header: Image.Image, data: bytes) -> int:
    # Pillow decodes a whole PNG to look for EXIF behind the pixels.
    if header.format == "PNG" and b"eXIf" not in data:
        return 1
    try:
        return int(header.getexif().get(0x0112, 1))
    except Exception:  # a damaged EXIF block does not spoil the picture
        return 1


def _upright(image: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    turn = _TURNS.get(orientation)
    return np.ascontiguousarray(turn(image) if turn else image)


def _sentence(error: BaseException) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:200]
