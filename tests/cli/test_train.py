"""`uniter-train`: what its commands print, and what they say when something is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from uniter.cli.train import main
from uniter.model.tasks import DOWNSTREAM

TINY = [
    "model.hidden_size=32", "model.num_hidden_layers=2", "model.num_attention_heads=4", "model.intermediate_size=64", "batch_tokens=200",
    "tensorboard=false",
]  # fmt: skip


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, made_up: Any) -> tuple[Path, Path]:
    return made_up.World(width=16).write(tmp_path_factory.mktemp("world"), pictures=30)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, world: tuple[Path, Path]) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    result = run("pretrain", "--text", world[0], "--images", world[1], "--out", out, "--steps", 4, "--device", "cpu", *sets(TINY), "--json")
    assert result.exit_code == 0, result.stderr
    summary = json.loads(result.stdout)
    assert summary["steps"] == 4 and set(summary["validation"]) == {"itm_data", "mlm_data", "mrfr_data", "mrc-kl_data"}
    return out


def sets(assignments: list[str]) -> list[str]:
    return [word for assignment in assignments for word in ("--set", assignment)]


def test_a_run_directory_holds_what_the_contract_says(trained: Path) -> None:
    assert {path.name for path in trained.iterdir()} == {"config.yaml", "log.jsonl", "checkpoints"}
    assert (trained / "checkpoints" / "latest").resolve().name == "step-4"


def test_the_same_command_resumes(trained: Path, world: tuple[Path, Path]) -> None:
    result = run("pretrain", "--text", world[0], "--images", world[1], "--out", trained, "--steps", 4, "--device", "cpu", *sets(TINY))
    assert result.exit_code == 0, result.stderr
    assert "resuming after update 4" in result.stderr
    other = run(
        "pretrain", "--text", world[0], "--images", world[1], "--out", trained, "--steps", 4, "--seed", 7, "--device", "cpu", *sets(TINY)
    )
    assert other.exit_code == 1
    assert "error: " in other.stderr and "seed: 42 -> 7" in other.stderr


def test_evaluate_prints_the_figures(trained: Path, world: tuple[Path, Path]) -> None:
    words = ("evaluate", "pretrain", "--from", trained, "--text", world[0], "--images", world[1], "--candidates", 5, "--device", "cpu")
    result = run(*words, "--json")
    assert result.exit_code == 0, result.stderr
    figures = json.loads(result.stdout)
    for name in (
        "mlm.accuracy", "mlm.accuracy_other_picture", "itm.accuracy", "mrc-kl.kl", "mrc-kl.kl_of_mean", "mrfr.mse",
        "retrieval.text_r1", "retrieval.image_r1", "retrieval.candidates",
    ):  # fmt: skip
        group, figure = name.split(".")
        assert isinstance(figures[group][figure], int | float), name
    assert figures["retrieval"]["candidates"] == 5
    assert json.loads(run(*words, "--json").stdout) == figures
    chosen = json.loads(run(*words, "--words", "red,blue", "--json").stdout)
    assert chosen["mlm"]["accuracy"] == figures["mlm"]["accuracy"] and "words_accuracy" in chosen["mlm"]
    table = run(*words)
    assert "mlm.accuracy_other_picture" in table.stdout


def test_export_and_start_again(trained: Path, world: tuple[Path, Path], tmp_path: Path) -> None:
    for layout, out in (("published", tmp_path / "uniter.pt"), ("hub", tmp_path / "shared")):
        result = run("export", "--from", trained, "--to", layout, out)
        assert result.exit_code == 0, result.stderr
    shared = {path.name for path in (tmp_path / "shared").iterdir()}
    assert shared == {"model.safetensors", "config.json", "vocab.txt", "tokenizer_config.json", "README.md"}
    assert {path.name for path in tmp_path.glob("uniter*")} == {"uniter.pt", "uniter.json", "uniter-vocab.txt"}
    assert "mlm_data/accuracy" in (tmp_path / "shared" / "README.md").read_text()
    weights = load_file(trained / "checkpoints" / "latest" / "model.safetensors")
    shared = load_file(tmp_path / "shared" / "model.safetensors")
    assert all((weights[name] == shared[name]).all() for name in shared)
    assert weights.keys() - shared.keys() == {"cls.predictions.decoder.weight", "feat_regress.weight"}, "a second name of what is there"
    result = run(
        "pretrain", "--from", tmp_path / "uniter.pt", "--text", world[0], "--images", world[1], "--out", tmp_path / "again", "--steps", 2,
        "--device", "cpu", "--set", "tensorboard=false",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["pretrain", "--text", "a.db"], 2, "give both --text and --images"),
        (["pretrain", "--text", "a.db", "--images", "b.lmdb"], 2, "Missing option '--out'"),
        (
            ["pretrain", "--text", "a.db", "--images", "b.lmdb", "--out", "x", "--set", "stps=3"],
            2,
            "unknown key 'stps'; did you mean 'steps'?",
        ),
        (["pretrain", "--text", "nowhere.db", "--images", "b.lmdb", "--out", "x"], 1, "text database nowhere.db is not there"),
        (["pretrain", "--config", "tinyy", "--out", "x"], 2, "unknown shipped settings 'tinyy'"),
        (["pretrain", "--root", "/img=x", "--out", "x"], 1, "--root maps the container paths"),
        (["evaluate", "pretain", "--from", "x"], 2, "unknown task 'pretain'; did you mean 'pretrain'?"),
        (["evaluate", "pretrain", "--from", "nowhere", "--text", "a.db", "--images", "b"], 1, "a.db"),
        (
            ["evaluate", "vqa", "--from", "x", "--candidates", "50"],
            2,
            "--candidates is of `evaluate pretrain`; evaluating vqa",
        ),
        (["evaluate", "vqa", "--from", "x", "--words", "red"], 2, "--words is of `evaluate pretrain`; evaluating vqa does nothing"),
        (["pretrain", "--text", "a.db", "--images", "b.lmdb", "--out", "x", "--device", "cpu:7"], 2, "device 'cpu:7'"),
        (["export", "--from", "nowhere.pt", "--to", "hub", "x"], 1, "no file or folder nowhere.pt"),
    ],
)
def test_what_is_wrong_is_one_line(words: list[str], code: int, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*words)
    assert result.exit_code == code, result.stderr
    assert sentence in result.stderr
    if code == 1:
        assert len(result.stderr.strip().splitlines()) == 1


def test_soft_labels_asked_for_by_name(tmp_path: Path, made_up: Any) -> None:
    texts, images = made_up.World(width=16).write(tmp_path, pictures=10, soft_labels=False)
    words = ("pretrain", "--text", texts, "--images", images, "--steps", 1, "--device", "cpu", *sets(TINY))
    result = run(*words, "--set", "corpora.0.tasks={mlm: 1, mrc-kl: 1}", "--out", tmp_path / "asked")
    assert result.exit_code == 1 and "task mrc-kl needs the detector's soft labels" in result.stderr
    result = run(*words, "--out", tmp_path / "run")
    assert result.exit_code == 0 and "so mrc-kl is left out" in result.stderr


@pytest.mark.parametrize("command", ["pretrain", "evaluate", "export"])
def test_help_has_an_example(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0 and f"uniter-train {command}" in result.stdout
    assert run("--version").exit_code == 0


def test_help_lists_the_tasks_of_the_table() -> None:
    assert "itm:2, mlm:2, mrfr:1, mrc-kl:1" in " ".join(run("pretrain", "--help").stdout.split())
    for command in (["finetune"], ["evaluate"], ["predict"], ["predict", "vqa"]):
        said = run(*command, "--help").stdout
        assert all(name in said for name in DOWNSTREAM), command


def test_every_setting_is_explained() -> None:
    assert "optimizer.learning_rate: open" in run("pretrain", "--explain").stdout


def test_recipes_are_listed_and_shown() -> None:
    listed = run("recipes")
    assert listed.exit_code == 0 and "vqa-base-villa: vqa, 6,000 updates of 800 examples" in listed.stdout
    (row,) = [one for one in json.loads(run("recipes", "--json").stdout)["recipes"] if one["name"] == "nlvr2-large"]
    assert (row["task"], row["processes"], row["steps"], row["start"]) == ("nlvr2", 2, 5000, "uniter-large.pt")
    assert "nlvr2_train.db" in row["data"] and row["memory"] > 0 and row["hours"] > 0
    assert yaml.safe_load(run("recipes", "--show", "vqa-base").stdout)["steps"] == 6000
    assert run("recipes", "--show", "vqa-base", "--json").exit_code == 2
    assert "unknown shipped settings 'vqa-bas'; did you mean 'vqa-base'?" in run("recipes", "--show", "vqa-bas").stderr


def test_a_licence_goes_into_the_card(trained: Path, tmp_path: Path) -> None:
    assert run("export", "--from", trained, "--to", "hub", tmp_path / "shared", "--license", "mit").exit_code == 0
    assert "license: mit" in (tmp_path / "shared" / "README.md").read_text()
    refused = run("export", "--from", trained, "--to", "published", tmp_path / "x.pt", "--license", "mit")
    assert refused.exit_code == 1 and "--license goes into the card" in refused.stderr
