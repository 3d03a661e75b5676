"""Sources of symbolic music: folders, zip files, tables, the default corpus; splits, labels, damage."""

import io
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from midi_pieces import piece, write_piece

from mmpt.batches import BatchDataset, Key
from mmpt.config import from_config, to_config
from mmpt.data import MultimodalData
from mmpt.datasets import midi_corpus
from mmpt.datasets.midi import Music, content_hash
from mmpt.datasets.midi_corpus import Corpus, CorpusPiece, from_music21, load_pieces, save_pieces
from mmpt.encoder import IGNORED
from mmpt.encoders.midi import MidiProcessor
from mmpt.errors import ConfigError, DataError, SampleError
from mmpt.source import Source

SPLITS = ("train", "validation", "test")


@pytest.fixture
def songs(tmp_path) -> Path:
    for number in range(40):
        write_piece(tmp_path / "songs" / ("jigs" if number % 2 else "reels") / f"{number}.mid", 30, number)
    return tmp_path / "songs"


def names(source: Music, split: str) -> set[str]:
    examples = source.split(split)
    return {examples[i].name.split(" [")[0] for i in range(len(examples))}


def test_folders_give_classes_texts_and_splits_by_piece(songs):
    source = Music(str(songs), length=12, shortest=1)
    assert list(source.label_names("class")) == ["jigs", "reels"]
    parts = [names(source, split) for split in SPLITS]
    assert sum(map(len, parts)) == len(set().union(*parts)) == 40
    assert all(parts)
    examples = source.split("test")
    assert len(examples) == 3 * len(parts[2])
    for index in range(len(examples)):
        sample = examples[index]
        assert sample.modalities["text"] == source.label_names("class")[sample.labels["class"]]
        assert len(sample.modalities["midi"]) in (12, 6)
    pieces = {sample.labels["piece"] for sample in (examples[i] for i in range(len(examples)))}
    assert len(pieces) == len(parts[2])


def test_excerpts_are_the_piece_in_order(songs):
    source = Music(str(songs), length=12, shortest=1)
    examples = source.split("train")
    whole = source._collection().pieces[examples[0].labels["piece"]].notes
    pitches = np.concatenate([examples[i].modalities["midi"].pitch for i in range(3)])
    assert pitches.tolist() == whole.pitch.tolist()


def test_lengths_are_the_notes_of_each_excerpt(songs):
    source = Music(str(songs), length=12, shortest=1)
    examples = source.split("train")
    assert source.lengths("train") == [len(examples[i].modalities["midi"]) for i in range(len(examples))]
    assert set(source.lengths("train")) == {12, 6}


def test_classes_are_known_without_reading_the_excerpts(songs):
    (songs / "jigs" / "torn.mid").write_bytes(b"MThd")
    source = Music(str(songs), length=8)
    for split in ("train", "validation", "test"):
        assert source.label_places("class", split) == Source.label_places(source, "class", split)
        assert source.label_values("class", split) == [value for _, value in source.label_places("class", split)]
    assert len(source.label_places("piece", "train")) > 0


def test_short_last_excerpts_are_left_out_unless_they_are_the_only_one(songs):
    assert len(Music(str(songs), length=12, shortest=7).split("train")) == 2 * len(names(Music(str(songs)), "train"))
    assert len(Music(str(songs), length=100, shortest=50).split("train")) == len(names(Music(str(songs)), "train"))


def test_joined_pieces_fill_sequences_with_each_note_once_and_an_end_for_each_piece(songs):
    source = Music(str(songs), length=50, joined=True)
    examples = source.split("train")
    whole = source._collection()
    inside = [number for number, split in enumerate(whole.splits) if split == "train"]
    inputs = MidiProcessor(max_length=50)([examples[i].modalities["midi"] for i in range(len(examples))])
    octuple = MidiProcessor().tokenizer
    ends = (inputs["words"] == torch.from_numpy(octuple.end)).all(-1)
    notes = inputs["mask"] & ~ends
    assert int(ends.sum()) == len(inside)
    assert int(notes.sum()) == sum(len(whole.pieces[number].notes) for number in inside)
    assert (inputs["mask"].sum(1)[:-1] >= 49).all()  # a piece's last note and its end are never torn apart
    assert torch.equal(inputs["label/velocity"] == IGNORED, ~notes)
    found = sorted(inputs["words"][..., 3][notes].tolist())
    assert found == sorted(np.concatenate([whole.pieces[number].notes.pitch for number in inside]).tolist())
    assert "class" not in examples[0].labels


@pytest.mark.parametrize("length", [2, 3, 30, 31, 32])
def test_joining_ends_whatever_the_length(songs, length):
    examples = Music(str(songs), length=length, joined=True).split("test")
    inputs = MidiProcessor(max_length=length)([examples[i].modalities["midi"] for i in range(len(examples))])
    assert inputs["words"].shape[1] == length


