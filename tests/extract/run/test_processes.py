"""Several devices of one machine: every unit once, the bytes of one process, a dead process's units taken over."""

import functools
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from uniter.datasets.errors import BadInput, UniterError
from uniter.extract.images.listing import list_images
from uniter.extract.run.extraction import Stopped
from uniter.extract.run.options import Options
from uniter.extract.run.processes import DEATHS, devices_of, extract_on_devices
from uniter.extract.run.store import kind_of

Content = Callable[[Path], dict[str, Any]]
Photos = Callable[..., Path]


@pytest.fixture(autouse=True)
def importable(fake: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes import the fake detector by its name."""
    folders = [str(Path(str(fake.__file__)).parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, folders)))
    monkeypatch.syspath_prepend(folders[0])


def extract(photos: Path, out: Path, build: Any, **more: Any) -> Any:
    listed = list_images(photos, unit_images=8)
    return extract_on_devices(listed, out, Options(batch_size=3, check_space=False), build=build, devices=["cpu", "cpu"], **more)


def alone(photos: Path, out: Path, fake: ModuleType, content: Content) -> dict[str, Any]:
    from uniter.extract.run.extraction import extract_listed

    listed = list_images(photos, unit_images=8)
    extract_listed(listed, out, Options(batch_size=3, check_space=False), detector=fake.build_fake())
    return content(out)


def test_two_processes_write_the_bytes_of_one(make_photos: Photos, fake: ModuleType, content: Content, tmp_path: Path) -> None:
    photos = make_photos(45)
    (photos / "photo0007.jpg").write_bytes(b"no picture")
    summary = extract(photos, tmp_path / "two", fake.build_slow)
    assert (summary.images, summary.failures, summary.extracted, summary.failed, summary.units_left) == (44, 1, 44, 1, 0)
    assert summary.complete and "photo0007" in summary.first_failures[0]
    assert content(tmp_path / "two") == alone(photos, tmp_path / "one", fake, content)
    again = extract(photos, tmp_path / "two", fake.build_slow)
    assert (again.images, again.extracted, again.complete) == (44, 0, True)


def test_a_dead_process_is_replaced_and_its_units_are_gone_on_with(
    make_photos: Photos, fake: ModuleType, content: Content, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    photos = make_photos(45)
    with caplog.at_level(logging.WARNING):
        summary = extract(photos, tmp_path / "two", functools.partial(fake.build_dying, mark=str(tmp_path / "mark")))
    assert summary.complete and summary.images == 45 and (tmp_path / "mark").is_dir()
    assert "cpu: its process died (signal 9); units that go to another:" in caplog.text
    assert content(tmp_path / "two") == alone(photos, tmp_path / "one", fake, content)


def test_processes_that_die_again_and_again_end_the_run(make_photos: Photos, fake: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(UniterError, match=rf"processes died {DEATHS + 1} times, lastly \(signal 9\); is there too little memory"):
        extract(make_photos(80), tmp_path / "out", fake.build_dying)


def test_what_a_process_raises_is_said(make_photos: Photos, fake: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(UniterError, match=r"nowhere\.pkl does not exist in"):
        extract(make_photos(4), tmp_path / "out", functools.partial(fake.build_with, weights="nowhere.pkl"))


def test_asked_to_stop_it_keeps_what_is_done(make_photos: Photos, fake: ModuleType, content: Content, tmp_path: Path) -> None:
    photos, stop = make_photos(45), threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        extract(photos, tmp_path / "two", fake.build_slow, stop=stop)
    extract(photos, tmp_path / "two", fake.build_slow)
    assert content(tmp_path / "two") == alone(photos, tmp_path / "one", fake, content)


def test_devices_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert devices_of("cpu,cpu") == ["cpu", "cpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BadInput, match="--devices all: PyTorch sees no GPU here"):
        devices_of("all")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert devices_of("all") == ["cuda:0", "cuda:1", "cuda:2"] and devices_of("cuda:2, cuda:0") == ["cuda:2", "cuda:0"]
    with pytest.raises(BadInput, match="PyTorch sees 3 GPUs here"):
        devices_of("cuda:0,cuda:5")


def test_the_kind_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (kind_of("cpu"), kind_of("cuda:1")) == ("cpu", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"a card at {device}")
    assert kind_of("cuda:1") == "a card at cuda:1"
