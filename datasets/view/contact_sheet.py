"""One picture made of several: a heading, a large picture, and below it small ones, each with a line of text.

Text is drawn by Pillow, whose font knows more letters than OpenCV's. What a reader would get wrong: pictures are (H, W, 3) uint8 BGR, as
everywhere here, and Pillow's are RGB; black letters on white are the same in both.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from uniter.datasets.view.pictures import ByteImage, resized

MARGIN = 10
HEADING_HEIGHT, CAPTION_HEIGHT = 20, 14  # pixels of letters
TILE = 220  # the longer side of a small picture


def contact_sheet(
    heading: Sequence[str], large: ByteImage, groups: Sequence[tuple[str, Sequence[tuple[str, ByteImage]]]] = ()
) -> ByteImage:
    """Lay out a page.

    Args:
        heading: its lines, above everything; a line that is too long is broken between words.
        large: shown as it is.
        groups: below it, a title and captioned pictures in rows, shrunk to `TILE`; a group without pictures is left out.

    Returns:
        A new picture, as wide as the large one or, where that is narrow, wide enough for three small ones.
    """
    shown = [(title, [(caption, resized(picture, TILE)) for caption, picture in tiles]) for title, tiles in groups if tiles]
    most = max((len(tiles) for _, tiles in shown), default=0)
    width = max(large.shape[1], min(most, 3) * (TILE + MARGIN) - MARGIN, 320)
    parts = [_text(line, width, HEADING_HEIGHT) for line in heading]
    parts.append(large)
    for title, tiles in shown:
        parts.append(_text(title, width, CAPTION_HEIGHT))
        parts += [_beside([_captioned(caption, picture) for caption, picture in row]) for row in _rows(tiles, width)]
    height = MARGIN + sum(part.shape[0] + MARGIN for part in parts)
    page = np.full((height, width + 2 * MARGIN, 3), 255, dtype=np.uint8)
    top = MARGIN
    for part in parts:
        page[top : top + part.shape[0], MARGIN : MARGIN + part.shape[1]] = part
        top += part.shape[0] + MARGIN
    return page


def _rows(tiles: Sequence[tuple[str, ByteImage]], width: int) -> list[list[tuple[str, ByteImage]]]:
    """As many in a row as fit, the last row not padded."""
    rows: list[list[tuple[str, ByteImage]]] = []
    room = 0
    for caption, picture in tiles:
        if not rows or room < picture.shape[1]:
            rows.append([])
            room = width
        rows[-1].append((caption, picture))
        room -= picture.shape[1] + MARGIN
    return rows


def _captioned(caption: str, picture: ByteImage) -> ByteImage:
    below = _text(caption, picture.shape[1], CAPTION_HEIGHT)
    return np.concatenate([picture, below])


def _beside(pictures: Sequence[ByteImage]) -> ByteImage:
    height = max(picture.shape[0] for picture in pictures)
    row = np.full((height, sum(picture.shape[1] + MARGIN for picture in pictures) - MARGIN, 3), 255, dtype=np.uint8)
    left = 0
    for picture in pictures:
        row[: picture.shape[0], left : left + picture.shape[1]] = picture
        left += picture.shape[1] + MARGIN
    return row


def _text(text: str, width: int, letters: int) -> NDArray[np.uint8]:
    """Black on white, `width` pixels wide, as many lines as it takes."""
    font = ImageFont.load_default(letters)
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    step = letters + letters // 2
    image = Image.new("RGB", (width, step * len(lines)), "white")
    draw = ImageDraw.Draw(image)
    for number, line in enumerate(lines):
        draw.text((0, number * step), line, fill="black", font=font)
    return np.asarray(image)
