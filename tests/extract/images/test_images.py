"""Pixels equal cv2.imread's, in every format; every broken file is a sentence; lists, folders, tars and keys."""

import io
import json
import os
import struct
import tarfile
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image, features

from uniter.datasets.errors import BadInput
from uniter.datasets.image_db import ImageDB
from uniter.datasets.image_db.keys import NameParts, key_fault, key_rule
from uniter.extract import extract_images
from uniter.extract.images.decoding import decode_image
from uniter.extract.images.items import read_bytes
from uniter.extract.images.listing import list_images

rng = np.random.default_rng(7)
PICTURE = cv2.resize(rng.integers(0, 256, (6, 9, 3), dtype=np.uint8), (64, 48), interpolation=cv2.INTER_CUBIC)  # BGR
RGB = Image.fromarray(np.ascontiguousarray(PICTURE[:, :, ::-1]))


def saved(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def imread(data: bytes, folder: Path, suffix: str) -> Any:
    path = folder / f"image{suffix}"
    path.write_bytes(data)
    return cv2.imread(str(path))


KINDS: list[tuple[str, str, dict[str, Any], tuple[str, ...]]] = [
    ("JPEG", ".jpg", {"quality": 90}, ("RGB", "L")),
    ("JPEG", ".jpg", {"quality": 75, "progressive": True}, ("RGB", "L")),
    ("PNG", ".png", {}, ("RGB", "L", "P", "1")),
    ("WEBP", ".webp", {"quality": 80}, ("RGB", "L")),
    ("WEBP", ".webp", {"lossless": True}, ("RGB", "L")),
    ("BMP", ".bmp", {}, ("RGB", "L", "P", "1")),
    ("TIFF", ".tif", {}, ("RGB", "L", "P", "1")),
    ("TIFF", ".tif", {"compression": "tiff_lzw"}, ("RGB", "L", "P", "1")),
    ("PPM", ".ppm", {}, ("RGB", "L", "1")),
    ("GIF", ".gif", {}, ("RGB", "L", "P", "1")),
    *([("AVIF", ".avif", {}, ("RGB", "L"))] if features.check("avif") else []),
]


@pytest.mark.parametrize(
    ("kind", "suffix", "options", "mode"), [(kind, suffix, options, mode) for kind, suffix, options, modes in KINDS for mode in modes]
)
def test_pixels_are_those_of_imread(kind: str, suffix: str, options: dict[str, Any], mode: str, tmp_path: Path) -> None:
    data = saved(RGB.convert(mode), kind, **options)
    decoded = decode_image(data)
    assert decoded.dtype == np.uint8 and decoded.flags.c_contiguous
    np.testing.assert_array_equal(decoded, imread(data, tmp_path, suffix))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("kind", "suffix"), [("JPEG", ".jpg"), ("PNG", ".png"), ("WEBP", ".webp"), ("TIFF", ".tif")])
def test_exif_orientation(kind: str, suffix: str, orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    data = saved(RGB, kind, exif=exif, **options)
    turned = decode_image(data)
    assert turned.shape == ((48, 64, 3) if orientation < 5 else (64, 48, 3))
    if kind != "TIFF":  # cv2 turns TIFFs by itself, and not in all versions
        np.testing.assert_array_equal(turned, imread(data, tmp_path, suffix))
    upright = decode_image(saved(RGB, kind, **options))
    expected = {
        1: upright,
        2: upright[:, ::-1],
        3: np.rot90(upright, 2),
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, -1),
        7: np.rot90(upright.transpose(1, 0, 2), 2),
        8: np.rot90(upright, 1),
    }[orientation]
    np.testing.assert_array_equal(turned, expected)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("channels", [1, 3])
def test_16_bit_is_scaled_not_clipped(kind: str, channels: int) -> None:
    values = np.linspace(0, 65535, 48 * 64 * channels).reshape(48, 64, channels).astype(np.uint16)
    data = cv2.imencode({"PNG": ".png", "TIFF": ".tif"}[kind], values)[1].tobytes()
    decoded = decode_image(data).astype(int)
    assert decoded.min() == 0 and decoded.max() == 255
    assert np.abs(decoded - (values >> 8)).max() <= 1


