"""Looking at one pair: attention and plan are what they are called, and agree with the encoder's own maps."""

import numpy as np
import pytest
import torch

from uniter.datasets.batches.collate import collate
from uniter.datasets.batches.example import Sample, TokenSequence
from uniter.model import UniterConfig, UniterForPretraining
from uniter.model.understanding.looking import look


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = UniterForPretraining(UniterConfig(**sizes, image_feature_size=8, label_classes=5)).eval()
    rng = np.random.default_rng(0)
    sequence = TokenSequence([1, 7, 9, 2], rng.random((6, 8), np.float32), rng.random((6, 6), np.float32))
    return model, sequence


def test_attention_and_plan_share_out_what_they_should(pair):
    seen = look(*pair)
    assert seen.attention_TR.shape == seen.plan_TR.shape == (4, 6)
    np.testing.assert_allclose(seen.attention_TR.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(seen.plan_TR.sum(axis=0), 1 / 6, rtol=1e-3)
    np.testing.assert_allclose(seen.plan_TR.sum(axis=1), 1 / 4, rtol=1e-2)
    assert 0 < seen.match < 1


def test_attention_is_the_last_layers_from_words_to_regions(pair):
    model, sequence = pair
    whole = model.uniter.attentions(collate([Sample("a", [sequence])]))[-1][0].mean(dim=0).numpy()
    part = whole[:4, 4:]
    np.testing.assert_allclose(look(model, sequence).attention_TR, part / part.sum(axis=1, keepdims=True), rtol=1e-5)


def test_another_picture_is_another_look(pair):
    model, sequence = pair
    other = TokenSequence(sequence.input_ids, sequence.features[::-1].copy() * 3, sequence.norm_bb)
    assert not np.allclose(look(model, other).attention_TR, look(model, sequence).attention_TR)
