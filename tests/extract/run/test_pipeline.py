"""Laws of the run: every image in or accounted for, the same bytes however the work is divided, repeated or repaired."""

import io
import json
import os
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import pytest

from uniter.datasets.errors import BadInput, SettingsDiffer, UniterError
from uniter.datasets.image_db import ImageDB
from uniter.datasets.image_db.writing.side_files import read_box_ids
from uniter.datasets.maintenance.check_report import CheckReport
from uniter.datasets.maintenance.convert import convert
from uniter.datasets.maintenance.merge import merge
from uniter.datasets.maintenance.repair import repair
from uniter.datasets.maintenance.split import split
from uniter.extract import extract_images
from uniter.extract.detector.preparation import CaffePreparation
from uniter.extract.detector.protocol import RawRegions
from uniter.extract.images.decoding import DECODING
from uniter.extract.run.extraction import Stopped
from uniter.extract.run.shares import share_from_environment

Content = Callable[[Path], dict[str, Any]]
Photos = Callable[..., Path]


def failures(out: Path) -> dict[str, str]:
    return {row["key"]: row["error"] for row in map(json.loads, (out / "failures.jsonl").read_text().splitlines())}


def test_every_image_is_in_the_database_or_in_failures(make_photos: Photos, fake: ModuleType, tmp_path: Path) -> None:
    photos = make_photos(10)
    (photos / "html.jpg").write_text("<html>404</html>")
    (photos / "empty.png").touch()
    (photos / "cut.jpg").write_bytes((photos / "photo0001.jpg").read_bytes()[:200])
    (photos / "folder.jpg").mkdir()
    (photos / "gone.jpg").symlink_to(photos / "nowhere.jpg")
    cv2.imwrite(str(photos / "dot.png"), np.zeros((1, 1, 3), np.uint8))
    cv2.imwrite(str(photos / "thin.png"), np.zeros((5000, 1, 3), np.uint8))
    cv2.imwrite(str(photos / "wide.png"), np.zeros((1, 5000, 3), np.uint8))
    summary = extract_images(photos, tmp_path / "out", detector=fake.FakeDetector(), batch_size=4)
    database = ImageDB(tmp_path / "out")
    assert list(database.keys_list) == sorted(["dot", *(f"photo{n:04d}" for n in range(10))])
    failed = failures(tmp_path / "out")
    assert set(failed) == {"html", "empty", "cut", "gone", "thin", "wide"}
    assert failed["empty"] == "the file is empty" and failed["gone"] == "No such file or directory"
    assert "1 x 5000" in failed["thin"] and "error page" in failed["html"]
    assert (summary.requested, summary.images, summary.failures, summary.complete) == (17, 11, 6, True)
    assert summary.regions == int(database.region_counts.sum()) and summary.mean_regions == pytest.approx(summary.regions / 11, abs=0.01)
    record = database["photo0003"]
    assert record.size == (33, 43) and record.boxes is not None and record.soft_labels is not None
    assert record.soft_labels.shape == (len(record), 6)
    assert (np.diff(np.asarray(record.conf)) <= 0).all()
    header = database.header
    assert header is not None
    assert (header["feature_width"], header["label_classes"], header["class_names"][1], header["box_kind"]) == (8, 6, "dog", "proposal")
    assert header["device"] == "cpu" and header["software"].startswith("uniter-toolkit ") and header["weights_sha256"] == "0" * 64
    assert (header["selection"]["min_boxes"], header["selection"]["max_boxes"]) == (3, 7)


def test_a_second_run_does_nothing(make_photos: Photos, fake: ModuleType, content: Content, tmp_path: Path) -> None:
    photos = make_photos(5)
    extract_images(photos, tmp_path / "out", detector=fake.FakeDetector(), batch_size=2)
    before = content(tmp_path / "out")
    again = fake.FakeDetector()
    summary = extract_images(photos, tmp_path / "out", detector=again)
    assert again.batches == [] and summary.complete and summary.images == 5 and summary.extracted == 0
    assert content(tmp_path / "out") == before


