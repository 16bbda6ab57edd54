"""Captions in parquet, in `datasets` saved to disk, beside their pictures, and in Flickr's and OpenCLIP's files."""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from uniter.cli.build_db import main
from uniter.datasets.errors import BadInput
from uniter.datasets.text_db import TextDB
from uniter.datasets.text_db.building.from_files import expand
from uniter.datasets.text_db.captions.table import CAPTIONS, detect


def read(path: Path, *, kind: str | None = None, split: str | None = None) -> list[tuple[str, Any, str | None]]:
    found = CAPTIONS[kind or detect(path)](path, split=split, join=(), counts=Counter())
    return [(caption.id, caption.image, caption.text) for caption in found]


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def saved(folder: Path, rows: list[dict[str, Any]], *, files: int = 1) -> Path:
    """What `Dataset.save_to_disk` writes."""
    folder.mkdir(parents=True)
    names = [f"data-{number:05d}-of-{files:05d}.arrow" for number in range(files)]
    for number, name in enumerate(names):
        table = pa.Table.from_pylist(rows[number::files], schema=pa.Table.from_pylist(rows).schema)
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    state = {"_data_files": [{"filename": name} for name in names], "_format_type": None, "_split": folder.name}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    return folder


NAMED = [{"image": "a/1.jpg", "caption": "a dog"}, {"image": "b/2.jpg", "caption": "a cat"}]
PICTURES = [
    {"image": {"bytes": b"1", "path": "dog.jpg"}, "caption": ["a dog", "the dog"]},
    {"image": {"bytes": b"2", "path": None}, "caption": ["a cat"]},
    {"image": {"bytes": b"3", "path": "/home/somebody/b.jpg"}, "caption": []},
]
READ = [("0-0", "t/000000/dog.jpg", "a dog"), ("0-1", "t/000000/dog.jpg", "the dog"), ("1", "t/t-000001", "a cat")]


def test_parquet_with_names_and_with_pictures(tmp_path: Path) -> None:
    path = parquet(tmp_path / "names.parquet", NAMED)
    assert detect(path) == "parquet" and read(path) == [("0", "a/1.jpg", "a dog"), ("1", "b/2.jpg", "a cat")]
    assert detect(parquet(tmp_path / "t.parquet", PICTURES)) == "parquet" and read(tmp_path / "t.parquet") == READ
    only_bytes = [{"image": {"bytes": b"1"}, "filename": "x.png", "text": "a dog"}]
    assert read(parquet(tmp_path / "u.parquet", only_bytes)) == [("0", "u/000000/x.png", "a dog")]
    plain = [{"jpg": b"1", "title": "a dog"}, {"jpg": b"2", "title": "a cat"}]
    assert read(parquet(tmp_path / "p.parquet", plain)) == [("0", "p/p-000000", "a dog"), ("1", "p/p-000001", "a cat")]


def test_a_url_column_beside_names_does_not_hide_them(tmp_path: Path) -> None:
    karpathy = [{"filepath": "val2014", "filename": "COCO_val2014_000000000042.jpg", "sentences": ["a", "b"], "url": "http://x.org/42.jpg"}]
    path = parquet(tmp_path / "k.parquet", karpathy)
    assert detect(path) == "parquet"
    assert [image for _, image, _ in read(path)] == ["COCO_val2014_000000000042.jpg"] * 2
    assert detect(parquet(tmp_path / "cc.parquet", [{"url": "http://x.org/1.jpg", "caption": "a"}])) == "cc"


