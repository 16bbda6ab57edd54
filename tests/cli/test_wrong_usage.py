"""A value that no input could give ends every command with exit code 2, and a sentence that says what was expected."""

from importlib import import_module
from pathlib import Path

import pytest
from click.testing import CliRunner

CAPTIONS = '{"id": "1", "image": "a.jpg", "caption": "a cat"}\n'
DATA = ("--text", "a.db", "--images", "a.lmdb", "--out", "x")


@pytest.mark.parametrize(
    ("module", "words", "sentence"),
    [
        ("extract", ["photos", "x", "--key", "{nome}"], "did you mean 'name'"),
        ("extract", ["photos", "x", "--detector", "on-bord"], "did you mean 'on-board'"),
        ("extract", ["photos", "x", "--detector", "on-board", "--device", "gpu"], "expected cpu, cuda or cuda:N"),
        ("extract", ["photos", "x", "--wieghts", "f"], "Did you mean '--weights'"),
        ("build_db", ["c.jsonl", "x.db", "--task", "vqaa"], "did you mean 'vqa'"),
        ("build_db", ["c.jsonl", "x.db", "--format", "cocoo"], "did you mean 'coco'"),
        ("build_db", ["c.jsonl", "x.db", "--tokenizer", "train:many"], "expected train:SIZE"),
        ("build_db", ["c.jsonl", "x.db", "--key", "{nome}"], "did you mean 'name'"),
        ("build_db", ["c.jsonl", "x.db", "--split", "trian"], "leave --split away"),
        ("build_db", ["c.jsonl", "x.db", "--score"], "--score does nothing with --task captions"),
        ("db", ["convert", "photos", "x", "--to", "m2x"], "did you mean 'm2'"),
        ("db", ["infoo", "photos"], "Did you mean 'info'"),
        ("train", ["predict", "mach"], "did you mean 'match'"),
        ("train", ["predict", "vqaa", "--from", "r", *DATA], "did you mean 'vqa'"),
        ("train", ["predict", "match", "--from", "r", "--image", "photos", "--text", "t", "--out", "x.docx"], "ends with .jpg or .png"),
        ("train", ["evaluate", "pretrian", "--from", "r"], "did you mean 'pretrain'"),
        ("train", ["finetune", "vqaa", *DATA], "did you mean 'vqa'"),
        ("train", ["finetune", "vqa", *DATA, "--set", "nope=3"], "unknown key 'nope'"),
        ("train", ["finetune", "vqa", *DATA, "--set", "optimizer.learning_rate=-3"], "should be greater than 0"),
        ("train", ["finetune", "vqa", *DATA, "--set", "nope"], "expected KEY=VALUE"),
        ("train", ["finetune", "vqa", *DATA, "--config", "vqa-bse"], "did you mean 'vqa-base'"),
        ("train", ["pretrain", *DATA, "--tasks", "mlm:x"], "'x' is no number"),
        ("train", ["recipes", "--show", "vqa-bse"], "did you mean 'vqa-base'"),
        ("train", ["export", "--from", "r", "--to", "hubb", "x"], "is not one of"),
        ("view", ["photos", "--out", "x", "--limit", "-3"], "not in the range"),
        ("scenes", ["x", "--world", "shaps"], "did you mean 'shapes'"),
        ("scenes", ["x", "--images", "3", "--held-out", "30"], "fewer held out than there are"),
    ],
)
def test_exit_code_2(module: str, words: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"")
    (tmp_path / "c.jsonl").write_text(CAPTIONS)
    result = CliRunner().invoke(import_module(f"uniter.cli.{module}").main, words)
    assert result.exit_code == 2 and sentence in result.stderr, result.output
    assert not result.stdout and not (tmp_path / "x").exists() and not (tmp_path / "x.db").exists()


def test_each_task_and_question_has_its_own_usage_and_line() -> None:
    from uniter.cli.train import main
    from uniter.model.tasks.table import DOWNSTREAM

    listed = CliRunner().invoke(main, ["predict", "--help"]).stdout
    for name in ("match", "answer", "ground", "rank", *DOWNSTREAM):
        assert any(line.split()[:1] == [name] and len(line.split()) > 1 for line in listed.splitlines()), name
        usage = CliRunner().invoke(main, ["predict", name, "--help"]).stdout
        assert usage.startswith("Usage: ") and f"predict {name} " in usage.splitlines()[0], usage.splitlines()[0]