@pytest.mark.parametrize(("kind", "mode"), [("PNG", "RGBA"), ("PNG", "LA"), ("WEBP", "RGBA"), ("TIFF", "RGBA")])
def test_transparency_is_laid_on_white(kind: str, mode: str) -> None:
    alpha = np.zeros((48, 64), np.uint8)
    alpha[:, 20:40], alpha[:, 40:] = 128, 255
    layered = RGB.copy()
    layered.putalpha(Image.fromarray(alpha))
    opaque = decode_image(saved(RGB.convert("L") if mode == "LA" else RGB, "PNG"))
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    decoded = decode_image(saved(layered.convert(mode), kind, **options))
    assert (decoded[:, :20] == 255).all()
    np.testing.assert_array_equal(decoded[:, 40:], opaque[:, 40:])
    half = opaque[:, 20:40] * (128 / 255) + 255 * (127 / 255)
    assert np.abs(decoded[:, 20:40] - half).max() <= 1.01


def test_palette_with_transparency() -> None:
    palette = RGB.quantize(8)
    data = saved(palette, "PNG", transparency=3)
    decoded = decode_image(data)
    where = np.asarray(palette) == 3
    assert where.any() and (decoded[where] == 255).all()
    np.testing.assert_array_equal(decoded[~where], np.asarray(palette.convert("RGB"))[~where][:, ::-1])


def test_cmyk_with_and_without_adobes_inversion() -> None:
    ink = RGB.convert("CMYK")
    adobe = saved(ink, "JPEG", quality=100, subsampling=0)
    assert b"Adobe" in adobe
    assert np.abs(decode_image(adobe).astype(int) - PICTURE).mean() < 4
    # The other kind stores ink as it is and bears no marker.
    start = adobe.index(b"\xff\xee")
    length = int.from_bytes(adobe[start + 2 : start + 4], "big")
    inverted = saved(Image.fromarray(255 - np.asarray(ink), mode="CMYK"), "JPEG", quality=100, subsampling=0)
    straight = inverted[:start] + inverted[start + 2 + length :]
    assert b"Adobe" not in straight
    assert np.abs(decode_image(straight).astype(int) - PICTURE).mean() < 4


def test_colour_profiles_are_left_alone() -> None:
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    np.testing.assert_array_equal(decode_image(saved(RGB, "PNG", icc_profile=profile)), PICTURE)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animations_give_their_first_picture(kind: str) -> None:
    second = Image.fromarray(255 - np.asarray(RGB))
    options = {"lossless": True} if kind == "WEBP" else {}
    first = decode_image(saved(RGB, kind, **options))
    assert np.abs(decode_image(saved(RGB, kind, save_all=True, append_images=[second], **options)).astype(int) - first).max() <= 2


