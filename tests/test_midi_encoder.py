"""The encoder of symbolic music: processing, hiding, losses, labels, published sizes, infilling."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from midi_pieces import WORKED, piece, write_piece

from mmpt.encoder import IGNORED, KEEP, MASK, RANDOM, Corruption
from mmpt.encoders.midi import MidiEncoder, MidiProcessor, released_label_ids, weighted_loss
from mmpt.encoders.midi_infilling import bar_of, infill, infill_bar
from mmpt.encoders.midi_notes import DRUMS, JoinedNotes, from_array
from mmpt.encoders.midi_tokens import CompoundWords, Octuple
from mmpt.errors import ConfigError, DataError, SampleError
from mmpt.masking import Exact
from mmpt.text import TruncationWarning


def encoder(tokenizer=None, **options) -> MidiEncoder:
    torch.manual_seed(0)
    settings = {"width": 32, "depth": 1, "heads": 2, "field_width": 8, "max_length": 64, "norm": "pre", "dropout": 0.0}
    return MidiEncoder(tokenizer or Octuple(), **{**settings, **options}).eval()


class TestProcessor:
    def test_words_end_with_the_end_word_where_the_encoding_has_one(self):
        inputs = MidiProcessor(Octuple())([WORKED, WORKED[:1]])
        assert inputs["words"].shape == (2, 4, 8)
        assert inputs["words"][0, 3].tolist() == Octuple().end.tolist()
        assert inputs["words"][1, 2:].tolist() == [Octuple().pad.tolist()] * 2
        assert inputs["mask"].tolist() == [[True] * 4, [True, True, False, False]]
        assert MidiProcessor(CompoundWords())([WORKED])["words"].shape == (1, 3, 4)

    def test_long_pieces_lose_their_end_with_a_warning(self):
        with pytest.warns(TruncationWarning, match="lose their end"):
            inputs = MidiProcessor(Octuple(), max_length=10)([piece(40)])
        assert inputs["words"].shape == (1, 10, 8)
        assert inputs["words"][0, 9].tolist() == Octuple().end.tolist()

    def test_paths_scores_bytes_and_arrays_give_the_same_words(self, tmp_path):
        notes = piece(20)
        path = write_piece(tmp_path / "a.mid", 20)
        rows = np.stack([notes.start / 480, notes.end / 480, notes.pitch, notes.velocity], 1)
        words = MidiProcessor()([notes, path, str(path), path.read_bytes(), notes.score(), rows])["words"]
        assert all(torch.equal(row, words[0]) for row in words)

    def test_labels_of_notes_are_ignored_where_there_is_no_note(self):
        inputs = MidiProcessor()([WORKED, WORKED[:1]])
        assert inputs["label/velocity"].tolist() == [[3, 4, 5, IGNORED], [3, IGNORED, IGNORED, IGNORED]]

    def test_labels_follow_the_order_of_the_words(self):
        notes = piece(30)
        labelled = replace(notes, labels={"high": (notes.pitch > 65).astype(np.int64)})
        for tokenizer, place, low in ((Octuple(), 3, 0), (CompoundWords(), 2, 22)):
            inputs = MidiProcessor(tokenizer)([labelled])
            high = inputs["words"][0, :30, place] + low > 65
            assert torch.equal(inputs["label/high"][0, :30], high.long())

    def test_transposition_shifts_all_notes_but_drums_and_only_in_training(self):
        processor = MidiProcessor(transpose=True)
        song = [(0, 1, 60, 64, 0), (1, 2, 64, 64, 0), (1, 2, 38, 64, DRUMS)]
        clean = processor([song])["words"]
        torch.manual_seed(0)
        shifts = set()
        for _ in range(60):
            shifted = processor([song], training=True)["words"]
            difference = shifted[0, :3, 3] - clean[0, :3, 3]
            assert difference[0] == difference[1]
            assert difference[2] == 0
            shifts.add(int(difference[0]))
            assert torch.equal(shifted[..., [0, 1, 2, 4, 5, 6, 7]], clean[..., [0, 1, 2, 4, 5, 6, 7]])
        assert min(shifts) == -11
        assert max(shifts) == 11
        assert torch.equal(processor([song])["words"], clean)

    def test_drums_alone_are_refused_where_the_encoding_has_none_and_read_where_it_has(self):
        drums = [(0, 1, 38, 90, DRUMS), (1, 2, 42, 90, DRUMS)]
        with pytest.raises(SampleError, match="none of its 2 notes"):
            MidiProcessor(CompoundWords())([drums])
        assert MidiProcessor(Octuple(), transpose=True)([drums], training=True)["words"].shape == (1, 3, 8)

    def test_a_piece_without_a_note_in_the_vocabulary_is_refused(self):
        with pytest.raises(SampleError, match="none of its 1 notes") as error:
            MidiProcessor(CompoundWords("drop"))([WORKED, [(0, 1, 3)]])
        assert error.value.index == 1

    def test_joined_pieces_stand_end_to_end_and_only_whole_ones_are_ended(self):
        octuple = Octuple()
        joined = JoinedNotes((from_array(WORKED), from_array(WORKED[:2])), (True, False))
        inputs = MidiProcessor(octuple)([joined])
        words = octuple.encode(from_array(WORKED)).words.tolist()
        assert inputs["words"][0].tolist() == [*words, octuple.end.tolist(), *words[:2]]
        assert inputs["label/velocity"].tolist() == [[3, 4, 5, IGNORED, 3, 4]]
        assert MidiProcessor(CompoundWords())([joined])["words"].shape == (1, 5, 4)

    def test_parts_without_notes_of_the_encoding_are_passed_over(self):
        drums, piano = from_array([(0, 1, 38, 90, DRUMS)]), from_array(WORKED)
        processor = MidiProcessor(CompoundWords())
        for parts in ((drums, piano), (piano, drums)):
            assert processor([JoinedNotes(parts, (True, True))])["words"].shape == (1, 3, 4)
        with pytest.raises(SampleError, match="none of its 1 notes"):
            processor([JoinedNotes((drums, drums), (True, True))])

    def test_labels_can_be_numbered_as_in_the_released_codes(self):
        # MidiBERT: velocity bins 1..6 and 0 for padding; Octuple: classes from 0 and the extra one last
        for tokenizer, expected in (
            (CompoundWords(), [[4, 5, 6], [4, 0, 0]]),
            (Octuple(), [[3, 4, 5, 6], [3, 6, 6, 6]]),
        ):
            inputs = MidiProcessor(tokenizer, released_labels={"velocity": 6})([WORKED, WORKED[:1]])
            assert inputs["label/velocity"].tolist() == expected
        melody = torch.tensor([0, 1, 2, IGNORED])
        assert released_label_ids(melody, 3, CompoundWords()).tolist() == [1, 2, 3, 0]
        assert released_label_ids(melody, 3, Octuple()).tolist() == [0, 1, 2, 3]
        with pytest.raises(ConfigError, match="have velocity"):
            MidiProcessor(released_labels={"part": 3})([WORKED])


class TestEncoder:
    def test_sizes_are_the_published_ones(self):
        # BERT-base's layers without position vectors, whose place the distance vectors of each layer take
        layer = 4 * (768 * 768 + 768) + 2 * 768 * 3072 + 3072 + 768 + 2 * 2 * 768
        for tokenizer, length, fields, total in ((CompoundWords(), 512, 4, 176), (Octuple(), 1024, 8, 1280)):
            with torch.device("meta"):
                model = MidiEncoder(tokenizer, max_length=length)
            expected = (
                12 * (layer + (2 * length - 1) * 64)
                + total * 256  # field embeddings
                + (fields * 256 + 1) * 768  # input layer
                + 2 * 768  # its norm
                + (768 + 1) * total  # output layers of the fields
            )
            assert sum(p.numel() for p in model.parameters()) == expected

    def test_hidden_notes_become_the_mask_word_and_random_ones_ordinary_words(self):
        model = encoder()
        inputs = model.processor([piece(60)])
        action = torch.zeros(1, 61, dtype=torch.uint8)
        action[0, :20], action[0, 20:60] = MASK, RANDOM
        words = model._corrupt(inputs["words"], action.unsqueeze(-1))
        assert words[0, :20].tolist() == [Octuple().mask.tolist()] * 20
        assert (words[0, 20:60] < torch.from_numpy(Octuple().pad)).all()
        assert torch.equal(words[0, 60], inputs["words"][0, 60])
        changed = (words[0, 20:60] != inputs["words"][0, 20:60]).float().mean(0)
        assert (changed > 0.5).all()  # each field by itself

    def test_random_values_reach_every_ordinary_value_and_no_special_one(self):
        model = encoder(CompoundWords())
        words = torch.zeros(4, 3000, 4, dtype=torch.long)
        drawn = model._corrupt(words, torch.full((4, 3000, 1), RANDOM)).flatten(0, 1)
        assert drawn.amax(0).tolist() == [1, 15, 85, 63]
        assert drawn.amin(0).tolist() == [0, 0, 0, 0]

    def test_the_end_word_is_never_a_unit(self):
        model = encoder()
        inputs = model.processor([WORKED, WORKED[:1]])
        assert model.units(inputs).tolist() == [[True] * 3 + [False], [True] + [False] * 3]

    def test_fields_share_the_loss_by_vocabulary(self):
        shares = encoder(CompoundWords()).field_shares
        assert float(weighted_loss(torch.tensor([0.1, 0.2, 0.3, 0.4]), shares)) == pytest.approx(0.322727, abs=1e-6)
        assert encoder(Octuple(), loss_weights="equal").field_shares == [1 / 8] * 8

    def test_loss_is_the_mean_cross_entropy_of_each_field(self):
        model = encoder(CompoundWords())
        inputs = model.processor([piece(20), piece(12, 1)])
        corruption = Exact(0.3)(model.units(inputs), generator=torch.Generator().manual_seed(0))
        logits = model.reconstruct(model(inputs, corruption), corruption)
        part = model.reconstruction_loss(logits, inputs, corruption)
        expected, begin = 0.0, 0
        for place, size in enumerate([4, 18, 88, 66]):
            target = inputs["words"][..., place][corruption.predicted]
            field = logits[:, begin : begin + size]
            loss = -field.log_softmax(1)[torch.arange(len(target)), target].mean()
            name = model.tokenizer.fields[place].name
            assert float(part.logs[f"nll_{name}"]) == pytest.approx(float(loss.detach()), abs=1e-5)
            assert float(part.logs[f"accuracy_{name}"]) == pytest.approx(
                float((field.argmax(1) == target).float().mean())
            )
            expected += size / 176 * float(loss.detach())
            begin += size
        assert float(part.loss.detach()) == pytest.approx(expected, abs=1e-5)
        found = model.unit_losses(logits, inputs, corruption)
        assert found.losses.shape == found.correct.shape == (int(corruption.predicted.sum()), 4)
        assert float(weighted_loss(found.losses.detach().mean(0), model.field_shares)) == pytest.approx(
            expected, abs=1e-5
        )

    def test_exactly_77_of_512_notes_are_masked_as_midibert_does(self):
        action = Exact()(torch.ones(1, 512, dtype=torch.bool)).action
        predicted = Exact()(torch.ones(1, 1024, dtype=torch.bool))
        assert (int((action == MASK).sum()), int((action == RANDOM).sum())) == (62, 8)
        counts = [int((predicted.action == kind).sum()) for kind in (MASK, RANDOM)]
        kept = int((predicted.predicted & (predicted.action == KEEP)).sum())
        assert [*counts, kept] == [123, 15, 16]


class TestNoteLabels:
    def test_the_velocity_field_cannot_give_the_velocity_label_away(self):
        model = encoder()
        loud = from_array([(s, e, p, 120) for s, e, p, _ in WORKED])
        quiet = from_array([(s, e, p, 20) for s, e, p, _ in WORKED])
        seen, labels = zip(*(model.unit_labels(model.processor([x]), "velocity") for x in (loud, quiet)), strict=True)
        assert torch.equal(seen[0]["words"], seen[1]["words"])
        assert seen[0]["words"][0, :3, 5].tolist() == [33] * 3
        assert seen[0]["words"][0, 3, 5] == 35
        assert labels[0].tolist() == [[5, 5, 5, IGNORED]]
        assert labels[1].tolist() == [[0, 0, 0, IGNORED]]

    def test_the_instrument_cannot_give_the_part_away(self):
        model = encoder()
        rows = [(0, 1, 60, 64, 0), (0, 1, 72, 64, 40), (1, 2, 60, 64, 24)]
        notes = replace(from_array(rows), labels={"part": np.array([0, 1, 1])})
        seen, labels = model.unit_labels(model.processor([notes]), "part")
        assert seen["words"][0, :3, 2].tolist() == [0, 0, 0]
        assert seen["words"][0, 3].tolist() == Octuple().end.tolist()
        assert sorted(labels[0].tolist()) == [IGNORED, 0, 1, 1]
        assert encoder(CompoundWords()).unit_labels(MidiProcessor(CompoundWords())([notes]), "part")[1].shape == (1, 3)

    def test_inputs_are_not_changed_in_place(self):
        model = encoder()
        inputs = model.processor([WORKED])
        before = inputs["words"].clone()
        model.unit_labels(inputs, "velocity")
        assert torch.equal(inputs["words"], before)

    def test_an_unknown_label_is_refused_with_the_known_ones(self):
        model = encoder()
        with pytest.raises(ConfigError, match="have velocity"):
            model.unit_labels(model.processor([WORKED]), "fingering")


class TestInfilling:
    @pytest.mark.parametrize("tokenizer", [Octuple(), CompoundWords()], ids=["octuple", "cp"])
    def test_only_the_hidden_bar_is_written_anew(self, tokenizer):
        model = encoder(tokenizer)
        notes = piece(40)
        words = tokenizer.encode(notes).words
        bar = int(bar_of(words, model)[20])
        original, context, written = infill_bar(model, notes, bar)
        count = int((bar_of(words, model) == bar).sum())
        assert len(original) == len(written) == 40
        assert len(context) == 40 - count

    def test_known_fields_stay_and_all_values_are_ordinary(self):
        model = encoder()
        words = Octuple().encode(piece(30)).words
        hidden = np.arange(30) % 5 == 0
        written = infill(model, words, hidden)
        assert np.array_equal(written[~hidden], words[~hidden])
        assert np.array_equal(written[hidden][:, [0, 2, 6, 7]], words[hidden][:, [0, 2, 6, 7]])
        assert (written < Octuple().pad).all()
        assert (written[hidden] != words[hidden]).any()

    @pytest.mark.parametrize("tokenizer", [Octuple(), CompoundWords()], ids=["octuple", "cp"])
    def test_notes_stay_in_order_and_within_their_bar(self, tokenizer):
        model = encoder(tokenizer)
        words = tokenizer.encode(piece(60).with_signature(3, 4)).words
        hidden = np.arange(60) % 5 < 3
        written = infill(model, words, hidden, temperature=2.0)
        place = [tokenizer.field("position"), tokenizer.field("pitch")]
        bars = bar_of(words, model)
        assert np.array_equal(bar_of(written, model), bars)
        steps = list(zip(bars.tolist(), written[:, place[0]].tolist(), strict=True))
        assert all(a <= b for a, b in pairwise(steps))
        assert written[:, place[0]].max() < (48 if tokenizer.ends else 16)

    def test_other_seeds_write_other_notes_and_the_same_one_the_same(self):
        model = encoder()
        words = Octuple().encode(piece(30)).words
        hidden = np.arange(30) % 3 == 0
        first, again, other = (infill(model, words, hidden, seed=seed) for seed in (0, 0, 1))
        assert np.array_equal(first, again)
        assert not np.array_equal(first, other)
        with pytest.raises(ConfigError, match="above 0"):
            infill(model, words, hidden, temperature=0.0)

    def test_what_was_hidden_does_not_matter(self):
        model = encoder()
        words = Octuple().encode(piece(30)).words
        hidden = np.arange(30) % 4 == 1
        other = words.copy()
        other[hidden, 3] = (other[hidden, 3] + 7) % 128
        assert np.array_equal(infill(model, words, hidden), infill(model, other, hidden))

    def test_an_empty_bar_is_refused(self):
        with pytest.raises(DataError, match="no note begins in bar 99"):
            infill_bar(encoder(), from_array(WORKED), 99)


def test_a_corruption_of_everything_leaves_nothing_of_the_piece():
    model = encoder()
    pieces = [piece(20), piece(20, 3)]
    inputs = model.processor(pieces)
    units = model.units(inputs)
    everything = Corruption(torch.where(units, MASK, KEEP).to(torch.uint8), units)
    tokens = model(inputs, everything)
    assert torch.equal(tokens.values[0], tokens.values[1])


def test_unknown_options_are_refused():
    for options in ({"initialization": "xavier"}, {"loss_weights": "rank"}):
        with pytest.raises(ConfigError, match="choose"):
            encoder(**options)


def test_initialization_by_inputs_makes_distances_differ_from_the_start():
    models = {name: encoder(initialization=name) for name in ("bert", "fan_in")}
    spread = {name: model.transformer.layers[0].attention.distance.std() for name, model in models.items()}
    assert spread["bert"] < 0.03 < 0.4 < spread["fan_in"]


def test_tied_fields_are_predicted_by_the_likeness_to_their_values():
    model = encoder(CompoundWords(), tied=True)
    with torch.no_grad():
        model.output_bias.normal_()
    values = torch.randn(5, 32)
    logits = model.field_logits(values)
    begin = 0
    for place, size in enumerate([4, 18, 88, 66]):
        query = values @ model.output.weight[8 * place : 8 * place + 8].T
        expected = query @ model.embedding.weight[begin : begin + size].T + model.output_bias[begin : begin + size]
        torch.testing.assert_close(logits[:, begin : begin + size], expected, atol=1e-5, rtol=0)
        begin += size


def test_neighbouring_values_of_a_field_are_alike_from_the_start_with_fan_in():
    table = encoder(CompoundWords(), initialization="fan_in", tied=True, field_width=16).embedding.weight[22:110]
    pitch = torch.nn.functional.normalize(table[:86], dim=1)
    near, far = (pitch[:-1] * pitch[1:]).sum(1).mean(), (pitch[:-20] * pitch[20:]).sum(1).mean()
    assert near > far + 0.2
    assert float(table[:86].detach().square().sum(1).mean()) == pytest.approx(1.0, abs=1e-3)


def test_a_tied_model_with_narrow_fields_overfits_one_batch():
    torch.manual_seed(0)
    model = encoder(CompoundWords(), initialization="fan_in", tied=True, width=48, heads=4, field_width=16, depth=2)
    inputs = model.processor([piece(40, seed) for seed in range(2)])
    optimizer = torch.optim.Adam(model.parameters(), 4e-3)
    corruption = Exact(0.3, 1.0, 0.0)(model.units(inputs), generator=torch.Generator().manual_seed(0))
    for _ in range(120):
        part = model.reconstruction_loss(model.reconstruct(model(inputs, corruption), corruption), inputs, corruption)
        optimizer.zero_grad()
        part.loss.backward()
        optimizer.step()
    assert float(part.logs["accuracy_pitch"]) > 0.9
