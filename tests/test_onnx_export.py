"""Towers as ONNX files give what the model gives, for batches of other sizes and lengths than the example."""

import warnings

import numpy as np
import pytest
import torch
from contracts import cases
from points import TEXTS, make_model
from shapes import PointsSource

from mmpt.model import TEXT, Modality, MultimodalModel
from mmpt.onnx_export import export_tower

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
@pytest.mark.parametrize(
    "case", [c for c in cases.ENCODERS if c.name != "chart" and not c.name.startswith("text")], ids=str
)
def test_every_encoder_but_the_chart_encoder_runs_in_onnxruntime(case, tmp_path):
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
