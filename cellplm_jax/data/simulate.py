"""A tissue simulator with known ground truth.

Real tissue has no ground truth for cell types, batch effects or signalling between cells.
:func:`simulate_tissue` provides it: spatial domains with their own mixtures of cell types, marker programmes, batch
effects, ligand-receptor effects that depend on neighbouring cells, negative-binomial counts and dropout. The ground
truth is stored with the counts.
"""

from __future__ import annotations

import functools
import hashlib
import numbers
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cellplm_jax.data.bundled import pbmc3k
from cellplm_jax.errors import InputError

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["simulate_tissue"]

CELL_SPACING = 15.0
"""Typical distance between neighbouring cell centres, in micrometres."""

_GRADIENTS = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
"""Directions of the gradients of gradient genes, assigned round-robin."""

_GRADIENT_NAMES = ("+x", "-x", "+y", "-y")

_BLOCK = 1024
"""Number of cells per draw; fixed, because the stream of random numbers depends on it."""


@dataclass(frozen=True)
class _Plan:
    """Roles of the genes, as indices."""

    marker_type: np.ndarray  # [genes] cell type of the marker, -1 for none
    ligand: np.ndarray  # [pairs]
    receptor: np.ndarray  # [pairs]
    target: np.ndarray  # [pairs, targets]
    gradient: np.ndarray  # [gradient genes]


