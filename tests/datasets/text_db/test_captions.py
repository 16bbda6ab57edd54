"""Every caption source: found by its content, read as it is, every fault of people's files with an outcome."""

import gzip
import io
import json
import random
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from uniter.datasets.errors import BadInput
from uniter.datasets.text_db.caption import Caption
from uniter.datasets.text_db.captions.names import NameTable
from uniter.datasets.text_db.captions.table import CAPTIONS, detect


def read(path: Path, *, kind: str | None = None, split: str | None = None, join: Sequence[Path] = ()) -> tuple[list[Caption], Counter[str]]:
    """All captions of a file, by the reader that its content asks for."""
    counts: Counter[str] = Counter()
    texts = list(CAPTIONS[kind or detect(path)](path, split=split, join=join, counts=counts))
    return texts, counts


def shown(texts: Sequence[Caption]) -> list[tuple[str, Any, str | None]]:
    return [(caption.id, caption.image, caption.text) for caption in texts]


def written(path: Path, content: Any) -> Path:
    """A file of JSON, text or bytes."""
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.write_bytes(content.encode())
    else:
        path.write_text(json.dumps(content))
    return path


COCO = {
    "info": {},
    "images": [{"id": 9, "file_name": "COCO_val2014_000000000009.jpg"}, {"id": 25, "file_name": "b.jpg"}, {"id": 7, "file_name": "c.jpg"}],
    "annotations": [
        {"id": 42, "image_id": 25, "caption": "A giraffe ."},
        {"id": 41, "image_id": 9, "caption": "Food\non trays"},
        {"id": 43, "image_id": 25, "caption": ""},
    ],
}
COCO_READ = [("42", "b.jpg", "A giraffe ."), ("41", "COCO_val2014_000000000009.jpg", "Food\non trays"), ("43", "b.jpg", "")]


# -------------------------------------------------------------------------------------------------------------------------- COCO


def test_coco(tmp_path: Path) -> None:
    path = written(tmp_path / "any name", COCO)
    assert detect(path) == "coco"
    texts, counts = read(path)
    assert shown(texts) == COCO_READ and counts == {"images_without_caption": 1}
    assert texts[0].origins == (("coco", "25"),)


@pytest.mark.parametrize("order", [("annotations", "images", "info"), ("annotations", "info", "images"), ("info", "images", "annotations")])
def test_coco_in_any_order(tmp_path: Path, order: tuple[str, ...]) -> None:
    path = written(tmp_path / "c.json", {name: COCO[name] for name in order})
    assert detect(path) == "coco" and shown(read(path)[0]) == COCO_READ


@pytest.mark.parametrize("inside", [b'"%s"' % (b" " * (40 << 20)), b"[%s[]]" % (b"[]," * (14 << 20))])
def test_what_unpacks_to_a_hundred_times_its_size_is_refused(inside: bytes, tmp_path: Path) -> None:
    """Before it fills the memory: a string, or many small lists, within one caption."""
    bomb = gzip.compress(b'{"images": [], "annotations": [{"id": 1, "image_id": 1, "caption": %s}]}' % inside)
    with pytest.raises(BadInput, match="unpacks to more than 100 times its size"):
        read(written(tmp_path / "c.json.gz", bomb), kind="coco")


def test_coco_with_a_byte_order_mark_crlf_and_gzip(tmp_path: Path) -> None:
    text = json.dumps(COCO, indent=1).replace("\n", "\r\n").encode()
    for content in (b"\xef\xbb\xbf" + text, gzip.compress(text), gzip.compress(b"\xef\xbb\xbf" + text)):
        path = written(tmp_path / "c.json", content)
        assert detect(path) == "coco" and shown(read(path)[0]) == COCO_READ


def test_coco_ids_of_every_kind(tmp_path: Path) -> None:
    document = {
        "images": [
            {"id": "000042", "file_name": "a.jpg"},
            {"id": "x", "file_name": "b.jpg"},
            {"id": 5.0, "file_name": "c.jpg"},
        ],
        "annotations": [
            {"id": "first", "image_id": 42, "caption": "a"},
            {"image_id": "x", "caption": "b"},
            {"id": 3.0, "image_id": 5, "caption": 12},
            {"id": 4, "image_id": 5, "caption": None},
            {"id": 5, "image_id": 99, "caption": "no such image"},
            {"id": 6, "caption": "no image"},
        ],
    }
    texts, counts = read(written(tmp_path / "c.json", document), kind="coco")
    assert shown(texts)[:3] == [("first", "a.jpg", "a"), ("1", "b.jpg", "b"), ("3", "c.jpg", "12")]
    assert shown(texts)[3] == ("4", "c.jpg", "")
    assert shown(texts)[4:] == [("5", "", "no such image"), ("6", "", "no image")]
    assert counts["images_without_caption"] == 0


