"""Command ``niches``: spatial domains, their composition, and which cell types meet."""

from __future__ import annotations

import argparse
from typing import Any

from cellplm_jax.cli.embedding import add_adapt
from cellplm_jax.cli.options import add_counts, add_output, command, passed_options, positive
from cellplm_jax.cli.output import check_new_file, number_of, print_result, write_page

OPTIONS = ("spatial_key", "batch_key", "n_niches", "label_key", "shells", "neighbors", "resolution",
           "use_rep", "adapt", "layer", "gene_key", "feature_type", "permutations", "key_added", "seed")  # fmt: skip
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
    parser.add_argument("input", metavar="IN.h5ad", help="raw counts with coordinates")
    parser.add_argument("--model", metavar="M", help="model for embedding, unless --use-rep is set")
    parser.add_argument("--out", required=True, metavar="OUT.h5ad", help="the input plus niches")
    parser.add_argument(
        "--batch-key", metavar="K", help="column of obs with the tissue section; never connected"
    )
    add_counts(parser)
    parser.add_argument(
        "--n-niches", type=positive, metavar="N", help="number of niches (that of Leiden clusters)"
    )
    parser.add_argument(
        "--resolution",
        type=float,
        metavar="F",
        help="Leiden resolution of the number of niches; higher values give more niches (0.3)",
    )
    parser.add_argument(
        "--label-key",
        metavar="K",
        help="column of obs with cell types for the composition (the cells' own clusters)",
    )
    parser.add_argument(
        "--shells",
        type=positive,
        metavar="N",
        help="radius of a neighbourhood in steps of the spatial graph (3)",
    )
    parser.add_argument(
        "--neighbors",
        type=positive,
        metavar="N",
        help="nearest cells in a new spatial graph (6); an existing one in obsp is used",
    )
    parser.add_argument(
        "--use-rep", metavar="K", help="embedding in obsm to use instead of the model's"
    )
    add_adapt(parser, "context")
    parser.add_argument(
        "--permutations",
        type=positive,
        metavar="N",
        help="permutations for the meetings of cell types (1000)",
    )
    parser.add_argument("--key-added", metavar="K", help="column of obs to write (cellplm_niche)")
    parser.add_argument("--seed", type=int, metavar="N", help="random seed (0)")
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
        found["niches"], found["cells"], found["composition"], strict=True
    ):
        largest = sorted(zip(shares, found["types"], strict=True), reverse=True)[:MEETINGS]
        listed = ", ".join(f"{kind} {share:.0%}" for share, kind in largest if share >= 0.05)
        lines.append(f"  niche {name}: {number_of(int(cells), 'cell')}: {listed}")
    write_page(arguments, "niches", arguments.out)
    print_result(arguments, lines, {"wrote": [arguments.out], **found}, messages=messages)
