"""Identity is content: "the same command again" means the same contents, whatever their names; other contents are refused in words.

Commands and files only.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import identity_world as world
import numpy as np
import pytest

accepted, done, records, refused, run, tree = (
    world.accepted, world.done, world.records, world.refused, world.run, world.tree,
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return world.trained(tmp_path_factory.getbasetemp())


# ------------------------------------------------------------------------------- 1, 3: the same command with other contents

# A case yields twice: the folder it writes and the command; then, with contents or a file of equal names and counts in the place of the
# first ones, the command that must not be taken for the same.
Step = tuple[Path, tuple[object, ...]]
Case = Callable[[Path], Iterator[Step]]


def split_by_another_list(folder: Path) -> Iterator[Step]:
    source, out = world.region_database(folder / "in.lmdb", "abcd"), folder / "parts"
    (folder / "one.txt").write_text("a.npz\nb.npz\n")
    (folder / "two.txt").write_text("c.npz\nd.npz\n")
    yield out, ("db", "split", source, out, "--by", folder / "one.txt")
    yield out, ("db", "split", source, out, "--by", folder / "two.txt")


def split_of_another_database(folder: Path) -> Iterator[Step]:
    source, out = world.region_database(folder / "in.lmdb", "abcd"), folder / "parts"
    yield out, ("db", "split", source, out, "--by", 2)
    world.region_database(source, "abcd", seed=1, again=True)
    yield out, ("db", "split", source, out, "--by", 2)


def split_of_texts_by_another_list(folder: Path) -> Iterator[Step]:
    source, out = folder / "in.db", folder / "parts"
    done("build-db", world.captions_file(folder / "captions.jsonl", ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]), source)
    (folder / "list.txt").write_text("t0\nt1\n")
    yield out, ("db", "split", source, out, "--by", folder / "list.txt")
    (folder / "list.txt").write_text("t2\nt3\n")
    yield out, ("db", "split", source, out, "--by", folder / "list.txt")


def conversion_of_another_file(folder: Path) -> Iterator[Step]:
    out = folder / "out.lmdb"
    yield out, ("db", "convert", world.caffe_tsv(folder / "a" / "feats.tsv", "abcd"), out)
    yield out, ("db", "convert", world.caffe_tsv(folder / "b" / "feats.tsv", "abcd", seed=1), out)


def conversion_of_a_folder_exported_again(folder: Path) -> Iterator[Step]:
    source, out = world.npz_folder(folder / "npz", "abcd"), folder / "out.lmdb"
    yield out, ("db", "convert", source, out)
    world.npz_folder(source, "abcd", seed=1)
    yield out, ("db", "convert", source, out)


def conversion_of_another_database(folder: Path) -> Iterator[Step]:
    source, out = world.region_database(folder / "in.lmdb", "abcd"), folder / "out.lmdb"
    yield out, ("db", "convert", source, out)
    world.region_database(source, "abcd", seed=1, again=True)
    yield out, ("db", "convert", source, out)


def merge_of_other_databases(folder: Path) -> Iterator[Step]:
    out = folder / "out.lmdb"
    first = [world.region_database(folder / "then" / name, keys) for name, keys in (("x.lmdb", "ab"), ("y.lmdb", "cd"))]
    other = [world.region_database(folder / "now" / name, keys, seed=1) for name, keys in (("x.lmdb", "ab"), ("y.lmdb", "cd"))]
    yield out, ("db", "merge", *first, out)
    yield out, ("db", "merge", *other, out)


def merge_of_other_texts(folder: Path) -> Iterator[Step]:
    """Of equal captions, so that nothing but the keys of the images tells the databases apart."""
    out, captions = folder / "out.db", world.captions_file(folder / "captions.jsonl", ["a.jpg", "b.jpg"])
    for when, names in (("then", ["a", "b"]), ("now", ["a.jpg", "b.jpg"])):
        regions = world.region_database(folder / when / "in.lmdb", names)
        done("build-db", captions, folder / when / "t.db", "--images", regions)
    yield out, ("db", "merge", folder / "then" / "t.db", out)
    yield out, ("db", "merge", folder / "now" / "t.db", out)


def texts_of_another_file(folder: Path) -> Iterator[Step]:
    out, captions = folder / "out.db", folder / "captions.jsonl"
    yield out, ("build-db", world.captions_file(captions, ["a.jpg"], text="a red cat"), out)
    yield out, ("build-db", world.captions_file(captions, ["a.jpg"], text="a red dog"), out)


def texts_for_regions_of_other_keys(folder: Path) -> Iterator[Step]:
    captions, out = world.captions_file(folder / "captions.jsonl", ["a.jpg", "b.jpg"]), folder / "out.db"
    regions = world.region_database(folder / "in.lmdb", ["a", "b"])
    yield out, ("build-db", captions, out, "--images", regions)
    world.region_database(regions, ["a.jpg", "b.jpg"], again=True)
    yield out, ("build-db", captions, out, "--images", regions)


def regions_of_other_boxes(folder: Path) -> Iterator[Step]:
    made, out, boxes = world.trained(folder.parent), folder / "out.lmdb", folder / "boxes.jsonl"
    photo = world.photograph(folder / "a.jpg", 0)
    boxes.write_text('{"image": "a.jpg", "boxes": [[1, 1, 50, 50]]}')
    yield out, ("extract", photo, out, "--boxes", boxes, "--detector", made.detectors[0], *world.CPU)
    boxes.write_text('{"image": "a.jpg", "boxes": [[9, 9, 50, 50]]}')
    yield out, ("extract", photo, out, "--boxes", boxes, "--detector", made.detectors[0], *world.CPU)


def detector_of_other_photographs(folder: Path) -> Iterator[Step]:
    made, out, images = world.trained(folder.parent), folder / "detector", folder / "images"
    shutil.copytree(made.images, images)
    words = (
        "--annotations",
        made.instances,
        "--out",
        out,
        "--model",
        "tiny",
        "--steps",
        1,
        "--batch-size",
        1,
        "--no-attributes",
        *world.CPU,
    )
    yield out, ("train", "detector", "--images", images, *words)
    for place, path in enumerate(sorted(images.iterdir())):
        world.photograph(path, place, size=(128, 160))
    yield out, ("train", "detector", "--images", images, *words)


def pre_training_on_other_regions(folder: Path) -> Iterator[Step]:
    names = [f"p{place}" for place in range(6)]
    captions = world.captions_file(folder / "captions.jsonl", [f"{name}.jpg" for name in names])
    regions, out = world.region_database(folder / "in.lmdb", names), folder / "run"
    done("build-db", captions, folder / "t.db", "--images", regions, "--tokenizer", world.vocabulary_file(folder / "vocab.txt"))
    words = ("train", "pretrain", "--text", folder / "t.db", "--images", regions, "--out", out, "--steps", 2, *world.TINY)
    yield out, words
    world.region_database(regions, names, seed=1, again=True)
    yield out, words


def scores_of_other_regions(folder: Path) -> Iterator[Step]:
    made, out, npz, regions = world.trained(folder.parent), folder / "scores", folder / "npz", folder / "in.lmdb"
    done("db", "convert", made.regions[0], npz, "--to", "npz")
    done("db", "convert", npz, regions)
    data = ("--text", folder / "t.db", "--images", regions)
    words = ("train", "evaluate", "retrieval", "--from", made.run, *data, "--scores", out, *world.CPU)
    done("build-db", made.images.parent / "captions_train.json", folder / "t.db", "--images", regions, "--tokenizer", made.texts)
    yield out, words
    for path in npz.glob("*.npz"):
        arrays = dict(np.load(path))
        np.savez(path, **{**arrays, "features": arrays["features"][::-1]})
    done("db", "convert", npz, regions, "--overwrite")
    yield out, words


@pytest.mark.parametrize(
    "case",
    [
        split_by_another_list,
        split_of_another_database,
        split_of_texts_by_another_list,
        conversion_of_another_file,
        conversion_of_a_folder_exported_again,
        conversion_of_another_database,
        merge_of_other_databases,
        merge_of_other_texts,
        texts_of_another_file,
        texts_for_regions_of_other_keys,
        regions_of_other_boxes,
        detector_of_other_photographs,
        pre_training_on_other_regions,
        scores_of_other_regions,
    ],
)
def test_other_contents_of_the_same_names_are_refused(case: Case, tmp_path: Path, trained: Any) -> None:
    steps = case(tmp_path)
    out, words = next(steps)
    done(*words)
    before = tree(out)
    _, words = next(steps)
    refused(run(*words), "differ|other|chang|was ", "overwrite|another|remove")
    assert not world.differences(before, tree(out))


@pytest.mark.parametrize(
    "case",
    [
        split_by_another_list,
        split_of_texts_by_another_list,
        conversion_of_another_file,
        merge_of_other_databases,
        texts_of_another_file,
        texts_for_regions_of_other_keys,
        regions_of_other_boxes,
    ],
)
def test_the_same_contents_are_already_complete(case: Case, tmp_path: Path, trained: Any) -> None:
    """Said, nothing written; a copy with new times is no other content."""
    out, words = next(case(tmp_path))
    done(*words)
    before = tree(out)
    for folder in tmp_path.iterdir():
        if folder != out:
            world.touch_all(folder if folder.is_dir() else tmp_path)
    accepted(run(*words), "already")
    assert not world.differences(before, tree(out))


# ------------------------------------------------------------------------------------------ 2: killed, and the source exported again


def test_a_killed_conversion_does_not_go_on_with_another_source(tmp_path: Path) -> None:
    """It is refused; with the first source again it ends as an unbroken conversion."""
    names = [f"{place:04d}" for place in range(530)]
    source, other, out, whole = tmp_path / "npz", tmp_path / "kept" / "npz", tmp_path / "out.lmdb", tmp_path / "whole.lmdb"
    world.npz_folder(source, names, regions=1, width=2)
    done("db", "convert", source, whole)
    if not world.killed(out, 1, "db", "convert", source, out, least=100_000):
        raise RuntimeError("it ended before it was killed")
    shutil.copytree(source, other)
    world.npz_folder(source, names, regions=1, width=2, seed=1)
    words = ("db", "convert", source, out)
    refused(run(*words), "differ|other|chang|was ")
    assert not (out / "header.json").exists()
    shutil.rmtree(source)
    shutil.move(other, source)
    accepted(run(*words))
    assert records(out) == records(whole)


# --------------------------------------------------------------------------------------------------- 4: one database, one detector


@pytest.mark.parametrize("widths", ["unequal", "equal"])
def test_repair_does_not_put_two_detectors_into_one_database(widths: str, tmp_path: Path, trained: Any) -> None:
    """As `merge` does not."""
    parts, out = tmp_path / "parts", tmp_path / "out.lmdb"
    parts.mkdir()
    if widths == "unequal":
        world.region_database(parts / "x.lmdb", "ab", width=8)
        world.region_database(parts / "y.lmdb", "cd", width=16)
        for name in ("x", "y"):
            shutil.rmtree(parts / f"{name}.lmdb-npz")
    else:
        (tmp_path / "keys.txt").write_text("scene_000001\nscene_000002\nscene_000003\n")
        for name, source, part in (("x", trained.regions[0], "listed"), ("y", trained.regions[1], "rest")):
            done("db", "split", source, tmp_path / name, "--by", tmp_path / "keys.txt")
            shutil.copytree(tmp_path / name / part, parts / f"{name}.lmdb")
    refused(run("db", "merge", parts / "x.lmdb", parts / "y.lmdb", tmp_path / "merged.lmdb"), "wide|otherwise|detector")
    refused(run("db", "check", parts, "--repair", out), "wide|width|otherwise|detector")
    assert not (out / "header.json").exists()


# ------------------------------------------------------------------------------------------------------ 5, 6: one image, one name

FOLDERS = ("cats/0001.jpg", "dogs/0001.jpg", "cars/0001.jpg")


@pytest.mark.parametrize("with_regions", [False, True])
def test_names_of_different_folders_that_share_a_key_are_refused(with_regions: bool, tmp_path: Path) -> None:
    words: tuple[object, ...] = (world.captions_file(tmp_path / "captions.jsonl", FOLDERS), tmp_path / "out.db")
    if with_regions:
        words = (*words, "--images", world.region_database(tmp_path / "in.lmdb", ["0001"]))
    refused(run("build-db", *words), "0001", "cats/0001.jpg|dogs/0001.jpg|cars/0001.jpg", "--key|folder")
    assert not (tmp_path / "out.db" / "header.json").exists()


def test_names_of_different_folders_have_keys_of_their_own_by_path(tmp_path: Path) -> None:
    told = world.summary("build-db", world.captions_file(tmp_path / "captions.jsonl", FOLDERS), tmp_path / "out.db", "--key", "path")
    assert told["images"] == 3


def test_names_of_one_folder_that_share_a_key_are_counted(tmp_path: Path) -> None:
    captions = world.captions_file(tmp_path / "captions.jsonl", ["cats/0001.jpg", "cats/0001.png", "cats/0002.jpg"])
    accepted(run("build-db", captions, tmp_path / "out.db"), "shar|same key|same_key|one key|equal key")


def test_boxes_are_of_the_image_that_they_name(tmp_path: Path, trained: Any) -> None:
    images, out = world.photographs(tmp_path / "vg", ["VG_100K/7", "VG_100K_2/7"]), tmp_path / "out.lmdb"
    (tmp_path / "boxes.jsonl").write_text('{"image": "VG_100K/7.jpg", "boxes": [[1, 1, 50, 50]]}')
    words = (images, out, "--key", "path", "--boxes", tmp_path / "boxes.jsonl", "--detector", trained.detectors[0], *world.CPU)
    result = run("extract", *words)
    if result.exit_code == 0:
        assert set(records(out)) == {"VG_100K/7"}
        assert [row["key"] for row in world.failures(out)] == ["VG_100K_2/7"]
    else:
        refused(result, "7.jpg")


def test_an_ambiguous_picture_gives_no_size(tmp_path: Path) -> None:
    """Boxes in pixels of another picture would be wrong; the full path tells the two apart."""
    for name, size in (("a/7", (100, 200)), ("b/7", (300, 400)), ("a/8", (50, 60))):
        world.photograph(tmp_path / "images" / f"{name}.jpg", 0, size=size)
    source, out = world.npz_folder(tmp_path / "npz", ["7", "8"]), tmp_path / "out.lmdb"
    world.npz_folder(source / "b", ["7"])
    assert run("db", "convert", source, out, "--images", tmp_path / "images").exit_code in (0, 1)
    sizes = {key: np.frombuffer(values[-1], dtype=np.int64 if len(values[-1]) == 16 else np.int32).tolist()
             for key, values in (records(out) if (out / "header.json").exists() else {}).items()}  # fmt: skip
    assert sizes.get("7.npz", []) == []
    assert sizes.get("b/7.npz", [300, 400]) == [300, 400] and sizes.get("8.npz", [50, 60]) == [50, 60]
    result = run("db", "convert", source, tmp_path / "out.tsv", "--to", "butd-tsv", "--images", tmp_path / "images")
    assert world.says(result.output, "7.npz|'7'"), result.output
    lines = (tmp_path / "out.tsv").read_text().splitlines() if (tmp_path / "out.tsv").exists() else []
    assert "7.npz" not in [line.split("\t")[0] for line in lines]


# ------------------------------------------------------------------------------------------------------------- 7: vocabularies


def tokenised(folder: Path, name: str, vocabulary: Path) -> Path:
    captions = world.captions_file(folder / f"{name}.jsonl", [f"{name}.jpg"])
    captions.write_text(captions.read_text().replace('"t0"', f'"{name}"'))
    done("build-db", captions, folder / f"{name}.db", "--tokenizer", vocabulary)
    return folder / f"{name}.db"


def test_the_same_vocabulary_by_another_path_is_the_same(tmp_path: Path) -> None:
    both = [tokenised(tmp_path, name, world.vocabulary_file(tmp_path / name / "vocab.txt")) for name in ("x", "y")]
    accepted(run("db", "merge", *both, tmp_path / "both.db"))
    assert world.texts(tmp_path / "both.db") == {**world.texts(both[0]), **world.texts(both[1])}


def test_another_vocabulary_of_the_same_path_is_another(tmp_path: Path) -> None:
    first = tokenised(tmp_path, "x", world.vocabulary_file(tmp_path / "vocab.txt"))
    second = tokenised(tmp_path, "y", world.vocabulary_file(tmp_path / "vocab.txt", world.WORDS[::-1]))
    refused(run("db", "merge", first, second, tmp_path / "both.db"), "tokenizer|vocabular")
    assert not (tmp_path / "both.db" / "header.json").exists()


# ------------------------------------------------------------------------------------------------------ 8: whose regions it learnt


@pytest.fixture(scope="module")
def tuned(trained: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run fine-tuned for retrieval on the first detector's regions; and exported in both layouts beside."""
    folder = tmp_path_factory.mktemp("tuned")
    done("train", "finetune", "retrieval", "--from", trained.run, "--text", trained.texts, "--images", trained.regions[0],
         "--out", folder / "run", "--steps", 1, "--set", "tensorboard=false", "--set", "batch_tokens=200", *world.CPU)  # fmt: skip
    done("train", "export", "--from", trained.run, "--to", "hub", folder / "hub")
    done("train", "export", "--from", trained.run, "--to", "published", folder / "published.pt")
    return folder


