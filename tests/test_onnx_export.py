"""Towers as ONNX files give what the model gives, for batches of other sizes and lengths than the example."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from contracts import cases
from PIL import Image
from points import TEXTS, make_model
from shapes import PointsSource

from mmpt.encoders.image_chart import ChartEncoder
from mmpt.finetuning import FineTuning
from mmpt.model import TEXT, Modality, MultimodalModel
from mmpt.onnx_export import export_tower, export_tuned

ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.mark.parametrize("modality", ["points", TEXT])
def test_onnxruntime_gives_the_embeddings_of_the_model(modality, tmp_path):
    torch.manual_seed(0)
    model = make_model(batch_norm=True).eval()
    samples = {
        "points": [s.modalities["points"] for s in PointsSource().split("test")],
        TEXT: [*TEXTS, "a a a a spiral"],
    }
    all_samples = samples[modality]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = export_tower(model, modality, model.process(modality, all_samples[:3]), tmp_path / "tower.onnx")
    session = ort.InferenceSession(str(path))
    for chosen in (all_samples, all_samples[:1], all_samples[2:4]):
        inputs = model.process(modality, chosen)
        feed = {i.name: inputs[i.name].numpy() for i in session.get_inputs()}
        (found,) = session.run(None, feed)
        np.testing.assert_allclose(found, model.embed(modality, chosen).numpy(), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in cases.ENCODERS if not c.name.startswith("text")], ids=str)
def test_every_encoder_runs_in_onnxruntime(case, tmp_path):
    torch.manual_seed(0)
    model = MultimodalModel(cases.text_transformer(), {"x": Modality(case.make())}, embed_dim=8).eval()
    samples = case.samples()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = export_tower(model, "x", model.process("x", samples[:3]), tmp_path / "tower.onnx")
    inputs = model.process("x", samples[1:])
    session = ort.InferenceSession(str(path))
    (found,) = session.run(None, {i.name: inputs[i.name].numpy() for i in session.get_inputs()})
    np.testing.assert_allclose(found, model.embed("x", inputs).detach().numpy(), atol=1e-5)


@pytest.mark.slow
def test_charts_without_a_picture_are_like_those_of_the_model(tmp_path):
    torch.manual_seed(0)
    encoder = ChartEncoder("resnet10t", 32, backbone_args={"channels": [8, 8, 16, 16]})
    model = MultimodalModel(cases.text_transformer(), {"x": Modality(encoder)}, embed_dim=8).eval()
    pictures = [Image.new("RGB", (30, 20 + i), (40 * i, 9, 90)) for i in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = export_tower(model, "x", model.process("x", [pictures[0], None]), tmp_path / "tower.onnx")
    inputs = model.process("x", [None, *pictures])
    session = ort.InferenceSession(str(path))
    (found,) = session.run(None, {i.name: inputs[i.name].numpy() for i in session.get_inputs()})
    np.testing.assert_allclose(found, model.embed("x", inputs).detach().numpy(), atol=1e-5)


def check_tuned(module: FineTuning, modality: str, samples: list, folder: Path) -> None:
    """Export with three samples, run with all and with one."""
    task = module.eval().task

    def inputs_of(chosen: list):
        return task.example(module.model, module.model.process(modality, chosen))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = export_tuned(module.model, task, inputs_of(samples[:3]), folder / "tuned.onnx")
    session = ort.InferenceSession(str(path))
    assert [output.name for output in session.get_outputs()] == ["scores"]
    for chosen in (samples, samples[:1]):
        inputs = inputs_of(chosen)
        (found,) = session.run(None, {i.name: inputs[i.name].numpy() for i in session.get_inputs()})
        expected = task.answers(task.logits(module.model, inputs)).detach().numpy()
        np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("task", ["classification", pytest.param("regression", marks=pytest.mark.slow)])
def test_onnxruntime_gives_the_scores_of_the_tuned_model(task, tmp_path):
    torch.manual_seed(0)
    module = FineTuning(str(make_model().save_pretrained(tmp_path / "m")), "points", "class", task, trust=["shapes"])
    module.task.prepare([PointsSource()], training=True)
    check_tuned(module, "points", [s.modalities["points"] for s in PointsSource().split("test")][:6], tmp_path)


@pytest.mark.slow
def test_onnxruntime_tags_notes_as_the_tuned_model(tmp_path):
    pieces = pytest.importorskip("midi_pieces")
    from mmpt.datasets.midi import Music
    from mmpt.encoders.midi import MidiEncoder
    from mmpt.encoders.midi_tokens import Octuple

    torch.manual_seed(0)
    encoder = MidiEncoder(Octuple(), width=32, depth=1, heads=4, field_width=8, max_length=64)
    start = MultimodalModel(cases.text_transformer(), {"midi": Modality(encoder)}, embed_dim=8)
    module = FineTuning(str(start.save_pretrained(tmp_path / "m")), "midi", "velocity", "tagging")
    module.task.prepare([Music()], training=True)
    check_tuned(module, "midi", [pieces.piece(20 + 5 * i, seed=i) for i in range(5)], tmp_path)