def test_joined_pieces_list_those_that_cannot_be_read(songs):
    (songs / "jigs" / "broken.mid").write_bytes(b"")
    source = Music(str(songs), joined=True, validation_fraction=0.0, test_fraction=0.0)
    examples = source.split("train")
    with pytest.raises(SampleError, match=r"broken\.mid"):
        examples[len(examples) - 1]
    with pytest.raises(ConfigError, match="at least 2"):
        Music(str(songs), joined=True, length=1)


def test_a_zip_file_is_read_like_the_folder_it_holds(songs, tmp_path):
    archive = shutil.make_archive(str(tmp_path / "songs"), "zip", songs)
    assert [names(Music(archive), split) for split in SPLITS] == [names(Music(str(songs)), split) for split in SPLITS]


def test_versions_of_a_piece_stay_together(tmp_path):
    for number in range(60):
        write_piece(tmp_path / f"tune{number}.mid", 30, number)
        write_piece(tmp_path / "melody" / f"tune{number}.mid", 20, number)
    source = Music(str(tmp_path), classes=None)
    for split in SPLITS:
        found = [Path(name).stem for name in names(source, split)]
        assert all(found.count(stem) == 2 for stem in found)


def test_classes_come_from_a_pattern_and_small_ones_can_be_left_out(tmp_path):
    for number in range(12):
        write_piece(tmp_path / f"{'reels' if number < 9 else 'xmas'}{number}.mid", 20, number)
    assert list(Music(str(tmp_path), classes="([a-z]+)[^/]*$").label_names("class")) == ["reels", "xmas"]
    assert list(Music(str(tmp_path), classes="([a-z]+)[^/]*$", min_pieces=4).label_names("class")) == ["reels"]
    with pytest.raises(ConfigError, match="one group"):
        Music(str(tmp_path), classes="[a-z]+")


def test_split_folders_decide(tmp_path):
    for number, split in enumerate(["train"] * 6 + ["valid"] * 2 + ["test"] * 2):
        write_piece(tmp_path / split / "a" / f"{number}.mid", 20, number)
    source = Music(str(tmp_path))
    assert [len(names(source, split)) for split in SPLITS] == [6, 2, 2]


def test_a_table_names_files_classes_and_splits(songs, tmp_path):
    rows = [
        f"reels/{n}.mid,{'a' if n < 20 else 'b'},{'test' if n < 8 else 'val' if n < 12 else 'train'}"
        for n in range(0, 40, 2)
    ]
    table = tmp_path / "table.csv"
    table.write_text("\n".join(["file,class,split", *rows]))
    source = Music(str(table), root=str(songs))
    assert [len(names(source, split)) for split in SPLITS] == [14, 2, 4]
    assert list(source.label_names("class")) == ["a", "b"]
    archive = shutil.make_archive(str(tmp_path / "songs"), "zip", songs)
    assert names(Music(str(table), root=archive), "test") == names(source, "test")


def test_a_table_cannot_lead_out_of_its_folder(songs, tmp_path):
    (songs / "table.csv").write_text("file\nreels/0.mid\n../../etc/passwd.mid\n")
    with pytest.raises(DataError, match="leads out of"):
        Music(str(songs / "table.csv")).split("train")


def test_repeated_pieces_are_left_out_with_a_warning(songs):
    first = songs / "jigs" / "1.mid"
    shutil.copy(first, songs / "reels" / "copy.mid")
    source = Music(str(songs))
    with pytest.warns(UserWarning, match=r"1 pieces repeat .*copy\.mid"):
        source.split("train")
    assert "reels/copy.mid" not in set().union(*(names(source, split) for split in SPLITS))


def test_the_hash_of_a_piece_does_not_depend_on_resolution_or_silence_in_front():
    notes = piece(20)
    from dataclasses import replace

    moved = replace(notes, start=2 * notes.start + 960, end=2 * notes.end + 960, ticks_per_quarter=960)
    assert content_hash(moved) == content_hash(notes)
    assert content_hash(replace(notes, pitch=notes.pitch + 1)) != content_hash(notes)


def test_a_metre_can_be_set_for_files_whose_own_is_wrong(songs):
    source = Music(str(songs), time_signature="3/4")
    assert source.split("train")[0].modalities["midi"].signatures.tolist() == [[0, 3, 4]]
    with pytest.raises(ConfigError, match="4/4"):
        Music(str(songs), time_signature="common")


