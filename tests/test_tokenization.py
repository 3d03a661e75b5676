"""Tokenizers: trained the same way twice, loaded from every form, never downloaded."""

import hashlib
import pydoc_data.topics as topics
import subprocess
import sys
from pathlib import Path

import pytest

from mmpt.config import from_config, to_config
from mmpt.errors import CheckpointError, ConfigError, DataError
from mmpt.source import Sample, Source
from mmpt.tokenization import (
    SPECIALS,
    WordPieceSource,
    load_tokenizer,
    resolve_tokenizer,
    train_bytelevel_bpe,
    train_wordpiece,
)

TEXTS = [
    "The class statement defines a class object.",
    "The for statement is used to iterate over the elements of a sequence.",
    "Playing chess, the players played a game; naïve players lose.",
    "An expression statement evaluates the expression list.",
] * 3
ODD = "Ünïcode — 你好\n  two  blanks\t✓ 🙂 and [MASK-like] text"


class Sentences(Source):
    """A dataset that a configuration can name."""

    def __init__(self, times: int = 1) -> None:
        self.times = times

    def split(self, name: str) -> list[Sample]:
        return [Sample({"text": text}, text) for text in TEXTS * self.times]


def test_special_tokens_come_first_and_pad_is_zero():
    for tokenizer in (train_wordpiece(TEXTS, 120), train_bytelevel_bpe(TEXTS, 300)):
        assert tokenizer.convert_ids_to_tokens(range(5)) == list(SPECIALS)
        assert (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.mask_token_id) == (0, 1, 4)


def test_a_text_is_surrounded_by_cls_and_sep_and_a_pair_separated():
    tokenizer = train_wordpiece(TEXTS, 200)
    assert tokenizer("")["input_ids"] == [2, 3]
    ids = tokenizer("the class")["input_ids"]
    assert (ids[0], ids[-1]) == (2, 3)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the class"
    pair = tokenizer("class", "object")["input_ids"]
    assert (pair[0], pair.count(3), pair[-1]) == (2, 2, 3)


def test_the_vocabulary_has_the_size_asked_for_and_splits_words_at_hash_marks():
    tokenizer = train_wordpiece(TEXTS, 120)
    assert len(tokenizer) == 120
    assert sorted(tokenizer.get_vocab().values()) == list(range(120))
    pieces = tokenizer.tokenize("statements")
    assert len(pieces) > 1
    assert all(piece.startswith("##") for piece in pieces[1:])
    assert "".join(piece.removeprefix("##") for piece in pieces) == "statements"


def test_case_and_accents_are_folded_only_on_demand():
    assert train_wordpiece(TEXTS, 120).tokenize("NAÏVE") == train_wordpiece(TEXTS, 120).tokenize("naive")
    cased = train_wordpiece(TEXTS, 120, lowercase=False)
    assert cased.tokenize("The") != cased.tokenize("the")


def test_unknown_characters_become_unk():
    assert train_wordpiece(TEXTS, 120).tokenize("☃") == ["[UNK]"]


def test_a_vocabulary_smaller_than_the_alphabet_keeps_the_frequent_characters():
    tokenizer = train_wordpiece(["aaaa bbb cc d " * 5], 17)  # room for three characters
    assert {"a", "b", "c"} <= set(tokenizer.get_vocab())
    assert tokenizer.tokenize("d") == ["[UNK]"]


def test_bytelevel_bpe_loses_nothing():
    tokenizer = train_bytelevel_bpe(TEXTS, 300)
    for text in (ODD, *TEXTS[:4], ""):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == text


def digests() -> list[str]:
    """What training on the same text gives, in short."""
    texts = [line for text in list(topics.topics.values())[:8] for line in text.splitlines()]
    trained = (train(texts, 400) for train in (train_wordpiece, train_bytelevel_bpe))
    return [hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest() for tokenizer in trained]


def test_training_gives_the_same_tokenizer_in_every_process():
    program = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    program += "from test_tokenization import digests\nprint(*digests())"
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert other.stdout.split() == digests() == digests()


@pytest.mark.parametrize("size", [0, 5])
def test_a_vocabulary_without_room_is_refused(size):
    with pytest.raises(ConfigError, match=f"vocabulary_size={size}"):
        train_wordpiece(TEXTS, size)
    with pytest.raises(ConfigError, match="261"):
        train_bytelevel_bpe(TEXTS, 261)


def test_every_form_on_disk_gives_the_same_ids(tmp_path):
    tokenizer = train_wordpiece(TEXTS, 200)
    tokenizer.save_pretrained(str(tmp_path / "folder"))
    by_id = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    (tmp_path / "vocab.txt").write_text("\n".join(by_id) + "\n", encoding="utf-8")
    text = "The PLAYERS evaluate, naïvely!"
    for path in (tmp_path / "folder", tmp_path / "folder" / "tokenizer.json", tmp_path / "vocab.txt"):
        loaded = load_tokenizer(path)
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert (loaded.pad_token_id, loaded.cls_token_id, loaded.sep_token_id, loaded.mask_token_id) == (0, 2, 3, 4)


def test_a_cased_vocabulary_file_is_recognised(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIALS, "The", "the"]), encoding="utf-8")
    assert load_tokenizer(tmp_path / "vocab.txt").tokenize("The the") == ["The", "the"]


def test_what_is_absent_or_no_tokenizer_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="Nothing is downloaded"):
        load_tokenizer("bert-base-uncased")
    with pytest.raises(CheckpointError, match="no readable tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.txt").write_text("only\nwords\n")
    with pytest.raises(CheckpointError, match=r"lacks \[PAD\]"):
        load_tokenizer(tmp_path / "vocab.txt")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no readable tokenizer"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_a_source_trains_on_a_file_or_a_corpus_and_can_be_configured(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(TEXTS), encoding="utf-8")
    digests = set()
    for source in (WordPieceSource(path, 120), WordPieceSource(str(path), 120), WordPieceSource(Sentences(), 120)):
        digests.add(hashlib.sha256(resolve_tokenizer(source).backend_tokenizer.to_str().encode()).digest())
    rebuilt = from_config(to_config(WordPieceSource(path, 120)))
    digests.add(hashlib.sha256(rebuilt.train().backend_tokenizer.to_str().encode()).digest())
    assert len(digests) == 1
    config = to_config(WordPieceSource(Sentences(times=2), 120))
    assert config["init_args"]["texts"]["init_args"] == {"times": 2}


def test_a_source_without_text_is_refused(tmp_path):
    (tmp_path / "empty.txt").write_text("\n  \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match="no text"):
        WordPieceSource(tmp_path / "empty.txt", 120).train()
    for name in ("latin.txt", "absent.txt"):
        with pytest.raises(DataError, match=name):
            WordPieceSource(tmp_path / name, 120).train()


def test_a_tokenizer_without_a_pad_token_is_refused():
    tokenizer = train_wordpiece(TEXTS, 120)
    tokenizer.pad_token = None
    with pytest.raises(ConfigError, match="no pad token"):
        resolve_tokenizer(tokenizer)