def test_batches_are_a_function_of_the_list(make_photos: Photos, fake: ModuleType, tmp_path: Path) -> None:
    photos = make_photos(10)
    (photos / "photo0001.jpg").write_text("broken")
    detector = fake.FakeDetector()
    extract_images(photos, tmp_path / "out", detector=detector, batch_size=3, unit_images=5)
    assert detector.batches == [2, 2, 3, 2]  # units of five; the broken one leaves its batch smaller


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"conf_threshold": 0.3}, "selection.conf_threshold was 0.2, now 0.3"),
        ({"max_boxes": 5}, "selection.max_boxes was 7, now 5"),
        ({"batch_size": 3}, "batch_size was 2, now 3"),
        ({"key": "{name}"}, 'key was "stem", now "{name}"'),
        ({"unit_images": 7}, "images.unit_images was 128, now 7"),
    ],
)
def test_other_settings_are_refused_in_words(
    change: dict[str, Any], said: str, make_photos: Photos, fake: ModuleType, tmp_path: Path
) -> None:
    photos = make_photos(3)
    extract_images(photos, tmp_path / "out", detector=fake.FakeDetector(), batch_size=2)
    with pytest.raises(SettingsDiffer) as caught:
        extract_images(photos, tmp_path / "out", detector=fake.FakeDetector(), **{"batch_size": 2, **change})
    assert said in str(caught.value) and "--overwrite" in str(caught.value)
    summary = extract_images(photos, tmp_path / "out", detector=fake.FakeDetector(), overwrite=True, **{"batch_size": 2, **change})
    assert summary.extracted == 3


def test_other_images_altogether_are_refused(make_photos: Photos, fake: ModuleType, content: Content, tmp_path: Path) -> None:
    photos = make_photos(3)
    extract_images(photos, tmp_path / "out", detector=fake.FakeDetector())
    before = content(tmp_path / "out")
    for path in photos.iterdir():
        path.rename(path.with_name(f"renamed-{path.name}"))
    said = r"for other images \(3 \(photo0000, photo0001, photo0002\) then; 3 \(renamed-photo0000, .*`uniter-db merge`.*--overwrite"
    with pytest.raises(SettingsDiffer, match=said):
        extract_images(photos, tmp_path / "out", detector=fake.FakeDetector())
    with pytest.raises(SettingsDiffer, match=r"selection\.max_boxes was 7, now 5"):
        extract_images(photos, tmp_path / "out", detector=fake.FakeDetector(), max_boxes=5)
    assert content(tmp_path / "out") == before


def test_a_folder_of_other_things_is_no_place_for_a_database(make_photos: Photos, fake: ModuleType, tmp_path: Path) -> None:
    photos = make_photos(2)
    before = sorted(photos.iterdir())
    for overwrite in (False, True):
        with pytest.raises(BadInput, match=r"holds files that this command did not make \(such as .*choose another OUT"):
            extract_images(photos, photos, detector=fake.FakeDetector(), overwrite=overwrite)
    assert sorted(photos.iterdir()) == before


def test_added_images_are_extracted_aside_and_merged(make_photos: Photos, fake: ModuleType, tmp_path: Path) -> None:
    photos = make_photos(4)
    lists = {name: tmp_path / f"{name}.txt" for name in ("first", "added")}
    files = sorted(map(str, photos.iterdir()))
    lists["first"].write_text("\n".join(files[:3]))
    lists["added"].write_text(files[3])
    for name, listed in lists.items():
        extract_images(listed, tmp_path / name, detector=fake.FakeDetector(), batch_size=1)
    assert merge([tmp_path / "first", tmp_path / "added"], tmp_path / "both")["images"] == 4
    extract_images(photos, tmp_path / "whole", detector=fake.FakeDetector(), batch_size=1)
    assert ImageDB(tmp_path / "both").keys_list[3] == "photo0003"
    np.testing.assert_array_equal(ImageDB(tmp_path / "both")["photo0003"].features, ImageDB(tmp_path / "whole")["photo0003"].features)


def test_an_unfinished_database_keeps_its_batch_size(make_photos: Photos, fake: ModuleType, tmp_path: Path) -> None:
    photos = make_photos(9)
    extract_images(photos, tmp_path / "out", detector=fake.FakeDetector(), batch_size=3, unit_images=3, shard=(0, 2))
    detector = fake.FakeDetector()
    summary = extract_images(photos, tmp_path / "out", detector=detector, unit_images=3)
    assert detector.batches == [3] and summary.complete