def test_coco_without_a_list_of_images_calls_them_by_their_ids(tmp_path: Path) -> None:
    path = written(tmp_path / "c.json", {"annotations": [{"id": 1, "image_id": 9, "caption": "a"}]})
    assert detect(path) == "coco" and shown(read(path)[0]) == [("1", "9", "a")]


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (
            {"images": [{"id": 1, "file_name": "a"}, {"id": 1, "file_name": "b"}], "annotations": COCO["annotations"]},
            "image 1 is listed twice, as 'a' and as 'b'",
        ),
        ({"images": COCO["images"], "annotations": [{"id": 1, "image_id": 9, "bbox": []}]}, r"has no caption; expected captions_\*\.json"),
        (
            {"images": COCO["images"], "annotations": [{"id": 1, "image_id": 9, "caption": ["a"]}]},
            "the caption of annotation 1 of .* is a JSON list",
        ),
        ({"images": COCO["images"], "annotations": [[1]]}, "annotation 0 of .* is a JSON list; expected an object"),
        ({"images": [3], "annotations": []}, "entry 0 of images in .* is a JSON int; expected an object"),
        ({"images": [{"file_name": "a"}], "annotations": []}, "has the id None; expected a number"),
    ],
)
def test_coco_faults(tmp_path: Path, document: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        read(written(tmp_path / "c.json", document), kind="coco")


def test_json_cut_off_anywhere_is_said(tmp_path: Path) -> None:
    text = json.dumps(COCO).encode()
    for length in range(1, len(text), 7):
        path = written(tmp_path / "c.json", text[:length])
        with pytest.raises(BadInput, match=r"cut off|is not JSON"):
            read(path, kind="coco")
    with pytest.raises(BadInput, match="is damaged gzip"):
        read(written(tmp_path / "c.json", gzip.compress(text)[:-20]), kind="coco")
    for content, message in (
        (b"", "is empty"),
        (b" \n ", "is empty"),
        ("x".encode("utf-16"), "is UTF-16"),
        (b"hello world", "no caption file"),
    ):
        with pytest.raises(BadInput, match=message):
            detect(written(tmp_path / "c.json", content))
    with pytest.raises(BadInput, match="have no parts"):
        read(written(tmp_path / "c.json", COCO), split="val")


def test_halves_of_surrogate_pairs_become_replacement_characters(tmp_path: Path) -> None:
    """Python's json writes "\\ud83d" where a text was cut in the middle of an emoji; yajl, below ijson, refuses it."""
    texts = ["x" * n + "half \ud83d or \udc00, whole 😀 \\ud83d " + "\\" * n for n in range(1000)]
    document = {
        "images": [{"id": 1, "file_name": "a\ud83d.jpg"}],
        "annotations": [{"id": n, "image_id": 1, "caption": text} for n, text in enumerate(texts)],
    }
    path = written(tmp_path / "c.json", json.dumps(document).encode())
    for caption, text in zip(read(path)[0], texts, strict=True):
        assert caption.text == text.replace("\ud83d", "\ufffd").replace("\udc00", "\ufffd")
        assert caption.image == "a\ufffd.jpg"


def test_texts_of_escapes_alone_stay_whole(tmp_path: Path) -> None:
    """Chinese as json.dumps writes it has no place for a hundred thousands of bytes where a block could not cut an escape."""
    texts = ["红色的圆" * 30_000, "😀" * 50_000, '"' * 100_001, *('\\" {[' * n for n in range(1, 400))]
    document = {
        "images": [{"id": 1, "file_name": "a.jpg"}],
        "annotations": [{"id": n, "image_id": 1, "caption": text} for n, text in enumerate(texts)],
    }
    path = written(tmp_path / "c.json", json.dumps(document).encode())
    assert [caption.text for caption in read(path)[0]] == texts


def test_json_nested_without_end_is_refused_at_once(tmp_path: Path) -> None:
    """ijson keeps the path of each level: 100,000 levels took 25 GB."""
    for text in ("[" * 200_000, '{"a":' * 100_000, '{"images": [], "annotations": ' + '[{"a": ' * 50_000):
        path = written(tmp_path / "deep.json", text)
        for kind in ("coco", "karpathy", "vg", "sbu", None):
            with pytest.raises(BadInput, match=r"nested more than 500 deep|is not JSON|ends or breaks|has 1 cells"):
                read(path, kind=kind)
    brackets = {"images": [{"id": 1, "file_name": "a"}], "annotations": [{"id": 1, "image_id": 1, "caption": '[{"[' * 9000}]}
    assert len(read(written(tmp_path / "c.json", json.dumps(brackets)))[0]) == 1, "brackets in a text are text"
    shallow = {"images": [{"id": 1, "file_name": "a", "more": json.loads("[" * 400 + "]" * 400)}], "annotations": []}
    assert read(written(tmp_path / "c.json", json.dumps(shallow)), kind="coco")[0] == []


def test_what_is_no_utf8_is_said(tmp_path: Path) -> None:
    text = '{"images": [], "annotations": [{"id": 1, "image_id": 1, "caption": "caf\xe9"}]}'
    with pytest.raises(BadInput, match="holds bytes that are not UTF-8"):
        read(written(tmp_path / "c.json", text.encode("latin-1")))
    for encoding in ("utf-16", "utf-16-le", "utf-16-be"):
        with pytest.raises(BadInput, match="is UTF-16 text; save it as UTF-8"):
            read(written(tmp_path / "c.json", text.encode(encoding)))


# --------------------------------------------------------------------------------------------------------- Karpathy, Visual Genome

KARPATHY = {
    "images": [
        {
            "filepath": "val2014",
            "sentids": [1, 2],
            "filename": "COCO_val2014_000000391895.jpg",
            "imgid": 0,
            "split": "test",
            "sentences": [
                {"tokens": ["a", "man"], "raw": "A man.", "imgid": 0, "sentid": 770337},
                {"tokens": ["two", "men"], "imgid": 0, "sentid": 771687},
            ],
            "cocoid": 391895,
        },
        {"filename": "b.jpg", "split": "restval", "sentences": [{"raw": "b", "sentid": 3}], "cocoid": 2},
        {"filename": "c.jpg", "split": "train", "sentences": [], "cocoid": 4},
    ],
    "dataset": "coco",
}


def test_karpathy(tmp_path: Path) -> None:
    path = written(tmp_path / "dataset_coco.json", KARPATHY)
    assert detect(path) == "karpathy"
    texts, counts = read(path)
    assert shown(texts) == [
        ("770337", "val2014/COCO_val2014_000000391895.jpg", "A man."),
        ("771687", "val2014/COCO_val2014_000000391895.jpg", "two men"),
        ("3", "b.jpg", "b"),
    ]
    assert texts[0].origins == (("coco", "391895"),) and counts == {"images_without_caption": 1}
    texts, counts = read(path, split="restval")
    assert [caption.id for caption in texts] == ["3"] and counts == {"images_of_other_parts": 2}
    assert [caption.id for caption in read(path, split="train,test")[0]] == ["770337", "771687"]
    with pytest.raises(BadInput, match=r"unknown split 'tests'; did you mean 'test'\? \(known: restval, test, train\)"):
        read(path, split="tests")
    flickr = {
        "images": [{"filename": "1000092795.jpg", "split": "train", "sentences": [{"raw": "a", "sentid": 0}]}],
        "dataset": "flickr30k",
    }
    assert read(written(tmp_path / "f.json", flickr))[0][0].origins == (("flickr", "1000092795"),)
    with pytest.raises(BadInput, match=r"image 0 of .* lacks filename, split or sentences"):
        read(written(tmp_path / "bad.json", {"images": [{"filename": "a", "sentences": []}]}), kind="karpathy")


def test_visual_genome(tmp_path: Path) -> None:
    regions = [
        {
            "regions": [
                {"region_id": 1382, "width": 82, "height": 139, "image_id": 1, "phrase": "the clock is green", "y": 57, "x": 421},
                {"region_id": 1383, "image_id": 1, "phrase": " "},
            ],
            "id": 1,
        },
        {"regions": [{"id": 5, "phrase": "shade"}], "id": 2},
        {"regions": [], "id": 3},
    ]
    path = written(tmp_path / "region_descriptions.json", regions)
    assert detect(path) == "vg"
    texts, counts = read(path)
    assert shown(texts) == [("1382", "1.jpg", "the clock is green"), ("1383", "1.jpg", " "), ("5", "2.jpg", "shade")]
    assert texts[0].fields == {"bbox": [421, 57, 82, 139]} and texts[1].fields is None and counts == {"images_without_caption": 1}
    assert texts[0].origins == (("vg", "1"),)
    data = [{"image_id": 1, "coco_id": None, "flickr_id": 77}, {"image_id": 2, "coco_id": 9, "flickr_id": None}]
    written(tmp_path / "image_data.json", data)
    texts, _ = read(path)
    assert [caption.origins for caption in texts] == [(("vg", "1"),), (("vg", "1"),), (("vg", "2"), ("coco", "9"))]
    with pytest.raises(BadInput, match="has no list of regions"):
        read(written(tmp_path / "bad.json", [{"id": 1}]), kind="vg")


# --------------------------------------------------------------------------------------------------- Conceptual Captions and SBU

CC = 'a "quoted" dog\thttp://x.org/a.jpg\r\ntabs\tinside\thttps://x.org/b c.jpg\n\nsee http://page.org here\thttp://x.org/c.jpg\n  \thttp://x.org/d.jpg'
CC_READ = [
    ("0", "000000000", 'a "quoted" dog'),
    ("1", "000000001", "tabs\tinside"),
    ("2", "000000002", "see http://page.org here"),
    ("3", "000000003", "  "),
]


def test_conceptual_captions(tmp_path: Path) -> None:
    for content in (CC, "\ufeff" + CC, "caption\turl\n" + CC):
        path = written(tmp_path / "Train_GCC-training.tsv", content)
        assert detect(path) == "cc" and shown(read(path)[0]) == CC_READ
    twelve = written(tmp_path / "cc12m.tsv", 'http://x.org/a.jpg\ta "dog"\nhttp://x.org/b.jpg\ttabs\tinside\n')
    assert detect(twelve) == "cc" and [caption.text for caption in read(twelve)[0]] == ['a "dog"', "tabs\tinside"]
    labelled = written(tmp_path / "labels.tsv", "a dog\thttp://x.org/a.jpg\tdog,animal\t/m/0\t0.9\n")
    assert [caption.text for caption in read(labelled)[0]] == ["a dog"]
    with pytest.raises(BadInput, match=r"line 2 of .* holds no url"):
        read(written(tmp_path / "bad.tsv", "a\thttp://x.org/a.jpg\nb\n"))
    latin = written(tmp_path / "latin.tsv", b"caf\xe9\thttp://x.org/a.jpg\n")
    assert read(latin)[0][0].text == "caf\ufffd"


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def arrow(path: Path, rows: list[dict[str, Any]]) -> Path:
    """As Hugging Face's `datasets` writes them."""
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return path


PICTURES = [
    {"image": {"bytes": b"one", "path": "dog.jpg"}, "caption": ["a dog", "the dog"]},
    {"image": {"bytes": b"two", "path": None}, "caption": ["a cat"]},
    {"image": {"bytes": b"three", "path": "/home/somebody/b.jpg"}, "caption": []},
]


IMG2DATASET = [
    {"url": "http://x.org/a.jpg", "key": "000000000", "caption": "a dog", "status": "success", "width": 3},
    {"url": "https://x.org/b c.jpg", "key": "000000001", "caption": None, "status": "failed_to_download", "width": None},
    {"url": "http://x.org/c.jpg", "key": "000010000", "caption": "c", "status": "success", "width": 3},
]


def test_conceptual_captions_joined_to_downloads(tmp_path: Path) -> None:
    path = written(tmp_path / "cc.tsv", CC)
    (tmp_path / "out").mkdir()
    tables = [
        parquet(tmp_path / "table.parquet", IMG2DATASET),
        written(tmp_path / "table.json", IMG2DATASET),
        written(tmp_path / "table.jsonl", "\n".join(json.dumps(row) for row in IMG2DATASET)),
        written(
            tmp_path / "table.tsv",
            "url\tfile\tstatus\n" + "".join(f"{r['url']}\t{r['key']}\t{'200' if r['status'][0] == 's' else 404}\n" for r in IMG2DATASET),
        ),
        written(tmp_path / "map.json", {row["url"]: row["key"] for row in IMG2DATASET if row["status"] == "success"}),
        written(tmp_path / "map.pretty.json", json.dumps({r["url"]: r["key"] for r in IMG2DATASET if r["status"] == "success"}, indent=1)),
        tmp_path / "out",
    ]
    parquet(tmp_path / "out" / "00000.parquet", IMG2DATASET[:2])
    parquet(tmp_path / "out" / "00001.parquet", IMG2DATASET[2:])
    for table in tables:
        texts, counts = read(path, join=[table])
        assert [caption.image for caption in texts] == ["000000000", "", "000010000", ""], table
        assert counts == {"urls_not_downloaded": 2}
    urls = parquet(tmp_path / "urls.parquet", [{"URL": row["url"], "TEXT": row["caption"]} for row in IMG2DATASET])
    assert detect(urls) == "cc"
    assert shown(read(urls, join=[tables[0]])[0]) == [("0", "000000000", "a dog"), ("1", "", ""), ("2", "000010000", "c")]
    with pytest.raises(BadInput, match=r"the caption of row 0 of .* is a JSON list"):
        read(parquet(tmp_path / "lists.parquet", [{"url": "http://x.org/a.jpg", "caption": ["a", "b"]}]))
    with pytest.raises(BadInput, match=r"has no url column \(it has: picture, caption\)"):
        read(parquet(tmp_path / "other.parquet", [{"picture": "a.jpg", "caption": "a"}]), kind="cc")
    with pytest.raises(BadInput, match="no url was downloaded"):
        read(path, join=[written(tmp_path / "none.json", [dict(IMG2DATASET[1])])])
    with pytest.raises(BadInput, match="has no file name column"):
        read(path, join=[written(tmp_path / "half.json", [{"url": "http://x.org/a.jpg"}])])
    with pytest.raises(BadInput, match="is no readable parquet"):
        read(path, join=[written(tmp_path / "cut.parquet", (tmp_path / "table.parquet").read_bytes()[:-30])])


SBU_URLS = ["http://static.flickr.com/2723/4385058960_b0f291553e.jpg", "http://static.flickr.com/1/77_x.jpg"]
SBU_TEXTS = ["A wooden chair in the living room", 'two "dogs"\there']


def test_sbu(tmp_path: Path) -> None:
    wanted = [("0", "4385058960_b0f291553e.jpg", SBU_TEXTS[0]), ("1", "77_x.jpg", SBU_TEXTS[1])]
    path = written(tmp_path / "sbu-captions-all.json", {"image_urls": SBU_URLS, "captions": SBU_TEXTS, "user_ids": ["a", "b"]})
    assert detect(path) == "sbu" and shown(read(path)[0]) == wanted
    assert [caption.origins for caption in read(path)[0]] == [(("flickr", "4385058960"),), (("flickr", "77"),)]
    other = written(tmp_path / "s.json", {"user_ids": ["a", "b"], "captions": SBU_TEXTS, "image_urls": SBU_URLS})
    assert detect(other) == "sbu" and shown(read(other)[0]) == wanted

    folder = tmp_path / "sbu"
    folder.mkdir()
    captions = written(folder / "SBU_captioned_photo_dataset_captions.txt", "\r\n".join(SBU_TEXTS) + "\r\n")
    urls = written(folder / "SBU_captioned_photo_dataset_urls.txt", "\n".join(SBU_URLS) + "\n")
    for given_path in (captions, urls, folder):
        assert detect(given_path) == "sbu", given_path
        assert shown(read(given_path)[0]) == wanted

    listed = written(tmp_path / "list.txt", f"im/1.jpg\tt\tflickr_77\t{SBU_TEXTS[1]}\n")
    assert detect(listed) == "sbu" and shown(read(listed)[0]) == [("flickr_77", "im/1.jpg", SBU_TEXTS[1])]
    assert read(listed)[0][0].origins == (("flickr", "77"),)

    table = written(tmp_path / "table.json", [{"url": SBU_URLS[1], "key": "5", "status": "success"}])
    texts, counts = read(path, join=[table])
    assert [caption.image for caption in texts] == ["", "5"] and counts == {"urls_not_downloaded": 1}
    written(urls, SBU_URLS[0])
    with pytest.raises(BadInput, match="are not equally long: one ends after 1"):
        read(captions)
    with pytest.raises(BadInput, match="are not equally long"):
        read(written(tmp_path / "s.json", {"image_urls": SBU_URLS, "captions": SBU_TEXTS[:1]}), kind="sbu")


# ------------------------------------------------------------------------------------------------------------------- img2dataset


def tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def test_img2dataset(tmp_path: Path) -> None:
    wanted = [("000000000", "000000000.jpg", "a dog"), ("000000001", "", ""), ("000010000", "000010000.jpg", "c")]
    path = parquet(tmp_path / "t.parquet", IMG2DATASET)
    assert detect(path) == "img2dataset" and shown(read(path)[0]) == wanted
    (tmp_path / "shards").mkdir()
    parquet(tmp_path / "shards" / "00000.parquet", IMG2DATASET[:2])
    tar(tmp_path / "shards" / "00000.tar", {"000000000.txt": b"not read, the parquet is"})
    tar(tmp_path / "shards" / "00001.tar", {"000010000.jpg": b"", "000010000.json": b'{"caption": "unread"}', "000010000.txt": b"c"})
    assert detect(tmp_path / "shards") == "img2dataset"
    texts, counts = read(tmp_path / "shards")
    assert shown(texts) == wanted and counts == {"urls_not_downloaded": 1}

    shard = tar(
        tmp_path / "0.tar",
        {
            "../../etc/1.jpg": b"",
            "../../etc/1.txt": b"never unpacked",
            "./a/2.png": b"",
            "./a/2.json": b'{"caption": "b"}',
            "3.jpg": b"",
            "4.txt": b"no image \xff",
        },
    )
    assert detect(shard) == "img2dataset"
    texts, counts = read(shard)
    assert shown(texts) == [("../../etc/1", "../../etc/1.jpg", "never unpacked"), ("a/2", "a/2.png", "b"), ("4", "", "no image \ufffd")]
    assert counts == {"images_without_caption": 1} and not (tmp_path.parent.parent / "etc").exists()

    files = tmp_path / "files"
    (files / "00000").mkdir(parents=True)
    for row in IMG2DATASET[:2]:
        written(files / "00000" / f"{row['key']}.json", row)
    assert detect(files) == "img2dataset" and shown(read(files)[0]) == wanted[:2]

    with pytest.raises(BadInput, match="has no end; was it cut off"):
        read(written(tmp_path / "cut.tar", shard.read_bytes()[:1000]))
    with pytest.raises(BadInput, match="expected a caption of at most"):
        read(tar(tmp_path / "long.tar", {"1.txt": b"x" * (1 << 21)}))
    with pytest.raises(BadInput, match="has no key"):
        read(parquet(tmp_path / "nokey.parquet", [{"caption": "a"}]), kind="img2dataset")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="holds neither parquet files, nor tars"):
        read(tmp_path / "empty")


