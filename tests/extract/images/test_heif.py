"""Phones' photographs: read with pillow-heif, and an answer that names it where it is not there."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from uniter.datasets.errors import BadInput
from uniter.datasets.image_db.formats.records import ImageSizes
from uniter.datasets.view.pictures import read_photograph
from uniter.extract.images import decode_image, list_images

HEADER = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(400)

WITHOUT = """
import logging, sys
import importlib.util
sys.modules["pillow_heif"] = None
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "pillow_heif" else find(name, *rest)
from pathlib import Path
from uniter.datasets.errors import BadInput
from uniter.extract.images import decode_image, list_images
logging.basicConfig(stream=sys.stdout, format="%(message)s")
folder = Path(sys.argv[1])
print(list_images(folder).images)
for ask in (lambda: list_images(folder / "IMG_1.HEIC"), lambda: decode_image((folder / "IMG_1.HEIC").read_bytes())):
    try:
        ask()
    except BadInput as error:
        print(error)
"""


def test_without_the_package_the_message_names_the_extra(tmp_path: Path) -> None:
    (tmp_path / "IMG_1.HEIC").write_bytes(HEADER)
    Image.new("RGB", (8, 6)).save(tmp_path / "a.jpg")
    done = subprocess.run([sys.executable, "-c", WITHOUT, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counted, one, listed, decoded = done.stdout.splitlines()
    named = "pillow-heif: pip install 'uniter-toolkit[heic]'"
    assert "kinds that are not read: 1 .heic" in counted and counted.endswith(named) and one == "1"
    assert listed == f"{tmp_path / 'IMG_1.HEIC'}: HEIC pictures are read with {named}"
    assert decoded == f"it is a HEIC picture, as phones take them, which is read with {named}"


@pytest.fixture
def photograph(tmp_path: Path) -> Path:
    """A picture, red above and blue below, that lies on its side in the file, as phones write it."""
    pillow_heif = pytest.importorskip("pillow_heif", reason="pillow-heif is not installed: pip install 'uniter-toolkit[heic]'")
    pixels = np.zeros((40, 64, 3), np.uint8)
    pixels[:, :32], pixels[:, 32:] = (255, 0, 0), (0, 0, 255)
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6
    pillow_heif.register_heif_opener()
    image.save(tmp_path / "IMG_1.HEIC", quality=90, exif=exif.tobytes())
    return tmp_path / "IMG_1.HEIC"


def test_with_it_they_are_upright_bgr_like_any_other(photograph: Path, tmp_path: Path) -> None:
    image = decode_image(photograph.read_bytes())
    assert image.shape == (64, 40, 3) and image.dtype == np.uint8
    assert image[5, 20, 2] > 200 > 60 > image[5, 20, 0] and image[60, 20, 0] > 200 > 60 > image[60, 20, 2]
    assert [item.key for item in list_images(tmp_path).unit(0)] == [item.key for item in list_images(photograph).unit(0)] == ["IMG_1"]
    assert ImageSizes(tmp_path).find("IMG_1") == (64, 40)
    assert read_photograph(photograph)[1] == (64, 40)
    with pytest.raises(BadInput, match="at most 100 are read"):
        decode_image(photograph.read_bytes(), max_pixels=100)


def test_damaged_ones_are_said(photograph: Path) -> None:
    content = photograph.read_bytes()
    for broken in (HEADER, content[: len(content) // 2], content[:40]):
        with pytest.raises(BadInput, match="damaged"):
            decode_image(broken)


def test_transparent_ones_lie_on_white(photograph: Path) -> None:
    stream = io.BytesIO()
    Image.new("RGBA", (32, 32), (0, 0, 0, 0)).save(stream, "HEIF")
    assert int(decode_image(stream.getvalue()).min()) > 250
