"""What has grown is extended, what was repaired is done again, and folders made before contents were remembered go on.

Commands and files only.
"""

import json
import shutil
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import identity_world as world
import pytest
from click.testing import Result

OLDER = Path(__file__).with_name("older")
"""Sources and what the commands of commit d45295f made of them, in this folder and by these names: no digest of a source is in them."""


accepted, done, records, refused, run, tree = (
    world.accepted, world.done, world.records, world.refused, world.run, world.tree,
)  # fmt: skip
GREW, WENT = "new|added|grown|grew|more", "gone|went|no longer|not there any more|missing|kept"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return world.trained(tmp_path_factory.getbasetemp())


class Photographs:
    """Photographs in one of the forms that IMAGES takes, which can come and go."""

    def __init__(self, form: str, folder: Path) -> None:
        self.form, self.folder = form, folder
        self.images = {"folder": folder / "photos", "list": folder / "list.txt", "tars": folder / "tars"}[form]

    def hold(self, *names: str) -> None:
        """Have exactly these; a tar holds one each."""
        for name in names:
            if not (self.folder / "all" / f"{name}.jpg").exists():
                world.photograph(self.folder / "all" / f"{name}.jpg", ord(name[0]))
        for place in (self.folder / "photos", self.folder / "tars"):
            place.mkdir(exist_ok=True)
            for path in place.iterdir():
                if path.stem not in names:
                    path.unlink()
        for name in names:
            photo = self.folder / "all" / f"{name}.jpg"
            if not (self.folder / "photos" / photo.name).exists():
                shutil.copy2(photo, self.folder / "photos" / photo.name)
            if not (self.folder / "tars" / f"{name}.tar").exists():
                with tarfile.open(self.folder / "tars" / f"{name}.tar", "w") as tar:
                    tar.add(photo, photo.name)
        (self.folder / "list.txt").write_text("".join(f"photos/{name}.jpg\n" for name in names))


def extraction(images: Path, out: Path, trained: Any) -> tuple[object, ...]:
    return ("extract", images, out, "--detector", trained.detectors[0], *world.DETECT)


def accounted(out: Path) -> tuple[int, int]:
    """Images and failures, as the header says them."""
    header = json.loads((out / "header.json").read_text())
    return header["images"], header["failures"]


# ------------------------------------------------------------------------------------------------------------- 36: extraction


@pytest.mark.parametrize("form", ["folder", "list", "tars"])
def test_what_is_new_is_added(form: str, trained: Any, tmp_path: Path) -> None:
    """Before, between and behind what was there, whose records stay; then nothing is left to do."""
    photos, out = Photographs(form, tmp_path), tmp_path / "out.lmdb"
    photos.hold("b", "d", "f")
    done(*extraction(photos.images, out, trained))
    before = records(out)
    photos.hold("a", "b", "c", "d", "f", "g")
    accepted(run(*extraction(photos.images, out, trained)), GREW, "3")
    after = records(out)
    assert set(after) == set("abcdfg") and {key: after[key] for key in before} == before
    assert accounted(out) == (6, 0)
    whole = tree(out)
    accepted(run(*extraction(photos.images, out, trained)), "already")
    assert not world.differences(whole, tree(out))


@pytest.mark.parametrize("form", ["folder", "tars"])
def test_what_went_is_kept_and_said(form: str, trained: Any, tmp_path: Path) -> None:
    photos, out = Photographs(form, tmp_path), tmp_path / "out.lmdb"
    photos.hold("b", "d", "f")
    done(*extraction(photos.images, out, trained))
    before = records(out)
    photos.hold("b", "e", "f")
    accepted(run(*extraction(photos.images, out, trained)), WENT)
    after = records(out)
    assert set(after) == set("bdef") and {key: after[key] for key in before} == before


def test_a_new_photograph_that_fails_is_accounted_for(trained: Any, tmp_path: Path) -> None:
    photos, out = Photographs("folder", tmp_path), tmp_path / "out.lmdb"
    photos.hold("b", "d")
    (tmp_path / "photos" / "x.jpg").write_text("<html>")
    done(*extraction(photos.images, out, trained))
    photos.hold("b", "c", "d")
    for name in "xy":
        (tmp_path / "photos" / f"{name}.jpg").write_text("<html>")
    accepted(run(*extraction(photos.images, out, trained)))
    assert sorted(row["key"] for row in world.failures(out)) == ["x", "y"]
    assert set(records(out)) == set("bcd") and accounted(out) == (3, 2)


