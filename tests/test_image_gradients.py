"""Oriented gradients, and the maps of places of drawings, beside which some are never trained."""

import pytest
import torch

from mmpt.config import from_config
from mmpt.encoders.image_drawing import DrawingEncoder
from mmpt.encoders.image_gradients import GradientResNet, OrientedGradients

SMALL = {"channels": (8, 8, 8), "out": 6}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def ramp(angle_degrees, size=32):
    """Brightness that rises in one direction."""
    angle = torch.deg2rad(torch.tensor(float(angle_degrees)))
    axis = torch.arange(size) / size
    return (axis[None, :] * angle.cos() + axis[:, None] * angle.sin()).expand(1, 3, size, size)


class TestOrientedGradients:
    @pytest.mark.parametrize("number", range(4))
    def test_a_ramp_fills_its_own_orientation_alone(self, number):
        # orientation k of 4 stands for 45k degrees; its neighbours are 90 degrees away once angles are doubled
        fine, _ = OrientedGradients(4, 4)(ramp(45 * number))
        inner = fine[0, :4, 2:-2, 2:-2].mean((1, 2))
        others = [k for k in range(4) if k != number]
        assert inner[number] > 0.3
        torch.testing.assert_close(inner[others], torch.zeros(3), atol=1e-3, rtol=0)

    def test_strength_between_two_orientations_is_shared_by_the_squared_cosine(self):
        # 30 degrees among 8 orientations at 22.5 k: 30 degrees from k = 0 and 37.5 from k = 3, doubled 60 and 75
        fine, _ = OrientedGradients(8, 4)(ramp(30))
        expected = (torch.tensor(60.0).deg2rad().cos() / torch.tensor(75.0).deg2rad().cos()) ** 2
        torch.testing.assert_close(fine[0, 0, 3, 3] / fine[0, 3, 3, 3], expected, atol=1e-3, rtol=0)

    def test_opposite_directions_are_one_and_contrast_does_not_matter(self):
        see = OrientedGradients(8, 4)
        picture = torch.rand(2, 3, 32, 32) * 4
        edges = see(picture)[0][:, :8]
        torch.testing.assert_close(see(-picture)[0][:, :8], edges)
        torch.testing.assert_close(see(3 * picture)[0][:, :8], edges, atol=2e-3, rtol=0)

    def test_the_channel_with_the_longest_gradient_decides_and_colour_stands_behind(self):
        picture = torch.zeros(1, 3, 32, 32)
        picture[:, 1] = ramp(0)[:, 1]
        picture[:, 2] = 0.1 * ramp(90)[:, 2]
        fine, coarse = OrientedGradients(4, 4)(picture)
        assert fine[0, :4, 3, 3].argmax() == 0
        torch.testing.assert_close(fine[0, 5], picture[0, 1].unfold(0, 4, 4).unfold(1, 4, 4).mean((2, 3)))
        assert fine.shape == (1, 7, 8, 8)
        assert coarse.shape == (1, 7, 4, 4)


class TestFixedMaps:
    def test_the_network_ends_in_standardised_coarse_cells(self):
        network = GradientResNet(**SMALL).train()
        pixels = torch.rand(8, 3, 32, 32)
        features = network.forward_features(pixels)
        assert features.shape == (8, 6 + 44, 2, 2)
        beside = features[:, -network.fixed_features :]
        torch.testing.assert_close(beside.mean((0, 2, 3)), torch.zeros(44), atol=1e-5, rtol=0)
        coarse = network.gradients(pixels)[1]
        # channel 4c + 2i + j of a place is channel c of the coarse cell (i, j) in it
        cell = coarse[:, 3, 1::2, 0::2]
        expected = (cell - cell.mean()) / (cell.var(unbiased=False) + 1e-5).sqrt()
        torch.testing.assert_close(beside[:, 4 * 3 + 2], expected, atol=1e-5, rtol=1e-5)

    def test_training_moves_the_first_part_of_a_place_and_never_the_second(self):
        encoder = encoder_with(place_width=5, fixed_width=7)
        assert encoder.width == 12
        inputs = {"pixels": torch.rand(4, 3, 32, 32)}
        encoder(inputs)  # the running statistics of the norms
        before = encoder.eval()(inputs).values.detach()
        assert before.shape == (4, 4, 12)
        optimizer = torch.optim.SGD(encoder.parameters(), 0.5)
        encoder(inputs).values.square().sum().backward()
        optimizer.step()
        after = encoder(inputs).values
        assert not torch.allclose(after[..., :5], before[..., :5], atol=1e-2)
        assert torch.equal(after[..., 5:], before[..., 5:])

    def test_each_place_has_a_fixed_map_of_its_own_that_reads_the_last_features(self):
        encoder = encoder_with(place_width=5, fixed_width=7).eval()
        pixels = torch.rand(2, 3, 32, 32)
        features = encoder.backbone.forward_features(pixels).flatten(2).mT  # (batch, places, 50)
        got = encoder({"pixels": pixels}).values[..., 5:]
        for place in range(4):
            expected = features[:, place, 6:] @ encoder.places.fixed[place]
            torch.testing.assert_close(got[:, place], expected)
        assert not torch.equal(encoder.places.fixed[0], encoder.places.fixed[1])

    def test_the_fixed_maps_are_saved_with_the_weights(self):
        encoder = encoder_with(place_width=5, fixed_width=7).eval()
        other = from_config(encoder.config())
        other.load_state_dict(encoder.state_dict())
        pixels = {"pixels": torch.rand(2, 3, 32, 32)}
        torch.testing.assert_close(other.eval()(pixels).values, encoder(pixels).values)

    def test_without_fixed_maps_a_place_has_the_trained_vector_alone(self):
        encoder = encoder_with(place_width=5).eval()
        pixels = torch.rand(2, 3, 32, 32)
        features = encoder.backbone.forward_features(pixels).flatten(2).mT
        got = encoder({"pixels": pixels}).values
        assert encoder.width == 5
        for place in range(4):
            torch.testing.assert_close(got[:, place], features[:, place] @ encoder.places.weight[place])


def encoder_with(**options):
    return DrawingEncoder(32, **SMALL, **options)