def used_with(use: str, images: Path, trained: Any, tuned: Path, out: Path) -> tuple[object, ...]:
    """A command that hands these regions to a model that learnt from the first detector's."""
    data = ("--text", trained.texts, "--images", images)
    small = ("--out", out / "run", "--steps", 1, "--set", "tensorboard=false", "--set", "batch_tokens=200")
    return {
        "evaluate": ("evaluate", "pretrain", "--from", trained.run, *data, "--candidates", 2),
        "evaluate an export": ("evaluate", "pretrain", "--from", tuned / "hub", *data, "--candidates", 2),
        "evaluate a published export": ("evaluate", "pretrain", "--from", tuned / "published.pt", *data, "--candidates", 2),
        "second stage": ("pretrain", "--from", trained.run, *data, *small),
        "finetune": ("finetune", "retrieval", "--from", trained.run, *data, *small),
        "evaluate a task": ("evaluate", "retrieval", "--from", tuned / "run", *data),
        "predict": ("predict", "retrieval", "--from", tuned / "run", *data, "--out", out / "ranks.json"),
    }[use]


USES = ["evaluate", "evaluate an export", "evaluate a published export", "second stage", "finetune", "evaluate a task", "predict"]


@pytest.mark.parametrize("use", USES)
def test_regions_of_another_detector_are_refused_unless_meant(use: str, trained: Any, tuned: Path, tmp_path: Path) -> None:
    words = ("train", *used_with(use, trained.regions[1], trained, tuned, tmp_path), *world.CPU)
    refused(run(*words), "detector", "--other-detector")
    assert not any(tmp_path.iterdir())
    accepted(run(*words, "--other-detector"))


