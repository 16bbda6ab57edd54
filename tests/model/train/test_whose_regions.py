"""A run knows whose regions it learns from and what its databases held; what is known and different is refused, what is not is accepted."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from uniter.datasets.batches.corpus import open_corpus
from uniter.datasets.errors import BadInput, SettingsDiffer
from uniter.datasets.image_db.database import ImageDB
from uniter.datasets.image_db.origin import RegionOrigin, origins_of
from uniter.datasets.image_db.records import encode_record
from uniter.datasets.maintenance.copying import write_regions
from uniter.model import load
from uniter.model.checkpoints.export import export_run
from uniter.model.evaluation.pretrained import evaluate_run
from uniter.model.settings.settings import TrainSettings
from uniter.model.train import fit, runs
from uniter.model.train.fit import check_detector, tokenizer_of_texts
from uniter.model.train.pretraining import open_data, pretrain

Make = Callable[..., TrainSettings]
SHORT: dict[str, Any] = {"steps": 4, "validate_every": 4}
ONE, OTHER = "1" * 64, "2" * 64


def of_detector(databases: tuple[Path, Path], folder: Path, name: str | None, weights: str | None) -> list[dict[str, Any]]:
    """A corpus of the databases, whose regions say that they are of this detector."""
    texts, images = databases
    copy = folder / f"{name}-{(weights or 'unknown')[:1]}.lmdb"
    shutil.copytree(images, copy)
    header = json.loads((copy / "header.json").read_text())
    header |= {"detector": name, "weights_sha256": weights, "selection": {"min_boxes": 4}}
    (copy / "header.json").write_text(json.dumps(header))
    return [{"name": "toy", "text": [str(texts)], "images": [str(copy)]}]


def test_names_count_only_where_weights_are_not_known() -> None:
    named = {weights: RegionOrigin("a", weights) for weights in (ONE, OTHER, None)}
    assert named[ONE].is_another(named[OTHER]) and not named[ONE].is_another(RegionOrigin("b", ONE))
    assert not named[ONE].is_another(named[None]) and named[ONE].is_another(RegionOrigin("b"))
    assert RegionOrigin.from_dict(named[ONE].to_dict()) == named[ONE]
    assert RegionOrigin.of_header({"feature_width": 4}) is None and RegionOrigin.from_dict("a") is None


def test_the_detector_travels_from_the_header_into_every_export(small: Make, databases: tuple[Path, Path], tmp_path: Path) -> None:
    pretrain(small(**SHORT, corpora=of_detector(databases, tmp_path, "a", ONE)), tmp_path / "run")
    known = RegionOrigin("a", ONE, {"min_boxes": 4})
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["detector"] == known.to_dict()
    export_run(str(tmp_path / "run"), "hub", tmp_path / "hub")
    export_run(str(tmp_path / "hub"), "published", tmp_path / "flat.pt")
    for place in ("run", "run/checkpoints/step-4", "hub", "flat.pt"):
        found = load(tmp_path / place)
        assert (found.detector, found.task) == (known, "pretrain") and found.tokenizer is not None and found.fresh == ()
    assert "a (weights 111111111111)" in (tmp_path / "hub" / "README.md").read_text()


def test_another_detector_must_be_meant(small: Make, databases: tuple[Path, Path], tmp_path: Path) -> None:
    mine, others = (of_detector(databases, tmp_path, "a", weights) for weights in (ONE, OTHER))
    run = tmp_path / "run"
    pretrain(small(**SHORT, corpora=mine), run)
    later = small(**SHORT, corpora=others, model={}, **{"from": str(run)})
    with pytest.raises(BadInput, match=r"run learnt from the regions of a \(weights 1111.*these are of a \(weights 2222.*--other-detector"):
        pretrain(later, tmp_path / "later")
    assert not (tmp_path / "later").exists()
    meant = later.model_copy(update={"other_detector": True})
    pretrain(meant, tmp_path / "later")
    learnt = load(tmp_path / "later").detector
    assert learnt is not None and learnt.weights_sha256 == OTHER
    pretrain(later, tmp_path / "later")  # what the run was begun with need not be repeated
    databases_of = {name: corpora[0] for name, corpora in (("mine", mine), ("others", others))}
    asked: dict[str, Any] = {"candidates": 4, "device": "cpu"}
    evaluate_run(str(run), text=databases_of["mine"]["text"], images=databases_of["mine"]["images"], **asked)
    with pytest.raises(BadInput, match="--other-detector"):
        evaluate_run(str(run), text=databases_of["others"]["text"], images=databases_of["others"]["images"], **asked)
    both = [{**mine[0], "images": [*mine[0]["images"], *others[0]["images"]]}]
    with pytest.raises(BadInput, match="the region databases are of several detectors"):
        pretrain(small(**SHORT, corpora=both), tmp_path / "both")


def test_given_boxes_and_what_is_unknown_are_no_other_selection() -> None:
    plain = RegionOrigin("a", ONE, {"rule": "r", "max_boxes": 36})
    assert plain.other_selection(RegionOrigin("a", ONE, {"rule": "r", "max_boxes": 100})) == ["max_boxes was 36, now 100"]
    assert not plain.other_selection(RegionOrigin("a", ONE)) and not RegionOrigin("a", ONE).other_selection(plain)
    given = [RegionOrigin("a", ONE, {"rule": "given", "boxes_sha256": digest}) for digest in (ONE, OTHER)]
    assert not given[0].other_selection(given[1]) and plain.other_selection(given[0])


@pytest.mark.parametrize("most", [256, 10])
def test_regions_without_places_are_said(
    most: int, small: Make, databases: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was converted from layouts that keep no boxes has zeros for positions."""
    monkeypatch.setattr(fit, "LOOKED_AT", most)
    texts, images = databases
    whole, bare = ImageDB(images), tmp_path / "bare.lmdb"
    records = []
    for number, (key, regions) in enumerate(whole.items()):
        place = regions.norm_bb if number % 2 else np.zeros_like(regions.norm_bb)
        records.append((key, encode_record(replace(regions, norm_bb=place, boxes=None), key=key), len(regions)))
    header = {"feature_width": whole.feature_width, "label_classes": whole.label_classes}
    write_regions(bare, records, settings={}, sources={}, header=lambda: header)
    corpora = [{"name": "toy", "text": [str(texts)], "images": [str(bare)]}]
    (remark, *_) = pretrain(small(**SHORT, corpora=corpora), tmp_path / "run")["remarks"]
    assert "have no boxes" in remark and "reads zeros for their positions" in remark
    assert (f"{most} images looked at (of " in remark) is (most == 10)
    again = evaluate_run(str(tmp_path / "run"), text=[str(texts)], images=[str(bare)], candidates=4, device="cpu")
    assert len(again["remarks"]) == 1
    other = evaluate_run(str(tmp_path / "run"), text=[str(texts)], images=[str(images)], candidates=4, device="cpu")
    assert "remarks" not in other


