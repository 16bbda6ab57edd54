"""Regions on demand: the numbers of a region database, kept by content under the settings that made them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from uniter.datasets.errors import BadInput, SettingsDiffer, UniterError
from uniter.datasets.image_db import ImageDB
from uniter.extract import RegionExtractor, extract_images
from uniter.extract.detector.preparation import CaffePreparation
from uniter.extract.images.decoding import decode_image


@pytest.fixture
def photos(make_photos):
    return sorted(make_photos(5).iterdir())


def content_of(regions):
    return [
        (found.features.tobytes(), found.norm_bb.tobytes(), found.boxes.tobytes(), found.conf.tobytes(), found.soft_labels.tobytes())
        for found in regions
    ]


def test_regions_are_those_of_a_database_of_the_same_batches(fake, photos, tmp_path):
    found = RegionExtractor(fake.FakeDetector(), batch_size=2)(photos)
    extract_images(photos[0].parent, tmp_path / "out.lmdb", detector=fake.FakeDetector(), batch_size=2)
    database = ImageDB(tmp_path / "out.lmdb")
    assert content_of(found) == content_of(database[photo.stem] for photo in photos)
    assert found[0].features.dtype == np.float16 and found[0].size == cv2.imread(str(photos[0])).shape[:2]


def test_what_was_detected_is_kept_for_the_next_process_and_is_the_same(fake, photos, tmp_path):
    detector = fake.FakeDetector()
    first = RegionExtractor(detector, cache=tmp_path / "kept", batch_size=2)
    fresh = first(photos)
    assert detector.batches == [2, 2, 1] and first.detected == 5
    again = RegionExtractor(fake.FakeDetector(), cache=tmp_path / "kept")
    assert content_of(again(photos[::-1])) == content_of(fresh)[::-1] and again.detected == 0


def test_a_photograph_is_known_by_its_content_under_any_name(fake, photos, tmp_path):
    detector = fake.FakeDetector()
    extractor = RegionExtractor(detector, cache=tmp_path / "kept")
    copy = tmp_path / "copy.jpg"
    copy.write_bytes(photos[0].read_bytes())
    found = extractor([photos[0], copy, str(photos[0])])
    assert extractor.detected == 1 and len(set(content_of(found))) == 1
    copy.write_bytes(photos[1].read_bytes())
    assert content_of(extractor([copy])) != content_of(found[:1]) and extractor.detected == 2


def test_arrays_are_upright_bgr_pixels(fake, photos, tmp_path):
    pixels = [decode_image(photo.read_bytes()) for photo in photos[:2]]
    of_files, of_arrays = (RegionExtractor(fake.FakeDetector(), cache=tmp_path / "kept", batch_size=2) for _ in range(2))
    assert content_of(of_files(photos[:2])) == content_of(of_arrays(pixels))
    assert content_of(of_arrays([pixels[1][:, ::-1]])) != content_of(of_arrays(pixels[1:]))
    with pytest.raises(BadInput, match=r"photograph 1: an array of shape \(4, 4\), uint8; expected BGR pixels"):
        of_arrays([pixels[0], np.zeros((4, 4), np.uint8)])


@pytest.mark.parametrize(
    "change",
    [
        {"detector": {"preparation": CaffePreparation(shortest=32, longest=48)}},
        {"detector": {"name": "other"}},
        {"max_boxes": 5},
        {"conf_threshold": 0.5},
    ],
)
def test_other_settings_have_a_folder_of_their_own(fake, photos, tmp_path, change):
    change = dict(change)
    RegionExtractor(fake.FakeDetector(), cache=tmp_path / "kept")(photos[:1])
    other = RegionExtractor(fake.FakeDetector(**change.pop("detector", {})), cache=tmp_path / "kept", **change)
    other(photos[:1])
    assert other.detected == 1
    folders = sorted((tmp_path / "kept").iterdir())
    assert len(folders) == 2
    assert len({(folder / "settings.json").read_text() for folder in folders}) == 2


def test_a_folder_whose_settings_were_changed_is_refused_with_the_difference(fake, photos, tmp_path):
    RegionExtractor(fake.FakeDetector(), cache=tmp_path / "kept")(photos[:1])
    (folder,) = (tmp_path / "kept").iterdir()
    settings = json.loads((folder / "settings.json").read_text())
    settings["selection"]["max_boxes"] = 9
    (folder / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(SettingsDiffer, match=r"selection\.max_boxes was 9, now 7"):
        RegionExtractor(fake.FakeDetector(), cache=tmp_path / "kept")


def test_the_folder_reads_as_an_unfinished_region_database(fake, photos, tmp_path):
    found = RegionExtractor(fake.FakeDetector(), cache=tmp_path / "kept", batch_size=5)(photos)
    (folder,) = (tmp_path / "kept").iterdir()
    with pytest.raises(BadInput, match="unfinished"):
        ImageDB(folder)
    database = ImageDB(folder, allow_partial=True)
    assert sorted(content_of(database.values())) == sorted(content_of(found))


def test_a_broken_photograph_is_named_and_the_others_are_kept(fake, photos, tmp_path):
    photos[2].write_bytes(photos[2].read_bytes()[:200])
    extractor = RegionExtractor(fake.FakeDetector(), cache=tmp_path / "kept", batch_size=3)
    with pytest.raises(BadInput, match=r"photo0002\.jpg: .*(cut off|damaged)"):
        extractor(photos[:3])
    before = extractor.detected
    extractor(photos[:2])
    assert extractor.detected == before
    with pytest.raises(BadInput, match=r"nothing\.jpg: No such file"):
        extractor([tmp_path / "nothing.jpg"])


def test_a_detector_that_fails_is_said_with_the_photograph(fake, photos):
    with pytest.raises(BadInput, match=r"photo0000\.jpg: AttributeError: no such attribute"):
        RegionExtractor(fake.FailingDetector())(photos[:1])


def test_a_damaged_record_is_detected_again(fake, photos, tmp_path):
    import lmdb

    extractor = RegionExtractor(fake.FakeDetector(), cache=tmp_path / "kept")
    fresh = extractor(photos[:1])
    (folder,) = (tmp_path / "kept").iterdir()
    with lmdb.open(str(folder)) as environment, environment.begin(write=True) as transaction:
        key, value = next(iter(transaction.cursor()))
        transaction.put(key, value[: len(value) // 2])
    assert content_of(extractor(photos[:1])) == content_of(fresh) and extractor.detected == 2
    extractor(photos[:1])
    assert extractor.detected == 2


def test_a_cut_off_file_is_an_error_and_no_crash(fake, photos, tmp_path):
    extractor = RegionExtractor(fake.FakeDetector(feature_width=2048), cache=tmp_path / "kept")
    extractor(photos)
    (folder,) = (tmp_path / "kept").iterdir()
    os.truncate(folder / "data.mdb", 12288)
    with pytest.raises(UniterError, match=r"data\.mdb"):
        extractor(photos)


def test_the_file_grows_as_needed(fake, photos, tmp_path, monkeypatch):
    monkeypatch.setattr("uniter.extract.region_cache.FIRST_MAP_BYTES", 1 << 15)
    extractor = RegionExtractor(fake.FakeDetector(feature_width=4096), cache=tmp_path / "kept")
    fresh = extractor(photos)
    assert content_of(extractor(photos)) == content_of(fresh) and extractor.detected == 5


def test_a_file_is_no_cache_folder(fake, tmp_path):
    (tmp_path / "kept").write_text("")
    with pytest.raises(BadInput, match="is a file; expected a folder"):
        RegionExtractor(fake.FakeDetector(), cache=tmp_path / "kept")


def test_given_weights_belong_to_a_named_detector(fake):
    with pytest.raises(ValueError, match="built already"):
        RegionExtractor(fake.FakeDetector(), weights="file.pkl")


def test_a_named_detector_is_built(monkeypatch, fake, photos):
    asked = SimpleNamespace()

    def build(name, *, weights, device):
        asked.name, asked.weights, asked.device = name, weights, device
        return fake.FakeDetector()

    monkeypatch.setattr("uniter.extract.on_demand.build_detector", build)
    extractor = RegionExtractor(Path("detector"), weights="random:1", device="cpu")
    assert (asked.name, asked.weights, asked.device) == ("detector", "random:1", "cpu")
    assert extractor.class_names == fake.FakeDetector().class_names and len(extractor(photos[:2])) == 2


def test_importing_it_needs_no_detector():
    code = "import sys; from uniter.extract import RegionExtractor; assert 'detectron2' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