@pytest.mark.parametrize("use", USES)
def test_another_selection_of_the_same_detector_is_said_each_time(use: str, trained: Any, tuned: Path, tmp_path: Path) -> None:
    """It is no fault, since sets of 36 and of 10 to 100 regions are used side by side; and nothing is said of the same one."""
    regions, out = tmp_path / "regions.lmdb", tmp_path / "out"
    out.mkdir()
    shutil.copytree(trained.regions[0], regions)
    header = json.loads((regions / "header.json").read_text())
    header["selection"]["max_boxes"] = 36
    (regions / "header.json").write_text(json.dumps(header))
    words = ("train", *used_with(use, regions, trained, tuned, out), *world.CPU, "--json")
    for again in range(2):  # what is complete already says it, too
        result = accepted(run(*words, *(("--overwrite",) if again and use == "predict" else ())))
        assert "learnt from another selection" in result.stderr and "max_boxes was 4, now 36" in result.stderr
        (remark,) = json.loads(result.stdout)["remarks"]
        assert "max_boxes was 4, now 36" in remark
    shutil.rmtree(out)
    out.mkdir()
    same = accepted(run("train", *used_with(use, trained.regions[0], trained, tuned, out), *world.CPU, "--json"))
    assert "selection" not in same.stderr and "remarks" not in json.loads(same.stdout)


