"""From a photograph and a sentence to an answer: the right head is asked, results agree with the models, pictures are drawn.

The models learn a world of coloured squares, in which what is right is known.
"""

import functools
import importlib.util
import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from uniter.datasets.batches.collate import collate
from uniter.datasets.batches.example import Sample, TokenSequence
from uniter.datasets.errors import BadInput
from uniter.datasets.view.contact_sheet import contact_sheet
from uniter.datasets.view.pictures import read_photograph, resized, write_picture
from uniter.model import Understanding, UniterConfig, UniterForPretraining, load_uniter, losses
from uniter.model import load as uniter_load
from uniter.model.checkpoints.write import save_checkpoint
from uniter.model.heads.classification import UniterForClassification
from uniter.model.heads.downstream import UniterForReferring, UniterForRetrieval, UniterForVqa
from uniter.model.heads.nlvr2 import UniterForNlvr2Paired
from uniter.model.understanding.looking import look
from uniter.model.understanding.results import Answer, Grounding, Match, Ranking, in_words


def _squares():
    name = "coloured_squares"
    if name not in sys.modules:
        specification = importlib.util.spec_from_file_location(name, Path(__file__).parent.with_name(f"{name}.py"))
        sys.modules[name] = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(sys.modules[name])
    return sys.modules[name]


squares = _squares()
TOKENIZER = squares.tokenizer()


