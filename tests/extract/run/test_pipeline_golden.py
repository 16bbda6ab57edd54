"""The golden records through the command, from raw picture and weight file to the database, for each layout that weights come in.

The folder that BUTD_GOLDEN names may hold another set; its pictures, seed and calibration come from its golden.json.
"""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from uniter.cli.extract import main
from uniter.datasets.image_db import ImageDB
from uniter.extract.detector.detectron import Detectron2Detector

pytest.importorskip("detectron2", reason="Detectron2 is brought by `uniter-extract --install-detectron2`")

OTHER_LAYOUTS = ("detectron2", "huggingface", "milvlg")
RECORDS = {"record36": ["--min-boxes", "36", "--max-boxes", "36"], "record10_100": []}


@pytest.fixture(scope="module")
def write_weights(generator: Any, butd_golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`write_weights(layout)`: the set's weights in a file of that layout."""
    facts = json.loads((butd_golden / "golden.json").read_text(encoding="utf-8"))
    state = generator.make_state_dict(facts["seed"], str(butd_golden / facts["calib"]))

    def tensors(arrays: dict[str, Any]) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}

    def write(layout: str) -> Path:
        folder = tmp_path_factory.mktemp("weights")
        if layout == "safetensors":
            path = folder / "butd.safetensors"
            save_file(tensors(state), path)
        elif layout == "detectron2":
            path = folder / "faster_rcnn_from_caffe_attr.pkl"
            path.write_bytes(pickle.dumps({"model": dict(state), "__author__": "generator"}))
        elif layout == "huggingface":
            path = folder / "pytorch_model.bin"
            torch.save(tensors(generator.to_hf(state)), path)
        else:
            path = folder / "bua-caffe-frcn-r101.pth"
            torch.save({"model": tensors(generator.to_milvlg(state))}, path)
        return path

    return write


@pytest.fixture(autouse=True)
def remember_the_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the network says of a picture does not depend on how many regions stay: ask it once for both kinds of record."""
    said: dict[bytes, Any] = {}
    detect = Detectron2Detector.detect

    def remembering(self: Detectron2Detector, images: Any, *, boxes: Any = None) -> Any:
        question = b"".join(image.pixels.tobytes() for image in images)
        if question not in said:
            said[question] = detect(self, images, boxes=boxes)
        return said[question]

    monkeypatch.setattr(Detectron2Detector, "detect", remembering)
    monkeypatch.setenv("UNITER_CACHE", str(tmp_path / "cache"))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("layout", ["safetensors", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHER_LAYOUTS)])
def test_golden_records_through_the_command(layout: str, write_weights: Callable[[str], Path], butd_golden: Path, tmp_path: Path) -> None:
    names = list(json.loads((butd_golden / "golden.json").read_text(encoding="utf-8"))["images"])
    (tmp_path / "pictures.txt").write_text("".join(f"{butd_golden.resolve() / name}\n" for name in names), encoding="utf-8")
    weights = write_weights(layout)
    for kind, options in RECORDS.items():
        out = tmp_path / kind
        arguments = [
            str(tmp_path / "pictures.txt"),
            str(out),
            "--weights",
            str(weights),
            "--device",
            "cpu",
            "--batch-size",
            "2",
            "--strict",
        ]
        result = CliRunner().invoke(main, [*arguments, *options], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        database = ImageDB(out)
        assert sorted(database.keys_list) == sorted(Path(name).stem for name in names)
        for name in names:
            compare(database, butd_golden, kind, Path(name).stem)
        header = database.header
        assert header is not None and header["label_classes"] == 1601 and header["box_kind"] == "proposal"


def compare(database: ImageDB, folder: Path, kind: str, stem: str) -> None:
    """The tolerances of the set's README: rows matched by box, all but one; then features 6e-3, the others 3e-3."""
    expected = np.load(folder / f"{kind}_{stem}.npz", allow_pickle=False)
    record = database.read(stem, fields=("features", "norm_bb", "conf", "soft_labels"))
    wanted = expected["norm_bb"].astype(np.float32)
    distance = np.abs(wanted[:, None] - np.asarray(record.norm_bb, dtype=np.float32)[None]).max(axis=2)
    best = distance.argmin(axis=1)
    matched = distance[np.arange(len(wanted)), best] <= 1e-3
    assert matched.sum() >= len(wanted) - 1, f"{kind} {stem}: {matched.sum()} of {len(wanted)} boxes matched"
    assert abs(len(record) - len(wanted)) <= 1
    rows, ours = np.flatnonzero(matched), best[matched]
    assert len(set(ours.tolist())) == len(ours)
    assert record.soft_labels is not None
    for name, tolerance in (("features", 6e-3), ("conf", 3e-3), ("soft_labels", 3e-3)):
        theirs = expected[name].astype(np.float32)[rows].reshape(len(rows), -1)
        mine = np.asarray(getattr(record, name), dtype=np.float32)[ours].reshape(len(rows), -1)
        assert np.abs(theirs - mine).max() <= tolerance, f"{kind} {stem}: {name}"
    assert (np.diff(np.asarray(record.conf, dtype=np.float32)) <= 0).all()
