"""Detection of cells of unknown type: which cells of a file are like none of the labelled cells of a fit.

Cells are compared in one space that is fitted to the labelled cells: the linear part of the pretrained model's
zero-shot latent, joined with the principal components of the labelled cells. Three quantities are added:

- **distance** to the nearest labelled cells,
- **energy** of a logistic regression on that space (minus the log of the summed exponential logits; Liu et al. 2020),
- **share** of the file's cells among the nearest cells of both: a type without labelled cells has neighbours from the
  file only (semi-supervised novelty detection; Blanchard et al. 2010). Neighbouring subtypes are found by it.

Each is averaged over neighbouring cells and standardized by the labelled cells of the predicted type, whose energies
are cross-validated and whose neighbours exclude themselves. The threshold is cross-validated: a detector is fitted to
each half of the labelled cells, space included, and compares the other half.
Recipe and weights were chosen on other data sets than those of the benchmark (``benchmarks/unknown``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse
from scipy.special import logsumexp, softmax

from cellplm_jax.evaluate.components import (
    OWN_CLIP,
    dispersed_genes,
    log_normalized,
    principal_components,
    unit_length,
)
from cellplm_jax.evaluate.inputs import column_means
from cellplm_jax.tasks.annotation_pool import neighbor_votes
from cellplm_jax.train.linear import LinearClassifier, fit_linear_classifier

REFERENCE_CELLS = 4000
"""Maximum number of labelled cells that are stored, and of cells that are compared with them at once."""

MINIMUM_CELLS = 50
"""Minimum number of labelled cells."""

GENES, COMPONENTS, COMPONENT_LENGTH = 2000, 50, 0.7
"""Highly variable genes, their principal components, and the length of these next to a latent of length 1."""

CELLS_PER_COMPONENT = 10
"""Minimum number of labelled cells per principal component."""

COMPONENT_FOLDS = 5
"""Parts of the labelled cells; each is projected on components of the others."""

NEIGHBORS, NEAREST = 30, 10
"""Number of neighbours of the share, and of the nearest labelled cells of the distance."""

FOLDS, SHARPNESS, ITERATIONS = 3, 8.0, 60
"""Folds of the energies; scale of the features of the logistic regression, and its maximum number of iterations."""

WEIGHTS = {"energy": 1.0, "distance": 0.5, "share": 1.0}
"""Weights of the standardized quantities."""

OWN_CENTRE_CELLS, SHRINK_CELLS, SMALLEST_SPREAD = 5, 20.0, 0.3
"""Minimum number of cells of a type for its own median; number at which its own spread weighs as much as that of all
types; smallest spread relative to that of all types."""

RAISE = 2.2
"""Distance of the threshold from the median, relative to that of the quantile of known cells.

Known cells next to a group of unknown ones are raised with it; with 1, about 12 % of the known cells of a file with an
unknown type are flagged at a rate of 5 %, with this value 4 % (five validation sets).
"""

SHIFT, SHIFT_CELLS = 0.1, 10
"""Quantile of the share that is taken as a difference between files, if a type has that number of cells."""

FAR, BETWEEN = "far from all labelled cells", "between {} and {}"
APART = "separate from the labelled {}"
"""Reasons."""

FAR_QUANTILE, BETWEEN_SECOND = 0.99, 0.2
"""Quantile of the labelled cells' distances beyond which a cell is far; second probability of a cell between types."""


@dataclass(frozen=True, eq=False)
class Unknown:
    """Result for some cells.

    Attributes:
        score: float32 [cells]; above 0: unknown at the chosen rate.
        flagged: bool [cells].
        reason: str [cells], object array; "" for known cells.
    """

    score: np.ndarray
    flagged: np.ndarray
    reason: np.ndarray


