"""The pages: hostile text is escaped, what is missing is said, curves are drawn, other people's folders are left alone."""

import html.parser
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from uniter.datasets.errors import BadInput
from uniter.datasets.image_db import ImageDB
from uniter.datasets.image_db.records import encode_record
from uniter.datasets.image_db.regions import RegionFeatures, normalised_boxes
from uniter.datasets.image_db.writing.units import UnitStore
from uniter.datasets.maintenance.convert import convert
from uniter.datasets.view.charts import curves, histogram, round_numbers
from uniter.datasets.view.region_report import write_region_report
from uniter.datasets.view.run_report import write_runs_report

ARTEFACTS = Path(os.environ.get("UNITER_ARTEFACTS", Path(__file__).parents[3] / "build" / "test-artefacts"))
HOSTILE = '<script>document.title="taken"</script>'
KEYS = ("plain", f"{HOSTILE}", "../../outside", "absent")


def make_database(path, keys=KEYS, *, attributes=True, names=("cat", HOSTILE)):
    boxes = np.array([[5, 5, 60, 40], [20, 10, 90, 55]], np.float32)
    store = UnitStore(path, settings={"detector": {"name": "made up"}})
    with store.unit(0) as unit:
        for key in keys:
            record = RegionFeatures(
                features=np.ones((2, 8), np.float32),
                norm_bb=normalised_boxes(boxes, (60, 100)),
                conf=np.array([0.9, 0.4], np.float32),
                boxes=boxes,
                size=(60, 100),
                soft_labels=np.array([[0.1, 0.9, 0.0], [0.3, 0.3, 0.4]], np.float32),
                attributes=np.array([[0.1, 0.9], [0.9, 0.1]], np.float32) if attributes else None,
            )
            unit.put(key, encode_record(record), regions=2)
        unit.fail("broken", f"photos/{HOSTILE}.jpg", "not an image <b>")
        unit.commit()
        unit.complete()
    header = {"class_names": list(names), "attribute_names": [f"<i>{HOSTILE}"], "feature_width": 8, "label_classes": 3, "detector": HOSTILE}
    assert store.finish(units=1, header=header)
    return path


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.new("RGB", (100, 60), "navy").save(folder / "plain.jpg")
    return folder


