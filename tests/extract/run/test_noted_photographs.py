"""The checksum of a photograph is taken when it is read, goes with its regions, and is held against the photograph again."""

import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import pyarrow
import pyarrow.parquet
import pytest
from click.testing import CliRunner, Result

from uniter.cli.db import main as db
from uniter.datasets.image_db import ImageDB
from uniter.datasets.image_db.writing.noted_photographs import PHOTOGRAPHS, NotedPhotographs
from uniter.datasets.maintenance.merge import merge
from uniter.datasets.maintenance.split import split
from uniter.datasets.storage.contents import content_of
from uniter.datasets.storage.index_file import load_arrays, save_arrays
from uniter.datasets.view.class_report import write_class_report
from uniter.datasets.view.region_report import write_region_report
from uniter.extract import extract_images
from uniter.extract.run.extraction import Stopped

Photos = Callable[..., Path]
OPTIONS: dict[str, Any] = {"batch_size": 2, "unit_images": 4}


def sums_of(out: Path) -> dict[str, str]:
    noted = NotedPhotographs(ImageDB(out).folders)
    return {key: noted.of(key).sha256.hex() for key in ImageDB(out)}


def sums_in(photos: Path) -> dict[str, str]:
    return {path.stem: hashlib.sha256(path.read_bytes()).hexdigest() for path in photos.iterdir()}


def check(*arguments: object) -> Result:
    return CliRunner().invoke(db, ["check", *map(str, arguments)])


def compared(*arguments: object, code: int = 0) -> dict[str, Any]:
    result = check(*arguments, "--json")
    assert result.exit_code == code, result.output
    told: dict[str, Any] = json.loads(result.stdout)["photographs"]
    return told


def packed(photos: Path, tar: Path) -> Path:
    with tarfile.open(tar, "w") as file:
        for path in sorted(photos.iterdir()):
            file.add(path, path.name)
    return tar


def table(photos: Path, file: Path) -> Path:
    rows = [{"bytes": path.read_bytes(), "path": path.name} for path in sorted(photos.iterdir())]
    pyarrow.parquet.write_table(pyarrow.table({"image": rows}), file)
    return file


def listed(photos: Path, file: Path) -> Path:
    file.write_text("".join(f"{path}\n" for path in sorted(photos.iterdir())))
    return file


FORMS: dict[str, Callable[[Path, Path], Path]] = {
    "folder": lambda photos, _: photos,
    "list": lambda photos, folder: listed(photos, folder / "list.txt"),
    "tar": lambda photos, folder: packed(photos, folder / "all.tar"),
    "table": lambda photos, folder: table(photos, folder / "all.parquet"),
}


@pytest.mark.parametrize("form", FORMS)
def test_noted_as_read_and_compared(form: str, make_photos: Photos, fake: ModuleType, tmp_path: Path) -> None:
    photos, out = make_photos(5), tmp_path / "out"
    extract_images(FORMS[form](photos, tmp_path), out, detector=fake.FakeDetector(), **OPTIONS)
    assert sums_of(out) == sums_in(photos)
    images = FORMS[form](photos, tmp_path)
    assert compared(out, "--images", images)["same"] == 5
    changed, gone = photos / "photo0001.jpg", photos / "photo0003.jpg"
    changed.write_bytes(changed.read_bytes()[:-1] + b"\0")  # of the same length
    gone.unlink()
    shutil.copy(changed, photos / "another.jpg")
    images = FORMS[form](photos, tmp_path)
    told = compared(out, "--images", images, code=1)
    assert {name: told[name] for name in ("same", "changed", "gone", "unknown", "unreadable", "not_in_database")} == {
        "same": 3, "changed": 1, "gone": 1, "unknown": 0, "unreadable": 0, "not_in_database": 1,
    }  # fmt: skip
    assert "photo0001.jpg" in told["changed_names"][0]
    words = check(out, "--images", images).output
    assert "! changed: " in words and "photo0001.jpg" in words


def test_killed_stopped_and_grown_equals_unbroken(make_photos: Photos, fake: ModuleType, tmp_path: Path) -> None:
    photos = make_photos(11)
    extract_images(photos, tmp_path / "whole", detector=fake.FakeDetector(), **OPTIONS)
    stop = threading.Event()

    class Stops(fake.FakeDetector):  # type: ignore[misc, name-defined]
        def detect(self, images: Any, *, boxes: Any = None) -> Any:
            if len(self.batches) == 2:
                stop.set()
            return super().detect(images, boxes=boxes)

    with pytest.raises(Stopped):
        extract_images(photos, tmp_path / "stopped", detector=Stops(), stop=stop, **OPTIONS)
    extract_images(photos, tmp_path / "stopped", detector=fake.FakeDetector(), **OPTIONS)
    assert (tmp_path / "stopped" / PHOTOGRAPHS).read_bytes() == (tmp_path / "whole" / PHOTOGRAPHS).read_bytes()
    (photos / "photo0004.jpg").rename(tmp_path / "4.jpg")
    extract_images(photos, tmp_path / "grown", detector=fake.FakeDetector(), **OPTIONS)
    (tmp_path / "4.jpg").rename(photos / "photo0004.jpg")
    extract_images(photos, tmp_path / "grown", detector=fake.FakeDetector(), **OPTIONS)
    assert (tmp_path / "grown" / PHOTOGRAPHS).read_bytes() == (tmp_path / "whole" / PHOTOGRAPHS).read_bytes()
    broken = photos / "photo0005.jpg"
    good = broken.read_bytes()
    broken.write_bytes(b"no image")
    extract_images(photos, tmp_path / "retried", detector=fake.FakeDetector(), **OPTIONS)
    assert sums_of(tmp_path / "retried").keys() == sums_in(photos).keys() - {"photo0005"}
    broken.write_bytes(good)
    extract_images(photos, tmp_path / "retried", detector=fake.FakeDetector(), retry_failed=True, **OPTIONS)
    assert (tmp_path / "retried" / PHOTOGRAPHS).read_bytes() == (tmp_path / "whole" / PHOTOGRAPHS).read_bytes()


