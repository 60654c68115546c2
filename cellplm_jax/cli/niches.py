"""Command ``niches``: spatial domains, their composition, and which cell types meet."""

from __future__ import annotations

import argparse
from typing import Any

from cellplm_jax.cli.embedding import add_adapt
from cellplm_jax.cli.options import add_counts, add_options, add_output, command, passed_options
from cellplm_jax.cli.output import check_new_file, number_of, print_result, write_page

OPTIONS = (
    "spatial_key",
    "batch_key",
    "n_niches",
    "label_key",
    "shells",
    "neighbors",
    "resolution",
    "use_rep",
    "adapt",
    "layer",
    "gene_key",
    "feature_type",
    "permutations",
    "key_added",
    "seed",
)
"""Options of the command that are options of the function."""

MEETINGS = 3
"""Number of pairs of cell types that are printed."""


def add_niches(commands: Any) -> None:
    """Add ``niches``."""
    parser = command(
        commands,
        "niches",
        _niches,
        "find spatial domains: embed every cell with its neighbours in the tissue, and cluster",
        "cellplm niches tissue.h5ad --model small --out niches.h5ad --batch-key section --report niches.html",
    )
    add_options(
        parser,
        """
        input IN.h5ad: raw counts with coordinates
        --model M: model for embedding, unless --use-rep is set
        --out! OUT.h5ad: the input plus niches
        --batch-key K: column of obs with the tissue section; never connected
        """,
    )
    add_counts(parser)
    add_options(
        parser,
        """
        --n-niches N: number of niches (that of Leiden clusters)
        --resolution F: Leiden resolution of the number of niches; higher values give more niches (0.3)
        --label-key K: column of obs with cell types for the composition (the cells' own clusters)
        --shells N: radius of a neighbourhood in steps of the spatial graph (3)
        --neighbors N: nearest cells in a new spatial graph (6); an existing one in obsp is used
        --use-rep K: embedding in obsm to use instead of the model's
        """,
    )
    add_adapt(parser, "context")
    add_options(
        parser,
        """
        --permutations N: permutations for the meetings of cell types (1000)
        --key-added K: column of obs to write (cellplm_niche)
        --seed N: random seed (0)
        """,
        seed={"type": int},
    )
    add_output(parser, report="maps of the niches, their composition, and meetings of cell types")


def _niches(arguments: argparse.Namespace) -> None:
    from cellplm_jax.tasks.niches import niches_file

    check_new_file(arguments)
    found, messages = niches_file(
        arguments.input,
        arguments.out,
        arguments.model,
        quiet=arguments.quiet,
        **passed_options(arguments, OPTIONS),
    )
    key = found["params"]["niche_key"]
    lines = [f"wrote {arguments.out}: obs['{key}'], {number_of(len(found['niches']), 'niche')}"]
    for name, cells, shares in zip(
        found["niches"],
        found["cells"],
        found["composition"],
        strict=True,
    ):
        largest = sorted(zip(shares, found["types"], strict=True), reverse=True)[:MEETINGS]
        listed = ", ".join(f"{kind} {share:.0%}" for share, kind in largest if share >= 0.05)
        lines.append(f"  niche {name}: {number_of(int(cells), 'cell')}: {listed}")
    write_page(arguments, "niches", arguments.out)
    print_result(arguments, lines, {"wrote": [arguments.out], **found}, messages=messages)