def simulate_tissue(
    *,
    cells: int = 2000,
    genes: int = 500,
    cell_types: int = 6,
    batches: int = 2,
    samples_spatial: bool = True,
    domains: int = 4,
    ligand_receptor_pairs: int = 4,
    library_size: float = 2000.0,
    dropout: float = 0.2,
    seed: int = 0,
    markers_per_type: int | None = None,
    marker_fold: float = 8.0,
    batch_strength: float = 0.25,
    dispersion: float = 3.0,
    targets_per_pair: int = 5,
    interaction_radius: float = 30.0,
    interaction_fold: float = 4.0,
    sender_activity: float = 0.3,
    gradient_genes: int = 0,
    gradient_fold: float = 8.0,
    keep_expected: bool = True,
) -> AnnData:
    """Simulate counts of a tissue with known cell types, domains, batch effects and signalling.

    Use it to test whether a method recovers the ground truth: a denoiser against ``layers["expected"]``, an embedding
    against ``obs["cell_type"]`` and ``obs["batch"]``, a spatial model against the target genes of the ligand-receptor
    pairs, which depend on neighbouring cells.

    Simulation steps:

    1. *Space.* Each batch is one section of the same tissue: cells on a jittered lattice of 15 micrometre spacing
       within a rounded outline, with the origin of the coordinates at the corner of its section. A Voronoi
       partition bent by smooth waves cuts the tissue into domains; the sections share it, as serial sections do.
    2. *Cell types.* Half of each domain's mixture consists of its home types, the rest is drawn from a flat Dirichlet
       distribution. Types are then drawn cell by cell.
    3. *Expression.* Genes have log-normal baselines (sd 1 on the log scale), types vary around them (sd .2), and
       marker genes are raised in their own type by a log-normal factor around ``marker_fold``.
    4. *Signalling.* For each pair, a fraction ``sender_activity`` of the sender cells is active and expresses the
       ligand (raised by ``marker_fold``); all receiver cells express the receptor. A receiver with ``n`` active senders
       within ``interaction_radius`` in its own section has the activation ``a = 1 - exp(-n)``, and each target gene is
       multiplied by ``interaction_fold ** a``. Receivers without such a neighbour are unchanged. In a tissue of more
       than one type the receiver is never the sender.
       ``gradient_genes`` others depend on the position of a cell only: from one side of a section to the other they
       change by ``gradient_fold``, increasing and decreasing along the first axis, then along the second.
    5. *Batches.* Each gene is multiplied by a log-normal factor per batch (sd ``batch_strength``), and each batch has
       a log-normal factor on the library size (same sd). Log-factors are centred over the batches, so one batch has
       no effect.
    6. *Counts.* A cell's rates are scaled to its library size (log-normal around ``library_size`` times the factor of
       the batch, sd .35); this is ``expected``. Counts are negative binomial with this mean ``mu`` and variance
       ``mu + mu**2 / dispersion`` of the gene.
    7. *Dropout.* Each non-zero count is lost with probability ``sigmoid(a - log(expected))``: weakly expressed genes
       are affected most. ``a`` is solved for, so that the average fraction of lost non-zero entries is ``dropout``.

    The same arguments give the same tissue on any machine with the same NumPy; each step has its own random stream,
    so that for example another ``dropout`` does not change cells, types and counts before dropout.

    Sets the following fields of the result:

    - ``X``: counts, CSR float32, shape ``[cells, genes]``; ``layers["counts_before_dropout"]``: the same before step 7.
    - ``layers["expected"]``: mean of the counts before dropout, dense float32, batch effects included (omitted with
      ``keep_expected=False``).
    - ``obs``: ``cell_type``, ``batch``, ``domain`` (categorical; categories in the order of the arrays in
      ``uns["truth"]``), ``library_size`` (row sum of ``expected``), ``n_signals`` (pairs by which the cell is
      activated).
    - ``obsm["spatial"]``: float32, micrometres, shape ``[cells, 2]``; with ``samples_spatial=False`` the cells are
      dissociated and their former positions are in ``obsm["true_position"]`` instead.
    - ``obsm["activation"]``: float32, shape ``[cells, pairs]``, the ``a`` of step 4, 0 for cells that are not
      receivers; ``obsm["active_sender"]``: bool, same shape. Both absent without pairs.
    - ``var``: ``ensembl_id`` (real human ids, the first ``genes`` of one fixed order, so that models with an Ensembl
      vocabulary can be applied; the genes' behaviour is invented), ``marker_of`` and ``target_of`` (name or ""),
      ``is_ligand``, ``is_receptor``, ``is_target``, ``gradient`` ("+x", "-x", "+y", "-y" or ""), ``dispersion``.
    - ``uns["truth"]``: ``domain_proportions`` ``[domains, types]``; ``log_programme`` ``[types, genes]`` (natural log
      of the relative rates of steps 3 and 4 without signalling; ligands as in inactive cells);
      ``batch_gene_factor`` ``[batches, genes]``; ``batch_library_factor`` ``[batches]``; ``dropout_intercept`` (the
      ``a`` of step 7); ``ligand_receptor``: a table with one row per pair (ligand, receptor, targets joined with
      commas, sender, receiver, fold, radius). ``uns["simulation"]``: the arguments.

    Args:
        cells: Number of cells over all batches, split evenly; from 1.
        genes: Number of genes.
        cell_types: Number of cell types.
        batches: Number of batches (tissue sections).
        samples_spatial: Whether the coordinates were measured.
        domains: Number of spatial domains. With very few cells some may be empty.
        ligand_receptor_pairs: Number of signalling pairs; 0 for none.
        library_size: Median counts per cell before dropout.
        dropout: Fraction of the non-zero counts that is lost, in [0, 1).
        seed: Seed of every random number.
        markers_per_type: Marker genes of each cell type; by default 20, or fewer if ``genes`` is small.
        marker_fold: Typical fold change of markers, and fold change of ligands and receptors.
        batch_strength: Standard deviation of the natural logs of the batch factors; 0 for none.
        dispersion: Median over genes of the negative binomial's inverse dispersion; larger is closer to Poisson.
        targets_per_pair: Genes that each signalling pair raises.
        interaction_radius: Range of a ligand, in micrometres.
        interaction_fold: Fold change of targets at full activation.
        sender_activity: Fraction of the sender cells that express the ligand.
        gradient_genes: Genes that follow a gradient across the tissue; 0 for none.
        gradient_fold: Their fold change from one side of a section to the other.
        keep_expected: Whether to store the dense ``expected`` layer, which limits the size of the tissue.

    Returns:
        The tissue as AnnData; cells of one batch are consecutive.

    Raises:
        InputError: An argument has the wrong type or is out of range, ``genes`` is too small for the markers and
            signalling genes, or larger than the number of Ensembl ids in the package.
    """
    # First statement of the function: later locals are not arguments.
    arguments = dict(locals())
    _check(arguments)
    import anndata
    import pandas as pd
    import scipy.sparse

    # The order of the streams is part of the result for a seed; new ones go to the end.
    names = ("space", "types", "programme", "signalling", "batches", "library", "counts", "dropout")
    streams = {
        name: np.random.default_rng(child)
        for name, child in zip(
            names,
            np.random.SeedSequence(seed).spawn(len(names)),
            strict=True,
        )
    }
    plan = _assign_genes(
        genes,
        cell_types,
        markers_per_type,
        ligand_receptor_pairs,
        targets_per_pair,
        gradient_genes,
    )
    identifiers = _ensembl_ids(genes)

    batch = np.repeat(np.arange(batches), _split_evenly(cells, batches))
    position, domain = _lay_out(streams["space"], batch, batches, domains)
    proportions = _domain_proportions(streams["types"], domains, cell_types)
    cell_type = _draw_types(streams["types"], proportions, domain)

    log_programme, inverse_dispersion = _gene_programmes(
        streams["programme"],
        plan,
        genes,
        cell_types,
        marker_fold,
        dispersion,
    )
    sender, receiver = _choose_pairs(proportions, domain, ligand_receptor_pairs)
    if ligand_receptor_pairs:
        log_programme[receiver, plan.receptor] += np.log(marker_fold)
    active, activation = _signal(
        streams["signalling"],
        position,
        batch,
        cell_type,
        sender,
        receiver,
        sender_activity,
        interaction_radius,
    )
    log_batch_gene = _centred_normal(streams["batches"], (batches, genes), batch_strength)
    log_batch_library = _centred_normal(streams["batches"], (batches,), batch_strength)
    slope = np.log(gradient_fold) * _GRADIENTS[np.arange(gradient_genes) % len(_GRADIENTS)]
    across = _across(position, batch)
    size = library_size * np.exp(
        log_batch_library[batch] + 0.35 * streams["library"].standard_normal(cells)
    )

    def expected_block(rows: slice) -> np.ndarray:
        log_rate = log_programme[cell_type[rows]] + log_batch_gene[batch[rows]]
        for pair in range(ligand_receptor_pairs):
            log_rate[:, plan.ligand[pair]] += np.log(marker_fold) * active[rows, pair]
            log_rate[:, plan.target[pair]] += (
                np.log(interaction_fold) * activation[rows, pair, None]
            )
        log_rate[:, plan.gradient] += across[rows] @ slope.T
        # Scaled after all effects, so that a strong signal lowers the other genes of the cell, as in real counts.
        rate = np.exp(log_rate)
        return rate * (size[rows] / rate.sum(axis=1))[:, None]

    blocks, means, expected = [], [], []
    for start in range(0, cells, _BLOCK):
        mean = expected_block(slice(start, start + _BLOCK))
        drawn = _negative_binomial(streams["counts"], mean, inverse_dispersion)
        block = scipy.sparse.csr_matrix(drawn.astype(np.float32))
        blocks.append(block)
        means.append(mean[drawn > 0])  # row by row, the order of block.data
        if keep_expected:
            expected.append(mean.astype(np.float32))
    before = scipy.sparse.csr_matrix(scipy.sparse.vstack(blocks, format="csr"))
    # One intercept for the tissue, which needs all means; but they are kept at the non-zero counts only.
    lost, intercept = _draw_dropout(streams["dropout"], np.concatenate(means), dropout)
    after = before.copy()
    after.data[lost] = 0.0
    after.eliminate_zeros()

    pair_names = [f"pair_{pair}" for pair in range(ligand_receptor_pairs)]
    width = len(str(max(genes - 1, 0)))
    gene_names = np.asarray([f"gene_{gene:0{width}d}" for gene in range(genes)], dtype=object)
    type_names, batch_names, domain_names = (
        np.asarray([f"{word}_{index}" for index in range(number)], dtype=object)
        for word, number in (("type", cell_types), ("batch", batches), ("domain", domains))
    )

    obs = pd.DataFrame(
        {
            "cell_type": pd.Categorical.from_codes(cell_type, type_names),  # pyright: ignore[reportArgumentType]
            "batch": pd.Categorical.from_codes(batch, batch_names),  # pyright: ignore[reportArgumentType]
            "domain": pd.Categorical.from_codes(domain, domain_names),  # pyright: ignore[reportArgumentType]
            "library_size": size.astype(np.float32),
            "n_signals": (activation > 0).sum(axis=1).astype(np.int32),
        },
        index=pd.Index([f"cell_{cell}" for cell in range(cells)], dtype=object),
    )
    marker_of = np.full(genes, "", dtype=object)
    is_marker = plan.marker_type >= 0
    marker_of[is_marker] = type_names[plan.marker_type[is_marker]]
    target_of = np.full(genes, "", dtype=object)
    for pair, name in enumerate(pair_names):
        target_of[plan.target[pair]] = name
    gradient = np.full(genes, "", dtype=object)
    gradient[plan.gradient] = np.resize(np.asarray(_GRADIENT_NAMES, dtype=object), gradient_genes)
    every = np.arange(genes)
    var = pd.DataFrame(
        {
            "ensembl_id": np.asarray(identifiers, dtype=object),
            "marker_of": marker_of,
            "target_of": target_of,
            "is_ligand": np.isin(every, plan.ligand),
            "is_receptor": np.isin(every, plan.receptor),
            "is_target": np.isin(every, plan.target),
            "gradient": gradient,
            "dispersion": inverse_dispersion.astype(np.float32),
        },
        index=pd.Index(gene_names, dtype=object),
    )
    ligand_receptor = pd.DataFrame(
        {
            "ligand": gene_names[plan.ligand],
            "receptor": gene_names[plan.receptor],
            "targets": np.asarray([",".join(gene_names[row]) for row in plan.target], dtype=object),
            "sender": type_names[sender],
            "receiver": type_names[receiver],
            "fold": np.full(len(pair_names), float(interaction_fold)),
            "radius": np.full(len(pair_names), float(interaction_radius)),
        },
        index=pd.Index(pair_names, dtype=object),
    )
    adata = anndata.AnnData(X=after, obs=obs, var=var)
    adata.layers["counts_before_dropout"] = before
    if keep_expected:
        adata.layers["expected"] = np.concatenate(expected)
    adata.obsm["spatial" if samples_spatial else "true_position"] = position.astype(np.float32)
    if pair_names:
        adata.obsm["activation"] = activation.astype(np.float32)
        adata.obsm["active_sender"] = active
    adata.uns["truth"] = {
        "domain_proportions": proportions,
        "log_programme": log_programme.astype(np.float32),
        "batch_gene_factor": np.exp(log_batch_gene).astype(np.float32),
        "batch_library_factor": np.exp(log_batch_library),
        "dropout_intercept": intercept,
        "ligand_receptor": ligand_receptor,
    }
    adata.uns["simulation"] = {
        name: value for name, value in arguments.items() if value is not None
    }
    return adata


