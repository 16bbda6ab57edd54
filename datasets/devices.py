"""Where to compute, and how exactly: the one check of what users give as `--device`, and PyTorch's switches for products of float32."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from uniter.datasets.errors import BadInput, WrongUsage


def fitting_precision(device: torch.device) -> str:
    """ "bf16" on a GPU that computes in it, else "fp32"."""
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def computing_in(precision: str, device: torch.device) -> torch.autocast:
    """The context of a forward pass: under "bf16" what suits it is computed in it; weights stay as they are."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def usable_device(name: str | None, *, local_index: int = 0) -> torch.device:
    """The device of that name, once it is known to be there.

    Args:
        name: "cpu", "cuda", "cuda:N" or another kind of PyTorch's; None and "auto" take a GPU where there is one.
        local_index: this process's number on its machine; "cuda" is the GPU of that number.

    Raises:
        BadInput: there is no such device here.
    """
    if name in (None, "auto"):
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(str(name))
    except RuntimeError:
        raise WrongUsage(f"device {name!r}: no such device; expected cpu, cuda or cuda:N") from None
    if device.type == "cpu" and device.index not in (None, 0):
        raise WrongUsage(f"device {name!r}: PyTorch knows one CPU, however many cores it has; give cpu (OMP_NUM_THREADS limits the cores)")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise BadInput(f"device {name!r}: PyTorch sees no GPU here; leave --device out or give cpu")
        if device.index is not None and device.index >= count:
            raise BadInput(f"device {name!r}: PyTorch sees {count} GPUs here, the last of them cuda:{count - 1}")
        return torch.device("cuda", local_index % count if device.index is None else device.index)
    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise BadInput(f"device {name!r} cannot be used here ({reason[:200]}); expected cpu, cuda or cuda:N") from error
    return device


@contextmanager
def float32_products(*, tf32: bool = False) -> Iterator[None]:
    """Multiply float32 in float32, whatever the program around has allowed, or on a GPU in TF32; its switches are as before afterwards.

    PyTorch since 2.9 has a switch for each library and kind of product, and those of earlier versions raise where both kinds were used. So
    only the new ones are touched where they are.
    """
    if not hasattr(torch._C, "_set_fp32_precision_setter"):
        before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
        return
    cuda: Any = torch.backends.cudnn
    mkldnn: Any = torch.backends.mkldnn
    switches: list[tuple[Any, Any, str]] = [(torch.backends.cuda.matmul, cuda, "tf32" if tf32 else "ieee")]
    switches += [(cuda.conv, cuda, "tf32" if tf32 else "ieee"), (mkldnn.conv, mkldnn, "ieee"), (mkldnn.matmul, mkldnn, "ieee")]
    # What a switch says may come from the one above it: then it goes back to following that one.
    said = [(switch, switch.fp32_precision, above.fp32_precision) for switch, above, _ in switches]
    for switch, _, wanted in switches:
        switch.fp32_precision = wanted
    try:
        yield
    finally:
        for switch, own, followed in said:
            switch.fp32_precision = "none" if own == followed else own