def test_other_settings_do_not_extend(trained: Any, tmp_path: Path) -> None:
    """New photographs by another rule or detector would make two databases of one."""
    photos, out = Photographs("folder", tmp_path), tmp_path / "out.lmdb"
    photos.hold("b", "d")
    done(*extraction(photos.images, out, trained))
    before = tree(out)
    photos.hold("b", "c", "d")
    words = extraction(photos.images, out, trained)
    refused(run(*words, "--conf-threshold", 0.4), "0.4")
    refused(run(*words[:4], trained.detectors[1], *world.DETECT), "other|detector|weights")
    assert not world.differences(before, tree(out))
    accepted(run(*words))


def test_a_grown_database_is_one_like_any_other(trained: Any, tmp_path: Path) -> None:
    """Checked, merged, split and converted."""
    photos, out = Photographs("folder", tmp_path), tmp_path / "out.lmdb"
    photos.hold("b", "d", "f")
    done(*extraction(photos.images, out, trained))
    photos.hold("a", "b", "c", "d", "f")
    accepted(run(*extraction(photos.images, out, trained)))
    grown = records(out)
    accepted(run("db", "check", out), "none")
    for way, words in {"merge": (), "split": ("--by", 2), "convert": ()}.items():
        accepted(run("db", way, out, tmp_path / way, *words))
        parts = sorted((tmp_path / way).iterdir()) if way == "split" else [tmp_path / way]
        assert {key: record for part in parts for key, record in records(part).items()} == grown, way


def test_killed_while_it_grows_equals_unbroken(trained: Any, tmp_path: Path) -> None:
    photos, out, unbroken = Photographs("folder", tmp_path), tmp_path / "out.lmdb", tmp_path / "unbroken.lmdb"
    photos.hold("b", "d", "f")
    done(*extraction(photos.images, out, trained))
    shutil.copytree(out, unbroken)
    photos.hold("a", "b", "c", "d", "e", "f", "g")
    accepted(run(*extraction(photos.images, unbroken, trained)))
    size = sum(path.stat().st_blocks * 512 for path in out.rglob("*") if path.is_file())
    world.killed(out, 1, *extraction(photos.images, out, trained), least=size + 6_000)
    accepted(run(*extraction(photos.images, out, trained)))
    assert records(out) == records(unbroken) and accounted(out) == accounted(unbroken) == (7, 0)


def test_a_replaced_photograph_is_not_passed_over(trained: Any, tmp_path: Path) -> None:
    """It is refused, which leaves the database alone, or it is done again, which is said."""
    photos, out = Photographs("folder", tmp_path), tmp_path / "out.lmdb"
    photos.hold("b", "d")
    done(*extraction(photos.images, out, trained))
    before, regions = tree(out), records(out)
    world.photograph(tmp_path / "photos" / "d.jpg", 9, size=(200, 300))
    result = run(*extraction(photos.images, out, trained))
    if result.exit_code != 0:
        refused(result, "chang|differ|other|was ")
        assert not world.differences(before, tree(out))
    else:
        accepted(result, "chang|replaced|again")
        assert records(out)["b"] == regions["b"] and records(out)["d"] != regions["d"]


# ------------------------------------------------------------------------------------------------------------ 36: repaired tars


def test_a_repaired_tar_is_done_again_alone(trained: Any, tmp_path: Path) -> None:
    """Its line in failures.jsonl says that a retry can mend it; the other tars are left alone."""
    photos, out, tars = Photographs("folder", tmp_path), tmp_path / "out.lmdb", tmp_path / "tars"
    photos.hold(*"abcdef")
    for path in tars.iterdir():
        path.unlink()
    for shard in ("ab", "cd", "ef"):
        with tarfile.open(tars / f"{shard}.tar", "w") as tar:
            for name in shard:
                tar.add(tmp_path / "all" / f"{name}.jpg", f"{name}.jpg")
    whole = (tars / "cd.tar").read_bytes()
    (tars / "cd.tar").write_bytes(whole[:1024])
    done(*extraction(tars, out, trained))
    rows = [row for row in world.failures(out) if "cd.tar" in row["path"] or "cd.tar" in row["key"]]
    before = {key: record for key, record in records(out).items() if key in "abef"}
    if not rows or set(before) != set("abef"):
        raise RuntimeError(f"the cut tar was read: {rows}, {sorted(before)}")
    (tars / "cd.tar").write_bytes(whole)
    result: Result = run(*extraction(tars, out, trained), "--json")
    accepted(result)
    after = records(out)
    assert set(after) == set("abcdef") and {key: after[key] for key in before} == before
    assert world.failures(out) == [] and accounted(out) == (6, 0)
    assert json.loads(result.stdout)["extracted"] == 2, "the other tars were done again"
    assert all("retry" in row and row["retry"] is not False for row in rows), rows


