"""The down-stream heads against the golden ones, their official initialisation, and the defects that are fixed."""

import json
import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from uniter.datasets.batches.downstream import drawn_rival
from uniter.datasets.batches.layout import take_sequences
from uniter.datasets.errors import BadInput
from uniter.model import UniterConfig, UniterForPretraining, losses
from uniter.model.checkpoints.export import export_published
from uniter.model.checkpoints.grow import load_state, second_stage
from uniter.model.checkpoints.load import load_downstream, start_from
from uniter.model.heads.downstream import UniterForReferring, UniterForRetrieval, UniterForVcr, UniterForVqa
from uniter.model.heads.nlvr2 import CrossAttention, UniterForNlvr2Paired, UniterForNlvr2PairedAttention, UniterForNlvr2Triplet
from uniter.model.transport import padded

# tag: (model, head, loss, the loss term, name of the target)
HEADS = {
    "vqa": (UniterForVqa, "answers", losses.answers, "binary_cross_entropy", "answers"),
    "ve": (UniterForVqa, "answers", losses.answers, "binary_cross_entropy", "answers"),
    "nlvr2_paired": (UniterForNlvr2Paired, "statements", losses.statements, "cross_entropy", "truth"),
    "nlvr2_pairedattn": (UniterForNlvr2PairedAttention, "statements", losses.statements, "cross_entropy", "truth"),
    "nlvr2_triplet": (UniterForNlvr2Triplet, "statements", losses.statements, "cross_entropy", "truth"),
    "itm_rank": (UniterForRetrieval, "ranks", losses.ranking, "margin", None),
    "itm_hardneg_t": (UniterForRetrieval, "ranks", losses.ranking, "margin", None),
    "itm_hardneg_i": (UniterForRetrieval, "ranks", losses.ranking, "margin", None),
    "re_cls_mlp1": (UniterForReferring, "regions", losses.referred_regions, "cross_entropy", "region"),
    "re_cls_mlp2": (UniterForReferring, "regions", losses.referred_regions, "cross_entropy", "region"),
    "re_rank_hard": (
        UniterForReferring,
        "regions",
        lambda outputs, targets: losses.ranked_regions(outputs, {**targets, "rival": torch.full_like(targets["region"], -1)}),
        "margin",
        "region",
    ),
    "vcr": (UniterForVcr, "choices", losses.choices, "cross_entropy", "correct"),
    "vcr_pretrain": (UniterForPretraining, "masked_words", losses.masked_words, "cross_entropy", None),
    "vcr_pretrain_mrckl": (UniterForPretraining, "masked_classes", losses.masked_distributions, "kl", None),
}
WITH_KEYS = [tag for tag in HEADS if tag != "vcr_pretrain_mrckl"]


def golden_state(folder, tag):
    """The base weights with the tensors of a head's own file in their place."""
    own = "vcr_pretrain" if tag == "vcr_pretrain_mrckl" else tag
    base = load_file(folder / "weights.safetensors")
    return {**base, **load_file(folder / "heads" / f"{own}.weights.safetensors")}


def golden_head(folder, config, tag):
    """The model of a head with exactly the golden tensors, in eval mode."""
    state = golden_state(folder, tag)
    kind = HEADS[tag][0]
    words, types = (len(state[f"uniter.embeddings.{table}_embeddings.weight"]) for table in ("word", "token_type"))
    sized = UniterConfig(**{**config.to_dict(), "vocab_size": words, "type_vocab_size": types})
    sizes = kind.sizes(state) if kind is not UniterForPretraining else {}
    model = kind(sized, **sizes)
    own = model.state_dict()
    assert own.keys() <= state.keys()
    model.load_state_dict({name: state[name] for name in own})
    return model.eval()


