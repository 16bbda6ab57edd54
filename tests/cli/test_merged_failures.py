"""What could not be read is still said after databases were put together: each source's failures, by `uniter-db merge`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from uniter.cli.db import main
from uniter.datasets.image_db.records import encode_record
from uniter.datasets.image_db.regions import RegionFeatures
from uniter.datasets.image_db.writing.units import UnitStore


def write(out: Path, keys: list[str], failed: list[str]) -> Path:
    store = UnitStore(out, settings={})
    with store.unit(0) as writer:
        assert writer is not None
        for key in keys:
            box = np.array([[0.1, 0.1, 0.5, 0.5, 0.4, 0.4]], np.float32)
            record = RegionFeatures(features=np.full((1, 4), len(key), np.float32), norm_bb=box, conf=np.ones(1, np.float32))
            writer.put(key, encode_record(record), regions=1)
        for key in failed:
            writer.fail(key, f"{out.name}/{key}.jpg", f"{key} cannot be decoded")
        writer.complete()
    assert store.finish(units=1, header={"feature_width": 4})
    return out


def merged(out: Path, *sources: Path) -> tuple[Any, list[dict[str, str]]]:
    """The header of the merged database and the rows of its failures, by key."""
    result = CliRunner().invoke(main, ["merge", *map(str, sources), str(out)])
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (out / "failures.jsonl").read_text().splitlines()]
    return json.loads((out / "header.json").read_text()), sorted(rows, key=lambda row: str(row["key"]))


@pytest.fixture
def sources(tmp_path: Path) -> list[Path]:
    return [
        write(tmp_path / "parts" / "first", ["a", "b"], ["broken1", "broken2"]),
        write(tmp_path / "parts" / "second", ["c"], ["broken3"]),
        write(tmp_path / "parts" / "third", ["d"], []),
        write(tmp_path / "parts" / "fourth", ["e"], ["broken4"]),
    ]


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 1, 3, 0)])
def test_each_sources_failures_are_kept_as_they_were(sources: list[Path], tmp_path: Path, order: tuple[int, ...]) -> None:
    header, rows = merged(tmp_path / "whole", *(sources[place] for place in order))
    folders = {"broken1": "first", "broken2": "first", "broken3": "second", "broken4": "fourth"}
    assert rows == [{"key": key, "path": f"{folder}/{key}.jpg", "error": f"{key} cannot be decoded"} for key, folder in folders.items()]
    assert (header["images"], header["failures"]) == (5, 4)


def test_a_folder_of_databases_keeps_them_too(sources: list[Path], tmp_path: Path) -> None:
    _, rows = merged(tmp_path / "whole", sources[0].parent)
    assert [row["key"] for row in rows] == ["broken1", "broken2", "broken3", "broken4"]


@pytest.mark.parametrize("turned", [False, True])
def test_only_a_failure_whose_image_another_source_has_goes(tmp_path: Path, turned: bool) -> None:
    pair = [write(tmp_path / "first", ["a", "b"], ["c", "lost1"]), write(tmp_path / "second", ["c"], ["a", "lost2"])]
    header, rows = merged(tmp_path / "whole", *(pair[::-1] if turned else pair))
    assert [row["key"] for row in rows] == ["lost1", "lost2"]
    assert (header["images"], header["failures"]) == (3, 2)


@pytest.mark.parametrize("layout", ["lmdb", "uniter"])
def test_databases_of_other_widths_are_not_merged(layout: str, tmp_path: Path) -> None:
    """In either order: features of 8 and 6 numbers cannot be one database, and both widths are named; published ones have no header."""
    for name, width in (("wide", 8), ("narrow", 6)):
        (tmp_path / f"{name}-npz").mkdir()
        places = np.array([[0.1, 0.1, 0.5, 0.5, 0.4, 0.4]])
        np.savez(
            tmp_path / f"{name}-npz" / f"{name}.npz",
            norm_bb=places, features=np.ones((1, width)), conf=np.ones((1, 1)), soft_labels=np.full((1, 5), 0.2),
        )  # fmt: skip
        made = CliRunner().invoke(main, ["convert", str(tmp_path / f"{name}-npz"), str(tmp_path / name), "--to", layout])
        assert made.exit_code == 0, made.output
    for first, second in (("wide", "narrow"), ("narrow", "wide")):
        merged = CliRunner().invoke(main, ["merge", str(tmp_path / first), str(tmp_path / second), str(tmp_path / "out")])
        assert merged.exit_code == 1 and "8" in merged.output and "6" in merged.output, merged.output
        assert not (tmp_path / "out" / "header.json").exists()
