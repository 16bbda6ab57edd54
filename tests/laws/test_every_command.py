"""Every command by every law of the folders it writes: a table, of which other files hold the cells that are marked so.

    same       the same command again, of the same contents: nothing is done, and it is said
    other      the same command again, of other contents or settings: refused in words, nothing is touched
    killed     killed at any change of a file and given again: what an unbroken command makes, and nothing beside it
    fails      under --overwrite, or over an earlier result, a command that fails leaves what was there
    inside     a source inside OUT: refused, and the source is whole
    foreign    somebody else's folder or file at OUT: refused, or written beside; what was there stays

Commands and files only. Training and extraction are killed in `test_sigkill.py`, and in the tests beside their code.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import identity_world as world
import pytest

accepted, done, refused, run, tree = world.accepted, world.done, world.refused, world.run, world.tree
Words = tuple[object, ...]
Row = Callable[[Path, Path, int, Any], Words]
LAWS = ("same", "other", "killed", "fails", "inside", "foreign")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return world.trained(tmp_path_factory.getbasetemp())


# ------------------------------------------------------------------------------------------------------------------- the commands

# A row makes its sources in `folder` and gives the command that writes `out`. Version 1 differs from version 0 in the contents of the
# sources, where there are any, and not in their names; else in a setting.


def convert(folder: Path, out: Path, version: int, trained: Any) -> Words:
    return ("db", "convert", world.npz_folder(folder / "npz", "abcdef", seed=version), out)


def convert_to_npz(folder: Path, out: Path, version: int, trained: Any) -> Words:
    source = world.region_database(folder / "in.lmdb", "abcd", seed=version, again=version > 0)
    return ("db", "convert", source, out, "--to", "npz")


def convert_texts(folder: Path, out: Path, version: int, trained: Any) -> Words:
    source = folder / "in.db"
    done(*build_db(folder, source, version, trained), *(("--overwrite",) if version else ()))
    return ("db", "convert", source, out, "--to", "uniter")


def merge(folder: Path, out: Path, version: int, trained: Any) -> Words:
    both = [world.region_database(folder / name, keys, seed=version, again=version > 0) for name, keys in (("x", "abc"), ("y", "de"))]
    return ("db", "merge", *both, out)


def split(folder: Path, out: Path, version: int, trained: Any) -> Words:
    return ("db", "split", world.region_database(folder / "in.lmdb", "abcd", seed=version, again=version > 0), out, "--by", 2)


def repair(folder: Path, out: Path, version: int, trained: Any) -> Words:
    return ("db", "check", world.region_database(folder / "in.lmdb", "abcd", seed=version, again=version > 0), "--repair", out)


def build_db(folder: Path, out: Path, version: int, trained: Any) -> Words:
    captions = world.captions_file(folder / "captions.jsonl", ["a.jpg", "b.jpg"], text=world.WORDS[1 + version])
    return ("build-db", captions, out, "--tokenizer", world.vocabulary_file(folder / "vocab.txt"))


def scenes(folder: Path, out: Path, version: int, trained: Any) -> Words:
    return ("scenes", out, "--images", 3, "--held-out", 1, "--seed", version)


def tasks(folder: Path, out: Path, version: int, trained: Any) -> Words:
    return (*scenes(folder, out, version, trained), "--tasks")


def view(folder: Path, out: Path, version: int, trained: Any) -> Words:
    return ("view", world.region_database(folder / "in.lmdb", "ab", seed=version, again=version > 0), "--out", out)


def detector(folder: Path, out: Path, version: int, trained: Any) -> Words:
    words = ("--images", trained.images, "--annotations", trained.instances, "--out", out, "--seed", version)
    return ("train", "detector", *words, "--steps", 1, "--batch-size", 1, "--no-attributes", *world.CPU)


def extract(folder: Path, out: Path, version: int, trained: Any) -> Words:
    words = ("--detector", trained.detectors[version], *world.DETECT)
    return ("extract", world.photographs(folder / "photos", "ab"), out, *words)


def pretrain(folder: Path, out: Path, version: int, trained: Any) -> Words:
    data = ("--text", trained.texts, "--images", trained.regions[0], "--seed", version)
    return ("train", "pretrain", *data, "--out", out, "--steps", 1, *world.TINY)


def finetune(folder: Path, out: Path, version: int, trained: Any) -> Words:
    data = ("--text", trained.texts, "--images", trained.regions[0], "--seed", version)
    small = ("--steps", 1, "--set", "tensorboard=false", "--set", "batch_tokens=200", *world.CPU)
    return ("train", "finetune", "retrieval", "--from", trained.run, *data, "--out", out, *small)


def export(folder: Path, out: Path, version: int, trained: Any) -> Words:
    source = folder / "run"
    if version:
        shutil.rmtree(source)
        world.pretrain(source, "--seed", 1, text=trained.texts, images=trained.regions[0])
    elif not source.exists():
        shutil.copytree(trained.run, source, symlinks=True)
    return ("train", "export", "--from", source, "--to", "hub", out)


def scores(folder: Path, out: Path, version: int, trained: Any) -> Words:
    data = ("--text", trained.texts, "--images", trained.regions[0])
    return ("train", "evaluate", "retrieval", "--from", trained.run, *data, "--scores", out, *world.CPU)


def build_classify(folder: Path, out: Path, version: int, trained: Any) -> Words:
    labels = ("cat", "dog", "cat" if version else "dog")
    rows = "".join(f"{name}.jpg,what it shows,{label}\n" for name, label in zip("abc", labels, strict=True))
    (folder / "labels.csv").write_text(f"image,text,label\n{rows}")
    return ("build-db", folder / "labels.csv", out, "--task", "classify", "--tokenizer", world.vocabulary_file(folder / "vocab.txt"))


def build_gqa(folder: Path, out: Path, version: int, trained: Any) -> Words:
    questions = {
        f"{number}": {"question": "on the grass", "imageId": name, "answer": ("red", "blue")[number % 2 ^ version], "isBalanced": True}
        for number, name in enumerate("abc")
    }
    (folder / "train_balanced_questions.json").write_text(json.dumps(questions))
    words = ("--task", "gqa", "--tokenizer", world.vocabulary_file(folder / "vocab.txt"))
    return ("build-db", folder / "train_balanced_questions.json", out, *words)


def build_entities(folder: Path, out: Path, version: int, trained: Any) -> Words:
    for name in ("Sentences", "Annotations"):
        (folder / name).mkdir(exist_ok=True)
    (folder / "train.txt").write_text("1\n")
    (folder / "Sentences" / "1.txt").write_text(f"[/EN#101/other a {world.WORDS[1 + version]} cat] on [/EN#0/notvisual the grass] .\n")
    box = "<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
    size = "<size><width>20</width><height>20</height><depth>3</depth></size>"
    words = f"<annotation><filename>1.jpg</filename>{size}<object><name>101</name>{box}</object></annotation>"
    (folder / "Annotations" / "1.xml").write_text(words)
    task = ("--task", "flickr30k-entities", "--tokenizer", world.vocabulary_file(folder / "vocab.txt"))
    return ("build-db", folder / "train.txt", out, *task)


def labelled_texts(folder: Path, trained: Any) -> Path:
    """A table of labels of the trained run's pictures, as texts."""
    if not (folder / "labelled.db").exists():
        rows = "".join(f"scene_{number:06d}.jpg,a red circle,{label}\n" for number, label in enumerate(("cat", "dog", "cat"), start=1))
        (folder / "labelled.csv").write_text(f"image,text,label\n{rows}")
        words = ("--task", "classify", "--tokenizer", trained.texts, "--images", trained.regions[0])
        done("build-db", folder / "labelled.csv", folder / "labelled.db", *words)
    return folder / "labelled.db"


