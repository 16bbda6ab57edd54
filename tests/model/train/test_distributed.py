"""Two processes equal one that accumulates twice as long; what dies is named and can be resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from uniter.datasets.errors import BadInput
from uniter.datasets.runs.run_log import read_log
from uniter.datasets.runs.step_folders import checkpoint_path, checkpoint_steps
from uniter.model.settings.files import write_config
from uniter.model.settings.settings import TrainSettings
from uniter.model.train import state
from uniter.model.train.distributed import choose_device
from uniter.model.train.pretraining import pretrain
from uniter.model.train.runs import _accumulation_of_resumed

Make = Callable[..., TrainSettings]


def torchrun(settings: TrainSettings, run: Path, *, processes: int) -> subprocess.Popen[str]:
    run.parent.mkdir(parents=True, exist_ok=True)
    write_config(run.parent / f"{run.name}.yaml", settings)
    # As the documentation says: torchrun --nproc-per-node N --no-python uniter-train pretrain ...
    scripts = Path(sys.executable).parent
    command = [str(scripts / "torchrun"), "--standalone", f"--nproc-per-node={processes}", "--no-python", str(scripts / "uniter-train")]
    command += ["pretrain", "--config", f"{run}.yaml", "--out", str(run), "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)


def finished(process: subprocess.Popen[str]) -> dict:
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    return json.loads(out)  # one object: only the first process speaks


def assert_close_runs(one: Path, other: Path, *, step: int = 8) -> None:
    """To 1e-6, relative to each tensor's scale."""
    left, right = (load_file(checkpoint_path(run, step) / "model.safetensors") for run in (one, other))
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.allclose(tensor, right[name], rtol=1e-6, atol=1e-6), name
    losses = [[line["loss"] for line in read_log(run)] for run in (one, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_two_processes_equal_one_with_twice_the_accumulation_and_resume_as_one(small: Make, tmp_path: Path) -> None:
    two, one, resumed = tmp_path / "two", tmp_path / "one", tmp_path / "resumed"
    running = torchrun(small(accumulation=1), two, processes=2)
    pretrain(small(accumulation=2), one)
    summary = finished(running)
    assert summary["steps"] == 8
    assert_close_runs(one, two)
    # Two processes stop, one goes on: as many micro-batches an update as before.
    assert finished(torchrun(small(accumulation=1, stop_after=4), resumed, processes=2))["steps"] == 4
    pretrain(small(accumulation=1), resumed)
    assert_close_runs(one, resumed)
    assert state.read_state(checkpoint_path(resumed, 8))[0].micro_batches == 2


@pytest.mark.slow
def test_published_normalisation_averages_over_processes(small: Make, tmp_path: Path) -> None:
    """Sums over micro-batches, then the mean over processes: two processes of two take half the step of one of four, before clipping."""
    settings = {"normalisation": "published", "steps": 1, "validate_every": 1, "checkpoint_every": 1}
    finished(torchrun(small(accumulation=2, **settings), tmp_path / "two", processes=2))
    pretrain(small(accumulation=4, **settings), tmp_path / "one")
    norms = [next(line["grad_norm"] for line in read_log(tmp_path / run) if line["kind"] == "train") for run in ("one", "two")]
    assert norms[0] == pytest.approx(2 * norms[1], rel=1e-5)


@pytest.mark.slow
def test_two_processes_that_are_told_to_stop_write_one_checkpoint(small: Make, tmp_path: Path) -> None:
    """A pre-emption signals torchrun, which tells its processes; the run goes on as if nothing had been."""
    settings = {"accumulation": 1, "steps": 400, "checkpoint_every": 400, "validate_every": 400}
    run = tmp_path / "run"
    process = torchrun(small(**settings), run, processes=2)
    wait_until(lambda: (run / "log.jsonl").is_file() and len(read_log(run)) > 5, process)
    process.terminate()
    _, said = process.communicate(timeout=300)
    (stopped_at,) = checkpoint_steps(run)
    assert process.returncode != 0 and f"stopped by SIGTERM after update {stopped_at} of 400" in said
    assert read_log(run)[-1]["step"] == stopped_at
    finished(torchrun(small(**settings, stop_after=stopped_at + 2), run, processes=2))
    pretrain(small(**{**settings, "accumulation": 2}, stop_after=stopped_at + 2), tmp_path / "one")
    assert_close_runs(tmp_path / "one", run, step=stopped_at + 2)


def wait_until(true: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    for _ in range(3000):
        if true():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    raise AssertionError("the run never came so far")


@pytest.mark.slow
def test_a_dead_process_ends_the_run_which_then_resumes(small: Make, tmp_path: Path) -> None:
    settings = small(accumulation=1, steps=300, checkpoint_every=5, validate_every=300)
    run = tmp_path / "run"
    process = torchrun(settings, run, processes=2)
    wait_until(lambda: bool(checkpoint_steps(run)), process)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, said = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "another process of this run ended" in said or "SIGKILL" in said or "-9" in said
    stopped_at = checkpoint_steps(run)[-1]
    summary = pretrain(small(accumulation=1, steps=300, checkpoint_every=5, validate_every=300, stop_after=stopped_at + 2), run)
    assert summary["steps"] == stopped_at + 2


def test_a_number_of_processes_that_cannot_share_is_refused() -> None:
    assert _accumulation_of_resumed(state.Progressed(micro_batches=6), 2) == 3
    with pytest.raises(BadInput, match="3 micro-batches, which 2 processes cannot share evenly"):
        _accumulation_of_resumed(state.Progressed(micro_batches=3), 2)


def test_devices_are_named_plainly() -> None:
    assert choose_device("cpu").type == "cpu"
    with pytest.raises(BadInput, match="device 'gpu': no such device"):
        choose_device("gpu")
    if not torch.cuda.is_available():
        assert choose_device(None).type == "cpu"
        with pytest.raises(BadInput, match="PyTorch sees no GPU here"):
            choose_device("cuda")
