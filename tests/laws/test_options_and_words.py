"""Options do what they say or are refused, errors are sentences that can be followed, and a new user's mistakes are answered.

Only commands, public names and files are used, so that these hold whatever the layout of the code.
"""

import contextlib
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lmdb
import made_by_commands as made
import numpy as np
import pytest
from safetensors.numpy import load_file

from uniter.extract import RegionExtractor, build_detector

BIN = Path(sys.executable).parent

NARROW = [
    "model.hidden_size=32", "model.num_hidden_layers=1", "model.num_attention_heads=4", "model.intermediate_size=64", "batch_tokens=200",
    "tensorboard=false",
]  # fmt: skip


@dataclass(frozen=True)
class Things:
    """What a stranger has after an afternoon."""

    photos: Path
    captions: Path
    texts: Path
    regions: Path
    run: Path

    def pretrain(self, out: Path, *words: object) -> list[object]:
        """The command that made `run`."""
        sets = [word for assignment in NARROW for word in ("--set", assignment)]
        data = ["--text", self.texts, "--images", self.regions, "--out", out]
        return ["pretrain", *data, "--steps", 4, "--device", "cpu", *sets, *words]

    def evaluate(self, images: Path, *words: object) -> list[object]:
        start = ["evaluate", "pretrain", "--from", self.run, "--text", self.texts, "--images", images]
        return [*start, "--candidates", 4, "--device", "cpu", *words]


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> Things:
    folder = tmp_path_factory.mktemp("things")
    names = ("photos", "captions.jsonl", "texts.db", "regions.lmdb", "run")
    found = Things(*(folder / name for name in names))
    made.photographs(found.photos, 16)
    words = made.COLOURS
    lines = [{"image": f"photo{n:04d}.jpg", "caption": f"a {words[n % 5]} house and {words[n % 3]} trees, {n}"} for n in range(16)]
    found.captions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert made.attempt(found.photos, found.regions, made.FakeDetector()).complete
    made.done("build-db", found.captions, found.texts, "--images", found.regions)
    made.done("train", *found.pretrain(found.run, "--set", "stop_after=2"))
    return found