# --------------------------------------------------------------------------------------------------------- 36: grown captions


def test_grown_captions_are_built_aside_and_swapped(tmp_path: Path) -> None:
    """Killed meanwhile, the old database is there, or the new one; the same command again ends with the new one."""
    (tmp_path / "there").mkdir()
    captions, out, vocabulary = tmp_path / "captions.jsonl", tmp_path / "there" / "out.db", world.vocabulary_file(tmp_path / "vocab.txt")
    words: Sequence[object] = ("build-db", world.captions_file(captions, ["a.jpg", "b.jpg"]), out, "--tokenizer", vocabulary)
    done(*words)
    old = world.texts(out)
    world.captions_file(captions, ["a.jpg", "b.jpg", "c.jpg"])
    done("build-db", captions, tmp_path / "new.db", "--tokenizer", vocabulary)
    new: Mapping[str, Any] = world.texts(tmp_path / "new.db")
    shutil.copytree(tmp_path / "there", tmp_path / "kept")
    if run(*words).exit_code != 0:  # it may ask for --overwrite: other contents are refused
        words = (*words, "--overwrite")
    shutil.rmtree(tmp_path / "there")
    shutil.move(tmp_path / "kept", tmp_path / "there")
    for instant in (3, 10):
        world.killed(tmp_path / "there", instant, *words)
        assert (out / "header.json").exists(), "neither the old database nor the new one is there"
        assert world.texts(out) in (old, new)
    accepted(run(*words))
    assert world.texts(out) == new and len(new) == len(old) + 1
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["out.db"], "what was built aside is left behind"


# -------------------------------------------------------------------------------------------------------------- what is older

CONTINUED: dict[str, tuple[str, ...]] = {
    "convert": ("db", "convert", "npz", "converted.lmdb"),
    "split": ("db", "split", "converted.lmdb", "parts", "--by", "2"),
    "merge": ("db", "merge", "parts/part-0", "parts/part-1", "merged.lmdb"),
    "build-db": ("build-db", "captions.jsonl", "texts.db", "--images", "converted.lmdb", "--tokenizer", "vocab.txt"),
    "split of texts": ("db", "split", "texts.db", "text-parts", "--by", "2"),
}


@pytest.mark.parametrize(
    "case",
    CONTINUED,
)
def test_folders_without_digests_are_accepted_and_stamped(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they were made from is unknown: said once, then remembered."""
    shutil.copytree(OLDER, tmp_path / "older")
    monkeypatch.chdir(tmp_path / "older")
    out = Path(CONTINUED[case][2 if case == "build-db" else -1 if case == "merge" else 3])
    data = {path: path.read_bytes() for path in out.rglob("data.mdb")}
    accepted(run(*CONTINUED[case]), "unknown")
    said = accepted(run(*CONTINUED[case]), "already").output
    assert not world.says(said, "unknown")
    assert data == {path: path.read_bytes() for path in out.rglob("data.mdb")}


def test_folders_without_digests_are_read(tmp_path: Path) -> None:
    """Copied first: reading is not to write beside what is kept."""
    shutil.copytree(OLDER, tmp_path / "older")
    for name in ("converted.lmdb", "merged.lmdb", "parts"):
        assert set(records(tmp_path / "older" / name)) == {"a.npz", "b.npz"}
    for name in ("texts.db", "text-parts/part-0", "text-parts/part-1"):
        assert world.texts(tmp_path / "older" / name)
    folders = [tmp_path / "older" / name for name in ("converted.lmdb", "merged.lmdb", "texts.db")]
    accepted(run("db", "check", *folders), "none")
