"""The body: golden hidden states, published names and sizes, and "packed == padded == one by one"."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from uniter.datasets.batches.layout import lay_out
from uniter.datasets.errors import BadInput
from uniter.model import UniterConfig, UniterForPretraining
from uniter.model.uniter import UniterModel, set_dropout

TASKS = ["mlm", "mrfr", "mrc", "mrckl", "itm", "itm_ot"]


@pytest.mark.parametrize("task", TASKS)
def test_golden_hidden_states(task, uniter_golden, golden_model, pack, at_real_positions, close):
    packed = pack(np.load(uniter_golden / f"inputs_{task}.npz"))
    outputs = np.load(uniter_golden / f"outputs_{task}.npz")
    if "embedding_output" in outputs:
        layout = packed.batch.layout
        embedded = golden_model.uniter.embed(packed.batch, layout)
        close(at_real_positions(embedded, layout, packed), outputs["embedding_output"][packed.real.numpy()])
    encoded = golden_model(packed.batch)
    close(at_real_positions(encoded.hidden_NH, encoded.layout, packed), outputs["sequence_output"][packed.real.numpy()])
    close(golden_model.uniter.pooled(encoded), outputs["pooled_output"])


def test_golden_encoder_modes(uniter_golden, golden_model, pack, at_real_positions, close):
    modes = np.load(uniter_golden / "encoder_modes.npz")
    for side, names in {
        "text_only": ("input_ids", "position_ids", "txt_attn_masks"),
        "image_only": ("img_feat", "img_pos_feat", "img_attn_masks"),
    }.items():
        packed = pack({name: modes[name] for name in names})
        encoded = golden_model(packed.batch)
        close(at_real_positions(encoded.hidden_NH, encoded.layout, packed), modes[f"{side}_sequence_output"][packed.real.numpy()])
    packed = pack(np.load(uniter_golden / "inputs_mlm.npz"))
    layout = packed.batch.layout
    hidden = golden_model.uniter.embed(packed.batch, layout)
    first = golden_model.uniter.encoder.layer[0](hidden, layout, "auto")
    close(at_real_positions(first, layout, packed), modes["joint_layer1_output_of_inputs_mlm"][packed.real.numpy()])


def test_golden_state_dict_keys_are_the_published_ones(uniter_golden, golden_config):
    with safe_open(uniter_golden / "weights.safetensors", "pt") as published:
        expected = {name: tuple(published.get_slice(name).get_shape()) for name in published.keys()}  # noqa: SIM118
    assert {name: tuple(value.shape) for name, value in UniterForPretraining(golden_config).state_dict().items()} == expected


@pytest.mark.parametrize(("name", "body", "whole"), [("base", 109_898_752, 112_938_887), ("large", 335_695_872, 340_524_935)])
def test_parameter_counts_are_the_published_ones(name, body, whole):
    with torch.device("meta"):
        model = UniterForPretraining(UniterConfig.preset(name))
    assert sum(parameter.numel() for parameter in model.uniter.parameters()) == body
    assert sum(parameter.numel() for parameter in model.parameters()) == whole


def test_tied_tensors_are_one_and_stay_one():
    model = UniterForPretraining(UniterConfig.preset("tiny", vocab_size=50, image_feature_size=8, label_classes=5)).double()
    assert model.cls.predictions.decoder.weight is model.uniter.embeddings.word_embeddings.weight
    assert model.feat_regress.weight is model.uniter.img_embeddings.img_linear.weight


def test_configuration_round_trip_and_bad_ones(tmp_path):
    config = UniterConfig.preset("tiny", label_classes=7)
    config.to_json(tmp_path / "config.json")
    assert UniterConfig.from_json(tmp_path / "config.json") == config
    with pytest.raises(BadInput, match="did you mean 'large'"):
        UniterConfig.preset("larg")
    with pytest.raises(BadInput, match="attention heads"):
        UniterConfig(hidden_size=10, num_attention_heads=3)
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(BadInput, match="expected an object"):
        UniterConfig.from_json(tmp_path / "list.json")


@pytest.fixture
def small_model():
    torch.manual_seed(1)
    config = UniterConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_feature_size=12,
        label_classes=6,
    )
    model = UniterForPretraining(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def one_by_one(make_batch, batch):
    """The sequences of a batch as batches of their own."""
    texts, regions = batch.text_lengths_B.tolist(), batch.region_counts_B.tolist()
    for index, (length, count) in enumerate(zip(texts, regions, strict=True)):
        single = make_batch([length], [count], width=batch.features_RD.shape[1], vocabulary=10)
        text, region = slice(sum(texts[:index]), sum(texts[: index + 1])), slice(sum(regions[:index]), sum(regions[: index + 1]))
        single.input_ids_T, single.features_RD, single.positions_R7 = (
            batch.input_ids_T[text],
            batch.features_RD[region],
            batch.positions_R7[region],
        )
        yield single


def padded_forward(model: UniterModel, embedded, layout):
    """An independent, padded encoder: additive mask, one rectangle, plain softmax; reads the same parameters."""
    lengths, first = layout.sequence_lengths_B, layout.first_rows_B
    width = int(lengths.max())
    places = torch.arange(width)
    real = places < lengths.unsqueeze(1)
    hidden = embedded[(first.unsqueeze(1) + places).clamp(max=len(embedded) - 1)]
    mask = (~real).float()[:, None, None, :] * -1e4
    for layer in model.encoder.layer:
        own = layer.attention.self

        def heads(x, count=own.heads):
            return x.view(*x.shape[:2], count, -1).transpose(1, 2)

        query, key, value = heads(own.query(hidden)), heads(own.key(hidden)), heads(own.value(hidden))
        scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1]) + mask
        context = (scores.softmax(-1) @ value).transpose(1, 2).reshape(hidden.shape)
        output = layer.attention.output
        hidden = output.LayerNorm(output.dense(context) + hidden)
        hidden = layer.output.LayerNorm(layer.output.dense(F.gelu(layer.intermediate.dense(hidden))) + hidden)
    return hidden, real


def test_packed_equals_padded_equals_one_by_one(small_model, make_batch):
    batch = make_batch([4, 9, 3, 9, 5], [7, 2, 1, 2, 10], width=12, vocabulary=60)
    body = small_model.uniter
    encoded = body(batch)
    layout = batch.layout
    embedded = body.embed(batch, layout)
    padded, real = padded_forward(body, embedded, layout)
    for index, single in enumerate(one_by_one(make_batch, batch)):
        first, length = int(encoded.first_rows_B[index]), int(encoded.sequence_lengths_B[index])
        ours = encoded.hidden_NH[first : first + length]
        torch.testing.assert_close(ours, body(single).hidden_NH, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours, padded[index][real[index]], atol=1e-5, rtol=1e-5)


def test_packed_gradients_equal_the_sum_of_one_by_one(small_model, make_batch):
    batch = make_batch([4, 9, 3], [7, 2, 1], width=12, vocabulary=60)

    def gradients(batches):
        small_model.zero_grad()
        for part in batches:
            small_model.uniter.pooled(small_model(part)).pow(2).sum().backward()
        return {name: parameter.grad for name, parameter in small_model.named_parameters() if parameter.grad is not None}

    packed, singles = gradients([batch]), gradients(one_by_one(make_batch, batch))
    assert packed.keys() == singles.keys()
    for name in packed:
        torch.testing.assert_close(packed[name], singles[name], atol=2e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_states_are_rows_of_the_whole(small_model, make_batch):
    batch = make_batch([4, 9, 3], [7, 2, 1], width=12, vocabulary=60)
    body = small_model.uniter
    encoded = body(batch)
    chosen = torch.tensor([9, 0, 3])
    layout = batch.layout
    states = body.states(batch, layout, layout.region_rows_R[chosen])
    torch.testing.assert_close(states, encoded.regions_RH[chosen], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(body.pooled_first(batch), body.pooled(encoded), atol=1e-6, rtol=1e-5)


def test_layout_of_sequences_by_length():
    layout = lay_out(torch.tensor([2, 3, 1]), torch.tensor([1, 2, 2]))
    # The second sequence (5 rows) stands first, then the first and the third (3 rows each).
    assert layout.first_rows_B.tolist() == [5, 0, 8]
    assert layout.text_rows_T.tolist() == [5, 6, 0, 1, 2, 8]
    assert layout.region_rows_R.tolist() == [7, 3, 4, 9, 10]
    assert (layout.longest, layout.longest_text, layout.most_regions) == (5, 3, 2)
    assert layout.offsets.tolist() == [0, 5, 8, 11]
    with pytest.raises(ValueError, match="at least one"):
        lay_out(torch.tensor([2, 0]), torch.tensor([1, 0]))


def test_set_dropout_reaches_every_dropout_and_attention(small_model, make_batch):
    batch = make_batch([4, 9], [7, 2], width=12, vocabulary=60)
    small_model.train()
    assert not torch.equal(small_model(batch).hidden_NH, small_model(batch).hidden_NH)
    set_dropout(small_model, 0.0)
    assert torch.equal(small_model(batch).hidden_NH, small_model(batch).hidden_NH)


def test_half_precision_features_equal_their_float32_values(small_model, make_batch):
    batch = make_batch([4], [6], width=12, vocabulary=60, dtype=torch.float16)
    expected = small_model(batch).hidden_NH
    batch.features_RD = batch.features_RD.float()
    assert torch.equal(small_model(batch).hidden_NH, expected)


def test_batches_that_do_not_fit_are_answered_in_a_sentence(small_model, make_batch):
    with pytest.raises(BadInput, match="2 wide, but the model expects 12"):
        small_model(make_batch([4], [7], width=2, vocabulary=60))
    with pytest.raises(BadInput, match="600 word pieces does not fit the model's 512 positions"):
        small_model(make_batch([600], [7], width=12, vocabulary=60))


def test_attention_maps_are_distributions_in_the_order_of_the_batch(small_model, make_batch):
    batch = make_batch([4, 9, 3], [1, 2, 7], width=12, vocabulary=60)
    maps = small_model.uniter.attentions(batch)
    assert [tuple(one.shape) for one in maps[0]] == [(4, 5, 5), (4, 11, 11), (4, 10, 10)] and len(maps) == 2
    torch.testing.assert_close(maps[1][2].sum(-1), torch.ones(4, 10))


def test_layers_computed_again_have_the_same_gradients(small_model, make_batch):
    """Dropout too is drawn as before."""
    batch = make_batch([4, 9, 3], [7, 2, 1], width=12, vocabulary=60)
    small_model.train()

    def gradients(recompute):
        small_model.uniter.encoder.recompute = recompute
        small_model.zero_grad()
        torch.manual_seed(0)
        small_model.uniter.pooled_first(batch).pow(2).sum().backward()
        return {name: parameter.grad for name, parameter in small_model.named_parameters() if parameter.grad is not None}

    kept, again = gradients(False), gradients(True)
    assert kept.keys() == again.keys() and all(torch.equal(values, again[name]) for name, values in kept.items())
