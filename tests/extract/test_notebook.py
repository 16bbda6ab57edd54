"""`extract_regions("photo.jpg")`: the record, the picture with its boxes, plain arrays."""

import base64
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest

from uniter.datasets.errors import BadInput
from uniter.datasets.image_db import RegionFeatures
from uniter.extract import PhotographRegions, RegionExtractor, extract_regions, notebook


@pytest.fixture
def photos(make_photos: Callable[..., Path]) -> list[Path]:
    return sorted(make_photos(3).iterdir())


def picture_in(html: str) -> np.ndarray:
    (found,) = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', html)
    return cv2.imdecode(np.frombuffer(base64.b64decode(found), np.uint8), cv2.IMREAD_COLOR)


def test_one_photograph_gives_one_record_and_a_list_a_list(fake: ModuleType, photos: list[Path]) -> None:
    wanted = RegionExtractor(fake.FakeDetector())(photos)
    one = extract_regions(str(photos[0]), fake.FakeDetector())
    assert isinstance(one, RegionFeatures) and isinstance(one, PhotographRegions)
    several = extract_regions(photos, fake.FakeDetector())
    assert isinstance(several, list) and [len(record) for record in several] == [len(record) for record in wanted]
    np.testing.assert_array_equal(several[1].features, wanted[1].features)
    assert one.class_names == ("cat", "dog", "tree", "house", "boat")
    assert repr(one) == f"<{len(one)} regions of {photos[0]}, features 8 wide>"
    assert repr(wanted[0]) == f"<{len(one)} regions of {one.size[1]} x {one.size[0]} pixels, features 8 wide>"
    pixels = cv2.imread(str(photos[0]))
    assert pixels is not None
    of_array = extract_regions(pixels, fake.FakeDetector(), max_boxes=3)
    assert len(of_array) == 3 and repr(of_array) == "<3 regions, features 8 wide>"
    with pytest.raises(BadInput, match="expected a photograph"):
        extract_regions("nowhere.jpg", fake.FakeDetector())


def test_a_notebook_shows_the_picture_with_its_boxes(fake: ModuleType, photos: list[Path], tmp_path: Path) -> None:
    regions = extract_regions(photos[0], fake.FakeDetector())
    html = regions._repr_html_()
    original = cv2.imread(str(photos[0]))
    assert original is not None
    shown = picture_in(html)
    assert shown.shape == original.shape and np.abs(shown.astype(int) - original).mean() > 10  # boxes are drawn on it
    assert f"{len(regions)} regions, features 8 wide" in html and str(photos[0]) in html
    assert any(name in html for name in regions.class_names)
    assert picture_in(extract_regions(original, fake.FakeDetector())._repr_html_()).shape == original.shape
    # Fewer rows are of the same photograph; it may be gone or another one by now.
    few = regions.rows(slice(2))
    assert isinstance(few, PhotographRegions) and few.class_names == regions.class_names and "2 regions" in few._repr_html_()
    cv2.imwrite(str(photos[0]), np.zeros((50, 10, 3), np.uint8))
    assert "the photograph is 10 × 50 now, the regions are of one of" in regions._repr_html_()
    photos[0].unlink()
    assert "not a readable image" in regions._repr_html_()


def test_names_from_files_become_no_markup(fake: ModuleType, photos: list[Path], tmp_path: Path) -> None:
    hostile = tmp_path / "<script>alert(1)<b>.jpg"
    hostile.write_bytes(photos[0].read_bytes())
    html = extract_regions(hostile, fake.FakeDetector(class_names=("<img src=x>", "b", "c", "d", "e")))._repr_html_()
    assert "<script" not in html and "<img src=x" not in html and "&lt;script&gt;" in html


def test_arrays_are_plain(fake: ModuleType, photos: list[Path]) -> None:
    regions = extract_regions(photos[0], fake.FakeDetector())
    arrays = regions.numpy()
    assert set(arrays) == {"features", "norm_bb", "conf", "boxes", "soft_labels", "size"}
    assert arrays["features"].dtype == arrays["boxes"].dtype == np.float32 and arrays["size"].tolist() == list(regions.size or ())
    arrays["features"][:] = 0  # they are the caller's
    assert regions.features.any()


def test_a_detector_by_name_is_kept_between_calls(monkeypatch: pytest.MonkeyPatch, fake: ModuleType, photos: list[Path]) -> None:
    built = []

    class Counted(RegionExtractor):
        def __init__(self, detector: str, **settings: object) -> None:
            built.append((detector, settings))
            super().__init__(fake.FakeDetector(), max_boxes=settings.get("max_boxes"))  # type: ignore[arg-type]

    monkeypatch.setattr(notebook, "RegionExtractor", Counted)
    notebook.forget_detectors()
    for _ in range(2):
        extract_regions(photos[0], "on-board")
    assert len(extract_regions(photos[1], "on-board", max_boxes=3)) == 3
    assert built == [("on-board", {}), ("on-board", {"max_boxes": 3})]
    notebook.forget_detectors()
    extract_regions(photos[0], "on-board")
    assert len(built) == 3
    notebook.forget_detectors()
