"""What the MIDI recipe is compared with, and its study."""

import numpy as np
import pytest
from midi_pieces import write_piece
from recipe_modules import recipe_modules

from mmpt.datasets.midi import Music
from mmpt.encoders.midi_notes import from_array


@pytest.fixture(scope="module")
def recipe():
    """Modules of the recipe by name."""
    with recipe_modules("midi") as modules:
        yield modules


def test_fields_are_guessed_from_the_note_before(recipe):
    rows = [np.array([[0], [1], [0], [1], [2], [2], [2]])]
    guesses = recipe("baseline").FieldGuesses(rows, [4])
    # after 0 comes 1, after 1 comes 0 or 2 (the first of both), after 2 comes 2; 3 never came up
    assert guesses.after(0, np.array([0, 1, 2, 3])).tolist() == [1, 0, 2, 2]
    assert guesses.most_frequent(0) == 2


def test_the_highest_note_of_each_onset(recipe):
    notes = from_array([(0, 1, 60), (0, 1, 67), (1, 2, 50), (2, 3, 40), (2, 3, 45), (2, 3, 43)])
    top = recipe("baseline").highest_note(notes)
    assert notes.pitch[top].tolist() == [67, 50, 45]


def test_note_features_see_the_chord_and_the_gaps(recipe):
    notes = from_array([(0, 1, 60, 80), (0, 1, 67, 90), (1.5, 2, 50, 70)])
    x = recipe("baseline").note_features(notes, velocity=True)
    assert x[:, 1].tolist() == [0, 1, 0]  # place in the chord
    assert x[:, 3].tolist() == [2, 2, 1]  # its size
    assert x[:, 8].tolist() == [0, 0, 1.5]  # since the onset before
    assert x[:, -1].tolist() == [80, 90, 70]
    assert recipe("baseline").note_features(notes, velocity=False).shape == (3, 12)


def test_pieces_are_classified_by_all_of_their_excerpts(recipe):
    scores = np.array([[0.9, 0.1], [0.4, 0.6], [0.3, 0.7], [0.6, 0.4]])
    labels, pieces = np.array([0, 0, 1, 1]), np.array([7, 7, 9, 9])
    found = recipe("evaluation").classification_scores(scores, labels, pieces, "")
    assert found["class/accuracy"] == 1.0
    assert found["class/accuracy_of_excerpts"] == 0.5


def test_new_notes_are_those_that_the_context_lacks(recipe):
    context = from_array([(0, 1, 60), (1, 2, 62)])
    written = from_array([(0, 1, 60), (1, 2, 64), (2, 3, 62), (1, 2, 62)])
    new = recipe("rolls").new_notes(written, context)
    assert sorted(zip(new.start.tolist(), new.pitch.tolist(), strict=True)) == [(480, 64), (960, 62)]


def test_few_labels_are_some_pieces_of_each_class_and_others_for_each_seed(recipe, tmp_path):
    for number in range(60):
        write_piece(tmp_path / ("jigs" if number % 3 else "reels") / f"{number}.mid", 30, number)
    source = Music(str(tmp_path), length=12, shortest=1)
    few = [recipe("study").FewLabels(source, 2, seed) for seed in (0, 0, 1)]
    drawn = []
    for part in few:
        samples = [part.split("train")[i] for i in range(len(part.split("train")))]
        pieces = {s.name.split(" [")[0] for s in samples}
        assert sorted(name.split("/")[0] for name in pieces) == ["jigs", "jigs", "reels", "reels"]
        assert len(samples) == 3 * len(pieces)  # whole pieces
        drawn.append(pieces)
    assert drawn[0] == drawn[1] != drawn[2]
    train = {source.split("train")[i].name.split(" [")[0] for i in range(len(source.split("train")))}
    assert set().union(*drawn) <= train
    assert len(few[0].split("test")) == len(source.split("test"))
