"""Mean and covariance of vectors that come one after another and are not kept."""

import torch
from jaxtyping import Float
from torch import Tensor

from clva_lens.ground.errors import ParameterError


class RunningMoments:
    """Mean and covariance of samples [*shape, entry], merged batch by batch in float64 on the CPU.

    By the pairwise rule of Chan, Golub and LeVeque (1979, eq. 2.1): with δ the difference of the
    means of m and n samples, the sums of squares add up with δδᵀ·mn/(m + n), so that nothing
    cancels where the mean is large. A sample that is NaN somewhere makes that entry NaN.
    """

    def __init__(self) -> None:
        """Start without samples."""
        self.count = 0
        self._mean: Float[Tensor, "*shape entry"] | None = None
        self._squares: Float[Tensor, "*shape entry entry"] | None = None

    def add(self, samples: Float[Tensor, "sample *shape entry"]) -> None:
        """Take more samples in.

        Raises:
            ParameterError: if they have another shape than those before.
        """
        if len(samples) == 0:
            return
        samples = samples.detach().cpu().double()
        mean = samples.mean(dim=0)
        away = samples - mean
        squares = torch.einsum("s...i,s...j->...ij", away, away)
        self._merge(len(samples), mean, squares)

    def merge(self, other: "RunningMoments") -> None:
        """Take in all samples of another.

        Raises:
            ParameterError: if they have another shape.
        """
        if other._mean is not None and other._squares is not None:
            self._merge(other.count, other._mean, other._squares)

    def _merge(self, count: int, mean: Tensor, squares: Tensor) -> None:
        if self._mean is None or self._squares is None:
            self.count, self._mean, self._squares = count, mean.clone(), squares.clone()
            return
        if mean.shape != self._mean.shape:
            raise ParameterError(
                f"the samples are {tuple(mean.shape)}, but those before were "
                f"{tuple(self._mean.shape)}. Use one RunningMoments for each shape."
            )
        whole, apart = self.count + count, mean - self._mean
        outer = torch.einsum("...i,...j->...ij", apart, apart)
        self._squares += squares + outer * (self.count * count / whole)
        self._mean += apart * (count / whole)
        self.count = whole

    @property
    def mean(self) -> Float[Tensor, "*shape entry"]:
        """The mean of the samples.

        Raises:
            ParameterError: if there are none.
        """
        if self._mean is None:
            raise ParameterError("there are no samples yet. Add some.")
        return self._mean.clone()

    @property
    def covariance(self) -> Float[Tensor, "*shape entry entry"]:
        """The covariance of the entries, over n − 1.

        Raises:
            ParameterError: if there are fewer than two samples.
        """
        if self._squares is None or self.count < 2:
            raise ParameterError(f"a covariance takes 2 samples, but there are {self.count}.")
        return self._squares / (self.count - 1)

    @property
    def error(self) -> Float[Tensor, "*shape entry"]:
        """The standard error of the mean.

        Raises:
            ParameterError: if there are fewer than two samples.
        """
        return (self.covariance.diagonal(dim1=-2, dim2=-1) / self.count).sqrt()