def small(**more):
    sizes = {"vocab_size": len(squares.VOCABULARY), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return UniterConfig(
        **sizes, **dropout, intermediate_size=64, image_feature_size=squares.WIDTH, label_classes=3, initializer_range=0.1, **more
    )


def sequence_of(image, text, found=None):
    found = found or squares.find_squares([image])[0]
    return TokenSequence([TOKENIZER.cls_id, *TOKENIZER.encode(text), TOKENIZER.sep_id], found.features, found.norm_bb)


def write_checkpoint(folder, model, **about):
    save_checkpoint(folder, model, about=about)
    (folder / "vocab.txt").write_text("\n".join(squares.VOCABULARY) + "\n")
    return folder


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """Folders of checkpoints of every kind, weights random."""
    folder = tmp_path_factory.mktemp("untrained")
    torch.manual_seed(0)
    return {
        "pretrained": write_checkpoint(folder / "pretrained", UniterForPretraining(small())),
        "retrieval": write_checkpoint(folder / "retrieval", UniterForRetrieval(small())),
        "vqa": write_checkpoint(folder / "vqa", UniterForVqa(small(), answers=2), task="vqa", answers=list(squares.ANSWERS)),
        "referring": write_checkpoint(folder / "referring", UniterForReferring(small(), layers=2)),
        "nlvr2": write_checkpoint(folder / "nlvr2", UniterForNlvr2Paired(small())),
    }


@pytest.fixture
def photos(tmp_path):
    """Six photographs as files."""
    files = []
    for seed in range(6):
        files.append(tmp_path / f"{seed}.png")
        cv2.imwrite(str(files[-1]), squares.photograph(squares.some_colours(seed), seed))
    return files


# --- what is asked of which model ------------------------------------------------------------------------------------------------


def test_all_four_calls_take_files_and_arrays_alike(untrained, photos):
    asked = Understanding(squares.find_squares, untrained["retrieval"], untrained["vqa"], untrained["referring"])
    pixels = [cv2.imread(str(photo)) for photo in photos]
    results = [
        (asked.match(images[0], "a red square"), asked.answer(images[1], "how many squares are there ?"),
         asked.ground(images[2], "the red square"), asked.rank(images, "a red square"))
        for images in (photos, pixels)
    ]  # fmt: skip
    assert [type(result) for result in results[0]] == [Match, Answer, Grounding, Ranking]
    for of_file, of_pixels in zip(*results, strict=True):
        assert in_words(of_file).replace(f"{photos.index(of_file.image)}.png", f"photograph {photos.index(of_file.image)}") == in_words(
            of_pixels
        )
        assert of_file.text == of_pixels.text and len(of_file.regions) == len(of_pixels.regions)


def test_batches_give_what_single_questions_give(untrained, photos, monkeypatch):
    asked = Understanding(squares.find_squares, *(untrained[name] for name in ("pretrained", "vqa", "referring")))
    texts = ["a red square", "the black square and the green square", "is there a blue square ?"] * 2
    for everything, one in ((asked.match_all, asked.match), (asked.answer_all, asked.answer), (asked.ground_all, asked.ground)):
        together = everything(photos, texts)
        monkeypatch.setattr("uniter.model.understanding.asking.BATCH_TOKENS", 25)
        in_parts = everything(photos, texts)
        monkeypatch.undo()
        for place, result in enumerate(together):
            alone = one(photos[place], texts[place])
            for other in (alone, in_parts[place]):
                assert other.image == result.image and other.text == result.text
                if isinstance(result, Grounding):
                    np.testing.assert_allclose(other.probabilities, result.probabilities, atol=1e-5)
                else:
                    assert other.probability == pytest.approx(result.probability, abs=1e-5)


def test_a_ranking_is_the_matches_in_order(untrained, photos, monkeypatch):
    monkeypatch.setattr("uniter.model.understanding.asking.PHOTOGRAPHS_AT_ONCE", 4)
    asked = Understanding(squares.find_squares, untrained["pretrained"])
    ranking = asked.rank(photos, "a red square")
    matches = [asked.match(photo, "a red square").probability for photo in photos]
    np.testing.assert_allclose(ranking.probabilities, matches, atol=1e-6)
    assert ranking.order.tolist() == np.argsort([-match for match in matches]).tolist()
    assert ranking.image == photos[ranking.order[0]]
    assert len(ranking.regions) == len(squares.find_squares([ranking.image])[0])


def test_a_match_is_what_looking_at_the_pair_says(untrained, photos):
    asked = Understanding(squares.find_squares, untrained["pretrained"], device="cpu")
    seen = look(load_uniter(untrained["pretrained"]), sequence_of(photos[0], "a red square"))
    result = asked.match(photos[0], "a red square")
    assert result.probability == pytest.approx(seen.match, abs=1e-6)
    words = asked.attention(result)
    assert [word for word, _ in words] == ["a", "red", "square"]
    np.testing.assert_allclose([weights for _, weights in words], seen.attention_TR[1:-1], rtol=1e-5)


def test_without_a_referring_run_each_region_is_matched_alone(untrained, photos):
    asked = Understanding(squares.find_squares, untrained["pretrained"])
    result = asked.ground(photos[0], "a red square")
    one_by_one = []
    for row in range(len(result.regions)):
        alone = Understanding(lambda images, row=row: [result.regions.rows(slice(row, row + 1))], untrained["pretrained"])
        one_by_one.append(alone.match(photos[0], "a red square").probability)
    odds = np.array(one_by_one) / (1 - np.array(one_by_one))
    np.testing.assert_allclose(result.probabilities, odds / odds.sum(), rtol=1e-4)
    assert result.region == int(np.argmax(odds)) and result.zero_shot


def test_pieces_of_a_word_are_put_together_again(untrained, photos):
    asked = Understanding(squares.find_squares, untrained["pretrained"])
    words = asked.attention(asked.match(photos[0], "redish square"))
    assert [word for word, _ in words] == ["redish", "square"]
    assert all(weights.sum() == pytest.approx(1, abs=1e-4) for _, weights in words)


def test_a_retrieval_run_takes_precedence_and_a_referring_run_too(untrained, photos):
    asked = Understanding(squares.find_squares, untrained["retrieval"], untrained["referring"], untrained["pretrained"])
    assert asked.match(photos[0], "a square").source == str(untrained["retrieval"])
    pointed = asked.ground(photos[0], "a square")
    assert pointed.source == str(untrained["referring"]) and not pointed.zero_shot and pointed.probabilities.sum() == pytest.approx(1)
    makeshift = Understanding(squares.find_squares, untrained["pretrained"]).ground(photos[0], "a square")
    assert makeshift.zero_shot and "no model was trained to point" in in_words(makeshift)
    np.testing.assert_array_equal(pointed.box, pointed.regions.boxes[pointed.region])


def test_the_best_answers_come_in_order_with_their_names(untrained, photos):
    result = Understanding(squares.find_squares, untrained["vqa"]).answer(photos[0], "how many squares ?")
    assert {answer for answer, _ in result.best} == set(squares.ANSWERS)
    assert result.best[0] == (result.answer, result.probability) and result.best[0][1] >= result.best[1][1]


# --- what is refused -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["one", "several", "score"])
def test_labels_and_scores_are_those_of_the_head(untrained, photos, tmp_path, kind):
    torch.manual_seed(1)
    names = [] if kind == "score" else ["red", "blue", "green"]
    model = UniterForClassification(small(), labels=len(names) or 1, label_kind=kind).eval()
    model.scale_to(3.0, 2.0)
    about = {"task": "classify", **({"answers": names} if names else {})}
    asked = Understanding(squares.find_squares, write_checkpoint(tmp_path / "own", model, **about))
    scores = [
        model.labels(collate([Sample("0", [sequence_of(cv2.imread(str(photo)), text)])]))["scores"][0].tolist()
        for photo, text in zip(photos, ["a red square", ""] * 3, strict=True)
    ]
    found = asked.classify_all(photos, ["a red square", ""] * 3)
    if kind == "score":
        assert [one.score for one in found] == pytest.approx([score for (score,) in scores], abs=1e-5)
        assert found[0].labels == () and in_words(found[0]).startswith("score ")
    else:
        shares = torch.softmax(torch.tensor(scores), dim=1) if kind == "one" else torch.sigmoid(torch.tensor(scores))
        for one, wanted in zip(found, shares.tolist(), strict=True):
            assert [one.probabilities[name] for name in names] == pytest.approx(wanted, abs=1e-5)
            assert list(one.probabilities.values()) == pytest.approx(sorted(wanted, reverse=True), abs=1e-5)
            likely = {name for name, share in zip(names, wanted, strict=True) if share >= 0.5}
            assert set(one.labels) == ({names[int(np.argmax(wanted))]} if kind == "one" else likely)
    alone = asked.classify(photos[1])
    assert alone.text == "" and asked.picture(alone).ndim == 3
    with pytest.raises(BadInput, match=r"to label photographs takes a model .* make one with uniter-train finetune classify"):
        Understanding(squares.find_squares, untrained["vqa"]).classify(photos[0], "a red square")


def test_a_question_that_no_model_was_trained_for(untrained, photos):
    asked = Understanding(squares.find_squares, untrained["pretrained"])
    with pytest.raises(
        BadInput, match=r"to answer questions takes a model .*pretrained was given; make one with uniter-train finetune vqa"
    ):
        asked.answer(photos[0], "how many ?")
    with pytest.raises(BadInput, match=r"to match texts with photographs .* no checkpoint was given; make one with uniter-train finetune"):
        Understanding(squares.find_squares).match(photos[0], "a square")
    with pytest.raises(BadInput, match="nlvr2 has none of the heads that photographs are asked with"):
        Understanding(squares.find_squares, untrained["nlvr2"])


def test_texts_and_photographs_that_cannot_be_used(untrained, photos):
    asked = Understanding(squares.find_squares, untrained["pretrained"])
    with pytest.raises(BadInput, match="the text ' ' holds no words"):
        asked.match(photos[0], " ")
    with pytest.raises(BadInput, match="knows no word of '猫 🐈'; ask in the language"):
        asked.match(photos[0], "猫 🐈")
    with pytest.raises(BadInput, match=r"has 600 word pieces, but .* reads 510 at most; shorten it"):
        asked.match(photos[0], "red " * 600)
    with pytest.raises(BadInput, match="there are no photographs to rank"):
        asked.rank([], "a square")
    with pytest.raises(ValueError, match="2 photographs and 1 texts"):
        asked.match_all(photos[:2], ["a square"])

    def found(change):
        return Understanding(lambda images: [change(regions) for regions in squares.find_squares(images)], untrained["pretrained"])

    with pytest.raises(BadInput, match=r"0\.png: the detector found no regions"):
        found(lambda regions: regions.rows(slice(0, 0))).match(photos[0], "a square")
    with pytest.raises(BadInput, match=r"features are 16 wide, but .* was trained on 8; use its detector"):
        found(lambda regions: replace(regions, features=np.tile(regions.features, 2))).match(photos[0], "a square")


def test_a_checkpoint_that_does_not_tell_its_tokenizer(untrained, photos, tmp_path):
    save_checkpoint(tmp_path / "alone", UniterForPretraining(small()))
    with pytest.raises(BadInput, match=r"alone does not tell its tokenizer \(\d+ word pieces"):
        Understanding(squares.find_squares, tmp_path / "alone")
    for given in (TOKENIZER, untrained["vqa"] / "vocab.txt"):
        Understanding(squares.find_squares, tmp_path / "alone", tokenizer=given).match(photos[0], "a square")
    with pytest.raises(BadInput, match=r"has 28,996 word pieces, but .*alone has \d+; use the tokenizer of its texts"):
        Understanding(squares.find_squares, tmp_path / "alone", tokenizer="bert-base-cased")


def test_a_run_knows_tokenizer_and_answers_by_its_texts(photos, tmp_path):
    texts, run = tmp_path / "texts.db", tmp_path / "run"
    texts.mkdir()
    (texts / "vocab.txt").write_text("\n".join(squares.VOCABULARY) + "\n")
    (texts / "ans2label.json").write_text(json.dumps({"four": 1, "three": 0}))
    save_checkpoint(run / "checkpoints" / "latest", UniterForVqa(small(), answers=2))
    for named in (str(texts), "texts.db"):  # as named, or beside the run
        (run / "config.yaml").write_text(json.dumps({"task": "vqa", "corpora": [{"text": [named], "images": ["regions.lmdb"]}]}))
        answer = Understanding(squares.find_squares, run).answer(photos[0], "how many squares ?")
        assert {name for name, _ in answer.best} == {"three", "four"}
    (run / "config.yaml").write_text(json.dumps({"task": "vqa", "corpora": [{"text": ["gone.db"], "images": ["regions.lmdb"]}]}))
    with pytest.raises(BadInput, match="run does not tell its tokenizer"):
        Understanding(squares.find_squares, run)


def test_a_vqa_checkpoint_that_does_not_tell_its_answers(photos, tmp_path):
    folder = write_checkpoint(tmp_path / "vqa", UniterForVqa(small(), answers=2))
    with pytest.raises(BadInput, match=r"vqa does not tell the names of its 2 answers; give its ans2label\.json"):
        Understanding(squares.find_squares, folder)
    table = tmp_path / "ans2label.json"
    table.write_text(json.dumps({"four": 1, "three": 0}))
    of_file, of_list = (Understanding(squares.find_squares, folder, answers=given) for given in (table, ["three", "four"]))
    assert of_file.answer(photos[0], "how many ?").best == of_list.answer(photos[0], "how many ?").best
    with pytest.raises(BadInput, match="has 2 answers, but 1 names of answers were found"):
        Understanding(squares.find_squares, folder, answers=["three"])
    table.write_text(json.dumps({"four": 2, "three": 0}))
    with pytest.raises(BadInput, match="does not number answers from 0"):
        Understanding(squares.find_squares, folder, answers=table)


# --- pictures --------------------------------------------------------------------------------------------------------------------


def test_every_result_has_a_picture(untrained, photos, tmp_path):
    asked = Understanding(
        squares.find_squares, *(untrained[name] for name in ("pretrained", "vqa", "referring")), class_names=["square", "ground"]
    )
    results = [
        asked.match(photos[0], "a red square"),
        asked.answer(cv2.imread(str(photos[0])), "how many squares are there ?"),
        asked.ground(photos[0], "the red square"),
        asked.rank(photos, "a red square"),
    ]
    pages = []
    for result in results:
        page = asked.picture(result, longest=400)
        assert page.dtype == np.uint8 and page.shape[1] >= 400 and page.shape[0] > 300
        write_picture(tmp_path / "page.jpg", page)
        pages.append(page)
    assert pages[3].shape[0] > pages[0].shape[0]  # the other photographs are shown below
    with pytest.raises(ValueError, match="was not given to this object"):
        Understanding(squares.find_squares).picture(results[0])


def test_a_notebook_shows_results_in_one_line_and_with_their_photograph(untrained, photos):
    asked = Understanding(squares.find_squares, *(untrained[name] for name in ("pretrained", "vqa")), class_names=["square", "ground"])
    hostile = "a <b>red</b> square"
    for result in (
        asked.match(photos[0], hostile),
        asked.answer(cv2.imread(str(photos[0])), hostile),
        asked.ground(photos[0], hostile),
        asked.rank(photos, hostile),
        asked.embed([photos[0]], [hostile])[0],
    ):
        assert repr(result).startswith(f"<{type(result).__name__} of ") and in_words(result) in repr(result) and len(repr(result)) < 300
        page = result._repr_html_()
        assert "a &lt;b&gt;red&lt;/b&gt; square" in page and "data:image/jpeg;base64," in page and hostile not in page
        assert ("square" in page.partition("<table>")[2]) or "ground" in page.partition("<table>")[2]  # the detector's names
    assert repr(asked).startswith("<Understanding of ") and repr(asked).endswith(" on cpu>") and "UniterForVqa" in repr(asked)
    checkpoint = uniter_load(untrained["vqa"])
    assert repr(checkpoint).startswith(f"<UniterForVqa from {untrained['vqa']}, ") and "answers>" in repr(checkpoint)
    assert repr(result.regions).startswith(f"<{len(result.regions)} regions") and len(repr(result.regions)) < 100


def test_pointing_draws_the_region_alone(untrained, photos):
    asked = Understanding(squares.find_squares, untrained["referring"])
    result = asked.ground(photos[0], "red")
    one = asked.picture(result)
    all_of_them = asked.picture(Match(result.image, result.text, result.regions, result.source, 0.5))
    photograph = resized(read_photograph(photos[0])[0], 900)
    # Both pages: two lines of heading, then the photograph.
    top = contact_sheet([result.text, in_words(result)], photograph).shape[0] - 10 - photograph.shape[0]
    drawn = [(page[top : top + photograph.shape[0], 10:910] != photograph).any(axis=2).mean() for page in (one, all_of_them)]
    assert 0 < drawn[0] < drawn[1] < 0.5


# --- learnt ----------------------------------------------------------------------------------------------------------------------


@functools.cache
def training_scene(seed):
    colours = squares.some_colours(seed)
    image = squares.photograph(colours, seed)
    return image, colours, squares.find_squares([image])[0]


def region_of(image, regions, colour):
    return int(np.abs(regions.boxes - np.array(squares.box_of(image, colour))).sum(axis=1).argmin())


def sample(rng, kind):
    """An example of a kind: "pair", "question" or "phrase"."""
    image, colours, regions = training_scene(rng.randrange(1000, 1400))
    if kind == "question":
        wanted = np.eye(2, dtype=np.float32)[[len(colours) - 3]]
        return Sample("", [sequence_of(image, "how many squares are there ?", regions)], {"answers": wanted})
    matched = kind == "phrase" or rng.random() < 0.5
    colour = rng.choice([colour for colour in squares.COLOURS if (colour in colours) == matched])
    target = {"region": region_of(image, regions, colour)} if kind == "phrase" else {"matched": int(matched)}
    sequences = [sequence_of(image, f"the {colour} square", regions)]
    return Sample("", sequences, {name: np.array([value], dtype=np.int64) for name, value in target.items()})


def loss_of(model, batch):
    if isinstance(model, UniterForVqa):
        return losses.of(losses.answers(model.answers(batch), batch.targets), reduction="rows").number
    if isinstance(model, UniterForReferring):
        return losses.of(losses.referred_regions(model.regions(batch), batch.targets)).number
    return losses.of(losses.pairs(model.aligned_pairs(batch), batch.targets), weights={"transport": 0.1}).number


def learn(model, kind, *, steps):
    rng = random.Random(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 50) * (1 - step / steps))
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, collate([sample(rng, kind) for _ in range(32)])).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model