class UnknownDetector:
    """Compares cells with labelled cells. Use :meth:`fit` to create one.

    Attributes:
        arrays: The state, for saving: map to the space, coordinates of the labelled cells, their classes and
            cross-validated energies, the logistic regressions of the folds, and the scores of known cells.
    """

    def __init__(self, arrays: dict[str, np.ndarray]):
        self.arrays = arrays
        self._reference = np.asarray(arrays["reference"], np.float32)
        self._codes = np.asarray(arrays["codes"], np.int64)
        self._energy = np.asarray(arrays["energy"], np.float64)
        kernels = zip(arrays["kernels"], arrays["biases"], strict=True)
        self._classifiers = [LinearClassifier(kernel, bias) for kernel, bias in kernels]

    @classmethod
    def fit(
        cls,
        counts: sparse.csr_matrix,
        codes: np.ndarray,
        classes: int,
        *,
        latent: np.ndarray | None = None,
        seed: int = 0,
    ) -> UnknownDetector | None:
        """Fit to labelled cells.

        Args:
            counts: CSR [cells, genes], raw counts.
            codes: int [cells], classes.
            classes: Number of classes.
            latent: float [genes, dimensions], linear map from log-normalized expression to a latent; None: principal
                components only.
            seed: Seed of the selection and of the folds.

        Returns:
            The detector; None with too few cells or genes that vary.
        """
        generator = np.random.default_rng(seed)
        # Comparisons are quadratic in the cells, hence a limit that keeps rare types.
        chosen = _stratified(codes, REFERENCE_CELLS, generator)
        if len(chosen) < MINIMUM_CELLS:
            return None
        codes = codes[chosen]
        logs = log_normalized(sparse.csr_matrix(counts[chosen]))
        state = _fit_state(logs, codes, classes, latent, generator)
        if state is None:
            return None
        null = np.zeros(len(codes), np.float32)
        first = generator.permuted(np.arange(len(codes)) % 2).astype(bool)
        for half in (first, ~first):
            part = _fit_state(logs[half], codes[half], classes, latent, generator)
            if part is None:
                return None
            # Scores of known cells that the detector has not seen, space included.
            null[~half] = cls(part)._scores(_project(logs[~half], part))[0]
        return cls(state | {"null": null})

    def project(self, counts: sparse.csr_matrix) -> np.ndarray:
        """Return the coordinates of cells, float32 [cells, dimensions], from their raw counts [cells, genes]."""
        return _project(log_normalized(counts), self.arrays)

    def compare(self, cells: np.ndarray, labels: list[str], *, rate: float) -> Unknown:
        """Compare cells of one file with the labelled cells.

        Args:
            cells: float32 [cells, dimensions], from :meth:`project`. More than ``REFERENCE_CELLS`` are assigned to
                groups round-robin.
            labels: Name of each class, for the reasons.
            rate: Share of known cells that may be flagged.

        Returns:
            Scores, flags and reasons, in the order of the cells.
        """
        score = np.zeros(len(cells), np.float32)
        reason = np.full(len(cells), "", object)
        groups = -(-len(cells) // REFERENCE_CELLS)
        for number in range(groups):
            part = slice(number, None, groups)
            score[part], reason[part] = self._compare(cells[part], labels, rate)
        return Unknown(score, score > 0, reason)

    def votes(self, cells: np.ndarray, classes: int) -> np.ndarray:
        """Return the label transfer from the nearest labelled cells, float64 [cells, classes]."""
        return neighbor_votes(self._reference, self._codes, cells, classes)

    def _scores(self, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return scores and their relative spreads, distances [labelled cells and cells], and logits of cells."""
        # The classifiers of the folds, whose energies of cells outside their folds are the standard.
        each = np.stack([_logits(found, cells) for found in self._classifiers])
        logits = each.mean(axis=0)
        known = len(self._codes)
        total, wider, distance, _ = _totals(
            np.concatenate([self._reference, np.asarray(cells, np.float32)]),
            known,
            np.concatenate([self._energy, -logsumexp(each, axis=2).mean(axis=0)]),
            np.concatenate([self._codes, logits.argmax(axis=1)]),
            self.arrays["share_spread"],
        )
        return total, wider, distance, logits

    def _compare(
        self,
        cells: np.ndarray,
        labels: list[str],
        rate: float,
    ) -> tuple[np.ndarray, np.ndarray]:
        codes = self._codes
        known = len(self._codes)
        total, wider, distance, logits = self._scores(cells)
        middle, limit = np.quantile(self.arrays["null"], [0.5, 1.0 - rate])
        threshold = float(middle + RAISE * max(0.0, limit - middle))
        # A cell with few neighbours in its file, as in a file of few cells, has a score of few averaged values, which
        # varies more than those that the threshold comes from.
        score = (middle + (total - middle) / wider - threshold).astype(np.float32)
        reason = np.full(len(cells), "", object)
        limit = np.array(
            [
                np.quantile(distance[:known][codes == code], FAR_QUANTILE)
                if (codes == code).any()
                else np.inf
                for code in range(len(labels))
            ]
        )
        probability = softmax(logits, axis=1)
        order = np.argsort(-probability, axis=1)
        for cell in np.flatnonzero(score > 0):
            first, second = order[cell, :2]
            if distance[known + cell] > limit[first]:
                reason[cell] = FAR
            elif probability[cell, second] >= BETWEEN_SECOND:
                reason[cell] = BETWEEN.format(labels[first], labels[second])
            else:
                reason[cell] = APART.format(labels[first])
        return score, reason


def _fit_state(
    logs: sparse.csr_matrix,
    codes: np.ndarray,
    classes: int,
    latent: np.ndarray | None,
    generator: np.random.Generator,
) -> dict[str, np.ndarray] | None:
    """Return the state without the threshold; None without genes that vary."""
    space = _fit_space(logs, latent)
    if space is None:
        return None
    state, reference = space
    fold = _folds(codes, generator)
    energy = np.zeros(len(codes))
    guess = np.zeros(len(codes), np.int64)
    classifiers = []
    for number in range(FOLDS):
        out = fold == number
        found = _classify(reference[~out], codes[~out], classes)
        logits = _logits(found, reference[out])
        energy[out], guess[out] = -logsumexp(logits, axis=1), logits.argmax(axis=1)
        classifiers.append(found)
    return state | {
        "reference": reference.astype(np.float16),
        "codes": codes.astype(np.int32),
        "energy": energy.astype(np.float32),
        "kernels": np.stack([found.kernel for found in classifiers]),
        "biases": np.stack([found.bias for found in classifiers]),
        "share_spread": _share_spread(reference, codes, energy, guess, classes, generator),
    }


def _fit_space(
    logs: sparse.csr_matrix, latent: np.ndarray | None
) -> tuple[dict[str, np.ndarray], np.ndarray] | None:
    """Return the map to the space, of latent and components, and the coordinates of these cells."""
    cells = logs.shape[0]
    level = logs.copy()
    level.data = np.expm1(level.data)
    mean = column_means(logs)
    square = column_means(logs.multiply(logs))
    height = column_means(level)
    power = column_means(level.multiply(level))
    variance = np.maximum(square - mean**2, 0)
    scatter = np.maximum(power - height**2, 0) * cells / max(cells - 1, 1)
    genes = dispersed_genes(height, np.where(variance > 1e-12, scatter, 0), GENES)
    if len(genes) < 2:
        return None
    state: dict[str, np.ndarray] = {
        "genes": genes.astype(np.int32),
        "mean": mean[genes].astype(np.float32),
        "deviation": np.sqrt(variance[genes]).astype(np.float32),
    }
    standard = _standard(logs, state)
    # Few cells fix few components: more would describe these cells alone.
    number = min(COMPONENTS, max(2, cells // CELLS_PER_COMPONENT), len(genes) - 1)
    # Labelled cells are projected on components that other labelled cells fix, as new cells are: otherwise components
    # that are noise set them apart from all new cells.
    own = np.zeros((cells, number), np.float32)
    rotated = []
    for part in range(COMPONENT_FOLDS):
        out = np.arange(cells) % COMPONENT_FOLDS == part
        rest = standard[~out]
        loadings, _ = principal_components(lambda rest=rest: [rest], len(genes), number, passes=4)
        if rotated:
            # Procrustes: components of the folds are rotated onto those of the first, so that they can be averaged.
            left, _, right = np.linalg.svd((standard @ loadings).T @ (standard @ rotated[0]))
            loadings = loadings @ (left @ right)
        rotated.append(loadings)
        own[out] = standard[out] @ loadings
    state["loadings"] = np.mean(rotated, axis=0).astype(np.float32)
    state["component_centre"] = own.mean(axis=0)
    hidden = None
    if latent is not None:
        # Half the size when saved.
        state["latent"] = np.asarray(latent, np.float16)
        hidden = logs @ state["latent"].astype(np.float32)
        state["latent_centre"] = hidden.mean(axis=0).astype(np.float32)
    return state, _joined(own, hidden, state)


def _standard(logs: sparse.csr_matrix, state: dict[str, np.ndarray]) -> np.ndarray:
    dense = (logs[:, state["genes"]].toarray() - state["mean"]) / state["deviation"]
    return np.clip(dense, -OWN_CLIP, OWN_CLIP, out=dense)


def _project(logs: sparse.csr_matrix, state: dict[str, np.ndarray]) -> np.ndarray:
    """Return float32 [cells, dimensions]."""
    own = _standard(logs, state) @ state["loadings"]
    hidden = logs @ state["latent"].astype(np.float32) if "latent" in state else None
    return _joined(own, hidden, state)


def _joined(
    own: np.ndarray,
    hidden: np.ndarray | None,
    state: dict[str, np.ndarray],
) -> np.ndarray:
    """Return components and latent side by side, centred and scaled per cell."""
    own = unit_length(own - state["component_centre"])
    if hidden is None:
        return own.astype(np.float32)
    hidden = unit_length(hidden - state["latent_centre"])
    return np.hstack([hidden, COMPONENT_LENGTH * own]).astype(np.float32)


def _stratified(codes: np.ndarray, limit: int, generator: np.random.Generator) -> np.ndarray:
    """Return int: all cells, or at most ``limit`` with the same largest number per class."""
    sizes = np.bincount(codes)
    quota = int(sizes.max())
    if len(codes) > limit:
        # The largest number per class with which the total stays within the limit.
        options = np.arange(1, quota + 1)
        totals = np.minimum(sizes[None], options[:, None]).sum(axis=1)
        quota = max(1, int((totals <= limit).sum()))
    kept = [
        generator.permutation(np.flatnonzero(codes == code))[:quota] for code in range(len(sizes))
    ]
    return np.sort(np.concatenate(kept))


def _folds(codes: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return int [cells]: the fold of each cell, stratified by class."""
    fold = np.zeros(len(codes), int)
    for code in np.unique(codes):
        members = generator.permutation(np.flatnonzero(codes == code))
        fold[members] = np.arange(len(members)) % FOLDS
    return fold


def _classify(cells: np.ndarray, codes: np.ndarray, classes: int) -> LinearClassifier:
    features = sparse.csr_matrix(cells * SHARPNESS)
    return fit_linear_classifier(features, codes, classes, iterations=ITERATIONS)


def _logits(classifier: LinearClassifier, cells: np.ndarray) -> np.ndarray:
    return (cells * SHARPNESS) @ classifier.kernel.astype(np.float64) + classifier.bias


def _share_spread(
    reference: np.ndarray,
    codes: np.ndarray,
    energy: np.ndarray,
    guess: np.ndarray,
    classes: int,
    generator: np.random.Generator,
) -> np.ndarray:
    """Return the spread of the share per class, float32 [classes], between halves of the labelled cells."""
    first = generator.permuted(np.arange(len(codes)) % 2).astype(bool)
    order = np.concatenate([np.flatnonzero(first), np.flatnonzero(~first)])
    known = int(first.sum())
    predicted = np.concatenate([codes[first], guess[~first]])
    share = _totals(reference[order], known, energy[order], predicted, None)[3]
    overall = float(share.std()) + 1e-9
    spread = np.full(classes, overall)
    for code in range(classes):
        own = share[codes[order] == code]
        weight = len(own) / (len(own) + SHRINK_CELLS)
        if len(own):
            spread[code] = weight * own.std() + (1 - weight) * overall
    return np.maximum(spread, SMALLEST_SPREAD * overall).astype(np.float32)


def _totals(
    every: np.ndarray,
    known: int,
    energy: np.ndarray,
    predicted: np.ndarray,
    share_spread: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return scores and their relative spreads of the cells after the labelled ones; distances and shares of all.

    Args:
        every: float32 [cells, dimensions], the labelled cells first.
        known: Number of labelled cells.
        energy: float [cells].
        predicted: int [cells], classes.
        share_spread: float [classes], of a share of one half; None: that of these labelled cells.
    """
    nearest, distance = _neighbors(every, known)
    own = np.arange(len(every)) < known
    # Averages over the neighbours of the same file, so that a group of cells is judged together.
    same = np.column_stack([np.ones(len(every), bool), own[nearest] == own[:, None]])
    around = np.column_stack([np.arange(len(every)), nearest])

    def smooth(values: np.ndarray) -> np.ndarray:
        return (values[around] * same).sum(axis=1) / same.sum(axis=1)

    total = np.zeros(len(every) - known)
    wider = np.zeros(len(every) - known)
    for name, values in (("energy", energy), ("distance", distance)):
        smoothed = smooth(values)
        total += WEIGHTS[name] * _standardized(smoothed, predicted, known)
        wider += WEIGHTS[name] * _wider(values, smoothed, same.sum(axis=1), predicted, known)
    wider /= WEIGHTS["energy"] + WEIGHTS["distance"]
    share = smooth((~own)[nearest].mean(axis=1))
    # A file with fewer cells than neighbours cannot fill a neighbourhood, and a single cell is no neighbour of itself.
    evidence = min(1.0, max(0, len(total) - 1) / NEIGHBORS)
    total += (evidence * WEIGHTS["share"]) * _standardized(
        share,
        predicted,
        known,
        shifted=True,
        spread_of=share_spread,
    )
    return total, wider, distance, share


def _neighbors(every: np.ndarray, known: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the nearest cells of each cell, int [cells, neighbours], and the mean distance to labelled cells.

    Args:
        every: float32 [cells, dimensions], the labelled cells first.
        known: Number of labelled cells.
    """
    near = min(NEIGHBORS, len(every) - 1)
    closest = min(NEAREST, known - 1)
    square = np.einsum("ij,ij->i", every, every)
    nearest = np.zeros((len(every), near), np.int64)
    distance = np.zeros(len(every))
    # In blocks: the matrix of all distances would have 64 million entries.
    for start in range(0, len(every), 1024):
        rows = np.arange(start, min(start + 1024, len(every)))
        squared = square[rows, None] + square[None] - 2.0 * every[rows] @ every.T
        # A cell is not its own neighbour.
        squared[np.arange(len(rows)), rows] = np.inf
        nearest[rows] = np.argpartition(squared, near - 1, axis=1)[:, :near]
        labelled = np.partition(squared[:, :known], closest - 1, axis=1)[:, :closest]
        distance[rows] = np.sqrt(np.maximum(labelled, 0.0)).mean(axis=1)
    return nearest, distance


def _standardized(
    values: np.ndarray,
    predicted: np.ndarray,
    known: int,
    *,
    shifted: bool = False,
    spread_of: np.ndarray | None = None,
) -> np.ndarray:
    """Centre and scale by the labelled cells of each predicted type; spreads are shrunken towards that of all types.

    Args:
        values: float [cells], the labelled cells first.
        predicted: int [cells], classes.
        known: Number of labelled cells.
        shifted: A type whose lowest values are higher in the file than among the labelled cells is centred at the
            file's: all its cells differ, as between batches or compositions, and none differs from the rest.
        spread_of: Spread per class of a share of one half, scaled here to the share at the centre.

    Returns:
        float [cells - known].
    """
    reference = values[:known]
    middle = float(np.median(reference))
    result = np.zeros(len(values) - known)
    for code in np.unique(predicted[known:]):
        members = predicted == code
        labelled = members[:known]
        others = members[known:]
        own = reference[labelled]
        rest = values[known:][others]
        centre = float(np.median(own)) if len(own) >= OWN_CENTRE_CELLS else middle
        scale = _spread(reference, labelled)
        if spread_of is not None:
            scale = float(spread_of[code]) * 2 * np.sqrt(np.clip(centre * (1 - centre), 0.01, 0.25))
        if shifted and len(rest) >= SHIFT_CELLS and len(own):
            # Only upwards: a file whose cells are closer than the labelled ones is no reason to flag more of them.
            centre += max(0.0, float(np.quantile(rest, SHIFT)) - float(np.quantile(own, SHIFT)))
        result[others] = (rest - centre) / scale
    return result


def _wider(
    single: np.ndarray,
    smoothed: np.ndarray,
    averaged: np.ndarray,
    predicted: np.ndarray,
    known: int,
) -> np.ndarray:
    """Return the spread of averages of few values, relative to those of the labelled cells: float [cells - known].

    Args:
        single: float [cells], values before averaging, the labelled cells first.
        smoothed: float [cells], their averages.
        averaged: int [cells], number of values in each average.
        predicted: int [cells], classes.
        known: Number of labelled cells.

    Returns:
        From 1, for as many values as those of the labelled cells, to the ratio of both spreads, for one value.
    """
    part = 1.0 / averaged
    result = np.ones(len(single) - known)
    for code in np.unique(predicted[known:]):
        labelled = predicted[:known] == code
        others = predicted[known:] == code
        typical = float(part[:known][labelled if labelled.any() else slice(None)].mean())
        more = np.maximum(part[known:][others] - typical, 0.0) / max(1.0 - typical, 1e-9)
        ratio = max(1.0, _spread(single[:known], labelled) / _spread(smoothed[:known], labelled))
        result[others] = np.sqrt(1.0 + more * (ratio**2 - 1.0))
    return result


def _spread(reference: np.ndarray, own: np.ndarray) -> float:
    """Return the standard deviation of selected labelled cells, shrunken towards that of all, and at least a part."""
    overall = float(reference.std()) + 1e-9
    if not own.any():
        return overall
    weight = own.sum() / (own.sum() + SHRINK_CELLS)
    mixed = weight * float(reference[own].std()) + (1 - weight) * overall
    return max(mixed, SMALLEST_SPREAD * overall)


def latent_map(config: Any, params: dict[str, Any]) -> np.ndarray | None:
    """Return the linear map from log-normalized expression to the zero-shot latent, float32 [genes, latent].

    Args:
        config: Architecture, a ``ModelConfig``.
        params: Its parameters.

    Returns:
        The product of gene embedding and latent mean; None for a model without a projection.
    """
    if config.trunk != "projection" or "mean" not in params.get("latent", {}):
        return None
    table = np.asarray(params["embedder"]["gene_embedding"], np.float32)
    return table @ np.asarray(params["latent"]["mean"]["kernel"], np.float32)
