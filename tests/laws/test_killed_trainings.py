"""Pre-training and fine-tuning killed at random instants and repeated end as unbroken ones, and touch nothing of others.

`UNITER_KILLS` says how often; every kill costs the start of a process.
"""

import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

KILLS = int(os.environ.get("UNITER_KILLS", "3"))
SMALL = [
    "model.hidden_size=32", "model.num_hidden_layers=1", "model.num_attention_heads=2", "model.intermediate_size=48", "batch_tokens=200",
    "tensorboard=false", "workers=0", "checkpoint_every=1", "validate_every=10", "keep=2", "optimizer.unused_gradients=zero",
]  # fmt: skip
STEPS = 40


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory, made_up: Any) -> dict[str, list[str]]:
    folder = tmp_path_factory.mktemp("world")
    world = made_up.World(width=16)
    texts, images = world.write(folder, pictures=30, captions=2)
    entailment = world.write_task(folder, "ve", count=80)
    shared = ["--images", images, "--steps", STEPS, "--device", "cpu"] + [word for one in SMALL for word in ("--set", one)]
    return {
        "pretrain": [str(word) for word in ("pretrain", "--text", texts, *shared)],
        "finetune": [str(word) for word in ("finetune", "ve", "--text", entailment, *shared)],
    }


def start(words: list[str], out: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "uniter.cli.train", *words, "--out", str(out)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def weights(out: Path) -> dict[str, Any]:
    latest, tensors = out / "checkpoints" / "latest", {}
    for name in ("model", "optimizer"):
        tensors |= {f"{name} {key}": value for key, value in load_file(latest / f"{name}.safetensors").items()}
    return tensors


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_killed_at_random_instants_it_ends_as_if_never_killed(kind: str, commands: dict[str, list[str]], tmp_path: Path) -> None:
    rng, words = random.Random(kind), commands[kind]
    began = time.monotonic()
    whole = start(words, tmp_path / "unbroken")
    said = whole.communicate()[0].decode()
    assert whole.returncode == 0, said
    takes = time.monotonic() - began
    expected, best = weights(tmp_path / "unbroken"), (tmp_path / "unbroken" / "checkpoints" / "best").readlink()
    killed = ended = 0
    while killed < KILLS:
        out = tmp_path / f"killed-{ended}"
        alive = True
        while alive and killed < KILLS:
            process = start(words, out)
            try:
                process.communicate(timeout=rng.uniform(0, takes))
                alive = False
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                killed += 1
                if (out / "config.yaml").exists():
                    (out / "thesis.txt").write_text("mine")  # somebody else's file in a run of ours
        last = start(words, out)
        said = last.communicate()[0].decode()
        assert last.returncode == 0 and "Traceback" not in said, said
        found = weights(out)
        assert found.keys() == expected.keys()
        assert not [name for name, values in expected.items() if not np.array_equal(values, found[name])]
        assert (out / "checkpoints" / "best").readlink() == best
        assert not [path.name for path in (out / "checkpoints").iterdir() if path.name.startswith(".")]
        assert not (out / "thesis.txt").exists() or (out / "thesis.txt").read_text() == "mine"
        ended += 1
