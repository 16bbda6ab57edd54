"""What is given as --device is there, or refused in words."""

import pytest
import torch

from uniter.datasets.devices import usable_device
from uniter.datasets.errors import BadInput


def test_a_device_that_is_there() -> None:
    assert usable_device("cpu") == torch.device("cpu")
    assert usable_device("cpu:0").type == "cpu"
    chosen = usable_device(None)
    assert chosen == usable_device("auto") and chosen.type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cpu:7", "knows one CPU"),
        ("gpu", "no such device; expected cpu, cuda or cuda:N"),
        ("cuda:99", "PyTorch sees"),
        ("meta", "'meta' cannot be used here"),
        ("mps:3", "'mps:3' cannot be used here"),
    ],
)
def test_a_device_that_is_not_there(name: str, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        usable_device(name)


def test_gpus_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert usable_device("cuda", local_index=3) == torch.device("cuda:1")
    assert usable_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(BadInput, match="PyTorch sees 2 GPUs here, the last of them cuda:1"):
        usable_device("cuda:2")
