"""Pictures as arrays of bytes: read, resized and written.

What a reader would get wrong: they are BGR, as OpenCV wants them, and upright; a photograph's size is that of the whole file, also where it
was read smaller.
"""

import re
import warnings
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from uniter.datasets.errors import BadInput

ByteImage = NDArray[np.uint8]


def read_photograph(path: str | Path, *, longest: int | None = None) -> tuple[ByteImage, tuple[int, int]]:
    """Read a photograph upright, in BGR.

    Args:
        path: any image that Pillow reads; EXIF orientation is applied, transparency laid on white, 16 bit brought to 8.
        longest: shrink so that neither side is longer, in pixels; None keeps the size.

    Returns:
        The image, (H, W, 3) uint8 BGR, and the upright size (height, width) that the file has in full.

    Raises:
        BadInput: the file is no image, is damaged, or has more pixels than Pillow believes (its limit against decompression bombs).
    """
    try:
        # Pillow warns of odd files on stderr, in the middle of the progress; what matters of it becomes an error below.
        with warnings.catch_warnings(action="ignore"), Image.open(path) as opened:
            turned = (opened.getexif().get(0x0112) or 1) >= 5
            size = (opened.width, opened.height) if turned else (opened.height, opened.width)
            if longest is not None:
                opened.draft("RGB" if opened.mode in ("RGB", "YCbCr") else None, (longest, longest))
            image = _eight_bit_rgb(ImageOps.exif_transpose(opened))
    except Exception as error:  # Pillow's decoders raise many kinds on damaged files
        raise BadInput(f"{path}: not a readable image ({error}); leave it out or export it again") from error
    if longest is not None:
        image.thumbnail((longest, longest), Image.Resampling.BOX if max(image.size) > 4 * longest else Image.Resampling.LANCZOS)
    return np.ascontiguousarray(np.asarray(image)[:, :, ::-1]), size


def _eight_bit_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return Image.fromarray(np.clip(np.asarray(image, dtype=np.float64) / 257, 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        above = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", above.size, "white"), above).convert("RGB")
    return image.convert("RGB")


def safe_name(name: str) -> str:
    """What of a key or a file's name may be part of a file's name everywhere: letters, digits and "._-" of ASCII, 80 at most."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name)[:80].strip(".")


def resized(image: ByteImage, longest: int) -> ByteImage:
    """The image with its longer side brought to `longest` pixels."""
    scale = longest / max(image.shape[:2])
    if scale == 1:
        return image
    shape = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    return np.asarray(cv2.resize(image, shape, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC), dtype=np.uint8)


def empty_canvas(size: tuple[int, int] | None, *, longest: int) -> ByteImage:
    """A grey picture to draw boxes on where the photograph is missing: of the image's shape, or square where that is unknown."""
    height, width = size or (3, 4)
    scale = longest / max(height, width)
    return np.full((max(1, round(height * scale)), max(1, round(width * scale)), 3), 232, dtype=np.uint8)


def jpeg(image: ByteImage, *, quality: int = 88) -> bytes:
    """A BGR image as the bytes of a JPEG file."""
    encoded, content = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert encoded
    return content.tobytes()


def write_picture(path: Path, image: ByteImage, *, quality: int = 88) -> None:
    """Write a BGR image as JPEG. Raises OSError where it cannot be written."""
    path.write_bytes(jpeg(image, quality=quality))
