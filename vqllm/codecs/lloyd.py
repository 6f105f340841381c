"""Codebooks by Lloyd's algorithm with weighted errors, for many groups of vectors at a time.

Every group has a codebook of its own; the groups of a call have the same number of vectors. The
result has the same bytes with any number of threads: vectors are assigned independently of each
other, and the means are summed on the CPU in the order of the vectors, in float64.

    G   groups            N   vectors of a group
    K   entries           E   elements of a vector

Weights are [G, N, 1] where a vector has one, [G, N, E] where its elements have their own, or None.

Source: Lloyd, IEEE Trans. Inform. Theory 28 (1982), 129-137; k-means++, Arthur and Vassilvitskii,
SODA 2007; ranks of the Mahalanobis distance, GPTVQ, arXiv 2402.15319.
"""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from vqllm.codecs.base import MAX_DISTANCES, nearest_entry

Init = Literal["auto", "kmeans++", "mahalanobis"]

PLUS_PLUS_ENTRIES = 4096
"""Largest codebook that is started with k-means++, whose time grows with its square."""
_PLUS_PLUS_SAMPLE = 16
"""Vectors for each entry of the codebook that k-means++ chooses from."""
_RIDGE = 1e-6
"""Added to a covariance, relative to its mean diagonal, so that it has an inverse."""


