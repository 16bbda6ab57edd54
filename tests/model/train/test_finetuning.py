"""Every down-stream row: golden items, and that it trains, resumes, evaluates and predicts."""

import csv
import hashlib
import itertools
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from uniter.datasets.batches.candidates import inclusive_iou
from uniter.datasets.batches.collate import collate
from uniter.datasets.batches.corpus import Corpus, gather, open_corpus
from uniter.datasets.batches.downstream import answered_question, mined_groups, ranked_group, statement_about_both, statement_about_each
from uniter.datasets.batches.example import Example, Masking
from uniter.datasets.batches.pretraining import matched_pair
from uniter.datasets.errors import BadInput
from uniter.datasets.image_db import ImageDB
from uniter.datasets.runs.run_log import read_log
from uniter.datasets.runs.step_folders import checkpoint_steps
from uniter.datasets.text_db import TextDB
from uniter.model import UniterConfig, load_uniter, losses
from uniter.model.checkpoints.export import export_published
from uniter.model.checkpoints.read import find_weights, read_state
from uniter.model.evaluation.finetuned import evaluate_finetuned, predict
from uniter.model.losses import ranking
from uniter.model.settings.gather import gather_settings
from uniter.model.settings.settings import TrainSettings
from uniter.model.tasks.table import DOWNSTREAM
from uniter.model.tasks.task import Task, extras
from uniter.model.train.finetuning import build_mixture, finetune
from uniter.model.train.optim import AdamW, parameter_groups
from uniter.model.train.pretraining import pretrain
from uniter.model.train.work import Data

Make = Callable[..., TrainSettings]
EACH_TASK = pytest.mark.parametrize("name", list(DOWNSTREAM))
TEXTS = {"nlvr2-paired": "nlvr2", "nlvr2-triplet": "nlvr2", "retrieval-hard": "retrieval"} | {
    "refcoco-two-layers": "refcoco",
    "refcoco-rank": "refcoco",
}


def checksum(array: np.ndarray) -> str:
    return hashlib.sha1(np.ascontiguousarray(array, dtype=np.float32).tobytes()).hexdigest()


def example(corpus: Corpus, number: int) -> Example:
    return Example(corpus, number, tuple(corpus.image_rows_NK[number].tolist()))


def golden_corpus(folder: Path, name: str) -> Corpus:
    return gather([TextDB(folder / "txt_db" / f"{name}.db")], ImageDB(folder / "img_db" / "toy"), name, -1)


def test_golden_questions(uniter_tasks_golden: Path) -> None:
    items = json.loads((uniter_tasks_golden / "expect_items.json").read_text())["VqaDataset"]
    arrays = np.load(uniter_tasks_golden / "expect_items.npz", allow_pickle=False)
    corpus = golden_corpus(uniter_tasks_golden, "vqa_toy")
    for number, expected in items.items():
        made = answered_question(example(corpus, int(number)), random.Random(0), Masking(), answers=expected["target"]["shape"][0])
        assert made.sequences[0].input_ids == expected["input_ids"]["values"]
        assert checksum(made.sequences[0].features) == expected["img_feat"]["sha1_f32"]
        assert np.array_equal(made.targets["answers"][0], arrays[f"VqaDataset|{number}|target"])


def test_golden_statements(uniter_tasks_golden: Path) -> None:
    items = json.loads((uniter_tasks_golden / "expect_items.json").read_text())
    corpus = golden_corpus(uniter_tasks_golden, "nlvr2_train")
    pair, both = DOWNSTREAM["nlvr2"], DOWNSTREAM["nlvr2-triplet"]
    assert (pair.lengths(corpus, corpus.image_rows_NK) - 4).tolist() == items["Nlvr2PairedDataset.lens"]
    assert (both.lengths(corpus, corpus.image_rows_NK) - 2).tolist() == items["Nlvr2TripletDataset.lens"]
    for number, expected in items["Nlvr2TripletDataset"].items():
        made = statement_about_both(example(corpus, int(number)), random.Random(0), Masking())
        batch = collate([made])
        assert batch.input_ids_T.tolist() == expected["input_ids"]["values"]
        assert batch.region_types_R.tolist() == expected["img_type_ids"]["values"]
        assert checksum(batch.features_RD.numpy()) == expected["img_feat"]["sha1_f32"]
        assert made.targets["truth"].tolist() == [expected["target"]]
        for side, kind in enumerate(("left", "right")):
            one = items[f"Nlvr2PairedDataset.{kind}"][number]
            sequence = statement_about_each(example(corpus, int(number)), random.Random(0), Masking()).sequences[side]
            assert sequence.input_ids == one["input_ids"]["values"]
            assert [sequence.region_type] * len(sequence.features) == one["img_type_ids"]["values"]
            assert checksum(sequence.features) == one["img_feat"]["sha1_f32"]