@pytest.fixture(scope="module")
def unseen():
    """Photographs that no model was trained on, and their colours."""
    return [(squares.photograph(squares.some_colours(seed), seed), squares.some_colours(seed)) for seed in range(40)]


def share_found(asked, unseen):
    asked_of = [(image, colour) for image, colours in unseen for colour in colours]
    results = asked.ground_all([image for image, _ in asked_of], [f"the {colour} square" for _, colour in asked_of])
    right = [np.array_equal(result.box, squares.box_of(image, colour)) for result, (image, colour) in zip(results, asked_of, strict=True)]
    return np.mean(right)


@pytest.mark.slow
def test_a_trained_model_answers_and_another_one_points(tmp_path, unseen):
    torch.manual_seed(1)
    vqa = learn(UniterForVqa(small(), answers=2), "question", steps=150)
    referring = learn(UniterForReferring(small()), "phrase", steps=200)
    asked = Understanding(
        squares.find_squares,
        write_checkpoint(tmp_path / "vqa", vqa, answers=list(squares.ANSWERS)),
        write_checkpoint(tmp_path / "referring", referring),
    )
    answers = asked.answer_all([image for image, _ in unseen], ["how many squares are there ?"] * len(unseen))
    assert (
        np.mean([answer.answer == squares.ANSWERS[len(colours) - 3] for answer, (_, colours) in zip(answers, unseen, strict=True)]) > 0.95
    )
    assert share_found(asked, unseen) > 0.95


