"""EXIF of photographs, without their pixels."""

import io
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

from uniter.datasets.image_db.orientation import is_turned


def png(orientation: int, *, behind: bool) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.new("RGB", (300, 200)).save(buffer, "PNG", exif=exif)
    data = buffer.getvalue()
    if behind:
        start = data.index(b"eXIf") - 4
        size = 12 + struct.unpack(">I", data[start : start + 4])[0]
        chunk, data = data[start : start + size], data[:start] + data[start + size :]
        end = data.index(b"IEND") - 4
        data = data[:end] + chunk + data[end:]
    return data


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize(("orientation", "turned"), [(1, False), (3, False), (5, True), (6, True), (8, True)])
def test_a_png_says_it_before_or_behind_its_pixels(behind: bool, orientation: int, turned: bool) -> None:
    with Image.open(io.BytesIO(png(orientation, behind=behind))) as opened:
        assert is_turned(opened) is turned


def test_a_png_without_exif_is_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.effect_noise((640, 480), 80).save(tmp_path / "plain.png")
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda self: pytest.fail("it was decoded"))
    with Image.open(tmp_path / "plain.png") as opened:
        assert is_turned(opened) is False


def test_a_broken_chunk_ends_the_search() -> None:
    data = png(1, behind=False)
    cut = data[: data.index(b"IDAT") + 20]
    with Image.open(io.BytesIO(cut + zlib.compress(b"x")[:3])) as opened:
        assert is_turned(opened) is False
