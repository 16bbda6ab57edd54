"""Files that the projects' own writers wrote and their own readers read: read here, and written alike."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import h5py
import numpy as np
import pytest

from uniter.datasets.errors import BadInput, UniterError
from uniter.datasets.image_db import ImageDB
from uniter.datasets.image_db.formats.projects.rows import LAYOUTS
from uniter.datasets.image_db.formats.table import recognise
from uniter.datasets.maintenance.convert import convert

THIRTY_SIX = {"vlt5_h5", "volta_lmdb", "scan", "butd_vqa", "visdial_h5", "vlbert_zip"}
# What a layout keeps of the truth, beside the features: `expected.json` says it under "holds".
HOLDS = {
    "m2": {"boxes", "soft_labels"},
    "selfcritical": {"boxes", "size"},
    "xmodaler": {"boxes", "soft_labels", "size"},
    "openvqa_vqa": {"boxes", "size"},
    "openvqa_gqa": {"boxes", "size"},
    "milvlg": {"boxes", "size", "class_id", "class_conf", "attr_id", "attr_conf"},
    "mmf_npy": {"boxes", "size", "foreground"},
    "mmf_lmdb": {"boxes", "size", "foreground"},
    "vilbert_lmdb": {"boxes", "size"},
    "vlt5_h5": {"boxes", "size", "class_id", "class_conf", "attr_id", "attr_conf"},
    "volta_lmdb": {"boxes", "size", "class_id", "soft_labels"},
    "oscar_caption": {"boxes", "size", "class_id", "class_conf"},
    "oscar_retrieval": {"boxes", "size", "class_id", "class_conf"},
    "vinvl_predictions": {"boxes", "class_id", "class_conf"},
    "scan": set(),
    "butd_vqa": {"boxes", "size"},
    "gqa_h5": {"boxes", "size"},
    "visdial_h5": {"boxes", "class_id", "class_conf"},
    "vlbert_zip": {"boxes", "size"},
}
GQA = {"openvqa_gqa", "gqa_h5"}


def truth_of(folder: Path, name: str) -> Path:
    return folder / "truth" / ("regions36.npz" if name in THIRTY_SIX else "regions.npz")


def assert_held(database: ImageDB, key: str, image: Any, held: set[str], names: list[str]) -> None:
    """A record says of an image what the truth says, exactly: the truth is representable in our halves."""
    record, fields = database[key], image.fields
    np.testing.assert_array_equal(record.features, fields["features"], err_msg=key)
    if "boxes" in held:
        np.testing.assert_array_equal(record.boxes, fields["boxes"], err_msg=key)
    else:
        assert record.boxes is None and not record.norm_bb.any(), f"{key}: boxes must not be invented"
    assert record.size == (image.size if "size" in held else None), key
    if "size" in held:
        height, width = image.size
        np.testing.assert_allclose(record.norm_bb[:, :4], fields["boxes"] / np.float32([width, height, width, height]), atol=6e-4)
    if "soft_labels" in held:
        np.testing.assert_array_equal(record.soft_labels, fields["soft_labels"], err_msg=key)
    elif "foreground" in held:
        assert record.soft_labels is not None
        np.testing.assert_array_equal(record.soft_labels[:, 1:], fields["soft_labels"][:, 1:], err_msg=key)
        np.testing.assert_allclose(record.soft_labels[:, 0], fields["soft_labels"][:, 0], atol=2e-3)
    else:
        assert record.soft_labels is None, f"{key}: soft labels must not be invented"
    best = record.best_objects()
    if "class_id" in held:
        assert best is not None
        assert [names[number] for number in best[0]] == [f"{name}" for name in image_names(image, names, database)], key
    if "class_conf" in held:
        assert best is not None
        np.testing.assert_array_equal(best[1], fields["class_conf"], err_msg=key)
    if "attr_id" in held:
        np.testing.assert_array_equal(record.attribute_ids, fields["attr_id"] - 1, err_msg=key)
        np.testing.assert_array_equal(record.attribute_conf, fields["attr_conf"], err_msg=key)


def image_names(image: Any, names: list[str], database: ImageDB) -> list[str]:
    """The truth's classes as `names` spells them: by their own names where the layout keeps names, else by number."""
    if database.header is not None and database.header.get("class_names_from") == "the source's own":
        return [image.class_names[number - 1] for number in image.fields["class_id"]]
    return [names[number - 1] for number in image.fields["class_id"]]


