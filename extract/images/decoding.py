"""Bytes to upright BGR pixels, or one sentence why not.

Pixels are those of `cv2.imread`: BGR, 8 bit, turned as EXIF says, 16 bit scaled by 1/256, colour profiles left alone. Two things differ:
transparent pixels are laid on white (cv2 shows whatever colour is hidden under them), and a file that ends too early, or whose rest is
zeros, is refused instead of being filled with grey. Files are opened by their content, never by their suffix.

What a reader would get wrong: memory. Pillow's pictures take 4 bytes a pixel and each conversion as much again, so conversions go through
strips of rows; and all threads together stay within `DECODING`, however large the pictures are.
"""

import contextlib
import io
import re
import struct
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterator

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
from uniter.datasets.image_db.photographs import HEIF_WANTS, READS_HEIF

MAX_PIXELS = 178_956_970
"""The most pixels an image may claim before it is refused unread: where Pillow, too, refuses; 512 MiB of RGB."""

DECODING_BYTES = 6  # a pixel, beside the result's 3, at most: what Pillow holds, or a picture before it is turned upright


class MemoryBudget:
    """So many bytes for all threads; who wants more than there are has them all. In the order in which they ask.

    Attributes:
        total: bytes.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self._taken = 0
        self._waiting: deque[object] = deque()
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def taking(self, wanted: int) -> Iterator[None]:
        """Wait until so many bytes are free, and hold them. Not to be nested: two threads would wait for each other."""
        wanted, ticket = min(wanted, self.total), object()
        with self._changed:
            self._waiting.append(ticket)
            try:
                self._changed.wait_for(lambda: self._waiting[0] is ticket and self._taken + wanted <= self.total)
                self._taken += wanted
            finally:
                self._waiting.remove(ticket)
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._taken -= wanted
                self._changed.notify_all()


DECODING = MemoryBudget(1 << 30)
"""What decoding and preparing may take beyond their results, all threads together."""

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


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Decode to upright BGR.

    JPEG, PNG, WebP, GIF and other animations (the first picture), BMP, TIFF, PNM, AVIF, with pillow-heif HEIC. Equal to `cv2.imread` but
    for transparency, which is laid on white, and for CMYK JPEGs without Adobe's marker, whose values are not inverted. 16 bit is scaled by
    1/256.

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
    with DECODING.taking(DECODING_BYTES * width * height):
        return _decoded(header, data)


def _decoded(header: ImageFile.ImageFile, data: bytes) -> NDArray[np.uint8]:
    kind = header.format or "image"
    if header.mode in ("F", "I") and kind == "TIFF":
        raise BadInput("its pixels are 32-bit numbers of unknown range; convert it to 8 or 16 bit")
    try:
        if kind == "PNG":
            _refuse_damaged_png(data)
            return _with_pillow(header, data)
        if kind == "HEIF":
            return _with_pillow(header, data)
        if kind == "WEBP":
            _refuse_zeros_in_webp(data, header.width * header.height)
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
                return _with_pillow(header, data)
        return _upright(_with_cv2(data), _orientation(header, data))
    except (UniterError, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise many kinds
        raise BadInput(f"the {kind} file is damaged ({_sentence(error)})") from error


def _opened(data: bytes) -> ImageFile.ImageFile:
    """Read the header only. The classes are called directly: `Image.open` has one limit on pixels for the whole process."""
    try:
        return refuse_no_image(data)(io.BytesIO(data))
    except UniterError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds
        raise BadInput(f"the file is damaged at its beginning ({_sentence(error)})") from error


Plugin = Callable[[io.BytesIO], ImageFile.ImageFile]


def refuse_no_image(data: bytes) -> Plugin:
    """What opens a file that begins so; BadInput, which says what it is, where nothing does."""
    plugin = next((plugin for begins, plugin in _PLUGINS if begins(data)), None)
    if plugin is None and _is_heif(data):
        raise BadInput(f"it is a HEIC picture, as phones take them, which is read with {HEIF_WANTS}")
    if plugin is None:
        start = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
        if start.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"{")):
            raise BadInput(f"it is no image but text that begins with {start[:20].decode('ascii', 'replace')!r}; was an error page saved?")
        raise BadInput(f"it is no image of a known kind (it begins with {data[:8]!r}; read are JPEG, PNG, WebP, GIF, BMP, TIFF, PNM, AVIF)")
    return plugin


def _begins(*starts: bytes) -> Callable[[bytes], bool]:
    return lambda data: data.startswith(starts)


_PLUGINS: list[tuple[Callable[[bytes], bool], Plugin]] = [
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


def _is_heif(data: bytes) -> bool:
    return data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS and b"avif" not in data[8:64]


_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


if READS_HEIF:
    from pillow_heif import HeifImageFile

    _PLUGINS.append((_is_heif, HeifImageFile))


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
    orientation = 1 if header.format == "TIFF" else _orientation(header, data)
    header.load()
    width, height = header.size
    image = np.empty((height, width, 3), dtype=np.uint8)
    convert = _converter(header)
    rows = max(1, STRIP_BYTES // (4 * width))
    for top in range(0, height, rows):
        strip = header.crop((0, top, width, min(top + rows, height)))
        image[top : top + rows] = convert(strip)
    header.close()  # before the picture is turned, which takes as much again
    return _upright(image, orientation)


STRIP_BYTES = 1 << 20


def _converter(header: Image.Image) -> Callable[[Image.Image], NDArray[np.uint8]]:
    """From a strip of such a picture to BGR."""
    if _has_alpha(header):

        def on_paper(strip: Image.Image) -> NDArray[np.uint8]:
            layer = strip.convert("RGBA")
            return np.asarray(Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB"))[:, :, ::-1]

        return on_paper
    if header.mode == "CMYK" and "adobe" not in header.info and header.format == "JPEG":
        # CMYK without Adobe's marker is stored as ink, 255 the most; Pillow and cv2 take every CMYK JPEG for Adobe's inverted kind.
        return lambda strip: np.asarray(Image.fromarray(255 - np.asarray(strip), mode="CMYK").convert("RGB"))[:, :, ::-1]
    if header.mode.startswith("I") and header.format == "PNG":  # grey of 16 bit
        return lambda strip: (np.asarray(strip).astype(np.uint32) >> 8).astype(np.uint8)[:, :, None]
    return lambda strip: np.asarray(strip.convert("RGB"))[:, :, ::-1]


# --- files that are damaged, though a decoder would fill what is missing ----------------------------------------------------------

_ZEROS = bytes(256)


def _refuse_damaged_png(data: bytes) -> None:
    """Pillow looks at few checksums and stops when all rows are there; here every chunk that matters is held against its checksum."""
    place, ended = 8, False
    while place + 12 <= len(data) and not ended:
        size, kind = struct.unpack_from(">I4s", data, place)
        content = memoryview(data)[place + 4 : place + 8 + size]
        if len(content) < size + 4 or place + 12 + size > len(data):
            break
        if kind[:1].isupper() and zlib.crc32(content) != int.from_bytes(data[place + 8 + size : place + 12 + size], "big"):
            raise BadInput(f"the PNG file is damaged (its {kind.decode('ascii', 'replace')} does not fit its checksum)")
        ended, place = kind == b"IEND", place + 12 + size
    if not ended:
        raise BadInput("the PNG file is damaged or cut off")


def _refuse_cut_jpeg(data: bytes, header: ImageFile.ImageFile) -> None:
    """Some decoders fill what is missing with grey. Within the scan no end marker can occur, so its absence shows the cut."""
    scan = header.fp.tell() if header.fp is not None else 0
    found = data.find(b"\xff\xd9", max(scan - 2, 0))
    end = found if found >= 0 else len(data)
    if data.find(_ZEROS, scan, end) >= 0 and _ends_in_zeros(data, end, progressive="progressive" in header.info):
        raise BadInput("the JPEG file is damaged: a part of it is zeros; was it copied to its end?")
    if found < 0:
        try:
            JpegImagePlugin.JpegImageFile(io.BytesIO(data)).load()  # a few cameras leave out the marker: all rows are there then
        except OSError as error:
            raise BadInput("the JPEG file is cut off") from error


def _ends_in_zeros(data: bytes, end: int, *, progressive: bool) -> bool:
    """Whether the scan that ends there holds zeros in place of a picture: a download that was never finished.

    Zeros are valid codes, and many of them are right where a picture is empty. But they stand for too many blocks or too few: in a whole
    file the last row is there when the last byte is, and not before.
    """
    if progressive:  # its rows are there only after the last scan, which refines and has no long zeros at its end
        return data.endswith(_ZEROS, 0, end)

    def is_done(content: bytes) -> bool:
        picture = JpegImagePlugin.JpegImageFile(io.BytesIO(data))
        picture.load_prepare()
        name, extents, _, arguments = picture.tile[0]
        decoder = Image._getdecoder(picture.mode, name, arguments)
        decoder.setimage(picture.im, extents)
        consumed, fault = decoder.decode(content)
        return consumed < 0 and fault == 0

    return is_done(data[: end - 64]) or not is_done(data[:end] + bytes(16))


def _refuse_zeros_in_webp(data: bytes, pixels: int) -> None:
    """Its decoder takes zeros for a picture. No encoder spends so many on one: a bit for 64 pixels, where an empty one needs far less."""
    place = 12
    while place + 8 <= len(data):
        kind, size = data[place : place + 4], int.from_bytes(data[place + 4 : place + 8], "little")
        content = data[place + 8 : place + 8 + size]
        place += 8 + size + size % 2
        if kind not in (b"VP8 ", b"VP8L") or content.find(_ZEROS) < 0:
            continue
        if max(len(zeros) for zeros in re.findall(rb"\0{256,}", content)) > max(len(_ZEROS), pixels // (64 * 8)):
            raise BadInput("the WebP file is damaged: a part of it is zeros; was it copied to its end?")


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