def test_golden_statements_of_the_data_goldens(uniter_data_golden: Path) -> None:
    golden = json.loads((uniter_data_golden / "expected.json").read_text())["datasets"]
    images = [path for path in (uniter_data_golden / "img_db").iterdir() if any(path.glob("feat_th*_compressed"))]
    entry = json.loads((uniter_data_golden / "expected.json").read_text())["txt_db"]
    name = next(name for name in entry if name.startswith("nlvr2") and not name.endswith("uncased"))
    corpus = open_corpus("nlvr2", [uniter_data_golden / entry[name]["path"]], images, max_text_length=60)
    assert [corpus.example_id(number) for number in range(len(corpus))] == golden["nlvr2_paired"]["ids"]
    for number, expected in enumerate(golden["nlvr2_paired"]["items"]):
        made = statement_about_each(example(corpus, number), random.Random(0), Masking())
        # The golden set keeps a statement whose truth is not known too; its target is null.
        assert made.targets["truth"].tolist() == [-100 if expected["target"] is None else expected["target"]]
        for sequence, part in zip(made.sequences, expected["parts"], strict=True):
            assert sequence.input_ids == part["input_ids"] and [sequence.region_type] == part["type_ids"]
            assert float(sequence.features.astype(np.float32).sum()) == pytest.approx(part["feat_sum"], rel=1e-5)
    for number, expected in enumerate(golden["nlvr2_triplet"]["items"]):
        batch = collate([statement_about_both(example(corpus, number), random.Random(0), Masking())])
        assert [int((batch.region_types_R == kind).sum()) for kind in (1, 2)] == expected["type_counts"]


def padded_checksum(regions: list[Any], rows: int) -> str:
    """Of the regions' features, each padded to so many rows, as the official collation pads them; empty where one has more."""
    if max(len(one.features) for one in regions) > rows:
        return ""
    padded = np.zeros((len(regions), rows, regions[0].features.shape[1]), dtype=np.float32)
    for number, one in enumerate(regions):
        padded[number, : len(one.features)] = one.features
    return checksum(padded)


def real_rows(item: dict[str, Any]) -> list[list[int]]:
    """The texts of a golden item without their padding (word piece 0)."""
    return [[word for word in row if word] for row in item["input_ids"]["values"]]


class Drawn(random.Random):
    """Draws what it was told to draw."""

    def __init__(self, *draws: list[int]) -> None:
        super().__init__(0)
        self.draws = list(draws)

    def sample(self, population: Any, k: int, *, counts: Any = None) -> list[Any]:
        return self.draws.pop(0)


def test_golden_groups_of_hard_negatives(uniter_tasks_golden: Path) -> None:
    items = json.loads((uniter_tasks_golden / "expect_items.json").read_text())
    corpus = golden_corpus(uniter_tasks_golden, "itm_toy")
    pictures = np.unique(corpus.image_rows_NK)
    words = [[corpus.texts[0].cls_id, *corpus.record(number)["input_ids"], corpus.texts[0].sep_id] for number in range(len(corpus))]
    for key, of_text in items["ItmRankDatasetHardNegFromText"].items():
        number, of_picture = int(key), items["ItmRankDatasetHardNegFromImage"][key]
        own = own_picture(corpus, number)
        # Which pictures were drawn is not stored, but their features' sum is.
        rows, padded = of_text["img_feat"]["shape"][:2]
        others = [picture for picture in pictures.tolist() if picture != own]
        shown = next(
            list(chosen)
            for chosen in itertools.permutations(others, rows - 1)
            if padded_checksum([corpus.regions(picture) for picture in (own, *chosen)], padded) == of_text["img_feat"]["sha1_f32"]
        )
        texts = real_rows(of_picture)
        strangers = [row for row in range(len(corpus)) if own_picture(corpus, row) != own]
        told = [next(row for row in strangers if words[row] == text) for text in texts[1:]]

        made = mined_groups(example(corpus, number), Drawn(shown, told), Masking(), pictures=pictures, drawn=rows - 1)
        first, second = made.sequences[:rows], made.sequences[rows:]
        assert made.targets["group_sizes"].tolist() == [rows, len(texts)]
        assert [one.input_ids for one in first] == real_rows(of_text) * rows
        assert padded_checksum(first, padded) == of_text["img_feat"]["sha1_f32"]
        assert [one.input_ids for one in second] == texts
        assert {checksum(one.features) for one in second} == {of_picture["img_feat"]["sha1_f32"]}

        # The official index of the joint sequence takes regions from behind the last text instead of the longest one: wrong rows
        # for all, unless the last is the longest. Nothing is padded here, so there is nothing to index wrongly.
        official, longest = of_picture["gather_index"]["values"], max(map(len, texts))
        starts = [row[len(text)] for row, text in zip(official, texts, strict=True)]
        assert starts == [len(texts[-1])] * len(texts) and (len(texts[-1]) == longest or set(starts) != {longest})
        batch = collate([made])
        assert batch.region_counts_B.tolist()[rows:] == [len(corpus.regions(own))] * len(texts)
        assert checksum(batch.features_RD[-len(corpus.regions(own)) :].numpy()) == of_picture["img_feat"]["sha1_f32"]


