"""The command: options, exit codes, one-line errors, the summary, continuing."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from click.testing import CliRunner, Result

from uniter.cli.extract import main
from uniter.datasets.image_db import ImageDB
from uniter.extract.detector.preparation import CaffePreparation
from uniter.extract.detector.protocol import RawRegions

Run = Callable[..., Result]


class FlatDetector:
    """Six regions of equal size; enough for a command."""

    name, feature_width, min_boxes, max_boxes = "flat", 4, 1, 5
    class_names: tuple[str, ...] = ("cat", "dog")
    attribute_names: tuple[str, ...] = ()
    device = "cpu"
    preparation = CaffePreparation(shortest=16, longest=64)

    def __init__(self, built: dict[str, Any]) -> None:
        self.built = built

    def settings(self) -> dict[str, Any]:
        return {"detector": "flat", "weights": {"layout": "none", "sha256": "ab" * 32}, "box_kind": "proposal"}

    def prepare(self, image: Any) -> Any:
        return self.preparation(image)

    def detect(self, images: Any, *, boxes: Any = None) -> list[RawRegions]:
        given = boxes if boxes is not None else [np.array([[6 * n, n, 6 * n + 4, n + 4] for n in range(6)], np.float32)] * len(images)
        return [
            RawRegions(
                np.asarray(where, np.float32),
                np.full((len(where), 4), float(image.pixels.mean()), np.float32),
                np.tile(np.array([0.2, 0.5, 0.3], np.float32), (len(where), 1)),
            )
            for image, where in zip(images, given, strict=True)
        ]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(5):
        cv2.imwrite(str(folder / f"COCO_{number:012d}.jpg"), np.full((30, 40, 3), 40 * number, np.uint8))
    return folder


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """`run(*arguments)`: the command with a detector that needs no weights; what it was built with is in `run.built`."""
    built: dict[str, Any] = {}

    def build(name: str, **options: Any) -> FlatDetector:
        built.update(options, name=name)
        return FlatDetector(built)

    monkeypatch.setattr("uniter.extract.detector.detectron.build_detector", build)
    for name in [name for name in os.environ if name.startswith("SLURM_")] + ["RANK", "WORLD_SIZE", "LOCAL_RANK"]:
        monkeypatch.delenv(name, raising=False)

    def invoke(*arguments: Any) -> Result:
        return CliRunner().invoke(main, [str(argument) for argument in arguments])

    invoke.built = built  # type: ignore[attr-defined]
    yield invoke


def test_summary_as_a_table(run: Run, photos: Path, tmp_path: Path) -> None:
    result = run(photos, tmp_path / "out.lmdb", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"{tmp_path}/out.lmdb: complete\n")
    table = " ".join(result.stdout.split())
    for words in ("images 5 of 5", "regions 25", "regions per image 5", "failures 0", "images/s", "on disk"):
        assert words in table
    assert "4 features a region, 2 classes, boxes: proposal" in table and "sha256 abababababab" in table
    assert len(ImageDB(tmp_path / "out.lmdb")) == 5


def test_summary_as_json_alone_on_stdout(run: Run, photos: Path, tmp_path: Path) -> None:
    result = run(photos, tmp_path / "out", "--json")
    summary = json.loads(result.stdout)
    assert (summary["complete"], summary["images"], summary["regions"], summary["failures"]) == (True, 5, 25, 0)
    assert summary["bytes_on_disk"] == sum(path.stat().st_size for path in (tmp_path / "out").rglob("*"))
    assert json.loads(run(photos, tmp_path / "out", "--json").stdout)["extracted"] == 0


def test_failures_and_strict(run: Run, photos: Path, tmp_path: Path) -> None:
    (photos / "broken.jpg").write_text("<html>")
    result = run(photos, tmp_path / "out")
    assert result.exit_code == 0 and f"1 images failed: see {tmp_path}/out/failures.jsonl" in result.stderr
    assert run(photos, tmp_path / "out", "--strict").exit_code == 3
    (photos / "broken.jpg").write_bytes((photos / "COCO_000000000000.jpg").read_bytes())
    assert run(photos, tmp_path / "out", "--strict").exit_code == 3
    assert run(photos, tmp_path / "out", "--strict", "--retry-failed").exit_code == 0
    assert len(ImageDB(tmp_path / "out")) == 6


def test_keys_and_bounds(run: Run, photos: Path, tmp_path: Path) -> None:
    result = run(photos, tmp_path / "out", "--key", "coco_{id:06d}.npz", "--min-boxes", 2, "--max-boxes", 3, "--conf-threshold", 0.9)
    assert result.exit_code == 0, result.output
    database = ImageDB(tmp_path / "out")
    assert list(database.keys_list) == [f"coco_{n:06d}.npz" for n in range(5)]
    assert database.region_counts.tolist() == [2] * 5


def test_given_boxes(run: Run, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "boxes.jsonl").write_text('{"image": "COCO_000000000003.jpg", "boxes": [[9, 9, 19, 19], [1, 2, 3, 4]]}')
    result = run(photos / "COCO_000000000003.jpg", tmp_path / "out", "--boxes", tmp_path / "boxes.jsonl", "--json")
    assert json.loads(result.stdout)["box_kind"] == "given"
    np.testing.assert_array_equal(ImageDB(tmp_path / "out")["COCO_000000000003"].boxes, [[9, 9, 19, 19], [1, 2, 3, 4]])


def test_shards(run: Run, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as first, tarfile.open(tmp_path / "1.tar", "w") as second:
        for number, path in enumerate(sorted(photos.iterdir())):
            (first if number < 2 else second).add(path, path.name)
    tars = tmp_path / "{0..1}.tar"
    result = run(tars, tmp_path / "out", "--shard", "1/2")
    assert result.exit_code == 0 and "not complete yet" in result.output
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    result = run(tars, tmp_path / "out")
    assert "share 0 of 2 (from torchrun's RANK and WORLD_SIZE" in result.stderr
    assert result.exit_code == 0 and len(ImageDB(tmp_path / "out")) == 5


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["nowhere", "out"], 1, "nowhere does not exist; expected a folder, an image, a list or tar shards"),
        (["photos"], 2, "Missing argument 'OUT'"),
        (["photos", "out", "--shard", "2/2"], 2, "expected I/N with I from 0 to N - 1"),
        (["photos", "out", "--shard", "half"], 2, "expected I/N"),
        (["photos", "out", "--precision", "fp8"], 2, "'fp8' is not one of"),
        (["photos", "out", "--min-boxes", "9", "--max-boxes", "3"], 2, "--min-boxes 9 is above --max-boxes 3"),
        (["photos", "out", "--conf-threshold", "1"], 2, "0<=x<1"),
        (["photos", "out", "--key", "{stm}"], 2, "did you mean 'stem'"),
        (["photos", "out", "--boxes", "nowhere.json"], 1, "No such file"),
        (["photos", "out", "--shard", "0/2", "--overwrite"], 1, "run them with one process"),
        (["photos", "out", "--ray", "--device", "cpu"], 2, "leave --shard, --device and --devices out"),
        (["photos", "out", "--devices", "cpu,cpu", "--device", "cpu"], 2, "--devices names all devices; leave --device out"),
        (["photos", "out", "--devices", "cpu,gpu"], 2, "'gpu': no such device; expected cpu, cuda or cuda:N"),
        (["photos", "photos/COCO_000000000000.jpg"], 1, "is a file; expected a folder"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], code: int, said: str, run: Run, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == code
    assert said in result.stderr and "Traceback" not in result.output
    if code == 1:
        assert result.stderr.strip().splitlines()[-1].startswith("error: ")


def test_several_devices(run: Run, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def on_devices(listed: Any, out: Path, options: Any, *, build: Any, devices: list[str], stop: Any) -> Any:
        from uniter.extract.run.extraction import extract_listed

        asked.append((options.shard, devices))
        return extract_listed(listed, out, options, detector=build(device="cpu"), stop=stop)

    monkeypatch.setattr("uniter.extract.run.processes.extract_on_devices", on_devices)
    assert run(photos, tmp_path / "out", "--devices", "cpu,cpu").exit_code == 0
    assert run(photos, tmp_path / "share", "--devices", "cpu,cpu", "--shard", "0/2").exit_code == 0
    assert asked == [((0, 1), ["cpu", "cpu"]), ((0, 2), ["cpu", "cpu"])]
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    result = run(photos, tmp_path / "other", "--devices", "cpu,cpu")
    assert result.exit_code == 2 and "2 run here (torchrun's RANK and WORLD_SIZE); leave one of the two out" in " ".join(
        result.stderr.split()
    )
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # a process on each of four machines
    assert run(photos, tmp_path / "other", "--devices", "cpu,cpu").exit_code == 0
    assert asked[-1] == ((0, 4), ["cpu", "cpu"])


def test_where_one_of_several_gpus_is_used_it_is_said(run: Run, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    result = run(photos, tmp_path / "out")
    assert "this machine has 4 GPUs, and one is used: cuda:0; --devices all uses all of them" in result.stderr
    assert run.built["device"] == "cuda:0"  # type: ignore[attr-defined]


def test_other_settings_are_refused(run: Run, photos: Path, tmp_path: Path) -> None:
    run(photos, tmp_path / "out")
    result = run(photos, tmp_path / "out", "--conf-threshold", "0.4")
    assert result.exit_code == 1 and "selection.conf_threshold was 0.2, now 0.4" in result.stderr
    assert run(photos, tmp_path / "out", "--conf-threshold", "0.4", "--overwrite").exit_code == 0


def test_the_detector_gets_its_options(run: Run, photos: Path, tmp_path: Path) -> None:
    result = run(photos, tmp_path / "out", "--detector", "butd-36", "--weights", "random:3", "--precision", "bf16", "--attributes")
    assert result.exit_code == 0, result.output
    assert "random weights" in result.stderr and "NOTHING" in result.stderr
    built = run.built  # type: ignore[attr-defined]
    assert built == {"name": "butd-36", "weights": "random:3", "precision": "bf16", "attributes": True, "device": built["device"]}
    run(photos, tmp_path / "again", "--detector", "vinvl", "--weights", "random:3", "--label-map", "map.json")
    assert run.built["label_map"] == "map.json"  # type: ignore[attr-defined]


def test_without_detectron2_the_remedy_is_named(run: Run, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("uniter.extract.install.is_importable", lambda: False)
    result = run(photos, tmp_path / "out")
    assert result.exit_code == 1 and "uniter-extract --install-detectron2" in result.stderr
    assert not (tmp_path / "out").exists()


def test_installing_detectron2_needs_no_other_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Any] = []
    monkeypatch.setattr("uniter.extract.install.main", lambda arguments: called.append(arguments) or 0)
    assert CliRunner().invoke(main, ["--install-detectron2"]).exit_code == 0
    assert called == [[]]


def test_help_has_examples() -> None:
    text = CliRunner().invoke(main, ["--help"]).output
    for words in ("uniter-extract photos/ out.lmdb", "--install-detectron2", "--retry-failed", "Exit codes: 0 done", "[default: 0.2"):
        assert words in text


@pytest.mark.slow
def test_one_photograph_through_the_whole_network(tmp_path: Path) -> None:
    """Bottom-Up-Attention with random weights in a process of its own: minutes of setting up a real run are not needed to try it."""
    pytest.importorskip("detectron2", reason="Detectron2 is brought by `uniter-extract --install-detectron2`")
    rng = np.random.default_rng(3)
    picture = cv2.resize(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8), (320, 240), interpolation=cv2.INTER_CUBIC)
    cv2.imwrite(str(tmp_path / "photo.jpg"), picture)
    command = [sys.executable, "-m", "uniter.cli.extract", str(tmp_path / "photo.jpg"), str(tmp_path / "out")]
    done = subprocess.run([*command, "--weights", "random:1", "--json"], capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["complete"] and summary["images"] == 1 and 10 <= summary["regions"] <= 100
    assert "NOTHING" in done.stderr and "RANDOM" in summary["weights"]
    database = ImageDB(tmp_path / "out")
    record = database["photo"]
    assert record.features.shape == (summary["regions"], 2048) and np.isfinite(record.features).all()
    assert record.soft_labels is not None and record.soft_labels.shape[1] == 1601 and database.class_names is not None
    np.testing.assert_allclose(record.soft_labels.astype(np.float32).sum(axis=1), 1, atol=2e-2)
    again = subprocess.run([*command, "--weights", "random:2"], capture_output=True, text=True, check=False, timeout=500)
    assert again.returncode == 1 and "was begun with other settings" in again.stderr


SCRIPT = """
import sys
sys.path.insert(0, {folder!r})
from fake_extraction import FakeDetector
import uniter.extract.detector.detectron
uniter.extract.detector.detectron.build_detector = lambda *a, **k: FakeDetector(seconds={seconds})
from uniter.cli.extract import main
main()
"""


def test_sigterm_ends_the_command_cleanly(photos: Path, tmp_path: Path) -> None:
    for number in range(5, 60):
        cv2.imwrite(str(photos / f"COCO_{number:012d}.jpg"), np.full((30, 40, 3), number, np.uint8))
    script = SCRIPT.format(folder=str(Path(__file__).parent.parent / "extract"), seconds=0.05)
    command = [sys.executable, "-c", script, str(photos), str(tmp_path / "out"), "--device", "cpu", "--batch-size", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    data = tmp_path / "out" / "units" / "00000.partial" / "data.mdb"
    while not data.exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=600)
    assert process.returncode == 1
    assert "SIGTERM: the batch at hand is finished first" in stderr
    assert stderr.strip().splitlines()[-1].startswith("error: stopped after ") and "the same command continues it" in stderr
    assert subprocess.run(command, check=False).returncode == 0
    assert len(ImageDB(tmp_path / "out")) == 60


def test_two_processes_under_torchrun_write_what_one_writes(photos: Path, tmp_path: Path) -> None:
    for number in range(5, 300):
        cv2.imwrite(str(photos / f"COCO_{number:012d}.jpg"), np.full((30, 40, 3), number % 256, np.uint8))
    script = tmp_path / "extract.py"
    script.write_text(SCRIPT.format(folder=str(Path(__file__).parent.parent / "extract"), seconds=0))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    options = ["--device", "cpu", "--batch-size", "2", "--json"]
    ran = subprocess.run([*launcher, script, photos, tmp_path / "two", *options], capture_output=True, text=True, check=False, timeout=600)
    assert ran.returncode == 0, ran.stderr
    summaries = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
    assert sorted(summary["extracted"] for summary in summaries) == [128, 172], "128 images make a unit; the second process has the second"
    assert any(summary["complete"] for summary in summaries)
    subprocess.run([sys.executable, script, photos, tmp_path / "one", *options], capture_output=True, check=True, timeout=600)
    for name in ("data.mdb", "index.safetensors", "settings.json", "header.json", "failures.jsonl"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    assert not (tmp_path / "two" / "units").exists()