def _check(arguments: dict[str, Any]) -> None:
    """Raise an error for invalid arguments."""

    def refuse(name: str, expected: str, remedy: str) -> None:
        raise InputError(f"{name}={arguments[name]!r}", expected, remedy)

    lowest = {
        "cells": 1,
        "genes": 1,
        "cell_types": 1,
        "batches": 1,
        "domains": 1,
        "ligand_receptor_pairs": 0,
        "targets_per_pair": 1,
        "gradient_genes": 0,
        "seed": 0,
        "markers_per_type": 0,
    }
    for name, low in lowest.items():
        value = arguments[name]
        if name == "markers_per_type" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or int(value) < low:
            refuse(name, f"an integer of at least {low}", f"Pass an int, {name}={max(low, 1)}")
        arguments[name] = int(value)
    ranges = {
        "library_size": (0.0, np.inf, False, 2000.0),
        "dropout": (0.0, 1.0, True, 0.2),
        "marker_fold": (0.0, np.inf, False, 8.0),
        "batch_strength": (0.0, np.inf, True, 0.25),
        "dispersion": (0.0, np.inf, False, 3.0),
        "interaction_radius": (0.0, np.inf, False, 30.0),
        "interaction_fold": (0.0, np.inf, False, 4.0),
        "gradient_fold": (0.0, np.inf, False, 8.0),
        # The bounds exclude the upper end; the next number above 1 includes 1.
        "sender_activity": (0.0, np.nextafter(1.0, 2.0), True, 0.3),
    }
    for name, (low, high, closed, default) in ranges.items():
        value = arguments[name]
        number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not number or not (low <= value < high) or (value == low and not closed):
            bound = "" if np.isinf(high) else " and not above 1" if high > 1 else " and below 1"
            refuse(
                name,
                f"a finite number {'of at least' if closed else 'above'} {low:g}{bound}",
                f"The default is {name}={default:g}",
            )
        arguments[name] = float(value)
    for name in ("samples_spatial", "keep_expected"):
        if not isinstance(arguments[name], bool | np.bool_):
            refuse(name, "True or False", f"Pass {name}=True or {name}=False")
        arguments[name] = bool(arguments[name])
    signalling = arguments["ligand_receptor_pairs"] * (2 + arguments["targets_per_pair"])
    gradient = arguments["gradient_genes"]
    wanted = arguments["markers_per_type"]
    markers = arguments["cell_types"] * (1 if wanted is None else wanted)
    needed = signalling + markers + gradient
    if arguments["genes"] < needed:
        sloping = f" and {gradient} that follow a gradient" if gradient else ""
        refuse(
            "genes",
            f"at least {needed}: {markers} marker genes for {arguments['cell_types']} cell types and "
            f"{signalling} signalling genes for {arguments['ligand_receptor_pairs']} ligand-receptor pairs{sloping}",
            "Ask for more genes, or fewer cell_types, markers_per_type, ligand_receptor_pairs or targets_per_pair",
        )