def test_golden_pairs_of_retrieval(uniter_tasks_golden: Path) -> None:
    """A text with each picture, as validation and the evaluation of all pairs show them."""
    items = json.loads((uniter_tasks_golden / "expect_items.json").read_text())
    corpus = golden_corpus(uniter_tasks_golden, "itm_toy")
    keys, ids = corpus.images.keys_list, [corpus.example_id(number) for number in range(len(corpus))]
    by_boxes = items["ItmEvalDataset.image_order"]
    chunks = list(items["ItmEvalDataset[1]"].values())
    shown = [(int(key), items["ItmValDataset.batch_image_order"][ids[int(key)]], item) for key, item in items["ItmValDataset"].items()]
    for chunk in chunks:
        count = chunk["img_feat"]["shape"][0]
        shown.append((1, by_boxes[:count], chunk))
        by_boxes = by_boxes[count:]
    assert not by_boxes, "every picture was shown"
    for number, pictures, item in shown:
        samples = [
            matched_pair(Example(corpus, number, (keys.index(picture),)), random.Random(0), Masking()).sequences[0] for picture in pictures
        ]
        assert [sample.input_ids for sample in samples] == real_rows(item)
        assert padded_checksum(samples, item["img_feat"]["shape"][1]) == item["img_feat"]["sha1_f32"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, made_up: Any) -> dict[str, Path]:
    """The made-up world's regions, and a text database of each task."""
    folder = tmp_path_factory.mktemp("tasks")
    scenes = made_up.World(width=16, noise=0.1)
    texts, images = scenes.write(folder, pictures=24, captions=2)
    _, found = scenes.write(folder / "found", pictures=24, captions=1, prefix="found_scene")
    tasks = ("vqa", "ve", "nlvr2", "retrieval", "refcoco", "vcr", "gqa", "flickr30k-entities", "classify")
    return {"images": images, "found": found, "captions": texts} | {task: scenes.write_task(folder, task) for task in tasks}


def images_of(name: str, world: dict[str, Path]) -> str:
    """VCR's pictures have annotated and detected regions."""
    return f"{world['images']};{world['found']}" if name == "vcr" else str(world["images"])


def corpus_of(name: str, world: dict[str, Path]) -> Corpus:
    return open_corpus(name, [world[TEXTS.get(name, name)]], [images_of(name, world)])


def test_a_ranked_group_has_its_positive_first(world: dict[str, Path]) -> None:
    corpus = corpus_of("retrieval", world)
    pictures = np.unique(corpus.image_rows_NK)
    for number in range(20):
        made = ranked_group(example(corpus, number), random.Random(number), Masking(), pictures=pictures, negatives=2)
        own = made.sequences[0]
        assert len(made.sequences) == 5
        for other in made.sequences[1:3]:
            assert other.input_ids == own.input_ids and not np.array_equal(other.features, own.features)
        for other in made.sequences[3:]:
            assert np.array_equal(other.features, own.features)


def test_groups_to_mine_from_are_one_of_other_pictures_and_one_of_other_texts(world: dict[str, Path]) -> None:
    corpus = corpus_of("retrieval", world)
    pictures = np.unique(corpus.image_rows_NK)
    for seed in range(6):
        made = mined_groups(example(corpus, 3), random.Random(seed), Masking(), pictures=pictures, drawn=10)
        assert made.targets["group_sizes"].tolist() == [11, 11]
        own, of_text, of_picture = made.sequences[0], made.sequences[1:11], made.sequences[12:]
        assert made.sequences[11].input_ids == own.input_ids and np.array_equal(made.sequences[11].features, own.features)
        assert all(other.input_ids == own.input_ids and not np.array_equal(other.features, own.features) for other in of_text)
        assert len({other.features.tobytes() for other in of_text}) == 10, "no picture twice"
        assert all(np.array_equal(other.features, own.features) for other in of_picture)
    everything = mined_groups(example(corpus, 3), random.Random(0), Masking(), pictures=pictures)
    assert everything.targets["group_sizes"].tolist() == [
        len(pictures),
        1 + int((corpus.image_rows_NK[:, 0] != own_picture(corpus, 3)).sum()),
    ]


def own_picture(corpus: Corpus, number: int) -> int:
    return int(corpus.image_rows_NK[number, 0])


