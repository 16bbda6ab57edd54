"""Text databases: published ones read as they are; ours built, killed, repeated, pickled, damaged."""

import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lmdb
import lz4.frame
import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from uniter.datasets.build_text import build_text_db
from uniter.datasets.captions.caption import Caption, key_maker
from uniter.datasets.errors import BadInput, SettingsDiffer, UniterError
from uniter.datasets.text_db import MissingExample, TextDB, decode_text_record, encode_text_record
from uniter.datasets.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def bert() -> Tokenizer:
    return Tokenizer.load()


def some_captions(count: int, seed: int = 0) -> list[Caption]:
    rng = random.Random(seed)
    words = "a red green disc square left right of near the big small thing , .".split()
    return [
        Caption(str(rng.randrange(10**6) * 1000 + number), f"folder/image_{rng.randrange(count // 3 + 1):06d}.jpg", " ".join(rng.choices(words, k=9)))
        for number in range(count)
    ]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file() and path.name != "lock.mdb"}


# ---------------------------------------------------------------------------------------------------------------- published ones


def test_golden_published_databases_of_the_data_set(uniter_data_golden: Path) -> None:
    expected = json.loads((uniter_data_golden / "expected.json").read_text())["txt_db"]
    assert expected
    for name, wanted in expected.items():
        database = TextDB(uniter_data_golden / wanted["path"])
        assert dict(database.items()) == wanted["records"], name
        assert list(database) == list(wanted["id2len"]) and sorted(database.ids) == wanted["stored_keys"]
        assert dict(zip(database.ids, database.lengths.tolist(), strict=True)) == wanted["id2len"]
        assert (database.cls_id, database.sep_id, database.mask_id) == (wanted["cls"], wanted["sep"], wanted["mask"])
        assert list(database.v_range) == wanted["v_range"] and database.meta == wanted["meta"] and database.header is None
        assert database.tokenizer_name == wanted["meta"]["tokenizer"]
        for longest, ids in wanted["ids_by_max_txt_len"].items():
            kept = [i for i, n in zip(database.ids, database.lengths, strict=True) if longest == "-1" or n <= int(longest)]
            # The original's RefCOCO data set keeps strictly shorter ones only (facts 8.1, 11); the reader's rule is one for all.
            if name.startswith("refcoco"):
                assert set(ids) <= set(kept)
            else:
                assert kept == ids
        for place, example in enumerate(database.ids):
            images = wanted["records"][example]["img_fname"]
            assert database.image_key(place) == (tuple(images) if isinstance(images, list) else images)
            assert database.index_of(example) == place
        if wanted["img2txts"] is not None and "error" not in wanted["img2txts"]:
            texts = {image: [database.ids[place] for place in places] for image, places in database.images().items()}
            assert texts == wanted["img2txts"] and list(texts) == list(wanted["img2txts"])


def test_golden_published_databases_of_the_task_set(uniter_tasks_golden: Path) -> None:
    expected = json.loads((uniter_tasks_golden / "expect_txt.json").read_text())
    assert expected
    for name, wanted in expected.items():
        database = TextDB(uniter_tasks_golden / "txt_db" / name)
        assert (database.cls_id, database.sep_id, database.mask_id, list(database.v_range)) == (
            wanted["cls"],
            wanted["sep"],
            wanted["mask"],
            wanted["v_range"],
        )
        for table in ("id2len_all", "id2len_qa", "id2len_qar"):
            if table in wanted:
                lengths = TextDB(uniter_tasks_golden / "txt_db" / name, lengths=None if table == "id2len_all" else table).lengths
                assert dict(zip(database.ids, lengths.tolist(), strict=True)) == wanted[table]
        for example, record in wanted["items"].items():
            assert {field: value for field, value in record.items() if field in database[example]} == database[example]


def test_golden_captions_give_the_original_records(uniter_data_golden: Path, tmp_path: Path) -> None:
    wanted = json.loads((uniter_data_golden / "expected.json").read_text())["txt_db"]["pretrain_toy_train"]
    tokenizer = Tokenizer.load(uniter_data_golden / wanted["meta"]["tokenizer"])
    captions = [Caption(example, record["img_fname"], record["sent"]) for example, record in wanted["records"].items()]
    build_text_db(captions, tmp_path / "db", tokenizer=tokenizer, key="{name}")
    database = TextDB(tmp_path / "db")
    assert dict(database.items()) == wanted["records"]
    assert json.loads((tmp_path / "db" / "id2len.json").read_text()) == wanted["id2len"]
    assert json.loads((tmp_path / "db" / "txt2img.json").read_text()) == wanted["txt2img"]
    texts = json.loads((tmp_path / "db" / "img2txts.json").read_text())
    assert texts == wanted["img2txts"] and list(texts) == list(wanted["img2txts"])
    database.close()
    # As the original reads it: an LMDB of lz4 frames, and `bert` in meta.json.
    with lmdb.open(str(tmp_path / "db"), readonly=True, lock=False) as environment, environment.begin() as transaction:
        stored = {key.decode(): msgpack.loads(lz4.frame.decompress(value), raw=False) for key, value in transaction.cursor()}
    assert stored == wanted["records"]
    meta = json.loads((tmp_path / "db" / "meta.json").read_text())
    assert {name: meta[name] for name in ("UNK", "CLS", "SEP", "MASK", "v_range")} == {
        name: wanted["meta"][name] for name in ("UNK", "CLS", "SEP", "MASK", "v_range")
    }
    assert meta["bert"] == meta["toker"] == meta["tokenizer"] == tokenizer.name
