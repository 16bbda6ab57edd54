"""Is it right on this device: the golden outputs of UNITER's own code, packed against padded, compiled against eager.

Resuming needs databases and stands in databases.py.
"""

import importlib.util
import json
from collections.abc import Iterator
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import torch
import train as examples  # benchmarks/train.py: the padded model
from on_gpu.place import ROOT
from on_gpu.rows import Place, Row, attempted
from on_gpu.steps import batch_of, build
from torch import Tensor

from uniter.datasets.batches.filling import Room, fill, only_real
from uniter.model import losses
from uniter.model.heads.pretraining import UniterForPretraining
from uniter.model.tasks.compiling import compiled_head
from uniter.model.tasks.table import PRETRAINING
from uniter.model.uniter import UniterConfig, set_dropout

GOLDEN = ROOT / "tests" / "golden" / "uniter"
# Of |got - expected| / (1 + |expected|); the CPU keeps 1e-5, a GPU sums in other orders.
TOLERANCE = {"cpu": 1e-5, "cuda": 1e-4}
BF16 = 0.1
TASKS = {"mlm": "mlm", "mrfr": "mrfr", "mrc": "mrc", "mrckl": "mrc-kl", "itm_ot": "itm"}


def rows(place: Place) -> Iterator[Row]:
    """Each row is the largest difference, and WRONG where it is above what it may be."""
    torch.set_float32_matmul_precision("highest")
    yield from attempted("golden outputs", partial(_goldens, place), place)
    yield from attempted("packed against padded", partial(_padded, place), place)
    yield from attempted("gradients against the CPU's", partial(_gradients, place), place)
    yield from attempted("compiled against eager", partial(_compiled, place), place, needs_seconds=1 if place.small else 10)


def judged(what: str, difference: float, most: float) -> Row:
    """A row of a difference that must not be larger."""
    return Row(what, difference, wanted=f"at most {most:g}", state="measured" if difference <= most else "WRONG")


def difference(got: Any, expected: Any) -> float:
    """The largest |got - expected| / (1 + |expected|)."""
    one, other = (torch.as_tensor(value).detach().double().cpu() for value in (got, expected))
    return float(((one - other).abs() / (1 + other.abs())).max())


def _tests_of_the_model() -> ModuleType:
    """tests/model/conftest.py, which turns golden batches into packed ones."""
    description = importlib.util.spec_from_file_location("conftest_of_the_model", ROOT / "tests" / "model" / "conftest.py")
    assert description is not None and description.loader is not None
    module = importlib.util.module_from_spec(description)
    description.loader.exec_module(module)
    return module


def _goldens(place: Place) -> Iterator[Row]:
    if "safetensors" in place.absent:
        yield Row("golden outputs", "safetensors is not installed here", state="left out")
        return
    from safetensors.torch import load_file

    meta = json.loads((GOLDEN / "meta.json").read_text(encoding="utf-8"))
    config = UniterConfig.from_json(GOLDEN / "config.json", image_feature_size=meta["img_dim"], label_classes=meta["img_label_dim"])
    model = UniterForPretraining(config)
    packed = _tests_of_the_model().packed_from_padded
    for reduced in (False, True) if place.on_gpu else (False,):
        worst: dict[str, float] = {"hidden states": 0.0, "pooled": 0.0, "losses": 0.0}
        for golden, task in TASKS.items():
            model.load_state_dict(load_file(GOLDEN / "weights.safetensors"))  # a forward pass with masks writes a row
            model.to(place.device).eval()
            found = packed(np.load(GOLDEN / f"inputs_{golden}.npz"))
            expected, row, batch = np.load(GOLDEN / f"outputs_{golden}.npz"), PRETRAINING[task], found.batch.to(place.device)
            with torch.no_grad(), torch.autocast(place.device.type, dtype=torch.bfloat16, enabled=reduced):
                encoded = model(batch)
                hidden = encoded.hidden_NH[torch.cat([encoded.layout.text_rows_T, encoded.layout.region_rows_R])]
                rows_of = found.joint_rows[found.real].to(place.device)
                differences = {
                    "hidden states": difference(hidden[rows_of], expected["sequence_output"][found.real.numpy()]),
                    "pooled": difference(model.uniter.pooled(encoded), expected["pooled_output"]),
                }
                number = losses.of(row.losses(row.head(model, batch), batch.targets), weights=row.weights, reduction=row.reduction).number
                wanted = expected["total_loss_lambda0p1" if task == "itm" else "loss_mean"]
                differences["losses"] = difference(number, wanted)
            worst = {name: max(worst[name], differences[name]) for name in worst}
        for name, value in worst.items():
            yield judged(f"golden {name} in {'bf16' if reduced else 'fp32'}", value, BF16 if reduced else TOLERANCE[place.device.type])