@pytest.mark.parametrize("name", LAYOUTS)
def test_golden_formats_are_read(name: str, formats_golden: Path, files: ModuleType, tmp_path: Path) -> None:
    folder = formats_golden / name
    assert recognise(folder) == name
    truth = files.Truth(truth_of(formats_golden, name))
    report = convert(folder, tmp_path / "ours.lmdb")
    assert report.source == name
    database = ImageDB(tmp_path / "ours.lmdb")
    names = list(database.class_names) if database.class_names is not None else []
    met = set()
    for key in database:
        image = truth.called(key, gqa=name in GQA)
        met.add(image.id)
        assert_held(database, key, image, HOLDS[name], names or [str(number) for number in range(2000)])
    assert met == {image.id for image in truth.images}
    if name != "vlbert_zip":  # which holds other regions of the same images for other data
        assert not report.skipped, report.skipped


def test_golden_formats_are_read_file_by_file(formats_golden: Path, files: ModuleType, tmp_path: Path) -> None:
    """Where one folder holds the same in several ways, each is read by itself."""
    ways = {
        "selfcritical": (["cocobu_att", "cocobu_att.h5", "cocobu_att.lmdb", "cocobu_att.pth"], "regions", {"boxes", "size"}),
        "xmodaler": (["single"], "regions", set()),
        "mmf_lmdb": (["names.lmdb", "numbers.lmdb"], "regions", HOLDS["mmf_lmdb"]),
        "volta_lmdb": (["raw.lmdb"], "regions36", {"boxes", "size", "class_id", "class_conf", "attr_id", "attr_conf"}),
        "visdial_h5": (["as_written_train.h5"], "regions36", HOLDS["visdial_h5"]),
        "vlbert_zip": (["val_frcnn.zip"], "regions", {"boxes", "size", "soft_labels"}),
    }
    for name, (parts, which, held) in ways.items():
        truth = files.Truth(formats_golden / "truth" / f"{which}.npz")
        for part in parts:
            path = formats_golden / name / part
            assert recognise(path) == name
            convert(path, tmp_path / f"{name}-{part}")
            database = ImageDB(tmp_path / f"{name}-{part}")
            assert len(database)
            for key in database:
                image = truth.called(key)
                assert_held(database, key, image, held, [str(number) for number in range(2000)])


# ------------------------------------------------------------------------------------------------------------------- writing


def captions_file(path: Path, truth: Any) -> Path:
    rows = [{"image": f"{image.stem}.jpg", "caption": text} for image in truth.images for text in image.captions]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


WAYS: list[tuple[str, dict[str, Any]]] = [
    ("m2", {"key": "{id}"}),
    ("selfcritical", {"key": "{id}"}),
    ("xmodaler", {"key": "{id}"}),
    ("xmodaler", {"key": "{id}", "labels": False}),
    ("openvqa_vqa", {}),
    ("openvqa_gqa", {"gqa": True}),
    ("milvlg", {}),
    ("mmf_npy", {}),
    ("mmf_lmdb", {}),
    ("mmf_lmdb", {"key": "{id}"}),
    ("vilbert_lmdb", {"key": "{id}"}),
    ("vlt5_h5", {}),
    ("volta_lmdb", {}),
    ("volta_lmdb", {"labels": False}),
    ("oscar_caption", {"key": "{id}", "split": "test", "captions": True}),
    ("oscar_retrieval", {"key": "{id}", "split": "test", "captions": True}),
    ("vinvl_predictions", {"key": "{id}"}),
    ("scan", {"key": "{id}", "captions": True}),
    ("butd_vqa", {"key": "{id}"}),
    ("gqa_h5", {"gqa": True}),
    ("visdial_h5", {"key": "{id}"}),
    ("vlbert_zip", {"key": "{id}"}),
    ("vlbert_zip", {"key": "{id}", "split": "val", "captions": True, "truth": "regions"}),
]


