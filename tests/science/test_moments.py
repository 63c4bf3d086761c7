import pytest
import torch

from clva_lens.ground.errors import ParameterError
from clva_lens.science.moments import RunningMoments


def reference(samples):
    """The covariance written out, entry by entry."""
    away = samples.double() - samples.double().mean(dim=0)
    return (away[..., :, None] * away[..., None, :]).sum(dim=0) / (len(samples) - 1)


@pytest.mark.parametrize("sizes", [(7,), (1,) * 7, (3, 0, 4), (2, 5)])
def test_batches_make_no_difference(sizes):
    samples = 1e4 + torch.randn(7, 3, 5, generator=torch.Generator().manual_seed(0)).double()
    moments = RunningMoments()
    for part in samples.split(sizes):
        moments.add(part)
    assert moments.count == 7
    torch.testing.assert_close(moments.mean, samples.mean(dim=0))
    torch.testing.assert_close(moments.covariance, reference(samples), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(moments.error, samples.std(dim=0) / 7**0.5)


def test_two_are_merged():
    samples = torch.randn(9, 4, generator=torch.Generator().manual_seed(1))
    one, other = RunningMoments(), RunningMoments()
    one.add(samples[:2])
    other.add(samples[2:])
    one.merge(other)
    one.merge(RunningMoments())
    assert one.count == 9 and other.count == 7
    torch.testing.assert_close(one.covariance, reference(samples))


def test_what_is_missing_is_said():
    moments = RunningMoments()
    with pytest.raises(ParameterError, match="no samples"):
        _ = moments.mean
    moments.add(torch.ones(1, 3))
    with pytest.raises(ParameterError, match="takes 2 samples"):
        _ = moments.covariance
    with pytest.raises(ParameterError, match="before were"):
        moments.add(torch.ones(1, 4))
