"""Nothing is destroyed before its successor is whole, nothing of others is touched, and nothing that was listed goes missing.

Commands and files only.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import identity_world as world
import numpy as np
import pytest

accepted, done, records, refused, run, tree = (
    world.accepted, world.done, world.records, world.refused, world.run, world.tree,
)  # fmt: skip
Words = tuple[object, ...]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return world.trained(tmp_path_factory.getbasetemp())


# ---------------------------------------------------------------------------------------------------------- 9: sources within OUT


def parts_of_regions(folder: Path) -> Path:
    """A folder of two region databases, part-0 and part-1."""
    done("db", "split", world.region_database(folder / "in.lmdb", "abcd"), folder / "parts", "--by", 2)
    return folder / "parts"


def parts_of_texts(folder: Path) -> Path:
    """A folder of two text databases."""
    captions = world.captions_file(folder / "captions.jsonl", [f"{name}.jpg" for name in "abcd"])
    done("build-db", captions, folder / "in.db", "--tokenizer", world.vocabulary_file(folder / "vocab.txt"))
    done("db", "split", folder / "in.db", folder / "parts", "--by", 2)
    return folder / "parts"


def published(folder: Path) -> Path:
    """A folder of one database in UNITER's layout."""
    done("db", "convert", world.npz_folder(folder / "npz", "abcd"), folder / "parts", "--to", "uniter")
    return folder / "parts"


WITHIN: dict[str, tuple[Callable[[Path], Path], Callable[[Path], Words]]] = {
    "split": (parts_of_regions, lambda parts: ("split", parts / "part-0", parts, "--by", 2)),
    "split of texts": (parts_of_texts, lambda parts: ("split", parts / "part-0", parts, "--by", 2)),
    "merge": (parts_of_regions, lambda parts: ("merge", parts, parts / "part-0")),
    "merge of texts": (parts_of_texts, lambda parts: ("merge", parts / "part-0", parts / "part-1", parts / "part-0")),
    "convert": (parts_of_regions, lambda parts: ("convert", parts, parts / "part-0")),
    "convert to UNITER's": (published, lambda parts: ("convert", next(parts.glob("feat_*")), parts, "--to", "uniter")),
    "repair": (parts_of_regions, lambda parts: ("check", parts, "--repair", parts / "part-0")),
}


@pytest.mark.parametrize(
    "case",
    [
        "split",
        "split of texts",
        "merge",
        "merge of texts",
        "convert",
        "convert to UNITER's",
        "repair",
    ],
)
def test_a_source_is_never_overwritten(case: str, tmp_path: Path) -> None:
    make, command = WITHIN[case]
    folder = make(tmp_path)
    before = tree(folder)
    result = run("db", *command(folder), "--overwrite")
    assert not world.differences(before, tree(folder))
    refused(result, "source|itself")


# ------------------------------------------------------------------------------------ 9: what fails leaves what was there


def build_of_no_such_part(folder: Path, trained: Any) -> tuple[Path, Words]:
    """`--split tset`, of a file that has train and test."""
    images = [
        {"filename": f"{place}.jpg", "filepath": "val2014", "split": part, "imgid": place, "cocoid": place, "sentids": [place],
         "sentences": [{"raw": "a red cat", "tokens": ["a", "red", "cat"], "sentid": place, "imgid": place}]}
        for place, part in enumerate(("train", "test"))
    ]  # fmt: skip
    (folder / "dataset_coco.json").write_text(json.dumps({"dataset": "coco", "images": images}))
    done("build-db", folder / "dataset_coco.json", folder / "out.db", "--split", "test")
    return folder / "out.db", ("build-db", folder / "dataset_coco.json", folder / "out.db", "--split", "tset")