@pytest.mark.parametrize(("name", "way"), WAYS)
def test_golden_formats_are_written(
    name: str, way: dict[str, Any], formats_golden: Path, files: ModuleType, database: Callable[..., Path], tmp_path: Path
) -> None:
    how = dict(way)
    which = how.pop("truth", None)
    path = formats_golden / "truth" / f"{which}.npz" if which else truth_of(formats_golden, name)
    ours = database(path, labels=how.pop("labels", True), gqa=how.pop("gqa", False))
    if how.pop("captions", False):
        how["captions"] = captions_file(tmp_path / "captions.jsonl", files.Truth(path))
    out = tmp_path / "out"
    report = convert(ours, out, to=name, **how)
    assert not report.skipped and report.images == len(files.Truth(path).images)
    written = [file for file in sorted(out.rglob("*")) if file.is_file() and file.name != "made_by.json"]
    assert written
    for mine in written:
        theirs = formats_golden / name / mine.relative_to(out)
        assert theirs.is_file(), f"{theirs} is not among the golden files"
        if mine.suffix == ".lineidx":
            continue
        compare = _COMPARED.get(name, _as_they_are)
        compare(files, mine, theirs)


def _as_they_are(files: ModuleType, mine: Path, theirs: Path) -> None:
    files.assert_alike(files.contents(mine), files.contents(theirs), theirs.name)


def _without_paths(files: ModuleType, mine: Path, theirs: Path) -> None:
    """The information of self-critical: the rows may stand in another order, and paths of pictures are not known."""
    if mine.suffix != ".json":
        _as_they_are(files, mine, theirs)
        return
    found, wanted = ({row["id"]: row for row in files.contents(path)["images"]} for path in (mine, theirs))
    for row in wanted.values():
        row.pop("file_path", None)
    files.assert_alike(found, wanted, theirs.name)


def _by_rows(files: ModuleType, mine: Path, theirs: Path) -> None:
    """Files whose rows belong to ids that stand elsewhere: the same rows for the same ids, in whatever order."""
    if mine.suffix in (".pkl", ".txt") or mine.name.endswith("info.json"):
        assert sorted(map(str, files.contents(mine))) == sorted(map(str, files.contents(theirs)))
        return
    if mine.name.startswith("gqa_objects"):
        found, wanted = _of_gqa(files, mine.parent), _of_gqa(files, theirs.parent)
    else:
        found, wanted = _rows(files, mine), _rows(files, theirs)
    assert found.keys() == wanted.keys()
    for key, arrays in wanted.items():
        files.assert_alike(found[key], arrays, f"{theirs.name} {key}")


def _rows(files: ModuleType, path: Path) -> dict[str, Any]:
    if path.suffix == ".npy":
        ids = files.contents(path.with_name(path.name.replace("_ims.npy", "_ids.txt")))
        captions = files.contents(path.with_name(path.name.replace("_ims.npy", "_caps.txt")))
        return {
            key: {"ims": row, "caps": captions[5 * place : 5 * place + 5]}
            for place, (key, row) in enumerate(zip(ids, np.load(path), strict=True))
        }
    with h5py.File(path) as file:
        arrays = {
            name: file[name][:]
            for name in ("features", "bboxes", "boxes", "classes", "scores", "image_bb", "image_features", "spatial_features")
            if name in file
        }
        if "image_id" in file:
            places = {str(key): row for row, key in enumerate(file["image_id"][:])}
        else:
            places = {str(key): row for key, row in files.contents(path.with_name(f"{path.stem}_imgid2idx.pkl")).items()}
    return {key: {name: array[row] for name, array in arrays.items()} for key, row in places.items()}


