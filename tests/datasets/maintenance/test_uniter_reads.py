"""What we convert to UNITER's layout, read by a reader that follows the rules of UNITER's own data code and shares nothing with ours.

The rules are those of facts on ChenRocks/UNITER: `DetectFeatLmdb`, `TxtTokLmdb`, `ReTxtTokLmdb`, `get_ids_and_lens`, the data sets'
`lens`. A file or key that they would miss is a KeyError or FileNotFoundError here as there.
"""

import io
import json
import pickle
from collections import defaultdict
from pathlib import Path
from types import ModuleType
from typing import Any

import lmdb
import lz4.frame
import msgpack
import numpy as np
import pytest
from click.testing import CliRunner

from uniter.cli.build_db import main as build_main
from uniter.cli.db import main as db_main
from uniter.datasets.errors import BadInput
from uniter.datasets.image_db import ImageDB
from uniter.datasets.maintenance.convert import convert
from uniter.datasets.maintenance.convert_texts import convert_texts, holds_texts
from uniter.datasets.text_db import TextDB


def arrays_of_msgpack_numpy(found: dict[Any, Any]) -> Any:
    """msgpack-numpy's `decode`."""
    if b"nd" not in found:
        return found
    assert found[b"nd"] is True and found[b"kind"] in (b"", None)
    return np.ndarray(buffer=found[b"data"], dtype=np.dtype(found[b"type"]), shape=found[b"shape"])


