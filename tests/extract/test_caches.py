"""What is kept is listed and cleared; what the toolkit did not make is never touched."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from uniter.cli.db import main
from uniter.datasets.storage.locks import file_lock
from uniter.extract.caches import caches, clear
from uniter.extract.detector.detectron import build_detector
from uniter.extract.region_cache import RegionCache
from uniter.extract.weights.cache import cache_folder
from uniter.extract.weights.fetching import fetched_path

SHA = "ab" * 32


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with one thing of each kind, and a file of somebody else's in each folder."""
    monkeypatch.setenv("UNITER_CACHE", str(tmp_path / "cache"))
    target = fetched_path("https://example.org/some/weights.pth")
    target.parent.mkdir(parents=True)
    target.write_bytes(b"x" * 5000)
    target.with_name(f"{target.name}.json").write_text(json.dumps({"url": "https://example.org/some/weights.pth"}))
    begun = fetched_path("https://example.org/other.pth")
    begun.with_name(f"{begun.name}.part").write_bytes(b"y" * 300)
    weights = cache_folder() / "weights"
    weights.mkdir()
    (weights / f"{SHA}-2.safetensors").write_bytes(b"z" * 700)
    (weights / f"{SHA}-2.json").write_text(json.dumps({"layout": "caffe"}))
    RegionCache(cache_folder() / "regions", {"kind": "regions", "detector": {"name": "quarters"}}).put({"a": b"record"})
    for folder in ("downloads", "weights", "regions"):
        (cache_folder() / folder / "my notes.txt").write_text("mine")
    (cache_folder() / "regions" / "0123456789abcdef").mkdir()
    (cache_folder() / "regions" / "0123456789abcdef" / "data.mdb").write_text("a database of somebody else's")
    return cache_folder()


def files_of(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


STRANGERS = {"downloads/my notes.txt", "weights/my notes.txt", "regions/my notes.txt", "regions/0123456789abcdef/data.mdb"}


def test_all_that_is_kept_is_listed(kept: Path) -> None:
    told = json.loads(CliRunner().invoke(main, ["cache", "list", "--json"]).stdout)
    assert told["folder"] == str(kept) and {str(Path(file).relative_to(kept)) for file in told["others"]} == STRANGERS
    names = {name: [one["name"] for one in cache["kept"]] for name, cache in told["caches"].items()}
    assert any(name == "https://example.org/some/weights.pth" for name in names["downloads"])
    assert any(name.endswith("other.pth (begun)") for name in names["downloads"]) and len(names["downloads"]) == 2
    assert names["weights"] == [f"caffe weights, source sha256 {SHA[:12]}..."]
    assert len(names["regions"]) == 1 and names["regions"][0].startswith("regions of quarters")
    assert all(cache["bytes"] > 0 and cache["used_by"] for cache in told["caches"].values())
    shown = CliRunner().invoke(main, ["cache", "list"]).stdout
    assert "4 files there are not the toolkit's" in shown and "hf cache" in shown


def test_nothing_is_deleted_unless_it_is_said(kept: Path) -> None:
    before = files_of(kept)
    result = CliRunner().invoke(main, ["cache", "clear"])
    assert result.exit_code == 2 and "4 things of" in result.stderr and "--yes" in result.stderr
    result = CliRunner().invoke(main, ["cache", "clear", "region", "--yes"])
    assert result.exit_code == 2 and "did you mean 'regions'" in result.stderr
    assert files_of(kept) == before


def test_one_cache_or_all_are_cleared_and_strangers_stay(kept: Path) -> None:
    assert json.loads(CliRunner().invoke(main, ["cache", "clear", "weights", "--yes", "--json"]).stdout)["deleted"] == 1
    assert not caches()["weights"] and len(caches()["downloads"]) == 2
    result = CliRunner().invoke(main, ["cache", "clear", "--yes", "--json"])
    assert json.loads(result.stdout)["deleted"] == 3 and files_of(kept) == STRANGERS
    assert not any(caches().values())
    assert json.loads(CliRunner().invoke(main, ["cache", "clear", "--yes", "--json"]).stdout)["deleted"] == 0


def test_what_is_being_fetched_is_left(kept: Path) -> None:
    target = fetched_path("https://example.org/other.pth")
    with file_lock(target.with_name(f".{target.name}.lock"), wait=False, remove=True) as mine:
        assert mine
        deleted, left = clear(["downloads"])
    assert [one.name for one in left] == [f"{target.name} (begun)"] and len(deleted) == 1
    assert target.with_name(f"{target.name}.part").is_file()


def test_without_a_cache_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNITER_CACHE", str(tmp_path / "none"))
    result = CliRunner().invoke(main, ["cache", "list"])
    assert result.exit_code == 0 and "0 bytes" in result.stdout


def test_regions_are_called_after_the_detector_that_found_them(tmp_path: Path) -> None:
    settings = build_detector("on-board", device="cpu").settings()
    RegionCache(tmp_path / "regions", {"kind": "regions", "detector": settings}).put({"a": b"record"})
    (kept,) = caches(tmp_path)["regions"]
    assert kept.name.startswith("regions of on-board, ")