def test_published_batches_of_pairs_count_no_special_tokens(world: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """UNITER's lengths of NLVR2 pairs are twice the words and both pictures' regions (the golden lens above)."""
    counted: list[list[int]] = []

    def batches(lengths: list[int], **options: Any) -> list[list[int]]:
        counted.append(lengths)
        return [list(range(len(lengths)))]

    monkeypatch.setattr("uniter.datasets.batches.plans.published_batches", batches)
    corpus = corpus_of("nlvr2", world)
    boxes = np.asarray(corpus.images.region_counts)[corpus.image_rows_NK].sum(axis=1)
    for name, times in (("nlvr2", 2), ("nlvr2-paired", 2), ("nlvr2-triplet", 1)):
        settings = TrainSettings(
            task=name, corpora=[{"text": ["x"], "images": ["x"]}], batch_tokens=10**6, ordering="published", device="cpu"
        )
        _, mixture = build_mixture(settings, Data({"toy": corpus}, {}, {}))
        next(mixture.plans([0], first_step=1, last_step=1, accumulation=1))
        assert counted.pop() == (times * corpus.text_lengths_N + boxes).tolist()


@EACH_TASK
def test_it_learns_eight_examples(name: str, world: dict[str, Path]) -> None:
    corpus = corpus_of(name, world)
    task: Task = DOWNSTREAM[name].of_data(DOWNSTREAM[name], corpus)
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "intermediate_size": 96, "image_feature_size": 16, "initializer_range": 0.1}
    torch.manual_seed(0)
    config = UniterConfig.preset(
        "tiny", vocab_size=corpus.texts[0].v_range[1], hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes
    )
    model = extras(task).model(config, **extras(task).sizes)
    # Of mined groups one example is many sequences.
    count = 1 if name == "retrieval-hard" else 8
    batch = collate([task.sample(example(corpus, number), random.Random(number), Masking()) for number in range(count)])
    optimizer = AdamW(parameter_groups(model, weight_decay=0.0), lr=2e-3)
    seen: list[float] = []
    for _ in range(80):
        optimizer.zero_grad()
        if "rival" in batch.targets:
            batch.targets["rival"].fill_(-1)  # in training every pass draws others to compare with; here all are made up for by the best
        outputs = task.scores(model, batch)
        loss = losses.of(task.losses(outputs, batch.targets), weights=task.weights, reduction=task.reduction).number
        loss.backward()
        if not seen:
            assert model.uniter.encoder.layer[0].attention.self.query.weight.grad.abs().sum() > 0
        optimizer.step()
        seen.append(loss.item())
    assert seen[-1] < 0.35 * seen[0]
    measured = task.metric(outputs, batch.targets)
    assert measured.get(extras(task).best_by, measured.get("accuracy")).mean() == 1
    if extras(task).predicted is not None:
        asked = collate([extras(task).predicted(example(corpus, number), random.Random(number), Masking()) for number in range(count)])
        outputs = task.scores(model, asked)
    are_right(name, extras(task).answer(outputs), {field: values.numpy() for field, values in batch.targets.items()})


def are_right(name: str, answers: list[Any], targets: dict[str, np.ndarray]) -> None:
    """The answers to eight examples (retrieval: the scores of its groups, a positive first) that were learned by heart."""
    if name.startswith("retrieval"):
        groups = targets.get("group_sizes", np.full(8, 3))  # of mined groups as many negatives are scored as the smallest has
        assert len(answers) == len(groups) * min(groups)
        assert all(max(negatives) < positive for positive, *negatives in np.split(np.array(answers), len(groups)))
    elif name == "vcr":
        assert np.shape(answers) == (8, 4 + 4 * 4)
        for scores, correct in zip(np.array(answers), targets["correct"].reshape(8, 2, 4), strict=True):
            answer, reason = correct.argmax(axis=1)
            assert scores[:4].argmax() == answer and scores[4 + 4 * answer :][:4].argmax() == reason
    elif name.startswith("refcoco"):
        assert answers == targets["region"].tolist()
    elif name == "flickr30k-entities":
        right = np.split(targets["right"], 8)  # as many regions on each picture
        assert all(rows[answer] for answer, rows in zip(answers, right, strict=True))
    elif name == "classify":
        assert np.argmax(answers, axis=1).tolist() == targets["answers"].argmax(axis=1).tolist()
        assert np.sum(answers, axis=1) == pytest.approx(1)
    elif name.startswith("nlvr2"):
        assert answers == [bool(truth) for truth in targets["truth"]]
    else:
        assert answers == targets["answers"].argmax(axis=1).tolist()


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory, world: dict[str, Path]) -> Path:
    from uniter.model.settings.files import read_settings

    run = tmp_path_factory.mktemp("runs") / "pretrained"
    values = {
        "corpora": [{"text": [str(world["captions"])], "images": [str(world["images"])]}],
        "model": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64},
        "steps": 3,
        "batch_tokens": 200,
        "tensorboard": False,
        "device": "cpu",
    }
    pretrain(read_settings(values, source="test"), run)
    return run


