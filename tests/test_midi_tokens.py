"""Notes and their encodings against numbers worked by hand, and back."""

import numpy as np
import pytest
import symusic
from midi_pieces import WORKED, header, piece, track

from mmpt.encoders.midi_notes import DRUMS, Notes, from_array, read_notes
from mmpt.encoders.midi_tokens import (
    CompoundWords,
    Octuple,
    duration_code,
    duration_steps,
    reduced_signature,
    signature_code,
    signature_of,
    tempo_code,
    tempo_of,
    transposition_range,
    velocity_class,
)
from mmpt.errors import SampleError


def content(notes: Notes) -> set[tuple[int, int, int]]:
    return set(zip(notes.start.tolist(), notes.end.tolist(), notes.pitch.tolist(), strict=True))


class TestCompoundWords:
    def test_worked_example(self):
        words = CompoundWords().encode(from_array(WORKED)).words
        assert words.tolist() == [[0, 0, 38, 7], [1, 4, 42, 3], [0, 0, 45, 31]]

    def test_released_grid_ends_before_the_last_onset(self):
        words = CompoundWords(released_grid=True).encode(from_array(WORKED)).words
        assert words.tolist() == [[0, 0, 38, 7], [1, 4, 42, 3], [1, 15, 45, 31]]
        assert len(CompoundWords(released_grid=True).encode(from_array([(0, 1, 60)])).words) == 1

    @pytest.mark.parametrize(("tick", "position"), [(60, 0), (61, 1), (180, 1), (181, 2), (1859, 15)])
    def test_onsets_go_to_the_nearest_sixteenth_and_ties_to_the_earlier_one(self, tick, position):
        assert CompoundWords().encode(from_array([(tick / 480, tick / 480 + 1, 60)])).words[0, 1] == position

    @pytest.mark.parametrize(("ticks", "code"), [(1, 0), (60, 0), (90, 0), (91, 1), (3840, 63), (9999, 63)])
    def test_durations_go_to_the_nearest_of_sixty_four(self, ticks, code):
        assert CompoundWords().encode(from_array([(0, ticks / 480, 60)])).words[0, 3] == code

    def test_any_resolution_gives_the_same_words(self):
        notes = from_array(WORKED)
        fine = Notes(
            notes.start * 2, notes.end * 2, notes.pitch, notes.velocity, notes.program, notes.track, 960
        )  # fmt: skip
        assert np.array_equal(CompoundWords().encode(fine).words, CompoundWords().encode(notes).words)

    def test_pitches_outside_are_folded_by_octaves_or_dropped_and_counted(self):
        notes = from_array([(0, 1, 9), (1, 2, 60), (2, 3, 108), (3, 4, 127)])
        folded = CompoundWords().encode(notes)
        assert (folded.words[:, 2] + 22).tolist() == [33, 60, 96, 103]
        assert (folded.folded, folded.dropped) == (3, 0)
        dropped = CompoundWords("drop").encode(notes)
        assert (dropped.words[:, 2] + 22).tolist() == [60]
        assert (dropped.folded, dropped.dropped) == (0, 3)
        assert dropped.notes.tolist() == [1]

    def test_drums_are_left_out_and_counted(self):
        encoded = CompoundWords().encode(from_array([(0, 1, 38, 90, DRUMS), (0, 1, 60, 90, 0), (1, 2, 9, 90, 0)]))
        assert (encoded.words[:, 2] + 22).tolist() == [60, 33]
        assert (encoded.notes.tolist(), encoded.folded, encoded.dropped) == ([1, 2], 1, 1)

    def test_round_trip_on_the_grid(self):
        notes = piece(60)
        back = CompoundWords().decode(CompoundWords().encode(notes).words)
        full = {bar for bar in range(40) if ((notes.start // 1920) == bar).any()}
        assert full == set(range(max(full) + 1))  # no bar without notes, which would be closed
        assert content(back) == content(notes)


class TestOctuple:
    def test_worked_example(self):
        words = Octuple().encode(from_array(WORKED)).words
        assert words.tolist() == [
            [0, 0, 0, 60, 16, 16, 9, 35],
            [0, 16, 0, 64, 8, 20, 9, 35],
            [1, 0, 0, 67, 36, 25, 9, 35],
        ]

    def test_special_words(self):
        octuple = Octuple()
        assert octuple.pad.tolist() == [256, 128, 129, 256, 128, 32, 254, 49]
        assert octuple.mask.tolist() == [257, 129, 130, 257, 129, 33, 255, 50]
        assert (octuple.end - octuple.pad == 3).all()
        assert [field.size for field in octuple.fields] == [262, 134, 135, 262, 134, 38, 260, 55]
        assert CompoundWords().pad.tolist() == [2, 16, 86, 64]

    def test_durations(self):
        pairs = {15: (15, 15), 17: (16, 16), 18: (17, 18), 31: (23, 30), 48: (32, 48), 51: (32, 48), 64: (36, 64)}
        pairs |= {112: (48, 112), 4079: (127, 3952), 4080: (127, 3952), 10**9: (127, 3952), 0: (0, 0)}
        steps = np.array(list(pairs))
        assert duration_code(steps).tolist() == [code for code, _ in pairs.values()]
        assert duration_steps(duration_code(steps)).tolist() == [decoded for _, decoded in pairs.values()]

    def test_every_duration_code_comes_back(self):
        assert duration_code(duration_steps(np.arange(128))).tolist() == list(range(128))

    def test_tempos(self):
        assert tempo_code([16, 60, 90, 100, 120, 256, 1, 999]).tolist() == [0, 23, 30, 32, 35, 48, 0, 48]
        assert tempo_code(tempo_of(np.arange(49))).tolist() == list(range(49))

    def test_time_signatures(self):
        codes = {(1, 1): 0, (2, 4): 7, (3, 4): 8, (4, 4): 9, (5, 4): 10, (6, 8): 19, (12, 8): 25}
        assert {pair: signature_code(*pair) for pair in codes} == codes
        assert [signature_code(*signature_of(code)) for code in range(254)] == list(range(254))

    @pytest.mark.parametrize(("given", "read"), [((12, 4), (6, 4)), ((5, 2), (1, 2)), ((9, 4), (3, 4))])
    def test_long_bars_are_divided_with_a_warning(self, given, read):
        with pytest.warns(UserWarning, match="is read as"):
            assert reduced_signature(*given) == read

    def test_unknown_denominators_are_refused(self):
        with pytest.raises(SampleError, match="time signature 4/3"):
            reduced_signature(4, 3)

    def test_bars_follow_changes_of_the_metre(self):
        notes = from_array([(beat, beat + 1, 60) for beat in range(10)])
        waltz = Notes(
            notes.start, notes.end, notes.pitch, notes.velocity, notes.program, notes.track, 480,
            signatures=np.array([[0, 3, 4], [6 * 480, 2, 4]]),
        )  # fmt: skip
        words = Octuple().encode(waltz).words
        assert words[:, 0].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 3, 3]
        assert words[:, 1].tolist() == [0, 16, 32, 0, 16, 32, 0, 16, 0, 16]
        assert words[:, 6].tolist() == [8] * 6 + [7] * 4
        back = Octuple().decode(words)
        assert content(back) == {(16 * beat, 16 * beat + 16, 60) for beat in range(10)}
        assert back.signatures.tolist() == [[0, 3, 4], [96, 2, 4]]

    def test_tempo_changes_reach_the_notes_after_them(self):
        notes = from_array([(beat, beat + 1, 60) for beat in range(4)])
        changing = Notes(
            notes.start, notes.end, notes.pitch, notes.velocity, notes.program, notes.track, 480,
            np.array([[0.0, 60.0], [960.0, 90.0]]),
        )  # fmt: skip
        assert Octuple().encode(changing).words[:, 7].tolist() == [23, 23, 30, 30]

    def test_drums_stay_within_the_vocabulary_and_come_back(self):
        notes = from_array([(0, 1, 38, 90, DRUMS), (0, 1, 60, 90, 5)])
        words = Octuple().encode(notes).words
        assert words[:, 2:4].tolist() == [[5, 60], [128, 128 + 38]]
        assert (words < Octuple().pad).all()
        back = Octuple().decode(words)
        assert sorted(zip(back.program.tolist(), back.pitch.tolist(), strict=True)) == [(5, 60), (DRUMS, 38)]

    def test_pieces_of_more_than_256_bars_begin_again_and_come_back(self):
        notes = from_array([(4 * bar, 4 * bar + 1, 60) for bar in range(300)])
        words = Octuple().encode(notes).words
        assert words[:, 0].tolist() == [*range(256), *range(44)]
        assert content(Octuple().decode(words)) == {(64 * bar, 64 * bar + 16, 60) for bar in range(300)}

    def test_round_trip_within_the_grid(self):
        notes = piece(80)
        back = Octuple().decode(Octuple().encode(notes).words)
        scaled = {(s * 16 // 480, p) for s, p in zip(notes.start.tolist(), notes.pitch.tolist(), strict=True)}
        assert {(s, p) for s, _, p in content(back)} == scaled
        again = Octuple().encode(back).words
        assert np.array_equal(again, Octuple().encode(notes).words)

    def test_words_with_special_values_are_left_out_of_the_notes(self):
        octuple = Octuple()
        words = octuple.encode(from_array(WORKED)).words
        padded = np.concatenate([words, octuple.end[None], octuple.pad[None], octuple.mask[None]])
        assert content(octuple.decode(padded)) == content(octuple.decode(words))
        assert len(octuple.decode(octuple.pad[None])) == 0


class TestNotes:
    def test_order_does_not_depend_on_the_order_of_tracks(self):
        def score(first: int, second: int) -> symusic.Score:
            score = symusic.Score(480)
            for pitch in (first, second):
                part = symusic.Track()
                part.notes.append(symusic.Note(0, 480, pitch, 64))
                score.tracks.append(part)
            return score

        for tokenizer in (CompoundWords(), Octuple()):
            one, other = (tokenizer.encode(read_notes(score(*order))).words for order in ((60, 64), (64, 60)))
            assert np.array_equal(one, other)

    def test_a_written_file_is_read_back(self, tmp_path):
        notes = piece(30)
        notes.write(tmp_path / "a.mid")
        back = read_notes(tmp_path / "a.mid")
        assert content(back) == content(notes)
        assert back.velocity.tolist() == notes.velocity.tolist()

    def test_parts_are_labelled_by_the_names_of_their_tracks(self):
        score = symusic.Score(480)
        for name, pitch in (("PIANO", 50), ("Melody", 70), ("", 60)):
            part = symusic.Track(name)
            part.notes.append(symusic.Note(0, 480, pitch, 64))
            score.tracks.append(part)
        notes = read_notes(score, ["MELODY", "PIANO"])
        assert dict(zip(notes.pitch.tolist(), notes.labels["part"].tolist(), strict=True)) == {50: 1, 60: -1, 70: 0}

    def test_an_excerpt_begins_with_the_bar_of_its_first_note_and_keeps_the_metre(self):
        notes = from_array([(beat, beat + 1, 60 + beat) for beat in range(12)]).with_signature(3, 4)
        part = notes.excerpt(7, 10)
        assert part.start.tolist() == [480, 960, 1440]
        assert part.signatures.tolist() == [[0, 3, 4]]
        assert Octuple().encode(part).words[:, :2].tolist() == [[0, 16], [0, 32], [1, 0]]

    def test_an_excerpt_behind_a_change_of_metre_begins_with_a_bar_of_the_new_one(self):
        notes = from_array([(beat, beat + 1, 60) for beat in range(12)])
        changing = Notes(
            notes.start, notes.end, notes.pitch, notes.velocity, notes.program, notes.track, 480,
            signatures=np.array([[0, 4, 4], [4 * 480, 3, 4]]),
        )  # fmt: skip
        whole, part = Octuple().encode(changing).words, Octuple().encode(changing.excerpt(8, 12)).words
        assert part[:, 1].tolist() == whole[8:, 1].tolist() == [16, 32, 0, 16]
        assert part[0, 0] == 0

    @pytest.mark.parametrize(
        ("content", "problem"),
        [
            (b"", "is empty"),
            (b"RIFF and something else", "is not a MIDI file"),
            (header(), "can't be parsed|has no notes"),
            (header(division=0xE728) + track(b""), "can't be parsed"),
            (header(division=0) + track(b"\x00\x90\x3c\x40\x60\x80\x3c\x00"), "."),
            (header() + track(b""), "has no notes"),
            (header() + b"MTrk\x00\xff\xff\xff\x00\x90", "can't be parsed"),
            (header(tracks=9) + track(b"\x00\x90\x3c\x40"), "."),
        ],
    )
    def test_damaged_files_are_named_and_not_fatal(self, content, problem, tmp_path):
        path = tmp_path / "broken.mid"
        path.write_bytes(content)
        with pytest.raises(SampleError, match=problem) as error:
            read_notes(path)
        assert str(path) == error.value.sample

    def test_hanging_notes_do_not_harm_the_others(self):
        events = b"\x00\x90\x3c\x40" + b"\x00\x90\x40\x40" + b"\x83\x60\x80\x40\x00"
        notes = read_notes(header() + track(events))
        assert 64 in notes.pitch
        assert (notes.end > notes.start).all()

    def test_ten_hours_are_read_and_encoded(self):
        notes = from_array([(60.0 * number, 60.0 * number + 50, 60) for number in range(1200)])
        assert notes.quarters > 10 * 60 * 60 * 1.9
        for tokenizer in (Octuple(), CompoundWords()):
            words = tokenizer.encode(notes).words
            assert (words < tokenizer.pad).all()
            assert (words >= 0).all()

    @pytest.mark.parametrize(
        "rows", [[], [1, 2, 3], [(0, 1, 128)], [(1, 0, 60)], [(0, float("nan"), 60)], [(0, 1, 60, 0)], "notes.txt", 7]
    )
    def test_what_is_no_piece_is_refused(self, rows):
        with pytest.raises(SampleError):
            read_notes(rows)


def test_velocity_classes_are_those_of_midibert_less_one():
    assert velocity_class([64, 80, 100]).tolist() == [3, 4, 5]
    assert velocity_class([1, 31, 32, 47, 48, 63, 79, 95, 96, 127]).tolist() == [0, 0, 1, 1, 2, 2, 3, 4, 5, 5]


def test_transpositions_keep_to_the_keyboard():
    assert transposition_range([5, 60, 120]) == (-5, 7)
    assert transposition_range([60, 72]) == (-11, 11)