@pytest.mark.parametrize("size", [(1, 1), (5000, 1), (1, 5000)])
def test_extreme_sizes_are_decoded(size: tuple[int, int]) -> None:
    assert decode_image(saved(Image.new("RGB", size, "red"), "PNG")).shape == (size[1], size[0], 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_cut_off_files_are_refused(kind: str, share: float) -> None:
    data = saved(RGB.resize((320, 240)), kind)
    with pytest.raises(BadInput):
        decode_image(data[: int(len(data) * share)])


def test_jpeg_with_a_thumbnail_is_still_found_cut() -> None:
    thumbnail = saved(RGB.resize((16, 12)), "JPEG")
    whole = saved(RGB.resize((320, 240)), "JPEG")
    block = b"\xff\xed" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail  # an end marker before the picture begins
    framed = whole[:2] + block + whole[2:]
    np.testing.assert_array_equal(decode_image(framed), decode_image(whole))
    with pytest.raises(BadInput, match=r"cut off|damaged"):
        decode_image(framed[: len(framed) * 2 // 3])


def test_jpeg_followed_by_anything_is_read() -> None:
    data = saved(RGB, "JPEG")
    np.testing.assert_array_equal(decode_image(data + b"trailing bytes"), decode_image(data))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"<!DOCTYPE html><html><body>404</body></html>", "error page"),
        (b'  {"error": "not found"}', "error page"),
        (b"%PDF-1.4 ...", "no image of a known kind"),
        (b"\x00" * 100, "no image of a known kind"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image of a known kind"),
        (b"\xff\xd8\xff\xe0", "damaged"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 40, "damaged"),
    ],
)
def test_what_is_no_image(data: bytes, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        decode_image(data)


def png_that_claims(width: int, height: int) -> bytes:
    """A PNG whose header says this size and whose pixels are missing."""
    data = bytearray(saved(Image.new("L", (1, 1)), "PNG"))
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def test_bombs_are_refused_before_they_are_decoded() -> None:
    bomb = png_that_claims(65_000, 65_000)  # 4 gigapixels
    with pytest.raises(BadInput, match=r"65000 x 65000 pixels and at most 178,956,970.*--max-pixels"):
        decode_image(bomb)
    with pytest.raises(BadInput, match="at most 3,071"):
        decode_image(saved(RGB, "JPEG"), max_pixels=48 * 64 - 1)
    assert decode_image(saved(RGB, "JPEG"), max_pixels=48 * 64).shape == (48, 64, 3)


def test_a_limit_above_pillows_own_can_be_chosen() -> None:
    wide = png_that_claims(19_000, 10_000)  # Pillow itself refuses 179 megapixels
    with pytest.raises(BadInput, match=r"claims 19000 x 10000 pixels"):
        decode_image(wide)
    with pytest.raises(BadInput, match="damaged"):  # let through, and found to hold no pixels
        decode_image(wide, max_pixels=200_000_000)


def test_floating_point_tiff_is_refused() -> None:
    with pytest.raises(BadInput):
        decode_image(cv2.imencode(".tiff", PICTURE.astype(np.float32))[1].tobytes())


# --- lists -----------------------------------------------------------------------------------------------------------------------


def put(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path.with_suffix(".png")), np.full((8, 8, 3), value, np.uint8))
    path.with_suffix(".png").rename(path)
    return path


def keys(source: Any, **options: Any) -> list[str]:
    listed = list_images(source, **options)
    return [item.key for number in range(listed.units) for item in listed.unit(number)]


def test_folder_is_searched_sorted_and_survives_link_loops(tmp_path: Path) -> None:
    for name in ("b/2.JPG", "b/10.jpeg", "a/z.png", "Top.webp", ".hidden/no.jpg", "b/._2.jpg", "notes.txt"):
        put(tmp_path / name)
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    (tmp_path / "a" / "self").symlink_to(tmp_path / "a" / "self")
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    assert keys(tmp_path, key="path") == ["Top", "a/z", "b/10", "b/2", "gone"]
    assert keys(tmp_path) == ["Top", "z", "10", "2", "gone"]


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere" / "x.jpg")
    put(tmp_path / "photos" / "y.jpg")
    (tmp_path / "photos" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos" / "again").symlink_to(tmp_path / "elsewhere")
    assert keys(tmp_path / "photos", key="path") == ["again/x", "y"]


def test_units_are_fixed(tmp_path: Path) -> None:
    for number in range(7):
        put(tmp_path / f"{number}.jpg")
    listed = list_images(tmp_path, unit_images=3)
    assert (listed.units, listed.images) == (3, 7)
    assert [[item.key for item in listed.unit(n)] for n in range(3)] == [["0", "1", "2"], ["3", "4", "5"], ["6"]]
    assert [listed.count(n) for n in range(3)] == [3, 3, 1]


def test_equal_keys_name_the_files(tmp_path: Path) -> None:
    put(tmp_path / "train" / "1.jpg")
    put(tmp_path / "val" / "1.jpg")
    with pytest.raises(BadInput, match=r"train/1\.jpg and .*val/1\.jpg would all get the key '1'.*--key path"):
        list_images(tmp_path)
    assert keys(tmp_path, key="path") == ["train/1", "val/1"]
    assert keys(tmp_path, key="{parent}_{name}") == ["train_1.jpg", "val_1.jpg"]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["cat.jpg", "cat.png"], "--key '{name}'"),
        (["a/cat.jpg", "b/cat.png"], "--key path"),
        ((["cat.jpg"] * 2), r"cat.jpg is named 2 times; name it once"),
    ],
)
def test_equal_keys_are_answered_with_a_rule_that_helps(files: list[str], said: str, tmp_path: Path) -> None:
    for name in files:
        put(tmp_path / name)
    (tmp_path / "list.txt").write_text("\n".join(files))
    with pytest.raises(BadInput) as caught:
        list_images(tmp_path / "list.txt")
    assert said in str(caught.value)
    if "--key" in said:
        assert len(set(keys(tmp_path / "list.txt", key=said.removeprefix("--key ").strip("'")))) == 2