@EACH_TASK
def test_it_trains_resumes_evaluates_and_predicts(name: str, world: dict[str, Path], pretrained: Path, small: Make, tmp_path: Path) -> None:
    texts, images = str(world[TEXTS.get(name, name)]), images_of(name, world)

    def settings(**changes: Any) -> TrainSettings:
        corpora = [{"name": "toy", "text": [texts], "images": [images]}]
        return small(corpora=corpora, task=name, model={}, steps=4, batch_tokens=300, **{"from": str(pretrained)}, **changes)

    unbroken, run = tmp_path / "unbroken", tmp_path / "run"
    finetune(settings(), unbroken)
    finetune(settings(stop_after=2), run)
    finetune(settings(), run)
    losses = [[line["loss"] for line in read_log(folder)] for folder in (unbroken, run)]
    assert losses[0] == losses[1] and len(losses[0]) == 5
    assert checkpoint_steps(run)[-1] == 4

    figures = evaluate_finetuned(name, str(run), text=[texts], images=[images], batch_tokens=600, device="cpu")
    assert figures == evaluate_finetuned(name, str(run), text=[texts], images=[images], batch_tokens=600, device="cpu")
    out = tmp_path / "answers"
    predict(name, str(run), out, text=[texts], images=[images], device="cpu")
    if name.startswith("retrieval"):
        assert 0 <= figures["txt_r1"] <= figures["txt_r10"] <= 1
        ranks = json.loads(out.read_text())
        assert len(ranks["images_of_text"]) == figures["texts"] and len(next(iter(ranks["images_of_text"].values()))) == 10
    elif name.startswith("nlvr2"):
        assert 0 <= figures["consistency"] <= figures["accuracy"] <= 1
        rows = list(csv.reader(out.open()))
        assert len(rows) == 200 and {row[1] for row in rows} <= {"True", "False"}
    elif name in ("vqa", "gqa"):
        rows = json.loads(out.read_text())
        if name == "vqa":
            assert all(isinstance(row["question_id"], int) for row in rows)
        said = ("question_id", "answer") if name == "vqa" else ("questionId", "prediction")
        right = {str(row[said[0]]): row[said[1]] for row in rows}
        assert len(rows) == 200 and set(right.values()) <= _answers(world)
        corpus = corpus_of(name, world)
        table = {number: answer for answer, number in json.loads((world["vqa"] / "ans2label.json").read_text()).items()}
        hits = [right[corpus.example_id(row)] == table[corpus.record(row)["target"]["labels"][0]] for row in range(len(corpus))]
        assert figures["accuracy"] == pytest.approx(np.mean(hits))
    elif name.startswith("refcoco"):
        corpus = corpus_of(name, world)
        rows = {str(row["sent_id"]): row for row in json.loads(out.read_text())}
        wanted = [corpus.record(number)["bbox"] for number in range(len(corpus))]
        boxes = [rows[corpus.example_id(number)]["box"] for number in range(len(corpus))]
        hits = [inclusive_iou(box, other) > 0.5 for box, other in zip(boxes, wanted, strict=True)]
        assert len(rows) == 200 and figures["accuracy"] == pytest.approx(np.mean(hits))
    elif name == "flickr30k-entities":
        corpus = corpus_of(name, world)
        rows = {row["id"]: row["box"] for row in json.loads(out.read_text())}
        hits = [_plain_iou(rows[corpus.example_id(row)], corpus.record(row)["boxes"][0]) >= 0.5 for row in range(len(corpus))]
        assert len(rows) == 200 and figures["r1"] == pytest.approx(np.mean(hits))
        assert figures["r1"] <= figures["r5"] <= figures["r10"] == figures["upper_bound"] == 1, "six regions, one of them the thing"
    elif name == "classify":
        rows = list(csv.DictReader(out.open()))
        assert len(rows) == 200 and set(rows[0]) == {"id", "label", *_answers(world)}
        corpus = corpus_of(name, world)
        table = json.loads((world[name] / "ans2label.json").read_text())
        said = {row["id"]: table[row["label"]] for row in rows}
        hits = [said[corpus.example_id(row)] in corpus.record(row)["target"]["labels"] for row in range(len(corpus))]
        assert figures["accuracy"] == pytest.approx(np.mean(hits)) and {"macro_f1", "auroc", "average_precision"} <= set(figures)
        assert all(sum(float(row[label]) for label in table) == pytest.approx(1, abs=1e-4) for row in rows)
    elif name == "vcr":
        rows = list(csv.DictReader(out.open()))
        assert len(rows) == 200 and list(rows[0])[:6] == ["annot_id", *(f"answer_{n}" for n in range(4)), "rationale_conditioned_on_a0_0"]
        corpus = corpus_of(name, world)
        truth = {corpus.example_id(number): corpus.record(number)["qa_target"] for number in range(len(corpus))}
        best = {row["annot_id"]: max(range(4), key=lambda n, row=row: float(row[f"answer_{n}"])) for row in rows}
        assert figures["qa"] == pytest.approx(np.mean([best[name] == answer for name, answer in truth.items()]))
        assert figures["q2ar"] <= min(figures["qa"], figures["qar"])
        vocabulary = read_state(find_weights(str(run)))["uniter.embeddings.word_embeddings.weight"]
        assert len(vocabulary) == corpus.texts[0].v_range[1] + 8 > len(read_state(find_weights(str(pretrained)))["cls.predictions.bias"])
    else:
        labels = json.loads(out.read_text())
        assert len(labels) == 200 and set(labels.values()) <= {"contradiction", "entailment", "neutral"}


def _plain_iou(box: list[float], other: list[float]) -> float:
    width = min(box[0] + box[2], other[0] + other[2]) - max(box[0], other[0])
    height = min(box[1] + box[3], other[1] + other[3]) - max(box[1], other[1])
    common = max(width, 0) * max(height, 0)
    return common / (box[2] * box[3] + other[2] * other[3] - common)


def _answers(world: dict[str, Path]) -> set[str]:
    return set(json.loads((world["vqa"] / "ans2label.json").read_text()))


def test_hard_negatives_weigh_texts_and_pictures_as_published() -> None:
    """An update is the mean over texts' groups plus the mean over pictures' groups, each of the mean over its negatives."""
    task = DOWNSTREAM["retrieval-hard"]
    scores = torch.randn(8, 1, generator=torch.Generator().manual_seed(0))
    terms = task.losses({"scores": scores}, {"group_sizes": torch.tensor([9, 7])})
    text, picture = (ranking({"scores": half}, {}, group_size=4)["margin"].mean() for half in scores.split(4))
    assert text != picture
    torch.testing.assert_close(losses.of(terms, weights=task.weights, reduction=task.reduction).number, text + picture)


