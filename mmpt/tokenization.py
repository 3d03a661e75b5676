"""Tokenizers: trained on the user's text, or loaded from files. Nothing here downloads."""

from __future__ import annotations

import gzip
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, CLIPTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from mmpt.config import Configurable
from mmpt.errors import CheckpointError, ConfigError, DataError
from mmpt.source import Source

PAD, UNK, CLS, SEP, MASK = SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
"""Special tokens of trained tokenizers, in the order of their ids: the pad id is always 0."""

CLIP_SPECIALS = ("<|startoftext|>", "<|endoftext|>")

_ROLES = {
    "pad_token": (PAD, "<pad>"),
    "unk_token": (UNK, "<unk>"),
    "cls_token": (CLS, "<s>"),
    "sep_token": (SEP, "</s>"),
    "mask_token": (MASK, "<mask>"),
}


def train_wordpiece(
    texts: Iterable[str], vocabulary_size: int, lowercase: bool = True, min_frequency: int = 2
) -> PreTrainedTokenizerFast:
    """Train a WordPiece tokenizer as BERT's: words split at blanks and punctuation, continuations marked "##".

    The same texts give the same tokenizer.

    Args:
        texts: the training text.
        vocabulary_size: most entries of the vocabulary, special tokens included; less if the text does not yield more.
        lowercase: fold case and strip accents.
        min_frequency: pairs seen less often are not merged.

    Raises:
        ConfigError: a vocabulary without room for anything besides the special tokens.
    """
    _check_size(vocabulary_size, len(SPECIALS))
    texts = list(texts)
    tokenizer = _bert_tokenizer({}, lowercase)
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(tokenizer.normalizer.normalize_str(text))
    # Each character may take two entries, as the start of a word and as "##x": at most half of the vocabulary.
    characters = sorted((c for c in counts if not c.isspace()), key=lambda c: (-counts[c], c))
    characters = sorted(characters[: max(1, (vocabulary_size - len(SPECIALS)) // 4)])

    def train(size: int, fixed: Sequence[str]) -> dict[str, int]:
        trainer = trainers.WordPieceTrainer(
            vocab_size=size,
            min_frequency=min_frequency,
            special_tokens=list(fixed),
            limit_alphabet=len(characters),
            initial_alphabet=characters,
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return tokenizer.get_vocab()

    # The trainer numbers "##x" in the order of a hash table and breaks ties by number: two runs would differ. A first
    # run without merges finds these entries; the second one starts with them in alphabetical order.
    continuations = sorted(entry for entry in train(0, SPECIALS) if entry.startswith("##") and len(entry) > 2)
    vocabulary = train(vocabulary_size, [*SPECIALS, *continuations])
    return _wrap(_bert_tokenizer(vocabulary, lowercase))


def train_bytelevel_bpe(
    texts: Iterable[str], vocabulary_size: int, min_frequency: int = 2, single_digits: bool = False
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer: any text is representable and decodes to itself.

    Args:
        texts: the training text.
        vocabulary_size: most entries of the vocabulary; at least the special tokens and the 256 bytes.
        min_frequency: pairs seen less often are not merged.
        single_digits: each digit is a token of its own, so that numbers which were never seen are written like others.

    Raises:
        ConfigError: a vocabulary without room for the bytes.
    """
    _check_size(vocabulary_size, len(SPECIALS) + 256)
    tokenizer = Tokenizer(models.BPE())
    bytelevel = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytelevel]) if single_digits else bytelevel
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        min_frequency=min_frequency,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _wrap(tokenizer)


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """Load a tokenizer from the disk.

    Args:
        path: a Hugging Face folder, a `tokenizer.json`, or BERT's `vocab.txt` (lower-cased if no entry besides the
            bracketed ones has a capital letter).

    Raises:
        CheckpointError: nothing readable there; nothing is ever downloaded.
    """
    path = Path(path).expanduser()
    try:
        if path.is_dir():
            tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
        elif not path.is_file():
            raise CheckpointError(
                f"{path} does not exist; expected a folder with a tokenizer, a tokenizer.json or a vocab.txt. "
                "Nothing is downloaded: write one first, with `save_pretrained(FOLDER)` of a transformers tokenizer"
            )
        elif path.suffix == ".json":
            tokenizer = _wrap(Tokenizer.from_file(str(path)))
        else:
            tokenizer = _from_vocabulary(path)
    except CheckpointError:
        raise
    except Exception as error:  # transformers and tokenizers raise many kinds, bare Exception among them
        raise CheckpointError(f"{path} holds no readable tokenizer: {error}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise CheckpointError(
            f"{path} holds a {type(tokenizer).__name__}, which is not backed by the tokenizers library; "
            "save its fast version"
        )
    return tokenizer


class WordPieceSource(Configurable):
    """A WordPiece tokenizer that is trained where it is asked for; a configuration can name it.

    Args:
        texts: a dataset, whose training texts are taken, or the path of a UTF-8 file with one text per line.
        vocabulary_size: most entries of the vocabulary.
        lowercase: fold case and strip accents.
    """

    def __init__(self, texts: Source | str | Path, vocabulary_size: int = 8192, lowercase: bool = True) -> None:
        self.texts = texts
        self.vocabulary_size = vocabulary_size
        self.lowercase = lowercase

    def train(self) -> PreTrainedTokenizerFast:
        """Train the tokenizer.

        Raises:
            DataError: the file is absent, not UTF-8, or without text.
        """
        return train_wordpiece(_training_texts(self.texts), self.vocabulary_size, self.lowercase)


class ByteLevelSource(Configurable):
    """A byte-level BPE tokenizer that is trained where it is asked for: texts, numbers and JSON come back unchanged.

    Args:
        texts: as for `WordPieceSource`.
        vocabulary_size: most entries of the vocabulary; more than 261.
        single_digits: see `train_bytelevel_bpe`.
    """

    def __init__(self, texts: Source | str | Path, vocabulary_size: int = 2000, single_digits: bool = True) -> None:
        self.texts = texts
        self.vocabulary_size = vocabulary_size
        self.single_digits = single_digits

    def train(self) -> PreTrainedTokenizerFast:
        """Train the tokenizer.

        Raises:
            DataError: the file is absent, not UTF-8, or without text.
        """
        return train_bytelevel_bpe(_training_texts(self.texts), self.vocabulary_size, single_digits=self.single_digits)


class ClipTokenizer(Configurable):
    """The byte-level BPE of CLIP (arXiv 2103.00020), from the vocabulary that `open_clip_torch` brings.

    Differs from it in the padding: a pad token of its own, where CLIP pads with the id of "!".
    """

    def train(self) -> PreTrainedTokenizerFast:
        """Read the vocabulary.

        Raises:
            DataError: the package is missing.
        """
        spec = find_spec("open_clip")
        if spec is None or not spec.submodule_search_locations:
            raise DataError('CLIP\'s vocabulary comes with open_clip_torch; run: pip install "mmpt[compare]"')
        path = Path(next(iter(spec.submodule_search_locations))) / "bpe_simple_vocab_16e6.txt.gz"
        size = 49152 - 256 - 2  # merges that CLIP uses of the file
        lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")[1 : size + 1]
        merges: Any = [(first, second) for first, second in (line.split() for line in lines)]
        letters = list(bytes_to_unicode().values())
        entries = [*letters, *(f"{letter}</w>" for letter in letters), *(a + b for a, b in merges), *CLIP_SPECIALS]
        vocabulary = {entry: number for number, entry in enumerate(entries)}
        tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=PAD)
        tokenizer.cls_token, tokenizer.sep_token = CLIP_SPECIALS
        return tokenizer


TokenizerSource = WordPieceSource | ByteLevelSource | ClipTokenizer | PreTrainedTokenizerFast | str | Path
"""Whatever names a tokenizer: itself, a path (see `load_tokenizer`), or text to train it on."""


def resolve_tokenizer(source: TokenizerSource) -> PreTrainedTokenizerFast:
    """The tokenizer that a `TokenizerSource` names.

    Raises:
        ConfigError: the tokenizer has no pad token.
    """
    if isinstance(source, PreTrainedTokenizerFast):
        tokenizer = source
    else:
        tokenizer = load_tokenizer(source) if isinstance(source, str | Path) else source.train()
    if tokenizer.pad_token_id is None:
        raise ConfigError(
            "the tokenizer has no pad token. Either (1) set one before, e.g. tokenizer.pad_token = tokenizer.eos_token "
            "for a causal model, or (2) use another tokenizer"
        )
    return tokenizer


def _check_size(vocabulary_size: int, least: int) -> None:
    if vocabulary_size <= least:
        raise ConfigError(f"vocabulary_size={vocabulary_size} must be more than {least}")


def _bert_tokenizer(vocabulary: dict[str, int], lowercase: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=UNK))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return tokenizer


def _from_vocabulary(path: Path) -> PreTrainedTokenizerFast:
    words = path.read_text(encoding="utf-8").splitlines()
    missing = [token for token in SPECIALS if token not in words]
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}; expected a BERT vocabulary, one entry per line")
    lowercase = all(word == word.lower() for word in words if not word.startswith("["))
    return _wrap(_bert_tokenizer({word: number for number, word in enumerate(words)}, lowercase))


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Name the special tokens that the vocabulary has, and surround texts by [CLS] and [SEP] if nothing else does."""
    found = {
        role: next((name for name in names if tokenizer.token_to_id(name) is not None), None)
        for role, names in _ROLES.items()
    }
    first, last = found["cls_token"], found["sep_token"]
    if tokenizer.post_processor is None and first is not None and last is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first} $A {last}",
            pair=f"{first} $A {last} $B:1 {last}:1",
            special_tokens=[(name, tokenizer.token_to_id(name)) for name in (first, last)],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{role: name for role, name in found.items() if name is not None}
    )


def _training_texts(source: Source | str | Path) -> list[str]:
    texts = source.texts() if isinstance(source, Source) else _lines(Path(source).expanduser())
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise DataError(f"{source} holds no text to train a tokenizer on")
    return texts


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a readable UTF-8 text file: {error}") from error
