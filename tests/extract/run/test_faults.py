"""Whose fault a failure is: many images may be at fault in a row, and one fault of the machine is no image's."""

import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from uniter.datasets.errors import UniterError
from uniter.datasets.image_db.writing.side_files import read_failures
from uniter.extract import extract_images
from uniter.extract.detector.protocol import RawRegions
from uniter.extract.images.decoding import MemoryBudget
from uniter.extract.run.faults import MachineFault

Photos = Callable[..., Path]


def listing(folder: Path, photos: Path, missing: range, count: int) -> Path:
    """A list of photographs of which some are not there."""
    names = [f"{photos}/{'gone' if number in missing else 'photo'}{number:04d}.jpg\n" for number in range(count)]
    (folder / "list.txt").write_text("".join(names))
    return folder / "list.txt"


@pytest.mark.parametrize("missing", [range(12), range(4, 16), range(20, 32), range(29, 32)], ids=str)
def test_many_missing_images_are_their_own_fault_where_others_are_there(
    missing: range, make_photos: Photos, fake: ModuleType, tmp_path: Path
) -> None:
    listed = listing(tmp_path, make_photos(32), missing, 32)
    summary = extract_images(listed, tmp_path / "out", detector=fake.FakeDetector(), batch_size=3, unit_images=8)
    assert summary.complete and (summary.images, summary.failures) == (32 - len(missing), len(missing))
    assert {row["key"] for row in read_failures(tmp_path / "out" / "failures.jsonl")} == {f"gone{number:04d}" for number in missing}
    assert len(summary.first_failures) == 3 and "No such file" in summary.first_failures[0]


class Picky:
    """Makes a detector that fails on images of some widths, or from some call on."""

    def __init__(self, fake: ModuleType, error: Exception, *, widths: tuple[int, ...] = (), after: int | None = None) -> None:
        self.detector, self.calls = fake.FakeDetector(device="cuda:0"), 0
        detect = self.detector.detect

        def picky(images: Any, *, boxes: Any = None) -> list[RawRegions]:
            self.calls += 1
            if any(image.size[1] in widths for image in images) or (after is not None and self.calls > after):
                raise error
            found: list[RawRegions] = detect(images, boxes=boxes)
            return found

        self.detector.detect = picky


def out_of_memory() -> Exception:
    torch = pytest.importorskip("torch")
    error: Exception = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
    return error


@pytest.mark.parametrize("error", [out_of_memory, lambda: IndexError("list index out of range")], ids=["memory", "unforeseen"])
def test_what_some_images_provoke_is_theirs_and_what_all_do_is_not(
    error: Callable[[], Exception], make_photos: Photos, fake: ModuleType, tmp_path: Path
) -> None:
    photos = make_photos(28)  # seven widths, over and over
    some = Picky(fake, error(), widths=(40, 41, 42, 43, 44))
    summary = extract_images(photos, tmp_path / "some", detector=some.detector, batch_size=2)
    assert summary.complete and (summary.images, summary.failures) == (8, 20)
    for after in (0, 3, 9):
        with pytest.raises(MachineFault, match=r"images in a row.*the same command continues"):
            extract_images(photos, tmp_path / f"all{after}", detector=Picky(fake, error(), after=after).detector, batch_size=2)
        whole = extract_images(photos, tmp_path / f"all{after}", detector=fake.FakeDetector(), batch_size=2)
        assert whole.complete and (whole.images, whole.failures) == (28, 0)


def test_one_image_that_never_fits_is_tried_again_and_stays_a_failure(make_photos: Photos, fake: ModuleType, tmp_path: Path) -> None:
    photos, options = make_photos(7), {"batch_size": 1}
    for _ in range(2):
        detector = Picky(fake, out_of_memory(), widths=(43,)).detector
        summary = extract_images(photos, tmp_path / "out", detector=detector, retry_failed=True, **options)
        assert summary.complete and (summary.images, summary.failures) == (6, 1)


def test_a_command_that_used_no_image_leaves_nothing(make_photos: Photos, fake: ModuleType, tmp_path: Path) -> None:
    photos = make_photos(2)
    for path in photos.iterdir():
        path.write_text("<html>")
    with pytest.raises(UniterError, match=r"none of 2 images could be used \(.*photo0000\.jpg: it is no image.*nothing was extracted"):
        extract_images(photos, tmp_path / "out", detector=fake.FakeDetector())
    assert not (tmp_path / "out").exists()


def test_a_budget_of_memory_is_shared_and_never_waits_for_ever() -> None:
    budget, most, now, lock = MemoryBudget(100), 0, 0, threading.Lock()

    def take(wanted: int) -> None:
        nonlocal most, now
        with budget.taking(wanted):
            with lock:
                now += min(wanted, 100)
                most = max(most, now)
            threading.Event().wait(0.002)
            with lock:
                now -= min(wanted, 100)

    threads = [threading.Thread(target=take, args=(wanted,)) for wanted in (30, 60, 1000, 10, 90, 50, 50, 101) * 5]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads) and 60 <= most <= 100
