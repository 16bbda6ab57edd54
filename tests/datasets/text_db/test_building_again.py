"""The same command again: by content, not by name; what an older version knew; images that share a key; vocabularies from the hub."""

import io
import json
import logging
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from uniter.cli.build_db import main
from uniter.datasets.errors import BadInput
from uniter.datasets.storage.claims import content_of
from uniter.datasets.text_db import TextDB
from uniter.datasets.text_db.building.build import build_text_db
from uniter.datasets.text_db.caption import Caption
from uniter.datasets.text_db.tokenizer import Tokenizer


def build(*words: Any) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def captions_file(path: Path, *texts: str) -> Path:
    path.write_text("".join(f"{json.dumps({'image': f'{place}.jpg', 'caption': text})}\n" for place, text in enumerate(texts)))
    return path


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def as_an_older_version_wrote(folder: Path, captions: Path) -> None:
    """settings.json of the first versions: fingerprints of the sources among the settings, nothing by content."""
    content = content_of(captions)
    settings = json.loads((folder / "settings.json").read_text())
    del settings["made_from"]
    settings |= {"source": [{"bytes": content["bytes"], "sha256": content["sha256"]}], "join": [], "images": []}
    (folder / "settings.json").write_text(json.dumps(settings))


# ---------------------------------------------------------------------------------------------------------------- the same command


def test_the_same_captions_and_vocabulary_by_other_names_are_the_same(tmp_path: Path) -> None:
    captions, out = captions_file(tmp_path / "captions.jsonl", "a red cat"), tmp_path / "out.db"
    vocabulary = tmp_path / "vocab.txt"
    Tokenizer.load().write_vocabulary(vocabulary)
    assert build(captions, out, "--tokenizer", vocabulary).exit_code == 0
    before = files_of(out)
    shutil.move(captions, tmp_path / "moved.jsonl")
    shutil.move(vocabulary, tmp_path / "moved.txt")
    again = build(tmp_path / "moved.jsonl", out, "--tokenizer", tmp_path / "moved.txt")
    assert again.exit_code == 0 and "Already complete" in again.output and files_of(out) == before
    Tokenizer.learn(["a red cat"], size=90).write_vocabulary(tmp_path / "moved.txt")
    other = build(tmp_path / "moved.jsonl", out, "--tokenizer", tmp_path / "moved.txt")
    assert other.exit_code == 1 and "has other contents now" in other.stderr and files_of(out) == before


def test_lists_of_exclusions_count_by_content(tmp_path: Path) -> None:
    captions, out = captions_file(tmp_path / "captions.jsonl", "a red cat", "a dog"), tmp_path / "out.db"
    for name, content in (("one", "0.jpg\n"), ("same", "0.jpg\n"), ("other", "1.jpg\n")):
        (tmp_path / f"{name}.txt").write_text(content)
    assert build(captions, out, "--exclude", tmp_path / "one.txt").exit_code == 0
    assert "Already complete" in build(captions, out, "--exclude", tmp_path / "same.txt").output
    other = build(captions, out, "--exclude", tmp_path / "other.txt")
    assert other.exit_code == 1 and "exclude (other.txt) has other contents now" in other.stderr
    without = build(captions, out)
    assert without.exit_code == 1 and "exclude was there, now absent" in without.stderr


def test_lists_replace_nothing_but_lists(tmp_path: Path) -> None:
    """Neither what they are made from, nor somebody's file."""
    photos, thesis = tmp_path / "train.txt", tmp_path / "thesis.json"
    photos.write_text("12345\n")
    thesis.write_text('{"chapter": 1}')
    for out, said in (
        (photos, "is one of the files that the lists are made from"),
        (thesis, "holds no lists of `uniter-build-db exclude`"),
    ):
        before = out.read_text()
        refused = build("exclude", photos, "--out", out)
        assert refused.exit_code == 1 and said in refused.stderr and out.read_text() == before
    for _ in range(2):
        assert build("exclude", photos, "--out", tmp_path / "excluded.json").exit_code == 0