def start(
    x_GNE: Tensor,
    weight_GNE: Tensor | None,
    num_entries: int,
    init: Init,
    generator: torch.Generator,
) -> Tensor:
    """Codebooks before the first pass, [G, K, E].

    auto is k-means++ where it is affordable: after 40 passes on 2^16 Gaussian pairs with 256
    entries the distortion is 0.0076, against 0.0083 from random vectors or from vectors of evenly
    spaced norm. Larger codebooks start from random vectors and scalar ones from evenly spaced
    ranks, both spread from their mean to the density that is optimal for a Gaussian (a Gaussian of
    (E + 2)/E times the variance): 0.0078 in the same test. Of 16 scalar entries in small groups,
    evenly spaced ranks end at 0.0095, k-means++ at 0.0103, Mahalanobis ranks at 0.0113.
    """
    _, num_vectors, num_elements = x_GNE.shape
    if init == "mahalanobis":
        return _by_mahalanobis_rank(x_GNE, num_entries)
    # k-means++ of a sample of the vectors, as its time grows with vectors times entries.
    affordable = num_elements > 1 and num_entries <= PLUS_PLUS_ENTRIES
    if init == "kmeans++" or affordable:
        num = min(num_vectors, _PLUS_PLUS_SAMPLE * num_entries)
        drawn = draw(num_vectors, num, generator).to(x_GNE.device)
        weight = torch.ones_like(x_GNE[..., :1]) if weight_GNE is None else weight_GNE
        # On the CPU: a cumulative sum on a GPU is not the same twice.
        sample_GNE, weight_GNE = x_GNE[:, drawn].cpu(), weight[:, drawn].cpu()
        return _plus_plus(sample_GNE, weight_GNE, num_entries, generator).to(x_GNE.device)
    if num_elements == 1:
        start_GKE = x_GNE.sort(dim=1).values[:, _even_ranks(x_GNE, num_entries)]
    else:
        drawn = torch.randperm(num_vectors, generator=generator)[:num_entries]
        drawn = drawn.repeat(-(-num_entries // len(drawn)))[:num_entries]
        start_GKE = x_GNE[:, drawn.to(x_GNE.device)]
    # Spread from the mean, so that the variance is (E + 2)/E times that of the vectors.
    mean_G1E = _mean(x_GNE)
    return mean_G1E + (start_GKE - mean_G1E) * ((num_elements + 2) / num_elements) ** 0.5


def draw(num_vectors: int, num: int, generator: torch.Generator) -> Tensor:
    """Indices of `num` vectors without repetition, in ascending order."""
    return torch.randperm(num_vectors, generator=generator)[:num].sort().values


def lloyd(x_GNE: Tensor, weight_GNE: Tensor | None, entries_GKE: Tensor, passes: int) -> Tensor:
    """Alternate between assigning vectors to entries and moving entries to their means."""
    previous_GN = None
    for _ in range(passes):
        index_GN = assign(x_GNE, weight_GNE, entries_GKE)
        if previous_GN is not None and torch.equal(index_GN, previous_GN):
            break
        previous_GN = index_GN
        # An entry without vectors takes the place of one that has a large error.
        mean_GKE, mass_GKE = means(x_GNE, weight_GNE, index_GN, entries_GKE.shape[1])
        moved_GKE = torch.where(mass_GKE > 0, mean_GKE, entries_GKE.double()).float()
        empty_GK = mass_GKE.amax(2) == 0
        if bool(empty_GK.any()):
            error_GN = _errors(x_GNE, weight_GNE, entries_GKE, index_GN)
            moved_GKE = _reseed(moved_GKE, empty_GK, x_GNE, error_GN)
        entries_GKE = moved_GKE
    return entries_GKE


def assign(x_GNE: Tensor, weight_GNE: Tensor | None, entries_GKE: Tensor) -> Tensor:
    """The nearest entry of each vector, int64 [G, N]. Only weights by element make a difference."""
    if weight_GNE is not None and weight_GNE.shape[2] == 1:
        weight_GNE = None
    if weight_GNE is None and len(x_GNE) == 1:
        return nearest_entry(x_GNE[0], entries_GKE[0])[None, :, 0]
    # Distances from a common centre: otherwise the rounding of the squares hides them.
    center_G1E = (entries_GKE.amin(1, keepdim=True) + entries_GKE.amax(1, keepdim=True)) / 2
    entries_GKE = entries_GKE - center_G1E
    # w (x − c)² without w x², which is the same for all entries: −2 (w x) c + w c², a product.
    squares_GKE = entries_GKE**2
    if weight_GNE is None:
        squares_GKE = squares_GKE.sum(2, keepdim=True)
    features_GKF = torch.cat((-2 * entries_GKE, squares_GKE), 2)
    num_groups, num_vectors, _ = x_GNE.shape
    index_GN = torch.empty(num_groups, num_vectors, dtype=torch.int64, device=x_GNE.device)
    for part in _chunks(num_groups, num_vectors, entries_GKE.shape[1]):
        x = x_GNE[part] - center_G1E[part[0]]
        weight = torch.ones_like(x[..., :1]) if weight_GNE is None else weight_GNE[part]
        features_GNF = torch.cat((weight * x, weight), 2)
        index_GN[part] = (features_GNF @ features_GKF[part[0]].mT).argmin(2)
    return index_GN


def means(
    x_GNE: Tensor, weight_GNE: Tensor | None, index_GN: Tensor, num_entries: int
) -> tuple[Tensor, Tensor]:
    """Weighted means of the vectors of each entry and their total weights, float64 [G, K, E]."""
    num_groups, _, num_elements = x_GNE.shape
    # Entries of all groups are numbered together, so that one bincount sums an element for all.
    place_GN = index_GN.cpu() + num_entries * torch.arange(num_groups)[:, None]
    weight = torch.ones_like(x_GNE[..., :1]) if weight_GNE is None else weight_GNE

    def total(values_GNE: Tensor) -> Tensor:
        columns = values_GNE.double().cpu().flatten(0, 1).unbind(1)
        size = num_groups * num_entries
        sums = [torch.bincount(place_GN.flatten(), v, size) for v in columns]
        return torch.stack(sums, 1).unflatten(0, (num_groups, num_entries)).to(x_GNE.device)

    mass_GKE = total(weight.expand(*index_GN.shape, -1))
    sums_GKE = total(weight * x_GNE)
    return sums_GKE / mass_GKE, mass_GKE.expand(-1, -1, num_elements)


def _chunks(num_groups: int, num_vectors: int, num_entries: int) -> Iterator[tuple[slice, slice]]:
    """Slices of groups and vectors with at most MAX_DISTANCES distances each."""
    at_a_time = max(1, MAX_DISTANCES // num_entries)
    if num_vectors <= at_a_time:
        step = at_a_time // num_vectors
        for g in range(0, num_groups, step):
            yield slice(g, g + step), slice(None)
    else:
        for g in range(num_groups):
            for n in range(0, num_vectors, at_a_time):
                yield slice(g, g + 1), slice(n, n + at_a_time)


def _errors(
    x_GNE: Tensor, weight_GNE: Tensor | None, entries_GKE: Tensor, index_GN: Tensor
) -> Tensor:
    """Weighted squared error of each vector, [G, N]."""
    place_GNE = index_GN[..., None].expand(-1, -1, x_GNE.shape[2])
    error_GNE = (x_GNE - entries_GKE.gather(1, place_GNE)) ** 2
    return (error_GNE if weight_GNE is None else weight_GNE * error_GNE).sum(2)


def _reseed(entries_GKE: Tensor, empty_GK: Tensor, x_GNE: Tensor, error_GN: Tensor) -> Tensor:
    """Every entry without vectors takes the place of one of the vectors with the largest errors."""
    # The i-th empty entry of a group takes its i-th worst vector, as far as there are so many.
    num = min(int(empty_GK.sum(1).max()), x_GNE.shape[1])
    worst_GW = error_GN.topk(num).indices
    number_GK = empty_GK.cumsum(1) - 1
    taken_GK = empty_GK & (number_GK < num)
    vector_GK = worst_GW.gather(1, number_GK.clamp(0, num - 1))
    vector_GKE = x_GNE.gather(1, vector_GK[..., None].expand(-1, -1, x_GNE.shape[2]))
    return torch.where(taken_GK[..., None], vector_GKE, entries_GKE)


def _plus_plus(
    x_GNE: Tensor, weight_GNE: Tensor, num_entries: int, generator: torch.Generator
) -> Tensor:
    """Vectors drawn one by one with probability proportional to their error so far."""
    num_groups, num_vectors, num_elements = x_GNE.shape
    uniform_GK = torch.rand(num_groups, num_entries, generator=generator, dtype=torch.float64)
    error_GN = (weight_GNE * torch.ones_like(x_GNE)).sum(2)
    nearest_GN = torch.full_like(error_GN, torch.inf)
    chosen = []
    for uniform_G in uniform_GK.unbind(1):
        # Inversion of the cumulative error draws the next entry. For the first one the errors are
        # the weights alone.
        cumulative_GN = error_GN.double().cumsum(1)
        threshold_G1 = uniform_G[:, None] * cumulative_GN[:, -1:]
        place_G1 = torch.searchsorted(cumulative_GN, threshold_G1, right=True)
        place_G1 = place_G1.clamp(max=num_vectors - 1)
        entry_G1E = x_GNE.gather(1, place_G1[..., None].expand(-1, -1, num_elements))
        chosen.append(entry_G1E)
        nearest_GN = torch.minimum(nearest_GN, (weight_GNE * (x_GNE - entry_G1E) ** 2).sum(2))
        error_GN = nearest_GN
    return torch.cat(chosen, 1)


def _by_mahalanobis_rank(x_GNE: Tensor, num_entries: int) -> Tensor:
    """Vectors at evenly spaced ranks of (x − mean)ᵀ Σ⁻¹ (x − mean), Σ the covariance."""
    # With Σ = M Mᵀ the distance is |M⁻¹ (x − mean)|².
    gap_GNE = (x_GNE - _mean(x_GNE)).double()
    num_groups, _, num_elements = x_GNE.shape
    covariance_GEE = torch.empty(num_groups, num_elements, num_elements, dtype=torch.float64)
    for e in range(num_elements):
        covariance_GEE[:, e] = _mean(gap_GNE * gap_GNE[..., e : e + 1])[:, 0].cpu()
    diagonal_GE = torch.diagonal(covariance_GEE, dim1=1, dim2=2)
    diagonal_GE += _RIDGE * diagonal_GE.mean(1, keepdim=True) + 1e-300
    factor_GEE = torch.linalg.cholesky(covariance_GEE).to(x_GNE.device)
    white_GEN = torch.linalg.solve_triangular(factor_GEE, gap_GNE.mT, upper=False)
    order_GN = white_GEN.square().sum(1).float().argsort(dim=1, stable=True)
    chosen_GK = order_GN[:, _even_ranks(x_GNE, num_entries)]
    return x_GNE.gather(1, chosen_GK[..., None].expand(-1, -1, num_elements))


def _even_ranks(x_GNE: Tensor, num_entries: int) -> Tensor:
    """`num_entries` ranks among N in the middle of intervals of equal length."""
    rank_K = (torch.arange(num_entries) * 2 + 1) * x_GNE.shape[1] // (2 * num_entries)
    return rank_K.to(x_GNE.device)


def _mean(x_GNE: Tensor) -> Tensor:
    """[G, 1, E], in the dtype of x."""
    everything_GN = torch.zeros(x_GNE.shape[:2], dtype=torch.int64)
    return means(x_GNE, None, everything_GN, 1)[0].to(x_GNE.dtype)