def _of_gqa(files: ModuleType, folder: Path) -> dict[str, Any]:
    """How many images a file has is everybody's own choice."""
    told = files.contents(folder / "gqa_objects_info.json")
    arrays = {number: files.contents(folder / f"gqa_objects_{number}.h5") for number in {row["file"] for row in told.values()}}
    return {
        f"{key} {row['height']}x{row['width']} {row['objectsNum']}": {
            name: array[row["idx"]] for name, array in arrays[row["file"]].items()
        }
        for key, row in told.items()
    }


def _by_image(files: ModuleType, mine: Path, theirs: Path) -> None:
    """VL-BERT's Conceptual Captions are numbered in their order; BERT's own words are split at blanks in both."""
    found, wanted = files.contents(mine), files.contents(theirs)
    if mine.suffix == ".zip":
        found, wanted = ({one["image_id"]: one for one in members.values()} for members in (found, wanted))
    else:
        found, wanted = ({json.dumps(row["caption"]): set(row) for row in rows} for rows in (found, wanted))
        assert wanted.items() <= found.items()
        return
    files.assert_alike(found, wanted, theirs.name)


def _in_any_order(files: ModuleType, mine: Path, theirs: Path) -> None:
    """Oscar's tables: rows by their keys."""
    if mine.name == "imageid2idx.json":
        assert files.contents(mine).keys() == files.contents(theirs).keys()
    elif mine.suffix == ".json":
        found, wanted = (sorted(map(json.dumps, files.contents(path))) for path in (mine, theirs))
        assert found == wanted
    else:
        _as_they_are(files, mine, theirs)


_COMPARED: dict[str, Callable[[ModuleType, Path, Path], None]] = {
    "selfcritical": _without_paths,
    "scan": _by_rows,
    "butd_vqa": _by_rows,
    "gqa_h5": _by_rows,
    "visdial_h5": _by_rows,
    "vlbert_zip": _by_image,
    "oscar_caption": _in_any_order,
    "oscar_retrieval": _in_any_order,
}


# ------------------------------------------------------------------------------------------------------------------- hostile


def hostile_folders(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "hostile").iterdir() if path.is_dir())


def test_golden_formats_that_are_hostile_execute_nothing(formats_golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for case in hostile_folders(formats_golden):
        name = max((one for one in LAYOUTS if case.startswith(one)), key=len)
        source = Path(shutil.copytree(formats_golden / "hostile" / case, tmp_path / case))
        for number, source_format in enumerate((None, name)):
            with pytest.raises(UniterError) as refused:
                report = convert(source, tmp_path / f"out-{case}-{number}", source_format=source_format)
                assert report.skipped, case
                raise BadInput(report.skipped[0]["error"])  # other images of the file are good
            assert 20 < len(str(refused.value)) < 1000
            assert not list(tmp_path.rglob("OWNED")), f"{case}: a file ran code"


def test_golden_formats_with_a_hostile_file_among_good_ones(formats_golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hostile file in the place of a good one: the command fails, or the image is left out and named; nothing runs."""
    monkeypatch.chdir(tmp_path)
    for case in hostile_folders(formats_golden):
        name = max((one for one in LAYOUTS if case.startswith(one)), key=len)
        source = Path(shutil.copytree(formats_golden / name, tmp_path / case))
        shutil.copytree(formats_golden / "hostile" / case, source, dirs_exist_ok=True)
        try:
            report = convert(source, tmp_path / f"out-{case}", source_format=name)
            assert report.skipped, case
        except UniterError as error:
            assert 20 < len(str(error)) < 1000
        assert not list(tmp_path.rglob("OWNED")), f"{case}: a file ran code"