@pytest.mark.parametrize("tag", HEADS)
def test_golden_head_scores_and_losses(tag, uniter_golden, golden_config, pack, at_real_positions, close):
    _, head, loss, term, target = HEADS[tag]
    model = golden_head(uniter_golden, golden_config, tag)
    inputs = dict(np.load(uniter_golden / "heads" / f"{tag}.inputs.npz"))
    expected = np.load(uniter_golden / "heads" / f"{tag}.outputs.npz")
    packed = pack(inputs)
    batch = packed.batch
    if target is not None:
        wanted = torch.from_numpy(inputs["targets"])
        batch.targets[target] = wanted if target == "answers" else wanted.reshape(-1)
    encoded = model(batch)
    close(at_real_positions(encoded.hidden_NH, encoded.layout, packed), expected["sequence_output"][packed.real.numpy()])
    close(model.uniter.pooled(encoded), expected["pooled_output"])
    if tag.startswith("itm_hardneg"):
        count = int(expected["hard_size"])
        close(model.ranks(batch)["scores"], expected["scores_all"])
        assert model.hard_negatives(batch, count=count).tolist() == [0, *expected["hard_indices"].tolist()]
        terms = loss(model.ranks(model.mined(batch, count=count)), batch.targets, group_size=1 + count)
        assert terms[term].shape == expected["loss"].shape
        close(terms[term].flatten().sort().values, np.asarray(expected["loss_sorted"]).ravel())
        return
    outputs = getattr(model, head)(batch)
    if tag == "vcr":
        close(outputs["scores"][:, 1:], expected["scores"])
        close(losses.of(loss(outputs, batch.targets)).number, expected["loss"])
        return
    close(outputs["scores"], expected["scores"])
    extra = {"group_size": int(inputs["sample_size"])} if tag == "itm_rank" else {}
    close(loss(outputs, batch.targets, **extra)[term], expected["loss"])


@pytest.mark.parametrize("tag", WITH_KEYS)
def test_golden_head_keys(tag, uniter_golden, golden_config):
    listed = json.loads((uniter_golden / "heads" / f"{tag}.keys.json").read_text())["keys"]
    model = golden_head(uniter_golden, golden_config, tag)
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == listed


@pytest.mark.parametrize("tag", WITH_KEYS)
def test_golden_head_initialisation_from_a_pretrained_checkpoint(tag, uniter_golden, golden_config, golden_model, tmp_path):
    """Published tables grow as published, everything that the checkpoint knows is kept."""
    listed = json.loads((uniter_golden / "heads" / f"{tag}.keys.json").read_text())
    extra_words = listed["keys"]["uniter.embeddings.word_embeddings.weight"][0] - golden_config.vocab_size
    export_published(golden_model, tmp_path / "pretrained.pt")
    base = golden_model.state_dict()
    kind = HEADS[tag][0]
    if kind is UniterForPretraining:
        model = second_stage(base, golden_config, extra_words=extra_words, source="golden")
    elif kind is UniterForVcr:
        model = load_downstream(kind, tmp_path / "pretrained.pt", words=golden_config.vocab_size + extra_words)
    elif kind is UniterForVqa:
        model = load_downstream(kind, tmp_path / "pretrained.pt", answers=listed["keys"]["vqa_output.3.bias"][0])
    elif kind is UniterForReferring:
        model = load_downstream(kind, tmp_path / "pretrained.pt", layers=2 if tag.endswith("mlp2") else 1)
    else:
        model = load_downstream(kind, tmp_path / "pretrained.pt")
    ours = model.state_dict()
    assert {name: list(value.shape) for name, value in ours.items()} == listed["keys"]
    for name, rows in listed["type_embedding_after_official_init"].items():
        assert torch.equal(ours[name], base[name][rows])
    for name, value in ours.items():
        if name in base and name not in listed["type_embedding_after_official_init"]:
            assert torch.equal(value[: len(base[name])], base[name]), name


