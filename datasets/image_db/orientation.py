"""How EXIF says that a photograph is turned, from its headers alone."""

from typing import IO, Any, Final

from PIL import Image

_ORIENTATION: Final = 0x0112
_TURNED: Final = (5, 6, 7, 8)  # these swap width and height
_MAY_HOLD_EXIF: Final = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")


def is_turned(opened: Image.Image) -> bool:
    """Whether width and height of an opened photograph are to be swapped.

    Pillow decodes a whole PNG to look for EXIF behind its pixels; here the chunks are skipped from one to the next instead.
    """
    if opened.format == "PNG" and "exif" not in opened.info and not _says_more_behind(opened.fp):  # type: ignore[attr-defined]
        exif: Any = Image.Image.getexif(opened)
    else:
        exif = opened.getexif()
    return exif.get(_ORIENTATION) in _TURNED


def _says_more_behind(file: IO[bytes]) -> bool:
    """Whether an opened PNG has chunks behind its pixels that may hold EXIF; its place in the file stays."""
    before = file.tell()
    try:
        file.seek(8)
        seen_pixels = False
        while len(head := file.read(8)) == 8:
            kind = head[4:]
            seen_pixels |= kind == b"IDAT"
            if seen_pixels and kind in _MAY_HOLD_EXIF:
                return True
            file.seek(int.from_bytes(head[:4], "big") + 4, 1)
        return False
    finally:
        file.seek(before)