@pytest.mark.parametrize("order", [[(0, 3), (1, 3), (2, 3)], [(2, 3), (0, 2), (1, 2)], [(1, 4), (0, 1)]])
def test_shards_of_any_number_give_the_bytes_of_one_process(
    order: list[tuple[int, int]], make_photos: Photos, fake: ModuleType, content: Content, tmp_path: Path
) -> None:
    photos = make_photos(23)
    (photos / "photo0007.jpg").write_text("broken")
    options: dict[str, Any] = {"batch_size": 2, "unit_images": 4}
    extract_images(photos, tmp_path / "one", detector=fake.FakeDetector(), **options)
    for number, shard in enumerate(order):
        summary = extract_images(photos, tmp_path / "many", detector=fake.FakeDetector(), shard=shard, **options)
        assert summary.complete == (number == len(order) - 1)
        assert (summary.units_left > 0) == (not summary.complete)
    assert content(tmp_path / "many") == content(tmp_path / "one")


def test_shards_may_not_undo_each_other(make_photos: Photos, fake: ModuleType, tmp_path: Path) -> None:
    for option in ("overwrite", "retry_failed"):
        with pytest.raises(BadInput, match="one process"):
            extract_images(make_photos(2, option), tmp_path / "out", detector=fake.FakeDetector(), shard=(0, 2), **{option: True})
    with pytest.raises(BadInput, match="0 <= I < N"):
        extract_images(make_photos(2), tmp_path / "out", detector=fake.FakeDetector(), shard=(2, 2))


def test_retrying_gives_the_records_of_an_unbroken_run(make_photos: Photos, fake: ModuleType, content: Content, tmp_path: Path) -> None:
    photos = make_photos(14)
    whole = (photos / "photo0005.jpg").read_bytes()
    options: dict[str, Any] = {"batch_size": 3, "unit_images": 6}
    extract_images(photos, tmp_path / "unbroken", detector=fake.FakeDetector(), **options)
    (photos / "photo0005.jpg").write_bytes(whole[:100])
    (photos / "photo0012.jpg").write_bytes(b"")
    summary = extract_images(photos, tmp_path / "repaired", detector=fake.FakeDetector(), **options)
    assert summary.complete and set(failures(tmp_path / "repaired")) == {"photo0005", "photo0012"}
    (photos / "photo0005.jpg").write_bytes(whole)
    # Without being told, nothing is tried again.
    assert extract_images(photos, tmp_path / "repaired", detector=fake.FakeDetector(), **options).failures == 2
    detector = fake.FakeDetector()
    summary = extract_images(photos, tmp_path / "repaired", detector=detector, retry_failed=True, **options)
    assert (summary.complete, summary.extracted, summary.failures) == (True, 1, 1)
    assert detector.batches == [3, 1], "the whole batch of each failed image, nothing else"
    repaired, unbroken = content(tmp_path / "repaired"), content(tmp_path / "unbroken")
    assert repaired["records"][b"photo0005"] == unbroken["records"][b"photo0005"]
    (photos / "photo0012.jpg").write_bytes((photos / "photo0011.jpg").read_bytes())
    assert extract_images(photos, tmp_path / "repaired", detector=fake.FakeDetector(), retry_failed=True, **options).failures == 0


def test_tars_give_what_files_give(make_photos: Photos, fake: ModuleType, content: Content, tmp_path: Path) -> None:
    photos = make_photos(6)
    (tmp_path / "tars").mkdir()
    for shard in range(2):
        with tarfile.open(tmp_path / "tars" / f"{shard:05d}.tar", "w") as tar:
            for number in range(3 * shard, 3 * shard + 3):
                tar.add(photos / f"photo{number:04d}.jpg", f"photo{number:04d}.jpg")
                caption = tarfile.TarInfo(f"photo{number:04d}.txt")
                caption.size = 3
                tar.addfile(caption, io.BytesIO(b"cat"))
    extract_images(photos, tmp_path / "files", detector=fake.FakeDetector(), batch_size=2, unit_images=3)
    summary = extract_images(str(tmp_path / "tars/{00000..00001}.tar"), tmp_path / "shards", detector=fake.FakeDetector(), batch_size=2)
    assert summary.images == 6 and summary.complete
    assert content(tmp_path / "shards")["records"] == content(tmp_path / "files")["records"]