def _padded(place: Place) -> Iterator[Row]:
    """The padded model of benchmarks/train.py has the same parameters."""
    model = build(place).eval()
    batch, pairs = batch_of(place, "mlm", 150 if place.small else 4096, model.config)
    moved = examples.padded(batch).to(place.device)
    words = batch.targets["words"]
    with torch.no_grad():
        got = model.masked_words(batch.to(place.device))["scores"]
        expected = examples.PaddedUniter(model).masked_words(moved)["scores"]
    assert len(got) == int((words != -1).sum())
    yield judged(f"packed against padded, {pairs} pairs, fp32", difference(got, expected), 1e-4)


def _gradients(place: Place) -> Iterator[Row]:
    """A small batch of every task, forward and backward, on this device by both kernels of attention, and on the CPU."""
    if not place.on_gpu:
        return
    cpu, config = torch.device("cpu"), UniterConfig.preset("tiny", image_feature_size=64, label_classes=9, vocab_size=100)
    for kernel, dtype, most in (("efficient", None, 1e-3), ("flash", torch.bfloat16, 5e-2)):
        worst, largest = "", 0.0
        for task in PRETRAINING:
            if task == "mrfr":  # made like masked classes but for its targets
                continue
            expected = _gradients_of(task, config, cpu, "auto", None)
            least = 0.01 * max(float(gradient.norm()) for gradient in expected.values())  # a key's bias has none but rounding's
            for name, got in _gradients_of(task, config, place.device, kernel, dtype).items():
                apart = float((got - expected[name]).norm()) / (float(expected[name].norm()) + least)
                worst, largest = (f"{task} {name}", apart) if apart > largest else (worst, largest)
        yield judged(f"gradients against the CPU's, attention {kernel}, {dtype or 'fp32'} ({worst})", largest, most)


def _gradients_of(task: str, config: UniterConfig, device: torch.device, kernel: Any, dtype: torch.dtype | None) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model, row = UniterForPretraining(config), PRETRAINING[task]
    set_dropout(model.to(device).train(), 0.0)
    model.uniter.attention_kernel = kernel
    kind = "mrc-kl" if task == "mrc" else task
    batch = examples.make_batch(kind, np.array([7, 3, 9]), np.array([5, 8, 2]), config, seed=0).to(device)
    with torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        terms = row.losses(row.head(model, batch), batch.targets)
        number = losses.of(terms, weights=row.weights, reduction=row.reduction).number
    number.backward()
    return {name: value.grad.cpu() for name, value in model.named_parameters() if value.grad is not None}


def _compiled(place: Place) -> Iterator[Row]:
    model, row = build(place), PRETRAINING["mlm"]
    del model.uniter.encoder.layer[2:]
    set_dropout(model, 0.0)
    batch, pairs = batch_of(place, "mlm", 150 if place.small else 2048, model.config)
    room = Room(256 if place.small else 2304, pairs + 2, 320, int(batch.text_lengths_B.max()), int(batch.region_counts_B.max()))
    filled = fill(batch, room).to(place.device)
    head = compiled_head(row, backend="inductor" if place.on_gpu else "aot_eager")
    with torch.no_grad():
        expected = row.head(model, batch.to(place.device))["scores"]
        got = only_real(head(model, filled), filled)[0]["scores"]
    yield judged("compiled against eager, fp32", difference(got, expected), 1e-5 if not place.on_gpu else 1e-4)