class TestDamage:
    def broken(self, songs: Path) -> Path:
        for number, content in enumerate((b"", b"no music", b"MThd and no more")):
            (songs / "jigs" / f"broken{number}.mid").write_bytes(content)
        return songs

    def test_files_that_cannot_be_read_are_listed_and_the_rest_is_used(self, songs):
        source = Music(str(self.broken(songs)))
        skipped, used = [], 0
        for split in SPLITS:
            part = {"midi": source.split(split)}
            dataset = BatchDataset(part, {"midi": MidiProcessor()}, training=False)
            batch = dataset[[Key("midi", index, 0) for index in range(len(part["midi"]))]]
            skipped += [Path(record["sample"]).name for record in batch.skipped]
            used += len(batch)
        assert sorted(skipped) == ["broken0.mid", "broken1.mid", "broken2.mid"]
        assert used == 40

    def test_damaged_members_of_a_zip_file_are_listed_too(self, songs, tmp_path):
        archive = shutil.make_archive(str(tmp_path / "songs"), "zip", songs)
        content = bytearray(Path(archive).read_bytes())
        with zipfile.ZipFile(archive) as opened:
            member = opened.getinfo("jigs/1.mid")
        at = member.header_offset + 60
        content[at : at + 20] = bytes(20)
        Path(archive).write_bytes(content)
        errors = []
        source = Music(archive)
        for split in SPLITS:
            examples = source.split(split)
            for index in range(len(examples)):
                try:
                    examples[index]
                except SampleError as error:
                    errors.append(error.sample)
        assert errors == ["jigs/1.mid"]

    @pytest.mark.parametrize("make", ["empty folder", "only broken", "absent", "not a zip"])
    def test_data_without_any_piece_stop_with_the_reason(self, make, tmp_path):
        place = tmp_path / "data"
        if make in ("empty folder", "only broken"):
            place.mkdir()
        if make == "only broken":
            (place / "a.mid").write_bytes(b"no music")
        if make == "not a zip":
            place.write_bytes(b"not a zip")
        reason = {
            "empty folder": "no MIDI file", "only broken": r"a\.mid: is not a MIDI file", "absent": "does not exist",
            "not a zip": "no zip file",
        }[make]  # fmt: skip
        with pytest.raises(DataError, match=reason):
            Music(str(place)).split("train")


class TestCorpus:
    def test_pieces_survive_the_cache(self, tmp_path):
        made = [CorpusPiece(f"p{n}", "Bach chorale", f"w{n}", piece(10 + n, n).with_signature(3, 4)) for n in range(3)]
        buffer = io.BytesIO()
        save_pieces(buffer, made, [{"sample": "x", "problem": "y", "expected": "z"}])
        (tmp_path / "cache.npz").write_bytes(buffer.getvalue())
        back, skipped = load_pieces(tmp_path / "cache.npz")
        assert [(p.name, p.style, p.work) for p in back] == [(p.name, p.style, p.work) for p in made]
        assert all(content_hash(a.notes) == content_hash(b.notes) for a, b in zip(back, made, strict=True))
        assert back[2].notes.signatures.tolist() == [[0, 3, 4]]
        assert skipped[0]["sample"] == "x"

    def test_a_stream_becomes_notes_with_ties_joined_and_grace_notes_left_out(self):
        music21 = pytest.importorskip("music21")
        score = music21.converter.parse("tinynotation: 3/4 c4~ c8 d8 e4 f4")
        grace = music21.note.Note("g5").getGrace()
        score.flatten().insert(0, grace)
        notes = from_music21(score)
        assert notes.pitch.tolist() == [60, 62, 64, 65]
        assert (notes.start / 480).tolist() == [0, 1.5, 2, 3]
        assert (notes.end / 480).tolist() == [1.5, 2, 3, 4]
        assert notes.signatures.tolist() == [[0, 3, 4]]

    def test_the_default_data_are_converted_once_and_keep_works_together(self, monkeypatch, tmp_path):
        monkeypatch.setenv("MMPT_CACHE", str(tmp_path))
        source = Music(corpus=Corpus(6, ["Bach chorale", "German folk song"]))
        assert list(source.label_names("class")) == ["Bach chorale", "German folk song"]
        assert sum(len(names(source, split)) for split in SPLITS) == 12
        assert list(source.label_names("part")) == ["upper voice", "other voices"]
        monkeypatch.setattr(Corpus, "_convert", lambda self: pytest.fail("converted twice"))
        again = Music(corpus=Corpus(6, ["Bach chorale", "German folk song"]))
        assert [names(again, split) for split in SPLITS] == [names(source, split) for split in SPLITS]
        assert midi_corpus._work("palestrina/Kyrie_12.krn") == midi_corpus._work("palestrina/Agnus_II_12.krn")
        assert midi_corpus._work("palestrina/Kyrie_12.krn") == midi_corpus._work("palestrina/Credo_12_i.krn")
        assert midi_corpus._work("palestrina/Kyrie_12.krn") != midi_corpus._work("palestrina/Kyrie_2.krn")

    def test_unknown_styles_are_refused(self):
        with pytest.raises(ConfigError, match="polka"):
            Corpus(styles=["polka"])


def test_configuration_rebuilds_the_source(songs):
    source = Music(str(songs), length=20, parts=["A", "B"], corpus=Corpus(3))
    again = from_config(to_config(source))
    assert names(again, "test") == names(source, "test")
    assert again.parts == ["A", "B"]
    assert isinstance(MultimodalData({"midi": source}), MultimodalData)