def test_a_tar_without_images_is_a_unit_without_records(make_photos: Photos, fake: ModuleType, tmp_path: Path) -> None:
    photos = make_photos(2)
    with tarfile.open(tmp_path / "a.tar", "w") as first, tarfile.open(tmp_path / "b.tar", "w") as second:
        first.add(__file__, "notes.txt")
        for path in photos.iterdir():
            second.add(path, path.name)
    summary = extract_images(str(tmp_path / "{a,b}.tar"), tmp_path / "out", detector=fake.FakeDetector())
    assert summary.complete and summary.images == 2


@pytest.mark.parametrize("workers", [1, 7])
def test_the_number_of_threads_changes_nothing(
    workers: int, make_photos: Photos, fake: ModuleType, content: Content, tmp_path: Path
) -> None:
    photos = make_photos(30)
    (photos / "photo0011.jpg").write_text("broken")
    extract_images(photos, tmp_path / "two", detector=fake.FakeDetector(), batch_size=4, workers=2)
    extract_images(photos, tmp_path / "other", detector=fake.FakeDetector(), batch_size=4, workers=workers)
    assert content(tmp_path / "other") == content(tmp_path / "two")


# --- the detector's failures -----------------------------------------------------------------------------------------------------


class OutOfMemoryError(RuntimeError):
    """Bears PyTorch's name."""


