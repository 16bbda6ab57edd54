"""A detector from elsewhere: the documentation's torchvision Faster R-CNN, without Detectron2, and what the border refuses."""

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from uniter.datasets.errors import UniterError
from uniter.datasets.image_db import ImageDB
from uniter.extract import RegionExtractor, extract_images
from uniter.extract.detector.protocol import RawRegions, checked_regions

PAGE = Path(__file__).parents[3] / "docs" / "extraction.md"


def documented() -> tuple[str, str]:
    """The page's class, and the three lines that use it."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    (made,) = [block for block in blocks if "class TorchvisionDetector" in block]
    (used,) = [block for block in blocks if "detector = TorchvisionDetector" in block]
    return made, used


def test_a_torchvision_detector_is_used_in_three_lines(
    make_photos: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn

    monkeypatch.setitem(sys.modules, "detectron2", None)  # whoever imports it fails
    torch.manual_seed(1)
    model = fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None, num_classes=6, min_size=64, max_size=96)
    names: dict[str, Any] = {
        "model": model, "class_names": ("cat", "dog", "tree", "house", "boat"), "extract_images": extract_images,
        "RegionExtractor": RegionExtractor,
    }  # fmt: skip
    photos = make_photos(3)
    (photos / "cat.jpg").write_bytes(sorted(photos.glob("*.jpg"))[0].read_bytes())
    made, used = documented()
    assert len(used.splitlines()) == 3
    monkeypatch.chdir(tmp_path)
    exec(made, names)
    exec(used, names)
    database = ImageDB(tmp_path / "out.lmdb")
    kept, header = database["cat"], database.header
    assert header is not None and kept.soft_labels is not None
    assert len(database) == 4 and kept.features.shape[1] == 1024 and kept.soft_labels.shape[1] == 6
    assert header["class_names"] == ["cat", "dog", "tree", "house", "boat"]
    assert header["weights_sha256"] == names["detector"].settings()["weights"]["sha256"]
    assert np.array_equal(np.asarray(names["regions"].features), np.asarray(kept.features))
    # Given boxes: those of the database again, whose features they were.
    given = tmp_path / "boxes.jsonl"
    boxes = np.asarray(kept.boxes).tolist()
    given.write_text(f'{{"image": "cat.jpg", "boxes": {boxes}}}\n')
    extract_images(photos / "cat.jpg", tmp_path / "given.lmdb", detector=names["detector"], boxes=given)
    again = ImageDB(tmp_path / "given.lmdb")["cat"]
    assert np.abs(np.asarray(again.features, dtype=np.float32) - np.asarray(kept.features, dtype=np.float32)).max() < 0.05


def good(detector: Any) -> RawRegions:
    shares = np.full((2, len(detector.class_names) + 1), 1 / (len(detector.class_names) + 1), dtype=np.float32)
    return RawRegions(np.zeros((2, 4), dtype=np.float32), np.zeros((2, detector.feature_width), dtype=np.float32), shares)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"boxes": np.zeros((2, 5), dtype=np.float32)}, r"boxes are \(2, 5\) float32; expected a float32 array of \(2, 4\)"),
        ({"features": np.zeros((2, 3), dtype=np.float32)}, r"features are \(2, 3\) float32"),
        ({"features": np.zeros((2, 8))}, r"features are \(2, 8\) float64"),
        (
            {"probabilities": np.zeros((2, 5), dtype=np.float32)},
            r"probabilities are \(2, 5\) float32; expected a float32 array of \(2, 6\)",
        ),
        ({"probabilities": np.zeros((2, 6), dtype=np.float32)}, r"background first, do not add up to 1"),
        ({"boxes": np.full((2, 4), np.nan, dtype=np.float32)}, r"a box holds a number that is not finite"),
        ({"confidence": np.zeros(3, dtype=np.float32)}, r"confidence are \(3,\) float32"),
        ({"features": None}, r"features are a NoneType"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], words: str, fake: ModuleType) -> None:
    detector = fake.FakeDetector()
    assert checked_regions([good(detector)], detector, 1)
    with pytest.raises(ValueError, match=words):
        checked_regions([replace(good(detector), **change)], detector, 1)


def test_a_detector_of_wrong_shapes_ends_the_run_in_words(fake: ModuleType, make_photos: Callable[..., Path], tmp_path: Path) -> None:
    class Wrong(fake.FakeDetector):  # type: ignore[misc, name-defined]
        def detect(self, images: Any, *, boxes: Any = None) -> Any:
            return super().detect(images, boxes=boxes)[:-1]

    with pytest.raises(UniterError, match="returned regions of 0 images for 1"):
        extract_images(make_photos(4), tmp_path / "out.lmdb", detector=Wrong())


def test_a_detector_may_have_a_rule_of_its_own(fake: ModuleType, make_photos: Callable[..., Path], tmp_path: Path) -> None:
    class Own(fake.FakeDetector):  # type: ignore[misc, name-defined]
        def settings(self) -> dict[str, Any]:
            return {**super().settings(), "selection_rule": "own"}

        def detect(self, images: Any, *, boxes: Any = None) -> Any:
            confidence = np.array([0.0] * 8 + [0.5, 0.9, 0.6, 0.7], dtype=np.float32)
            return [replace(raw, confidence=confidence) for raw in super().detect(images, boxes=boxes)]

    extract_images(make_photos(2), tmp_path / "out.lmdb", detector=Own())
    database = ImageDB(tmp_path / "out.lmdb")
    for key in database:
        assert np.asarray(database[key].conf, dtype=np.float32).tolist() == pytest.approx([0.9, 0.7, 0.6, 0.5], abs=1e-3)
    assert database.header is not None and database.header["selection"]["rule"].startswith("own: the detector's confidence")