def test_it_goes_with_the_regions(make_photos: Photos, fake: ModuleType, tmp_path: Path) -> None:
    """Through split, merge, conversion under other keys, and repair; and is no part of what a database holds."""
    photos, out = make_photos(6), tmp_path / "out"
    extract_images(photos, out, detector=fake.FakeDetector(), **OPTIONS)
    split(out, tmp_path / "parts", by="2")
    assert sums_of(tmp_path / "parts") == sums_in(photos)
    assert compared(tmp_path / "parts", "--images", photos)["same"] == 6
    merge([tmp_path / "parts" / "part-1", tmp_path / "parts" / "part-0"], tmp_path / "merged")
    assert sums_of(tmp_path / "merged") == sums_in(photos)
    result = CliRunner().invoke(db, ["convert", str(out), str(tmp_path / "converted"), "--key", "coco_{id:012d}.npz"])
    assert result.exit_code == 0, result.output
    assert compared(tmp_path / "converted", "--images", photos, "--key", "coco_{id:012d}.npz")["same"] == 6
    assert check(out, "--repair", tmp_path / "repaired").exit_code == 0
    assert sums_of(tmp_path / "repaired") == sums_in(photos)
    assert content_of(tmp_path / "merged")["index"] == content_of(tmp_path / "repaired")["index"] == content_of(out)["index"]


@pytest.mark.parametrize("knows_lengths", [False, True])
def test_what_is_older_is_unknown(knows_lengths: bool, make_photos: Photos, fake: ModuleType, tmp_path: Path) -> None:
    """An older version noted nothing, or the lengths alone; and what grows from it knows of what was added."""
    photos, out = make_photos(4), tmp_path / "out"
    (photos / "photo0002.jpg").rename(tmp_path / "2.jpg")
    extract_images(photos, out, detector=fake.FakeDetector(), **OPTIONS)
    columns = load_arrays(out / PHOTOGRAPHS)
    (out / PHOTOGRAPHS).unlink()
    if knows_lengths:
        save_arrays(out / PHOTOGRAPHS, {name: columns[name] for name in ("digests", "bytes")})
    told = compared(out, "--images", photos)
    assert (told["same"], told["unknown"], told["gone"]) == (0, 3, 0)
    assert "unknown: an older version" in check(out, "--images", photos).output
    (tmp_path / "2.jpg").rename(photos / "photo0002.jpg")
    extract_images(photos, out, detector=fake.FakeDetector(), **OPTIONS)
    told = compared(out, "--images", photos)
    assert (told["same"], told["unknown"]) == (1, 3)
    merge([out], tmp_path / "merged")
    noted = NotedPhotographs([tmp_path / "merged"])
    assert (noted.of("photo0000").length > 0) is knows_lengths and noted.of("photo0002").sha256


def test_the_wrong_photographs_are_refused(make_photos: Photos, fake: ModuleType, tmp_path: Path) -> None:
    photos, out = make_photos(2), tmp_path / "out"
    extract_images(photos, out, detector=fake.FakeDetector())
    others = tmp_path / "others"
    others.mkdir()
    shutil.copy(photos / "photo0000.jpg", others / "x.jpg")
    result = CliRunner().invoke(db, ["check", str(out), "--images", str(others)])
    assert result.exit_code == 1 and "bears a key of the database" in result.output and "photo0000" in result.output
    assert CliRunner().invoke(db, ["check", str(out), "--images", str(tmp_path / "none")]).exit_code == 1
    assert check(out, "--key", "stem").exit_code == 2
    assert check(out, "--images", photos, "--repair", tmp_path / "repaired").exit_code == 2
    (photos / "photo0000.jpg").write_bytes(b"")
    assert "the file is empty" in compared(out, "--images", photos, code=1)["changed_names"][0]


def test_without_pytorch(make_photos: Photos, fake: ModuleType, tmp_path: Path) -> None:
    """`check --images` needs neither PyTorch nor Detectron2."""
    photos, out = make_photos(1), tmp_path / "out"
    extract_images(photos, out, detector=fake.FakeDetector())
    code = f"""
import sys
sys.modules["torch"] = sys.modules["detectron2"] = None
from uniter.cli.db import main
main(["check", {str(out)!r}, "--images", {str(photos)!r}])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_pages_say_that_a_photograph_is_not_the_file_that_was_read(make_photos: Photos, fake: ModuleType, tmp_path: Path) -> None:
    photos, out = make_photos(4), tmp_path / "out"
    fake.extract_images(photos, out, detector=fake.FakeDetector(), **OPTIONS)
    names = sorted(photos.iterdir())
    image = cv2.imread(str(names[1]))
    cv2.imwrite(str(names[1]), image[:, ::-1])  # another picture of the same size

    def told(page: Path) -> int:
        return sum(path.read_text().count("is not the file that was read") for path in page.rglob("*.html"))

    write_region_report([out], tmp_path / "page", photographs=photos)
    assert told(tmp_path / "page") == 1
    database = ImageDB(out)
    best, known = database[names[1].stem].best_objects(), database.class_names
    assert best is not None and known is not None
    write_class_report([out], tmp_path / "class", known[int(best[0][0])], photographs=photos)
    assert told(tmp_path / "class") >= 1