def finetune_classify(folder: Path, out: Path, version: int, trained: Any) -> Words:
    data = ("--text", labelled_texts(folder, trained), "--images", trained.regions[0], "--seed", version)
    small = ("--steps", 1, "--set", "tensorboard=false", "--set", "batch_tokens=200", *world.CPU)
    return ("train", "finetune", "classify", "--from", trained.run, *data, "--out", out, *small)


def finetune_by_recipe(folder: Path, out: Path, version: int, trained: Any) -> Words:
    data = ("--config", "retrieval-flickr-base", "--text", trained.texts, "--images", trained.regions[0], "--seed", version)
    small = ("--steps", 1, "--set", "tensorboard=false", "--set", "batch_tokens=200", "--set", "optimizer.warmup_steps=0", *world.CPU)
    return ("train", "finetune", "retrieval", "--from", trained.run, *data, "--out", out, *small)


ROWS: dict[str, Row] = {
    "build-db classify": build_classify,
    "build-db gqa": build_gqa,
    "build-db flickr30k-entities": build_entities,
    "finetune classify": finetune_classify,
    "finetune --config": finetune_by_recipe,
    "convert": convert,
    "convert --to npz": convert_to_npz,
    "convert texts": convert_texts,
    "merge": merge,
    "split": split,
    "check --repair": repair,
    "build-db": build_db,
    "scenes": scenes,
    "scenes --tasks": tasks,
    "view": view,
    "detector": detector,
    "extract": extract,
    "pretrain": pretrain,
    "finetune": finetune,
    "export": export,
    "evaluate --scores": scores,
}

