"""What `transformers`' LXMERT and VisualBERT take, run with random weights of tiny sizes."""

import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import BertTokenizerFast, LxmertConfig, LxmertForPreTraining, LxmertModel, VisualBertConfig, VisualBertModel

from uniter.datasets.errors import BadInput
from uniter.datasets.image_db import ImageDB, lxmert_inputs, visualbert_inputs
from uniter.datasets.image_db.formats.records import NO_CLASS
from uniter.datasets.image_db.regions import RegionFeatures, normalised_boxes

WIDTH, OBJECTS, ATTRIBUTES = 12, 9, 5


def record_of(seed: int, count: int, *, labels: bool = True) -> RegionFeatures:
    dice = np.random.default_rng(seed)
    size = (300, 500)
    corners = np.sort(dice.random((count, 2, 2), dtype=np.float32), axis=1).reshape(count, 4) * np.float32([500, 300] * 2)
    corners[0] = (0, 0, 500, 300)
    soft = dice.random((count, OBJECTS + 1), dtype=np.float32)
    return RegionFeatures(
        features=dice.random((count, WIDTH), dtype=np.float32).astype(np.float16),
        norm_bb=normalised_boxes(corners, size).astype(np.float16),
        conf=np.linspace(0.9, 0.3, count, dtype=np.float16),
        boxes=corners,
        soft_labels=(soft / soft.sum(axis=1, keepdims=True)).astype(np.float16) if labels else None,
        size=size,
    )


def tiny_lxmert(**more: Any) -> LxmertConfig:
    return LxmertConfig(
        vocab_size=50, hidden_size=16, num_attention_heads=2, intermediate_size=24, l_layers=1, x_layers=1, r_layers=1,
        num_object_labels=OBJECTS, num_attr_labels=ATTRIBUTES, visual_feat_dim=WIDTH, num_qa_labels=3, **more,
    )  # fmt: skip


def tiny_visualbert() -> VisualBertConfig:
    return VisualBertConfig(
        vocab_size=50, hidden_size=16, num_attention_heads=2, intermediate_size=24, num_hidden_layers=2, visual_embedding_dim=WIDTH
    )


def words(batch: int) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.arange(4 * batch).reshape(batch, 4) + 1, "attention_mask": torch.ones(batch, 4, dtype=torch.long)}


def test_lxmert_runs_on_a_record_and_on_a_list_and_padding_changes_nothing() -> None:
    torch.manual_seed(0)
    model = LxmertModel(tiny_lxmert()).eval()
    records = [record_of(0, 4), record_of(1, 7), record_of(2, 1)]
    with torch.no_grad():
        together = model(**words(3), **lxmert_inputs(records))
        for row, record in enumerate(records):
            text = {name: value[row : row + 1] for name, value in words(3).items()}
            alone = model(**text, **record.to_lxmert())
            torch.testing.assert_close(together.pooled_output[row], alone.pooled_output[0], rtol=1e-5, atol=1e-5)
            assert together.vision_output.shape == (3, 7, 16)


def test_visualbert_runs_on_a_record_and_on_a_list_and_padding_changes_nothing() -> None:
    torch.manual_seed(0)
    model = VisualBertModel(tiny_visualbert()).eval()
    records = [record_of(0, 4), record_of(1, 7)]
    inputs = visualbert_inputs(records)
    assert inputs["visual_token_type_ids"].dtype == torch.int64 and bool((inputs["visual_token_type_ids"] == 1).all())
    with torch.no_grad():
        together = model(**words(2), **inputs)
        for row, record in enumerate(records):
            text = {name: value[row : row + 1] for name, value in words(2).items()}
            alone = model(**text, **record.to_visualbert())
            torch.testing.assert_close(together.pooler_output[row], alone.pooler_output[0], rtol=1e-5, atol=1e-5)


def test_boxes_are_fractions_and_no_method_gives_pixels_under_the_models_names() -> None:
    record = record_of(3, 5)
    inputs = record.to_lxmert()
    assert inputs["visual_feats"].dtype == inputs["visual_pos"].dtype == inputs["visual_attention_mask"].dtype == torch.float32
    np.testing.assert_array_equal(inputs["visual_pos"][0, 0].numpy(), [0, 0, 1, 1])
    assert record.boxes is not None
    wanted = record.boxes / np.float32([500, 300, 500, 300])
    np.testing.assert_allclose(inputs["visual_pos"][0].numpy(), wanted, atol=1e-6)  # of the pixels: float16 would be off by 5e-4
    np.testing.assert_allclose(replace(record, boxes=None, size=None).to_lxmert()["visual_pos"][0].numpy(), wanted, atol=6e-4)
    for name in (*inputs, *record.to_visualbert()):
        if "feat" not in name and "embeds" not in name:
            assert float({**inputs, **record.to_visualbert()}[name].max()) <= 1
    pixels = np.concatenate([record.boxes, record.boxes[:, 2:]], axis=1)
    with pytest.raises(BadInput, match=r"picture 0, region 0: the box is 0, 0, 500, 300 of the image, and 0 to 1 was expected; are the"):
        replace(record, norm_bb=pixels, boxes=None).to_lxmert()
    with pytest.raises(BadInput, match="picture 0: the record does not say where its regions are"):
        replace(record, norm_bb=np.zeros((5, 6), np.float32), boxes=None).to_lxmert()
    with pytest.raises(BadInput, match="of an image of another size"):
        replace(record, size=(200, 300)).to_lxmert()