def test_golden_zero_shot_ranks(uniter_golden, golden_config, pack, close):
    model = UniterForRetrieval(golden_config).eval()
    base = load_file(uniter_golden / "weights.safetensors")
    start_from(model, base, source="golden")
    batch = pack(dict(np.load(uniter_golden / "heads" / "itm_rank.inputs.npz"))).batch
    expected = np.load(uniter_golden / "heads" / "itm_rank.outputs.npz")["zero_shot_rank_scores_after_init_output"]
    close(model.ranks(batch)["scores"], expected)
    # Copied, not shared (the published code made it a view of the same storage) ...
    with torch.no_grad():
        model.rank_output.weight.zero_()
    assert torch.equal(model.itm_output.weight, base["itm_output.weight"])
    # ... and a fine-tuned head is kept (the published code looked for a key that does not exist and overwrote it).
    tuned = {**base, "rank_output.weight": torch.full_like(model.rank_output.weight, 3.0), "rank_output.bias": torch.ones(1)}
    start_from(model, tuned, source="golden")
    assert torch.equal(model.rank_output.weight, tuned["rank_output.weight"])


SMALL = UniterConfig(
    vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_feature_size=12, label_classes=6
)


@pytest.mark.parametrize("kind", [UniterForVqa, UniterForReferring])
def test_fine_tuned_checkpoint_tells_its_head(kind, tmp_path):
    sizes = {"answers": 17} if kind is UniterForVqa else {"layers": 2}
    model = kind(SMALL, **sizes)
    export_published(model, tmp_path / "tuned.pt")
    again = load_downstream(kind, tmp_path / "tuned.pt")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_fine_tuned_vcr_keeps_its_four_types(tmp_path):
    model = UniterForVcr(SMALL)
    with torch.no_grad():
        model.uniter.embeddings.token_type_embeddings.weight.normal_()
    export_published(model, tmp_path / "tuned.pt")
    again = load_downstream(UniterForVcr, tmp_path / "tuned.pt")
    name = "uniter.embeddings.token_type_embeddings.weight"
    assert torch.equal(model.state_dict()[name], again.state_dict()[name]) and again.config.type_vocab_size == 4


def test_head_of_three_layers_is_refused():
    with pytest.raises(BadInput, match="1 or 2 layers, got 3"):
        UniterForReferring(SMALL, layers=3)


def test_cross_attention_is_multihead_attention_without_padding():
    torch.manual_seed(0)
    ours, theirs = CrossAttention(SMALL).eval(), torch.nn.MultiheadAttention(32, 4, batch_first=True).eval()
    theirs.load_state_dict(ours.state_dict())
    asking, asked = torch.randn(5, 32), torch.randn(7, 32)
    asking_padded, _ = padded(asking, torch.tensor([0, 2]), torch.tensor([2, 3]), 3)
    asked_padded, asked_padding = padded(asked, torch.tensor([0, 4]), torch.tensor([4, 3]), 4)
    together = ours(asking_padded, asked_padded, asked_padding)
    for pair, (rows, columns) in enumerate(((slice(0, 2), slice(0, 4)), (slice(2, 5), slice(4, 7)))):
        expected, _ = theirs(asking[None, rows], asked[None, columns], asked[None, columns])
        torch.testing.assert_close(together[pair, : rows.stop - rows.start], expected[0], atol=1e-6, rtol=1e-5)


def test_taken_sequences_score_as_before(make_batch):
    batch = make_batch([4, 9, 3, 5], [7, 2, 1, 4], width=12, vocabulary=60)
    model = UniterForRetrieval(SMALL).eval()
    numbers = torch.tensor([2, 0, 3])
    rows = int((batch.text_lengths_B + batch.region_counts_B)[numbers].sum())
    for room in (rows, rows + 1, rows + 40):
        taken = model.uniter.pooled_first(batch, take_sequences(batch.layout, numbers, rows=room))
        torch.testing.assert_close(taken, model.pooled(batch)[numbers], atol=1e-6, rtol=1e-5)