ELSEWHERE = {
    **{(name, "same"): "test_identity" for name in ("convert", "merge", "split", "build-db")},
    **{(name, "other"): "test_identity" for name in ("convert", "merge", "split", "build-db", "evaluate --scores")},
    **{(name, "fails"): "test_nothing_destroyed" for name in ("convert", "merge", "split", "check --repair", "build-db")},
    **{(name, "fails"): "test_nothing_destroyed" for name in ("extract", "detector")},
    **{(name, "inside"): "test_nothing_destroyed" for name in ("convert", "merge", "split", "check --repair")},
    **{(name, "foreign"): "test_nothing_destroyed" for name in ("convert", "merge", "split", "check --repair", "build-db")},
    **{(name, "foreign"): "test_nothing_destroyed" for name in ("extract", "detector", "scenes", "pretrain", "export")},
    **{(name, "killed"): "test_sigkill" for name in ("convert", "merge", "build-db", "extract", "detector", "pretrain", "finetune")},
}
"""Cells that other files hold."""

MEANINGLESS = {
    ("view", "same"): "a report is drawn again, whatever it shows",
    ("view", "other"): "a report is drawn again, whatever it shows",
    ("scenes", "fails"): "nothing of it can fail but the disk",
    ("scenes --tasks", "fails"): "nothing of it can fail but the disk",
    ("scenes", "inside"): "it has no source",
    ("scenes --tasks", "inside"): "it has no source",
    ("scenes --tasks", "foreign"): "as of scenes",
    ("evaluate --scores", "killed"): "it scores again, in a second",
    ("evaluate --scores", "inside"): "its two files lie beside others, which stay: see foreign",
    ("export", "fails"): "there is no --overwrite, and what is there is refused",
    ("pretrain", "fails"): "there is no --overwrite",
    ("finetune", "fails"): "there is no --overwrite",
    **{(name, "fails"): "there is no --overwrite" for name in ("finetune classify", "finetune --config")},
    **{(name, law): "as of finetune" for name in ("finetune classify", "finetune --config") for law in ("killed", "inside")},
    ("evaluate --scores", "fails"): "there is no --overwrite",
    ("convert --to npz", "killed"): "as of convert",
}


def cells(law: str) -> list[str]:
    """The rows for which this file holds the law."""
    return [name for name in ROWS if (name, law) not in ELSEWHERE and (name, law) not in MEANINGLESS]


def test_every_cell_is_held_somewhere() -> None:
    named = {*ELSEWHERE, *MEANINGLESS}
    assert {name for name, _ in named} <= set(ROWS) and {law for _, law in named} <= set(LAWS)
    assert not set(ELSEWHERE) & set(MEANINGLESS)
    for cell, file in ELSEWHERE.items():
        assert (Path(__file__).with_name(f"{file}.py")).is_file(), cell


def held(out: Path) -> Mapping[str, Any]:
    """What a folder holds for whoever uses it; times and places of the sources, which settings.json remembers, are no part of it."""
    found = {name: content for name, content in tree(out).items() if not name.endswith("lock.mdb")}
    place = str(out.parent).encode()
    found = {name: content.replace(place, b"...") if isinstance(content, bytes) else content for name, content in found.items()}
    for name, content in found.items():
        if name.endswith(("settings.json", "header.json")) and isinstance(content, bytes):
            settings = json.loads(content)
            for source in (settings.get("made_from") or {}).values():
                source.pop("modified", None)
            settings.pop("begun", None)
            found[name] = json.dumps(settings)
        elif name.endswith("data.mdb"):  # LMDB's pages depend on how often it was begun
            folder = out / Path(name).parent
            found[name] = repr(sorted((world.texts if (folder / "txt2img.json").is_file() else world.records)(folder).items()))
        elif name.endswith("index.safetensors"):  # where the records lie in data.mdb
            found[name] = "an index"
    return found


