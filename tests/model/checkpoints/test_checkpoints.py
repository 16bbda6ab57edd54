"""Weights in and out: published files, BERT, runs, hostile and damaged files; the same bits everywhere."""

import json
import logging
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from uniter.datasets.errors import BadInput
from uniter.datasets.text_db.tokenizer import Tokenizer
from uniter.datasets.text_db.vocabulary_files import SPECIALS
from uniter.model import UniterConfig, UniterForPretraining, load, load_uniter
from uniter.model.checkpoints.beside import tokenizer_beside, tokenizer_of, told_beside
from uniter.model.checkpoints.export import export_hub, export_published
from uniter.model.checkpoints.load import load_downstream, read_model
from uniter.model.checkpoints.read import TIED, find_weights, our_name
from uniter.model.checkpoints.write import Weights, save_checkpoint, write_model
from uniter.model.heads.downstream import UniterForVqa
from uniter.model.tasks import DOWNSTREAM
from uniter.model.tasks.task import extras

SMALL = UniterConfig(
    vocab_size=50, hidden_size=64, num_hidden_layers=2, num_attention_heads=1, intermediate_size=96, image_feature_size=12, label_classes=6
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = UniterForPretraining(SMALL)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def same_bits(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_golden_weights_in_the_published_layout_load_export_and_reload_to_the_same_bits(uniter_golden, golden_config, tmp_path):
    published = load_file(uniter_golden / "weights.safetensors")
    torch.save(published, tmp_path / "uniter-base.pt")
    shutil.copy(uniter_golden / "config.json", tmp_path / "config.json")
    loaded = load_uniter(tmp_path / "uniter-base.pt")
    assert loaded.config == golden_config
    export_published(loaded, tmp_path / "out" / "exported.pt")
    export_hub(loaded, tmp_path / "hub")
    for again in (load_uniter(tmp_path / "out" / "exported.pt"), load_uniter(tmp_path / "hub")):
        assert again.config == golden_config
        assert {name: bytes(value.numpy().tobytes()) for name, value in again.state_dict().items()} == {
            name: bytes(value.numpy().tobytes()) for name, value in published.items()
        }
    raw = torch.load(tmp_path / "out" / "exported.pt", weights_only=True)
    assert raw.keys() == published.keys()


def test_sizes_follow_from_the_tensors_without_a_configuration(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "model.pt")
    assert load_uniter(tmp_path / "model.pt").config == SMALL


def test_tensors_overrule_the_configuration_beside_them(model, tmp_path):
    """The second-stage VCR file has more words and token types than the configuration that is published with it."""
    torch.save(model.state_dict(), tmp_path / "model.pt")
    (tmp_path / "config.json").write_text(json.dumps({**SMALL.to_dict(), "vocab_size": 40, "type_vocab_size": 1, "num_attention_heads": 2}))
    config = load_uniter(tmp_path / "model.pt").config
    assert (config.vocab_size, config.type_vocab_size, config.num_attention_heads) == (50, 2, 2)


def test_configuration_of_another_model_beside_the_file_is_not_used(model, tmp_path, caplog):
    torch.save(model.state_dict(), tmp_path / "model.pt")
    UniterConfig.preset("large").to_json(tmp_path / "config.json")
    assert load_uniter(tmp_path / "model.pt").config == SMALL
    assert "is another model's (hidden size 1024)" in caplog.text


def test_published_oddities_are_understood(model, tmp_path):
    odd = {}
    for name, value in model.state_dict().items():
        old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        odd["module." + old] = value
    torch.save({"model_state": odd, "epoch": 3}, tmp_path / "vcr.pt")
    assert same_bits(load_uniter(tmp_path / "vcr.pt"), model)


def test_missing_and_unexpected_tensors_are_said_and_a_wrong_shape_is_an_error(model, tmp_path, caplog):
    state = model.state_dict()
    del state["itm_output.bias"]
    state["other_head.weight"] = torch.zeros(2)
    torch.save(state, tmp_path / "model.pt")
    with caplog.at_level(logging.WARNING):
        load_uniter(tmp_path / "model.pt")
    assert "lacks 1 tensors, which keep their initial values: itm_output.bias" in caplog.text
    assert "1 tensors that this model does not use: other_head.weight" in caplog.text
    wide = UniterConfig(**{**SMALL.to_dict(), "hidden_size": 128})
    with pytest.raises(BadInput, match=r"has shape \(50, 64\), but this model expects \(50, 128\).*use the configuration"):
        load_uniter(tmp_path / "model.pt", config=wide)


def test_disagreeing_copies_of_a_tied_tensor_are_said(model, tmp_path, caplog):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state["cls.predictions.decoder.weight"] += 1
    torch.save(state, tmp_path / "model.pt")
    loaded = load_uniter(tmp_path / "model.pt")
    assert torch.equal(loaded.cls.predictions.decoder.weight, model.uniter.embeddings.word_embeddings.weight)
    assert "with which it is tied" in caplog.text


class Hostile:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", [2, "torch"])
def test_hostile_file_executes_nothing(protocol, tmp_path):
    witness = tmp_path / "witness"
    content = {"uniter.pooler.dense.bias": torch.zeros(2), "evil": Hostile(f"touch {witness}")}
    path = tmp_path / "evil.pt"
    if protocol == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content, protocol=protocol))
    with pytest.raises(BadInput, match="nothing in it was executed"):
        load_uniter(path)
    assert not witness.exists()
    with open(path, "rb") as file:
        assert b"touch" in file.read() or protocol == "torch"


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_damaged_files_are_answered_in_a_sentence(name, model, tmp_path):
    path = tmp_path / name
    if name.endswith("pt"):
        torch.save(model.state_dict(), path)
    else:
        write_model(tmp_path, model)
    whole = path.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"not a checkpoint at all", whole[100:]):
        path.write_bytes(damaged)
        with pytest.raises(BadInput) as caught:
            load_uniter(path)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_foreign_checkpoints_are_refused(tmp_path):
    torch.save({"layer1.weight": torch.zeros(2)}, tmp_path / "resnet.pt")
    with pytest.raises(BadInput, match=r"neither UNITER's nor BERT's: it holds 'layer1.weight'"):
        load_uniter(tmp_path / "resnet.pt")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    with pytest.raises(BadInput, match="expected a state dict"):
        load_uniter(tmp_path / "tensor.pt")
    torch.save({"uniter.pooler.dense.weight": torch.zeros(2, 2)}, tmp_path / "part.pt")
    with pytest.raises(BadInput, match="no tensor tells"):
        load_uniter(tmp_path / "part.pt")