def test_tars_are_told_apart_by_name_and_size(tmp_path: Path) -> None:
    def shard(*texts: str) -> Path:
        with tarfile.open(tmp_path / "0.tar", "w") as tar:
            for place, text in enumerate(texts):
                for name, content in ((f"{place}.jpg", b"x"), (f"{place}.txt", text.encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        return tmp_path / "0.tar"

    assert build(shard("a cat"), tmp_path / "out.db").exit_code == 0
    assert "Already complete" in build(shard("a cat"), tmp_path / "out.db").output
    grown = build(shard("a cat", *["a dog"] * 20), tmp_path / "out.db")
    assert grown.exit_code == 1 and "captions (0.tar) has other contents now" in grown.stderr and "--overwrite" in grown.stderr
    assert build(tmp_path / "0.tar", tmp_path / "out.db", "--overwrite").exit_code == 0
    assert len(TextDB(tmp_path / "out.db")) == 21


def test_an_older_database_is_known_by_what_it_knew(tmp_path: Path) -> None:
    captions, out = captions_file(tmp_path / "captions.jsonl", "a red cat"), tmp_path / "out.db"
    assert build(captions, out).exit_code == 0
    as_an_older_version_wrote(out, captions)
    before = files_of(out)
    for words in ((captions_file(tmp_path / "other.jsonl", "a red dog"), out), (captions, out, "--split", "train")):
        refused = build(*words)
        assert refused.exit_code == 1 and "begun with other settings" in refused.stderr and "--overwrite" in refused.stderr
        assert files_of(out) == before
    first, second = build(captions, out), build(captions, out)
    assert first.exit_code == second.exit_code == 0 and "Already complete" in first.output
    assert json.loads((out / "settings.json").read_text())["made_from"]["captions"]["sha256"] == content_of(captions)["sha256"]
    assert build(captions_file(captions, "a red dog"), out).exit_code == 1


def test_texts_are_told_apart_by_their_records(tmp_path: Path) -> None:
    """Of equal ids, lengths and images."""
    bert = Tokenizer.load()
    for name, text in (("x", "a red cat"), ("y", "a red dog"), ("z", "a red cat")):
        build_text_db([Caption("1", "a.jpg", text)], tmp_path / name, tokenizer=bert)
    contents = {name: content_of(tmp_path / name)["index"] for name in "xyz"}
    assert contents["x"] == contents["z"] != contents["y"]


# ------------------------------------------------------------------------------------------------------------- images that share a key


def test_names_that_share_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Of one folder they are counted, of several refused; also where names were forgotten in between, which are no other names."""
    monkeypatch.setattr("uniter.datasets.text_db.building.image_names.REMEMBERED_IMAGES", 1)
    monkeypatch.setattr("uniter.datasets.text_db.building.build.BATCH", 1)
    bert = Tokenizer.load()

    def texts(*names: str) -> list[Caption]:
        return [Caption(str(place), name, "a dog") for place, name in enumerate(names)]

    with caplog.at_level(logging.WARNING):
        report = build_text_db(texts("a/1.jpg", "a/2.jpg", "a/1.png", "a/1.jpg", "a/2.jpg"), tmp_path / "one", tokenizer=bert)
    assert (report.counts["names_sharing_a_key"], report.images) == (2, 2) and "2 names of images share" in caplog.text
    with pytest.raises(BadInput, match=r"'a/1\.jpg' and 'b/1\.png' lie in different folders and would all be the image '1'; .*--key path"):
        build_text_db(texts("a/1.jpg", "a/2.jpg", "b/1.png", "a/1.jpg"), tmp_path / "two", tokenizer=bert)
    assert not (tmp_path / "two").exists()
    assert build_text_db(texts("a/1.jpg", "b/1.png"), tmp_path / "apart", tokenizer=bert, key="path").images == 2
    assert build_text_db(texts("a/1.jpg", "b/1.png"), tmp_path / "two", tokenizer=bert, folders_tell_apart=False).images == 1


# -------------------------------------------------------------------------------------------------------------------- from the hub


def test_a_vocabulary_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own JSON says whether letters are lowered; without it its name does."""
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    Tokenizer.load().write_vocabulary(tmp_path / "vocab.txt")

    def download(name: str, file: str, local_files_only: bool) -> str:
        assert not local_files_only
        if name == "nobody/offline":
            raise LocalEntryNotFoundError("no connection")
        if not (tmp_path / file).is_file():
            raise EntryNotFoundError(file)
        return str(tmp_path / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("uniter.datasets.text_db.vocabulary_files.hub_is_reachable", lambda: True)
    assert Tokenizer.load("someone/bert-uncased").lowercase and not Tokenizer.load("someone/bert").lowercase
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    loaded = Tokenizer.load("someone/bert")
    assert loaded.lowercase and (loaded.name, loaded.vocabulary) == ("someone/bert", Tokenizer.load().vocabulary)
    with pytest.raises(BadInput, match=r"could not be had from the Hugging Face hub \(no connection\)"):
        Tokenizer.load("nobody/offline")
    for path in list(tmp_path.iterdir()):
        path.unlink()
    with pytest.raises(BadInput, match=r"the hub has no vocab\.txt of it"):
        Tokenizer.load("someone/gpt")
