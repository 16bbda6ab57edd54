"""Images that lie in parquet files and in datasets saved to disk: the same pictures, under the keys that captions of the table get."""

import json
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from uniter.datasets.errors import BadInput
from uniter.datasets.image_db import ImageDB
from uniter.datasets.image_db.tables import PictureBytes
from uniter.datasets.text_db.building.build import build_text_db
from uniter.datasets.text_db.captions.table import CAPTIONS, detect
from uniter.datasets.text_db.tokenizer import Tokenizer
from uniter.extract.images import list_images, read_bytes
from uniter.extract.run.extraction import extract_images


def rows_of(folder: Path, *, paths: bool = True) -> list[dict[str, Any]]:
    return [
        {"image": {"bytes": file.read_bytes(), "path": file.name if paths else None}, "caption": [f"picture {number}"]}
        for number, file in enumerate(sorted(folder.iterdir()))
    ]


def parquet(path: Path, rows: list[dict[str, Any]], *, group: int = 7) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)
    return path


def saved(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True)
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    return folder


@pytest.mark.parametrize("kind", ["parquet", "folder", "datasets"])
@pytest.mark.parametrize("paths", [True, False])
def test_pictures_and_captions_of_a_table_belong_together(
    make_photos: Callable[..., Path], fake: ModuleType, tmp_path: Path, kind: str, paths: bool
) -> None:
    photos = make_photos(20)
    rows = rows_of(photos, paths=paths)
    if kind == "parquet":
        source = parquet(tmp_path / "t.parquet", rows)
    elif kind == "folder":
        parquet(tmp_path / "hub/data/train-00000-of-00002.parquet", rows[:9])
        parquet(tmp_path / "hub/data/train-00001-of-00002.parquet", rows[9:])
        source = tmp_path / "hub"
    else:
        source = saved(tmp_path / "saved", rows)
    summary = extract_images(source, tmp_path / "out.lmdb", detector=fake.FakeDetector())
    assert summary.complete and summary.extracted == 20 and not summary.failures
    plain = extract_images(photos, tmp_path / "plain.lmdb", detector=fake.FakeDetector())
    assert plain.complete
    mine, wanted = ImageDB(tmp_path / "out.lmdb"), ImageDB(tmp_path / "plain.lmdb")
    if paths:
        assert sorted(mine.keys_list) == sorted(wanted.keys_list)
    assert sorted(mine[key].boxes.tobytes() for key in mine) == sorted(wanted[key].boxes.tobytes() for key in wanted)

    captions = CAPTIONS[detect(source)](source, split=None, join=(), counts={})
    texts = tmp_path / "texts.db"
    report = build_text_db(captions, texts, tokenizer=Tokenizer.learn(["picture 0123456789"], size=200))
    assert report.counts["kept"] == 20
    from uniter.datasets.text_db import TextDB

    assert sorted(TextDB(texts).image_keys) == sorted(mine.keys_list)
    # The same again does nothing.
    again = extract_images(source, tmp_path / "out.lmdb", detector=fake.FakeDetector())
    assert again.complete and not again.extracted


def test_bytes_come_right_in_any_order_and_from_many_threads(tmp_path: Path) -> None:
    rows = [{"image": {"bytes": b"%05d" % number * (number % 50 + 1), "path": None}} for number in range(700)]
    path = parquet(tmp_path / "t.parquet", rows, group=150)
    reader = PictureBytes(path, "image")
    order = list(range(700)) + random.Random(0).sample(range(700), 60) + [0, 699, 0, 350]
    assert [reader.of_row(number) for number in order] == [rows[number]["image"]["bytes"] for number in order]
    listed = list_images(path)
    items = [item for number in range(listed.units) for item in listed.unit(number)]
    assert [item.key for item in items[:2]] == ["t-000000", "t-000001"] and listed.images == 700
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(read_bytes, items)) == [row["image"]["bytes"] for row in rows]
    assert items[5].path == f"{path}/t-000005"


def test_what_cannot_be_read_is_a_row_of_failures(make_photos: Callable[..., Path], fake: ModuleType, tmp_path: Path) -> None:
    rows = rows_of(make_photos(4))
    rows[1]["image"] = {"bytes": None, "path": "elsewhere/x.jpg"}
    rows[2]["image"]["bytes"] = b""
    path = parquet(tmp_path / "t.parquet", rows)
    summary = extract_images(path, tmp_path / "out.lmdb", detector=fake.FakeDetector())
    assert summary.complete and summary.extracted == 2 and summary.failures == 2
    failures = [json.loads(line) for line in (tmp_path / "out.lmdb" / "failures.jsonl").read_text().splitlines()]
    assert {row["key"] for row in failures} == {"x", "photo0002"}
    assert any("holds no bytes, only the path 'elsewhere/x.jpg'; extract the files themselves" in row["error"] for row in failures)
    assert any("its bytes in the table are empty" in row["error"] for row in failures)


def test_names_that_are_not_unique_and_tables_without_pictures_are_refused(make_photos: Callable[..., Path], tmp_path: Path) -> None:
    rows = rows_of(make_photos(3))
    rows[2]["image"]["path"] = "other/photo0000.jpg"
    path = parquet(tmp_path / "t.parquet", rows)
    with pytest.raises(BadInput, match=r"t/000000/photo0000.jpg and t/000002/photo0000.jpg would all get the key 'photo0000'.*--key path"):
        list_images(path)
    assert [item.key for item in list_images(path, key="path").unit(0)] == [f"t/00000{row}/photo000{row % 2}" for row in range(3)]
    bare = parquet(tmp_path / "urls.parquet", [{"url": "https://example.org/1.jpg", "caption": "a"}])
    with pytest.raises(BadInput, match=r"is a table without pictures \(it has: url, caption\)") as caught:
        list_images(bare)
    assert f"img2dataset --url_list {bare} --input_format parquet --url_col url --output_folder urls-images" in str(caught.value)
    with pytest.raises(BadInput, match="tables of images and other images were named together"):
        list_images([path, tmp_path / "photos"])
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(BadInput, match="is no readable parquet file"):
        list_images(path)


def test_addresses_are_answered_with_the_command_that_fetches_them(tmp_path: Path) -> None:
    urls = tmp_path / "my urls.txt"
    urls.write_text("https://example.org/1.jpg\nhttps://example.org/2.jpg\n")
    wanted = (
        f"img2dataset --url_list '{urls}' --input_format txt --output_folder 'my urls-images' --output_format webdataset --resize_mode no "
        "--skip_reencode True, then uniter-extract 'my urls-images' OUT"
    )
    with pytest.raises(BadInput, match=r"names addresses \(URLs, such as https://example.org/1.jpg\)") as caught:
        list_images(urls)
    assert wanted in str(caught.value)
    lines = tmp_path / "urls.jsonl"
    lines.write_text('{"path": "https://example.org/1.jpg"}\n')
    with pytest.raises(BadInput, match="--input_format jsonl --url_col path"):
        list_images(lines)
    with pytest.raises(BadInput, match=r"photo.jpg is an address \(URL\), and files are read; write it into urls.txt"):
        list_images("https://example.org/photo.jpg")