def test_what_is_older_is_accepted_and_stamped(small: Make, databases: tuple[Path, Path], tmp_path: Path) -> None:
    corpora = of_detector(databases, tmp_path, "a", ONE)
    run, images = tmp_path / "run", Path(corpora[0]["images"][0])
    header = (images / "header.json").read_text()
    (images / "header.json").write_text(json.dumps({**json.loads(header), "detector": None, "weights_sha256": None}))
    pretrain(small(**SHORT, corpora=corpora, stop_after=2), run)
    assert load(run).detector is None and origins_of([ImageDB(images)]) == []
    assert check_detector([open_corpus("x", **{"texts": corpora[0]["text"], "images": [images]})], RegionOrigin("b"), source="x") is None
    (images / "header.json").write_text(header)
    pretrain(small(**SHORT, corpora=corpora), run)
    stamped = load(run).detector
    assert stamped is not None and stamped.weights_sha256 == ONE
    assert yaml.safe_load((run / "config.yaml").read_text())["detector"]["weights_sha256"] == ONE


def test_a_run_goes_on_with_the_contents_it_learnt_from_alone(
    small: Make, databases: tuple[Path, Path], tmp_path: Path, made_up: Any
) -> None:
    texts, images = tmp_path / "texts.db", tmp_path / "regions.lmdb"
    shutil.copytree(databases[0], texts)
    shutil.copytree(databases[1], images)
    corpora = [{"name": "toy", "text": [str(texts)], "images": [str(images)]}]
    pretrain(small(**SHORT, corpora=corpora, stop_after=2), tmp_path / "run")
    made_up.World(width=16).write(tmp_path / "other", pictures=40, captions=2, seed=3)
    for path in (texts, images):
        shutil.rmtree(path)
        (tmp_path / "other" / path.name).rename(path)
    with pytest.raises(SettingsDiffer, match=r"run has learnt from other contents of .*texts.db, .*regions.lmdb; bring them back"):
        pretrain(small(**SHORT, corpora=corpora), tmp_path / "run")


def test_another_accumulation_is_refused(small: Make, tmp_path: Path) -> None:
    run = tmp_path / "run"
    pretrain(small(**SHORT, stop_after=2), run)
    with pytest.raises(SettingsDiffer, match=r"makes its updates of 2 micro-batches, and accumulation: 4 on 1 process"):
        pretrain(small(**SHORT, accumulation=4), run)
    pretrain(small(**SHORT, accumulation=None), run)


def test_whoever_may_read_other_files_may_read_the_weights(small: Make, tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        pretrain(small(**SHORT), tmp_path / "run")
        export_run(str(tmp_path / "run"), "hub", tmp_path / "hub")
        export_run(str(tmp_path / "run"), "published", tmp_path / "flat.pt")
    finally:
        os.umask(before)
    written = [*tmp_path.rglob("*.safetensors"), *tmp_path.rglob("*.json"), tmp_path / "flat.pt"]
    assert len(written) > 5 and {path.stat().st_mode & 0o777 for path in written} == {0o644}


def test_a_database_is_looked_at_once_whatever_is_held_out_of_it(small: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    data, asked = open_data(small()), list[str]()
    whole, load_tokenizer = runs.contents_of_data(data, {}), fit.Tokenizer.load
    monkeypatch.setattr(runs, "content_of", lambda path, known: asked.append(Path(path).name) or {"index": path.name})
    monkeypatch.setattr(fit.Tokenizer, "load", lambda path: asked.append(f"words of {Path(path).name}") or load_tokenizer(path))
    assert runs.contents_of_data(data, {}).keys() == whole.keys()
    assert tokenizer_of_texts([*data.training.values(), *data.validation.values()]) is not None
    assert sorted(asked) == ["regions.lmdb", "texts.db", "words of texts.db"]