@pytest.mark.parametrize("name", ["vqa", "nlvr2"])
def test_evaluation_asks_each_example_once(
    name: str, world: dict[str, Path], pretrained: Path, small: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    head = DOWNSTREAM[name].head
    row = replace(DOWNSTREAM[name], head=lambda model, batch: asked.append(len(batch)) or head(model, batch))
    monkeypatch.setitem(DOWNSTREAM, name, row)
    run, corpora = tmp_path / "run", [{"text": [str(world[name])], "images": [str(world["images"])]}]
    finetune(small(corpora=corpora, task=name, model={}, steps=1, batch_tokens=300, **{"from": str(pretrained)}), run)
    asked.clear()
    figures = evaluate_finetuned(name, str(run), text=[str(world[name])], images=[str(world["images"])], device="cpu")
    assert sum(asked) == figures["examples"] == 200 and ("consistency" in figures) == (name == "nlvr2")


def test_a_pretrained_model_retrieves_zero_shot(world: dict[str, Path], pretrained: Path) -> None:
    """The ranks are those of ITM's own logit of "they match", one text after the other and counted by hand."""
    figures = evaluate_finetuned("retrieval", str(pretrained), text=[str(world["retrieval"])], images=[str(world["images"])], device="cpu")
    model, corpus = load_uniter(pretrained), corpus_of("retrieval", world)
    pictures = np.unique(corpus.image_rows_NK).tolist()
    scores = np.zeros((len(corpus), len(pictures)))
    for text in range(len(corpus)):
        batch = collate([matched_pair(Example(corpus, text, (picture,)), random.Random(0), Masking()) for picture in pictures])
        with torch.inference_mode():
            scores[text] = model.pairs(batch)["scores"][:, 1]
    own = [pictures.index(own_picture(corpus, text)) for text in range(len(corpus))]
    of_texts = [int((scores[text] > scores[text, picture]).sum()) for text, picture in enumerate(own)]
    of_pictures = []
    for picture in range(len(pictures)):
        best = max(scores[text, picture] for text in range(len(corpus)) if own[text] == picture)
        of_pictures.append(int((scores[:, picture] > best).sum()))
    expected = {f"img_r{depth}": float(np.mean([rank < depth for rank in of_texts])) for depth in (1, 5, 10)}
    expected |= {f"txt_r{depth}": float(np.mean([rank < depth for rank in of_pictures])) for depth in (1, 5, 10)}
    assert len(set(expected.values())) > 4, "figures that can tell a difference"
    expected |= {"r_mean": float(np.mean(list(expected.values())))}
    assert {name: figures[name] for name in expected} == pytest.approx(expected)
    assert (figures["texts"], figures["pictures"]) == (200, 24)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vqa", "nlvr2", "gqa", "flickr30k-entities"])
def test_it_generalises(name: str, made_up: Any, small: Make, tmp_path: Path) -> None:
    scenes = made_up.World(width=16, noise=0.1)
    _, images = scenes.write(tmp_path, pictures=300, captions=1, regions=4)
    texts = scenes.write_task(tmp_path, name, count=4000)
    settings = small(
        task=name,
        corpora=[{"name": "toy", "text": [str(texts)], "images": [str(images)]}],
        model={"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "initializer_range": 0.1},
        batch_tokens=800,
        accumulation=1,
        steps=1500,
        validate_every=1500,
        checkpoint_every=1500,
        dropout=0.0,
        optimizer={"learning_rate": 2e-3},
    )
    figures = finetune(settings, tmp_path / "run")["validation"][f"{name}_toy"]
    assert figures[extras(DOWNSTREAM[name]).best_by] > {"vqa": 0.6, "nlvr2": 0.75, "gqa": 0.6, "flickr30k-entities": 0.55}[name]


def test_answers_that_are_numbered_otherwise_are_refused(world: dict[str, Path], pretrained: Path, small: Make, tmp_path: Path) -> None:
    other = shutil.copytree(world["vqa"], tmp_path / "other.db")
    answers = list(json.loads((other / "ans2label.json").read_text()))
    (other / "ans2label.json").write_text(json.dumps({answer: number for number, answer in enumerate(reversed(answers))}))
    images, start = [str(world["images"])], {"from": str(pretrained)}
    corpus = {"text": [str(world["vqa"])], "images": images}
    with pytest.raises(BadInput, match=r"other.db/ans2label.json numbers its \d+ answers otherwise than .*ans2label.json its \d+; build"):
        finetune(small(task="vqa", corpora=[{**corpus, "validation_text": [str(other)]}], model={}, **start), tmp_path / "run")
    finetune(small(task="vqa", corpora=[corpus], model={}, steps=1, validate_every=1, **start), tmp_path / "run")
    with pytest.raises(BadInput, match=r"run numbers its \d+ answers otherwise than the texts their \d+; build the texts with"):
        evaluate_finetuned("vqa", str(tmp_path / "run"), text=[str(other)], images=images, device="cpu")


def test_texts_of_another_task_are_refused(world: dict[str, Path], pretrained: Path, small: Make, tmp_path: Path) -> None:
    def settings(name: str, texts: str) -> TrainSettings:
        corpora = [{"text": [str(world[texts])], "images": [str(world["images"])]}]
        return small(task=name, corpora=corpora, model={}, **{"from": str(pretrained)})

    with pytest.raises(BadInput, match="its texts are about 1 pictures each, nlvr2 takes 2"):
        finetune(settings("nlvr2", "vqa"), tmp_path / "a")
    with pytest.raises(BadInput, match=r"unknown task 'vqaa'; did you mean 'vqa'\?"):
        finetune(settings("vqaa", "vqa"), tmp_path / "b")
    with pytest.raises(BadInput, match="use uniter-train finetune vqa"):
        pretrain(settings("vqa", "vqa"), tmp_path / "c")
    captions = shutil.copytree(world["captions"], tmp_path / "captions.db")
    header = json.loads((captions / "header.json").read_text())
    (captions / "header.json").write_text(json.dumps(header | {"settings": {"task": "captions"}}))
    corpora = [{"text": [str(captions)], "images": [str(world["images"])]}]
    replaced = small(task="vqa", corpora=corpora, model={}, **{"from": str(pretrained)})
    with pytest.raises(BadInput, match=r"captions\.db holds captions, .*; vqa takes those that uniter-build-db --task vqa makes"):
        finetune(replaced, tmp_path / "d")


# What UNITER's fine-tuning files say: those of all tasks, then each file's own (facts 5.6). Without val_* a part is held out.
SAID_BY_ALL = {
    **{"max_bb": 100, "min_bb": 10, "num_bb": 36, "conf_th": 0.2, "optim": "adamw", "betas": [0.9, 0.98], "dropout": 0.1},
    **{"weight_decay": 0.01, "grad_norm": 2.0, "fp16": True, "n_workers": 4, "pin_mem": True, "seed": 42, "max_txt_len": 60},
    **{"model_config": "/src/config/uniter-base.json", "checkpoint": "/pretrain/uniter-base.pt", "output_dir": "/storage/x"},
}
ONE_OF_EACH = {"train_txt_db": "/txt/a.db", "train_img_db": "/img/a/", "val_txt_db": "/txt/a.db", "val_img_db": "/img/a/"}
RANKED = {
    **{"train_txt_dbs": ["/txt/a.db"], "train_img_dbs": ["/img/a/"], "val_txt_db": "/txt/a.db", "val_img_db": "/img/a/"},
    **{"test_txt_db": "/txt/a.db", "test_img_db": "/img/a/", "compressed_db": False, "margin": 0.2, "full_val": True},
}
REFERRED = {**ONE_OF_EACH, "compressed_db": False, "conf_th": -1, "num_bb": 100, "train_batch_size": 128, "val_batch_size": 128} | {
    **{"lr_mul": 1.0, "decay": "linear", "gradient_accumulation_steps": 1, "seed": 24, "num_train_steps": 24000, "warmup_steps": 1500},
    **{"learning_rate": 1e-4},
}
PUBLISHED_FILES: dict[str, dict[str, Any]] = {
    "vqa": {
        **{"train_txt_dbs": ["/txt/a.db"], "train_img_dbs": ["/img/a/"], "val_txt_db": "/txt/a.db", "val_img_db": "/img/a/"},
        **{"train_batch_size": 5120, "val_batch_size": 10240, "gradient_accumulation_steps": 5, "learning_rate": 8e-5, "lr_mul": 10.0},
        **{"valid_steps": 500, "num_train_steps": 6000, "warmup_steps": 600},
    },
    "ve": {
        **ONE_OF_EACH,
        **{"test_txt_db": "/txt/a.db", "test_img_db": "/img/a/", "compressed_db": False, "train_batch_size": 4096, "valid_steps": 500},
        **{"val_batch_size": 4096, "gradient_accumulation_steps": 4, "learning_rate": 8e-5, "num_train_steps": 4000, "warmup_steps": 400},
    },
    "nlvr2": {
        **ONE_OF_EACH,
        **{"test_txt_db": "/txt/a.db", "test_img_db": "/img/a/", "model": "paired-attn", "use_img_type": True, "seed": 77},
        **{"train_batch_size": 10240, "val_batch_size": 10240, "gradient_accumulation_steps": 1, "learning_rate": 3e-5},
        **{"valid_steps": 500, "num_train_steps": 8000, "warmup_steps": 800},
    },
    "retrieval": {
        **RANKED,
        **{"train_batch_size": 40, "negative_size": 1, "inf_minibatch_size": 40, "gradient_accumulation_steps": 4},
        **{"learning_rate": 5e-5, "valid_steps": 2000, "num_train_steps": 20000, "warmup_steps": 2000},
    },
    "retrieval-hard": {
        **RANKED,
        **{"train_batch_size": 8, "negative_size": 399, "hard_neg_size": 31, "inf_minibatch_size": 400},
        **{"learning_rate": 5e-5, "valid_steps": 500, "num_train_steps": 5000, "warmup_steps": 500},
    },
    "refcoco": REFERRED,
    "refcoco-two-layers": {**REFERRED, "mlp": 2, "mask_dir": "/pretrain/philly_output/mask_6.pt"},
    "vcr": {
        **{
            "train_txt_dbs": ["/txt/a.db"],
            "train_img_dbs": ["/img/a/;/img/b/"],
            "val_txt_db": "/txt/a.db",
            "val_img_db": "/img/a/;/img/b/",
        },
        **{"train_batch_size": 4000, "val_batch_size": 10, "gradient_accumulation_steps": 5, "learning_rate": 6e-5, "lr_mul": 1.0},
        **{"valid_steps": 1000, "num_train_steps": 8000, "warmup_steps": 800, "max_txt_len": 220, "checkpoint_from": "vcr_pretrain"},
    },
}


@pytest.mark.parametrize("name", PUBLISHED_FILES)
def test_published_fine_tuning_files_run(name: str, world: dict[str, Path], pretrained: Path, tmp_path: Path) -> None:
    for folder, link, target in (
        ("txt", "a.db", world[TEXTS.get(name, name)]),
        ("img", "a", world["images"]),
        ("img", "b", world["found"]),
    ):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / link).symlink_to(target)
    path = tmp_path / "train.json"
    path.write_text(json.dumps({**SAID_BY_ALL, **PUBLISHED_FILES[name]}))
    roots = [f"/txt={tmp_path / 'txt'}", f"/img={tmp_path / 'img'}"]
    options = {"task": name, "from": str(pretrained), "device": "cpu", "workers": 0}
    settings = gather_settings(str(path), roots=roots, options=options)
    said = PUBLISHED_FILES[name]
    assert settings.steps == said["num_train_steps"] and settings.optimizer.learning_rate == said["learning_rate"]
    assert settings.optimizer.warmup_steps == said["warmup_steps"] and settings.precision == "bf16"
    short = ["steps=2", "optimizer.warmup_steps=1", "batch_tokens=400", "validate_every=2", "validation_examples=20", "tensorboard=false"]
    summary = finetune(gather_settings(str(path), roots=roots, options=options, assignments=short), tmp_path / "run")
    assert summary["steps"] == 2 and np.isfinite([list(figures.values()) for figures in summary["validation"].values()]).all()


@pytest.mark.parametrize(("name", "texts"), [("vqa", "vqa_toy"), ("nlvr2", "nlvr2_train"), ("retrieval", "itm_toy")])
def test_golden_databases_and_a_published_checkpoint_evaluate_and_predict(
    name: str, texts: str, uniter_tasks_golden: Path, tmp_path: Path
) -> None:
    """A `.pt` of tensors only, as UNITER's trainers wrote them, on databases as UNITER read them."""
    corpus = golden_corpus(uniter_tasks_golden, texts)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "image_feature_size": corpus.images.feature_width}
    torch.manual_seed(0)
    model = extras(DOWNSTREAM[name]).model(UniterConfig.preset("tiny", vocab_size=corpus.texts[0].v_range[1], **sizes)).eval()
    export_published(model, tmp_path / "model_step_8000.pt")
    text, images = [str(corpus.texts[0].path)], [str(uniter_tasks_golden / "img_db" / "toy")]
    asked = {"text": text, "images": images, "device": "cpu"}
    figures = evaluate_finetuned(name, str(tmp_path / "model_step_8000.pt"), **asked)
    out = tmp_path / "answers"
    if name == "vqa":
        assert 0 <= figures["accuracy"] <= 1 and figures["examples"] == len(corpus)
        with pytest.raises(BadInput, match=r"give --answers ans2label\.json"):
            predict(name, str(tmp_path / "model_step_8000.pt"), out, **asked)
        (tmp_path / "ans2label.json").write_text(json.dumps({f"answer {number}": number for number in range(3129)}))
        predict(name, str(tmp_path / "model_step_8000.pt"), out, answers=tmp_path / "ans2label.json", **asked)
        scores = model.answers(collate([answered_question(example(corpus, 0), random.Random(0), Masking(), answers=3129)]))["scores"]
        said = {str(row["question_id"]): row["answer"] for row in json.loads(out.read_text())}
        assert said[corpus.example_id(0)] == f"answer {int(scores.argmax())}"
    elif name == "nlvr2":
        predict(name, str(tmp_path / "model_step_8000.pt"), out, **asked)
        batch = collate([statement_about_each(example(corpus, 0), random.Random(0), Masking())])
        truth = bool(model.statements(batch)["scores"].argmax())
        assert dict(csv.reader(out.open()))[corpus.example_id(0)] == str(truth)
    else:
        assert figures["texts"] == len(corpus) and figures["pictures"] == len(np.unique(corpus.image_rows_NK))
        predict(name, str(tmp_path / "model_step_8000.pt"), out, **asked)
        ranked = json.loads(out.read_text())["images_of_text"][corpus.example_id(0)]
        keys, scores = corpus.images.keys_list, []
        for key, _ in ranked:
            pair = matched_pair(Example(corpus, 0, (keys.index(key),)), random.Random(0), Masking())
            scores.append(model.ranks(collate([pair]))["scores"].item())
        assert scores == sorted(scores, reverse=True) and [score for _, score in ranked] == pytest.approx(scores, abs=1e-5)
