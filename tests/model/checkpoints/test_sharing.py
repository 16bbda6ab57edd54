"""Models by their class: loaded, written, uploaded; every published layout answers as before."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_model

import uniter.model
from uniter.datasets.errors import BadInput
from uniter.datasets.text_db.tokenizer import SPECIALS, Tokenizer
from uniter.model import UniterConfig, UniterForPretraining, UniterForVqa, load
from uniter.model.checkpoints.card import model_card
from uniter.model.checkpoints.write import Weights, write_model
from uniter.model.tasks.table import DOWNSTREAM
from uniter.model.tasks.task import extras

KINDS = [*dict.fromkeys(extras(row).model for row in DOWNSTREAM.values()), UniterForPretraining]
EACH_KIND = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
CONFIG = UniterConfig(
    vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_feature_size=12, label_classes=6
)
HEADS = {
    "UniterForVqa": "answers",
    "UniterForRetrieval": "ranks",
    "UniterForReferring": "regions",
    "UniterForVcr": "choices",
    "UniterForClassification": "labels",
}


def scores_of(model: Any, make_batch: Any) -> torch.Tensor:
    batch = make_batch([4, 9, 3, 5], [7, 2, 5, 4], width=12, vocabulary=60)
    head = HEADS.get(type(model).__name__, "pairs" if isinstance(model, UniterForPretraining) else "statements")
    scores: torch.Tensor = getattr(model, head)(batch)["scores"]
    return scores


def made(kind: Any) -> Any:
    torch.manual_seed(0)
    return kind(CONFIG).eval()


@EACH_KIND
def test_a_class_is_written_and_loaded_without_code(kind: Any, make_batch: Any, tmp_path: Path) -> None:
    model = made(kind)
    model.save_pretrained(tmp_path / "shared", licence="mit")
    assert {path.suffix for path in (tmp_path / "shared").iterdir()} == {".json", ".safetensors", ".md"}, "nothing that runs"
    again = kind.from_pretrained(tmp_path / "shared")
    assert not again.training and torch.equal(scores_of(again, make_batch), scores_of(model, make_batch))
    # The names of classes that users know are those of the package.
    assert getattr(uniter.model, kind.__name__) is kind
    with pytest.raises(BadInput, match="exists"):
        model.save_pretrained(tmp_path / "shared")


def test_tied_tensors_are_stored_once(tmp_path: Path) -> None:
    model = made(UniterForPretraining)
    model.save_pretrained(tmp_path / "shared")
    with safe_open(tmp_path / "shared" / "model.safetensors", "pt") as file:
        names, told = set(file.keys()), file.metadata()
    assert names == {name for name, _ in model.named_parameters()}
    assert told["cls.predictions.decoder.weight"] == "uniter.embeddings.word_embeddings.weight"
    # The safetensors library reads it into a model as it is.
    other = UniterForPretraining(CONFIG)
    assert load_model(other, tmp_path / "shared" / "model.safetensors") == (set(), [])
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


@EACH_KIND
@pytest.mark.parametrize("prefix", ["uniter.", "bert."])
def test_published_layouts_load_by_one_call_and_answer_as_before(kind: Any, prefix: str, make_batch: Any, tmp_path: Path) -> None:
    """UNITER's files, and VILLA's, whose tensors are called `bert.`."""
    model = made(kind)
    state = {re.sub(r"^uniter\.", prefix, name): value for name, value in model.state_dict().items()}
    torch.save(state, tmp_path / "published.pt")
    CONFIG.to_json(tmp_path / "published.json")
    found = load(tmp_path / "published.pt")
    assert type(found.model) is kind and found.fresh == ()
    torch.testing.assert_close(scores_of(found.model, make_batch), scores_of(model, make_batch), atol=1e-6, rtol=0)
    torch.testing.assert_close(
        scores_of(kind.from_pretrained(tmp_path / "published.pt"), make_batch), scores_of(model, make_batch), atol=1e-6, rtol=0
    )


def test_what_a_checkpoint_tells_is_handed_on(tmp_path: Path) -> None:
    tokenizer = Tokenizer([*SPECIALS, "!", "a", "dog"], name="toy", lowercase=False)
    (tmp_path / "run").mkdir()
    about = {"task": "vqa", "answers": ["no", "yes"], "detector": {"detector": "x", "weights_sha256": "1" * 64}}
    write_model(tmp_path / "run", UniterForVqa(CONFIG, answers=2), about=about, tokenizer=tokenizer)
    UniterForVqa.from_pretrained(tmp_path / "run").save_pretrained(tmp_path / "shared")
    found = load(tmp_path / "shared")
    assert (found.answers, found.task) == (["no", "yes"], "vqa") and found.detector is not None
    assert found.tokenizer is not None and found.tokenizer.vocabulary == tokenizer.vocabulary
    # A start of another class is not this one's task.
    (tmp_path / "pretrained").mkdir()
    write_model(
        tmp_path / "pretrained",
        UniterForPretraining(CONFIG),
        about={"task": "pretrain", "detector": about["detector"]},
        tokenizer=tokenizer,
    )
    UniterForVqa.from_pretrained(tmp_path / "pretrained", answers=3).save_pretrained(tmp_path / "new", task="vqa")
    found = load(tmp_path / "new")
    assert (found.answers, found.task, type(found.model)) == (None, "vqa", UniterForVqa) and found.detector is not None


def test_sizes_that_do_nothing_are_refused(tmp_path: Path) -> None:
    made(UniterForPretraining).save_pretrained(tmp_path / "shared")
    with pytest.raises(BadInput, match="UniterForPretraining takes all its sizes from the checkpoint; leave answers out"):
        UniterForPretraining.from_pretrained(tmp_path / "shared", answers=3)


class FakeHub:
    made: list[tuple[str, bool | None]]
    uploaded: dict[str, bytes]

    def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> str:
        if "/" not in repo_id:
            raise OSError("you are nobody\nat all")
        self.made = [(repo_id, private)]
        return f"https://hub/{repo_id}"

    def upload_folder(self, *, repo_id: str, folder_path: Path) -> None:
        self.uploaded = {path.name: path.read_bytes() for path in folder_path.iterdir()}


def test_a_model_is_uploaded_with_its_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub = FakeHub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    model = made(UniterForVqa)
    assert model.push_to_hub("me/my-vqa", licence="cc-by-4.0", private=True, task="vqa") == "https://hub/me/my-vqa"
    assert hub.made == [("me/my-vqa", True)]
    assert set(hub.uploaded) == {"model.safetensors", "config.json", "README.md"}
    card = hub.uploaded["README.md"].decode()
    assert 'UniterForVqa.from_pretrained("me/my-vqa")' in card and "license: cc-by-4.0" in card
    with pytest.raises(BadInput, match=r"'nobody' could not be uploaded to the hub \(you are nobody\)"):
        model.push_to_hub("nobody")


def test_the_card_tells_machines_and_people(make_batch: Any, tmp_path: Path) -> None:
    model = made(UniterForVqa)
    about = {"task": "vqa", "detector": {"detector": "butd", "weights_sha256": "2" * 64}}
    card = model_card(
        Weights.of(model, about=about),
        name="mine",
        data=["vqa.db"],
        results={"vqa_data/accuracy": 0.5},
        trained_on="vqa.db.",
        licence="mit",
    )
    _, front, text = card.split("---\n", 2)
    told = yaml.safe_load(front)
    assert told["license"] == "mit" and told["tags"] == ["uniter", "vision-and-language", "vqa"] and told["metrics"] == ["accuracy"]
    (entry,) = told["model-index"]
    assert entry["name"] == "mine" and entry["results"][0]["metrics"][0]["value"] == 0.5
    assert entry["results"][0]["dataset"]["name"] == "vqa.db"
    for said in ("| detector | butd", "| licence | mit |", "pip install uniter-toolkit", "| vqa_data/accuracy | 0.5 |"):
        assert said in text
    # Its snippet runs.
    model.save_pretrained(tmp_path / "shared")
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "shared" / "README.md").read_text(), flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(code.replace("this/folder", str(tmp_path / "shared")), names)
    assert torch.equal(scores_of(names["model"], make_batch), scores_of(model, make_batch))
