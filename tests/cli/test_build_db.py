"""uniter-build-db on the command line: defaults, images, parts, lists, exit codes, messages."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from uniter.cli.build_db import main
from uniter.datasets.errors import BadInput
from uniter.datasets.image_db.records import encode_record
from uniter.datasets.image_db.regions import RegionFeatures, normalised_boxes
from uniter.datasets.image_db.writing.units import UnitStore
from uniter.datasets.maintenance.check import check_database
from uniter.datasets.text_db import TextDB
from uniter.datasets.text_db.building.from_files import expand
from uniter.datasets.text_db.tokenizer import Tokenizer

IMAGES = ["COCO_train2014_000000000009.jpg", "COCO_train2014_000000000025.jpg", "COCO_train2014_000000000030.jpg"]


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    document = {
        "images": [{"id": place + 1, "file_name": name} for place, name in enumerate(IMAGES)],
        "annotations": [
            {"id": 10 * place + turn, "image_id": place + 1, "caption": f"Caption {turn} of a dog ."}
            for place in range(3)
            for turn in range(2)
        ],
    }
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(document))
    return path


def region_database(path: Path, keys: list[str]) -> Path:
    store = UnitStore(path, settings={"made": "up"})
    unit = store.unit(0)
    assert unit is not None
    with unit:
        for key in sorted(keys):
            boxes = np.array([[0, 0, 10, 10], [5, 5, 20, 30]], np.float32)
            record = RegionFeatures(
                features=np.ones((2, 4), np.float16),
                norm_bb=normalised_boxes(boxes, (40, 40)).astype(np.float16),
                conf=np.array([0.9, 0.5], np.float16),
                boxes=boxes,
                size=(40, 40),
            )
            unit.put(key, encode_record(record), regions=2)
        unit.complete()
    assert store.finish(units=1, header={})
    return path


def run(*words: Any, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def summary(*words: Any, code: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(*words, "--json", code=code).stdout)
    return found


def test_two_words_are_enough(captions: Path) -> None:
    result = run(captions)
    assert "Text database made." in result.stdout and "captions.db" in result.stdout
    database = TextDB(captions.parent / "captions.db")
    assert len(database) == 6 and database.image_key(0) == "COCO_train2014_000000000009"
    assert database.record(5) == {
        "input_ids": Tokenizer.load().encode("Caption 1 of a dog ."),
        "img_fname": "COCO_train2014_000000000030",
        "sent": "Caption 1 of a dog .",
    }
    assert database.meta["bert"] == "bert-base-cased" and database.meta["annotations"] == ["captions.json"]
    again = summary(captions)
    assert again["already_complete"] and again["texts"]["kept"] == 6
    assert "Already complete" in run(captions).stdout


def test_images_are_looked_up_and_reported(captions: Path, tmp_path: Path) -> None:
    one = region_database(tmp_path / "one.lmdb", ["COCO_train2014_000000000009", "something else"])
    two = region_database(tmp_path / "two.lmdb", ["COCO_train2014_000000000025.npz"])
    report = summary(captions, tmp_path / "a.db", "--images", one, "--images", two)
    assert report["coverage"] == {"missing": 1, "stem": 1, "npz": 1} and report["images"] == 2
    assert report["texts"]["kept"] == 4 and report["texts"]["without_image"] == 2
    database = TextDB(tmp_path / "a.db")
    assert list(database.image_keys) == ["COCO_train2014_000000000009", "COCO_train2014_000000000025.npz"]
    assert summary(captions, tmp_path / "b.db", "--images", one, "--strict", code=3)["texts"]["kept"] == 2
    # UNITER's own databases are keyed in small letters; and a template beside --images is tried first.
    published = region_database(tmp_path / "published.lmdb", [f"coco_train2014_{n:012d}.npz" for n in (9, 25, 30)])
    assert summary(captions, tmp_path / "p.db", "--images", published)["coverage"] == {"missing": 0, "published": 3}
    other = region_database(tmp_path / "other.lmdb", ["something else"])
    assert "do --images and the captions belong together?" in run(captions, tmp_path / "c.db", "--images", other, code=1).stderr
    report = summary(captions, tmp_path / "c.db", "--images", published, "--key", "coco_train2014_{id:012d}.npz")
    assert report["coverage"] == {"missing": 0, "template": 3}
    result = run(captions, tmp_path / "a.db", "--images", one, code=1)
    assert "images (one.lmdb) has other contents now" in result.stderr


def test_keys_and_tokenizers(captions: Path, tmp_path: Path) -> None:
    run(captions, tmp_path / "a.db", "--key", "coco_{id:012d}.npz", "--tokenizer", "train:120")
    learned = TextDB(tmp_path / "a.db")
    assert learned.image_key(0) == "coco_000000000009.npz"
    assert learned.meta["bert"].startswith("wordpiece-cased-") and learned.unk_id not in learned.record(0)["input_ids"]
    # Another part is made with the first one's vocabulary, and says so under the same name.
    run(captions, tmp_path / "b.db", "--tokenizer", tmp_path / "a.db")
    assert TextDB(tmp_path / "b.db").meta["bert"] == learned.meta["bert"]
    assert TextDB(tmp_path / "b.db").record(3)["input_ids"] == learned.record(3)["input_ids"]
    for size in ("many", "²", "9" * 5000):
        assert "expected train:SIZE" in run(captions, tmp_path / "c.db", "--tokenizer", f"train:{size}", code=2).stderr
    assert "could not be had" in run(captions, tmp_path / "c.db", "--tokenizer", "no such name !", code=1).stderr


def test_lists_and_parts(captions: Path, tmp_path: Path) -> None:
    karpathy = [
        {"filename": name, "cocoid": place + 1, "split": split, "sentences": []}
        for place, (name, split) in enumerate(zip(IMAGES, ("train", "val", "test"), strict=True))
    ]
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": karpathy, "dataset": "coco"}))
    lists = tmp_path / "excluded.json"
    result = run("exclude", "--karpathy", tmp_path / "dataset_coco.json", "--out", lists)
    assert "karpathy_val_iids" in result.stdout and "the Flickr photos of COCO images are unknown" in result.stderr
    assert json.loads(lists.read_text())["karpathy_test_iids"] == [3]
    report = summary("exclude", "--karpathy", tmp_path / "dataset_coco.json", "--out", lists)
    assert (report["karpathy_train_iids"], report["karpathy_val_iids"], report["forbidden_coco_images"]) == (1, 1, 1)

    by_content = summary("exclude", tmp_path / "dataset_coco.json", "--out", tmp_path / "again.json")
    assert by_content["from"] == {"karpathy": ["dataset_coco.json"]} and (tmp_path / "again.json").read_bytes() == lists.read_bytes()
    assert "is none of the files" in run("exclude", lists, "--out", tmp_path / "again.json", code=1).stderr

    assert summary(captions, tmp_path / "all.db", "--exclude", lists)["texts"]["excluded"] == 2
    train = summary(captions, tmp_path / "train.db", "--exclude", lists, "--split", "train")["texts"]
    assert (train["kept"], train["excluded"], train["texts_of_other_parts"]) == (2, 2, 2)
    run(captions, tmp_path / "val.db", "--exclude", lists, "--split", "val")
    assert list(TextDB(tmp_path / "val.db").image_keys) == ["COCO_train2014_000000000025"]
    header = TextDB(tmp_path / "val.db").header
    assert header is not None and list(header["settings"]["exclude"]) == ["excluded.json"]
    assert "unknown split 'test'" in run(captions, tmp_path / "x.db", "--exclude", lists, "--split", "test", code=2).stderr
    assert "--split needs Karpathy's" in run(captions, tmp_path / "x.db", "--split", "val", code=1).stderr
    # A changed list is another database.
    lists.write_text("[1]")
    assert "exclude" in run(captions, tmp_path / "val.db", "--exclude", lists, code=1).stderr


def test_visual_genome_needs_to_be_told_which_images_are_cocos(tmp_path: Path) -> None:
    """Half of Visual Genome is COCO: without image_data.json its test images would be trained on unnoticed."""
    regions = [{"id": n, "regions": [{"region_id": n, "image_id": n, "phrase": "a dog"}]} for n in (7, 8)]
    (tmp_path / "region_descriptions.json").write_text(json.dumps(regions))
    (tmp_path / "excluded.json").write_text(json.dumps({"karpathy_test_iids": [2]}))
    words = [tmp_path / "region_descriptions.json", tmp_path / "vg.db", "--exclude", tmp_path / "excluded.json"]
    assert "or name it with --join" in run(*words, code=1).stderr
    assert not (tmp_path / "vg.db").exists()
    (tmp_path / "other.json").write_text(json.dumps([{"image_id": 7, "coco_id": 2}, {"image_id": 8, "coco_id": None}]))
    report = summary(*words, "--join", tmp_path / "other.json")
    assert (report["texts"]["kept"], report["texts"]["excluded"]) == (1, 1)


def test_messages_and_exit_codes(captions: Path, tmp_path: Path) -> None:
    assert "unknown caption format 'cocoo'; did you mean 'coco'?" in run(captions, "--format", "cocoo", code=2).stderr
    assert "is not there" in run(tmp_path / "nowhere.json", code=1).stderr
    assert "unknown task 'vqaa'" in run(captions, "--task", "vqaa", code=2).stderr
    assert "Usage: " in run(code=2).stderr and "Usage: " in run("exclude", code=2).stderr
    assert run(captions, tmp_path / "a.db", "--key", "{what}", code=2).stderr.startswith("error: --key '{what}': unknown field 'what'")
    assert not (tmp_path / "a.db").exists()
    result = run(captions, "--format", "karpathy", "--traceback", code=1)
    assert "Traceback" in result.stderr and "lacks filename" in result.stderr
    assert "uniter-build-db captions.json" in run("--help").stdout and "--karpathy" in run("exclude", "--help").stdout
    assert "version" in run("--version").stdout
    assert not list(tmp_path.glob("*.db")), "what failed leaves nothing"
    captions.write_text(captions.read_text()[:-30])
    assert "was it cut off?" in run(captions, code=1).stderr


def test_several_files(tmp_path: Path, captions: Path) -> None:
    assert expand("cc3m/{00000..00002}.tar") == [Path(f"cc3m/0000{n}.tar") for n in range(3)]
    assert expand("a_{train,val}{1..2}.json") == [Path(f"a_{part}{n}.json") for part in ("train", "val") for n in (1, 2)]
    (tmp_path / "x{1..2}.json").write_text("{}")
    assert expand(str(tmp_path / "x{1..2}.json")) == [tmp_path / "x{1..2}.json"]
    with pytest.raises(BadInput, match="expected at most a million, upwards"):
        expand("{5..1}.tar")
    document = json.loads(captions.read_text())
    for part, annotations in (("train", document["annotations"][:4]), ("val", document["annotations"][4:])):
        (tmp_path / f"captions_{part}2014.json").write_text(json.dumps({**document, "annotations": annotations}))
    run(tmp_path / "captions_{train,val}2014.json", tmp_path / "both.db")
    assert len(TextDB(tmp_path / "both.db")) == 6
    assert "the id '0' is used twice" in run(tmp_path / "{captions_train2014,captions}.json", tmp_path / "twice.db", code=1).stderr


@pytest.mark.parametrize(
    ("name", "contents"),
    [
        ("p{0,1}.jsonl", ['{"image": "a.jpg", "caption": "one"}\n', '{"image": "b.jpg", "caption": ["two", "three"]}\n']),
        ("p{0,1}.csv", ["image,caption\na.jpg,one\n", "image,caption\nb.jpg,two\nc.jpg,three\n"]),
        ("p{0,1}.tsv", ["one\thttp://x.org/a.jpg\n", "two\thttp://x.org/b.jpg\nthree\thttp://x.org/c.jpg\n"]),
    ],
)
def test_texts_without_ids_in_several_files(tmp_path: Path, name: str, contents: list[str]) -> None:
    for path, content in zip(expand(str(tmp_path / name)), contents, strict=True):
        path.write_text(content)
    run(tmp_path / name, tmp_path / "both.db")
    database = TextDB(tmp_path / "both.db")
    assert [record["sent"] for record in map(database.record, range(3))] == ["one", "two", "three"]
    assert len(set(database.ids)) == 3


def test_lists_of_one_name_are_both_in_the_header(captions: Path, tmp_path: Path) -> None:
    for folder, content in (("a", "1\n"), ("b", "1\n5\n")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "list.txt").write_text(content)
    run(captions, tmp_path / "x.db", "--exclude", tmp_path / "a/list.txt", "--exclude", tmp_path / "b/list.txt")
    header = json.loads((tmp_path / "x.db" / "header.json").read_text())
    assert len(header["settings"]["exclude"]) == 2 and header["report"]["texts"]["excluded"] == 2


SOURCES: dict[str, tuple[str, Any]] = {
    "coco": (
        "captions.json",
        {
            "images": [{"id": n, "file_name": f"val2014/{n}.jpg"} for n in range(3)],
            "annotations": [{"id": 10 + n, "image_id": n % 3, "caption": f"Caption {n} of a dog 😀"} for n in range(6)],
        },
    ),
    "jsonl": ("captions.jsonl", [{"image": f"val2014/{n % 3}.jpg", "caption": f"Caption {n} \ud83d", "split": "val"} for n in range(6)]),
    "vg": ("regions.json", [{"id": n, "regions": [{"region_id": 7 * n, "image_id": n, "phrase": f"dog {n}"}]} for n in range(3)]),
    "sbu": ("sbu.json", {"image_urls": [f"http://x.org/{n}.jpg" for n in range(3)], "captions": ["a dog", "a [MASK]", "dogs"]}),
}


@pytest.mark.parametrize("kind", SOURCES)
@settings(max_examples=settings().max_examples // 4)
@given(data=st.data())
def test_fuzzed_sources_are_built_or_refused(
    tmp_path_factory: pytest.TempPathFactory, fuzzing: ModuleType, kind: str, data: st.DataObject
) -> None:
    """The whole command: a database in which nothing is wrong, or one sentence and nothing left behind."""
    folder = tmp_path_factory.mktemp("fuzz")
    name, document = SOURCES[kind]
    if data.draw(st.booleans(), label="values"):
        document = fuzzing.with_another_value(data, document)
    content = b"\n".join(map(fuzzing.as_json, document)) if kind == "jsonl" else fuzzing.as_json(document)
    (folder / name).write_bytes(content if data.draw(st.booleans()) else fuzzing.damaged(data, content))
    words: list[Any] = [folder / name, folder / "out.db", "--json"]
    words += data.draw(st.sampled_from([[], ["--key", "path"], ["--key", "{id}"], ["--format", kind], ["--split", "val"]]))
    if data.draw(st.booleans()):
        (folder / "list.txt").write_text("1\nval2014/2.jpg\n")
        words += ["--exclude", folder / "list.txt"]
    result = CliRunner().invoke(main, [str(word) for word in words])
    if result.exit_code == 0:
        counts = json.loads(result.stdout)["texts"]
        database = TextDB(folder / "out.db")
        assert counts["kept"] == len(database) == counts["read"] - counts["empty"] - counts["without_image"] - counts["excluded"]
        report = check_database(folder / "out.db")
        assert (report.good, report.problems) == (len(database), {}), report.examples
    else:
        assert isinstance(result.exception, SystemExit) and result.exit_code == 1, result.exception
        assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1
        assert not (folder / "out.db").exists()


def test_the_ten_photographs(shared: Path, tmp_path: Path) -> None:
    report = summary(shared / "data" / "coco10" / "captions.json", tmp_path / "db")
    assert report["texts"]["kept"] == 50 and report["images"] == 10