def test_wrong_paths_are_said(tmp_path, monkeypatch):
    with pytest.raises(BadInput, match="no file or folder"):
        load_uniter(tmp_path / "absent.pt")
    with pytest.raises(BadInput, match="no file or folder"):
        load_uniter("./absent")
    with pytest.raises(BadInput, match="holds neither"):
        load_uniter(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(BadInput, match="no checkpoint has been written yet"):
        load_uniter(tmp_path)


def test_hub_id_without_a_network_is_a_sentence(tmp_path):
    """In a process of its own: the hub's client reads its settings when it is imported."""
    import subprocess
    import sys

    script = (
        "from uniter.model import load_uniter\nfrom uniter.datasets.errors import BadInput\n"
        "try:\n    load_uniter('somebody/no-such-model')\nexcept BadInput as error:\n    print(error)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.startswith("'somebody/no-such-model' is no file or folder here and could not be had from the hub (")
    assert done.stdout.rstrip().endswith("give the folder")


def test_hub_id_is_fetched_with_its_configuration(model, tmp_path, monkeypatch):
    """What the hub holds may be in PyTorch's old format only."""
    import transformers.utils.hub

    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    SMALL.to_json(tmp_path / "config.json")
    asked = []

    def from_folder(name, file, **_):
        asked.append((name, file))
        return str(tmp_path / file) if (tmp_path / file).is_file() else None

    monkeypatch.setattr(transformers.utils.hub, "cached_file", from_folder)
    assert same_bits(load_uniter("somebody/model"), model)
    weights = ["config.json", "model.safetensors", "pytorch_model.bin", "tokenizer_config.json"]
    assert asked == [("somebody/model", file) for file in weights]
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    find_weights("somebody/model")
    assert asked[len(weights) :] == [("somebody/model", file) for file in (*weights, "vocab.txt")]


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("with_head", [True, False])
def test_bert_from_transformers(kind, with_head, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, max_position_embeddings=40
    )
    torch.manual_seed(1)
    bert = (transformers.BertForPreTraining if with_head else transformers.BertModel)(config)
    bert.save_pretrained(tmp_path)
    if kind == "bin":
        (tmp_path / "model.safetensors").unlink()
        torch.save(bert.state_dict(), tmp_path / "pytorch_model.bin")
    loaded = load_uniter(tmp_path)
    assert loaded.config.num_attention_heads == 4 and loaded.config.max_position_embeddings == 40
    body = bert.bert if with_head else bert
    ours = loaded.uniter.state_dict()
    for name, value in body.state_dict().items():
        if not name.endswith(("position_ids", "token_type_ids")):
            assert torch.equal(ours[name], value), name
    if with_head:
        assert torch.equal(loaded.cls.predictions.bias, bert.cls.predictions.bias)
        assert torch.equal(loaded.cls.predictions.transform.dense.weight, bert.cls.predictions.transform.dense.weight)


def test_bert_and_ours_compute_the_same_for_text(tmp_path, make_batch):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, max_position_embeddings=40
    )
    bert = transformers.BertModel(config).eval()
    bert.save_pretrained(tmp_path)
    batch = make_batch([7], [0], width=2048, vocabulary=50)
    encoded = load_uniter(tmp_path)(batch)
    expected = bert(input_ids=batch.input_ids_T[None]).last_hidden_state[0]
    torch.testing.assert_close(encoded.text_TH, expected, atol=1e-5, rtol=1e-5)


def test_our_names():
    assert our_name("bert.encoder.layer.0.output.LayerNorm.gamma") == "uniter.encoder.layer.0.output.LayerNorm.weight"
    assert our_name("encoder.layer.3.output.dense.bias") == "uniter.encoder.layer.3.output.dense.bias"
    assert our_name("cls.predictions.decoder.bias") == "cls.predictions.bias"
    assert our_name("vqa_output.0.weight") == "vqa_output.0.weight"


def test_saved_folder_round_trip_and_complete_or_absent(model, tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "step-1", model, about={"task": "pretrain"})
    assert same_bits(load_uniter(tmp_path / "step-1"), model)
    assert json.loads((tmp_path / "step-1" / "config.json").read_text())["task"] == "pretrain"
    assert set(load_file(tmp_path / "step-1" / "model.safetensors")) >= set(TIED)
    with pytest.raises(BadInput, match="exists already"):
        save_checkpoint(tmp_path / "step-1", model)
    monkeypatch.setattr("uniter.model.checkpoints.write.write_tensors", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(tmp_path / "step-2", model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1"]


def test_run_directory_means_its_latest_checkpoint(model, tmp_path):
    save_checkpoint(tmp_path / "run" / "checkpoints" / "step-7", model)
    (tmp_path / "run" / "checkpoints" / "latest").symlink_to("step-7")
    assert same_bits(load_uniter(tmp_path / "run"), model)


def test_reading_into_a_model_needs_every_tensor(model, tmp_path):
    write_model(tmp_path, model)
    fresh = UniterForPretraining(SMALL)
    read_model(tmp_path, fresh)
    assert same_bits(fresh, model)
    state = load_file(tmp_path / "model.safetensors")
    del state["uniter.pooler.dense.bias"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(BadInput, match=r"lacks uniter\.pooler\.dense\.bias"):
        read_model(tmp_path, fresh)


def test_hub_folder_has_a_card(model, tmp_path):
    export_hub(model, tmp_path / "hub")
    assert sorted(path.name for path in (tmp_path / "hub").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    card = Path(tmp_path / "hub" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: uniter-toolkit") and "| region features | 12 wide |" in card
    assert json.loads((tmp_path / "hub" / "config.json").read_text())["architectures"] == ["UniterForPretraining"]


@pytest.mark.parametrize("lowercase", [False, True])
def test_the_vocabulary_travels_with_the_weights(model, tmp_path, lowercase):
    tokenizer = Tokenizer([*SPECIALS, "!", "a", "dog", "##s"], name="toy", lowercase=lowercase, added=["[[dog]]"])
    text = "A dogs [[dog]] !"
    write_model(tmp_path, model, tokenizer=tokenizer)
    export_published(Weights.read(tmp_path / "model.safetensors"), tmp_path / "out" / "toy.pt")
    export_hub(Weights.read(tmp_path / "out" / "toy.pt"), tmp_path / "hub")
    for weights in (tmp_path / "model.safetensors", tmp_path / "out" / "toy.pt", tmp_path / "hub" / "model.safetensors"):
        found = tokenizer_beside(weights)
        assert (found.vocabulary, found.lowercase) == (tokenizer.vocabulary, lowercase)
    assert Tokenizer.load(tmp_path).encode(text) == tokenizer.encode(text)
    assert AutoTokenizer.from_pretrained(tmp_path).encode(text, add_special_tokens=False) == tokenizer.encode(text)


def test_the_vocabulary_of_published_weights_is_known_by_its_size(model, tmp_path):
    export_published(model, tmp_path / "toy.pt")
    assert Weights.read(tmp_path / "toy.pt").tokenizer is None
    assert tokenizer_of(tmp_path / "toy.pt", 28996).name == "bert-base-cased"


def test_a_fine_tuned_model_is_exported_with_its_head_and_its_answers(tmp_path):
    tuned = UniterForVqa(SMALL, answers=3)
    save_checkpoint(tmp_path / "vqa", tuned, about={"task": "vqa", "answers": ["no", "red", "yes"]})
    export_published(Weights.read(tmp_path / "vqa"), tmp_path / "vqa.pt")
    export_hub(Weights.read(tmp_path / "vqa.pt"), tmp_path / "hub")
    again = load_downstream(UniterForVqa, tmp_path / "hub")
    assert same_bits(again, tuned)
    assert told_beside(find_weights(tmp_path / "hub"))["answers"] == ["no", "red", "yes"]
    assert torch.load(tmp_path / "vqa.pt", weights_only=True).keys() == tuned.state_dict().keys()


@pytest.mark.parametrize(
    "kind", [*dict.fromkeys(extras(row).model for row in DOWNSTREAM.values()), UniterForPretraining], ids=lambda kind: kind.__name__
)
def test_a_checkpoint_says_what_it_is(kind, tmp_path, caplog):
    model = kind(SMALL)
    save_checkpoint(tmp_path / "one", model)
    # By its configuration, and by its heads alone.
    assert type(load(tmp_path / "one").model) is kind
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    (tmp_path / "one" / "config.json").write_text(json.dumps({**config, "architectures": ["BertForMaskedLM"]}))
    found = load(tmp_path / "one")
    assert type(found.model) is kind and same_bits(found.model, model) and found.fresh == ()
    assert (found.task, found.answers, found.detector, found.tokenizer) == (None, None, None, None)


def test_what_a_checkpoint_lacks_is_told(tmp_path):
    save_checkpoint(tmp_path / "pretrained", UniterForPretraining(SMALL))
    found = load(tmp_path / "pretrained", UniterForVqa, answers=["no", "yes"] * 1564 + ["red"])
    assert {name.partition(".")[0] for name in found.fresh} == {"vqa_output"}


def test_heads_whose_width_nobody_tells_are_a_guess_that_is_said(tmp_path, caplog):
    torch.save(UniterForPretraining(replace(SMALL, num_attention_heads=4)).state_dict(), tmp_path / "alone.pt")
    assert load_uniter(tmp_path / "alone.pt").config.num_attention_heads == 1
    assert "nothing tells its number of attention heads; they are taken to be 64 columns wide" in caplog.text


def test_an_export_replaces_weights_and_nothing_of_others(model, tmp_path):
    export_published(model, tmp_path / "toy.pt")
    export_published(model, tmp_path / "toy.pt")
    (tmp_path / "mine.json").write_text('{"mine": 1}')
    (tmp_path / "notes.txt").write_text("mine")
    for name, kept in (("mine.pt", "mine.json"), ("notes.txt", "notes.txt")):
        before = (tmp_path / kept).read_text()
        with pytest.raises(BadInput, match=f"{kept} is there and .*, so it is not overwritten"):
            export_published(model, tmp_path / name)
        assert (tmp_path / kept).read_text() == before
    assert not (tmp_path / "mine.pt").exists()
