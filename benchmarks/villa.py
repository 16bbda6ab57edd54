"""Adversarial training (VILLA): what an update costs, and what it brings on the made-up world.

    python benchmarks/villa.py cost --model tiny
    python benchmarks/villa.py cost --model base --precision bf16 --tokens 5120 --device cuda
    python benchmarks/villa.py compare --out villa/

`cost` takes turns between plain and adversarial updates of VQA on one made-up batch and prints the median of each, and on a GPU the
memory at its highest. `compare` pre-trains one model and fine-tunes it for VQA, NLVR2 and retrieval (`downstream.py` has the worlds and
databases), plainly and adversarially, with the same seeds, examples and numbers of updates; the differences are paired by seed. The same
command again goes on where it was stopped.
"""

import argparse
import importlib
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from uniter.datasets.batches.collate import PackedBatch
from uniter.datasets.storage.files import write_json
from uniter.model import UniterConfig
from uniter.model.settings.settings import AdversarialSettings
from uniter.model.tasks.table import DOWNSTREAM
from uniter.model.tasks.task import extras
from uniter.model.train.adversarial import with_divergence
from uniter.model.train.loop import Recipe, _forward_backward
from uniter.model.train.optim import AdamW, clip_gradients, parameter_groups, set_learning_rate

WORDS, REGIONS, ANSWERS = 11, 40, 3129


