"""All parts of a splitting are replaced together, or none: killed before any change of the files, and repeated.

`UNITER_KILLS` of 100 kills before each single change; by default a few of them are taken, most from the time when parts are swapped.
"""

import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from uniter.cli.build_db import main as build_db
from uniter.datasets.errors import BadInput, SettingsDiffer
from uniter.datasets.image_db import ImageDB
from uniter.datasets.image_db.parts import PARTS
from uniter.datasets.image_db.records import encode_record
from uniter.datasets.image_db.regions import RegionFeatures
from uniter.datasets.maintenance.check import check_database
from uniter.datasets.maintenance.copying import write_regions
from uniter.datasets.maintenance.describe import describe
from uniter.datasets.maintenance.merge import merge
from uniter.datasets.maintenance.split import split
from uniter.datasets.storage.claims import put_in_place
from uniter.datasets.text_db import TextDB

CHANGES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link"}


def regions(folder: Path, seed: int, count: int = 4) -> Path:
    """A region database of ours."""
    box = np.array([[0, 0, 1, 1, 1, 1]], dtype=np.float32)
    records = []
    for number in range(count):
        one = RegionFeatures(features=np.full((1, 2), seed, np.float32), norm_bb=box, conf=np.ones((1,), np.float32))
        records.append((f"{number}", encode_record(one, key=f"{number}"), 1))
    header = {"feature_width": 2, "label_classes": 0}
    write_regions(folder, records, settings={"seed": seed}, sources={}, header=lambda: header)
    return folder


def seeds(out: Path) -> set[int]:
    database = ImageDB(out)
    assert len(database) == 4
    return {int(database[key].features[0, 0]) for key in database}


def in_child(work: Callable[[], Any], watched: Path, instant: int) -> tuple[int, int]:
    """Fork, and kill before change number `instant` at `watched`.

    Returns:
        How many changes there were, and which was the first of the swap; -1 twice where it was killed.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        seen = swap = 0

        def watch(event: str, values: tuple[Any, ...]) -> None:
            nonlocal seen, swap
            if event in CHANGES and values and isinstance(values[0], str | bytes | os.PathLike):
                if event == "open" and not (values[2] or 0) & (os.O_WRONLY | os.O_RDWR):
                    return
                if os.fsdecode(values[0]).startswith(str(watched)):
                    seen += 1
                    if PARTS in os.fsdecode(values[0]):
                        swap = swap or seen
                    if seen == instant:
                        os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        work()
        os.write(writing, f"{seen} {swap}".encode())
        os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    told = os.read(reading, 40)
    os.close(reading)
    count, first = (told or b"-1 -1").split()
    return int(count), int(first)


@pytest.mark.parametrize("rest_is_new", [False, True])
def test_killed_at_each_step(rest_is_new: bool, tmp_path: Path) -> None:
    """Old or new, or refused by readers; repeated, it is new; and what is not ours stays."""
    first, second = regions(tmp_path / "first", 1), regions(tmp_path / "second", 2)
    listed = tmp_path / "list.txt"
    listed.write_text("".join(f"{number}\n" for number in range(4)))
    split(first, tmp_path / "old", by=str(listed) if rest_is_new else "2")
    for place in (tmp_path / "old", next(tmp_path.glob("old/*/header.json")).parent):
        (place / "notes.txt").write_text("mine")
    listed.write_text("0\n1\n")
    by = str(listed) if rest_is_new else "2"
    out = tmp_path / "out"

    def work() -> None:
        split(second, out, by=by, overwrite=True)

    shutil.copytree(tmp_path / "old", out)
    changes, swap = in_child(work, out, 0)
    assert changes > swap > 20 and seeds(out) == {2}
    states, dice = set(), random.Random(0)
    before, swapping = range(1, swap), range(swap, changes + 1)
    few = [*dice.sample(before, 2), swap, *dice.sample(swapping, 9), changes]
    for instant in [*before, *swapping] if int(os.environ.get("UNITER_KILLS", "4")) >= 100 else sorted(set(few)):
        shutil.rmtree(out)
        shutil.copytree(tmp_path / "old", out)
        assert in_child(work, out, instant) == (-1, -1)
        state = "old"
        try:
            found = seeds(out)
            assert found in ({1}, {2}), instant
            state = "new" if found == {2} else "old"
        except BadInput as error:
            assert "do not fit together" in str(error), instant
            assert describe(out)["complete"] is False and "do not fit together" in describe(out)["error"]
            assert check_database(out).problems["parts"] == 1
            state = "said"
        states.add(state)
        work()
        assert seeds(out) == {2}, instant
        assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "list.txt", "old", "out", "second"], instant
        assert [path.read_text() for path in out.rglob("notes.txt")] == ["mine", "mine"], instant
        assert not (out / PARTS).exists()
    assert states >= {"old", "said"}


def test_a_swap_that_was_killed_is_completed_by_any_splitting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And where it was this one, it is not done again."""
    first, second, third = (regions(tmp_path / str(seed), seed) for seed in (1, 2, 3))
    out = tmp_path / "out"

    def killed() -> None:
        split(first, out, by="2")
        with monkeypatch.context() as patch:
            seen: list[Path] = []

            def put(place: Path, *_: Any) -> None:
                seen.append(place)
                if len(seen) == 2:
                    raise KeyboardInterrupt
                put_in_place(place, *_)

            patch.setattr("uniter.datasets.maintenance.split.put_in_place", put)
            with pytest.raises(KeyboardInterrupt):
                split(second, out, by="2", overwrite=True)
        with pytest.raises(BadInput, match="do not fit together"):
            ImageDB(out)
        with pytest.raises(BadInput, match="do not fit together"):
            split(out, tmp_path / "again", by="2")

    killed()
    assert split(second, out, by="2", overwrite=True)["already_complete"] is True
    assert seeds(out) == {2}
    shutil.rmtree(out)
    killed()
    with pytest.raises(SettingsDiffer):
        split(third, out, by="2")
    assert seeds(out) == {2}
    shutil.rmtree(out)
    killed()
    assert split(third, out, by="2", overwrite=True)["already_complete"] is False
    assert seeds(out) == {3}