def build_without_an_image(folder: Path, trained: Any) -> tuple[Path, Words]:
    captions = world.captions_file(folder / "captions.jsonl", ["a.jpg"])
    done("build-db", captions, folder / "out.db", "--images", world.region_database(folder / "a.lmdb", "a"))
    return folder / "out.db", ("build-db", captions, folder / "out.db", "--images", world.region_database(folder / "b.lmdb", "b"))


def merge_that_conflicts(folder: Path, trained: Any) -> tuple[Path, Words]:
    first, second = world.region_database(folder / "x.lmdb", "ab"), world.region_database(folder / "y.lmdb", "bc", seed=1)
    done("db", "merge", first, folder / "out.lmdb")
    return folder / "out.lmdb", ("db", "merge", first, second, folder / "out.lmdb")


def merge_of_texts_that_conflicts(folder: Path, trained: Any) -> tuple[Path, Words]:
    vocabulary = world.vocabulary_file(folder / "vocab.txt")
    for name, text in (("x", "a red cat"), ("y", "a red dog")):
        captions = world.captions_file(folder / f"{name}.jsonl", ["a.jpg"], text=text)
        done("build-db", captions, folder / f"{name}.db", "--tokenizer", vocabulary)
    done("db", "merge", folder / "x.db", folder / "out.db")
    return folder / "out.db", ("db", "merge", folder / "x.db", folder / "y.db", folder / "out.db")


def conversion_of_nothing_good(folder: Path, trained: Any) -> tuple[Path, Words]:
    out = world.region_database(folder / "out.lmdb", "ab")
    return out, ("db", "convert", world.npz_folder(folder / "broken", (), broken="ab"), out)


def split_by_a_list_of_others(folder: Path, trained: Any) -> tuple[Path, Words]:
    source = world.region_database(folder / "in.lmdb", "abcd")
    for name, lines in (("one", "a.npz\n"), ("two", "x.npz\n")):
        (folder / f"{name}.txt").write_text(lines)
    done("db", "split", source, folder / "out", "--by", folder / "one.txt")
    return folder / "out", ("db", "split", source, folder / "out", "--by", folder / "two.txt")


def repair_of_nothing_good(folder: Path, trained: Any) -> tuple[Path, Words]:
    source = world.region_database(folder / "in.lmdb", ["a"])
    done("db", "check", source, "--repair", folder / "out.lmdb")
    content = (source / "data.mdb").read_bytes()
    (source / "data.mdb").write_bytes(content[:8192] + bytes(len(content) - 8192))
    return folder / "out.lmdb", ("db", "check", source, "--repair", folder / "out.lmdb")


def extraction_of_nothing_good(folder: Path, trained: Any) -> tuple[Path, Words]:
    photos = world.photographs(folder / "photos", "ab")
    words = ("extract", photos, folder / "out.lmdb", "--detector", trained.detectors[0], *world.DETECT)
    done(*words)
    for path in photos.iterdir():
        path.write_bytes(b"\xff\xd8\xff no photograph any more")
    return folder / "out.lmdb", words


def detector_from_no_weights(folder: Path, trained: Any) -> tuple[Path, Words]:
    world.train_detector(trained.images, trained.instances, folder / "detector")
    (folder / "weights.pth").write_bytes(b"no weights")
    words = ("--model", "tiny", "--steps", 1, "--batch-size", 1, "--no-attributes", *world.CPU, "--from", folder / "weights.pth")
    return folder / "detector", (
        "train", "detector", "--images", trained.images, "--annotations", trained.instances, "--out", folder / "detector", *words,
    )  # fmt: skip


@pytest.mark.parametrize(
    "case",
    [
        build_of_no_such_part,
        build_without_an_image,
        merge_that_conflicts,
        merge_of_texts_that_conflicts,
        conversion_of_nothing_good,
        split_by_a_list_of_others,
        repair_of_nothing_good,
        extraction_of_nothing_good,
        detector_from_no_weights,
    ],
)
def test_what_fails_under_overwrite_leaves_what_was_there(
    case: Callable[[Path, Any], tuple[Path, Words]], tmp_path: Path, trained: Any
) -> None:
    out, words = case(tmp_path, trained)
    before = tree(out)
    refused(run(*words, "--overwrite"), code=2 if case is build_of_no_such_part else 1)
    assert not world.differences(before, tree(out))