def test_pictures_that_are_not_read_are_counted_aloud(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path / "a.jpg")
    for name in ("IMG_1.TGA", "sub/IMG_2.tga", "b.jxl", "notes.txt", ".hidden.tga"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert keys(tmp_path) == ["a"]
    assert "kinds that are not read: 1 .jxl, 2 .tga; convert them" in caplog.text
    with pytest.raises(BadInput, match=r"b\.jxl: the file is empty"):
        list_images(tmp_path / "b.jxl")
    (tmp_path / "b.jxl").write_bytes(b"\xff\x0a" + bytes(50))
    with pytest.raises(BadInput, match=r"b\.jxl: pictures of the kind JXL are not read"):
        list_images(tmp_path / "b.jxl")
    with pytest.raises(BadInput, match="no image of a known kind"):
        decode_image(b"\0\0\0\x18ftypisom" + b"\0" * 50)


def test_names_that_differ_in_case_are_two_images(tmp_path: Path) -> None:
    put(tmp_path / "A.jpg")
    put(tmp_path / "a.JPG")
    assert keys(tmp_path) == ["A", "a"]


def test_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "sub" / "one.jpg")
    put(tmp_path / "two.gif")
    (tmp_path / "list.txt").write_bytes("\ufefftwo.gif\r\n\r\nsub/one.jpg\r\nsub/missing.jpg".encode())
    assert keys(tmp_path / "list.txt") == ["two", "one", "missing"]
    assert keys(tmp_path / "list.txt", key="path") == ["two", "sub/one", "sub/missing"]
    (tmp_path / "list.jsonl").write_text('{"image": "two.gif", "key": "second"}\n"sub/one.jpg"\n{"file_name": "sub/one.jpg", "key": "x"}\n')
    assert keys(tmp_path / "list.jsonl") == ["second", "one", "x"]
    (tmp_path / "bad.jsonl").write_text('{"image": "two.gif"}\n{"caption": "two"}\n')
    with pytest.raises(BadInput, match=r"bad\.jsonl, line 2: expected a string or an object"):
        list_images(tmp_path / "bad.jsonl")
    # Relative to the current folder, where the first is not beside the list.
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "here.txt").write_text("sub/one.jpg\n")
    monkeypatch.chdir(tmp_path)
    listed = list_images(Path("lists/here.txt"))
    assert read_bytes(listed.unit(0)[0])


def test_what_is_absent_is_said(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="does not exist"):
        list_images(tmp_path / "nowhere")
    with pytest.raises(BadInput, match="holds no images"):
        list_images(tmp_path)
    with pytest.raises(BadInput, match="and 2 more of 3"):
        list_images(str(tmp_path / "{000..002}.tar"))
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(BadInput, match="is empty"):
        list_images(tmp_path / "empty.txt")
    (tmp_path / "x.tar.gz").write_bytes(b"")
    with pytest.raises(BadInput, match="compressed tar"):
        list_images(tmp_path / "x.tar.gz")


def make_tar(path: Path, members: dict[str, bytes], change: Callable[[tarfile.TarInfo], None] = lambda member: None) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            change(member)
            tar.addfile(member, io.BytesIO(content))
    return path


PNG = saved(RGB, "PNG")