def test_one_corpus_has_regions_of_one_detector(trained: Any, tmp_path: Path) -> None:
    (tmp_path / "keys.txt").write_text("scene_000001\nscene_000002\nscene_000003\n")
    for place, name in enumerate(("x", "y")):
        done("db", "split", trained.regions[place], tmp_path / name, "--by", tmp_path / "keys.txt")
    words = ("--text", trained.texts, "--images", tmp_path / "x" / "listed", "--images", tmp_path / "y" / "rest")
    refused(run("train", "pretrain", *words, "--out", tmp_path / "run", "--steps", 1, *world.TINY), "detector")


def test_regions_of_an_unknown_detector_are_said_and_accepted(trained: Any, tmp_path: Path) -> None:
    """Features of .npz files say of no detector that they are another one's."""
    done("db", "convert", trained.regions[0], tmp_path / "npz", "--to", "npz")
    (tmp_path / "npz" / "made_by.json").unlink()  # what others wrote bears none
    done("db", "convert", tmp_path / "npz", tmp_path / "in.lmdb")
    captions = trained.images.parent / "captions_train.json"
    done("build-db", captions, tmp_path / "t.db", "--images", tmp_path / "in.lmdb", "--tokenizer", trained.texts)
    data = ("--text", tmp_path / "t.db", "--images", tmp_path / "in.lmdb")
    words = ("evaluate", "pretrain", "--from", trained.run, *data, "--candidates", 2)
    accepted(run("train", *words, *world.CPU), "unknown|not known|does not say|do not say")
