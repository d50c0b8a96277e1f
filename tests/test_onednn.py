"""Linear layers by oneDNN: the same values and gradients, and nothing else is touched."""

import pytest
import torch
from torch.nn.functional import linear
from torch.testing import assert_close

from cellglot import onednn
from cellglot.onednn import OneDNNLinear

from .modeling.test_geneformer import tiny_batch, tiny_model


@pytest.fixture
def routed(monkeypatch):
    """Shapes of what oneDNN was given."""
    shapes = []
    convolution = onednn.linear

    def counted(x, *args):
        shapes.append(tuple(x.shape))
        return convolution(x, *args)

    monkeypatch.setattr(onednn, "linear", counted)
    return shapes


@pytest.mark.parametrize("shape", [(13, 7), (1, 7), (3, 5, 7), (7,), (2, 3, 5, 7)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_values_and_gradients_are_those_of_a_linear_layer(routed, shape, with_bias):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(s, generator=generator).requires_grad_() for s in (shape, (11, 7), (11,))]
    tensors = tensors if with_bias else tensors[:2]
    expected = linear(*tensors)
    upstream = torch.randn(expected.shape, generator=generator)
    with OneDNNLinear():
        found = linear(*tensors)
    assert routed == [shape]
    assert found.is_contiguous()
    # float32 sums in another order
    assert_close(found, expected, atol=1e-5, rtol=1e-5)
    gradients = (torch.autograd.grad(out, tensors, upstream) for out in (found, expected))
    assert_close(*gradients, atol=1e-5, rtol=1e-5)


def test_transposed_input_is_read_right(routed):
    x, weight = torch.arange(35.0).view(7, 5).T, torch.arange(77.0).view(11, 7)
    with OneDNNLinear():
        assert_close(linear(x, weight), x @ weight.T)
    assert routed


def test_a_whole_model_goes_through_it(routed):
    model = tiny_model()
    ids, mask, labels = tiny_batch()
    expected = model(ids, mask, labels=labels).loss
    assert not routed
    with OneDNNLinear():
        found = model(ids, mask, labels=labels).loss
    n_layers = model.config.num_hidden_layers
    # query, key, value, output and two of the feed-forward block, fused or not
    assert len(routed) >= 4 * n_layers
    assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_other_precisions_and_empty_batches_are_left_to_torch(routed):
    with OneDNNLinear():
        for dtype in (torch.float64, torch.bfloat16):
            weight = torch.ones(11, 7, dtype=dtype)
            assert linear(torch.ones(3, 7, dtype=dtype), weight).dtype == dtype
        assert linear(torch.ones(0, 7), torch.ones(11, 7)).shape == (0, 11)
    assert not routed
