"""The one command for a machine with a GPU: runs on a CPU, without an installed package, and costs no section another one's fault."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

GPU = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


def command(out: Path, *words: str) -> list[str]:
    # -I: neither the current folder nor PYTHONPATH leads to the package.
    return [sys.executable, "-I", str(GPU), "--device=cpu", "--small", f"--out={out}", *words]


def report(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "gpu.json").read_text())
    return found


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def test_everything_runs_on_a_cpu(tmp_path: Path) -> None:
    (tmp_path / "report").mkdir()
    for name in ("gpu.md", "gpu.json"):
        (tmp_path / "report" / name).write_text("older")
    done = subprocess.run(command(tmp_path / "report"), capture_output=True, text=True, cwd=tmp_path, env=environment())
    log = tmp_path / "report" / "gpu.log"
    assert done.returncode == 0, done.stdout + done.stderr + log.read_text()
    sections = report(tmp_path / "report")["sections"]
    assert list(sections) == ["device", "correctness", "pretraining", "extraction", "steps", "retrieval", "memory", "resume"]
    rows = {row["what"]: row for section in sections.values() for row in section["rows"]}
    assert {row["state"] for row in rows.values()} == {"measured", "left out"}
    for what in ("golden losses in fp32", "packed against padded, 11 pairs, fp32", "compiled against eager, fp32"):
        assert rows[what]["value"] < 1e-4
    assert rows["resumed against unbroken: largest difference of a weight"]["value"] == 0
    assert rows["all tasks, 150 tokens, from disk: pairs a second"]["value"] > 0
    assert "| golden losses in fp32 |" in (tmp_path / "report" / "gpu.md").read_text()
    assert not list((tmp_path / "report").glob(".*"))


def test_nothing_but_torch_is_needed(tmp_path: Path) -> None:
    """What needs the absent libraries is left out, and says so; the rest is done."""
    hidden = ("lmdb", "pydantic", "yaml", "orjson", "ijson", "msgpack", "lz4", "tokenizers", "safetensors", "cv2", "PIL", "tqdm", "pytest")
    words = [f"--hide={library}" for library in hidden] + [f"--only={name}" for name in ("correctness", "pretraining", "extraction")]
    done = subprocess.run(command(tmp_path, *words), capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stdout + done.stderr
    sections = report(tmp_path)["sections"]
    (left_out,) = sections["pretraining"]["rows"]
    assert left_out["state"] == "left out" and "lmdb" in left_out["value"] and "not installed here" in left_out["value"]
    states = {row["what"]: row["state"] for name in ("correctness", "extraction") for row in sections[name]["rows"]}
    assert states["golden outputs"] == states["detectors"] == "left out"
    assert states["packed against padded, 11 pairs, fp32"] == "measured"
    assert states["bare R101-C4 in fp32, batches of 1, 300 boxes given"] == "measured"


SABOTAGE = """
import os, runpy, sys, time
sys.path.insert(0, sys.argv[1])
sys.argv = ["gpu.py", *sys.argv[2:]]
import gpu
from on_gpu.rows import Row
def raising(place):
    yield Row("before", 1)
    raise ValueError("of no use")
def dying(place):
    os.abort()
    yield
def hanging(place):
    yield Row("before", 2)
    time.sleep(900)
def well(place):
    yield Row("at last", 3.5, "s")
gpu.GRACE = 0.5
gpu.SECTIONS = {name: gpu.Section(name, run, seconds) for name, run, seconds in
                (("raising", raising, 20), ("dying", dying, 20), ("hanging", hanging, 6), ("well", well, 20))}
sys.exit(gpu.main())
"""


def test_a_section_costs_itself_alone(tmp_path: Path) -> None:
    words = [sys.executable, "-c", SABOTAGE, str(GPU.parent), *command(tmp_path)[3:]]
    began = time.monotonic()
    done = subprocess.run(words, capture_output=True, text=True, env=environment())
    assert done.returncode == 1 and time.monotonic() - began < 600, done.stdout + done.stderr
    sections = report(tmp_path)["sections"]
    assert [(row["what"], row["state"]) for row in sections["raising"]["rows"]] == [("before", "measured"), ("the section", "failed")]
    assert "ValueError: of no use" in sections["raising"]["rows"][1]["value"]
    assert "ended with -6" in sections["dying"]["rows"][0]["value"]
    assert sections["hanging"]["rows"][0]["value"] == 2 and "did not end within its time" in sections["hanging"]["rows"][1]["value"]
    assert sections["well"]["rows"][0]["state"] == "measured"


def test_a_kill_loses_no_row(tmp_path: Path) -> None:
    process = subprocess.Popen(command(tmp_path), stdout=subprocess.PIPE, text=True, env=environment())
    assert process.stdout is not None
    for line in process.stdout:
        if "golden pooled" in line:
            break
    process.kill()
    process.wait()
    told = [row["what"] for section in report(tmp_path)["sections"].values() for row in section["rows"]]
    assert "products in fp32, 256 x 256" in told and "golden pooled in fp32" in told