def test_a_splitting_that_was_never_finished_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One part of two reads as half a database: it is refused, and `info` says that it is not complete."""
    source, out = regions(tmp_path / "in", 1), tmp_path / "out"

    def stop(out: Path, *arguments: Any, **more: Any) -> Any:
        if out.name == "part-1":
            raise KeyboardInterrupt
        return write_regions(out, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr("uniter.datasets.maintenance.split.write_regions", stop)
        with pytest.raises(KeyboardInterrupt):
            split(source, out, by="2")
    with pytest.raises(BadInput, match="not all of its databases are there yet"):
        ImageDB(out)
    assert len(ImageDB(out, allow_partial=True)) == 2
    assert describe(out)["complete"] is False and "error" not in describe(out)
    assert any("not all of its databases" in note for note in check_database(out).notes)
    split(source, out, by="2")
    assert seeds(out) == {1} and describe(out)["complete"] is True


def test_databases_that_lack_something_of_other_numbers_of_images_are_merged(tmp_path: Path) -> None:
    """What was converted from a layout without sizes says of how many images they are not known."""
    parts = tmp_path / "parts"
    split(regions(tmp_path / "in", 1), parts, by="2")
    for count, folder in enumerate(sorted(parts.iterdir()), start=3):
        header = json.loads((folder / "header.json").read_text())
        (folder / "header.json").write_text(json.dumps({**header, "lacks": f"positions (of {count} images, whose sizes are not known)"}))
    merge(sorted(parts.iterdir()), tmp_path / "whole")
    header = json.loads((tmp_path / "whole" / "header.json").read_text())
    assert header["lacks"] == "positions (of some images, whose sizes are not known)"


@pytest.mark.parametrize("overwrite", [False, True])
def test_links_in_the_places_of_parts_are_refused_and_stay(tmp_path: Path, overwrite: bool) -> None:
    first, out, real = regions(tmp_path / "first", 1), tmp_path / "out", tmp_path / "real"
    real.mkdir()
    out.mkdir()
    (out / "part-1").symlink_to(real)
    with pytest.raises(BadInput, match="part-1 is a link"):
        split(first, out, by="2", overwrite=overwrite)
    assert [path.name for path in out.iterdir()] == ["part-1"] and (out / "part-1").is_symlink()
    assert not any(real.iterdir()) and not (tmp_path / "out.overwriting").exists()


def test_refused_and_failing_leaves_what_was_there(tmp_path: Path) -> None:
    first, second = regions(tmp_path / "first", 1), regions(tmp_path / "second", 2, count=5)
    out = tmp_path / "out"
    split(first, out, by="2")
    with pytest.raises(SettingsDiffer):
        split(second, out, by="2")
    assert seeds(out) == {1}
    somebody = tmp_path / "somebody"
    (somebody / "part-1").mkdir(parents=True)
    (somebody / "part-1" / "thesis.tex").write_text("mine")
    with pytest.raises(BadInput, match=r"thesis\.tex"):
        split(first, somebody, by="2", overwrite=True)
    assert [path.name for path in somebody.rglob("*") if path.is_file()] == ["thesis.tex"]
    listed = out / "part-0" / "list.txt"
    listed.write_text("0\tpart-0\n1\tpart-1\n2\tpart-1\n3\tpart-1\n")
    with pytest.raises(BadInput, match="would be written over"):
        split(first, out, by=str(listed), overwrite=True)


@pytest.mark.parametrize("layout", ["ours", "published"])
def test_texts_are_replaced_together_too(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def texts(name: str, word: str) -> Path:
        rows = [{"image": f"{number}.jpg", "caption": f"a {word} {number}"} for number in range(4)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        result = CliRunner().invoke(build_db, [str(tmp_path / f"{name}.jsonl"), str(tmp_path / name)])
        assert result.exit_code == 0, result.output
        if layout == "published":
            for file in ("settings.json", "header.json", "index.safetensors"):
                (tmp_path / name / file).unlink()
        return tmp_path / name

    first, second, out = texts("first", "cat"), texts("second", "dog"), tmp_path / "out"
    split(first, out, by="2")
    with monkeypatch.context() as patch:
        seen: list[Path] = []

        def put(place: Path, *more: Any) -> None:
            seen.append(place)
            if len(seen) == 2:
                raise KeyboardInterrupt
            put_in_place(place, *more)

        patch.setattr("uniter.datasets.maintenance.split.put_in_place", put)
        with pytest.raises(KeyboardInterrupt):
            split(second, out, by="2", overwrite=True)
    assert (out / PARTS).exists()
    assert split(second, out, by="2", overwrite=True)["already_complete"] is True
    wanted = {tuple(TextDB(second)[one]["input_ids"]) for one in TextDB(second).ids}
    parts = [TextDB(out / name) for name in ("part-0", "part-1")]
    assert {tuple(part[one]["input_ids"]) for part in parts for one in part.ids} == wanted
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("out")) == ["out"]
