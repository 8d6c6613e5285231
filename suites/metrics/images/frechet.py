"""Frechet distance between Gaussian fits of two feature sets: what FID is in the features of Inception.

d^2 = |mu_a - mu_b|^2 + tr A + tr B - 2 tr (A B)^(1/2)   (Heusel et al. 2017, equation 6; Dowson and Landau 1982)

With A = F F^T and B = G G^T, tr (A B)^(1/2) is the nuclear norm of F^T G, so no general matrix square root is needed: Cholesky
factors and symmetric eigenvalues at full rank, those of an n x n product where there are fewer samples than dimensions.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distillbench.errors import UserError
from distillbench.suites.metrics.images.distances import checked

ASYMMETRY = 1e-5  # a reference covariance may differ from its transpose by this part of its largest entry: float32 rounding


@dataclass(frozen=True)
class Moments:
    """Mean and covariance of a feature set, in float64.

    Attributes:
        mean: (D,).
        covariance: (D, D), divided by count - 1; zeros for a single sample.
        count: number of samples, >= 1; None for published statistics, which do not say it.
    """

    mean: Tensor
    covariance: Tensor
    count: int | None

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Moments of one batch.   (N, D), N >= 1."""
        return cls.stream([features])

    @classmethod
    def stream(cls, batches: Iterable[Tensor]) -> Moments:
        """Moments of all batches in one pass, each (N_i, D), holding one batch and one (D, D) matrix at a time.

        Batches are centred on their own mean and joined by the update of Chan, Golub and LeVeque (1983), so features far from
        zero lose no digits.

        Raises:
            UserError: there is no sample, a batch is not (N, D), or a feature is not finite.
        """
        mean, scatter, count = torch.zeros(0), torch.zeros(0), 0
        for batch in batches:
            if not len(batch):
                continue
            x = checked(batch, "features").double()
            if not count:
                mean, scatter = torch.zeros_like(x[0]), x.new_zeros(x.shape[1], x.shape[1])
            elif x.shape[1] != len(mean):
                raise UserError(f"a batch has {x.shape[1]} features where those before it have {len(mean)}: extract all with one network")
            total = count + len(x)
            gap = x.mean(0) - mean
            # The shift between the means enters as one more row, so that the scatter takes one product in place.
            rows = torch.cat([x - x.mean(0), gap[None] * (count * len(x) / total) ** 0.5])
            scatter.addmm_(rows.T, rows)
            mean = mean + gap * (len(x) / total)
            count = total
        if not count:
            raise UserError("there are no samples to take moments of: draw at least 2")
        return cls(mean, scatter / max(count - 1, 1), count)

    def update(self, features: Tensor) -> Moments:
        """These moments with more samples (N, D). For many batches :meth:`stream` is cheaper."""
        return self.merge(Moments.of(features))

    def merge(self, other: Moments) -> Moments:
        """Moments of both sets together, as if streamed at once.

        Raises:
            UserError: one of them does not know its count, or their dimensions differ.
        """
        if self.count is None or other.count is None:
            raise UserError("statistics without a sample count cannot be merged: stream the features of both sets instead")
        _same_dimension(self.mean, other.mean)
        total = self.count + other.count
        gap = other.mean - self.mean
        scatter = self.covariance * (self.count - 1) + other.covariance * (other.count - 1)
        scatter += torch.outer(gap, gap) * (self.count * other.count / total)
        return Moments(self.mean + gap * (other.count / total), scatter / (total - 1), total)


@dataclass(frozen=True)
class _Gaussian:
    """A Gaussian with a factor F of its covariance, F F^T = A; the covariance itself is kept only at full rank."""

    mean: Tensor
    trace: Tensor
    factor: Tensor
    covariance: Tensor | None

    @classmethod
    def of_moments(cls, moments: Moments) -> _Gaussian:
        covariance = moments.covariance.double()
        factor, failed = torch.linalg.cholesky_ex(covariance)
        if not failed:
            return cls(moments.mean.double(), covariance.trace(), factor, covariance)
        values, vectors = torch.linalg.eigh(covariance)
        # What rounding leaves of a zero eigenvalue is not variance.
        kept = values > len(values) * torch.finfo(torch.float64).eps * values[-1].clamp(min=0)
        return cls(moments.mean.double(), covariance.trace(), vectors[:, kept] * values[kept].sqrt(), None)

    @classmethod
    def of_samples(cls, features: Tensor) -> _Gaussian:
        """(N, D). With N <= D the centred samples are the factor, and no (D, D) matrix is made."""
        if len(features) > features.shape[1]:
            return cls.of_moments(Moments.of(features))
        x = features.double()
        centred = (x - x.mean(0)) / (len(x) - 1) ** 0.5
        return cls(x.mean(0), centred.square().sum(), centred.T, None)


def _nuclear_norm(matrix: Tensor) -> Tensor:
    """Sum of singular values: the roots of the eigenvalues of M M^T where those are far enough from rounding."""
    small = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    values = torch.linalg.eigvalsh(small @ small.T)
    kept = values > len(values) * torch.finfo(torch.float64).eps * values[-1:]
    # Centring makes one zero. More of them are a singular set, and the roots of their rounding would add up.
    singular: Tensor = values[kept].sqrt() if int((~kept).sum()) <= 1 else torch.linalg.svdvals(small)
    return singular.sum()