def test_tar_shards_by_webdatasets_key(tmp_path: Path) -> None:
    for shard in range(3):
        make_tar(
            tmp_path / f"{shard:05d}.tar",
            {
                f"{shard:05d}0001.json": b"{}",
                f"{shard:05d}0001.jpg": saved(RGB, "JPEG"),
                f"{shard:05d}0001.txt": b"a caption",
                f"./deep/{shard}.two.png": PNG,
            },
        )
    pattern = str(tmp_path / "{00000..00002}.tar")
    listed = list_images(pattern)
    assert (listed.units, listed.images, [listed.count(n) for n in range(3)]) == (3, 6, [2, 2, 2])
    assert [item.key for item in listed.unit(1)] == ["000010001", "deep/1"]
    np.testing.assert_array_equal(decode_image(read_bytes(listed.unit(1)[1])), PICTURE)
    assert listed.unit(1)[1].path == f"{tmp_path}/00001.tar/deep/1.two.png"
    # A folder of shards, a glob and a list of paths are the same work.
    for same in (tmp_path, str(tmp_path / "*.tar"), [tmp_path / f"{n:05d}.tar" for n in range(3)], str(tmp_path / "0000{0,1,2}.tar")):
        assert list_images(same).keys_sha256 == listed.keys_sha256
    assert keys(pattern, key="{stem}.npz")[:2] == ["000000001.npz", "0.npz"]


def test_equal_keys_across_tars(tmp_path: Path) -> None:
    make_tar(tmp_path / "a.tar", {"1.png": PNG})
    make_tar(tmp_path / "b.tar", {"1.png": PNG})
    with pytest.raises(BadInput, match=r"a\.tar/1\.png and .*b\.tar/1\.png would all get the key '1'.*--key '\{parent\}/\{stem\}'"):
        list_images(tmp_path)
    assert keys(tmp_path, key="{parent}/{stem}") == ["a/1", "b/1"]


def test_hostile_tars(tmp_path: Path) -> None:
    make_tar(tmp_path / "out.tar", {"../../etc/passwd.png": PNG, "/abs/x.png": PNG, "good.png": PNG})
    faults = {item.key: item.fault for item in list_images(tmp_path / "out.tar").unit(0)}
    assert "outside" in str(faults["../../etc/passwd"]) and "outside" in str(faults["/abs/x"]) and faults["good"] is None

    def link(member: tarfile.TarInfo) -> None:
        member.type, member.linkname, member.size = tarfile.SYMTYPE, "/etc/passwd", 0

    make_tar(tmp_path / "link.tar", {"x.png": b""}, link)
    (item,) = list_images(tmp_path / "link.tar").unit(0)
    with pytest.raises(BadInput, match="link or a special file"):
        read_bytes(item)