class Tags(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.sources, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        assert not any(name.startswith("on") for name, _ in attributes)

    def handle_data(self, data):
        self.text.append(data)


def test_hostile_names_stay_text_and_files_stay_inside(tmp_path, photos):
    summary = write_region_report(
        [make_database(tmp_path / "a.lmdb")], tmp_path / "report", photographs=photos, captions=lambda key: [f"a caption {HOSTILE}"]
    )
    text = summary.page.read_text()
    page = Tags(text)
    assert not {"script", "iframe", "object", "i"} & set(page.tags)
    assert page.tags.count("b") == 1  # of the note on missing photographs, not of the failure's message
    shown = "".join(page.text)
    assert shown.count(f"a caption {HOSTILE}") == 4
    assert "not an image <b>" in shown and f"photos/{HOSTILE}.jpg" in shown
    assert all(source.startswith("pictures/") and ".." not in source.split("/") for source in page.sources)
    made = {path.name for path in (tmp_path / "report").rglob("*") if path.is_file()}
    assert len(made) == 2 + 2 * 4 and {"index.html", "settings.json"} < made
    assert not (tmp_path / "outside").exists()
    assert all((tmp_path / "report" / source).is_file() for source in page.sources)


def test_what_is_shown_and_what_is_missing_is_counted(tmp_path, photos):
    summary = write_region_report([make_database(tmp_path / "a.lmdb")], tmp_path / "report", photographs=photos)
    assert summary.as_dict() == {
        "page": str(tmp_path / "report/index.html"),
        "images": 4,
        "pictures": 4,
        "without_photograph": 3,
        "unreadable": 0,
        "failures": 1,
        "with_captions": 0,
    }
    text = summary.page.read_text()
    assert "3 pictures without their photograph" in text and "no photograph of this name" in text
    assert "1 images failed" in text


def test_classes_confidences_and_attributes_stand_in_the_table(tmp_path, photos):
    database = make_database(tmp_path / "a.lmdb", keys=("plain",), names=("cat", "dog"))
    text = write_region_report([database], tmp_path / "report", photographs=photos).page.read_text()
    shown = Tags(text).text
    assert {"cat", "dog", "0.900", "0.400", f"<i>{HOSTILE}"} <= set(shown)
    assert "<svg" in text and "boxes per image" in text


def test_it_works_without_photographs(tmp_path):
    summary = write_region_report([make_database(tmp_path / "a.lmdb")], tmp_path / "report")
    assert summary.pictures == 4 and "No photographs were given" in summary.page.read_text()


def test_another_photograph_of_the_same_name_is_noticed(tmp_path, photos):
    Image.new("RGB", (60, 100)).save(photos / "plain.jpg")
    text = write_region_report(
        [make_database(tmp_path / "a.lmdb", keys=("plain",))], tmp_path / "report", photographs=photos
    ).page.read_text()
    assert "the photograph plain.jpg is 60 × 100, the regions are of an image of 100 × 60: another one?" in text


def test_a_broken_photograph_is_said_on_its_card(tmp_path, photos):
    (photos / "plain.jpg").write_bytes(b"\xff\xd8 no")
    summary = write_region_report([make_database(tmp_path / "a.lmdb", keys=("plain",))], tmp_path / "report", photographs=photos)
    assert summary.without_photograph == ["plain"] and "not a readable image" in summary.page.read_text()


def test_a_limit_shows_evenly_spaced_pictures_and_keys_choose(tmp_path):
    database = make_database(tmp_path / "a.lmdb", keys=[f"k{n:03d}" for n in range(21)])
    assert write_region_report([database], tmp_path / "report", limit=3).pictures == 3
    text = (tmp_path / "report/index.html").read_text()
    assert "3 of 21, evenly spaced" in text and all(f"<h3>{key}</h3>" in text for key in ("k000", "k010", "k020"))
    assert write_region_report([database], tmp_path / "report", keys=["k004"]).pictures == 1
    assert len(list((tmp_path / "report/pictures").iterdir())) == 2, "the earlier report's pictures are gone"
    with pytest.raises(BadInput, match="image 'k999' is in none of the databases"):
        write_region_report([database], tmp_path / "report", keys=["k999"])


def test_many_pictures_are_cut_into_pages(tmp_path):
    database = make_database(tmp_path / "a.lmdb", keys=[f"k{n:03d}" for n in range(130)], attributes=False)
    write_region_report([database], tmp_path / "report", limit=0)
    first, second = (Tags((tmp_path / "report" / name).read_text()) for name in ("index.html", "page-2.html"))
    assert (first.tags.count("figure"), second.tags.count("figure")) == (100, 30)
    assert "page-2.html" in first.sources and "index.html" in second.sources


def test_damaged_records_are_listed_and_the_page_goes_on(tmp_path, monkeypatch):
    database = make_database(tmp_path / "a.lmdb", keys=("good", "bad"))
    read = ImageDB.read

    def damaged(self, key, **more):
        if key == "bad":
            raise BadInput("image 'bad': checksum differs")
        return read(self, key, **more)

    monkeypatch.setattr(ImageDB, "read", damaged)
    summary = write_region_report([database], tmp_path / "report")
    assert (summary.pictures, summary.unreadable) == (1, ["bad"])
    assert "1 damaged records" in summary.page.read_text()


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/index.html").write_text("<h1>mine</h1>")
    with pytest.raises(BadInput, match="holds files that are no report of uniter-view"):
        write_region_report([make_database(tmp_path / "a.lmdb")], tmp_path / "thesis")
    assert (tmp_path / "thesis/index.html").read_text() == "<h1>mine</h1>"


def test_photographs_of_which_none_is_there_are_another_folder(tmp_path, photos):
    database = make_database(tmp_path / "a.lmdb", keys=("other", "another"))
    with pytest.raises(BadInput, match=r"photos holds 1 images, but none of the 2 pictures to draw \(such as 'another'\)"):
        write_region_report([database], tmp_path / "report", photographs=photos)
    assert not (tmp_path / "report").exists()


def test_what_fails_or_is_somebody_elses_leaves_the_earlier_report_whole(tmp_path, monkeypatch):
    database = make_database(tmp_path / "a.lmdb")
    page = write_region_report([database], tmp_path / "report").page
    (tmp_path / "report/pictures/mine").mkdir()
    for name in ("notes.txt", "pictures/holiday.jpg", "pictures/mine/000000-my.jpg"):
        (tmp_path / "report" / name).write_text("somebody's own")
    before = {path: path.read_bytes() for path in sorted((tmp_path / "report").rglob("*")) if path.is_file()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("uniter.datasets.view.region_report.write_picture", full)
        with pytest.raises(OSError):
            write_region_report([database], tmp_path / "report")
    assert {path: path.read_bytes() for path in sorted((tmp_path / "report").rglob("*")) if path.is_file()} == before
    assert write_region_report([database], tmp_path / "report", limit=1).page == page
    left = sorted(str(path.relative_to(tmp_path / "report")) for path in (tmp_path / "report").rglob("*") if path.is_file())
    assert {"notes.txt", "pictures/holiday.jpg", "pictures/mine/000000-my.jpg"} < set(left)
    assert len([name for name in left if name.endswith(".jpg")]) == 2 + 2, "the earlier pictures went"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.lmdb", "report"]


def test_a_report_of_an_older_version_and_one_that_was_killed_are_drawn_again(tmp_path):
    database = make_database(tmp_path / "a.lmdb")
    write_region_report([database], tmp_path / "report")
    (tmp_path / "report/settings.json").unlink()
    assert write_region_report([database], tmp_path / "report", limit=1).pictures == 1
    (tmp_path / "report/index.html").unlink()
    assert write_region_report([database], tmp_path / "report", limit=2).pictures == 2


def test_settings_of_another_kind_are_no_older_reports(tmp_path):
    database = make_database(tmp_path / "a.lmdb")
    write_region_report([database], tmp_path / "report")
    (tmp_path / "report/settings.json").write_text('{"kind": "regions"}')
    with pytest.raises(BadInput, match="holds files that are no report of uniter-view"):
        write_region_report([database], tmp_path / "report")
    assert (tmp_path / "report/settings.json").read_text() == '{"kind": "regions"}'


def test_a_report_does_not_take_the_place_of_what_it_is_about(tmp_path):
    write_region_report([make_database(tmp_path / "a.lmdb")], tmp_path / "report")
    inside = make_database(tmp_path / "report/pictures/b.lmdb")
    with pytest.raises(BadInput, match="the source"):
        write_region_report([inside], tmp_path / "report")
    assert len(ImageDB(inside)) == 4


def test_published_databases_have_no_sizes_and_are_shown_all_the_same(tmp_path, uniter_data_golden):
    split = json.loads((uniter_data_golden / "set.json").read_text())
    folder = next(path.parent for path in (uniter_data_golden / "img_db").glob("*/feat_th*/data.mdb"))
    copy = shutil.copytree(folder, tmp_path / folder.name)
    for side in folder.parent.glob("nbb_*.json"):
        shutil.copy(side, tmp_path)
    summary = write_region_report([copy], tmp_path / "report", limit=5)
    assert split and summary.pictures == min(5, summary.images) > 0
    assert "class " in summary.page.read_text(), "classes of an unknown detector are numbers"


def test_curves_of_runs_lie_over_one_another(tmp_path):
    noise = np.random.default_rng(0)
    lines = [{"step": s, "kind": "train", "loss": 3 / s + float(noise.random()), "part": "mlm", "flag": True} for s in range(1, 100)]
    lines.append({"step": 99, "kind": "validation", "loss": float("nan"), "tasks": {"mlm": {"acc": 0.5}}})
    summary = write_runs_report({"one": lines, HOSTILE: lines[:50]}, tmp_path / "curves")
    assert summary.as_dict()["runs"] == {"one": {"lines": 100, "last_update": 99}, HOSTILE: {"lines": 50, "last_update": 50}}
    text = summary.page.read_text()
    page = Tags(text)
    assert "script" not in page.tags and page.tags.count("svg") == 3
    assert {"train loss", "validation tasks.mlm.acc", "no finite value"} <= set(page.text)
    with pytest.raises(BadInput, match="hold no line"):
        write_runs_report({"empty": []}, tmp_path / "curves")


def test_histogram_counts_what_it_is_given():
    chart = histogram(np.array([0.1, 0.15, 0.9, 5.0]), title="t<", axis="a", low=0, high=1, bins=2)
    assert "<title>0 to 0.5: 2</title>" in chart and "<title>0.5 to 1: 2</title>" in chart and "t&lt;" in chart
    assert "rect" in histogram(np.zeros(0), title="", axis="", low=0, high=1, bins=3)


def test_axes_bear_round_numbers():
    assert round_numbers(0, 37, whole=True) == [0, 10, 20, 30]
    assert round_numbers(0, 25, whole=True) == [0, 5, 10, 15, 20, 25]
    assert round_numbers(0, 2, whole=True) == [0, 1, 2]
    assert round_numbers(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert round_numbers(-0.333, 0.56) == pytest.approx([-0.2, 0, 0.2, 0.4])
    assert round_numbers(1, 4163, whole=True) == [1000, 2000, 3000, 4000]
    for low, high in np.random.default_rng(0).normal(0, 1, (200, 2)).tolist():
        assert 2 <= len(round_numbers(min(low, high), max(low, high))) <= 6


def test_a_curve_goes_down_where_the_values_do():
    chart = curves({"a": ([1, 2, 3], [3.0, float("inf"), 1.0])}, colours={"a": "#000"}, title="loss")
    path = chart.split('d="')[1].split('"')[0]
    assert path.count("M") == 2, "a value that is not finite breaks the line"
    first, second = (float(part.split()[1].split("h")[0]) for part in path.split("M")[1:])
    assert first < second, "downwards on the screen"


def browser():
    return next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)


def in_a_browser(page, tmp_path, *wanted, height):
    """What a real browser prints that opens a page from disk."""
    if browser() is None:
        pytest.skip("no chromium here: the page is not looked at in a browser")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
    flags += ["--disable-component-update", f"--user-data-dir={tmp_path / 'profile'}", f"--window-size=1200,{height}", "--hide-scrollbars"]
    command = [browser(), *flags, *wanted, f"file://{page}"]
    return subprocess.run(command, check=True, capture_output=True, timeout=600, text=True).stdout


def photograph_page(page, name, tmp_path, *, height):
    """A screenshot, kept among the tests' artefacts, as (H, W, 3)."""
    ARTEFACTS.mkdir(parents=True, exist_ok=True)
    in_a_browser(page, tmp_path, f"--screenshot={ARTEFACTS / name}", height=height)
    seen = np.asarray(Image.open(ARTEFACTS / name).convert("RGB")).astype(int)
    assert seen.shape[:2] == (height, 1200)
    return seen


def test_a_browser_opens_the_page_from_disk_and_runs_nothing(tmp_path, photos):
    summary = write_region_report(
        [make_database(tmp_path / "a.lmdb")], tmp_path / "report", photographs=photos, captions=lambda key: [HOSTILE]
    )
    seen = photograph_page(summary.page, "uniter-view.png", tmp_path, height=1600)
    assert "<title>a.lmdb</title>" in in_a_browser(summary.page, tmp_path, "--dump-dom", height=1600), "the hostile script did not run"
    navy = (np.abs(seen - [0, 0, 128]).max(axis=2) < 20).sum()
    assert navy > 20_000, "the photograph is on the page"


def test_ten_real_photographs_with_the_real_detectors_features(tmp_path, shared):
    """Beds, skis, carrots and trucks are called so, and the page shows them."""
    photographs = shared / "data" / "coco10"
    convert(photographs / "train2014_obj36.tsv", tmp_path / "coco10.lmdb", to="lmdb")
    summary = write_region_report([tmp_path / "coco10.lmdb"], tmp_path / "report", photographs=photographs)
    assert (summary.pictures, summary.without_photograph) == (10, [])
    cards = {card.split("</h3>")[0]: card for card in summary.page.read_text().split("<h3>")[1:]}
    for key, names in {
        "084002": ("bed", "headboard", "pillow"),
        "131486": ("ski", "skis", "ski pole", "helmet"),
        "201446": ("carrot", "cutting board"),
        "387267": ("truck", "tire"),
        "573195": ("cat", "car"),
    }.items():
        assert all(f"</span>{name}</td>" in cards[f"COCO_train2014_000000{key}"] for name in names)
    seen = photograph_page(summary.page, "coco10.png", tmp_path, height=2000)
    assert len(np.unique(seen @ [1 << 16, 1 << 8, 1])) > 20_000, "photographs are on the page"
