"""The word pieces of a vocabulary file, a folder, a tokenizer.json or the hub."""

from pathlib import Path

from uniter.datasets.errors import BadInput
from uniter.datasets.network import hub_is_reachable
from uniter.datasets.storage.streams import object_of, whole_json

PAD, UNK, CLS, SEP, MASK = SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


VOCABULARY_FILE, TOKENIZER_FILE = "vocab.txt", "tokenizer_config.json"  # of a model's folder


def read_vocabulary(path: Path) -> list[str]:
    """The word pieces of a BERT `vocab.txt`, by their ids.

    Raises:
        BadInput: it is no UTF-8, or pieces are missing or come twice.
    """
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


def read_folder(path: Path, *, called: str = "") -> tuple[list[str], str, bool, list[str]]:
    """Vocabulary, name, lowercase and added words of a folder: a text database of ours, or a model's folder.

    Args:
        called: what the folder goes by, where that is not its name.
    """
    name, lowercase = str(path), "uncased" in (called or path.resolve().name)
    added: list[str] = []
    if (path / "meta.json").is_file() and (path / "vocab.txt").is_file():
        meta = object_of(whole_json(path / "meta.json"), str(path / "meta.json"))
        name = str(meta.get("bert", name))
        lowercase = bool(meta.get("lowercase", "uncased" in name))
        words = meta.get("added_words", [])
        added = [word for word in words if isinstance(word, str)] if isinstance(words, list) else []
    elif (path / TOKENIZER_FILE).is_file():
        told = object_of(whole_json(path / TOKENIZER_FILE), str(path / TOKENIZER_FILE))
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
    """The word pieces of a `tokenizer.json` by their ids, and whether texts are lowercased.

    Raises:
        BadInput: it is no WordPiece tokeniser of BERT's kind.
    """
    document = object_of(whole_json(path), str(path))
    model, normalizer = document.get("model"), document.get("normalizer")
    vocabulary = model.get("vocab") if isinstance(model, dict) and model.get("type", "WordPiece") == "WordPiece" else None
    if not isinstance(vocabulary, dict) or sorted(vocabulary.values()) != list(range(len(vocabulary))):
        raise BadInput(f"{path} is no WordPiece tokeniser; expected one of BERT's kind, whose ids count from 0")
    lowercase = normalizer.get("lowercase") if isinstance(normalizer, dict) else None
    return sorted(vocabulary, key=lambda piece: int(vocabulary[piece])), lowercase is True


def from_hub(name: str) -> tuple[list[str], bool, list[str]]:
    """Vocabulary, lowercase and added words of a model on the Hugging Face hub; nothing from there is run.

    Raises:
        BadInput: it cannot be had, or its tokeniser is none of BERT's kind.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    folder, online = None, hub_is_reachable()
    try:
        for file in (VOCABULARY_FILE, "tokenizer.json", TOKENIZER_FILE):
            try:
                folder = Path(hf_hub_download(name, file, local_files_only=not online)).parent
            except LocalEntryNotFoundError:
                raise
            except EntryNotFoundError:
                continue
    except Exception as error:  # every kind of network trouble has its own class there
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        reason = reason if online else "no network, and it is not in the cache"
        raise BadInput(
            f"tokenizer {name!r} is neither on board (bert-base-cased), nor a file, nor a folder, and could not be had from the "
            f"Hugging Face hub ({reason}); give a vocab.txt"
        ) from None
    if folder is None:
        raise BadInput(f"tokenizer {name!r} is no WordPiece tokeniser of BERT's kind: the hub has no {VOCABULARY_FILE} of it")
    vocabulary, _, lowercase, added = read_folder(folder, called=name)
    return vocabulary, lowercase, added