def test_folders_of_parquet_files_and_their_parts(tmp_path: Path) -> None:
    for name, caption in (("train-00000-of-00002", "a"), ("train-00001-of-00002", "b"), ("test-00000-of-00001", "c")):
        parquet(tmp_path / "data" / f"{name}.parquet", [{"image": {"bytes": b"1", "path": None}, "caption": caption}])
    assert detect(tmp_path) == "parquet"
    assert [text for *_, text in read(tmp_path)] == ["c", "a", "b"]
    assert [row[0] for row in read(tmp_path, split="train")] == ["0", "1"]
    assert read(tmp_path, split="test") == [("0", "test-00000-of-00001/test-00000-of-00001-000000", "c")]
    with pytest.raises(BadInput, match="holds no parquet files of part val"):
        read(tmp_path, split="val")
    with pytest.raises(BadInput, match="is of part 'test', going by its name, and --split asks for 'train'"):
        read(tmp_path / "data" / "test-00000-of-00001.parquet", split="train")
    column = [{"image": "1.jpg", "caption": "a", "split": "train"}, {"image": "2.jpg", "caption": "b", "split": "val"}]
    assert read(parquet(tmp_path / "c.parquet", column), split="val") == [("1", "2.jpg", "b")]


def test_datasets_saved_to_disk(tmp_path: Path) -> None:
    path = saved(tmp_path / "t", PICTURES)
    assert detect(path) == "datasets"
    called = "data-00000-of-00001"
    assert read(path) == [(name, image.replace("t/", f"{called}/").replace("/t-", f"/{called}-"), text) for name, image, text in READ]
    parts = tmp_path / "parts"
    for part, rows in (("train", NAMED), ("test", NAMED[:1])):
        saved(parts / part, rows, files=len(rows))
    (parts / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    assert detect(parts) == "datasets"
    assert [image for _, image, _ in read(parts)] == ["a/1.jpg", "b/2.jpg", "a/1.jpg"]
    assert read(parts, split="test") == [("0", "a/1.jpg", "a dog")]
    with pytest.raises(BadInput, match=r"has no part 'val' \(it has: train, test\)"):
        read(parts, split="val")
    with pytest.raises(BadInput, match="is a single dataset without parts"):
        read(path, split="train")
    (parts / "test" / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(BadInput, match="was a part of the dataset not copied"):
        read(parts)
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, "_indices_files": [{"filename": "i.arrow"}]}))
    with pytest.raises(BadInput, match="flatten_indices"):
        read(path)
    (path / "state.json").write_text(json.dumps({**state, "_data_files": [{"filename": "../../etc/passwd"}]}))
    with pytest.raises(BadInput, match="names no data files"):
        read(path)


def test_what_the_real_package_saves_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With Hugging Face's own writer, where it is installed (or in the folder that UNITER_HF_DATASETS names)."""
    monkeypatch.syspath_prepend(__import__("os").environ.get("UNITER_HF_DATASETS", ""))
    datasets = pytest.importorskip("datasets", reason="Hugging Face's datasets is not installed; UNITER_HF_DATASETS names a folder with it")
    if "uniter" in str(datasets.__file__) or not hasattr(datasets, "Dataset"):
        pytest.skip("Hugging Face's datasets is not installed")
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.List(datasets.Value("string"))})
    table = datasets.Dataset.from_list(PICTURES[:2], features=features)
    table.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(str(tmp_path / "two"))
    table.to_parquet(str(tmp_path / "t.parquet"))
    assert detect(tmp_path / "one") == "datasets" and [text for *_, text in read(tmp_path / "one")] == ["a dog", "the dog", "a cat"]
    assert len(read(tmp_path / "two")) == 6 and len(read(tmp_path / "two", split="test")) == 3
    assert read(tmp_path / "t.parquet") == READ
    assert "datasets" in sys.modules


