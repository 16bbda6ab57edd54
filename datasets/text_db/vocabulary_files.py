"""The word pieces of a vocabulary file, a folder, a tokenizer.json or the hub."""

import json
from pathlib import Path
from typing import Any

from uniter.datasets.errors import BadInput

PAD, UNK, CLS, SEP, MASK = SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


VOCABULARY_FILE, TOKENIZER_FILE = "vocab.txt", "tokenizer_config.json"  # of a model's folder


def read_vocabulary(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(
            f"vocabulary {path} is not UTF-8 text ({error.reason} at byte {error.start}); expected one word piece a line"
        ) from None
    # Not splitlines(): U+0085 and U+2028 are pieces of some vocabularies.
    lines = text.split("\n")
    if lines and not lines[-1]:
        lines.pop()
    return [line.strip() for line in lines]


def read_folder(path: Path) -> tuple[list[str], str, bool, list[str]]:
    """Vocabulary, name, lowercase and added words of a folder: a text database of ours, or a model's folder."""
    name, lowercase = str(path), "uncased" in path.resolve().name
    added: list[str] = []
    if (path / "meta.json").is_file() and (path / "vocab.txt").is_file():
        meta = _read_json(path / "meta.json")
        name = str(meta.get("bert", name))
        lowercase = bool(meta.get("lowercase", "uncased" in name))
        words = meta.get("added_words", [])
        added = [word for word in words if isinstance(word, str)] if isinstance(words, list) else []
    elif (path / TOKENIZER_FILE).is_file():
        told = _read_json(path / TOKENIZER_FILE)
        stated = told.get("do_lower_case")
        lowercase = stated if isinstance(stated, bool) else lowercase
        name = str(told.get("name_or_path") or name)
        words = told.get("additional_special_tokens", [])
        added = [word for word in words if isinstance(word, str)] if isinstance(words, list) else []
    if (path / "vocab.txt").is_file():
        vocabulary = read_vocabulary(path / "vocab.txt")
        plain = len(vocabulary) - len(added)
        if vocabulary[plain:] != added and not (path / "meta.json").is_file():
            added, plain = [], len(vocabulary)  # of another tokeniser's folder: its own special pieces, wherever they stand
        if vocabulary[plain:] != added:
            raise BadInput(
                f"{path / 'vocab.txt'} does not end with the words that {path / 'meta.json'} says were added; rebuild the database"
            )
        return vocabulary[:plain], name, lowercase, added
    if (path / "tokenizer.json").is_file():
        vocabulary, lowercase = read_tokenizer_json(path / "tokenizer.json")
        return vocabulary, name, lowercase, added
    raise BadInput(f"tokenizer folder {path} holds neither vocab.txt nor tokenizer.json")


def read_tokenizer_json(path: Path) -> tuple[list[str], bool]:
    document = _read_json(path)
    model, normalizer = document.get("model"), document.get("normalizer")
    vocabulary = model.get("vocab") if isinstance(model, dict) and model.get("type", "WordPiece") == "WordPiece" else None
    if not isinstance(vocabulary, dict) or sorted(vocabulary.values()) != list(range(len(vocabulary))):
        raise BadInput(f"{path} is no WordPiece tokeniser; expected one of BERT's kind, whose ids count from 0")
    lowercase = normalizer.get("lowercase") if isinstance(normalizer, dict) else None
    return sorted(vocabulary, key=lambda piece: int(vocabulary[piece])), lowercase is True


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except ValueError as error:
        raise BadInput(f"{path} is not JSON ({error}); was it cut off?") from None
    if not isinstance(document, dict):
        raise BadInput(f"{path} holds a JSON {type(document).__name__}; expected an object")
    return document


def from_hub(name: str) -> list[str]:
    from transformers import AutoTokenizer  # slow to import and seldom needed

    try:
        # Knows every form in which a vocabulary lies on the hub, and runs no code from there.
        ids: dict[str, int] = AutoTokenizer.from_pretrained(name, trust_remote_code=False).get_vocab()
    except Exception as error:  # every kind of network trouble has its own class there
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise BadInput(
            f"tokenizer {name!r} is neither on board (bert-base-cased), nor a file, nor a folder, and could not be had from the "
            f"Hugging Face hub ({reason}); give a vocab.txt"
        ) from None
    if sorted(ids.values()) != list(range(len(ids))) or UNK not in ids:
        raise BadInput(f"tokenizer {name!r} is no WordPiece tokeniser of BERT's kind, whose ids count from 0 and which has {UNK}")
    return sorted(ids, key=lambda piece: ids[piece])
