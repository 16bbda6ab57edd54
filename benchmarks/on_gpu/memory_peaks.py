"""The largest memory of an update, beside what the table of docs/pretraining.md says."""

import re
from collections.abc import Iterator
from functools import partial

import memory as counted  # benchmarks/memory.py: the batches of the table
import torch
from on_gpu.place import ROOT
from on_gpu.rows import Place, Row, attempted
from on_gpu.steps import build

from uniter.model.losses import masked_words
from uniter.model.train.optim import AdamW, clear_gradients, parameter_groups

CASES = (("base", "bf16", 500), ("base", "bf16", 1000), ("base", "fp32", 400), ("large", "bf16", 250))


def table() -> dict[tuple[str, str], tuple[float, float]]:
    """(model, precision) -> GiB of weights, gradients and moments, and MiB of a pair, as the documentation says them."""
    text = (ROOT / "docs" / "pretraining.md").read_text(encoding="utf-8")
    found = re.findall(r"^\| (base|large) \| (fp32|bf16) \| ([\d.]+) GiB \| ([\d.]+) MiB \|", text, re.MULTILINE)
    return {(model, precision): (float(fixed), float(pair)) for model, precision, fixed, pair in found}


def rows(place: Place) -> Iterator[Row]:
    """Measured and said, for a few sizes; nothing on a CPU, which has no such count."""
    said = table()
    yield Row("rows of the documentation's table", len(said), wanted="4", state="measured" if len(said) == 4 else "WRONG")
    if not place.on_gpu:
        yield Row("peak memory", "PyTorch counts it on a GPU only", state="left out")
        return
    for model, precision, pairs in CASES:
        if (model, precision) in said:
            work = partial(_peak, place, model, precision, pairs, *said[model, precision])
            yield from attempted(f"{model}, {precision}, {pairs} pairs", work, place, needs_seconds=4)


def _peak(place: Place, size: str, precision: str, pairs: int, fixed: float, pair: float) -> Iterator[Row]:
    torch.cuda.empty_cache()
    model = build(place, size)
    optimizer = AdamW(parameter_groups(model, weight_decay=0.01), lr=1e-6)
    optimizer.unusable = torch.zeros((), device=place.device)
    batch = counted.batch_of(pairs, model.config).to(place.device)
    for _ in range(2):  # moments come with the first
        torch.cuda.reset_peak_memory_stats(place.device)
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=precision == "bf16"):
            number = masked_words(model.masked_words(batch), batch.targets)["cross_entropy"].mean()
        number.backward()
        optimizer.step()
        clear_gradients(optimizer, "none")
    place.wait()
    expected = fixed + pairs * pair / 1024
    used, reserved = (read(place.device) / 2**30 for read in (torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved))
    name = f"{size}, {precision}, {pairs} pairs"
    yield Row(f"{name}: peak", used, "GiB", f"the table says {expected:.1f}")
    yield Row(f"{name}: peak over the table's", used / expected, wanted="about 1; above 1.1 the table promises too much")
    yield Row(f"{name}: reserved by PyTorch", reserved, "GiB", f"the table sets {counted.RESERVE / 2**30:g} GiB aside beside the peak")