def test_folders_of_pictures_with_their_texts(tmp_path: Path) -> None:
    for name, text in (("a/dog.jpg", "a dog\nthe dog\n\n"), ("cat.PNG", "a cat"), ("lonely.jpg", None), ("readme.txt", "about all")):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        if text is None or path.suffix != ".txt":
            path.write_bytes(b"picture")
        if text is not None:
            path.with_suffix(".txt").write_text(text)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "x.jpg").write_bytes(b"x")
    assert detect(tmp_path) == "folder"
    counts: Counter[str] = Counter()
    found = [tuple(caption)[:3] for caption in CAPTIONS["folder"](tmp_path, split=None, join=(), counts=counts)]
    assert found == [
        ("a/dog#0", "a/dog.jpg", "a dog"), ("a/dog#1", "a/dog.jpg", "the dog"), ("cat", "cat.PNG", "a cat"), ("readme", "", "about all"),
    ]  # fmt: skip
    assert counts == {"images_without_caption": 1}
    (tmp_path / "cat.jpg").write_bytes(b"x")
    with pytest.raises(BadInput, match=r"have one text between them \(cat.txt\)"):
        read(tmp_path)


def test_token_files_and_flickrs_and_openclips_columns(tmp_path: Path) -> None:
    token = tmp_path / "results_20130124.token"
    token.write_text("1000092795.jpg#0\tTwo young guys .\n1000092795.jpg#1\tTwo men\twith tabs\n\n10002456.jpg#0\tSeveral men\n")
    assert detect(token) == "token"
    assert read(token) == [
        ("1000092795.jpg#0", "1000092795.jpg", "Two young guys ."),
        ("1000092795.jpg#1", "1000092795.jpg", "Two men\twith tabs"),
        ("10002456.jpg#0", "10002456.jpg", "Several men"),
    ]
    token.write_text(token.read_text() + "no tab\n")
    with pytest.raises(BadInput, match=r"line 5 of .* is 'no tab'; expected an image's name, #, a number, a tab and the caption"):
        read(token)
    openclip = tmp_path / "train.csv"
    openclip.write_text("filepath\ttitle\nimages/1.jpg\ta dog\n")
    assert detect(openclip) == "csv" and read(openclip) == [("0", "images/1.jpg", "a dog")]
    kaggle = tmp_path / "results.csv"
    kaggle.write_text("image_name| comment_number| comment\n1.jpg| 0| a dog | cat\n")
    assert read(kaggle) == [("0", "1.jpg", "a dog | cat")]
    hub = tmp_path / "flickr_annotations_30k.csv"
    hub.write_text('raw,sentids,split,filename,img_id\n"[""Two guys."", ""A [man]""]","[0, 1]",train,1000092795.jpg,0\n')
    assert read(hub) == [("0-0", "1000092795.jpg", "Two guys."), ("0-1", "1000092795.jpg", "A [man]")]


def test_by_glob_and_through_the_command(tmp_path: Path) -> None:
    for number in range(2):
        parquet(tmp_path / "data" / f"t{number}.parquet", [{"image": f"{number}.jpg", "caption": f"a dog {number}"}])
    assert [path.name for path in expand(str(tmp_path / "data/*.parquet"))] == ["t0.parquet", "t1.parquet"]
    with pytest.raises(BadInput, match="nothing matches"):
        expand(str(tmp_path / "data/*.json"))
    done = CliRunner().invoke(main, [str(tmp_path / "data/t?.parquet"), str(tmp_path / "out.db")])
    assert done.exit_code == 0, done.output
    texts = TextDB(tmp_path / "out.db")
    assert list(texts.ids) == ["0-0", "1-0"] and list(texts.image_keys) == ["0", "1"]
    done = CliRunner().invoke(main, [str(parquet(tmp_path / "t.parquet", PICTURES)), str(tmp_path / "pictures.db")])
    assert done.exit_code == 0, done.output
    assert list(TextDB(tmp_path / "pictures.db").image_keys) == ["dog", "t-000001"]
    done = CliRunner().invoke(main, [str(tmp_path / "t.parquet"), str(tmp_path / "by_path.db"), "--key", "path"])
    assert done.exit_code == 0, done.output
    assert list(TextDB(tmp_path / "by_path.db").image_keys) == ["t/000000/dog", "t/t-000001"]