class OriginalRegions:
    """`DetectFeatLmdb`."""

    def __init__(
        self, folder: Path, *, conf_th: float = 0.2, max_bb: int = 100, min_bb: int = 10, num_bb: int = 36, compress: bool = False
    ) -> None:
        if conf_th == -1:
            name = f"feat_numbb{num_bb}"
            self.name2nbb: Any = defaultdict(lambda: num_bb)
        else:
            name = f"feat_th{conf_th}_max{max_bb}_min{min_bb}"
            self.name2nbb = json.loads((folder / f"nbb_th{conf_th}_max{max_bb}_min{min_bb}.json").read_text())
        self.compress = compress
        environment = lmdb.open(str(folder / (name + "_compressed" * compress)), readonly=True, create=False, lock=False)
        self.transaction = environment.begin(buffers=True)

    def dump(self, name: str) -> dict[str, np.ndarray]:
        value, rows = self.transaction.get(name.encode()), self.name2nbb[name]
        assert value is not None, name
        if self.compress:
            with np.load(io.BytesIO(value)) as loaded:
                arrays = {field: loaded[field] for field in loaded.files}
        else:
            arrays = msgpack.loads(value, raw=False, object_hook=arrays_of_msgpack_numpy)
        return {field: (array.astype(np.float32) if array.dtype == np.float16 else array)[:rows, ...] for field, array in arrays.items()}

    def __getitem__(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        dump = self.dump(name)
        return dump["features"], dump["norm_bb"]


class OriginalTexts:
    """`TxtTokLmdb`."""

    def __init__(self, folder: Path, *, max_txt_len: int = 60, lengths: str = "id2len") -> None:
        self.folder = folder
        all_lengths = json.loads((folder / f"{lengths}.json").read_text())
        self.id2len = {name: length for name, length in all_lengths.items() if max_txt_len == -1 or length <= max_txt_len}
        self.transaction = lmdb.open(str(folder), readonly=True, create=False, lock=False).begin(buffers=True)
        meta = json.loads((folder / "meta.json").read_text())
        self.special = meta["CLS"], meta["SEP"], meta["MASK"], tuple(meta["v_range"])
        self.tokenizer = meta["bert"]  # which pretrain.py, train_vqa.py and the like assert to be equal
        self.txt2img = json.loads((folder / "txt2img.json").read_text())
        self.img2txts = json.loads((folder / "img2txts.json").read_text())

    def __getitem__(self, name: str) -> dict[str, Any]:
        value = self.transaction.get(name.encode())
        assert value is not None, name
        return dict(msgpack.loads(lz4.frame.decompress(value), raw=False))


def lens(texts: OriginalTexts, regions: OriginalRegions) -> list[int]:
    """What `DetectFeatTxtTokDataset` computes at once for all its examples."""
    total = []
    for name, length in texts.id2len.items():
        images = texts.txt2img[name]
        total.append(length + sum(regions.name2nbb[image] for image in ([images] if isinstance(images, str) else images)))
    return total


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("fixed", [False, True])
def test_texts_and_regions_fit_in_the_original_reader(tmp_path: Path, made_up: ModuleType, compressed: bool, fixed: bool) -> None:
    texts, images = made_up.World().write(tmp_path, pictures=7)
    choice = ["--conf-threshold", "-1", "--num-boxes", "36"] if fixed else []
    done = CliRunner().invoke(
        db_main,
        ["convert", str(images), str(tmp_path / "img_db/train"), "--to", "uniter-compressed" if compressed else "uniter", *choice],
    )
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(db_main, ["convert", str(texts), str(tmp_path / "txt_db/train.db"), "--to", "uniter", "--json"])
    assert done.exit_code == 0, done.output
    mine, pictures = TextDB(texts), ImageDB(images)
    assert json.loads(done.stdout)["texts"] == len(mine) and json.loads(done.stdout)["notes"] == []

    regions = OriginalRegions(tmp_path / "img_db/train", compress=compressed, conf_th=-1 if fixed else 0.2)
    original = OriginalTexts(tmp_path / "txt_db/train.db")
    assert list(original.id2len) == list(mine.ids) and list(original.id2len.values()) == mine.lengths.tolist()
    assert len(lens(original, regions)) == len(mine)
    assert original.special == (mine.cls_id, mine.sep_id, mine.mask_id, mine.v_range) and original.tokenizer == mine.tokenizer_name
    for row, example in enumerate(mine.ids):
        record, wanted = original[example], mine[example]
        assert record["img_fname"] == original.txt2img[example] == f"{wanted.pop('img_fname')}.npz"
        assert {**record, "img_fname": None} == {**wanted, "img_fname": None}
        features, boxes = regions[record["img_fname"]]
        stored = pictures[str(mine.image_key(row))]
        np.testing.assert_array_equal(features, stored.features.astype(np.float32))
        np.testing.assert_array_equal(boxes, stored.norm_bb.astype(np.float32))
        assert example in original.img2txts[record["img_fname"]]
        assert regions.dump(record["img_fname"])["soft_labels"].shape == stored.soft_labels.shape


def test_the_same_again_is_complete_and_something_else_is_refused(tmp_path: Path, made_up: ModuleType) -> None:
    texts, images = made_up.World().write(tmp_path, pictures=3)
    out = tmp_path / "out.db"
    assert not convert_texts(texts, out, to="uniter").already_complete
    assert convert_texts(texts, out, to="uniter").already_complete
    assert not convert_texts(texts, out, to="uniter", overwrite=True).already_complete
    assert holds_texts(out) and holds_texts(texts) and not holds_texts(images) and not holds_texts(tmp_path / "nowhere")
    # What is in UNITER's layout already stays as it is, record by record.
    again = tmp_path / "again.db"
    convert_texts(out, again, to="uniter")
    for name in ("id2len.json", "txt2img.json", "img2txts.json", "meta.json"):
        assert json.loads((again / name).read_text()) == json.loads((out / name).read_text()), name
    with pytest.raises(BadInput, match=r"unknown layout of texts 'lmdb' \(known: parquet, uniter\); name one with --to"):
        convert_texts(texts, tmp_path / "x", to="lmdb")
    done = CliRunner().invoke(db_main, ["convert", str(texts), str(tmp_path / "y"), "--to", "uniter", "--keep-all"])
    assert done.exit_code == 2 and "--keep-all is about regions, and IN is a text database; leave it out" in done.stderr
    with pytest.raises(BadInput, match="inside the source"):
        convert_texts(texts, texts / "inside.db", to="uniter")


INSTANCES = {
    "images": [{"id": number, "file_name": f"COCO_train2014_{number:012d}.jpg", "height": 440, "width": 440} for number in (5, 6, 7)],
    "annotations": [
        {"id": 10 * image + k, "image_id": image, "bbox": [k, k, 30, 40], "category_id": 1, "area": 1200, "iscrowd": 0}
        for image in (5, 6, 7)
        for k in range(2)
    ],
    "categories": [{"id": 1, "name": "dog", "supercategory": "animal"}],
}


def refs() -> list[dict[str, Any]]:
    listed = []
    for number, (image, split) in enumerate(((5, "val"), (6, "train"), (7, "val"))):
        sentences = [{"sent_id": 10 * number + k, "sent": text} for k, text in enumerate(("left dog", "\x01"))]
        one = {"ref_id": number, "ann_id": 10 * image + 1, "image_id": image, "split": split, "sentences": sentences, "category_id": 1}
        listed.append({**one, "sent_ids": [row["sent_id"] for row in sentences]})
    return listed


def test_referring_expressions_hold_the_split_only_and_every_sentence_is_there(tmp_path: Path) -> None:
    """`ReTxtTokLmdb` looks up the length of every sentence of refs.json; our builder leaves empty ones out."""
    (tmp_path / "refs(unc).p").write_bytes(pickle.dumps(refs()))
    (tmp_path / "instances.json").write_text(json.dumps(INSTANCES))
    out, key = tmp_path / "refcoco_val.db", "visual_grounding_coco_gt_{id:012d}.npz"
    words = [tmp_path / "refs(unc).p", out, "--task", "refcoco", "--split", "val", "--join", tmp_path / "instances.json", "--key", key]
    done = CliRunner().invoke(build_main, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    assert [image["id"] for image in json.loads((out / "images.json").read_text())] == [5, 7]
    assert {row["image_id"] for row in json.loads((out / "annotations.json").read_text())} == {5, 7}

    report = convert_texts(out, tmp_path / "uniter.db", to="uniter")
    assert report.texts == 2 and report.notes == []
    original = OriginalTexts(tmp_path / "uniter.db")
    read = {
        name: json.loads((tmp_path / "uniter.db" / f"{name}.json").read_text()) for name in ("refs", "images", "annotations", "categories")
    }
    pictures, annotations = ({row["id"]: row for row in read[name]} for name in ("images", "annotations"))
    sentences = [str(number) for ref in read["refs"] for number in ref["sent_ids"] if original.id2len[str(number)] < 60]
    assert sentences == ["0", "20"]
    for sentence in sentences:
        record = original[sentence]
        place = pictures[record["image_id"]]["ann_ids"].index(record["ann_id"])
        assert annotations[record["ann_id"]]["bbox"] == record["bbox"] and place == 1
        assert record["img_fname"] == f"visual_grounding_coco_gt_{record['image_id']:012d}.npz"


def test_other_keys_of_referring_expressions_are_said(tmp_path: Path) -> None:
    (tmp_path / "refs(unc).p").write_bytes(pickle.dumps(refs()))
    (tmp_path / "instances.json").write_text(json.dumps(INSTANCES))
    words = [tmp_path / "refs(unc).p", tmp_path / "a.db", "--task", "refcoco", "--join", tmp_path / "instances.json"]
    assert CliRunner().invoke(build_main, [str(word) for word in words]).exit_code == 0
    (note,) = convert_texts(tmp_path / "a.db", tmp_path / "b.db", to="uniter").notes
    assert "--key 'visual_grounding_coco_gt_{id:012d}.npz'" in note


@pytest.mark.parametrize("task", ["nlvr2", "ve", "vqa", "vcr"])
def test_texts_of_tasks_keep_their_fields_and_lengths(tmp_path: Path, made_up: ModuleType, task: str) -> None:
    """NLVR2 and VCR are about two images; VCR has two tables of lengths and no `input_ids` alone."""
    world = made_up.World()
    world.write(tmp_path, pictures=6)
    source, out = world.write_task(tmp_path, task, count=20), tmp_path / "uniter.db"
    meta = json.loads((source / "meta.json").read_text())
    (source / "meta.json").write_text(json.dumps({**meta, "task": task}))
    report = convert_texts(source, out, to="uniter")
    assert [note.split(":")[0] for note in report.notes] == (
        ["UNITER's train_vqa.py reads utils/ans2label.json of its own repository"] if task == "vqa" else []
    )
    mine = TextDB(source)
    tables = ("id2len_qa", "id2len_qar") if task == "vcr" else ("id2len",)
    for name in tables:
        assert list(json.loads((out / f"{name}.json").read_text()).values()) == TextDB(source, lengths=name).lengths.tolist()
    original = OriginalTexts(out, max_txt_len=-1, lengths=tables[0])
    for example in mine.ids:
        wanted, record = mine[example], original[example]
        images = wanted["img_fname"]
        wanted["img_fname"] = f"{images}.npz" if isinstance(images, str) else [f"{name}.npz" for name in images]
        assert record == wanted and original.txt2img[example] == wanted["img_fname"]


# ------------------------------------------------------------------------------------------------ the official converter's own output


def test_golden_regions_there_and_back_read_as_the_official_classes_read_them(uniter_data_golden: Path, tmp_path: Path) -> None:
    compared = 0
    for split in sorted(folder for folder in (uniter_data_golden / "img_db").iterdir() if folder.is_dir()):
        (folder,) = [path for path in split.glob("feat_th*") if not path.name.endswith("_compressed")]
        ours, back = tmp_path / f"{split.name}.lmdb", tmp_path / "img_db" / split.name
        convert(folder, ours, to="lmdb")
        convert(ours, back, to="uniter")
        official, mine = OriginalRegions(split), OriginalRegions(back)
        for key in ImageDB(ours).keys_list:
            compared += 1
            wanted, found = official.dump(key), mine.dump(key)
            assert wanted.keys() == found.keys()
            for field, array in wanted.items():
                np.testing.assert_array_equal(found[field], array.reshape(found[field].shape), err_msg=f"{key} {field}")
    assert compared


def test_golden_texts_are_the_same_after_conversion(uniter_data_golden: Path, tmp_path: Path) -> None:
    compared = 0
    for path in sorted((uniter_data_golden / "txt_db").glob("*.db")):
        out = tmp_path / path.name
        convert_texts(path, out, to="uniter")
        for name in path.glob("*.json"):
            compared += 1
            assert json.loads((out / name.name).read_text()) == json.loads(name.read_text()), name
        official, mine = (lmdb.open(str(folder), readonly=True, lock=False).begin() for folder in (path, out))
        records = [{key: msgpack.loads(lz4.frame.decompress(value)) for key, value in one.cursor()} for one in (official, mine)]
        assert records[0] == records[1]
    assert compared