def _squared_distance(a: _Gaussian, b: _Gaussian) -> float:
    if a.covariance is None or b.covariance is None:
        root = _nuclear_norm(a.factor.T @ b.factor)
    else:
        root = torch.linalg.eigvalsh(a.factor.T @ b.covariance @ a.factor).clamp(min=0).sqrt().sum()
    return max(float((a.mean - b.mean).square().sum() + a.trace + b.trace - 2 * root), 0.0)


def _same_dimension(a: Tensor, b: Tensor) -> None:
    if a.shape[-1] != b.shape[-1]:
        raise UserError(f"{a.shape[-1]} features against {b.shape[-1]} in the reference: both have to come from the same network")


def require_samples(count: int | None, dimension: int, *, minimum: int | None = None) -> None:
    """Refuse a Frechet distance from too few samples.

    The default is dimension + 1, the fewest at which a covariance can have full rank: below it the distance says more about the
    number of samples than about them, and even above it the bias falls only as 1 / count. A published protocol asks for its own
    number (50,000 for most). A smaller ``minimum``, at least 2, is for callers that compare equal counts and say so. A count of
    None (published statistics) passes.

    Raises:
        UserError: there are fewer than ``minimum`` samples, or fewer than 2.
    """
    least = max(dimension + 1 if minimum is None else minimum, 2)
    if count is not None and count < least:
        raise UserError(f"{count} samples are too few for a Frechet distance in {dimension} dimensions: draw at least {least}")


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared Frechet distance of the two Gaussians, in squared units of the features; >= 0, 0 where the moments are equal.

    It takes any rank, so a caller that reports the value checks :func:`require_samples` first.

    Raises:
        UserError: a set has fewer than 2 samples, or their dimensions differ.
    """
    _same_dimension(a.mean, b.mean)
    for moments in (a, b):
        require_samples(moments.count, len(moments.mean), minimum=2)
    return _squared_distance(_Gaussian.of_moments(a), _Gaussian.of_moments(b))


def frechet_from_samples(features: Tensor, reference: Tensor | Moments, *, minimum: int | None = None) -> float:
    """The same from samples (N, D) against samples (M, D) or statistics; >= 0.

    A side with at most D samples is never made into a (D, D) covariance: the product of the centred sets has the same nuclear norm
    and is far smaller. ``minimum`` is for either side, as in :func:`require_samples`.

    Raises:
        UserError: too few samples, a dimension that differs, or features that are not finite.
    """
    x = checked(features, "features")
    dimension = x.shape[1]
    require_samples(len(x), dimension, minimum=minimum)
    if isinstance(reference, Moments):
        _same_dimension(x, reference.mean)
        require_samples(reference.count, dimension, minimum=minimum)
        return _squared_distance(_Gaussian.of_samples(x), _Gaussian.of_moments(reference))
    y = checked(reference, "reference features")
    _same_dimension(x, y)
    require_samples(len(y), dimension, minimum=minimum)
    return _squared_distance(_Gaussian.of_samples(x), _Gaussian.of_samples(y))


def load_reference(path: Path) -> Moments:
    """Published reference statistics: an npz with ``mu`` (D,) and ``sigma`` (D, D), as EDM, clean-fid and guided-diffusion write.

    Other arrays in the file are not read, and nothing is unpickled. The count is None, for the files do not say it.

    Raises:
        UserError: the file is missing or no npz, or its arrays are missing, of wrong shape or type, not finite, or no covariance.
    """
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise UserError(f"{path} is a single array: reference statistics are an npz with mu and sigma")
        with file:
            missing = [name for name in ("mu", "sigma") if name not in file.files]
            if missing:
                found = ", ".join(file.files) or "no array"
                raise UserError(f"{path} lacks {' and '.join(missing)} (it holds {found}): reference statistics need mu and sigma")
            mu, sigma = file["mu"], file["sigma"]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"cannot read reference statistics from {path}: {' '.join(str(error).split()) or type(error).__name__}") from None
    if mu.dtype.kind != "f" or sigma.dtype.kind != "f":
        raise UserError(f"{path}: mu and sigma have to be real floats, found {mu.dtype} and {sigma.dtype}")
    if mu.ndim != 1 or not mu.size or sigma.shape != (len(mu), len(mu)):
        raise UserError(f"{path}: mu {mu.shape} and sigma {sigma.shape} do not fit; (D,) and (D, D) are needed")
    mean, covariance = torch.from_numpy(mu.astype(np.float64)), torch.from_numpy(sigma.astype(np.float64))
    for name, tensor in (("mu", mean), ("sigma", covariance)):
        if not bool(tensor.isfinite().all()):
            raise UserError(f"{path}: {name} holds values that are not finite; make the statistics anew")
    if float((covariance - covariance.T).abs().max()) > ASYMMETRY * float(covariance.abs().max()):
        raise UserError(f"{path}: sigma is not symmetric, so it is no covariance; make the statistics anew")
    if bool((covariance.diagonal() < 0).any()):
        raise UserError(f"{path}: sigma has a negative variance on its diagonal, so it is no covariance; make the statistics anew")
    return Moments(mean, (covariance + covariance.T) / 2, None)