# ----------------------------------------------------------------------------------------------------------------- JSONL and CSV


def test_jsonl(tmp_path: Path) -> None:
    lines = [
        '{"image": "a.jpg", "caption": "a dog", "split": "train"}',
        "",
        '{"image": "b/c.jpg", "caption": ["one", "two"], "id": "x", "split": "val"}',
        '{"image": 7, "caption": "half \\ud83d", "id": null, "split": "val"}',
    ]
    wanted = [("0", "a.jpg", "a dog"), ("x-0", "b/c.jpg", "one"), ("x-1", "b/c.jpg", "two"), ("2", "7", "half \ud83d")]
    for content in ("\n".join(lines), "\ufeff" + "\r\n".join(lines)):
        path = written(tmp_path / "c.jsonl", content)
        assert detect(path) == "jsonl" and shown(read(path)[0]) == wanted
    rows = [json.loads(line) for line in lines if line]
    array = written(tmp_path / "array.json", rows[:2])
    assert detect(array) == "jsonl" and shown(read(array)[0]) == wanted[:3]
    texts, counts = read(path, split="val")
    assert [caption.id for caption in texts] == ["x-0", "x-1", "2"] and counts == {"texts_of_other_parts": 1}
    with pytest.raises(BadInput, match="has no part 'test' in its `split` column"):
        read(path, split="test")
    with pytest.raises(BadInput, match="has no `split` column; leave --split away"):
        read(written(tmp_path / "whole.jsonl", '{"image": "a.jpg", "caption": "one"}'), split="test")
    one = written(tmp_path / "one.jsonl", '{"image": "a.jpg", "captions": ["one", "two"]}')
    assert detect(one) == "jsonl" and [caption.text for caption in read(one)[0]] == ["one", "two"]
    for content, message in (
        ('{"image": "a", "caption": "b"}\n{"image": "a", "capt', "line 2 of .* is not JSON .* cut off"),
        ('{"image": "a", "caption": "b"}\n[1]', "line 2 of .* is a JSON list"),
        ('{"image": "a", "caption": "b"}\n{"picture": "a", "caption": "b"}', "has no image column"),
        ('{"image": ["a"], "caption": "b"}', "the image of line 1 of .* is"),
    ):
        with pytest.raises(BadInput, match=message):
            read(written(tmp_path / "bad.jsonl", content), kind="jsonl")