def test_mining_scores_without_dropout_and_trains_with_it(make_batch):
    batch = make_batch([4, 9, 3, 5], [7, 2, 1, 4], width=12, vocabulary=60)
    model = UniterForRetrieval(SMALL).train()
    chosen = {tuple(model.hard_negatives(batch, count=2).tolist()) for _ in range(5)}
    assert len(chosen) == 1 and model.training
    outputs = model.ranks(model.mined(batch, count=2))["scores"]
    assert outputs.shape == (3, 1) and outputs.requires_grad
    assert not torch.equal(outputs, model.ranks(model.mined(batch, count=2))["scores"])


def test_each_group_is_mined_by_itself(make_batch):
    """Every step has a group of pictures for a text and one of texts for a picture; neither crowds out the other."""
    batch = make_batch([4, 9, 3, 5, 6, 2, 7], [7, 2, 1, 4, 3, 5, 2], width=12, vocabulary=60)
    batch.targets["group_sizes"] = torch.tensor([4, 3])
    model = UniterForRetrieval(SMALL).eval()
    scores = model.ranks(batch)["scores"].squeeze(1)
    chosen = model.hard_negatives(batch, count=31).tolist()
    assert chosen[0] == 0 and chosen[3] == 4 and len(chosen) == 6, "as many of each group as the smallest has"
    assert chosen[1:3] == (scores[1:4].argsort(descending=True)[:2] + 1).tolist()
    assert chosen[4:] == (scores[5:].argsort(descending=True) + 5).tolist()
    torch.testing.assert_close(model.ranks(model.mined(batch, count=31))["scores"].squeeze(1), scores[chosen], atol=1e-6, rtol=1e-5)


def test_ranking_by_hand():
    scores = torch.logit(torch.tensor([[0.8], [0.7], [0.1], [0.5], [0.9], [0.5]]))
    terms = losses.ranking({"scores": scores}, {}, group_size=3, margin=0.2)
    torch.testing.assert_close(terms["margin"], torch.tensor([[0.1, 0.0], [0.6, 0.2]]))


def test_rivals_are_uniform_over_the_other_regions():
    rng = random.Random(5)
    drawn = [drawn_rival(3, 1, rng, hard_ratio=0.0) for _ in range(400)]
    assert set(drawn) == {0, 2} and 150 < drawn.count(0) < 250
    assert 80 < [drawn_rival(3, 1, rng) for _ in range(400)].count(-1) < 160
    assert drawn_rival(1, 0, rng, hard_ratio=0.0) == -1


def test_regions_are_ranked_by_hand():
    outputs = {"scores": torch.logit(torch.tensor([[0.5, 0.6, 0.7, 0.9]])), "region_counts": torch.tensor([4])}
    for rival, expected in ((0, 0.1), (2, 0.3), (-1, 0.5)):
        margin = losses.ranked_regions(outputs, {"region": torch.tensor([1]), "rival": torch.tensor([rival])})["margin"]
        torch.testing.assert_close(margin, torch.tensor([expected]))
    alone = {"scores": outputs["scores"][:, :1], "region_counts": torch.tensor([1])}
    assert float(losses.ranked_regions(alone, {"region": torch.tensor([0]), "rival": torch.tensor([-1])})["margin"]) == 0.0
    unknown = {"region": torch.tensor([-100]), "rival": torch.tensor([2])}
    assert float(losses.ranked_regions(outputs, unknown)["margin"]) == 0.0


def test_vqa_loss_is_the_published_mean_times_answers():
    torch.manual_seed(0)
    outputs, targets = {"scores": torch.randn(4, 13)}, {"answers": torch.rand(4, 13)}
    terms = losses.answers(outputs, targets)
    expected = terms["binary_cross_entropy"].mean() * 13
    torch.testing.assert_close(losses.of(terms, reduction="rows").number, expected)


def test_state_without_a_fitting_shape_is_a_sentence():
    with pytest.raises(BadInput, match="use the configuration that the checkpoint was made with"):
        load_state(UniterForVqa(SMALL, answers=3), {"vqa_output.3.bias": torch.zeros(4)}, source="x.pt")