@pytest.mark.slow
def test_a_pretrained_model_matches_ranks_and_makes_do_in_pointing(tmp_path, unseen):
    torch.manual_seed(2)
    model = learn(UniterForPretraining(small()), "pair", steps=1500)
    asked = Understanding(squares.find_squares, write_checkpoint(tmp_path / "pretrained", model))
    images, right, first = [image for image, _ in unseen], [], []
    for colour in squares.COLOURS:
        present = np.array([colour in colours for _, colours in unseen])
        matches = asked.match_all(images, [f"the {colour} square"] * len(images))
        right += (np.array([match.probability > 0.5 for match in matches]) == present).tolist()
        order = asked.rank(images, f"the {colour} square").order
        first.append(present[order[: present.sum()]].mean())
    assert np.mean(right) > 0.9 and min(first) > 0.9
    assert share_found(asked, unseen) > 0.6  # chance: 0.22


def test_vectors_are_the_encoders_own_alone_and_in_batches(untrained, photos, monkeypatch):
    asked = Understanding(squares.find_squares, untrained["pretrained"], untrained["vqa"])
    texts = ["a red square", "the black square and the green square", "is there a blue square ?"] * 2
    together = asked.embed(photos, texts)
    monkeypatch.setattr("uniter.model.understanding.asking.BATCH_TOKENS", 25)
    in_parts = asked.embed(photos, texts)
    model = uniter_load(untrained["vqa"]).model
    for place, (one, other) in enumerate(zip(together, in_parts, strict=True)):
        assert (one.image, one.text, one.source) == (photos[place], texts[place], str(untrained["vqa"])), "the one that was given last"
        sequence = sequence_of(cv2.imread(str(photos[place])), texts[place])
        encoded = model.uniter(collate([Sample("x", [sequence])]))
        for found in (one, other):
            np.testing.assert_allclose(found.joint, model.uniter.pooled(encoded)[0].detach().numpy(), atol=1e-5)
            np.testing.assert_allclose(found.words, encoded.text_TH.detach().numpy(), atol=1e-5)
            np.testing.assert_allclose(found.region_vectors, encoded.regions_RH.detach().numpy(), atol=1e-5)
    assert in_words(together[0]) == f"{len(together[0].words)} words and {len(together[0].regions)} regions, 32 numbers each"
    with pytest.raises(BadInput, match="takes a model, but no checkpoint was given"):
        Understanding(squares.find_squares).embed(photos[:1], texts[:1])
