"""Text to word pieces by UNITER's rule: BERT's, but every word that stands between white space is tokenised by itself.

A reader would get this wrong: Hugging Face's `BertTokenizer` is not the same. It finds `[MASK]` anywhere in a string, so that the caption
`[CLS]x` would bring a special token in; here only a word that is exactly `[MASK]` is that token, as in the original, and `[CLS]x` is
five pieces. Control characters and accents follow Python's `unicodedata`, as in the original.

Words repeat: the pieces of each word are remembered, so that a caption costs one split and one look-up a word.

Source: UNITER `prepro.py` and pytorch-pretrained-bert 0.6.2 (facts 2.3).
"""

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Self

from tokenizers import Tokenizer as WordPieceTokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.trainers import WordPieceTrainer

from uniter.datasets.errors import BadInput
from uniter.datasets.progress import Progress
from uniter.datasets.text_db.vocabulary_files import (
    CLS,
    MASK,
    PAD,
    SEP,
    SPECIALS,
    TOKENIZER_FILE,
    UNK,
    VOCABULARY_FILE,
    from_hub,
    read_folder,
    read_tokenizer_json,
    read_vocabulary,
)
from uniter.datasets.vocabulary import bert_base_cased_path

MAX_WORD_LETTERS = 100  # a longer word is [UNK]; BERT's constant


ON_BOARD = ("bert-base-cased", "google-bert/bert-base-cased", "bert-large-cased", "google-bert/bert-large-cased")  # one vocabulary


REMEMBERED_WORDS = 1 << 18  # about 60 MB at most


LONGEST_REMEMBERED_WORD = 64


ALPHABET_LIMIT = 1000  # letters that a learned vocabulary holds at most; rarer ones become [UNK]


CJK_RANGES = (
    (0x4E00, 0x9FFF),
    (0x3400, 0x4DBF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B820, 0x2CEAF),
    (0xF900, 0xFAFF),
    (0x2F800, 0x2FA1F),
)


