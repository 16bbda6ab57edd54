"""Lists of images that change after their database was begun: what is new is done, what went is kept, and a kill changes nothing."""

import json
import shutil
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from uniter.datasets.errors import SettingsDiffer
from uniter.datasets.image_db import ImageDB
from uniter.datasets.image_db.writing.side_files import read_box_ids, read_failures
from uniter.extract import extract_images
from uniter.extract.run.extraction import Stopped

Content = Callable[[Path], dict[str, Any]]
Photos = Callable[..., Path]
OPTIONS: dict[str, Any] = {"batch_size": 2, "unit_images": 4}


def keys(out: Path) -> set[str]:
    return set(ImageDB(out).keys_list)


def test_it_grows_again_and_again(make_photos: Photos, fake: ModuleType, content: Content, tmp_path: Path) -> None:
    photos, away = make_photos(15), tmp_path / "away"
    away.mkdir()
    for number in (*range(1, 15, 3), *range(2, 15, 3)):
        (photos / f"photo{number:04d}.jpg").rename(away / f"photo{number:04d}.jpg")
    assert extract_images(photos, tmp_path / "out", detector=fake.FakeDetector(), **OPTIONS).images == 5
    for first, count in ((1, 10), (2, 15)):
        before = content(tmp_path / "out")["records"]
        for number in range(first, 15, 3):
            (away / f"photo{number:04d}.jpg").rename(photos / f"photo{number:04d}.jpg")
        detector = fake.FakeDetector()
        summary = extract_images(photos, tmp_path / "out", detector=detector, **OPTIONS)
        assert (summary.complete, summary.requested, summary.images, summary.extracted) == (True, count, count, 5)
        assert detector.batches == [2, 2, 1], "units of four, of the new ones alone"
        after = content(tmp_path / "out")["records"]
        assert {key: after[key] for key in before} == before and len(after) == count
    whole = content(tmp_path / "out")
    assert extract_images(photos, tmp_path / "out", detector=fake.FakeDetector(), **OPTIONS).extracted == 0
    assert content(tmp_path / "out") == whole and not (tmp_path / "out" / "added.json").exists()


@pytest.mark.parametrize("calls", range(1, 6))
def test_stopped_while_it_grows_equals_unbroken(
    calls: int, make_photos: Photos, fake: ModuleType, content: Content, tmp_path: Path
) -> None:
    photos = make_photos(14)
    (photos / "photo0003.jpg").write_text("broken")
    listed = tmp_path / "list.txt"
    names = [f"{photos}/photo{number:04d}.jpg\n" for number in range(14)]
    listed.write_text("".join(names[2:7]))
    extract_images(listed, tmp_path / "out", detector=fake.FakeDetector(), **OPTIONS)
    shutil.copytree(tmp_path / "out", tmp_path / "unbroken")
    listed.write_text("".join(names))
    extract_images(listed, tmp_path / "unbroken", detector=fake.FakeDetector(), **OPTIONS)
    stop, detector = threading.Event(), fake.FakeDetector()
    detect = detector.detect

    def counting(images: Any, **more: Any) -> Any:
        if len(detector.batches) == calls - 1:
            stop.set()
        return detect(images, **more)

    detector.detect = counting
    if calls < 5:
        with pytest.raises(Stopped):
            extract_images(listed, tmp_path / "out", detector=detector, stop=stop, **OPTIONS)
    for shard in ((1, 2), (0, 2)):
        summary = extract_images(listed, tmp_path / "out", detector=fake.FakeDetector(), shard=shard, **OPTIONS)
    assert summary.complete and (summary.images, summary.failures, summary.requested) == (13, 1, 14)
    assert content(tmp_path / "out") == content(tmp_path / "unbroken")


