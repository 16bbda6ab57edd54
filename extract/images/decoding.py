"""Bytes to upright BGR pixels, or one sentence why not."""

import io
from collections.abc import Callable

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

MAX_PIXELS = 178_956_970


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
