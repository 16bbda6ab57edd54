"""The machine is not the picture: what goes wrong with memory, disks, mounts and tars is no fault of a photograph, and is said.

Only commands, public names and files are used, so that these hold whatever the layout of the code.
"""

import io
import itertools
import json
import os
import pickle
import shutil
import struct
import tarfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import made_by_commands as made
import numpy as np
import pytest
from PIL import Image, features


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """No launcher's environment, and everything that is said is heard."""
    for name in [name for name in os.environ if name.startswith("SLURM_")] + ["RANK", "WORLD_SIZE", "LOCAL_RANK"]:
        monkeypatch.delenv(name, raising=False)
    caplog.set_level("INFO")


# --- point 12: faults of the environment end the run -----------------------------------------------------------------------------


def no_memory_from(call: int) -> Callable[[Sequence[Any]], None]:
    """What a GPU says that another process fills from that call of `detect` on."""
    import torch

    calls = itertools.count()

    def before(_pictures: Sequence[Any]) -> None:
        if next(calls) >= call:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    return before


@pytest.mark.parametrize("call", [0, 3], ids=["from the start", "meanwhile"])
def test_a_device_without_memory_ends_the_run(call: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    photos, out = made.photographs(tmp_path / "photos", 16), tmp_path / "out"
    ended = made.attempt(photos, out, made.FakeDetector(before=no_memory_from(call)), caplog)
    assert not ended.complete, f"{ended.summary} is no success"
    assert not (out / "header.json").exists()
    made.names(ended.output, "memory")
    again = made.attempt(photos, out, made.FakeDetector())
    assert again.complete and len(made.keys_of(out)) == 16, "once there is memory, the same command does the rest"
    assert not made.failures_of(out)


def test_one_picture_that_is_too_large_for_the_device_is_its_own_failure(tmp_path: Path) -> None:
    import torch

    photos, out = made.photographs(tmp_path / "photos", 6), tmp_path / "out"
    assert cv2.imwrite(str(photos / "photo0002.jpg"), made.picture(2, (600, 800)))

    def before(pictures: Sequence[Any]) -> None:
        if any(picture.size == (600, 800) for picture in pictures):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 90.00 GiB")

    assert made.attempt(photos, out, made.FakeDetector(before=before)).complete
    assert len(made.keys_of(out)) == 5
    (failed,) = made.failures_of(out)
    assert failed["key"] == "photo0002" and "memory" in failed["error"]


def test_a_mount_that_goes_away_ends_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    photos, away, out = made.photographs(tmp_path / "photos", 24), tmp_path / "away", tmp_path / "out"
    calls = itertools.count()

    def before(_pictures: Sequence[Any]) -> None:
        if next(calls) == 2:
            photos.rename(away)

    ended = made.attempt(photos, out, made.FakeDetector(before=before), caplog)
    assert not ended.complete and not (out / "header.json").exists()
    away.rename(photos)
    assert made.attempt(photos, out, made.FakeDetector()).complete
    assert len(made.keys_of(out)) == 24 and not made.failures_of(out)


def list_without_its_mount(folder: Path) -> Path:
    (folder / "list.txt").write_text("".join(f"/mnt/nowhere/photo{number}.jpg\n" for number in range(40)))
    return folder / "list.txt"


def only_broken_pictures(folder: Path) -> Path:
    photos = made.photographs(folder / "photos", 3)
    for path in photos.iterdir():
        path.write_bytes(path.read_bytes()[:200])
    return photos


@pytest.mark.parametrize(
    ("images", "said"), [(list_without_its_mount, "no such file|does not exist"), (only_broken_pictures, "damaged|cut off")]
)
def test_nothing_extracted_is_no_success(images: Callable[[Path], Path], said: str, tmp_path: Path) -> None:
    result = made.run("extract", images(tmp_path), tmp_path / "out", *made.with_detector(tmp_path))
    made.refused(result, said)
    assert not (tmp_path / "out" / "header.json").exists()


# --- point 13: what is in the folder is extracted, or said -----------------------------------------------------------------------


def shard(path: Path, members: dict[str, bytes]) -> Path:
    """A tar of these files."""
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def encoded(number: int, suffix: str = ".jpg") -> bytes:
    """A picture's file."""
    if suffix in (".gif", ".avif"):
        file = io.BytesIO()
        Image.fromarray(made.picture(number)).save(file, suffix[1:])
        return file.getvalue()
    return bytes(cv2.imencode(suffix, made.picture(number))[1])


def shards(folder: Path, count: int = 3) -> Path:
    """`00000.tar`, ... of four pictures each."""
    folder.mkdir(exist_ok=True)
    for number in range(count):
        shard(folder / f"{number:05d}.tar", {f"{number:05d}{row:04d}.jpg": encoded(9 * number + row) for row in range(4)})
    return folder


def test_a_preview_does_not_hide_what_lies_beside_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert made.attempt(shards(tmp_path / "in"), tmp_path / "before", made.FakeDetector()).summary.images == 12
    (tmp_path / "in" / "preview.jpg").write_bytes(encoded(99))
    mixed = made.attempt(tmp_path / "in", tmp_path / "out", made.FakeDetector(), caplog)
    if mixed.error is not None or mixed.summary.images < 12:
        made.names(mixed.output, ".tar|tars|shards")


@pytest.mark.parametrize("suffix", [".jpg", ".webp", ".bmp", ".gif", ".avif", ".tif", ".ppm"])
def test_captions_in_a_tar_belong_to_every_kind_of_picture_that_is_extracted(suffix: str, tmp_path: Path) -> None:
    if suffix == ".avif" and not features.check("avif"):
        pytest.skip("Pillow was built without AVIF")
    words = {f"{number:05d}.txt": f"a blue house number {number}".encode() for number in range(3)}
    pictures = {f"{number:05d}{suffix}": encoded(number, suffix) for number in range(3)}
    tar = shard(tmp_path / "00000.tar", dict(sorted({**words, **pictures}.items())))
    assert made.attempt(tar, tmp_path / "out", made.FakeDetector()).complete
    assert made.keys_of(tmp_path / "out") == {"00000", "00001", "00002"}
    built = made.run("build-db", tar, tmp_path / "texts.db", "--images", tmp_path / "out", "--json")
    assert built.exit_code == 0, built.output
    assert json.loads(built.stdout)["texts"]["kept"] == 3


# --- point 14: a shard that was written again ------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", ["within a picture", "within a header"])
def test_a_cut_tar_that_was_written_again_is_done_again(cut: str, tmp_path: Path) -> None:
    folder, out = shards(tmp_path / "in"), tmp_path / "out"
    assert made.attempt(folder, tmp_path / "unbroken", made.FakeDetector()).complete
    whole = (folder / "00001.tar").read_bytes()
    with tarfile.open(folder / "00001.tar") as tar:
        third = tar.getmembers()[2]
    (folder / "00001.tar").write_bytes(whole[: third.offset_data + 100 if cut == "within a picture" else third.offset + 300])
    made.attempt(folder, out, made.FakeDetector())
    assert made.failures_of(out), "that the tar is cut is said"
    (folder / "00001.tar").write_bytes(whole)
    again = made.attempt(folder, out, made.FakeDetector(), retry_failed=True)
    assert again.complete, again.error
    assert not made.failures_of(out) and made.records_of(out) == made.records_of(tmp_path / "unbroken")


# --- point 15: the way out that is advised is open -------------------------------------------------------------------------------


def uneven_array(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm's environment in the last job of `--array 0,1,4`."""
    for name, value in (("TASK_ID", 4), ("TASK_COUNT", 3), ("TASK_MIN", 0), ("TASK_MAX", 4), ("TASK_STEP", 1)):
        monkeypatch.setenv(f"SLURM_ARRAY_{name}", str(value))


def test_an_uneven_array_is_refused_with_a_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    detector = made.with_detector(tmp_path)
    uneven_array(monkeypatch)
    made.refused(made.run("extract", made.photographs(tmp_path / "photos"), tmp_path / "out", *detector), "--shard")


@pytest.mark.parametrize("share", ["0/1", "2/3"])
def test_an_uneven_array_takes_the_share_that_it_is_told(share: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    detector = made.with_detector(tmp_path)
    folder = shards(tmp_path / "in")
    uneven_array(monkeypatch)
    result = made.run("extract", folder, tmp_path / "out", *detector, "--shard", share, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["extracted"] == (12 if share == "0/1" else 4)


# --- point 16: damaged pictures, and files that name more memory than they have --------------------------------------------------


def photograph_file(suffix: str) -> bytes:
    """A picture with noise, so that its file is long and every part of it matters."""
    noise = np.random.default_rng(5).integers(-40, 40, (240, 320, 3))
    return bytes(cv2.imencode(suffix, np.clip(made.picture(5, (240, 320)) + noise, 0, 255).astype(np.uint8))[1])


@pytest.mark.parametrize(
    ("suffix", "end"),
    [(".png", 0), (".jpg", 0), (".jpg", 2), (".webp", 0)],
    ids=lambda value: {0: "zeros", 2: "zeros and an end marker"}.get(value, value),
)
def test_a_picture_whose_second_half_is_zeros_is_damaged(suffix: str, end: int, tmp_path: Path) -> None:
    photos = made.photographs(tmp_path / "photos", 2)
    content = photograph_file(suffix)
    half = len(content) // 2
    (photos / f"damaged{suffix}").write_bytes(content[:half] + bytes(len(content) - half - end) + content[len(content) - end :])
    (photos / f"whole{suffix}").write_bytes(content)
    made.attempt(photos, tmp_path / "out", made.FakeDetector())
    assert made.keys_of(tmp_path / "out") == {"photo0000", "photo0001", "whole"}
    assert [failed["key"] for failed in made.failures_of(tmp_path / "out")] == ["damaged"]


def empty_png(path: Path, side: int) -> Path:
    """A transparent picture of 16 bit a channel: 8 bytes a pixel, next to nothing packed."""
    packer = zlib.compressobj(1)
    row = bytes(1 + 8 * side)
    packed = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", side, side, 16, 6, 0, 0, 0)), (b"IDAT", packed), (b"IEND", b""))
    written = (struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content)) for kind, content in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(written))
    return path


@pytest.mark.parametrize("threads", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_decoding_takes_at_most_twelve_bytes_a_pixel_and_all_threads_a_gigabyte(threads: int, tmp_path: Path) -> None:
    side = 4000
    (tmp_path / "large").mkdir()
    first = empty_png(tmp_path / "large" / "0.png", side)
    for number in range(1, threads):
        shutil.copy(first, first.with_name(f"{number}.png"))
    assert made.attempt(made.photographs(tmp_path / "small", 2), tmp_path / "before", made.FakeDetector(), workers=threads).complete
    ran, most = made.memory_of(
        lambda: made.attempt(tmp_path / "large", tmp_path / "out", made.FakeDetector(), batch_size=threads, workers=threads)
    )
    assert ran.complete and ran.summary.images == threads, ran
    slack, results = 16 << 20, 3 * side**2 * threads
    assert most <= slack + min(12 * side**2 * threads, (1 << 30) + results)


class Naming:
    """Pickled as NumPy pickles an array of so many bytes, of which the file holds none."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __reduce__(self) -> tuple[Any, ...]:
        make, arguments, _ = np.zeros(0, np.uint8).__reduce__()[:3]
        return make, arguments, (1, (self.count,), np.dtype("uint8"), False, self.count)


def test_a_pickle_takes_no_more_memory_than_it_holds(tmp_path: Path) -> None:
    weights = tmp_path / "weights.pkl"
    weights.write_bytes(pickle.dumps({"model": {"backbone.stem.conv1.weight": Naming(400_000_000)}}, protocol=2))
    assert weights.stat().st_size < 300
    options = made.with_detector(tmp_path)
    options[options.index("--weights") + 1] = str(weights)
    photos = made.photographs(tmp_path / "photos", 1)
    result, most = made.memory_of(lambda: made.run("extract", photos, tmp_path / "out", *options))
    made.refused(result, "weights.pkl")
    assert most < 200_000_000


def test_a_packed_json_takes_no_gigabyte(tmp_path: Path) -> None:
    packer = zlib.compressobj(1, zlib.DEFLATED, 31)
    questions, missing = tmp_path / "questions.jsonl", tmp_path / "missing.json.gz"
    questions.write_text('{"sentence": "a cat", "identifier": "dev-0-0-0", "label": "True"}\n')
    blanks = b" " * (1 << 20)
    missing.write_bytes(
        b"".join((packer.compress(b"["), *(packer.compress(blanks) for _ in range(300)), packer.compress(b"]"), packer.flush()))
    )
    result, most = made.memory_of(lambda: made.run("build-db", questions, tmp_path / "out.db", "--task", "nlvr2", "--join", missing))
    assert not made.crashed(result), result.output
    assert most < 300 << 20


NOISY = """
import sys
from pathlib import Path
ran = made.attempt(Path(sys.argv[1]), Path(sys.argv[2]), made.FakeDetector())
assert ran.complete, ran
"""


def test_libraries_do_not_write_into_the_progress(tmp_path: Path) -> None:
    photos = made.photographs(tmp_path / "photos", 2)
    png, jpeg = photograph_file(".png"), photograph_file(".jpg")
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 255
    (photos / "flipped.png").write_bytes(flipped)
    (photos / "cut.png").write_bytes(png[: len(png) // 2])
    profile = b"icc\0\0" + zlib.compress(b"x" * 200)
    (photos / "profile.png").write_bytes(
        png[:33] + struct.pack(">I", len(profile)) + b"iCCP" + profile + struct.pack(">I", zlib.crc32(b"iCCP" + profile)) + png[33:]
    )
    (photos / "zeros.jpg").write_bytes(jpeg[: len(jpeg) // 2] + bytes(len(jpeg) // 2 - 2) + jpeg[-2:])
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x05\0\0"
    (photos / "exif.jpg").write_bytes(jpeg[:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(exif)) + exif + jpeg[2:])
    ran = made.script(NOISY, photos, tmp_path / "out")
    assert ran.returncode == 0, ran.stderr
    written = [
        line for line in ran.stderr.splitlines() if any(word in line for word in ("libpng", "JPEG data", "UserWarning", "warnings.warn"))
    ]
    assert not written


# --- point 17: what is lost is what the page says --------------------------------------------------------------------------------

KILLED = """
import itertools, os, sys
from pathlib import Path
calls = itertools.count(1)
def before(pictures):
    if next(calls) == 8:
        os._exit(9)
made.attempt(Path(sys.argv[1]), Path(sys.argv[2]), made.FakeDetector(before=before, blank=True, feature_width=200_000))
"""


def test_a_kill_loses_no_more_than_the_page_says(tmp_path: Path) -> None:
    photos, out = made.photographs(tmp_path / "photos", 24), tmp_path / "out"
    assert made.script(KILLED, photos, out).returncode == 9
    detector = made.FakeDetector(blank=True, feature_width=200_000)
    assert made.attempt(photos, out, detector).complete
    lost = len(detector.seen) - 4  # of 12 batches, 7 were through the detector and the 8th was at hand: 4 are new
    page = (Path(__file__).parents[2] / "docs" / "extraction.md").read_text(encoding="utf-8")
    assert lost <= 1 or "at most the batch at hand" not in " ".join(page.split())


# --- point 31: what is no picture and no list ------------------------------------------------------------------------------------


def a_json(folder: Path) -> Path:
    (folder / "instances.json").write_text('{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": []}')
    return folder / "instances.json"


def a_parquet(folder: Path) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"url": ["https://example.org/a.jpg"], "caption": ["a cat"]}), folder / "cc3m.parquet")
    return folder / "cc3m.parquet"


def a_text_named_jpg(folder: Path) -> Path:
    (folder / "notes.jpg").write_text("to do: photographs\n")
    return folder / "notes.jpg"


def a_heic(folder: Path) -> Path:
    (folder / "IMG_0001.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(400))
    return folder / "IMG_0001.HEIC"


def an_mp4(folder: Path) -> Path:
    (folder / "holiday.mp4").write_bytes(b"\0\0\0\x18ftypisom\0\0\2\0isomiso2" + bytes(400))
    return folder / "holiday.mp4"


def a_list_of_addresses(folder: Path) -> Path:
    (folder / "urls.txt").write_text("".join(f"https://example.org/{number}.jpg\n" for number in range(5)))
    return folder / "urls.txt"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (a_json, "json|no image"),
        (a_parquet, "parquet|no image"),
        (a_text_named_jpg, "no image|text"),
        (a_heic, "heic|no image"),
        (an_mp4, "mp4|video|no image"),
        (a_list_of_addresses, "url|address|http|download"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_what_is_no_picture_is_refused_with_its_reason(source: Callable[[Path], Path], said: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    images = source(tmp_path / "in")
    result = made.run("extract", images, tmp_path / "out", *made.with_detector(tmp_path))
    made.refused(result, said, code=(1, 2), besides=[images.name])
    assert not (tmp_path / "out" / "header.json").exists()


# --- point 37: a detector may claim to be on a GPU -------------------------------------------------------------------------------


def test_a_detector_may_claim_to_be_on_a_gpu(tmp_path: Path) -> None:
    photos = made.photographs(tmp_path / "photos", 6)
    assert made.attempt(photos, tmp_path / "cpu", made.FakeDetector()).complete
    claimed = made.attempt(photos, tmp_path / "gpu", made.FakeDetector(device="cuda:0"))
    assert claimed.complete and not made.failures_of(tmp_path / "gpu"), claimed
    assert made.records_of(tmp_path / "gpu") == made.records_of(tmp_path / "cpu")


def test_a_batch_that_is_too_large_for_a_gpu_is_done_one_by_one(tmp_path: Path) -> None:
    import torch

    def before(pictures: Sequence[Any]) -> None:
        if len(pictures) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    photos = made.photographs(tmp_path / "photos", 6)
    ran = made.attempt(photos, tmp_path / "out", made.FakeDetector(device="cuda:0", before=before))
    assert ran.complete and len(made.keys_of(tmp_path / "out")) == 6, ran
