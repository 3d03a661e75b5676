"""What every encoder and its processor promise."""

import copy
import pickle

import pytest
import torch
from contracts.cases import ENCODERS, EncoderCase
from torch import Tensor

from mmpt.config import from_config, to_config
from mmpt.encoder import MASK, Corruption, Encoder
from mmpt.errors import SampleError
from mmpt.tokens import Tokens

pytestmark = pytest.mark.parametrize("case", ENCODERS, ids=str)


def built(case: EncoderCase) -> tuple[Encoder, dict[str, Tensor]]:
    torch.manual_seed(0)
    encoder = case.make().eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return encoder, encoder.processor(case.samples())


def corrupted(case: EncoderCase, encoder: Encoder, inputs: dict[str, Tensor]) -> Corruption:
    generator = torch.Generator().manual_seed(1)
    return case.policy(encoder.units(inputs), encoder.groups(inputs), encoder.max_units(inputs), generator)


def test_processor_gives_one_row_for_each_sample_and_repeats_itself(case):
    encoder, inputs = built(case)
    again = encoder.processor(case.samples())
    for name, value in inputs.items():
        assert len(value) == len(case.samples())
        assert torch.equal(value, again[name])


def test_processor_survives_pickling(case):
    encoder, inputs = built(case)
    copied = pickle.loads(pickle.dumps(encoder.processor))(case.samples())
    assert all(torch.equal(value, copied[name]) for name, value in inputs.items())


def test_bad_sample_is_named_by_its_position(case):
    encoder, _ = built(case)
    samples = [*case.samples()[:2], case.bad, case.samples()[3]]
    with pytest.raises(SampleError) as error:
        encoder.processor(samples)
    assert error.value.index == 2
    assert error.value.expected


def test_tokens_have_the_stated_width_and_one_place_for_each_unit(case):
    encoder, inputs = built(case)
    tokens = encoder(inputs)
    assert isinstance(tokens, Tokens)
    assert tokens.values.shape == (*encoder.units(inputs).shape, encoder.width)
    assert tokens.mask.dtype == torch.bool
    assert tokens.mask.shape == tokens.values.shape[:2]
    assert torch.isfinite(tokens.values[tokens.mask]).all()
    assert (encoder.units(inputs) <= tokens.mask).all()
    assert int(encoder.units(inputs).sum(1).max()) <= encoder.max_units(inputs)


def test_groups_are_numbered_within_the_length_and_do_not_decrease(case):
    encoder, inputs = built(case)
    groups = encoder.groups(inputs)
    assert groups.shape == encoder.units(inputs).shape
    assert (groups >= 0).all()
    assert (groups < groups.shape[1]).all()
    assert (groups.diff(dim=1) >= 0).all()


def test_a_sample_is_encoded_alike_alone_and_in_a_batch(case):
    encoder, inputs = built(case)
    together = encoder(inputs)
    for row, sample in enumerate(case.samples()):
        alone = encoder(encoder.processor([sample]))
        real = alone.mask[0]
        torch.testing.assert_close(
            together.values[row][together.mask[row]], alone.values[0][real], atol=1e-5, rtol=1e-4
        )


def test_hidden_content_reaches_the_loss_only_as_the_target(case):
    encoder, inputs = built(case)
    corruption = corrupted(case, encoder, inputs)
    hidden = corruption.predicted & (corruption.action == MASK)
    assert hidden.any()
    altered = case.alter(inputs, hidden)
    predictions = []
    for variant in (inputs, altered):
        torch.manual_seed(3)
        tokens = encoder(variant, corruption)
        predictions.append((tokens.values[tokens.mask], encoder.reconstruct(tokens, corruption)))
    assert torch.equal(predictions[0][0], predictions[1][0])
    assert torch.equal(predictions[0][1], predictions[1][1])
    before = encoder.reconstruction_loss(predictions[0][1], inputs, corruption).loss.detach()
    after = encoder.reconstruction_loss(predictions[0][1], altered, corruption).loss.detach()
    assert abs(float(before) - float(after)) > 1e-4


def test_visible_content_does_reach_the_prediction(case):
    encoder, inputs = built(case)
    corruption = corrupted(case, encoder, inputs)
    visible = encoder.units(inputs) & ~corruption.predicted
    torch.manual_seed(3)
    before = encoder.reconstruct(encoder(inputs, corruption), corruption)
    torch.manual_seed(3)
    after = encoder.reconstruct(encoder(case.alter(inputs, visible), corruption), corruption)
    assert not torch.allclose(before, after, atol=1e-4)


def test_only_predicted_units_are_predicted(case):
    encoder, inputs = built(case)
    corruption = corrupted(case, encoder, inputs)
    predictions = encoder.reconstruct(encoder(inputs, corruption), corruption)
    assert len(predictions) == int(corruption.predicted.sum())


def test_dropping_leaves_only_visible_units(case):
    encoder, inputs = built(case)
    corruption = corrupted(case, encoder, inputs)
    length = encoder(inputs, corruption).length
    full = encoder.units(inputs).shape[1]
    hidden = int((corruption.action == MASK).sum(1).max())
    assert length == (full - hidden if case.drops else full)


def test_nothing_predicted_is_a_loss_of_zero_with_a_gradient(case):
    encoder, inputs = built(case)
    units = encoder.units(inputs)
    nothing = Corruption(torch.zeros_like(units, dtype=torch.uint8), torch.zeros_like(units), hidden=0)
    tokens = encoder(inputs, nothing)
    loss = encoder.reconstruction_loss(encoder.reconstruct(tokens, nothing), inputs, nothing).loss
    assert float(loss.detach()) == 0
    loss.backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in encoder.parameters())


def test_every_parameter_learns_from_masking(case):
    encoder, inputs = built(case)
    encoder.train()
    generator = torch.Generator().manual_seed(1)
    corruption = case.policy(encoder.units(inputs), encoder.groups(inputs), encoder.max_units(inputs), generator)
    tokens = encoder(inputs, corruption)
    loss = encoder.reconstruction_loss(encoder.reconstruct(tokens, corruption), inputs, corruption).loss
    (loss + tokens.values.square().mean()).backward()
    silent = [n for n, p in encoder.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not silent


def test_configuration_rebuilds_the_same_encoder(case, tmp_path):
    encoder, inputs = built(case)
    config = to_config(encoder, tmp_path)
    rebuilt = from_config(config, folder=tmp_path, trust=["shapes"]).eval()
    rebuilt.load_state_dict(encoder.state_dict())
    fresh = rebuilt.processor(case.samples())
    assert torch.equal(encoder(inputs).values, rebuilt(fresh).values)


def test_half_precision_autocast_stays_close(case):
    encoder, inputs = built(case)
    exact = encoder(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        rough = encoder(inputs)
    difference = (exact.values - rough.values.float())[exact.mask].abs().mean()
    assert difference < 0.1 * exact.values[exact.mask].abs().mean() + 0.02


def test_works_on_the_meta_device(case):
    encoder, inputs = built(case)
    ghost = copy.deepcopy(encoder).to("meta")
    tokens = ghost({name: value.to("meta") for name, value in inputs.items()})
    assert tokens.values.shape == (*encoder.units(inputs).shape, encoder.width)