@pytest.fixture(scope="module")
def annotations(things: Things) -> Path:
    """COCO's instances of the photographs."""
    path = things.photos.parent / "instances.json"
    images = [{"id": n, "file_name": file.name, "height": 48, "width": 64} for n, file in enumerate(sorted(things.photos.iterdir()))]
    boxes = [
        {"id": n, "image_id": n, "category_id": 1 + n % 2, "bbox": [5, 5, 30, 30], "area": 900, "iscrowd": 0} for n in range(len(images))
    ]
    path.write_text(
        json.dumps({"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]})
    )
    return path


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """No launcher's environment, a cache of its own, and everything that is said is heard."""
    for name in [name for name in os.environ if name.startswith("SLURM_")] + ["RANK", "WORLD_SIZE", "LOCAL_RANK"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("UNITER_CACHE", str(tmp_path / "cache"))
    caplog.set_level("INFO")


# --- point 24: an option that does nothing is an error ---------------------------------------------------------------------------


def detector_command(things: Things, annotations: Path, out: Path, *words: object) -> list[object]:
    pytest.importorskip("detectron2", reason="Detectron2 is brought by `uniter-extract --install-detectron2`")
    data = ["--images", things.photos, "--annotations", annotations, "--out", out]
    return ["detector", *data, "--model", "tiny", "--steps", 1, "--batch-size", 4, "--device", "cpu", *words]


@pytest.fixture(scope="module")
def plain_detector(things: Things, annotations: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("detectors") / "plain"
    made.done("train", *detector_command(things, annotations, out))
    return out


@pytest.mark.parametrize(
    "setting",
    [
        "INPUT.FORMAT=RGB",
        "SOLVER.NO_SUCH_KEY=1",
        "SOLVER.BASE_LR=0.5",
        "SOLVER.MAX_ITER=7",
        "SOLVER.IMS_PER_BATCH=3",
        "SOLVER.AMP.ENABLED=true",
        "SOLVER.WEIGHT_DECAY=0.9",
        "SOLVER.CLIP_GRADIENTS.CLIP_VALUE=0.000001",
        "INPUT.RANDOM_FLIP=none",
        "MODEL.WEIGHTS=nowhere.pkl",
    ],
)
def test_a_detectors_setting_is_obeyed_or_refused(
    setting: str, things: Things, annotations: Path, plain_detector: Path, tmp_path: Path
) -> None:
    result = made.run("train", *detector_command(things, annotations, tmp_path / "out", "--set", setting))
    if result.exit_code:
        made.refused(result, setting.partition("=")[0], code=(1, 2))
        return
    plain, weights = load_file(plain_detector / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert any(not np.array_equal(plain[name], weights[name]) for name in plain), f"{setting} changes nothing"


@pytest.mark.parametrize("option", ["--words red,blue", "--candidates 7"])
def test_evaluating_a_task_refuses_what_only_pretraining_knows(option: str) -> None:
    result = made.run("train", "evaluate", "vqa", "--from", "nowhere", "--text", "a", "--images", "b", *option.split())
    made.refused(result, option.split()[0], code=(1, 2))


def test_other_accumulation_of_a_resumed_run_is_refused(things: Things, tmp_path: Path) -> None:
    shutil.copytree(things.run, tmp_path / "run", symlinks=True)
    made.refused(made.run("train", *things.pretrain(tmp_path / "run", "--set", "accumulation=3")), "accumulation", code=(1, 2))


@pytest.mark.gpu
def test_ray_and_half_precision_go_together_on_a_gpu(things: Things, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is an extra: pip install 'uniter-toolkit[ray]'")
    detector = made.with_detector(tmp_path)[:4]
    made.done("extract", things.photos, tmp_path / "out", *detector, "--ray", "--precision", "fp16")
    assert len(made.keys_of(tmp_path / "out")) == 16


@pytest.mark.slow
def test_torchrun_trains_one_detector_or_is_refused(things: Things, annotations: Path, tmp_path: Path) -> None:
    words = detector_command(things, annotations, tmp_path / "out", "--set", "checkpoint_every=1")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "-m", "uniter.cli.train"]
    ran = subprocess.run([*launcher, *map(str, words)], capture_output=True, text=True, check=False, timeout=300)
    if ran.returncode == 0:
        lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if line["kind"] == "train"] == [1]
        assert ran.stdout.count("a detector in") == 1
    else:
        assert "error: " in ran.stderr
        made.names(ran.stderr, "torchrun|processes")


@pytest.mark.parametrize(
    "case",
    [
        "extract {photos} {out} --boxes {boxes} --conf-threshold 0.9",
        "extract {photos} {out} --boxes {boxes} --min-boxes 5",
        "db convert {regions} {out} --to npz --num-boxes 3",
        "db check {regions} --overwrite",
        "train predict nlvr2 --from nowhere --text a --images b --out {out} --answers {captions}",
        "view {regions} --out {out} --pairs 3",
        "view {run} --out {out} --limit 3",
    ],
)
def test_an_option_without_meaning_beside_the_others_is_refused(case: str, things: Things, tmp_path: Path) -> None:
    boxes = tmp_path / "given.jsonl"
    boxes.write_text("".join(json.dumps({"image": path.name, "boxes": [[1, 2, 30, 40]]}) + "\n" for path in things.photos.iterdir()))
    places = {"boxes": boxes, "out": tmp_path / "out", **vars(things)}
    command, *words = case.format(**{name: str(place) for name, place in places.items()}).split()
    option = case.split()[-1] if case.endswith("--overwrite") else case.split()[-2]
    detector = made.with_detector(tmp_path) if command == "extract" else []
    made.refused(made.run(command, *words, *detector), option, code=(1, 2))


# --- point 25: errors are sentences ----------------------------------------------------------------------------------------------


def four_columns(key: str, record: dict[bytes, Any]) -> None:
    """Positions without the width and height that UNITER's have."""
    places = record[b"norm_bb"]
    rows = np.frombuffer(places[b"data"], places[b"type"].decode()).reshape(places[b"shape"])
    places |= {b"shape": [len(rows), 4], b"data": np.ascontiguousarray(rows[:, :4]).tobytes()}


def no_size(key: str, record: dict[bytes, Any]) -> None:
    """A picture of 0 x 0 pixels."""
    record[b"size"][b"data"] = bytes(len(record[b"size"][b"data"]))


def test_what_a_loading_process_finds_is_said_as_without_one(things: Things, tmp_path: Path) -> None:
    damaged = shutil.copytree(things.regions, tmp_path / "damaged")
    with lmdb.open(str(damaged), map_size=1 << 26, lock=False) as environment, environment.begin(write=True) as transaction:
        for key, record in made.records_of(things.regions).items():
            transaction.put(key.encode(), record[:40] + b"\xc1" * 20 + record[60:])
    made.refused(made.run("train", *things.evaluate(damaged, "--workers", 0)), "photo0")
    # In a process of its own: this one has threads, which its forks would wait for, and where it is wrong the command never ends.
    command = [str(word) for word in (BIN / "uniter-train", *things.evaluate(damaged, "--workers", 1))]
    ran = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert ran.stderr is not None
        said = next(line for line in ran.stderr if line.startswith("error: "))
        made.names(said, "photo0")
        assert "Traceback" not in said and 'File "' not in said
        assert ran.wait(timeout=30) == 1
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(ran.pid, signal.SIGKILL)
        ran.communicate()


def no_images(folder: Path) -> Path:
    """A published folder of no image at all."""
    inner = folder / "feat_th0.2_max100_min10"
    inner.mkdir(parents=True)
    with lmdb.open(str(inner), map_size=1 << 20, lock=False) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"a", b"b")
        transaction.delete(b"a")
    (folder / "nbb_th0.2_max100_min10.json").write_text("{}")
    return folder


@pytest.mark.parametrize("command", ["pretrain", "evaluate"])
def test_an_empty_region_database_is_said(command: str, things: Things, tmp_path: Path) -> None:
    empty = no_images(tmp_path / "nothing")
    words = things.evaluate(empty) if command == "evaluate" else things.pretrain(tmp_path / "run", "--images", empty)
    if command == "pretrain":
        del words[words.index("--images") : words.index("--images") + 2]
    made.refused(made.run("train", *words), "no image|no record|empty|without image")


@pytest.mark.parametrize("command", ["check", "pretrain", "evaluate"])
def test_positions_of_four_columns_are_said(command: str, things: Things, tmp_path: Path) -> None:
    narrow = made.changed(things.regions, tmp_path / "narrow", four_columns)
    words = {
        "check": ["db", "check", narrow],
        "pretrain": ["train", "pretrain", "--text", things.texts, "--images", narrow, "--out", tmp_path / "run", "--steps", 1],
        "evaluate": ["train", *things.evaluate(narrow)],
    }[command]
    made.refused(made.run(*words), "norm_bb|position")


@pytest.mark.parametrize(
    "command",
    [
        "check",
        "view",
    ],
)
def test_a_size_of_nothing_is_no_crash(command: str, things: Things, tmp_path: Path) -> None:
    nothing = made.changed(things.regions, tmp_path / "nothing", no_size)
    if command == "check":
        made.refused(made.run("db", "check", nothing), "size")
    else:
        result = made.run("view", nothing, "--out", tmp_path / "report")
        assert not made.crashed(result), repr(result.exception)
        assert result.exit_code in (0, 1)


DEEP = "[" * 100_000 + "]" * 100_000


def deep_list(things: Things, folder: Path) -> list[object]:
    (folder / "deep.jsonl").write_text(f"{DEEP}\n")
    return ["extract", folder / "deep.jsonl", folder / "out", *made.with_detector(folder)]


def deep_detector(things: Things, folder: Path) -> list[object]:
    (folder / "detector").mkdir()
    (folder / "detector" / "detector.json").write_text(DEEP)
    return ["extract", things.photos, folder / "out", "--detector", folder / "detector", "--device", "cpu"]


def deep_settings(things: Things, folder: Path) -> list[object]:
    (folder / "out").mkdir()
    (folder / "out" / "settings.json").write_text(DEEP)
    return ["extract", things.photos, folder / "out", *made.with_detector(folder)]


def deep_config(things: Things, folder: Path) -> list[object]:
    (folder / "deep.yaml").write_text("[" * 600 + "]" * 600)
    return ["train", "pretrain", "--config", folder / "deep.yaml", "--out", folder / "run"]


def deep_published_config(things: Things, folder: Path) -> list[object]:
    (folder / "deep.json").write_text("[" * 600 + "]" * 600)
    return ["train", "pretrain", "--config", folder / "deep.json", "--out", folder / "run"]


@pytest.mark.parametrize(
    "words",
    [deep_list, deep_detector, deep_settings, deep_config, deep_published_config],
)
def test_deeply_nested_files_are_said(words: Callable[[Things, Path], list[object]], things: Things, tmp_path: Path) -> None:
    made.refused(made.run(*words(things, tmp_path)), "deep.|detector.json|settings.json")


def test_check_compares_the_widths_of_an_unfinished_database(things: Things, tmp_path: Path) -> None:
    for number, width in enumerate((8, 16)):
        part = made.attempt(things.photos, tmp_path / "out", made.FakeDetector(feature_width=width), unit_images=5, shard=(number, 4))
        assert part.error is None
    made.refused(made.run("db", "check", tmp_path / "out"), "width|columns|features")


@pytest.mark.parametrize(
    "module",
    [
        "db",
        "scenes",
    ],
)
def test_every_command_runs_as_a_module(module: str) -> None:
    ran = subprocess.run([sys.executable, "-m", f"uniter.cli.{module}", "--help"], capture_output=True, text=True, check=False, timeout=60)
    assert ran.returncode == 0 and "Usage:" in ran.stdout


# --- point 26: advice that can be followed ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def only_36(tmp_path_factory: pytest.TempPathFactory, uniter_data_golden: Path) -> Path:
    """A folder as UNITER's authors publish it, of which one has copied the selection of 36 boxes alone."""
    folder = tmp_path_factory.mktemp("published") / "scenes"
    shutil.copytree(uniter_data_golden / "img_db" / "scenes" / "feat_numbb36", folder / "feat_numbb36")
    return folder


@pytest.mark.parametrize(
    "case",
    [
        "db convert {only_36} {out}",
        "db info {only_36}",
        "db merge {only_36} {out}",
        "build-db {captions} {out} --images {only_36}",
        "train pretrain --text {texts} --images {only_36} --out {out}",
        "view {only_36} --out {out}",
    ],
)
def test_options_that_an_error_advises_are_the_commands_own(case: str, things: Things, only_36: Path, tmp_path: Path) -> None:
    places = {"only_36": only_36, "out": tmp_path / "out", **vars(things)}
    command, *words = case.format(**{name: str(place) for name, place in places.items()}).split()
    result = made.run(command, *words)
    assert not made.crashed(result), repr(result.exception)
    own = made.run(command, *(words[:1] if command in ("db", "train") else []), "--help").output
    advised = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", result.output))
    assert not [option for option in advised if not re.search(rf"{option}(?![\w-])", own)], result.output


def test_advice_for_36_boxes_is_followed_by_convert(only_36: Path, tmp_path: Path) -> None:
    made.done("db", "convert", only_36, tmp_path / "out", "--conf-threshold", "-1")
    assert made.keys_of(tmp_path / "out")


def test_an_lmdb_of_pickles_is_called_what_it_is(tmp_path: Path) -> None:
    with lmdb.open(str(tmp_path / "in"), map_size=1 << 22, lock=False) as environment, environment.begin(write=True) as transaction:
        for number in range(3):
            record = {"features": np.zeros((5, 8), np.float32), "boxes": np.zeros((5, 4), np.float32)}
            transaction.put(f"photo{number:04d}".encode(), pickle.dumps(record))
    result = made.run("db", "convert", tmp_path / "in", tmp_path / "out")
    made.refused(result, "pickle")
    assert "(uniter)" not in result.output


@pytest.mark.parametrize("shipped", [False, True], ids=["a run's own", "shipped"])
def test_settings_of_pretraining_are_said_to_be_that_by_finetune(shipped: bool, things: Things, tmp_path: Path) -> None:
    config = "pretrain-in-domain-base" if shipped else str(shutil.copy(things.run / "config.yaml", tmp_path / "settings.yaml"))
    data = ["--text", things.texts, "--images", things.regions]
    result = made.run("train", "finetune", "vqa", "--config", config, *data, "--out", tmp_path / "out")
    made.refused(result, "pretrain|pre-train", code=(1, 2), besides=["pretrain-in-domain-base"])


# --- point 27: colleagues can read what was written ------------------------------------------------------------------------------


@pytest.fixture
def usual_mask() -> Iterator[None]:
    """What users have: files are for all to read."""
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.parametrize(
    "what",
    ["extraction", "text database", "published", "detector", "run", "hub"],
)
def test_everything_written_can_be_read_by_colleagues(
    what: str, things: Things, annotations: Path, tmp_path: Path, usual_mask: None
) -> None:
    out = tmp_path / "out"
    if what == "extraction":
        assert made.attempt(things.photos, out, made.FakeDetector()).complete
    else:
        words = {
            "text database": ["build-db", things.captions, out],
            "run": ["train", *things.pretrain(out, "--set", "stop_after=1")],
            "hub": ["train", "export", "--from", things.run, "--to", "hub", out],
            "published": ["train", "export", "--from", things.run, "--to", "published", out / "uniter.pt"],
            "detector": ["train", *detector_command(things, annotations, out)],
        }
        if what == "published":
            out.mkdir()
        made.done(*words[what])
    files = [path for path in out.rglob("*") if path.is_file()]
    assert files and not [str(path.relative_to(out)) for path in files if path.stat().st_mode & 0o044 != 0o044]


# --- point 32: a new user's slips ------------------------------------------------------------------------------------------------


def test_exclusions_that_match_nothing_are_said(things: Things, tmp_path: Path) -> None:
    (tmp_path / "not-to-be-seen.txt").write_text("COCO_val2014_000000000042\nCOCO_val2014_000000000073\n")
    result = made.run("build-db", things.captions, tmp_path / "out.db", "--exclude", tmp_path / "not-to-be-seen.txt")
    assert not made.crashed(result)
    made.names(result.output, "not-to-be-seen")


def test_exclusions_that_match_leave_texts_out(things: Things, tmp_path: Path) -> None:
    (tmp_path / "not-to-be-seen.txt").write_text("photo0003.jpg\nphoto0004.jpg\n")
    result = made.done("build-db", things.captions, tmp_path / "out.db", "--exclude", tmp_path / "not-to-be-seen.txt", "--json")
    assert json.loads(result.stdout)["texts"]["excluded"] == 2


def test_a_page_without_any_photograph_is_no_success(things: Things, tmp_path: Path) -> None:
    wrong = made.photographs(tmp_path / "wrong", 2, first=900)
    made.refused(made.run("view", things.regions, "--images", wrong, "--out", tmp_path / "report"), "photograph|picture")


def test_a_page_with_some_photographs_is_one(things: Things, tmp_path: Path) -> None:
    some = made.photographs(tmp_path / "some", 2)
    result = made.done("view", things.regions, "--images", some, "--out", tmp_path / "report", "--json")
    assert json.loads(result.stdout)["without_photograph"] == 14


def test_info_does_not_call_a_damaged_file_complete(tmp_path: Path) -> None:
    (tmp_path / "data.mdb").write_bytes(b"abcdef")
    result = made.run("db", "info", tmp_path, "--json")
    assert not made.crashed(result)
    assert json.loads(result.stdout)["databases"][0].get("complete") is not True
    assert result.exit_code == 1


HOLDING = """
import json, os, sys, time
from pathlib import Path
def wait(image):
    os.write(1, b"held\\n")
    time.sleep(float(sys.argv[4]))
    os._exit(0)
detector = made.FakeDetector(told=json.loads(sys.argv[3]))
detector.prepare = wait
options = {"batch_size": 2, "min_boxes": 2, "max_boxes": 5}
made.extract_images(sys.argv[1], sys.argv[2], detector=detector, **options)
"""


def test_a_second_extraction_into_the_same_folder_is_no_success(things: Things, tmp_path: Path) -> None:
    options = made.with_detector(tmp_path)
    settings = build_detector(options[1], weights=options[3], device="cpu").settings()
    command = [sys.executable, "-c", made.HEAD + HOLDING, things.photos, tmp_path / "out", json.dumps(settings), "15"]
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None and other.stdout.readline() == "held\n"
            second = made.run("extract", things.photos, tmp_path / "out", *options, "--batch-size", 2, "--min-boxes", 2, "--max-boxes", 5)
        finally:
            other.kill()
    assert not made.crashed(second), repr(second.exception)
    assert "began with other settings" not in second.output
    assert (tmp_path / "out" / "header.json").exists() or second.exit_code != 0, f"`&&` goes on after\n{second.output}"


# --- point 33: fillers -----------------------------------------------------------------------------------------------------------


def test_a_detector_that_is_sure_of_nothing_is_said(things: Things, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    ran = made.attempt(things.photos, tmp_path / "out", made.FakeDetector(sure=0.18), caplog)
    made.names(ran.output, "16 of 16 images have no region above 0.2")
    assert ran.summary.as_dict()["only_fillers"] == 16 and "16 of 16" in ran.summary.as_table()["fillers"]
    sure = made.attempt(things.photos, tmp_path / "sure", made.FakeDetector(), caplog)
    assert sure.summary.only_fillers == 0 and "fillers" not in sure.output


# --- point 35: interrupted, piped, called with one photograph --------------------------------------------------------------------

INTERRUPTED = """
import os, runpy, signal, sys
module, sys.argv = sys.argv[1], sys.argv[2:]
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def interrupted_at(module: str, command: str, folder: Path, *words: object) -> list[str]:
    """The command, with Ctrl-C at the moment when it begins to import this module; its script lies in `folder`, as pip would write it."""
    target = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["scripts"][command]
    begins_in, function = target.split(":")
    script = folder / command
    script.write_text(f"import sys\nfrom {begins_in} import {function}\nif __name__ == '__main__':\n    sys.exit({function}())\n")
    return [sys.executable, "-c", INTERRUPTED, module, *map(str, (script, *words))]


@pytest.mark.parametrize(("command", "module"), [("uniter-db", "numpy"), ("uniter-build-db", "lmdb"), ("uniter-train", "yaml")])
def test_an_interrupted_start_is_no_traceback(command: str, module: str, tmp_path: Path) -> None:
    ran = subprocess.run(interrupted_at(module, command, tmp_path, "--help"), capture_output=True, text=True, check=False, timeout=100)
    assert ran.returncode != 0 and "Usage" not in ran.stdout, "this command no longer imports this module: choose another one"
    assert "Traceback" not in ran.stderr


def test_an_interruption_while_a_model_loads_ends_at_once(things: Things, tmp_path: Path) -> None:
    command = interrupted_at("torch", "uniter-extract", tmp_path, things.photos, tmp_path / "out", *made.with_detector(tmp_path))
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as ran:
        assert ran.stderr is not None
        said = []
        for line in ran.stderr:
            said.append(line)
            if "batch at hand" in line:
                ran.kill()
    assert ran.returncode in (1, 130), f"it went on:\n{''.join(said)}"
    assert "Traceback" not in "".join(said) and not (tmp_path / "out").exists()


def test_a_reader_that_goes_away_is_no_error(things: Things) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as gone:
        command = [str(BIN / "uniter-db"), "info", str(things.regions)]
        ran = subprocess.run(command, stdout=gone, stderr=subprocess.PIPE, text=True, check=False, timeout=60)
    assert "roken pipe" not in ran.stderr and "Traceback" not in ran.stderr
    assert ran.returncode != 1


@pytest.mark.parametrize("kind", ["name", "path", "pixels", "nowhere"])
def test_one_photograph_is_not_taken_for_a_list(kind: str, things: Things) -> None:
    file = things.photos / "photo0000.jpg"
    photograph: Any = {"name": str(file), "path": file, "pixels": made.picture(0), "nowhere": "dog.jpg"}[kind]
    try:
        found = RegionExtractor(made.FakeDetector(), batch_size=2)(photograph)
    except Exception as error:
        made.names(str(error), "list|sequence|dog.jpg")
    else:
        assert len(found) == 1 and kind != "nowhere"