class Tokenizer:
    """WordPiece over a fixed vocabulary.

    Args:
        vocabulary: the pieces; a piece's place is its id.
        name: what the pieces are known as (`bert-base-cased`); text databases that are trained together must agree on it.
        lowercase: lower the letters and strip the accents first.
        added: words that a task adds behind the vocabulary (VCR's tags of persons and things); one that stands alone between white space
            is that piece. Random replacements are not drawn from them.

    Raises:
        BadInput: a special piece is missing, or an added word is there already.
    """

    def __init__(self, vocabulary: Sequence[str], *, name: str, lowercase: bool, added: Sequence[str] = ()) -> None:
        self.name, self.lowercase, self.added = name, lowercase, tuple(added)
        self.vocabulary = (*vocabulary, *self.added)
        # Of equal lines the last one counts, as in the original.
        self._ids = {piece: number for number, piece in enumerate(self.vocabulary)}
        if len(set(vocabulary) | set(self.added)) < len(set(vocabulary)) + len(self.added):
            raise BadInput(f"vocabulary {name!r} holds some of the words that were to be added to it: {', '.join(self.added[:5])} ...")
        missing = [piece for piece in (UNK, CLS, SEP, MASK) if piece not in self._ids]
        if missing:
            raise BadInput(
                f"vocabulary {name!r} of {len(self.vocabulary)} pieces lacks {', '.join(missing)}; "
                "expected BERT's vocab.txt, one piece a line"
            )
        self.pad_id = self._ids.get(PAD, 0)
        self.unk_id, self.cls_id, self.sep_id, self.mask_id = (self._ids[piece] for piece in (UNK, CLS, SEP, MASK))
        self.vocab_size = len(self._ids)
        # Random replacements in MLM skip the special and unused rows, which stand before "!" (facts 2.3).
        first = self._ids.get("!", 1 + max(self._ids.get(piece, 0) for piece in SPECIALS))
        self.v_range: tuple[int, int] = (first, self.vocab_size - len(self.added))
        model = WordPiece(self._ids, unk_token=UNK, max_input_chars_per_word=MAX_WORD_LETTERS)
        self._words = _Words(model, {word: self._ids[word] for word in self.added}, lowercase=lowercase)

    @classmethod
    def load(cls, name_or_path: str | Path = "bert-base-cased") -> Self:
        """The tokeniser of that name.

        Args:
            name_or_path: `bert-base-cased` (on board), a vocabulary file, a folder that holds `vocab.txt` or `tokenizer.json` (a text
                database of ours is one), or the name of a model on the Hugging Face hub. Letters are lowered as the folder's own JSON
                says, and without one iff the name has "uncased" in it.

        Raises:
            BadInput: there is nothing of that name, or it holds no WordPiece vocabulary.
        """
        name, path = str(name_or_path), Path(name_or_path)
        if name in ON_BOARD:
            return cls(read_vocabulary(bert_base_cased_path()), name=name.rsplit("/", 1)[-1], lowercase=False)
        if path.is_dir():
            vocabulary, name, lowercase, added = read_folder(path)
            return cls(vocabulary, name=name, lowercase=lowercase, added=added)
        if path.is_file():
            if path.suffix == ".json":
                vocabulary, lowercase = read_tokenizer_json(path)
                return cls(vocabulary, name=name, lowercase=lowercase)
            own_name = path.resolve().parent.name if path.name == "vocab.txt" else path.name
            return cls(read_vocabulary(path), name=name, lowercase="uncased" in own_name)
        if name.startswith("train:"):
            raise BadInput(f"{name!r} learns a vocabulary from captions, which only uniter-build-db does; give a vocabulary here")
        vocabulary, lowercase, added = from_hub(name)
        return cls(vocabulary, name=name, lowercase=lowercase, added=added)

    def with_words(self, words: Sequence[str]) -> Self:
        """The same vocabulary with a task's words behind it; itself where it has them already."""
        if not words or self.added == tuple(words):
            return self
        plain = self.vocabulary[: len(self.vocabulary) - len(self.added)]
        return type(self)(plain, name=self.name, lowercase=self.lowercase, added=words)

    @classmethod
    def learn(cls, texts: Iterable[str], *, size: int) -> Self:
        """Learn a cased WordPiece vocabulary of at most `size` pieces from texts; the same texts give the same pieces.

        Raises:
            BadInput: the letters alone are more than `size`, or there is no text.
        """
        counts: dict[str, int] = {}
        # Counted by words of white space first: a caption file has a thousand times more words than different ones.
        with Progress(None, unit="texts", label="reading words", brief=True) as progress:
            for number, text in enumerate(texts, start=1):
                for word in text.split():
                    counts[word] = counts.get(word, 0) + 1
                if number % 1000 == 0:
                    progress.update(1000)
        pieces: dict[str, int] = {}
        for word, count in counts.items():
            for piece in basic_words(word, lowercase=False):
                if piece not in SPECIALS and len(piece) <= MAX_WORD_LETTERS:
                    pieces[piece] = pieces.get(piece, 0) + count
        if not pieces:
            raise BadInput("there are no words to learn a vocabulary from")
        letters: dict[str, int] = {}
        for piece, count in pieces.items():
            for letter in piece:
                letters[letter] = letters.get(letter, 0) + count
        common = sorted(sorted(letters, key=lambda letter: (-letters[letter], letter))[:ALPHABET_LIMIT])
        # "!" comes right after the special pieces, because the range of random replacements starts there.
        signs = [chr(code) for code in range(ord("!"), 127) if not chr(code).isalnum()]
        first = [*SPECIALS, *signs, *(letter for letter in common if letter not in signs)]
        first += [f"##{letter}" for letter in common if letter not in signs]
        if size < len(first):
            raise BadInput(f"a vocabulary of {size} pieces was asked for, but the special pieces and letters alone are {len(first)}")
        # The trainer numbers what it meets in an order that changes from run to run; naming all letters as "special" settles it.
        trainer = WordPieceTrainer(vocab_size=size, special_tokens=first, show_progress=False, limit_alphabet=ALPHABET_LIMIT)
        learner = WordPieceTokenizer(WordPiece(unk_token=UNK))
        learner.pre_tokenizer = WhitespaceSplit()
        known = set(common)
        lines = (" ".join([piece] * count) for piece, count in sorted(_capped(pieces).items()) if known.issuperset(piece))
        learner.train_from_iterator(lines, trainer)
        learned = sorted(learner.get_vocab().items(), key=lambda item: item[1])
        vocabulary = [piece for piece, _ in learned]
        digest = hashlib.sha256("\n".join(vocabulary).encode()).hexdigest()
        return cls(vocabulary, name=f"wordpiece-cased-{len(vocabulary)}-{digest[:8]}", lowercase=False)

    def encode(self, text: str) -> list[int]:
        """Ids of one text, without [CLS] and [SEP]; an empty list where nothing is left of it."""
        return list(chain.from_iterable(map(self._words.__getitem__, text.split())))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without [CLS] and [SEP]."""
        word, flat = self._words.__getitem__, chain.from_iterable
        return [list(flat(map(word, text.split()))) for text in texts]

    def tokens(self, ids: Iterable[int]) -> list[str]:
        """The pieces of these ids.

        Raises:
            BadInput: an id is not in the vocabulary.
        """
        pieces = []
        for number in ids:
            if not 0 <= number < len(self.vocabulary):
                raise BadInput(f"word piece {number} is not in the vocabulary {self.name!r} of {len(self.vocabulary)} pieces")
            pieces.append(self.vocabulary[number])
        return pieces

    def save(self, folder: str | Path) -> None:
        """Write `vocab.txt` and `tokenizer_config.json` into a model's folder; `load` reads them, and so does `transformers`."""
        folder = Path(folder)
        self.write_vocabulary(folder / VOCABULARY_FILE)
        told: dict[str, Any] = {"tokenizer_class": "BertTokenizer", "do_lower_case": self.lowercase, "name_or_path": self.name}
        if self.added:
            told["additional_special_tokens"] = list(self.added)
        (folder / TOKENIZER_FILE).write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def write_vocabulary(self, path: str | Path) -> None:
        """Write the pieces, one a line, as BERT's `vocab.txt`."""
        with open(path, "w", encoding="utf-8", newline="\n") as file:
            file.writelines(f"{piece}\n" for piece in self.vocabulary)

    def sha256(self) -> str:
        """Of the pieces, one a line."""
        return hashlib.sha256("".join(f"{piece}\n" for piece in self.vocabulary).encode("utf-8", "surrogatepass")).hexdigest()

    def meta(self) -> dict[str, Any]:
        """What a text database's meta.json says of its tokeniser; `bert`, `toker` and `tokenizer` because every reader asks for another."""
        return {
            "bert": self.name,
            "toker": self.name,
            "tokenizer": self.name,
            "UNK": self.unk_id,
            "CLS": self.cls_id,
            "SEP": self.sep_id,
            "MASK": self.mask_id,
            "v_range": list(self.v_range),
            "lowercase": self.lowercase,
            "added_words": list(self.added),
        }

    def __reduce__(self) -> tuple[Any, ...]:
        plain = self.vocabulary[: len(self.vocabulary) - len(self.added)]
        return _rebuild, (plain, self.name, self.lowercase, self.added)