# ---------------------------------------------------------------------------------------------------------------------- the laws


@pytest.mark.parametrize("name", cells("same"))
def test_the_same_command_again_does_nothing_and_says_so(name: str, tmp_path: Path, trained: Any) -> None:
    out = tmp_path / "out"
    words = ROWS[name](tmp_path, out, 0, trained)
    done(*words)
    before = tree(out)
    accepted(run(*words), "already|nothing|kept")
    assert not world.differences(before, tree(out))


@pytest.mark.parametrize("name", cells("other"))
def test_other_contents_or_settings_are_refused(name: str, tmp_path: Path, trained: Any) -> None:
    out = tmp_path / "out"
    done(*ROWS[name](tmp_path, out, 0, trained))
    before = tree(out)
    refused(run(*ROWS[name](tmp_path, out, 1, trained)), "differ|other|chang|was |exists", "overwrite|another|remove|new|--out")
    assert not world.differences(before, tree(out))


@pytest.mark.parametrize("name", cells("killed"))
def test_what_was_killed_ends_as_unbroken(name: str, tmp_path: Path, trained: Any) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    done(*ROWS[name](whole, whole / "out", 0, trained))
    broken.mkdir()
    words = ROWS[name](broken, broken / "out", 0, trained)
    beside = set(broken.iterdir())
    for instant in (2, 12):
        world.killed(broken, instant, *words)
    accepted(run(*words))
    assert set(broken.iterdir()) == {*beside, broken / "out"}, "what was begun is left behind"
    assert held(broken / "out") == held(whole / "out")


def view_of_a_damaged_database(folder: Path, out: Path, trained: Any) -> Words:
    (folder / "in.lmdb" / "data.mdb").write_bytes(b"damaged")
    return ("view", folder / "in.lmdb", "--out", out)


def build_of_damaged(name: str) -> Callable[[Path, Path, Any], Words]:
    """A text database begun anew from a file that is cut off."""

    def words(folder: Path, out: Path, trained: Any) -> Words:
        again = ROWS[name](folder, out, 0, trained)
        damaged = folder / "Sentences" / "1.txt" if name.endswith("entities") else Path(str(again[1]))
        damaged.write_text("[/EN#101/other a cat" if name.endswith("entities") else "{")
        return (*again, "--overwrite")

    return words


def conversion_of_nothing(folder: Path, out: Path, trained: Any) -> Words:
    (folder / "in.lmdb" / "data.mdb").write_bytes(b"damaged")
    return ("db", "convert", folder / "in.lmdb", out, "--to", "npz", "--overwrite")


def conversion_of_damaged_texts(folder: Path, out: Path, trained: Any) -> Words:
    (folder / "in.db" / "data.mdb").write_bytes(b"damaged")
    return ("db", "convert", folder / "in.db", out, "--to", "uniter", "--overwrite")


FAILING: dict[str, Callable[[Path, Path, Any], Words]] = {
    "view": view_of_a_damaged_database,
    "convert --to npz": conversion_of_nothing,
    "convert texts": conversion_of_damaged_texts,
    **{name: build_of_damaged(name) for name in ROWS if name.startswith("build-db ")},
}


@pytest.mark.parametrize("name", cells("fails"))
def test_what_fails_leaves_what_was_there(name: str, tmp_path: Path, trained: Any) -> None:
    out = tmp_path / "out"
    done(*ROWS[name](tmp_path, out, 0, trained))
    before, beside = tree(out), set(tmp_path.iterdir())
    refused(run(*FAILING[name](tmp_path, out, trained)))
    assert not world.differences(before, tree(out))
    assert set(tmp_path.iterdir()) == beside