def _ensembl_ids(genes: int) -> list[str]:
    """Return the first ``genes`` human Ensembl ids of one fixed order."""
    pool = _expressed_ids()
    if genes > len(pool):
        from cellplm_jax.data.genes import load_human_table

        pool = pool + _in_fixed_order(set(load_human_table().symbols) - set(pool))
    if genes > len(pool):
        raise InputError(
            f"genes={genes}",
            f"up to {len(pool)}, the number of human genes with an Ensembl id in this package",
            f"Pass genes={len(pool)} or fewer",
        )
    return pool[:genes]


@functools.cache
def _expressed_ids() -> list[str]:
    """Return the Ensembl ids of the bundled PBMC3k data, those detected in at least 1 % of its cells first.

    Most vocabularies contain these genes; among all named human genes more than half are missing from them.
    """
    blood = pbmc3k()
    detected = np.bincount(blood.X.indices, minlength=blood.n_vars)  # pyright: ignore
    identifiers = blood.var["ensembl_id"].to_numpy(dtype=str)
    often = 100 * detected >= blood.n_obs
    return _in_fixed_order(identifiers[often]) + _in_fixed_order(identifiers[~often])


def _in_fixed_order(identifiers: Iterable[str]) -> list[str]:
    """Shuffle by hash, so that adding a gene to the table hardly changes the order."""
    return sorted(map(str, identifiers), key=lambda name: hashlib.sha256(name.encode()).digest())