def _rebuild(vocabulary: tuple[str, ...], name: str, lowercase: bool, added: tuple[str, ...]) -> Tokenizer:
    return Tokenizer(vocabulary, name=name, lowercase=lowercase, added=added)


class _Words(dict[str, list[int]]):
    """Word between white space -> ids, worked out when first asked for."""

    def __init__(self, model: WordPiece, added: dict[str, int], *, lowercase: bool) -> None:
        super().__init__()
        self._model, self._added, self._lowercase = model, added, lowercase

    def __missing__(self, word: str) -> list[int]:
        if word in self._added:
            return [self._added[word]]
        plain = word.isascii() and word.isalnum() and not self._lowercase
        parts = [word] if plain else basic_words(word, lowercase=self._lowercase)
        ids = [piece.id for part in parts for piece in self._model.tokenize(part)]
        if len(word) <= LONGEST_REMEMBERED_WORD:
            if len(self) >= REMEMBERED_WORDS:
                self.clear()
            self[word] = ids
        return ids


def basic_words(text: str, *, lowercase: bool) -> list[str]:
    """BERT's basic tokenisation: control characters go, Chinese characters and punctuation stand alone.

    The five special pieces are left whole where they stand alone between white space.
    """
    cleaned = []
    for letter in text:
        code = ord(letter)
        if letter in " \t\n\r" or unicodedata.category(letter) == "Zs":
            cleaned.append(" ")
        elif code == 0xFFFD or unicodedata.category(letter).startswith("C"):
            continue
        elif code >= 0x3400 and any(low <= code <= high for low, high in CJK_RANGES):
            cleaned.append(f" {letter} ")
        else:
            cleaned.append(letter)
    words: list[str] = []
    for word in "".join(cleaned).split():
        if word in SPECIALS:
            words.append(word)
            continue
        if lowercase:
            decomposed = unicodedata.normalize("NFD", word.lower())
            word = "".join(letter for letter in decomposed if unicodedata.category(letter) != "Mn")
        words += _split_punctuation(word)
    return words


def _split_punctuation(word: str) -> list[str]:
    parts: list[str] = []
    start = 0
    for place, letter in enumerate(word):
        if _is_punctuation(letter):
            parts += [word[start:place], letter]
            start = place + 1
    parts.append(word[start:])
    # Split again: lower-casing may have brought white space in, and the original splits here too.
    return " ".join(parts).split()


def _is_punctuation(letter: str) -> bool:
    code = ord(letter)
    # All ASCII signs count, "$", "^" and "`" too, which Unicode does not call punctuation.
    if 33 <= code <= 47 or 58 <= code <= 64 or 91 <= code <= 96 or 123 <= code <= 126:
        return True
    return unicodedata.category(letter).startswith("P")


def _capped(counts: dict[str, int]) -> dict[str, int]:
    """Counts divided by a common number where they are so large that repeating the words would take long."""
    most = max(counts.values())
    if most <= 1000:
        return counts
    return {word: max(1, round(count * 1000 / most)) for word, count in counts.items()}
