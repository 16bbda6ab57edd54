"""The benchmarks of training and of its memory run; the first one's opponent computes the same losses (it checks that itself)."""

from collections.abc import Callable
from types import ModuleType

import pytest

from uniter.model import UniterConfig, UniterForPretraining

TINY = ["--model=tiny", "--layers=2", "--examples=4", "--repeats=1", "--threads=1", "--clock=processor", "--no-bf16"]


def test_it_prints_its_table(script: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]) -> None:
    script("train").main(TINY)
    first, header, *rows = capsys.readouterr().out.splitlines()
    assert "2 layers, 4 examples a batch, 1 threads" in first and header.split()[:3] == ["batches", "task", "padding"]
    assert [row.split()[:2] for row in rows] == [
        [kind, task] for kind in ("sorted", "mixed") for task in ("mlm", "mrc-kl", "itm+alignment")
    ]
    assert all(float(row.split()[5]) > 0 for row in rows)


def test_what_a_pair_keeps_grows_with_pairs_and_layers(script: Callable[[str], ModuleType]) -> None:
    memory = script("memory")
    kept = {}
    for layers in (1, 2):
        model = UniterForPretraining(UniterConfig.preset("tiny", vocab_size=50, num_hidden_layers=layers)).train()
        kept[layers] = [memory.saved_bytes(model, memory.batch_of(pairs, model.config), bf16=False) for pairs in (2, 4)]
    assert kept[1][0] < kept[1][1] < kept[2][1] and kept[1][0] < kept[2][0] < kept[2][1]