def test_an_image_too_large_for_memory_costs_only_itself(
    make_photos: Photos, fake: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = make_photos(6)
    cv2.imwrite(str(photos / "photo0002.png"), np.zeros((60, 200, 3), np.uint8))
    (photos / "photo0002.jpg").unlink()

    class Small(fake.FakeDetector):  # type: ignore[name-defined, misc]
        def detect(self, images: Any, *, boxes: Any = None) -> list[RawRegions]:
            self.batches.append(len(images))
            if any(image.size[1] == 200 for image in images):
                raise OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
            found: list[RawRegions] = super().detect(images, boxes=boxes)
            self.batches.pop()
            return found

    released: list[bool] = []
    monkeypatch.setattr("uniter.extract.run.units.release_memory", lambda: released.append(True))
    detector = Small()
    summary = extract_images(photos, tmp_path / "out", detector=detector, batch_size=4)
    assert detector.batches == [4, 1, 1, 1, 1, 2]
    assert len(released) == 2  # after the batch, and after the image alone
    assert (summary.images, summary.failures) == (5, 1)
    assert failures(tmp_path / "out") == {"photo0002": "there was not enough memory for this image alone"}


@pytest.mark.parametrize("large", [True, False])
def test_large_images_are_prepared_one_at_a_time(
    large: bool, make_photos: Photos, fake: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once, most, lock = 0, 0, threading.Lock()

    class Watched(fake.FakeDetector):  # type: ignore[name-defined, misc]
        def prepare(self, image: Any) -> Any:
            nonlocal at_once, most
            with lock:
                at_once += 1
                most = max(most, at_once)
            time.sleep(0.02)
            prepared = super().prepare(image)
            with lock:
                at_once -= 1
            return prepared

    monkeypatch.setattr(DECODING, "total", 1000 if large else 1 << 30)
    assert extract_images(make_photos(12), tmp_path / "out", detector=Watched(), batch_size=4, workers=4).complete
    assert (most == 1) == large


def test_one_unforeseen_error_is_a_row_and_many_in_a_row_end_the_run(make_photos: Photos, fake: ModuleType, tmp_path: Path) -> None:
    class Broken(fake.FakeDetector):  # type: ignore[name-defined, misc]
        bad_widths: tuple[int, ...] = (41,)

        def detect(self, images: Any, *, boxes: Any = None) -> list[RawRegions]:
            if any(image.size[1] in self.bad_widths for image in images):
                raise IndexError("list index out of range")
            found: list[RawRegions] = super().detect(images, boxes=boxes)
            return found

    photos = make_photos(14)
    detector = Broken()
    assert extract_images(photos, tmp_path / "some", detector=detector, batch_size=2).failures == 2
    assert failures(tmp_path / "some")["photo0008"] == "IndexError: list index out of range"
    detector.bad_widths = tuple(range(40, 47))
    with pytest.raises(UniterError, match="failed on 5 images in a row"):
        extract_images(photos, tmp_path / "all", detector=detector, batch_size=2)
    assert not (tmp_path / "all" / "header.json").exists()


@pytest.mark.parametrize(("value", "said"), [(np.nan, "NaN or infinity"), (1e9, "too large for float16")])
def test_features_that_are_no_numbers_are_failures(value: float, said: str, make_photos: Photos, fake: ModuleType, tmp_path: Path) -> None:
    class Odd(fake.FakeDetector):  # type: ignore[name-defined, misc]
        def detect(self, images: Any, *, boxes: Any = None) -> list[RawRegions]:
            found: list[RawRegions] = super().detect(images, boxes=boxes)
            for image, raw in zip(images, found, strict=True):
                if image.size == (31, 41):
                    raw.features[:, 3] = value
            return found

    photos = make_photos(4)
    summary = extract_images(photos, tmp_path / "out", detector=Odd(), batch_size=4)
    assert (summary.images, summary.failures) == (3, 1)
    assert said in failures(tmp_path / "out")["photo0001"]


# --- given boxes -----------------------------------------------------------------------------------------------------------------


def test_given_boxes_keep_their_order_and_ids(make_photos: Photos, fake: ModuleType, tmp_path: Path) -> None:
    photos = make_photos(4)
    many = [[float(n % 30), 1.0, float(n % 30) + 5, 9.0] for n in range(150)]
    lines = [
        {"image": "photo0000.jpg", "boxes": [[20, 5, 30, 25], [0, 0, 10, 10], [1.5, 2, 3, 29.5]], "ids": ["c", "a", 7]},
        {"image": "photo0001", "boxes": many},
        {"image": "photo0002.jpg", "boxes": [[10, 10, 5, 5]]},
    ]
    (tmp_path / "boxes.jsonl").write_text("\n".join(map(json.dumps, lines)))
    summary = extract_images(photos, tmp_path / "out", detector=fake.FakeDetector(), boxes=tmp_path / "boxes.jsonl")
    database = ImageDB(tmp_path / "out")
    np.testing.assert_array_equal(database["photo0000"].boxes, np.array(lines[0]["boxes"], np.float32))
    np.testing.assert_array_equal(database["photo0001"].boxes, np.array(many, np.float32))  # more than --max-boxes: never cut
    soft = database["photo0000"].soft_labels
    assert soft is not None
    np.testing.assert_array_equal(database["photo0000"].conf, soft[:, 1:].max(axis=1))
    failed = failures(tmp_path / "out")
    assert "are the numbers x, y, width, height" in failed["photo0002"] and "no boxes for it" in failed["photo0003"]
    assert summary.box_kind == "given" and database.header is not None and database.header["box_kind"] == "given"
    rows = [json.loads(line) for line in (tmp_path / "out" / "box_ids.jsonl").read_text().splitlines()]
    assert rows == [{"key": "photo0000", "ids": ["c", "a", 7]}]


def test_folders_in_the_names_of_given_boxes_count_where_they_are_those_of_the_images(
    make_photos: Photos, fake: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    photos = make_photos(3)
    (photos / "VG_100K").mkdir()
    (photos / "photo0000.jpg").rename(photos / "VG_100K" / "photo0000.jpg")
    boxes = tmp_path / "boxes.jsonl"

    def extracted(out: str, *names: str) -> set[str]:
        boxes.write_text("\n".join(json.dumps({"image": name, "boxes": [[1, 1, 9, 9]]}) for name in names))
        extract_images(photos, tmp_path / out, detector=fake.FakeDetector(), boxes=boxes)
        return set(ImageDB(tmp_path / out).keys_list)

    assert extracted("some", "VG_100K/photo0000.jpg", "VG_100K/photo0001.jpg", "photo0002") == {"photo0000", "photo0002"}
    assert "VG_100K/photo0001.jpg' lies in another folder" in failures(tmp_path / "some")["photo0001"]
    assert "names count alone" not in caplog.text
    assert extracted("none", "scenes/photo0000.jpg", "scenes/photo0001.jpg") == {"photo0000", "photo0001"}
    assert "names count alone" in caplog.text
    (photos / "VG_100K" / "photo0001.jpg").write_bytes((photos / "photo0001.jpg").read_bytes())
    boxes.write_text('{"image": "photo0001.jpg", "boxes": [[1, 1, 9, 9]]}')
    with pytest.raises(BadInput, match=r"'photo0001\.jpg' is .* as well as .*; write more of the path"):
        extract_images(photos, tmp_path / "two", detector=fake.FakeDetector(), boxes=boxes, key="path")


def test_ids_of_given_boxes_survive_merging_splitting_converting_and_repair(make_photos: Photos, fake: ModuleType, tmp_path: Path) -> None:
    photos = make_photos(4)
    boxes = [[20, 5, 30, 25], [0, 0, 10, 10]]
    for part, names in (("a", ("photo0000", "photo0001")), ("b", ("photo0002", "photo0003"))):
        (tmp_path / f"{part}.txt").write_text("".join(f"{photos / name}.jpg\n" for name in names))
        rows = [{"image": f"{name}.jpg", "boxes": boxes, "ids": [f"{name}-0", number]} for number, name in enumerate(names)]
        (tmp_path / f"{part}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        extract_images(tmp_path / f"{part}.txt", tmp_path / part, detector=fake.FakeDetector(), boxes=tmp_path / f"{part}.jsonl")
    mine = {**read_box_ids(tmp_path / "a"), **read_box_ids(tmp_path / "b")}
    assert mine["photo0003"] == ["photo0003-0", 1] and len(mine) == 4
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "both")  # though each part had its own file of boxes
    assert read_box_ids(tmp_path / "both") == mine
    split(tmp_path / "both", tmp_path / "parts", by="4")
    assert read_box_ids(tmp_path / "parts" / "part-2") == {"photo0002": mine["photo0002"]}
    repair(tmp_path / "both", tmp_path / "repaired", CheckReport(""))
    assert read_box_ids(tmp_path / "repaired") == mine
    convert(tmp_path / "both", tmp_path / "converted")
    assert read_box_ids(tmp_path / "converted") == mine
    convert(tmp_path / "parts", tmp_path / "converted parts")
    assert read_box_ids(tmp_path / "converted parts") == mine
    assert "ids of given boxes" in convert(tmp_path / "both", tmp_path / "npz", to="npz").lacks
    extract_images(tmp_path / "a.txt", tmp_path / "both", detector=fake.FakeDetector(), overwrite=True)
    assert read_box_ids(tmp_path / "both") == {}


def test_given_boxes_in_coco_form(make_photos: Photos, fake: ModuleType, tmp_path: Path) -> None:
    photos = make_photos(2)
    document = {
        "images": [{"id": 5, "file_name": "photo0001.jpg"}, {"id": 3, "file_name": "photo0000.jpg"}, {"id": 9, "file_name": "else.jpg"}],
        "annotations": [
            {"id": 11, "image_id": 3, "bbox": [4, 5, 10, 20], "category_id": 1},
            {"id": 12, "image_id": 5, "bbox": [0, 0, 7, 8], "category_id": 1},
            {"id": 10, "image_id": 3, "bbox": [1, 2, 3, 4], "category_id": 1},
        ],
    }
    (tmp_path / "instances.json").write_text(json.dumps(document))
    extract_images(photos, tmp_path / "out", detector=fake.FakeDetector(), boxes=tmp_path / "instances.json")
    np.testing.assert_array_equal(ImageDB(tmp_path / "out")["photo0000"].boxes, [[4, 5, 14, 25], [1, 2, 4, 6]])
    assert (tmp_path / "out" / "box_ids.jsonl").read_text().splitlines()[0] == '{"key": "photo0000", "ids": [11, 10]}'
    (tmp_path / "instances.json").write_text(json.dumps({**document, "annotations": document["annotations"][:2]}))
    with pytest.raises(SettingsDiffer, match="boxes_sha256"):
        extract_images(photos, tmp_path / "out", detector=fake.FakeDetector(), boxes=tmp_path / "instances.json")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no boxes"),
        ("[1, 2]", "line 1: expected"),
        ('{"image": "a", "boxes": [[1, 2, 3]]}', "a box must be four numbers"),
        ('{"image": "a", "boxes": [[1, 2, 3, "x"]]}', "a box must be four numbers"),
        ('{"image": "a", "boxes": [[1, 2, 3, 4]], "ids": []}', "1 boxes but 0 ids"),
        ('{"image": "a", "boxes": [[1, 2, 3, 4]]}\n{"image": "a", "boxes": [[1, 2, 3, 4]]}', "'a' twice"),
        ('{"annotations": [{"image_id": 1, "bbox": [1, 2, 3, 4]}], "images": []}', "is no COCO file"),
    ],
)
def test_box_files_that_are_none(text: str, said: str, make_photos: Photos, fake: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "boxes").write_text(text)
    with pytest.raises(BadInput) as caught:
        extract_images(make_photos(1), tmp_path / "out", detector=fake.FakeDetector(), boxes=tmp_path / "boxes")
    assert said in str(caught.value)


# --- the run around it -----------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_refused_before_the_work(
    make_photos: Photos, fake: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": 3000})())
    detector = fake.FakeDetector()
    with pytest.raises(UniterError, match=r"are needed for 4 images and .* has 3.0 kB free"):
        extract_images(make_photos(4), tmp_path / "out", detector=detector)
    assert detector.batches == []
    assert extract_images(tmp_path / "photos", tmp_path / "out", detector=detector, check_space=False).complete


def test_stopping_keeps_whole_batches(make_photos: Photos, fake: ModuleType, content: Content, tmp_path: Path) -> None:
    photos = make_photos(12)
    stop = threading.Event()

    class Stopping(fake.FakeDetector):  # type: ignore[name-defined, misc]
        def detect(self, images: Any, *, boxes: Any = None) -> list[RawRegions]:
            stop.set()
            found: list[RawRegions] = super().detect(images, boxes=boxes)
            return found

    with pytest.raises(Stopped, match="stopped after 3 images of this run"):
        extract_images(photos, tmp_path / "out", detector=Stopping(), batch_size=3, stop=stop)
    detector = fake.FakeDetector()
    summary = extract_images(photos, tmp_path / "out", detector=detector, batch_size=3)
    assert summary.extracted == 9 and detector.batches == [3, 3, 3]
    extract_images(photos, tmp_path / "one", detector=fake.FakeDetector(), batch_size=3)
    assert content(tmp_path / "out") == content(tmp_path / "one")


def test_bounds_of_boxes(make_photos: Photos, fake: ModuleType, tmp_path: Path) -> None:
    photos = make_photos(2)
    extract_images(photos, tmp_path / "two", detector=fake.FakeDetector(), max_boxes=2)  # moves the minimum of 3
    assert ImageDB(tmp_path / "two").region_counts.tolist() == [2, 2]
    extract_images(photos, tmp_path / "nine", detector=fake.FakeDetector(), min_boxes=9)  # moves the maximum of 7
    assert ImageDB(tmp_path / "nine").region_counts.tolist() == [9, 9]
    with pytest.raises(BadInput, match="--min-boxes 5 and --max-boxes 4"):
        extract_images(photos, tmp_path / "none", detector=fake.FakeDetector(), min_boxes=5, max_boxes=4)


def test_shares_from_the_environment() -> None:
    share = share_from_environment({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"})
    assert (share.index, share.count, share.local_index) == (3, 8, 1)
    assert share_from_environment({}).count == 1
    assert share_from_environment({"RANK": "0", "WORLD_SIZE": "1"}).source == ""
    share = share_from_environment(
        {"SLURM_ARRAY_TASK_ID": "14", "SLURM_ARRAY_TASK_COUNT": "5", "SLURM_ARRAY_TASK_MIN": "10", "SLURM_ARRAY_TASK_STEP": "2"}
    )
    assert (share.index, share.count) == (2, 5)
    # An array of 2 jobs with 4 tasks each, started by srun.
    share = share_from_environment(
        {
            "SLURM_ARRAY_TASK_ID": "1",
            "SLURM_ARRAY_TASK_COUNT": "2",
            "SLURM_STEP_NUM_TASKS": "4",
            "SLURM_PROCID": "3",
            "SLURM_LOCALID": "1",
        }
    )
    assert (share.index, share.count, share.local_index) == (7, 8, 1)
    # A batch script's own shell is one process, whatever number of tasks the job may start.
    assert share_from_environment({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}).count == 1
    with pytest.raises(BadInput, match="--shard I/N"):
        share_from_environment({"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MIN": "1"})


def test_importing_needs_neither_detectron2_nor_torch() -> None:
    code = "import sys, uniter.extract, uniter.extract.images; sys.exit(any(name in sys.modules for name in ('torch', 'detectron2')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    import uniter.extract

    with pytest.raises(AttributeError):
        uniter.extract.nothing  # noqa: B018


@pytest.mark.slow
def test_host_work_per_photograph(fake: ModuleType, tmp_path: Path) -> None:
    """Read, decode, bring to Bottom-Up-Attention's size and write: 25 ms of one core for a 640 x 480 photograph."""
    small = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "photo.jpg"), cv2.resize(small, (640, 480), interpolation=cv2.INTER_CUBIC), [cv2.IMWRITE_JPEG_QUALITY, 92])
    (tmp_path / "list.jsonl").write_text("\n".join(json.dumps({"image": "photo.jpg", "key": str(number)}) for number in range(200)))
    rng = np.random.default_rng(1)
    corners = np.sort(rng.random((40, 2, 2)), axis=1).reshape(40, 4) * 480
    raw = RawRegions(corners.astype(np.float32), rng.random((40, 2048), np.float32), np.full((40, 1601), 1 / 1601, np.float32))

    class Instant(fake.FakeDetector):  # type: ignore[name-defined, misc]
        def detect(self, images: Any, *, boxes: Any = None) -> list[RawRegions]:
            return [raw] * len(images)

    classes = tuple(f"class {number}" for number in range(1600))
    detector = Instant(preparation=CaffePreparation(), feature_width=2048, class_names=classes)
    boxes = tmp_path / "boxes.jsonl"  # given, so that selection is left out of the measure
    boxes.write_text("\n".join(json.dumps({"image": str(number), "boxes": [[1, 1, 9, 9]]}) for number in range(200)))
    start = time.process_time()
    summary = extract_images(tmp_path / "list.jsonl", tmp_path / "out", detector=detector, boxes=boxes, batch_size=8)
    milliseconds = 1000 * (time.process_time() - start) / 200
    assert summary.images == 200 and summary.bytes_on_disk > 200 * 40 * 2 * (2048 + 1601)
    assert milliseconds < 25, f"{milliseconds:.1f} ms"
    print(f"{milliseconds:.1f} ms per photograph")


MEMORY = """
import sys, json, os
sys.path.insert(0, {folder!r})
from fake_extraction import FakeDetector, extract_images
from pathlib import Path
photos, out, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
names = [str(photos / f"photo{{n % 20:04d}}.jpg") for n in range(count)]
(Path(out).with_suffix(".jsonl")).write_text("\\n".join(json.dumps({{"image": name, "key": str(n)}}) for n, name in enumerate(names)))
extract_images(Path(out).with_suffix(".jsonl"), out, detector=FakeDetector(), batch_size=8)
print([int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_stays_flat(make_photos: Photos, fake: ModuleType, tmp_path: Path) -> None:
    photos = make_photos(20)
    script = MEMORY.format(folder=os.path.dirname(str(fake.__file__)))  # noqa: PTH120
    peaks = {}
    for count in (50, 2000):
        command = [sys.executable, "-c", script, str(photos), str(tmp_path / f"out{count}"), str(count)]
        peaks[count] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    # 1,950 more images and 1 MB of records may cost what the list and the LMDB pages take, kB.
    assert peaks[2000] - peaks[50] < 30_000, peaks
