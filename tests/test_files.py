"""Tables, tar shards, safe paths and cache files."""

import io
import os
import tarfile

import pytest

from mmpt.errors import DataError
from mmpt.files import (
    cache_folder,
    contained,
    expand_shards,
    hash_fraction,
    index_tar,
    read_member,
    read_table,
    write_atomically,
    write_cache,
)


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MMPT_CACHE", str(tmp_path_factory.mktemp("cache")))


def make_tar(path, members, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "file.bin"
    write_atomically(path, lambda file: file.write(b"one"))

    def fail(file):
        file.write(b"tw")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        write_atomically(path, fail)
    assert path.read_bytes() == b"one"
    assert os.listdir(path.parent) == ["file.bin"]


def test_a_cache_that_cannot_be_written_says_what_to_set(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="MMPT_CACHE"):
        write_cache(tmp_path / "file" / "x", lambda file: file.write(b""))


def test_the_cache_lies_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("MMPT_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("MMPT_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "mmpt"


@pytest.mark.parametrize("name", ["../x.png", "a/../../x.png", "/etc/x.png", "..", "..\\x.png", "C:\\x.png"])
def test_paths_of_a_dataset_stay_in_its_folder(tmp_path, name):
    with pytest.raises(DataError, match="leads out"):
        contained(tmp_path, name)


def test_paths_within_the_folder_are_joined(tmp_path):
    assert contained(tmp_path, "a/./b/../ü c.png") == tmp_path / "a" / "ü c.png"
    assert contained(tmp_path, "a\\b.png") == tmp_path / "a" / "b.png"
    assert contained(tmp_path, "..hidden.png") == tmp_path / "..hidden.png"


def test_hash_fractions_are_even_and_depend_on_name_and_seed():
    values = [hash_fraction(f"file {number}") for number in range(2000)]
    assert all(0 <= value < 1 for value in values)
    assert 0.07 < sum(value < 0.1 for value in values) / 2000 < 0.13
    assert hash_fraction("a", 1) != hash_fraction("a", 2) != hash_fraction("b", 2)
    assert hash_fraction("a", 1) == hash_fraction("a", 1)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.tsv", 'file\ttext\nä b.png\tone, two\n\nc.png\t"quoted ""here"""\n'),
        ("t.csv", '\ufefffile,text\r\nä b.png,"one, two"\r\nc.png,"quoted ""here"""\r\n'),
        ("t.JSONL", '{"file": "ä b.png", "text": "one, two"}\n\n{"file": "c.png", "text": "quoted \\"here\\""}\n'),
    ],
)
def test_all_kinds_of_tables_read_alike(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8")
    table = read_table(tmp_path / name)
    assert table.columns == ("file", "text")
    assert list(table.rows) == [
        {"file": "ä b.png", "text": "one, two"},
        {"file": "c.png", "text": 'quoted "here"'},
    ]
    assert table.lines[0] == (1 if name == "t.JSONL" else 2)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.csv", None, "no such file"),
        ("t.xlsx", b"PK", "expected a table"),
        ("empty.csv", b"", "no rows"),
        ("header.csv", b"file,text\n", "no rows"),
        ("ragged.tsv", b"file\ttext\na\tb\nc\n", "line 3: 1 cells"),
        ("latin.csv", "file,text\na,caf\u00e9\n".encode("latin-1"), "not UTF-8"),
        ("bad.jsonl", b'{"file": 1}\n{file: 2}\n', "line 2: not JSON"),
        ("list.jsonl", b"[1]\n", "expected an object"),
        ("long.csv", b"file,text\na," + b"x" * 200_000 + b"\n", "line 2"),
    ],
)
def test_unusable_tables_say_where_and_why(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_table(tmp_path / name)


def test_columns_are_found_by_usual_names_the_best_first(tmp_path):
    (tmp_path / "t.csv").write_text("Label,Caption,text,TEXT\n1,2,3,4\n")
    table = read_table(tmp_path / "t.csv")
    assert table.column(None, ("text", "caption"), "text") == "text"
    assert table.column(None, ("caption", "text"), "text") == "Caption"
    assert table.column("Label", ("text",), "text") == "Label"
    assert table.column(None, ("path",), "image") is None
    with pytest.raises(DataError, match="Label, Caption, text, TEXT"):
        table.column("label", (), "text")


def test_members_are_read_in_place_and_the_index_is_kept(tmp_path, monkeypatch):
    contents = {"a.txt": b"alpha", "b/c.bin": bytes(range(256)) * 5, "empty": b""}
    path = make_tar(tmp_path / "x.tar", contents)
    members = index_tar(path)
    assert {member.name: read_member(path, member) for member in members} == contents
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", lambda *a: pytest.fail("scanned again"))
        assert index_tar(path) == members
    make_tar(path, {"a.txt": b"other alpha, longer"})
    assert [read_member(path, member) for member in index_tar(path)] == [b"other alpha, longer"]


def test_links_are_no_members(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        link = tarfile.TarInfo("passwords.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    assert index_tar(tmp_path / "x.tar") == []


def test_damaged_and_compressed_archives_are_typed_errors(tmp_path):
    whole = make_tar(tmp_path / "whole.tar", {"a": b"x" * 5000, "b": b"y" * 5000}).read_bytes()
    for length in (700, 3000, 7000, 9000):
        (tmp_path / f"cut {length}.tar").write_bytes(whole[:length])
        with pytest.raises(DataError, match="can't be read.*end of data"):
            index_tar(tmp_path / f"cut {length}.tar")
    make_tar(tmp_path / "zipped.tar", {"a": b"x"}, "w:gz")
    with pytest.raises(DataError, match="uncompressed"):
        index_tar(tmp_path / "zipped.tar")


def test_shard_patterns_expand_with_leading_zeros(tmp_path):
    for number in range(8, 12):
        make_tar(tmp_path / f"s-{number:03d}.tar", {})
    names = [path.name for path in expand_shards(str(tmp_path / "s-{008..011}.tar"))]
    assert names == ["s-008.tar", "s-009.tar", "s-010.tar", "s-011.tar"]
    assert len(expand_shards(str(tmp_path / "s-{008,011}.tar"))) == 2
    assert len(expand_shards(str(tmp_path))) == 4
    with pytest.raises(DataError, match=r"1 of 5 .*s-012"):
        expand_shards(str(tmp_path / "s-{008..012}.tar"))
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"no \.tar"):
        expand_shards(str(tmp_path / "none"))