def test_an_unfinished_database_may_grow(make_photos: Photos, fake: ModuleType, tmp_path: Path) -> None:
    """Nothing that it holds is done again, and everything that the new list names is accounted for."""
    photos = make_photos(12)
    for number in (0, 5):
        (photos / f"photo{number:04d}.jpg").rename(tmp_path / f"{number}.jpg")
    extract_images(photos, tmp_path / "out", detector=fake.FakeDetector(), shard=(1, 2), **OPTIONS)
    for number in (0, 5):
        (tmp_path / f"{number}.jpg").rename(photos / f"photo{number:04d}.jpg")
    summary = extract_images(photos, tmp_path / "out", detector=fake.FakeDetector(), **OPTIONS)
    assert summary.complete and (summary.images, summary.extracted, summary.requested) == (12, 8, 12)
    assert len(keys(tmp_path / "out")) == 12


def test_what_went_is_kept_and_said(make_photos: Photos, fake: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    photos = make_photos(5)
    extract_images(photos, tmp_path / "out", detector=fake.FakeDetector(), **OPTIONS)
    (photos / "photo0001.jpg").unlink()
    (photos / "photo0003.jpg").rename(photos / "other.jpg")
    summary = extract_images(photos, tmp_path / "out", detector=fake.FakeDetector(), **OPTIONS)
    assert (summary.images, summary.requested, summary.gone, summary.extracted) == (6, 6, 2, 1)
    assert "new are 1 (other)" in caplog.text and "no longer there are 2 (photo0001, photo0003); their regions are kept" in caplog.text
    (photos / "other.jpg").unlink()
    assert extract_images(photos, tmp_path / "out", detector=fake.FakeDetector(), **OPTIONS).gone == 3


def test_a_replaced_photograph_is_refused_by_name(make_photos: Photos, fake: ModuleType, content: Content, tmp_path: Path) -> None:
    photos = make_photos(4)
    (photos / "photo0000.jpg").write_text("broken")
    extract_images(photos, tmp_path / "out", detector=fake.FakeDetector(), **OPTIONS)
    before = content(tmp_path / "out")
    (photos / "photo0000.jpg").write_text("broken otherwise")  # it has no regions: --retry-failed tries it again
    assert extract_images(photos, tmp_path / "out", detector=fake.FakeDetector(), **OPTIONS).complete
    (photos / "photo0002.jpg").write_bytes((photos / "photo0001.jpg").read_bytes() + b" ")
    with pytest.raises(SettingsDiffer, match=r"a photograph has changed since .*photo0002\.jpg was [\d,]+ bytes long, now"):
        extract_images(photos, tmp_path / "out", detector=fake.FakeDetector(), **OPTIONS)
    assert content(tmp_path / "out") == before
    assert extract_images(photos, tmp_path / "out", detector=fake.FakeDetector(), overwrite=True, **OPTIONS).extracted == 3


def test_failures_of_a_grown_database_are_tried_again(make_photos: Photos, fake: ModuleType, tmp_path: Path) -> None:
    photos = make_photos(6)
    whole = (photos / "photo0001.jpg").read_bytes()
    (photos / "photo0001.jpg").write_bytes(whole[:90])
    (photos / "photo0005.jpg").rename(tmp_path / "5.jpg")
    extract_images(photos, tmp_path / "out", detector=fake.FakeDetector(), **OPTIONS)
    (tmp_path / "5.jpg").rename(photos / "photo0005.jpg")
    assert extract_images(photos, tmp_path / "out", detector=fake.FakeDetector(), **OPTIONS).failures == 1
    retried = extract_images(photos, tmp_path / "out", detector=fake.FakeDetector(), retry_failed=True, **OPTIONS)
    assert retried.complete and (retried.failures, retried.failed) == (1, 1), "it is still broken"
    (photos / "photo0001.jpg").write_bytes(whole)
    mended = extract_images(photos, tmp_path / "out", detector=fake.FakeDetector(), retry_failed=True, **OPTIONS)
    assert mended.complete and (mended.images, mended.failures, mended.extracted) == (6, 0, 1)
    assert len(keys(tmp_path / "out")) == 6


def test_ids_of_given_boxes_grow_with_it(make_photos: Photos, fake: ModuleType, tmp_path: Path) -> None:
    photos = make_photos(3)
    rows = [{"image": f"photo{number:04d}.jpg", "boxes": [[1, 1, 9, 9]], "ids": [number]} for number in range(3)]
    (tmp_path / "boxes.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (photos / "photo0001.jpg").rename(tmp_path / "1.jpg")
    extract_images(photos, tmp_path / "out", detector=fake.FakeDetector(), boxes=tmp_path / "boxes.jsonl", **OPTIONS)
    (tmp_path / "1.jpg").rename(photos / "photo0001.jpg")
    extract_images(photos, tmp_path / "out", detector=fake.FakeDetector(), boxes=tmp_path / "boxes.jsonl", **OPTIONS)
    assert read_box_ids(tmp_path / "out") == {f"photo{number:04d}": [number] for number in range(3)}


@pytest.mark.parametrize("kept", [False, True])
def test_killed_when_only_the_end_is_left(
    kept: bool, make_photos: Photos, fake: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new images are all done, but not yet what stands beside their records: ids and sizes are still theirs afterwards, once."""
    photos = make_photos(3)
    rows = [{"image": f"photo{number:04d}.jpg", "boxes": [[1, 1, 9, 9]], "ids": [number]} for number in range(3)]
    (tmp_path / "boxes.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = {"detector": fake.FakeDetector(), "boxes": tmp_path / "boxes.jsonl", **OPTIONS}
    (photos / "photo0001.jpg").rename(tmp_path / "1.jpg")
    extract_images(photos, tmp_path / "out", **arguments)
    (tmp_path / "1.jpg").rename(photos / "photo0001.jpg")
    last = "datasets.image_db.writing.finishing.write_failures" if kept else "extract.run.store.write_box_ids"
    with monkeypatch.context() as patch:
        patch.setattr(f"uniter.{last}", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            extract_images(photos, tmp_path / "out", **arguments)
    summary = extract_images(photos, tmp_path / "out", **arguments)
    assert summary.complete and (summary.extracted, summary.requested) == (0, 3)
    lines = [json.loads(line) for line in (tmp_path / "out" / "box_ids.jsonl").read_text().splitlines()]
    assert sorted((row["key"], row["ids"]) for row in lines) == [(f"photo{number:04d}", [number]) for number in range(3)]
    (photos / "photo0001.jpg").write_bytes((photos / "photo0002.jpg").read_bytes() + b" ")
    with pytest.raises(SettingsDiffer, match=r"a photograph has changed since .*photo0001\.jpg"):
        extract_images(photos, tmp_path / "out", **arguments)


def test_what_no_retry_can_mend_is_not_tried_again(make_photos: Photos, fake: ModuleType, tmp_path: Path) -> None:
    photos = make_photos(2)
    (tmp_path / "list.jsonl").write_text(
        "\n".join(json.dumps({"image": str(photos / f"photo000{n}.jpg"), "key": key}) for n, key in enumerate(("good", "k" * 600)))
    )
    extract_images(tmp_path / "list.jsonl", tmp_path / "out", detector=fake.FakeDetector())
    (row,) = read_failures(tmp_path / "out" / "failures.jsonl")
    assert row["retry"] is False
    summary = extract_images(tmp_path / "list.jsonl", tmp_path / "out", detector=fake.FakeDetector(), retry_failed=True)
    assert summary.complete and (summary.failures, summary.failed) == (1, 0)


def test_tars_of_another_cut_do_not_become_files(make_photos: Photos, fake: ModuleType, tmp_path: Path) -> None:
    photos = make_photos(2)
    extract_images(photos, tmp_path / "out", detector=fake.FakeDetector())
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for path in photos.iterdir():
            tar.add(path, path.name)
    with pytest.raises(SettingsDiffer, match=r"images\.unit_images was 128, now null"):
        extract_images(tmp_path / "a.tar", tmp_path / "out", detector=fake.FakeDetector(), key="stem")