def test_csv(tmp_path: Path) -> None:
    tables = {
        'image,caption\r\na.jpg,"a dog, ""big"""\r\nb.jpg,"two\nlines"\r\n': [("0", "a.jpg", 'a dog, "big"'), ("1", "b.jpg", "two\nlines")],
        'image_name| comment_number| comment\n1.jpg| 0| a "dog | cat\n': [("0", "1.jpg", 'a "dog | cat')],
        "file_name\ttext\na.jpg\tit's 5\" long\n": [("0", "a.jpg", "it's 5\" long")],
        "id;filepath;caption\n7;a.jpg;x\n": [("7", "a.jpg", "x")],
    }
    for content, wanted in tables.items():
        path = written(tmp_path / "c.csv", content)
        assert detect(path) == "csv" and shown(read(path)[0]) == wanted
    with pytest.raises(BadInput, match=r"row 0 of .* has 3 cells, the header 2"):
        read(written(tmp_path / "bad.csv", "image,caption\na.jpg,a dog, big\n"))
    with pytest.raises(BadInput, match="has no caption column"):
        read(written(tmp_path / "bad.csv", "image,words\na.jpg,a dog\n"), kind="csv")
    for content, message in (
        ('image,caption\na.jpg,"a dog\nb.jpg,two\n', "row 0 opens a quote that is never closed"),
        ('image,caption\na.jpg,x\nb.jpg,"big" dog\n', "row 1 has a quote inside a quoted cell; write it twice"),
    ):
        with pytest.raises(BadInput, match=message):
            read(written(tmp_path / "bad.csv", content))