def test_cut_off_tar_keeps_what_precedes_the_cut(tmp_path: Path) -> None:
    whole = make_tar(tmp_path / "s.tar", {f"{n}.png": PNG for n in range(5)}).read_bytes()
    (tmp_path / "s.tar").write_bytes(whole[: 512 * 2 + 3 * (512 + -(-len(PNG) // 512) * 512) + 100])
    items = list_images(tmp_path / "s.tar").unit(0)
    assert [item.key for item in items][:3] == ["0", "1", "2"]
    assert items[-1].key == "s.tar#end" and "cannot be read to its end" in str(items[-1].fault)
    for item in items[:3]:
        decode_image(read_bytes(item))


def test_no_tar_at_all(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"<html>" * 500)
    (item,) = list_images(tmp_path / "x.tar").unit(0)
    assert "cannot be read" in str(item.fault)


def test_reading_refuses_pipes_and_oversized_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (item,) = list_images(tmp_path / "pipe.jpg").unit(0)
    with pytest.raises(BadInput, match="no ordinary file"):
        read_bytes(item)
    with open(tmp_path / "huge.jpg", "wb") as huge:
        huge.write(b"\xff\xd8\xff")
        huge.truncate(1 << 40)
    (item,) = list_images(tmp_path / "huge.jpg").unit(0)
    with pytest.raises(BadInput, match="--max-pixels"):
        read_bytes(item)
    (tmp_path / "empty.jpg").touch()
    item = list_images([tmp_path / "empty.jpg", tmp_path / "huge.jpg"]).unit(0)[0]
    with pytest.raises(BadInput, match="the file is empty"):
        read_bytes(item)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="a system with users")
def test_what_may_not_be_read_is_said_and_the_rest_is_read() -> None:
    """As another user where the tests run as root, who may read everything."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        put(folder / "open.jpg")
        put(folder / "shut.jpg").chmod(0)
        put(folder / "locked" / "inside.jpg")
        (folder / "locked").chmod(0)
        folder.chmod(0o755)
        before = os.geteuid()
        if before == 0:
            os.seteuid(65534)
        try:
            opened, shut = list_images(folder).unit(0)
            assert (opened.key, shut.key) == ("open", "shut") and read_bytes(opened)
            with pytest.raises(PermissionError):
                read_bytes(shut)
        finally:
            os.seteuid(before)
            (folder / "locked").chmod(0o755)


def test_everything_that_can_stand_in_a_folder_becomes_a_record_or_a_row(fake: ModuleType, tmp_path: Path) -> None:
    """All at once through the whole run, into one database: nothing is lost, nothing crashes, sizes are the upright picture's."""
    folder = tmp_path / "all sorts"
    folder.mkdir()
    whole = saved(RGB, "JPEG")
    turned = Image.Exif()
    turned[0x0112] = 6
    sixteen_bit = cv2.imencode(".png", PICTURE.astype(np.uint16) * 257)[1].tobytes()
    good: dict[str, tuple[bytes, tuple[int, int]]] = {
        "plain.jpg": (whole, (48, 64)),
        "turned.jpg": (saved(RGB, "JPEG", exif=turned), (64, 48)),
        "grey.jpg": (saved(RGB.convert("L"), "JPEG"), (48, 64)),
        "cmyk.jpg": (saved(RGB.convert("CMYK"), "JPEG"), (48, 64)),
        "alpha.png": (saved(RGB.convert("RGBA"), "PNG"), (48, 64)),
        "grey alpha.png": (saved(RGB.convert("LA"), "PNG"), (48, 64)),
        "palette.png": (saved(RGB.convert("P"), "PNG"), (48, 64)),
        "sixteen.png": (sixteen_bit, (48, 64)),
        "moving.gif": (saved(RGB, "GIF", save_all=True, append_images=[RGB.rotate(90)]), (48, 64)),
        "moving.webp": (saved(RGB, "WEBP", save_all=True, append_images=[RGB.rotate(90)]), (48, 64)),
        "jpeg inside.png": (whole, (48, 64)),
        "UPPER.JPG": (whole, (48, 64)),
        "upper.jpg": (whole, (48, 64)),
        "dot.png": (saved(Image.new("RGB", (1, 1)), "PNG"), (1, 1)),
        "фото 写真 🙂.jpg": (whole, (48, 64)),
        "line\nbreak \"'.jpg": (whole, (48, 64)),
    }
    bad: dict[str, tuple[bytes, str]] = {
        "zero.jpg": (b"", "the file is empty"),
        "cut.jpg": (whole[: len(whole) * 9 // 10], "cut off"),
        "page.jpg": (b"<!DOCTYPE html>", "error page"),
        "noise.jpg": (whole[:40] + PICTURE.tobytes()[:500], "damaged"),
        "thin.png": (saved(Image.new("RGB", (1, 5000)), "PNG"), "less elongated"),
        "wide.png": (saved(Image.new("RGB", (5000, 1)), "PNG"), "less elongated"),
        "bomb.png": (png_that_claims(65_000, 65_000), "raise --max-pixels"),
        "gone.jpg": (b"", "No such file"),
        "round.jpg": (b"", "Too many levels"),
        "pipe.jpg": (b"", "no ordinary file"),
    }
    for name, (data, _) in {**good, **bad}.items():
        (folder / name).write_bytes(data)
    for name, target in (("gone.jpg", "nowhere.jpg"), ("round.jpg", "round.jpg")):
        (folder / name).unlink()
        (folder / name).symlink_to(folder / target)
    (folder / "pipe.jpg").unlink()
    os.mkfifo(folder / "pipe.jpg")
    (folder / "again").symlink_to(folder)
    summary = extract_images(folder, tmp_path / "out", detector=fake.FakeDetector(), key="{name}", batch_size=4)
    database = ImageDB(tmp_path / "out")
    assert {key: database[key].size for key in database.keys_list} == {name: size for name, (_, size) in good.items()}
    rows = [json.loads(line) for line in (tmp_path / "out" / "failures.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {row["key"] for row in rows} == set(bad) and summary.requested == len(good) + len(bad)
    for row in rows:
        assert bad[row["key"]][1] in row["error"], row


# --- keys ------------------------------------------------------------------------------------------------------------------------

COCO = NameParts.of_file("train2014/COCO_train2014_000000084002.jpg", root="images")


@pytest.mark.parametrize(
    ("rule", "key"),
    [
        ("stem", "COCO_train2014_000000084002"),
        ("path", "train2014/COCO_train2014_000000084002"),
        ("coco_train2014_{id:012d}.npz", "coco_train2014_000000084002.npz"),
        ("{parent}-{id}", "train2014-84002"),
        ("{name}", "COCO_train2014_000000084002.jpg"),
        ("{{{stem}}}", "{COCO_train2014_000000084002}"),
    ],
)
def test_key_rules(rule: str, key: str) -> None:
    assert key_rule(rule)(COCO) == key


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("name", "neither stem, path nor a template"),
        ("{stm}", "did you mean 'stem'"),
        ("{stem.__class__}", "unknown field"),
        ("{stem[0]}", "unknown field"),
        ("{id", "is no template"),
        ("{stem:>99999999}", "only {id} takes a format"),
        ("{id:099999999d}", "only a width"),
        ("{stem!r}", "only {id} takes a format"),
    ],
)
def test_templates_reach_nothing_but_their_fields(rule: str, said: str) -> None:
    with pytest.raises(BadInput) as caught:
        key_rule(rule)
    assert said in str(caught.value)


def test_keys_that_cannot_stand() -> None:
    with pytest.raises(BadInput, match="no digits"):
        key_rule("{id}")(NameParts.of_file("cat.jpg", root="photos"))
    assert key_fault("x" * 511) is None and key_fault("é" * 256) is not None
    assert key_fault("") is not None and key_fault("__keys__") is not None


def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.jpg")
    try:
        put(tmp_path / "x.jpg").rename(tmp_path / name)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    (item,) = list_images(tmp_path).unit(0)
    assert item.key == "caf\\udce9" and read_bytes(item)


def test_headers_of_tars_are_read_once_and_again_where_a_tar_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tar = tmp_path / "shard.tar"

    def write(names: list[str]) -> None:
        with tarfile.open(tar, "w") as file:
            for name in names:
                entry = tarfile.TarInfo(name)
                entry.size = 3
                file.addfile(entry, io.BytesIO(b"abc"))

    write(["a/one.jpg", "a/one.txt", "../two.png", "three\udcff.jpg"])
    fresh = list_images(tar)
    fresh.keep(tmp_path / "notes")  # type: ignore[attr-defined]
    reads: list[object] = []
    opened = tarfile.open
    monkeypatch.setattr(tarfile, "open", lambda *values, **words: reads.append(values) or opened(*values, **words))
    again = list_images(tar, notes=tmp_path / "notes")
    assert again.unit(0) == fresh.unit(0) and again.keys_sha256 == fresh.keys_sha256 and not reads
    assert [item.fault is None for item in again.unit(0)] == [True, False, True]
    write(["a/one.jpg", "four.jpg"])
    tar.write_bytes(tar.read_bytes()[:1300])
    cut = list_images(tar, notes=tmp_path / "notes")
    assert reads and [item.key for item in cut.unit(0)] == ["a/one", "shard.tar#end"]
    cut.keep(tmp_path / "notes")  # type: ignore[attr-defined]
    reads.clear()
    assert list_images(tar, notes=tmp_path / "notes").unit(0) == cut.unit(0) and not reads
    for note in (tmp_path / "notes").iterdir():
        note.write_bytes(note.read_bytes()[:-40])
    assert list_images(tar, notes=tmp_path / "notes").unit(0) == cut.unit(0) and reads, "a damaged note is no harm"


def test_a_folder_of_many_names_is_kept_small(tmp_path: Path) -> None:
    """Sorted as Python sorts the names, whatever their bytes are, and a unit finds its own."""
    names = ["b.jpg", "a/z.JPG", "a.png", "ü.jpg", "\udcff.jpg", "\U0001f600.gif", "a/b/c.d.jpeg"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    listed = list_images(tmp_path, key="path", unit_images=2)
    files = [item.file for number in range(listed.units) for item in listed.unit(number)]
    assert files == [str(tmp_path / name) for name in sorted(names)]