KILLED: dict[str, Callable[[Path, int], tuple[Path, Words]]] = {
    "convert": lambda folder, seed: (
        folder / "out.lmdb", ("db", "convert", world.npz_folder(folder / f"npz-{seed}", "ab", seed=seed), folder / "out.lmdb"),
    ),
    "merge": lambda folder, seed: (
        folder / "out.lmdb", ("db", "merge", world.region_database(folder / f"in-{seed}", "ab", seed=seed), folder / "out.lmdb"),
    ),
    "build-db": lambda folder, seed: (
        folder / "out.db",
        ("build-db", world.captions_file(folder / f"{seed}.jsonl", ["a.jpg"], text=world.WORDS[1 + seed]), folder / "out.db",
         "--tokenizer", world.vocabulary_file(folder / "vocab.txt")),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", KILLED)
def test_what_is_killed_under_overwrite_leaves_the_old_or_the_new(case: str, tmp_path: Path) -> None:
    def held(path: Path) -> Mapping[str, Any]:
        return world.texts(path) if case == "build-db" else records(path)

    there, elsewhere = tmp_path / "there", tmp_path / "elsewhere"
    there.mkdir()
    elsewhere.mkdir()
    new_out, new_words = KILLED[case](elsewhere, 1)
    done(*new_words)
    out, old_words = KILLED[case](there, 0)
    done(*old_words)
    old, new = held(out), held(new_out)
    _, words = KILLED[case](there, 1)
    beside = {path.name for path in there.iterdir()}
    for instant in (3, 10):
        world.killed(there, instant, *words, "--overwrite")
        assert (out / "header.json").exists(), "neither the old database nor the new one is there"
        assert held(out) in (old, new)
    accepted(run(*words, "--overwrite"))
    assert held(out) == new != old
    assert {path.name for path in there.iterdir()} == beside, "what was built aside is left behind"


# ------------------------------------------------------------------------------------------- 10: somebody else's folders and files


def written_by_hand(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{name} is somebody's work\n")
    return folder


def other_lmdb(folder: Path) -> Path:
    """A database in UNITER's layout: no settings.json of ours."""
    done("db", "convert", world.npz_folder(folder.with_name("npz"), "abcd"), folder.with_name("published"), "--to", "uniter")
    shutil.move(next(folder.with_name("published").glob("feat_*")), folder)
    return folder


def other_texts(folder: Path) -> Path:
    """The same of texts."""
    captions = world.captions_file(folder.with_name("captions.jsonl"), ["a.jpg"])
    done("build-db", captions, folder, "--tokenizer", world.vocabulary_file(folder.with_name("vocab.txt")))
    for name in ("settings.json", "header.json", "index.safetensors"):
        (folder / name).unlink()
    return folder


Foreign = Callable[[Path, Any], tuple[Path, Words]]


def photos_and(folder: Path, trained: Any, out: Path) -> Words:
    return ("extract", world.photographs(folder / "photos", "a"), out, "--detector", trained.detectors[0], *world.DETECT)


def labelled_and(trained: Any, out: Path) -> Words:
    words = ("--model", "tiny", "--steps", 1, "--batch-size", 1, "--no-attributes", *world.CPU)
    return ("train", "detector", "--images", trained.images, "--annotations", trained.instances, "--out", out, *words)


def trained_on(trained: Any, out: Path) -> Words:
    data = ("--text", trained.texts, "--images", trained.regions[0])
    return ("train", "pretrain", *data, "--out", out, "--steps", 1, *world.TINY)


FOREIGN: dict[str, Foreign] = {
    "extract, units": lambda folder, trained: (
        written_by_hand(folder / "out", "units/thesis.tex", "notes.txt"), photos_and(folder, trained, folder / "out"),
    ),
    "extract, LMDB": lambda folder, trained: (other_lmdb(folder / "out"), photos_and(folder, trained, folder / "out")),
    "convert": lambda folder, trained: (other_lmdb(folder / "out"), ("db", "convert", folder / "npz", folder / "out")),
    "merge": lambda folder, trained: (
        other_lmdb(folder / "out"), ("db", "merge", world.region_database(folder / "in.lmdb", "ab"), folder / "out"),
    ),
    "split": lambda folder, trained: (
        other_lmdb(folder / "out" / "part-0"),
        ("db", "split", world.region_database(folder / "in.lmdb", "ab"), folder / "out", "--by", 2),
    ),
    "repair": lambda folder, trained: (
        other_lmdb(folder / "out"), ("db", "check", world.region_database(folder / "in.lmdb", "ab"), "--repair", folder / "out"),
    ),
    "build-db": lambda folder, trained: (other_texts(folder / "out"), ("build-db", folder / "captions.jsonl", folder / "out")),
    "build-db, notes": lambda folder, trained: (
        written_by_hand(folder / "out", "vocab.txt", "boxes.json", "notes.txt"),
        ("build-db", world.captions_file(folder / "captions.jsonl", ["a.jpg"]), folder / "out"),
    ),
    "detector": lambda folder, trained: (
        written_by_hand(folder / "out", "config.yaml", "log.jsonl", "checkpoints/mine.pt"), labelled_and(trained, folder / "out"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FOREIGN)
def test_overwrite_does_not_touch_a_folder_of_others(case: str, tmp_path: Path, trained: Any) -> None:
    folder, words = FOREIGN[case](tmp_path, trained)
    before = tree(folder)
    refused(run(*words, "--overwrite"))
    assert not world.differences(before, tree(folder))


def scenes_among_others(folder: Path, trained: Any) -> tuple[Path, Words]:
    return written_by_hand(folder / "out", "images/scene_of_mine.jpg"), ("scenes", folder / "out", "--images", 2, "--held-out", 0)


def another_world_among_others(folder: Path, trained: Any) -> tuple[Path, Words]:
    done("scenes", folder / "out", "--images", 3, "--held-out", 0)
    written_by_hand(folder / "out", "images/scene_of_mine.jpg")
    return folder / "out" / "images" / "scene_of_mine.jpg", ("scenes", folder / "out", "--images", 2, "--held-out", 0, "--overwrite")


def run_among_others(folder: Path, trained: Any) -> tuple[Path, Words]:
    return written_by_hand(folder / "out", "config.yaml", "log.jsonl", "checkpoints/mine.pt"), trained_on(trained, folder / "out")


def export_among_others(folder: Path, trained: Any) -> tuple[Path, Words]:
    written_by_hand(folder / "out", "README.md", "vocab.txt", "config.json")
    return folder / "out", ("train", "export", "--from", trained.run, "--to", "hub", folder / "out")


@pytest.mark.parametrize(
    "case",
    [
        scenes_among_others,
        another_world_among_others,
        run_among_others,
        export_among_others,
    ],
)
def test_files_of_others_stay(case: Foreign, tmp_path: Path, trained: Any) -> None:
    """Whether the command is refused or writes beside them."""
    path, words = case(tmp_path, trained)
    before = tree(path) if path.is_dir() else {"": path.read_bytes()}
    result = run(*words)
    assert result.exit_code in (0, 1) and "Traceback" not in result.output
    after = tree(path) if path.is_dir() else {"": path.read_bytes() if path.exists() else b""}
    assert {name: after.get(name) for name in before} == before


OURS: dict[str, Callable[[Path, Any], tuple[Path, Words]]] = {
    "convert": lambda folder, trained: (
        folder / "out", ("db", "convert", world.npz_folder(folder / "npz", "ab"), folder / "out"),
    ),
    "merge": lambda folder, trained: (folder / "out", ("db", "merge", world.region_database(folder / "in.lmdb", "ab"), folder / "out")),
    "build-db": lambda folder, trained: (
        folder / "out", ("build-db", world.captions_file(folder / "captions.jsonl", ["a.jpg"]), folder / "out"),
    ),
    "extract": lambda folder, trained: (folder / "out", photos_and(folder, trained, folder / "out")),
    "detector": lambda folder, trained: (folder / "out", labelled_and(trained, folder / "out")),
}  # fmt: skip


@pytest.mark.parametrize("case", OURS)
def test_notes_in_a_folder_of_ours_outlive_overwrite(case: str, tmp_path: Path, trained: Any) -> None:
    out, words = OURS[case](tmp_path, trained)
    done(*words)
    written_by_hand(out, "notes.txt", "mine/thesis.tex")
    accepted(run(*words, "--overwrite"))
    assert (out / "notes.txt").exists() and (out / "mine" / "thesis.tex").exists()


# ------------------------------------------------------------------------------------------------------- 11: failures are handed on


def handed_on(way: str, source: Path, out: Path) -> list[Path]:
    """Write `source` to `out` in one of the ways that databases go; the databases that hold all of it now."""
    if way == "split by number":
        done("db", "split", source, out, "--by", 2)
    elif way == "split by list":
        (out.parent / "list.txt").write_text("a.npz\n")
        done("db", "split", source, out, "--by", out.parent / "list.txt")
    elif way == "split and merged":
        done("db", "split", source, out.with_name("parts"), "--by", 2)
        done("db", "merge", *sorted(out.with_name("parts").iterdir()), out)
    elif way == "repair":
        done("db", "check", source, "--repair", out)
    else:
        done("db", *({"convert": ("convert",), "merge": ("merge",)}[way]), source, out)
    return sorted(out.iterdir()) if way.startswith("split by") else [out]


@pytest.mark.parametrize(
    "way",
    [
        "split by number",
        "split by list",
        "split and merged",
        "convert",
        "merge",
        "repair",
    ],
)
def test_failures_are_handed_on(way: str, tmp_path: Path) -> None:
    """What was asked for is in the database or in failures.jsonl, wherever the database goes."""
    source = tmp_path / "in.lmdb"
    done("db", "convert", world.npz_folder(tmp_path / "npz", "abcd", broken=["y", "z"]), source)
    rows = sorted((row["key"], row["error"]) for row in world.failures(source))
    if [key for key, _ in rows] != ["y.npz", "z.npz"]:
        raise RuntimeError(f"expected two failures, got {rows}")
    there = handed_on(way, source, tmp_path / "out")
    assert sorted((row["key"], row["error"]) for path in there for row in world.failures(path)) == rows
    assert sum(json.loads((path / "header.json").read_text())["failures"] for path in there) == 2
    assert {key for path in there for key in records(path)} == set(records(source))


# ------------------------------------------------------------------------------------------------------------- 28: true counts


@pytest.mark.parametrize("to", ["uniter", "uniter-compressed"])
def test_regions_are_counted_as_they_are_for_uniters_code(to: str, tmp_path: Path) -> None:
    """UNITER's loader takes as many rows as nbb_*.json says, and dies where there are fewer."""
    source, out = tmp_path / "npz", tmp_path / "published"
    for name, count in (("a", 1), ("b", 4), ("c", 12)):
        world.npz_folder(source, [name], regions=count)
    done("db", "convert", source, out, "--to", to)
    (stated,) = (json.loads(path.read_text()) for path in out.glob("nbb_*.json"))
    assert stated == {"a.npz": 1, "b.npz": 4, "c.npz": 12}
    done("db", "convert", out, tmp_path / "back", "--to", "npz")
    for name, count in stated.items():
        assert len(np.load(tmp_path / "back" / name)["features"]) == count