def test_every_source_refuses_what_it_cannot_use(tmp_path: Path) -> None:
    for kind, reader in CAPTIONS.items():
        with pytest.raises(BadInput):
            list(reader(tmp_path / "nowhere", split=None, join=(), counts=Counter()))
        if kind not in ("cc", "sbu", "vg"):
            with pytest.raises(BadInput, match="leave --join away"):
                list(reader(written(tmp_path / "file", COCO), split=None, join=(tmp_path,), counts=Counter()))


def test_names_of_many_ids() -> None:
    rng = random.Random(0)
    ids: list[Any] = [rng.randrange(-(2**62), 2**62) for _ in range(500)] + [f"id {n}" for n in range(500)] + [0, -1, 2**70]
    table = NameTable("image")
    for value in ids:
        table.add(value, f"name of {value}")
    assert table.find(["nothing", 3, *ids[::2]]) == [None, None, *(f"name of {value}" for value in ids[::2])]
    assert table.never_asked() == len(ids) - len(ids[::2])
    assert NameTable("image").find([1]) == [None]


# ------------------------------------------------------------------------------------------------------------------------ fuzzing


def good_files(folder: Path) -> dict[str, bytes]:
    """One right file of each kind."""
    region = {"regions": [{"region_id": 1, "image_id": 1, "phrase": "a b", "x": 1, "y": 1, "width": 2, "height": 2}], "id": 1}
    return {
        "coco": json.dumps(COCO).encode(),
        "karpathy": json.dumps(KARPATHY).encode(),
        "vg": json.dumps([region, region]).encode(),
        "cc": CC.encode(),
        "sbu": json.dumps({"image_urls": SBU_URLS, "captions": SBU_TEXTS}).encode(),
        "img2dataset": tar(folder / "x.tar", {"1.jpg": b"x", "1.json": b'{"caption": "b"}', "2.jpg": b"", "2.txt": b"c"}).read_bytes(),
        "jsonl": b'{"image": "a.jpg", "caption": ["a", "b"]}\n{"image": "b.jpg", "caption": "c"}\n',
        "csv": b'image,caption\na.jpg,"a dog"\nb.jpg,c\n',
        "parquet": parquet(folder / "x.parquet", PICTURES).read_bytes(),
        "datasets": arrow(folder / "x.arrow", PICTURES).read_bytes(),
        "folder": b"a dog\n",
        "token": b"1.jpg#0\ta dog\n1.jpg#1\tthe dog\n2.jpg#0\ta cat\n",
    }


