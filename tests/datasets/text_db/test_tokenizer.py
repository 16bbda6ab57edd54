"""UNITER's tokenisation: the original's own answers, and what follows from its rule."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uniter.datasets.errors import BadInput
from uniter.datasets.text_db.tokenizer import Tokenizer, basic_words
from uniter.datasets.text_db.vocabulary_files import SPECIALS

ON_BOARD = Tokenizer.load()


@pytest.fixture
def bert() -> Tokenizer:
    return ON_BOARD


@pytest.mark.parametrize("kind", ["cased", "uncased"])
def test_golden_texts(uniter_data_golden: Path, kind: str) -> None:
    expected = json.loads((uniter_data_golden / "expected.json").read_text())["tokens"][kind]
    texts = json.loads((uniter_data_golden / "texts.json").read_text())
    assert {row["text"] for row in expected["rows"]} == set(texts)
    for path in (uniter_data_golden / "vocab" / f"bert-toy-{kind}", uniter_data_golden / "vocab" / f"bert-toy-{kind}" / "vocab.txt"):
        tokenizer = Tokenizer.load(path)
        assert tokenizer.vocab_size == expected["vocab_size"]
        got = tokenizer.encode_batch([row["text"] for row in expected["rows"]])
        for row, ids in zip(expected["rows"], got, strict=True):
            assert ids == row["ids"], row["text"]
            assert tokenizer.tokens(ids) == row["tokens"]
            assert tokenizer.encode(row["text"]) == ids


def test_golden_tokenizer_cases(uniter_tasks_golden: Path) -> None:
    meta = json.loads((uniter_tasks_golden / "meta.json").read_text())
    tokenizer = Tokenizer.load(uniter_tasks_golden / "toy-bert-cased")
    cases = json.loads((uniter_tasks_golden / "tokenizer_cases.json").read_text())
    assert cases
    for case in cases:
        assert tokenizer.encode(case["text"]) == case["input_ids"], case["text"]
        assert [tokenizer.tokens(tokenizer.encode(word)) for word in case["text"].split()] == case["tokens_per_word"]
    assert {"PAD", "UNK", "CLS", "SEP", "MASK"} & set(json.dumps(meta).replace('"', " ").split()), "the set names its special ids"


def test_golden_special_ids(uniter_data_golden: Path) -> None:
    for database in sorted((uniter_data_golden / "txt_db").iterdir()):
        meta = json.loads((database / "meta.json").read_text())
        tokenizer = Tokenizer.load(uniter_data_golden / meta["tokenizer"])
        ours = tokenizer.meta()
        assert {name: meta[name] for name in ("UNK", "CLS", "SEP", "MASK", "v_range")} == {
            name: ours[name] for name in ("UNK", "CLS", "SEP", "MASK", "v_range")
        }


def test_the_vocabulary_on_board(bert: Tokenizer) -> None:
    assert (bert.name, bert.vocab_size, bert.v_range, bert.lowercase) == ("bert-base-cased", 28996, (106, 28996), False)
    assert (bert.pad_id, bert.unk_id, bert.cls_id, bert.sep_id, bert.mask_id) == (0, 100, 101, 102, 103)
    assert bert.tokens(bert.encode("A skateboarder in Zürich.")) == ["A", "skate", "##board", "##er", "in", "Zürich", "."]


def test_a_caption_brings_no_special_piece_in_unless_it_is_that_word(bert: Tokenizer) -> None:
    special = {bert.pad_id, bert.cls_id, bert.sep_id, bert.mask_id}
    for text in ("[CLS]x", "x[MASK]", "[MASK]ing", "[mask]", "[ MASK ]", "[SEP].", "[MASK][MASK]"):
        assert not special & set(bert.encode(text)), text
    # UNITER's own rule, and its published databases: alone between white space it is that piece.
    assert bert.encode("a [MASK] b")[1] == bert.mask_id


def test_words_of_a_hundred_letters_are_the_longest(bert: Tokenizer) -> None:
    assert bert.unk_id not in bert.encode("w" * 100)
    assert bert.encode("w" * 101) == [bert.unk_id]
    assert bert.encode("\u200b" + "w" * 100) == bert.encode("w" * 100)


@settings(deadline=None)
@given(st.lists(st.text(max_size=30), max_size=6))
def test_a_text_is_its_words_end_to_end(words: list[str]) -> None:
    text, tokenizer = " ".join(words), ON_BOARD
    assert tokenizer.encode(text) == [piece for word in text.split() for piece in tokenizer.encode(word)]
    assert all(0 <= piece < tokenizer.vocab_size for piece in tokenizer.encode(text))


@settings(deadline=None)
@given(st.text(max_size=40), st.booleans())
def test_basic_words_hold_no_white_space_and_nothing_empty(text: str, lowercase: bool) -> None:
    for word in basic_words(text, lowercase=lowercase):
        assert word.split() == [word]


def test_pickled_is_the_same(bert: Tokenizer) -> None:
    again = pickle.loads(pickle.dumps(bert))
    assert again.encode("two dogs!") == bert.encode("two dogs!")
    assert again.meta() == bert.meta() and again.sha256() == bert.sha256()


def test_tokenizer_json_and_a_stated_lowercase(tmp_path: Path) -> None:
    pieces = [*SPECIALS, "!", "dog", "##s"]
    folder = tmp_path / "some-model"
    folder.mkdir()
    document = {
        "model": {"type": "WordPiece", "vocab": {piece: place for place, piece in enumerate(pieces)}},
        "normalizer": {"lowercase": True},
    }
    (folder / "tokenizer.json").write_text(json.dumps(document))
    assert Tokenizer.load(folder).encode("DOGS") == [6, 7]
    assert Tokenizer.load(folder / "tokenizer.json").encode("Dog") == [6]
    (folder / "vocab.txt").write_text("\n".join(pieces))
    assert Tokenizer.load(folder).encode("DOGS") == [1]
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    assert Tokenizer.load(folder).encode("DOGS") == [6, 7]


def test_messages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vocab.txt").write_text("[UNK]\n[CLS]\ndog\n")
    with pytest.raises(BadInput, match=r"of 3 pieces lacks \[SEP\], \[MASK\]; expected BERT's vocab.txt"):
        Tokenizer.load(tmp_path / "vocab.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(BadInput, match="is not UTF-8 text"):
        Tokenizer.load(tmp_path / "latin.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match=r"holds neither vocab\.txt nor tokenizer\.json"):
        Tokenizer.load(tmp_path / "empty")
    (tmp_path / "empty" / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": {"a": 0}}}')
    with pytest.raises(BadInput, match="is no WordPiece tokeniser"):
        Tokenizer.load(tmp_path / "empty")
    with pytest.raises(BadInput, match="is not in the vocabulary 'bert-base-cased'"):
        Tokenizer.load().tokens([28996])
    with pytest.raises(BadInput, match="could not be had from the Hugging Face hub"):
        Tokenizer.load("no such model !")
    with pytest.raises(BadInput, match="only uniter-build-db does"):
        Tokenizer.load("train:100")


LEARN = """
from uniter.datasets.text_db.tokenizer import Tokenizer
sizes = [(c, g) for c in ("red", "green", "bluish") for g in ("dark", "pale")]
texts = [f"a {c} disc on the {g} ground , near a {c}ish square thing!" for c, g in sizes]
print("\\n".join(Tokenizer.learn(texts, size=120).vocabulary))
"""


def test_learned_vocabularies_do_not_depend_on_the_run() -> None:
    runs = [subprocess.run([sys.executable, "-c", LEARN], capture_output=True, text=True, check=True).stdout for _ in range(2)]
    assert runs[0] == runs[1]
    pieces = runs[0].split("\n")
    assert pieces[:6] == [*SPECIALS, "!"] and "red" in pieces and "ground" in pieces


def test_learned_vocabulary_reads_its_texts_without_unknown_pieces() -> None:
    texts = ["two red discs near a green square .", "ein Bär läuft", "naïve, café!"]
    tokenizer = Tokenizer.learn(texts, size=400)
    assert all(tokenizer.unk_id not in tokenizer.encode(text) for text in texts)
    assert tokenizer.v_range == (5, tokenizer.vocab_size)
    with pytest.raises(BadInput, match="a vocabulary of 30 pieces was asked for, but the special pieces and letters alone are"):
        Tokenizer.learn(texts, size=30)
    with pytest.raises(BadInput, match="no words to learn"):
        Tokenizer.learn(["", "\u200b"], size=400)


def test_words_that_a_task_adds(bert: Tokenizer) -> None:
    longer = bert.with_words(["[person0]", "[car1]"])
    assert longer.encode("[person0] and [car1] . [person0]s") == [
        28996,
        *bert.encode("and"),
        28997,
        *bert.encode(". [person0]s"),
    ]
    assert (longer.vocab_size, longer.v_range, longer.tokens([28997])) == (28998, bert.v_range, ["[car1]"])
    assert longer.with_words(["[person0]", "[car1]"]) is longer and bert.with_words(()) is bert
    assert pickle.loads(pickle.dumps(longer)).encode("[car1]") == [28997]
    with pytest.raises(BadInput, match="holds some of the words that were to be added"):
        bert.with_words(["dog"])