def test_labels_count_without_background_and_unknown_ones_are_passed_over() -> None:
    known, bare = record_of(4, 6), record_of(5, 3, labels=False)
    named = replace(
        bare,
        object_ids=np.array([2, 0, NO_CLASS]), object_conf=np.float32([0.9, 0.8, 0.7]),
        attribute_ids=np.array([NO_CLASS, 4, NO_CLASS]), attribute_conf=np.float32([0.5, 0.6, 0.5]),
    )  # fmt: skip
    labels = lxmert_inputs([known, named, bare], labels=True)["obj_labels"]
    ids, confidences = labels["obj"]
    assert known.soft_labels is not None
    assert ids[0].tolist() == known.soft_labels[:, 1:].argmax(axis=1).tolist()
    assert ids[1].tolist() == [2, 0, -100, -100, -100, -100] and ids[2].tolist() == [-100] * 6
    np.testing.assert_allclose(confidences[1].numpy(), [0.9, 0.8, 0, 0, 0, 0])
    ids, confidences = labels["attr"]
    assert ids[0].tolist() == [-100] * 6 and ids[1].tolist() == [-100, 4, -100, -100, -100, -100]
    np.testing.assert_allclose(confidences[1].numpy(), [0, 0.6, 0, 0, 0, 0])
    assert labels["feat"][1].tolist() == [[1] * 6, [1] * 3 + [0] * 3, [1] * 3 + [0] * 3]

    torch.manual_seed(0)
    model = LxmertForPreTraining(tiny_lxmert(task_mask_lm=False, task_matched=False, task_qa=False))
    inputs = lxmert_inputs([known, named, bare], labels=True)
    loss = model(**words(3), **inputs).loss
    assert loss is not None and bool(torch.isfinite(loss))
    loss.backward()
    # What bears -100 counts nothing: with all of it unknown and no features to learn, there is no loss.
    classes = {name: inputs["obj_labels"][name] for name in ("obj", "attr")}
    silent = {name: (torch.full_like(ids, -100), torch.zeros_like(conf)) for name, (ids, conf) in classes.items()}
    features, mask = inputs["obj_labels"]["feat"]
    inputs["obj_labels"] = {**silent, "feat": (features, torch.zeros_like(mask))}
    assert float(model(**words(3), **inputs).loss.detach()) == 0


def test_what_cannot_be_a_batch_is_said() -> None:
    with pytest.raises(BadInput, match="a batch of no pictures"):
        lxmert_inputs([])
    with pytest.raises(BadInput, match="picture 1 of the batch has no regions, and the model needs one at least"):
        visualbert_inputs([record_of(0, 3), record_of(0, 3).rows(slice(0))])
    other = replace(record_of(0, 3), features=np.zeros((3, 5), np.float32))
    with pytest.raises(BadInput, match="features 5 and 12 wide in one batch"):
        lxmert_inputs([record_of(0, 3), other])


def test_records_of_a_database_do_as_well(made_up: ModuleType, tmp_path: Path) -> None:
    _, images = made_up.World(width=WIDTH).write(tmp_path, pictures=3)
    database = ImageDB(images)
    inputs = lxmert_inputs([database[key] for key in database])
    assert inputs["visual_feats"].shape == (3, 6, WIDTH)
    inputs["visual_feats"][0, 0, 0] = 7  # a copy: the database is not written to


PAGE = Path(__file__).parents[3] / "docs" / "transformers.md"


def test_the_page_runs_with_random_weights(made_up: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block of Python on the page, in order; what it fetches is replaced by tiny models of random weights."""
    made_up.World(width=WIDTH).write(tmp_path, pictures=3)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "regions.lmdb").rename(tmp_path / "out.lmdb")
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    models = {
        "LxmertForPreTraining": lambda _: LxmertForPreTraining(tiny_lxmert()),
        "LxmertModel": lambda _: LxmertModel(tiny_lxmert()),
        "VisualBertModel": lambda _: VisualBertModel(tiny_visualbert()),
    }
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"])}
    tokenizer = BertTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="[UNK]")), pad_token="[PAD]")
    for name, make in models.items():
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", make)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda _: tokenizer)
    space: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), space)
    assert space["lxmert"].vision_output.shape[0] == 2 and space["visualbert"].last_hidden_state.shape[0] == 2
    assert bool(torch.isfinite(space["loss"]))