def inside(name: str, folder: Path, trained: Any) -> tuple[Path, Words]:
    """A folder that holds the source of a command, and the command that would write to that folder."""
    if name in ("convert --to npz", "convert texts", "view", "export") or name.startswith("build-db"):
        (folder / "sources").mkdir()
        return folder / "sources", ROWS[name](folder / "sources", folder / "sources", 0, trained)
    if name == "extract":
        return folder / "photos", extract(folder, folder / "photos", 0, trained)
    made, copied = trained.images.parent.parent, folder / "world"
    shutil.copytree(made, copied, symlinks=True)
    words = ROWS[name](folder, copied, 0, trained)
    return copied, tuple(copied / Path(str(word)).relative_to(made) if Path(str(word)).is_relative_to(made) else word for word in words)


WITH_OVERWRITE = {"convert --to npz", "convert texts", "extract", "detector", *(name for name in ROWS if name.startswith("build-db"))}


@pytest.mark.parametrize("name", cells("inside"))
def test_a_source_inside_out_is_refused(name: str, tmp_path: Path, trained: Any) -> None:
    folder, words = inside(name, tmp_path, trained)
    before = tree(folder)
    for more in ((), ("--overwrite",)) if name in WITH_OVERWRITE else ((),):
        result = run(*words, *more)
        assert not world.differences(before, tree(folder))
        refused(result)


@pytest.mark.parametrize("name", cells("foreign"))
def test_what_somebody_else_made_stays(name: str, tmp_path: Path, trained: Any) -> None:
    out = tmp_path / "out"
    for file in ("config.yaml", "log.jsonl", "index.html", "pictures/mine.jpg", "checkpoints/mine.pt", "a.npz", "scores.npy"):
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        (out / file).write_text("somebody's work\n")
    before = tree(out)
    result = run(*ROWS[name](tmp_path, out, 0, trained))
    assert result.exit_code in (0, 1) and "Traceback" not in result.output
    after = tree(out)
    assert {file: after.get(file) for file in before} == before


# ------------------------------------------------------------------------------------------------------------------- predictions


@pytest.fixture(scope="module")
def classifying(trained: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Words]:
    """A folder with a run that gives labels and its texts, and the command that predicts with it, without its --out."""
    folder = tmp_path_factory.mktemp("classifying")
    done(*finetune_classify(folder, folder / "run", 0, trained))
    words = ("train", "predict", "classify", "--from", folder / "run", "--text", folder / "labelled.db", "--images", trained.regions[0])
    return folder, (*words, *world.CPU)


def test_predictions_replace_only_what_they_are_told_to(classifying: tuple[Path, Words], tmp_path: Path) -> None:
    """Somebody's file stays, and one of ours until the next is whole."""
    folder, words = classifying
    out = tmp_path / "said.csv"
    out.write_text("somebody's work\n")
    refused(run(*words, "--out", out), "already", "--overwrite")
    assert out.read_text() == "somebody's work\n"
    done(*words, "--out", out, "--overwrite")
    said = out.read_text()
    refused(run(*words, "--out", out), "already")
    broken = tuple(tmp_path / "gone" if word == folder / "labelled.db" else word for word in words)
    refused(run(*broken, "--out", out, "--overwrite"))
    assert out.read_text() == said and [path.name for path in tmp_path.iterdir()] == ["said.csv"]
    done(*words, "--out", out, "--overwrite")
    assert out.read_text() == said


@pytest.mark.parametrize("place", ["labelled.db/labels.json", "labelled.db/said.csv", "run/config.yaml"])
def test_predictions_are_not_written_into_their_sources(place: str, classifying: tuple[Path, Words]) -> None:
    folder, words = classifying
    before = tree(folder)
    for more in ((), ("--overwrite",)):
        refused(run(*words, "--out", folder / place, *more), "choose another")
        assert not world.differences(before, tree(folder))


@pytest.mark.parametrize("what", ["evaluate", "predict"])
def test_a_source_that_is_gone_is_named(what: str, classifying: tuple[Path, Words], tmp_path: Path) -> None:
    folder, words = classifying
    words = ("train", what, *words[2:], *(("--out", tmp_path / "said.csv") if what == "predict" else ()))
    for gone in (folder / "run", folder / "labelled.db"):
        refused(run(*(tmp_path / "gone" if word == gone else word for word in words)), "gone")
    assert not any(tmp_path.iterdir())