def _split_evenly(cells: int, batches: int) -> np.ndarray:
    """Return batch sizes that differ by 0 or 1, larger ones first."""
    return cells // batches + (np.arange(batches) < cells % batches)


def _assign_genes(
    genes: int,
    cell_types: int,
    markers_per_type: int | None,
    pairs: int,
    targets: int,
    gradient_genes: int,
) -> _Plan:
    """Assign the genes: markers first, then ligand, receptor and targets of each pair, gradients, the rest."""
    signalling = pairs * (2 + targets)
    if markers_per_type is None:
        free = genes - signalling - gradient_genes
        markers_per_type = min(20, max(1, free // (2 * cell_types)))
    markers = cell_types * markers_per_type
    marker_type = np.full(genes, -1)
    marker_type[:markers] = np.repeat(np.arange(cell_types), markers_per_type)
    block = markers + np.arange(signalling).reshape(pairs, 2 + targets)
    gradient = markers + signalling + np.arange(gradient_genes)
    return _Plan(
        marker_type,
        block[:, 0],
        block[:, 1],
        block[:, 2:],
        gradient,
    )


def _lay_out(
    rng: np.random.Generator,
    batch: np.ndarray,
    batches: int,
    domains: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Place the cells of each section and assign their domains.

    Returns:
        Positions ``[cells, 2]`` in micrometres from the corner of the section, and domains ``[cells]``.
    """
    # Work in units of the unit disc. Lloyd's iterations distribute the domain centres evenly.
    # Rejection sampling of the unit disc.
    sample = rng.uniform(-1, 1, size=(4096, 2))
    sample = sample[(sample**2).sum(axis=1) <= 1]
    centre = sample[rng.choice(len(sample), size=domains, replace=domains > len(sample))]
    for _ in range(8):
        nearest = _nearest(sample, centre)
        for index in range(domains):
            if (nearest == index).any():
                centre[index] = sample[nearest == index].mean(axis=0)
    phase = rng.uniform(0, 2 * np.pi, size=(2, 2))
    outline = rng.uniform(0, 2 * np.pi, size=2)

    position = np.zeros((len(batch), 2))
    domain = np.zeros(len(batch), dtype=np.int64)
    for section in range(batches):
        rows = np.flatnonzero(batch == section)
        if not len(rows):
            continue
        # Large enough for the outline in every direction; the surplus is cut off below.
        half = int(np.ceil(0.8 * np.sqrt(len(rows)))) + 1
        column, row = np.meshgrid(np.arange(-half, half + 1.0), np.arange(-half, half + 1.0))
        # Hexagonal: every second row is shifted by half a spacing.
        lattice = np.stack([column + 0.5 * (row % 2), row * np.sqrt(0.75)], axis=-1).reshape(-1, 2)
        lattice = lattice + rng.normal(0, 0.18, size=lattice.shape)
        angle = np.arctan2(lattice[:, 1], lattice[:, 0])
        wave = 1 + 0.10 * np.sin(2 * angle + outline[0]) + 0.05 * np.sin(3 * angle + outline[1])
        # The nearest to the centre, measured by the outline, so that exactly the wanted number of cells is inside.
        inside = np.argsort(np.hypot(lattice[:, 0], lattice[:, 1]) / wave, kind="stable")
        placed = lattice[np.sort(inside[: len(rows)])]
        # Otherwise the order of the cells would reveal their position.
        placed = placed[rng.permutation(len(rows))]
        unit = placed / max(np.hypot(placed[:, 0], placed[:, 1]).max(), 1.0)
        # Borders of a Voronoi partition are straight; real ones are not.
        bent = (
            unit
            + 0.13 * np.sin(3.2 * unit[:, ::-1] + phase[0])
            + 0.05 * np.sin(7 * unit + phase[1])
        )
        domain[rows] = _nearest(bent, centre)
        position[rows] = (placed - placed.min(axis=0)) * CELL_SPACING
    return position, domain


def _across(position: np.ndarray, batch: np.ndarray) -> np.ndarray:
    """Return ``[cells, 2]``: position of a cell in its own section, about -.5 to .5 along its longer side."""
    across = np.zeros_like(position)
    for section in np.unique(batch):
        rows = batch == section
        low = position[rows].min(axis=0)
        high = position[rows].max(axis=0)
        across[rows] = (position[rows] - (low + high) / 2) / max((high - low).max(), 1e-12)
    return across


def _nearest(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Index of the nearest centre of each point."""
    from scipy.spatial import KDTree

    return np.asarray(KDTree(centres).query(points)[1], dtype=np.int64)


def _domain_proportions(rng: np.random.Generator, domains: int, cell_types: int) -> np.ndarray:
    """Return the mixture of cell types per domain ``[domains, types]``: half own types, half Dirichlet."""
    home = np.zeros((domains, cell_types))
    # Every domain has a home type, and every type a home domain.
    for index in range(max(domains, cell_types)):
        home[index % domains, index % cell_types] = 1.0
    home /= home.sum(axis=1, keepdims=True)
    return 0.5 * home + 0.5 * rng.dirichlet(np.ones(cell_types), size=domains)


def _draw_types(
    rng: np.random.Generator,
    proportions: np.ndarray,
    domain: np.ndarray,
) -> np.ndarray:
    """Draw the type of each cell from the mixture of its domain."""
    cumulative = proportions.cumsum(axis=1)[domain]
    uniform = rng.uniform(size=(len(domain), 1))
    # The last cumulative sum can be below 1 by rounding.
    return np.minimum((uniform >= cumulative).sum(axis=1), proportions.shape[1] - 1)


def _gene_programmes(
    rng: np.random.Generator,
    plan: _Plan,
    genes: int,
    cell_types: int,
    marker_fold: float,
    dispersion: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Log relative rate of each gene in each type ``[types, genes]`` and inverse dispersions ``[genes]``."""
    baseline = rng.standard_normal(genes)
    marked = np.concatenate([plan.ligand, plan.receptor, plan.target.ravel(), plan.gradient])
    baseline[marked] = np.abs(
        baseline[marked]
    )  # genes with a spatial role are never among the weakest
    log_programme = baseline + 0.2 * rng.standard_normal((cell_types, genes))
    fold = np.log(marker_fold) + 0.2 * rng.standard_normal(genes)
    marker = np.flatnonzero(plan.marker_type >= 0)
    log_programme[plan.marker_type[marker], marker] += fold[marker]
    return log_programme, dispersion * np.exp(0.4 * rng.standard_normal(genes))


def _choose_pairs(
    proportions: np.ndarray,
    domain: np.ndarray,
    pairs: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Choose sender and receiver types: receivers round-robin, each with its most frequent neighbour."""
    domains, cell_types = proportions.shape
    share = np.bincount(domain, minlength=domains) / len(domain)
    meeting = np.einsum("d,ds,dr->sr", share, proportions, proportions)
    if cell_types > 1:
        # A type is never its own partner.
        np.fill_diagonal(meeting, -1.0)
    sender = np.zeros(pairs, dtype=np.int64)
    receiver = np.arange(pairs) % cell_types
    ranked = np.argsort(-meeting, axis=0, kind="stable")  # senders of each receiver, best first
    partners = max(cell_types - 1, 1)
    for pair in range(pairs):
        # Once every type was a receiver, the next round takes the second most frequent partner.
        sender[pair] = ranked[(pair // cell_types) % partners, receiver[pair]]
    return sender, receiver


def _signal(
    rng: np.random.Generator,
    position: np.ndarray,
    batch: np.ndarray,
    cell_type: np.ndarray,
    sender: np.ndarray,
    receiver: np.ndarray,
    sender_activity: float,
    radius: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Return active senders (bool) and activation of receivers (float), both ``[cells, pairs]``."""
    from scipy.spatial import KDTree

    shape = (len(cell_type), len(sender))
    active = (cell_type[:, None] == sender) & (rng.uniform(size=shape) < sender_activity)
    activation = np.zeros(shape)
    for pair in range(len(sender)):
        for section in np.unique(batch):
            sources = np.flatnonzero(active[:, pair] & (batch == section))
            listeners = np.flatnonzero((cell_type == receiver[pair]) & (batch == section))
            if not len(sources) or not len(listeners):
                continue
            # Per section: coordinates of sections overlap.
            tree = KDTree(position[sources])
            number = tree.query_ball_point(position[listeners], radius, return_length=True)
            number = number - active[listeners, pair]  # a cell is not its own neighbour
            activation[listeners, pair] = -np.expm1(-number)
    return active, activation


def _centred_normal(rng: np.random.Generator, shape: tuple[int, ...], sd: float) -> np.ndarray:
    """Draw normal values with the given sd, centred over the first axis (0 if it has length 1)."""
    value = sd * rng.standard_normal(shape)
    return value - value.mean(axis=0)


def _negative_binomial(
    rng: np.random.Generator,
    mean: np.ndarray,
    inverse_dispersion: np.ndarray,
) -> np.ndarray:
    """Draw negative binomial counts as a Poisson variable with a gamma rate (variance mu + mu^2 / theta)."""
    return rng.poisson(mean * rng.gamma(inverse_dispersion, size=mean.shape) / inverse_dispersion)


def _draw_dropout(
    rng: np.random.Generator,
    mean: np.ndarray,
    dropout: float,
) -> tuple[np.ndarray, float]:
    """Choose the non-zero entries that are lost, with average probability ``dropout``.

    Returns:
        A mask over the entries and the intercept of the logistic curve (``-inf`` without dropout).
    """
    uniform = rng.uniform(size=len(mean))
    if dropout == 0.0 or not len(mean):
        return np.zeros(len(mean), dtype=bool), -np.inf
    log_mean = np.log(mean)
    # At these two ends every entry is lost with less, or more, than the wanted probability.
    odds = np.log(dropout) - np.log1p(-dropout)
    low = odds + log_mean.min()
    high = odds + log_mean.max()
    for _ in range(60):
        middle = 0.5 * (low + high)
        if _logistic(middle - log_mean).mean() < dropout:
            low = middle
        else:
            high = middle
    intercept = 0.5 * (low + high)
    return uniform < _logistic(intercept - log_mean), float(intercept)


def _logistic(value: np.ndarray) -> np.ndarray:
    """Logistic function."""
    from scipy.special import expit

    return expit(value)