def right_or_ours(path: Path, kind: str | None, join: Sequence[Path] = ()) -> None:
    try:
        texts, _ = read(path, kind=kind, join=join)
    except BadInput as error:
        assert 20 < len(str(error)) < 2000
    else:
        for caption in texts:
            assert isinstance(caption.id, str) and isinstance(caption.image, str) and isinstance(caption.text, str)


@pytest.mark.parametrize("kind", sorted(CAPTIONS))
@given(data=st.data())
def test_fuzzed_files_give_captions_or_an_error_of_ours(tmp_path: Path, fuzzing: ModuleType, kind: str, data: st.DataObject) -> None:
    content = fuzzing.damaged(data, good_files(tmp_path)[kind])
    if kind not in ("img2dataset", "cc") and data.draw(st.booleans()):
        content = gzip.compress(content) if data.draw(st.booleans()) else fuzzing.damaged(data, gzip.compress(content))
    suffixes = {"img2dataset": ".tar", "parquet": ".parquet", "datasets": ".arrow"}
    path = written(tmp_path / f"fuzzed{suffixes.get(kind, '.txt')}", content)
    right_or_ours(path, kind)
    right_or_ours(path, None)


DOCUMENTS: dict[str, Any] = {
    "coco": COCO,
    "karpathy": KARPATHY,
    "vg": [{"regions": [{"region_id": 1, "image_id": 1, "phrase": "a b", "x": 1, "y": 1, "width": 2, "height": 2}], "id": 1}],
    "sbu": {"image_urls": SBU_URLS, "captions": SBU_TEXTS},
    "img2dataset": IMG2DATASET,
    "jsonl": [{"image": "a.jpg", "caption": ["a", "b"], "id": 3}],
}