def batch_of(tokens: int, config: UniterConfig, device: torch.device) -> PackedBatch:
    """Questions of 11 word pieces about pictures of 40 regions."""
    pairs, generator = max(tokens // (WORDS + REGIONS), 1), torch.Generator().manual_seed(0)
    batch = PackedBatch(
        input_ids_T=torch.randint(5, config.vocab_size, (pairs * WORDS,), generator=generator),
        text_positions_T=torch.arange(WORDS).repeat(pairs),
        text_types_T=torch.zeros(pairs * WORDS, dtype=torch.int64),
        features_RD=torch.rand(pairs * REGIONS, config.image_feature_size, generator=generator).half(),
        positions_R7=torch.rand(pairs * REGIONS, 7, generator=generator),
        region_types_R=torch.ones(pairs * REGIONS, dtype=torch.int64),
        text_lengths_B=torch.full((pairs,), WORDS),
        region_counts_B=torch.full((pairs,), REGIONS),
        targets={"answers": torch.rand(pairs, ANSWERS, generator=generator)},
        example_ids=[str(number) for number in range(pairs)],
    )
    return batch.to(device)


def updates(arguments: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """An update of each kind, ready to be made, on one model."""
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    task = DOWNSTREAM["vqa"]
    torch.manual_seed(0)
    model = extras(task).model(UniterConfig.preset(arguments.model), answers=ANSWERS).to(device).train()
    batch = batch_of(arguments.tokens, model.config, device)
    optimizer = AdamW(parameter_groups(model, weight_decay=0.01), lr=1.0)
    set_learning_rate(optimizer, 1e-5)

    def update_with(adversarial: AdversarialSettings | None) -> Callable[[], None]:
        weighed = with_divergence(task, adversarial)
        recipe = Recipe(
            steps=1, accumulation=1, learning_rate=1e-5, warmup_steps=0, clip=2.0, normalisation="published", unused_gradients="none",
            precision=arguments.precision, seed=0, validate_every=1, checkpoint_every=1, keep=1, adversarial=adversarial,
        )  # fmt: skip

        def update() -> None:
            _forward_backward(weighed, weighed.head, model, batch, recipe)
            clip_gradients(model.parameters(), 2.0)
            optimizer.step()
            optimizer.zero_grad()

        return update

    return {
        "plain": update_with(None),
        "3 steps, words": update_with(AdversarialSettings(steps=3)),
        "3 steps, words and regions": update_with(AdversarialSettings(steps=3, on=["text", "image"])),
        "3 steps, in turn": update_with(AdversarialSettings(steps=3, on=["text", "image"], alternate=True)),
    }


def cost(arguments: argparse.Namespace) -> None:
    made = updates(arguments)
    on_gpu = arguments.device != "cpu" and torch.cuda.is_available()
    seconds: dict[str, list[float]] = {name: [] for name in made}
    memory: dict[str, float] = {}
    for turn in range(1 + arguments.repeats):
        for name, update in made.items():
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
                torch.cuda.synchronize()
            began = time.perf_counter()
            update()
            if on_gpu:
                torch.cuda.synchronize()
                memory[name] = torch.cuda.max_memory_allocated() / 2**30
            if turn:  # the first warms up
                seconds[name].append(time.perf_counter() - began)
    plain = statistics.median(seconds["plain"])
    where = torch.cuda.get_device_name() if on_gpu else "CPU"
    print(f"{arguments.model}, {arguments.precision}, {arguments.tokens} tokens, {where}, median of {arguments.repeats}\n")
    print("| update | seconds | times a plain one | GiB at most |\n|---|---|---|---|")
    for name, values in seconds.items():
        middle = statistics.median(values)
        print(f"| {name} | {middle:.3f} | {middle / plain:.2f} | {memory[name]:.1f} |" if on_gpu else
              f"| {name} | {middle:.3f} | {middle / plain:.2f} | not counted |")  # fmt: skip


def compare(arguments: argparse.Namespace) -> None:
    downstream: Any = importlib.import_module("downstream")  # beside this file
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    databases, (captions, images) = downstream.make_databases(out, arguments.tasks, arguments)
    device: list[object] = ["--device", arguments.device] if arguments.device else []
    quiet = ["--set", "tensorboard=false"]
    steps = ["--steps", arguments.pretrain_steps]
    words = ["--text", captions, "--images", images, "--model", "tiny", *steps, "--out", out / "pretrained", *device, *quiet]
    downstream.run("uniter-train", "pretrain", *words)
    settings = ["batch_tokens=1024", f"validate_every={arguments.steps}", "checkpoint_every=100", "keep=1"]
    said = ["--steps", arguments.steps, *quiet, *(word for setting in settings for word in ("--set", setting))]
    kinds: dict[str, list[object]] = {"plain": [], "villa": [word for one in arguments.set for word in ("--set", f"adversarial.{one}")]}
    measured: dict[str, dict[str, list[float]]] = {row: {kind: [] for kind in kinds} for row in arguments.tasks}
    questions = {}
    for row in arguments.tasks:
        for seed in range(arguments.seeds):
            for kind, words in kinds.items():
                fine = downstream.Fine(row, kind, seed, out, out / "pretrained", databases[row], [*said, *words], device)
                figures = fine.figures()
                measured[row][kind].append(figures[downstream.ROWS[row].figure])
                questions[row] = figures.get("examples", figures.get("texts"))
    write_json(out / "measured_villa.json", {"questions": questions, "figures": measured})
    print(f"\n{'task':20} {'asked':>7} {'plain':>14} {'adversarial':>14} {'difference, paired by seed':>28}")
    for row, of in measured.items():
        paired = [100 * (after - before) for before, after in zip(of["plain"], of["villa"], strict=True)]
        cells = [f"{100 * statistics.mean(values):.1f} ± {100 * spread(values):.1f}" for values in of.values()]
        print(f"{row:20} {questions[row]:>7} {cells[0]:>14} {cells[1]:>14} {statistics.mean(paired):+20.2f} ± {spread(paired):.2f}")


def spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(required=True)
    costing = parts.add_parser("cost", help="seconds and memory of an update")
    costing.add_argument("--model", default="tiny", choices=["tiny", "base", "large"])
    costing.add_argument("--tokens", type=int, default=1024, help="of the batch (default: 1024)")
    costing.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    costing.add_argument("--repeats", type=int, default=5)
    costing.add_argument("--device")
    costing.set_defaults(act=cost)
    comparing = parts.add_parser("compare", help="what it brings on the made-up world")
    comparing.add_argument("--out", type=Path, default=Path("villa"))
    comparing.add_argument("--tasks", nargs="+", default=["vqa", "nlvr2", "retrieval-flickr30k"])
    comparing.add_argument("--seeds", type=int, default=3)
    comparing.add_argument("--pictures", type=int, default=1200)
    comparing.add_argument("--few", type=int, default=200)
    comparing.add_argument("--held-out", type=int, default=1000, help="pictures that are asked about (default: 1000: 1,000 texts and more)")
    comparing.add_argument("--regions", default="known", choices=["known", "detector"])
    comparing.add_argument("--pretrain-steps", type=int, default=4000)
    comparing.add_argument("--steps", type=int, default=300)
    comparing.add_argument("--set", action="append", metavar="KEY=VALUE", help="of adversarial (default: steps=3, rate=0.001, weight=1.5)")
    comparing.add_argument("--device")
    comparing.set_defaults(act=compare)
    arguments = parser.parse_args()
    if arguments.act is compare and not arguments.set:
        arguments.set = ["steps=3"]
    arguments.act(arguments)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
