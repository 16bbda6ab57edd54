"""Claims: who made a folder, from what, and that nothing is destroyed before its successor is whole."""

import errno
import json
import logging
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from uniter.datasets.errors import BadInput, SettingsDiffer, UniterError
from uniter.datasets.storage import claims, contents, files
from uniter.datasets.storage.claims import MADE_FROM, Claim, Maker, claim, content_of
from uniter.datasets.storage.index_file import INDEX, key_columns, save_arrays
from uniter.datasets.storage.locks import file_lock, only_writer

PIES = Maker("pies", "header.json", ("pie.txt", "crumbs", "README.md"))
CAKES = Maker("cakes", "header.json", ("cake.txt",))


def bake(out: Path, source: Path, *, overwrite: bool = False, fail: bool = False, **settings: Any) -> Claim:
    """A command as they all are: a pie of what the source says."""
    begun = claim(out, settings, maker=PIES, sources={"recipe": source}, overwrite=overwrite)
    if not begun.complete:
        if fail:
            begun.abandon()
            raise BadInput("burnt")
        (begun.folder / "crumbs").mkdir(exist_ok=True)
        (begun.folder / "crumbs" / "one").write_text("crumb")
        (begun.folder / "pie.txt").write_text(source.read_text())
        shutil.rmtree(begun.folder / "crumbs")
        files.write_json(begun.folder / "header.json", {})
        begun.publish()
    return begun


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "recipe.txt").write_text("apples")
    return tmp_path / "recipe.txt"


def pie(out: Path) -> str:
    assert (out / "header.json").is_file()
    return (out / "pie.txt").read_text()


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_contents_are_complete_and_others_refused(tmp_path: Path, recipe: Path) -> None:
    out = tmp_path / "out"
    assert not claim(out, {"hot": True}, maker=PIES, sources={"recipe": recipe}).complete
    bake(out, recipe, hot=True)
    before = tree(out)
    assert bake(out, recipe, hot=True).complete and tree(out) == before
    with pytest.raises(SettingsDiffer, match=r"hot was true, now false.*another folder, or --overwrite"):
        bake(out, recipe, hot=False)
    recipe.write_text("pears!")  # as many bytes
    with pytest.raises(SettingsDiffer, match=r"recipe \(recipe.txt\) has other contents now"):
        bake(out, recipe, hot=True)
    with pytest.raises(SettingsDiffer, match="sugar was absent, now there"):
        claim(out, {"hot": True}, maker=PIES, sources={"recipe": recipe, "sugar": recipe})
    assert tree(out) == before and pie(out) == "apples"