@pytest.mark.parametrize("kind", sorted(DOCUMENTS))
@given(data=st.data())
def test_fuzzed_documents_give_captions_or_an_error_of_ours(tmp_path: Path, fuzzing: ModuleType, kind: str, data: st.DataObject) -> None:
    document = fuzzing.with_another_value(data, DOCUMENTS[kind])
    path = written(tmp_path / "fuzzed.json", fuzzing.as_json(document))
    if kind == "vg" and data.draw(st.booleans()):
        images = [{"image_id": 1, "coco_id": None, "flickr_id": 77}, {"image_id": 2, "coco_id": 9}]
        written(tmp_path / "image_data.json", fuzzing.as_json(fuzzing.with_another_value(data, images)))
    right_or_ours(path, kind)
    right_or_ours(path, None)


@given(data=st.data())
def test_fuzzed_tables_of_downloads_are_read_or_refused(tmp_path: Path, fuzzing: ModuleType, data: st.DataObject) -> None:
    """What --join names, in each of its forms, and the same as the captions themselves."""
    form = data.draw(st.sampled_from(["parquet", "rows.parquet", "json", "jsonl", "map", "csv", "tsv"]))
    rows = fuzzing.with_another_value(data, IMG2DATASET)
    path = tmp_path / "table"
    if form == "parquet":
        content = fuzzing.damaged(data, parquet(path, IMG2DATASET).read_bytes())
    elif form == "rows.parquet":
        try:
            content = parquet(path, rows).read_bytes()
        except (pa.ArrowException, TypeError, ValueError, AttributeError, OverflowError):
            return
    elif form == "json":
        content = fuzzing.as_json(rows)
    elif form == "jsonl":
        content = b"\n".join(map(fuzzing.as_json, rows))
    elif form == "map":
        content = fuzzing.as_json(fuzzing.with_another_value(data, {row["url"]: row["key"] for row in IMG2DATASET}))
    else:
        mark = "," if form == "csv" else "\t"
        table = [mark.join(IMG2DATASET[0]), *(mark.join(f"{value}" for value in row.values()) for row in IMG2DATASET)]
        content = fuzzing.damaged(data, "\n".join(table).encode())
    written(path, content)
    right_or_ours(written(tmp_path / "cc.tsv", CC), "cc", join=[path])
    right_or_ours(path, None)
    right_or_ours(path, "img2dataset")
    right_or_ours(path, "cc")


@given(content=st.binary(max_size=300) | st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_fuzz_gives_captions_or_an_error_of_ours(tmp_path: Path, content: bytes) -> None:
    path = written(tmp_path / "anything", content)
    right_or_ours(path, None)
    for kind in CAPTIONS:
        right_or_ours(path, kind)
