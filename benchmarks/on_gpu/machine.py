"""What the machine is, and what it reaches on the two shapes that all of this is made of: products and convolutions."""

import os
import platform
import subprocess
from collections.abc import Iterator
from functools import partial

import torch
from on_gpu.rows import Place, Row, attempted, seconds_each
from torch.nn import functional as F


def rows(place: Place) -> Iterator[Row]:
    """Name, memory, versions; rates of products, of the RoI head's convolution, and of copies."""
    yield Row("Python, PyTorch", f"{platform.python_version()}, {torch.__version__}")
    yield Row("cores", len(os.sched_getaffinity(0)))
    yield Row("libraries absent here", ", ".join(place.absent) or "none")
    if place.on_gpu:
        yield from attempted("the card", partial(_card, place), place)
    types = {"fp32": torch.float32, "bf16": torch.bfloat16}
    for name, dtype in types.items():
        yield from attempted(f"products in {name}", partial(_products, place, name, dtype), place)
        yield from attempted(f"convolution in {name}", partial(_convolution, place, name, dtype), place)
    yield from attempted("copies from pinned memory", partial(_copies, place), place)


def _card(place: Place) -> Iterator[Row]:
    found = torch.cuda.get_device_properties(place.device)
    yield Row("card", found.name)
    yield Row("its memory", round(found.total_memory / 2**30, 1), "GiB")
    yield Row("capability", f"{found.major}.{found.minor}", wanted="flash attention from 8.0")
    yield Row("bf16", bool(torch.cuda.is_bf16_supported()))
    yield Row("CUDA, cuDNN of PyTorch", f"{torch.version.cuda}, {torch.backends.cudnn.version()}")
    yield Row("GPUs that PyTorch sees", torch.cuda.device_count())
    asked = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, timeout=15).stdout.strip().splitlines()
        yield Row("driver, highest clock, power limit", said[0] if said else "unknown")
    except (OSError, subprocess.SubprocessError) as error:
        yield Row("driver", f"nvidia-smi cannot be asked ({type(error).__name__})", state="left out")


def _products(place: Place, name: str, dtype: torch.dtype) -> Iterator[Row]:
    size = 256 if place.small else 8192
    left, right = (torch.randn(size, size, device=place.device, dtype=dtype) for _ in range(2))
    seconds = seconds_each(lambda: left @ right, place, most=1.0)
    yield Row(
        f"products in {name}, {size} x {size}", 2 * size**3 / seconds / 1e12, "TFLOP/s", "H100: 790 measured in bf16" if size > 256 else ""
    )


def _convolution(place: Place, name: str, dtype: torch.dtype) -> Iterator[Row]:
    """The 3 x 3 convolution of the RoI head, 512 channels at 14 x 14, channels last."""
    regions, channels = (2, 64) if place.small else (300, 512)
    maps = torch.randn(regions, channels, 14, 14, device=place.device, dtype=dtype).to(memory_format=torch.channels_last)
    weight = torch.randn(channels, channels, 3, 3, device=place.device, dtype=dtype).to(memory_format=torch.channels_last)
    seconds = seconds_each(lambda: F.conv2d(maps, weight, padding=1), place, most=1.0)
    yield Row(f"the RoI head's convolution in {name}, {regions} regions", 2 * regions * 196 * 9 * channels**2 / seconds / 1e12, "TFLOP/s")


def _copies(place: Place) -> Iterator[Row]:
    if not place.on_gpu:
        return
    host = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
    into = torch.empty_like(host, device=place.device)
    seconds = seconds_each(lambda: into.copy_(host, non_blocking=True), place, most=0.5)
    yield Row("copies from pinned memory", len(host) / seconds / 1e9, "GB/s", "17,400 pairs/s need 2.9")