def test_what_was_touched_is_read_again_and_what_was_not_is_not(tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[Path] = []
    original = contents.sha256_of
    monkeypatch.setattr(contents, "sha256_of", lambda path: reads.append(path) or original(path))
    out, folder = tmp_path / "out", tmp_path / "folder"
    folder.mkdir()
    (folder / "a.npz").write_text("one")
    (folder / "photo.jpg").write_text("pixels")

    def again() -> int:
        reads.clear()
        claim(out, {}, maker=PIES, sources={"recipe": recipe, "folder": folder})
        return len(reads)

    assert again() == 2  # the recipe and a.npz; of the photograph its size is enough
    assert again() == 0
    before = tree(out)
    for path in (recipe, folder / "a.npz", folder / "photo.jpg"):
        os.utime(path, ns=(1, 1))
    assert again() == 2 and tree(out) == before
    (folder / "a.npz").write_text("two")
    with pytest.raises(SettingsDiffer, match=r"folder .* has other contents"):
        again()
    (folder / "a.npz").write_text("one")
    (folder / "photo.jpg").write_text("more pixels")
    with pytest.raises(SettingsDiffer, match=r"folder .* has other contents"):
        again()


def test_a_database_is_its_index(tmp_path: Path) -> None:
    for name, keys, checksums, offsets in (("a", "xy", [1, 2], [0, 9]), ("b", "xy", [1, 2], [9, 0]), ("c", "xz", [1, 2], [0, 9]),
                                           ("d", "xy", [1, 3], [0, 9])):  # fmt: skip
        (tmp_path / name).mkdir()
        columns = key_columns([key.encode() for key in keys])
        save_arrays(tmp_path / name / INDEX, {**columns, "checksums": np.array(checksums), "offsets": np.array(offsets)})
    digests = {name: content_of(tmp_path / name)["index"] for name in "abcd"}
    assert digests["a"] == digests["b"] and len(set(digests.values())) == 3
    with pytest.raises(BadInput, match="does not exist"):
        content_of(tmp_path / "none")


def test_an_older_folder_is_accepted_said_once_and_stamped(tmp_path: Path, recipe: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "out"
    bake(out, recipe, hot=True)
    settings = json.loads((out / "settings.json").read_text())
    del settings[MADE_FROM], settings["kind"]
    (out / "settings.json").write_text(json.dumps(settings))
    with caplog.at_level(logging.WARNING):
        assert bake(out, recipe, hot=True).complete
        assert [record.getMessage() for record in caplog.records if "unknown" in record.getMessage()]
        caplog.clear()
        assert bake(out, recipe, hot=True).complete
        assert not caplog.records
    recipe.write_text("pears")
    with pytest.raises(SettingsDiffer):
        bake(out, recipe, hot=True)


@pytest.mark.parametrize("older", [False, True])
def test_what_is_complete_on_a_disk_that_can_only_be_read_is_complete(
    tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch, older: bool
) -> None:
    out = tmp_path / "out"
    bake(out, recipe, hot=True)
    if older:
        settings = json.loads((out / "settings.json").read_text())
        del settings[MADE_FROM]
        (out / "settings.json").write_text(json.dumps(settings))

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "unlink", refuse)  # of a name that is not there, too
    monkeypatch.setattr(claims, "write_json", refuse)
    assert bake(out, recipe, hot=True).complete


def test_overwriting_is_done_aside(tmp_path: Path, recipe: Path) -> None:
    out = tmp_path / "out"
    bake(out, recipe)
    (out / "notes.txt").write_text("mine")
    (out / ".hidden").write_text("mine too")
    (out / "mine").mkdir()
    (out / "mine" / "thesis.tex").write_text("work")
    (out / "README.md").write_text("not a card")
    recipe.write_text("pears")
    with pytest.raises(BadInput, match="burnt"):
        bake(out, recipe, overwrite=True, fail=True)
    assert pie(out) == "apples" and not (tmp_path / "out.overwriting").exists()
    begun = claim(out, {}, maker=PIES, sources={"recipe": recipe}, overwrite=True)
    assert begun.folder == tmp_path / "out.overwriting" and pie(out) == "apples"
    with pytest.raises(ValueError, match="not complete"):
        begun.publish()
    bake(out, recipe, overwrite=True)
    assert pie(out) == "pears" and (out / "mine" / "thesis.tex").exists()
    assert [(out / name).read_text() for name in ("notes.txt", ".hidden", "README.md")] == ["mine", "mine too", "not a card"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "recipe.txt"]


def test_a_link_stays_one(tmp_path: Path, recipe: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    bake(tmp_path / "out", recipe)
    recipe.write_text("pears")
    bake(tmp_path / "out", recipe, overwrite=True)
    assert (tmp_path / "out").is_symlink() and pie(tmp_path / "disk") == "pears"


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["pie.txt", "notes.txt", "header.json", "crumbs/one", "settings.json"])
def test_what_others_made_is_refused(tmp_path: Path, recipe: Path, name: str, overwrite: bool) -> None:
    out = tmp_path / "out"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text('{"editor": "vim"}')
    if name == "settings.json":
        (out / "keys.json").write_text("{}")
    before = tree(out)
    with pytest.raises(BadInput, match="that this command did not make"):
        bake(out, recipe, overwrite=overwrite)
    assert tree(out) == before
    with pytest.raises(BadInput, match="is a file"):
        bake(recipe, recipe, overwrite=overwrite)


def test_another_kind_is_refused(tmp_path: Path, recipe: Path) -> None:
    bake(tmp_path / "out", recipe)
    with pytest.raises(BadInput, match="holds pies, not cakes"):
        claim(tmp_path / "out", {}, maker=CAKES, overwrite=True)


def test_a_readme_may_be_there_first(tmp_path: Path, recipe: Path) -> None:
    (tmp_path / "out").mkdir()
    for name in ("README.md", ".gitattributes"):
        (tmp_path / "out" / name).write_text("mine")
    bake(tmp_path / "out", recipe)
    claim(tmp_path / "out", {}, maker=PIES, sources={"recipe": recipe}).abandon()  # of a complete folder nothing
    assert pie(tmp_path / "out") == "apples" and (tmp_path / "out" / "README.md").read_text() == "mine"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_source_is_never_written_over(tmp_path: Path, overwrite: bool) -> None:
    out = tmp_path / "out"
    (out / "inner").mkdir(parents=True)
    for source in (out, out / "inner"):
        with pytest.raises(BadInput, match="is or holds the source"):
            claim(out, {}, maker=PIES, sources={"recipe": source}, overwrite=overwrite)
    assert [path.name for path in out.iterdir()] == ["inner"]


def test_an_out_inside_a_folder_that_is_a_source_does_not_count(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.npz").write_text("one")
    for _ in range(2):
        begun = claim(folder / "out", {}, maker=PIES, sources={"recipe": folder})
        (begun.folder / "pie.txt").write_text("pie")


def in_child(work: Callable[[], None]) -> int:
    """The exit code of a forked process that did this, negative for a signal."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


@pytest.mark.parametrize("instant", range(1, 13))
def test_killed_anywhere_while_folders_are_swapped(tmp_path: Path, recipe: Path, instant: int) -> None:
    """The old or the new one stands, and the same command ends with the new one and nothing beside it."""
    there = tmp_path / "there"
    there.mkdir()
    out = there / "out"
    bake(out, recipe)
    (out / "notes.txt").write_text("mine")
    recipe.write_text("pears")

    def work() -> None:
        seen = 0

        def killing(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
            def step(*words: Any, **named: Any) -> Any:
                nonlocal seen
                seen += 1
                if seen == instant:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*words, **named)

            return step

        original = claims._swap

        def swap(*words: Any) -> None:
            for name in ("touch", "rename", "replace", "unlink", "rmdir"):
                setattr(Path, name, killing(name, getattr(Path, name)))
            original(*words)

        claims._swap = swap  # type: ignore[assignment]
        bake(out, recipe, overwrite=True)

    code = in_child(work)
    assert code in (0, -signal.SIGKILL)
    if out.exists():
        assert pie(out) in ("apples", "pears")
    bake(out, recipe, overwrite=True)
    assert pie(out) == "pears" and (out / "notes.txt").read_text() == "mine"
    assert [path.name for path in there.iterdir()] == ["out"]
    assert (code == 0) == (instant > 10), "the instants do not go through all the steps"


def test_a_killed_swap_is_put_right_without_overwrite_too(tmp_path: Path, recipe: Path) -> None:
    out = tmp_path / "out"
    bake(out, recipe)
    (out / ".replaced").touch()
    out.rename(tmp_path / "out.replaced")
    assert bake(out, recipe).complete and pie(out) == "apples"
    assert not (tmp_path / "out.replaced").exists() and not (out / ".replaced").exists()


def test_somebody_elses_folders_beside_are_left_alone(tmp_path: Path, recipe: Path) -> None:
    """Folders of one's own that happen to be called so."""
    out = tmp_path / "out"
    bake(out, recipe)
    bake(tmp_path / "out.replaced", recipe)
    recipe.write_text("pears")
    with pytest.raises(UniterError, match=r"cannot be replaced .*is whole in"):
        bake(out, recipe, overwrite=True)
    assert pie(out) == pie(tmp_path / "out.replaced") == "apples"
    shutil.rmtree(tmp_path / "out.replaced")
    bake(out, recipe, overwrite=True)
    assert pie(out) == "pears"
    (tmp_path / "out.overwriting").mkdir()
    (tmp_path / "out.overwriting" / "thesis.tex").write_text("work")
    with pytest.raises(BadInput, match="did not make"):
        bake(out, recipe, overwrite=True)
    assert (tmp_path / "out.overwriting" / "thesis.tex").exists()


def test_an_overwrite_that_was_killed_goes_on_or_begins_anew(tmp_path: Path, recipe: Path) -> None:
    out = tmp_path / "out"
    bake(out, recipe, hot=True)
    begun = claim(out, {"hot": False}, maker=PIES, sources={"recipe": recipe}, overwrite=True)
    (begun.folder / "pie.txt").write_text("half")
    assert claim(out, {"hot": False}, maker=PIES, sources={"recipe": recipe}, overwrite=True).folder == begun.folder
    assert (begun.folder / "pie.txt").exists()
    claim(out, {"hot": True}, maker=PIES, sources={"recipe": recipe}, overwrite=True)
    assert not (begun.folder / "pie.txt").exists()
    files.write_json(begun.folder / "header.json", {"whole": True})  # killed before the swap
    assert claim(out, {"hot": True}, maker=PIES, sources={"recipe": recipe}, overwrite=True).folder == out
    assert json.loads((out / "header.json").read_text()) == {"whole": True} and not begun.folder.exists()


def _bake_often(out: Path, recipe: Path, overwrite: bool, failures: Any) -> None:
    for _ in range(20):
        try:
            begun = claim(out, {}, maker=PIES, sources={"recipe": recipe}, overwrite=overwrite)
            with begun.alone("baking"):
                (begun.folder / "pie.txt").write_text(recipe.read_text())
                files.write_json(begun.folder / "header.json", {})
                begun.publish()
        except UniterError as error:
            if "another process" not in str(error):
                failures.put(repr(error))
        except BaseException as error:
            failures.put(repr(error))


@pytest.mark.parametrize("overwrite", [False, True])
def test_two_processes_at_once(tmp_path: Path, recipe: Path, overwrite: bool) -> None:
    """One writes, and what stands in the end is whole."""
    there = tmp_path / "there"
    context = multiprocessing.get_context("fork")
    failures = context.Queue()
    processes = [context.Process(target=_bake_often, args=(there / "out", recipe, overwrite, failures)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert failures.empty(), failures.get()
    bake(there / "out", recipe, overwrite=True)
    assert pie(there / "out") == "apples" and [path.name for path in there.iterdir()] == ["out"]


def test_only_one_writes_in_a_folder(tmp_path: Path) -> None:
    def other() -> None:
        try:
            with only_writer(tmp_path / "out", doing="training"):
                os._exit(0)
        except UniterError as error:
            os._exit(3 if "another process is training" in str(error) else 4)

    with only_writer(tmp_path / "out"):
        assert in_child(other) == 3
        (tmp_path / "out").rename(tmp_path / "moved")
        (tmp_path / "moved").rename(tmp_path / "out")
    assert in_child(other) == 0
    assert not list((tmp_path / "out").iterdir())


def test_a_link_to_a_folder_that_is_not_there_yet_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "out")
    with only_writer(tmp_path / "out"):
        assert (tmp_path / "disk" / "out").is_dir()


def test_a_child_that_outlives_its_parent_does_not_keep_the_folder(tmp_path: Path) -> None:
    """Loading workers are forked, and the parent may be killed."""

    def parent() -> None:
        with only_writer(tmp_path / "out"):
            child = os.fork()
            if child == 0:
                threading.Event().wait(20)
                os._exit(0)
            (tmp_path / "child").write_text(str(child))
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(parent) == -signal.SIGKILL
    with only_writer(tmp_path / "out"):
        pass
    os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)


def test_a_lock_file_that_is_taken_away_keeps_others_out(tmp_path: Path) -> None:
    """Eight processes count to 400 together."""
    (tmp_path / "count").write_text("0")

    def count() -> None:
        for _ in range(50):
            with file_lock(tmp_path / "lock", wait=True, remove=True):
                (tmp_path / "count").write_text(str(int((tmp_path / "count").read_text()) + 1))

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=count) for _ in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert (tmp_path / "count").read_text() == "400" and not (tmp_path / "lock").exists()
