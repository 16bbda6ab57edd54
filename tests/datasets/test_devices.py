"""What is given as --device is there, or refused in words."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from uniter.datasets.devices import float32_products, usable_device
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


def switches() -> list[str]:
    backends = torch.backends
    kinds: list[Any] = [backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.conv, backends.mkldnn.matmul, backends.cudnn, backends]
    return [kind.fp32_precision for kind in kinds]


@pytest.fixture
def as_before() -> Iterator[None]:
    """The switches of the process are as they were, whatever a test sets."""
    yield
    torch.backends.fp32_precision = torch.backends.cudnn.fp32_precision = "none"  # type: ignore[assignment]
    torch.backends.mkldnn.matmul.fp32_precision = torch.backends.mkldnn.conv.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision = "none"
    torch.backends.cudnn.conv.fp32_precision = "tf32"


@pytest.mark.skipif(not hasattr(torch._C, "_set_fp32_precision_setter"), reason="PyTorch before 2.9 has no such switches")
@pytest.mark.parametrize("program", ["nothing", "everything in TF32", "products in TF32", "the earlier switch", "medium"])
def test_products_are_exact_whatever_the_program_around_has_set(program: str, as_before: None) -> None:
    if program == "everything in TF32":
        torch.backends.fp32_precision = "tf32"  # type: ignore[attr-defined]
    elif program == "products in TF32":
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    elif program == "the earlier switch":
        torch.backends.cuda.matmul.allow_tf32 = True
    elif program == "medium":
        torch.set_float32_matmul_precision("medium")
    deterministic, torch.backends.cudnn.deterministic = torch.backends.cudnn.deterministic, True
    before = switches()
    try:
        with float32_products():
            assert switches()[:4] == ["ieee"] * 4 and torch.backends.cudnn.deterministic
        with pytest.raises(KeyError), float32_products(tf32=True):
            assert switches()[:4] == ["tf32", "tf32", "ieee", "ieee"]
            raise KeyError
        assert switches() == before and torch.backends.cudnn.deterministic
    finally:
        torch.backends.cudnn.deterministic = deterministic


def test_switches_that_followed_another_still_do(as_before: None) -> None:
    torch.backends.fp32_precision = "tf32"  # type: ignore[attr-defined]
    with float32_products():
        pass
    torch.backends.fp32_precision = "ieee"  # type: ignore[attr-defined]
    assert switches()[0] == "ieee"
