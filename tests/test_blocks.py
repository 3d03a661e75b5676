"""Repeated blocks: found in anybody's networks, run again in the backward pass, compiled."""

import shutil

import pytest
import timm
import torch
import toy
import yaml
from points import figures, make_batch, make_pretraining, make_trainer
from probes import write
from torch import nn

from mmpt.blocks import compile_blocks, recompute_activations, repeated_blocks
from mmpt.cli import main
from mmpt.heads import ContrastiveHead, MaskedHead
from mmpt.tokens import full
from mmpt.transformer import Layer, Transformer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def heads():
    return {"contrastive": ContrastiveHead("points"), "masked": MaskedHead("text")}


def gradients(module):
    """Loss and gradients of a batch, with the same draws every time."""
    batch = make_batch(module.model)
    torch.manual_seed(3)
    loss, _ = module(batch)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


class TestFinding:
    def test_layers_of_our_transformer(self):
        model = Transformer(32, 3, 4)
        assert list(repeated_blocks(model)) == list(model.layers)

    def test_blocks_of_timm(self):
        vit = timm.create_model("vit_tiny_patch16_224", depth=3, img_size=32)
        assert list(repeated_blocks(vit)) == list(vit.blocks)

    def test_layers_of_transformers(self, tmp_path):
        bert = write("bert", tmp_path)
        assert list(repeated_blocks(bert)) == list(bert.encoder.layer)

    def test_neither_a_feed_forward_nor_a_table_for_each_field_is_a_stack(self):
        mixed = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
        fields = nn.ModuleList(nn.Embedding(3, 2) for _ in range(4))
        assert list(repeated_blocks(nn.ModuleDict({"a": mixed, "b": fields}))) == []


class TestRecomputing:
    def test_gradients_and_draws_are_the_same(self):
        torch.manual_seed(0)
        module = make_pretraining(heads(), dropout=0.3)
        loss, expected = gradients(module)
        module.zero_grad(set_to_none=True)
        recompute_activations(module)
        again, found = gradients(module)
        assert again == loss
        torch.testing.assert_close(found, expected)

    def test_every_layer_runs_a_second_time_and_keeps_only_its_input(self):
        model = Transformer(64, 4, 4)
        tokens = torch.randn(2, 40, 64)
        kept, runs = [], []
        for layer in model.layers:
            layer.expand.register_forward_hook(lambda *_: runs.append(1))

        def step() -> int:
            runs.clear()
            kept.clear()
            with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
                loss = model(full(tokens)).values.sum()
            loss.backward()
            return sum(kept)

        whole = step()
        assert len(runs) == 4
        recompute_activations(model)
        assert step() < whole / 4
        assert len(runs) == 8
        with torch.no_grad():
            model(full(tokens))
        assert len(runs) == 12

    def test_batch_norm_counts_a_batch_once(self):
        resnet = timm.create_model("resnet18", num_classes=0)
        recompute_activations(resnet)
        resnet(torch.randn(2, 3, 32, 32)).sum().backward()
        counts = {int(m.num_batches_tracked) for m in resnet.modules() if isinstance(m, nn.BatchNorm2d)}
        assert counts == {1}

    @pytest.mark.parametrize("options", [{}, {"cached_chunk": 4}])
    def test_a_run_with_the_flag_has_the_losses_of_one_without(self, options):
        losses = []
        for checkpointing in (False, True):
            torch.manual_seed(0)
            module = make_pretraining(heads(), dropout=0.1, checkpointing=checkpointing, **options)
            trainer = make_trainer(max_steps=3)
            trainer.fit(module, figures())
            losses.append(trainer.callback_metrics["train/loss"].item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)


inductor = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=[inductor, pytest.mark.slow])])
def test_a_compiled_run_has_the_losses_of_one_that_is_not(checkpointing, backend, monkeypatch):
    original = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module: original(module, backend=backend))
    losses = []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        module = make_pretraining(heads(), compile=compiled, checkpointing=checkpointing)
        assert all((layer._compiled_call_impl is not None) == compiled for layer in repeated_blocks(module))
        assert any(isinstance(layer, Layer) for layer in repeated_blocks(module))
        trainer = make_trainer(max_steps=3, precision="bf16-mixed" if checkpointing else "32-true")
        trainer.fit(module, figures())
        losses.append(trainer.callback_metrics["train/loss"].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-2 if checkpointing else 1e-5)


def test_flags_of_the_command_line(tmp_path):
    config = toy.write(tmp_path, toy.PRETRAIN, "plain.yaml")
    flags = ["--model.checkpointing", "true", "--trainer.precision", "bf16-mixed"]
    assert main(["fit", "--config", str(config), "--output", str(tmp_path / "run"), *flags]) == 0
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert written["model"]["init_args"]["checkpointing"] is True


def test_compiling_leaves_the_names_of_weights():
    module = make_pretraining(heads())
    names = set(module.state_dict())
    compile_blocks(module)
    assert set(module.state_dict()) == names
