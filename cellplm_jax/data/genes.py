"""Gene names: mapping of the names in a file to the columns of a model's vocabulary.

Files use Ensembl ids, with or without a version, or current and previous symbols; a model has a fixed list of genes.
:func:`map_genes` maps the names offline, with a bundled table of current, previous and alias symbols, and reports the
result for every name. (The original queries a web service for symbols and loses a fifth of them:
``CellPLM/pipeline/experimental.py``.)

Models use human genes. Mouse files are detected and mapped through a bundled table of one-to-one orthologues, not by
conversion to upper case; genes without exactly one orthologue are omitted, and other species raise an error.
"""

from __future__ import annotations

import functools
import gzip
import importlib.resources
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cellplm_jax.data.species import looks_like_mouse, other_species
from cellplm_jax.display import Displayed
from cellplm_jax.errors import InputError, quote

MINIMUM_GENES = 10
"""Default minimum number of vocabulary genes that a file must match.

Small targeted panels (33 genes in osmFISH) must pass; a column without gene names must not. Chance matches of such a
column stay below this limit: single letters and short codes that are also aliases.
"""

EXAMPLES = 5
"""Number of names quoted per category in reports and messages."""

KINDS = ("current", "previous", "alias")
"""Kinds of symbols in the bundled table, in order of preference."""

_CATEGORIES = ("matched", "unmatched", "ambiguous", "duplicated", "missing", "twins")
_TABLE = "human_genes.csv.gz"
_MOUSE_TABLE = "mouse_genes.csv.gz"

ORTHOLOGUE = "orthologue"
"""Rule name for mouse genes mapped to human orthologues."""
_ENSEMBL = re.compile(r"(?P<bare>ENS[A-Z]{0,7}G\d{11})(?P<version>\.\d+)?(?P<par>_PAR_Y)?")
# Names of genes in reads aligned to several genomes, such as "GRCh38_CD4" and "mm10___Cd4".
_GENOME = re.compile(r"((?:GRC[a-z]\d\d|hg\d\d|mm\d{1,2}|rn\d|human|mouse)[A-Za-z0-9.\-]*_+).+")
# make_unique of anndata appends "-1", that of R ".1".
_COPY = re.compile(r"(.+)[-.]\d{1,3}")
MIXED_FRACTION = 0.1
"""Fraction of the names from which on the genes of a second species are not chance or contamination."""


def is_ensembl(name: str) -> bool:
    """Return whether a name is an Ensembl gene id of any vertebrate, with or without a version.

    Args:
        name: A gene name, such as ``"ENSG00000000003"`` or ``"ENSMUSG00000064370.1"``.

    Returns:
        True for a complete gene id; False for symbols, transcripts (``ENST``) and proteins.
    """
    return name.startswith("ENS") and _ENSEMBL.fullmatch(name) is not None


def strip_version(name: str) -> str:
    """Remove the version from an Ensembl gene id; other names are returned unchanged.

    GENCODE's suffix of the Y copy of a pseudoautosomal gene is also removed, so both copies become one gene, as in the
    published vocabulary.

    Args:
        name: ``"ENSG00000000003.15"``, ``"ENSG00000182378.15_PAR_Y"``, or any symbol (symbols such
            as ``"AC012345.1"`` keep their dot).

    Returns:
        The bare id, or ``name``.
    """
    if not name.startswith("ENS"):
        return name
    match = _ENSEMBL.fullmatch(name)
    return match["bare"] if match else name


@dataclass(frozen=True, eq=False)
class HumanTable:
    """The bundled table of human gene names, indexed for look-ups.

    Attributes:
        genes: Symbol -> (kind, Ensembl ids in order). Only the best kind of each symbol is kept: a
            symbol that is current for one gene and previous for another refers to the first.
        folded: Upper-cased symbol -> the same, for symbols with lower-case letters.
        symbols: Ensembl id -> its current symbol (the first in alphabetical order of several).
    """

    genes: Mapping[str, tuple[str, tuple[str, ...]]]
    folded: Mapping[str, tuple[str, tuple[str, ...]]]
    symbols: Mapping[str, str]


@functools.cache
def load_human_table() -> HumanTable:
    """Read the bundled table of human gene names; the result is cached.

    Sources and terms are documented in ``resources/human_genes.LICENSE.md``; ``tools/build_gene_table.py`` generates
    it.

    Returns:
        The table; read-only, because all callers share it.
    """
    genes: dict[str, tuple[str, tuple[str, ...]]] = {}
    symbols: dict[str, str] = {}
    resource = importlib.resources.files("cellplm_jax") / "resources" / _TABLE
    lines = gzip.decompress(resource.read_bytes()).decode("utf-8").splitlines()
    for line in lines[1:]:
        symbol, gene, kind = line.split(",")
        _offer(genes, symbol, kind, (gene,))
        if kind == "current":
            symbols.setdefault(gene, symbol)
    folded: dict[str, tuple[str, tuple[str, ...]]] = {}
    # Upper-case names are found in the first table already.
    for symbol, (kind, found) in genes.items():
        if not symbol.isupper():
            _offer(folded, symbol.upper(), kind, found)
    return HumanTable(genes=genes, folded=folded, symbols=symbols)


@functools.cache
def load_mouse_table() -> Mapping[str, str]:
    """Read the bundled table of mouse orthologues; the result is cached.

    Sources and terms are documented in ``resources/mouse_genes.LICENSE.md``; ``tools/build_mouse_table.py`` generates
    it.

    Returns:
        Mouse symbol or mouse Ensembl id -> Ensembl id of the one human orthologue; read-only.
    """
    resource = importlib.resources.files("cellplm_jax") / "resources" / _MOUSE_TABLE
    lines = gzip.decompress(resource.read_bytes()).decode("utf-8").splitlines()
    return dict(line.split(",") for line in lines[1:])


def _offer(
    table: dict[str, tuple[str, tuple[str, ...]]],
    symbol: str,
    kind: str,
    genes: tuple[str, ...],
) -> None:
    """Add genes for a symbol, keeping only those of the best kind."""
    held = table.get(symbol)
    if held is None or KINDS.index(kind) < KINDS.index(held[0]):
        table[symbol] = (kind, genes)
    elif kind == held[0]:
        table[symbol] = (kind, tuple(dict.fromkeys((*held[1], *genes))))


def symbols_of(genes: Iterable[str]) -> list[str]:
    """Return the current symbol of each gene, for display.

    Args:
        genes: Ensembl ids (versions are ignored) or symbols.

    Returns:
        One name per gene: its current symbol, or the given name if the table has none.
    """
    table = load_human_table().symbols
    return [table.get(strip_version(gene), gene) for gene in genes]


@dataclass(frozen=True, eq=False, repr=False)
class GeneMapping(Displayed):
    """Mapping from the gene names of a file to a vocabulary.

    ``matched + unmatched`` is the number of names; ``ambiguous`` and ``blank`` are included in ``unmatched``.

    Attributes:
        column: int32 [names], index into the vocabulary of each name, or -1.
        measured: bool [genes], vocabulary genes that at least one name maps to.
        matched: Number of names that map to a vocabulary gene.
        unmatched: Number of names that do not.
        ambiguous: Number of symbols omitted because they refer to several genes, at least one of them in the
            vocabulary.
        blank: Number of empty names.
        missing: Number of vocabulary genes that no name maps to.
        duplicated: Number of vocabulary genes that several names map to; their counts are summed.
        by_rule: Names per matching rule: "exact" (identical), "version" (after removing it),
            "current", "previous", "alias" (symbols), "case" (after conversion to upper case), "punctuation"
            (R's dots for dashes), "orthologue" (mouse genes).
        examples: Up to five examples per category, for messages.
        twins: Number of names omitted because they differ from the name of another gene of the file only in case or
            by the suffix of a copy.
        lower_case: Whether most names are in lower case, and were read as symbols in upper case.
    """

    column: np.ndarray
    measured: np.ndarray
    matched: int
    unmatched: int
    ambiguous: int
    blank: int
    missing: int
    duplicated: int
    by_rule: Mapping[str, int]
    examples: Mapping[str, tuple[str, ...]]
    twins: int = 0
    lower_case: bool = False

    def _display(self) -> dict[str, object]:
        names = self.matched + self.unmatched
        return {
            "gene_names_matched": f"{self.matched:,} of {names:,}",
            "vocabulary_genes_measured": f"{self.genes_matched:,} of {len(self.measured):,}",
            "ambiguous": self.ambiguous or None,
            "duplicated": self.duplicated or None,
        }

    @property
    def genes_matched(self) -> int:
        """Vocabulary genes measured in the file."""
        return len(self.measured) - self.missing

    def summary(self) -> str:
        """Describe the mapping in one short paragraph.

        Returns:
            Sentences with the numbers, and examples of omitted names.
        """
        total = self.matched + self.unmatched
        parts = [
            f"{self.genes_matched} of {len(self.measured)} vocabulary genes are measured, "
            f"from {self.matched} of {total} gene names."
        ]
        if self.by_rule.get(ORTHOLOGUE):
            parts.append(
                f"The names are those of mouse genes; {self.by_rule[ORTHOLOGUE]} were mapped to their human one-to-one "
                "orthologues (Ensembl 105), and genes with none or several were left out."
            )
        if self.lower_case:
            parts.append(
                "Most names are in lower case, as in zebrafish and frogs; they were read as human symbols."
            )
        if self.unmatched:
            known = self.unmatched - self.ambiguous - self.blank - self.twins
            details = [f"{known} outside the vocabulary{self._quote('unmatched')}"] if known else []
            if self.ambiguous:
                details.append(f"{self.ambiguous} ambiguous{self._quote('ambiguous')}")
            if self.twins:
                details.append(f"{self.twins} too similar to another name{self._quote('twins')}")
            if self.blank:
                details.append(f"{self.blank} empty")
            parts.append(f"Left out: {'; '.join(details)}.")
        if self.duplicated:
            parts.append(
                f"Counts of repeated genes were summed: {self.duplicated} of the genes"
                f"{self._quote('duplicated')}."
            )
        return " ".join(parts)

    def _quote(self, category: str) -> str:
        quoted = self.examples.get(category, ())
        return f" (such as {', '.join(quoted[:3])})" if quoted else ""

    def as_dict(self) -> dict[str, object]:
        """Return the report without the arrays, for JSON and ``AnnData.uns``.

        Returns:
            Counts, matches per rule, and examples (lists of strings; empty categories omitted).
        """
        return {
            "names": self.matched + self.unmatched,
            "vocabulary": len(self.measured),
            "genes_matched": self.genes_matched,
            "matched": self.matched,
            "unmatched": self.unmatched,
            "ambiguous": self.ambiguous,
            "blank": self.blank,
            "missing": self.missing,
            "duplicated": self.duplicated,
            "by_rule": dict(self.by_rule),
            **({"twins": self.twins} if self.twins else {}),
            "examples": {category: list(names) for category, names in self.examples.items()},
        }


class FittedGenes(list[str]):
    """Genes of a fitted model, with the decisions about names that its fit made. Readers apply them again.

    A model keeps only the genes that its fit measured. Among these alone, a name that was ambiguous in the fit can
    have one meaning left, and the same file would give other counts.

    Args:
        genes: The vocabulary of the model.
        among: The vocabulary of the fit: a name may refer to any of these genes.
        matrix: Location of the counts in the file of the fit.
        gene_key: Column of ``var`` with the gene names in that file, or "var_names".

    Attributes:
        others: Genes of ``among`` that the model does not have.
        matrix: See the argument.
        gene_key: See the argument.
    """

    def __init__(
        self,
        genes: Iterable[str],
        among: Iterable[str],
        matrix: str = "",
        gene_key: str = "",
    ):
        super().__init__(genes)
        own = set(self)
        self.others = [gene for gene in among if gene not in own]
        self.matrix = matrix
        self.gene_key = gene_key

    def subset(self, genes: Iterable[str]) -> FittedGenes:
        """Return some of the genes, read in the same way."""
        return FittedGenes(genes, [*self, *self.others], self.matrix, self.gene_key)


class _Match(NamedTuple):
    """Result of one look-up: a column and the rule, or the candidate genes."""

    column: int = -1
    rule: str = ""
    candidates: tuple[str, ...] = ()
    kind: str = ""


class _Vocabulary:
    """A vocabulary indexed by all names of its genes."""

    def __init__(self, names: Sequence[str]):
        """Index the names; symbols are resolved to ids so that their previous names match too."""
        self.names = list(names)
        self.exact = {name: position for position, name in enumerate(self.names)}
        if len(self.exact) != len(self.names):
            repeated = [name for name, times in Counter(self.names).items() if times > 1]
            raise InputError(
                f"the vocabulary lists {len(repeated)} genes twice, such as '{repeated[0]}'",
                "every gene once",
                "Remove the repeated genes from the vocabulary",
            )
        self.by_id: dict[str, int] = {}
        self.by_fold: dict[str, int] = {}
        others = []
        for position, name in enumerate(self.names):
            if is_ensembl(name):
                self.by_id.setdefault(strip_version(name), position)
            else:
                others.append((position, name))
        claims: defaultdict[str, set[int]] = defaultdict(set)
        folds: defaultdict[str, set[int]] = defaultdict(set)
        table = load_human_table().genes if others else {}
        for position, name in others:
            folds[name.upper()].add(position)
            _, genes = table.get(name, ("", ()))
            if len(genes) == 1:
                claims[genes[0]].add(position)
        for gene, positions in claims.items():
            if len(positions) == 1:
                self.by_id.setdefault(gene, *positions)
        self.by_fold = {name: min(found) for name, found in folds.items() if len(found) == 1}

    def resolve(self, name: str, *, mouse: bool, lower: bool = False) -> _Match:
        """Return the column of a non-empty name outside the vocabulary.

        ``mouse``: in a file of mouse genes; ``lower``: in a file of names in lower case.
        """
        if mouse:
            return self._resolve_mouse(name)
        if is_ensembl(name):
            position = self.by_id.get(strip_version(name), -1)
            if position < 0:
                return _Match()
            rule = "version" if is_ensembl(self.names[position]) else "current"
            return _Match(position, rule)
        table = load_human_table()
        found, rule = table.genes.get(name), ""
        if found is not None and name.islower() and (lower or found[0] != "current"):
            # 'elk1' is an alias of ELK3 in the table, and ELK1 in a file of names in lower case.
            upper = table.genes.get(name.upper())
            if upper is not None and upper[0] == "current":
                found, rule = upper, "case"
        if found is None:
            rule, upper = "case", name.upper()
            if upper in self.by_fold:
                return _Match(self.by_fold[upper], rule)
            # Some current symbols have lower-case letters (C1orf112), which a folded name finds in the second table.
            found = table.genes.get(upper) or table.folded.get(upper)
        if found is None and "." in name:
            # R's make.names replaces dashes by dots.
            rule = "punctuation"
            dashed = name.replace(".", "-")
            if dashed in self.exact:
                return _Match(self.exact[dashed], rule)
            found = table.genes.get(dashed)
        if found is None:
            return _Match()
        kind, genes = found
        columns = {self.by_id[gene] for gene in genes if gene in self.by_id}
        if kind == "current" and columns:
            # Several ids carry some current symbols: the oldest is the one in use (SOD2, MATR3).
            # A gene that has another symbol by now comes last (DGCR5).
            first = min(
                (gene for gene in genes if gene in self.by_id),
                key=lambda gene: (table.symbols.get(gene, "").upper() != name.upper(), gene),
            )
            return _Match(self.by_id[first], rule or kind)
        # One gene in the vocabulary is enough for a previous symbol, but not for an alias: see map_genes.
        if len(columns) == 1 and (kind != "alias" or len(set(symbols_of(genes))) == 1):
            return _Match(columns.pop(), rule or kind, kind=kind)
        return _Match(candidates=genes if columns else ())

    def _resolve_mouse(self, name: str) -> _Match:
        """Return the column of a name in a file of mouse genes that is not in the vocabulary."""
        bare = strip_version(name)
        dashed = name.replace(".", "-")
        if is_ensembl(name) and bare in self.by_id:
            return _Match(self.by_id[bare], "version")
        if dashed in self.exact:
            return _Match(self.exact[dashed], "punctuation")
        table = load_mouse_table()
        # The table has mouse ids and symbols as keys.
        position = self.by_id.get(table.get(bare) or table.get(dashed, ""), -1)
        return _Match(position, ORTHOLOGUE) if position >= 0 else _Match()


@functools.lru_cache(maxsize=2)
def _indexed(names: tuple[str, ...]) -> _Vocabulary:
    return _Vocabulary(names)


def find_gene(name: str, vocabulary: Sequence[str]) -> tuple[int, str]:
    """Map one name to a vocabulary, by the rules of :func:`map_genes` for a file with this name only.

    Args:
        name: An Ensembl id or a symbol.
        vocabulary: The genes [genes]; indexed once and cached.

    Returns:
        Its index and the matching rule (see :class:`GeneMapping`); -1 and an empty string if there is no match.
    """
    name = name.strip()
    index = _indexed(tuple(vocabulary))
    if not name or name in index.exact:
        return (index.exact[name], "exact") if name else (-1, "")
    match = index.resolve(name, mouse=looks_like_mouse([name]))
    return match.column, match.rule


def map_genes(
    names: Sequence[str],
    vocabulary: Sequence[str],
    *,
    minimum: int | None = None,
) -> GeneMapping:
    """Map the gene names of a file to a vocabulary.

    Names are tried in this order: as written; as an Ensembl id without its version; as a current, previous or alias
    symbol of the bundled table; in upper case; with R's dots replaced by dashes. A symbol of several genes refers to
    the current one before the previous before the alias. If several genes have it as their current symbol, it refers
    to the lowest id in the vocabulary; otherwise to the only one in the vocabulary, and is ambiguous without one. An
    alias of several genes is ambiguous even if one is in the vocabulary: ``COX1`` in a file is the mitochondrial gene
    more often than PTGS1. If most names are mouse ids or capitalised like mouse symbols, each is tried as written and
    then replaced by its human one-to-one orthologue; none is converted to upper case, because orthologues do not always
    share a symbol. With :class:`FittedGenes` names are resolved among the genes of the fit. If several names map to one
    gene, their counts are summed; but a name is omitted if another name of the file differs from it only in case
    (``Cd4`` beside ``CD4``), or if it is an alias that a copy of another name got as a suffix (``CAT-1`` beside
    ``CAT``).

    Args:
        names: Gene names [names]: Ensembl ids, symbols, or both; empty strings are allowed.
        vocabulary: The genes of the model [genes], normally Ensembl ids; symbols work as well.
        minimum: Minimum number of vocabulary genes that must match; by default ``MINIMUM_GENES``, or all genes of a
            smaller vocabulary. 0 disables the check.

    Returns:
        The column of every name and the coverage report.

    Raises:
        InputError: Fewer than ``minimum`` genes match, most names belong to another species than human and mouse, or
            a gene is repeated in the vocabulary.
    """
    names = [str(name).strip() for name in names]
    width = len(vocabulary)
    among = vocabulary.others if isinstance(vocabulary, FittedGenes) else []
    # With the other genes of the fit: a name that it gave to one of those must not match here.
    index = _indexed((*vocabulary, *among))
    exact = [index.exact.get(name, -1) for name in names]
    column = np.array(exact, dtype=np.int32)
    unresolved = np.flatnonzero(column < 0)
    # Names of genes that only the fit's vocabulary has are outside this one.
    column[column >= width] = -1
    rules: Counter[str] = Counter(exact=int((column >= 0).sum()))
    examples: dict[str, list[str]] = {category: [] for category in _CATEGORIES}
    matched = [(row, names[row]) for row in np.flatnonzero(column >= 0)[:EXAMPLES]]
    ambiguous = 0
    mouse = bool(len(unresolved)) and looks_like_mouse(names)
    # Files in lower case throughout, whose names the rules for mouse would take for neither.
    lower = bool(len(unresolved)) and 2 * sum(map(str.islower, names)) > len(names)
    outside = np.setdiff1d(np.flatnonzero(column < 0), unresolved)
    for row in outside[:EXAMPLES]:
        examples["unmatched"].append(names[row])
    present = set(names)
    twins = 0
    doubtful = []
    for row in unresolved:
        name = shown = names[row]
        match = index.resolve(name, mouse=mouse, lower=lower) if name else _Match()
        # Checked first: the suffix was added to make a repeated name unique.
        if match.column >= 0 and _is_copy(name, match.kind, present):
            twins += 1
            if len(examples["twins"]) < EXAMPLES:
                examples["twins"].append(name)
            continue
        if 0 <= match.column < width:
            column[row] = match.column
            # Decided after all names are read: another name may be surer of the same gene.
            if match.rule in ("case", ORTHOLOGUE):
                doubtful.append((row, match.rule))
            rules[match.rule] += 1
            matched.append((row, f"{name} -> {index.names[match.column]}"))
            continue
        if len(match.candidates) > 1:
            ambiguous += 1
            category = "ambiguous"
            shown = f"{name} -> {' or '.join(match.candidates)}"
        else:
            category = "unmatched"
        if shown and len(examples[category]) < EXAMPLES:
            examples[category].append(shown)

    if doubtful:
        rows = np.array([row for row, _ in doubtful])
        sure = np.zeros(len(index.names) + 1, bool)
        rest = np.ones(len(names), bool)
        rest[rows] = False
        # Index -1 marks the last entry, which is reset below.
        sure[column[rest]] = True
        sure[-1] = False
        for row, rule in doubtful:
            if sure[column[row]]:
                column[row] = -1
                rules[rule] -= 1
                twins += 1
                if len(examples["twins"]) < EXAMPLES:
                    examples["twins"].append(names[row])
        matched = [(row, shown) for row, shown in matched if column[row] >= 0]
    examples["matched"] = [shown for _, shown in sorted(matched)[:EXAMPLES]]
    hits = np.bincount(column[column >= 0], minlength=width)
    repeated = np.flatnonzero(hits > 1)
    for position in repeated[:EXAMPLES]:
        sources = Counter(names[row] for row in np.flatnonzero(column == position))
        shown = " + ".join(name if n == 1 else f"{name} ({n} times)" for name, n in sources.items())
        target = index.names[position]
        examples["duplicated"].append(shown if set(sources) == {target} else f"{shown} -> {target}")
    absent = np.flatnonzero(hits == 0)
    examples["missing"] = [index.names[position] for position in absent[:EXAMPLES]]
    matched_names = int((column >= 0).sum())
    mapping = GeneMapping(
        column=column,
        measured=hits > 0,
        matched=matched_names,
        unmatched=len(names) - matched_names,
        ambiguous=ambiguous,
        blank=names.count(""),
        missing=len(absent),
        duplicated=len(repeated),
        # The unary plus of a Counter drops counts of 0.
        by_rule=dict(+rules),
        examples={category: tuple(shown) for category, shown in examples.items() if shown},
        twins=twins,
        lower_case=lower and rules["case"] > 0,
    )
    require_matches(mapping, names, minimum=minimum)
    return mapping


def require_matches(
    mapping: GeneMapping,
    names: Sequence[str],
    *,
    minimum: int | None = None,
    where: str = "the data",
) -> None:
    """Raise an error with examples of the names if a mapping has too few genes.

    Args:
        mapping: Result of :func:`map_genes` (called with ``minimum=0``).
        names: The mapped names [names].
        minimum: As for :func:`map_genes`.
        where: Description of the source of the names for the message.

    Raises:
        InputError: See :func:`map_genes`.
    """
    if minimum is None:
        minimum = min(MINIMUM_GENES, len(mapping.measured))
    if minimum <= 0:
        return
    mixed = _mixture(names)
    if mixed and mapping.genes_matched >= minimum:
        raise InputError(
            f"{where} lists genes of two species, {mixed}",
            "genes of one species: the same gene of the other one would be added to it",
            "Keep the genes of one species, and the cells that are of it",
        )
    # With most names matched there is nothing to explain; the checks below are for files that look wrong.
    few = 2 * mapping.matched < len(names)
    # A model of the same species matches exactly; symbols of a fish match human ones in upper case.
    folded = 2 * mapping.by_rule.get("case", 0) > mapping.matched
    if mapping.genes_matched >= minimum and not (few or folded):
        return
    species = other_species(names)
    if mapping.genes_matched >= minimum and not species:
        return
    shown = [str(name) for name in names if str(name).strip()][:EXAMPLES]
    quoted = ", ".join(map(quote, shown)) if shown else "only empty names"
    found = (
        f"{mapping.genes_matched} of the model's {len(mapping.measured)} genes are among the "
        f"{len(names)} gene names of {where} (such as {quoted})"
    )
    # Reads aligned to a human and a mouse genome together.
    prefixes = Counter(match[1] for name in names if (match := _GENOME.fullmatch(str(name))))
    if 2 * sum(prefixes.values()) > len(names):
        prefix = next((p for p in prefixes if re.match("GRCh|hg|human", p)), next(iter(prefixes)))
        raise InputError(
            f"{found}, which begin with the name of a genome ({', '.join(map(quote, list(prefixes)[:4]))})",
            "human Ensembl ids or gene symbols without a prefix",
            f"Keep the genes of one genome, adata[:, adata.var_names.str.startswith('{prefix}')].copy(), and "
            f"remove the prefix: adata.var_names = adata.var_names.str.removeprefix('{prefix}')",
        )
    if species:
        raise InputError(
            f"{found}, which are genes of {species}",
            "human genes, or mouse genes, which are mapped to their human orthologues",
            "Map the genes to their human one-to-one orthologues first (Ensembl BioMart has them for every "
            "species), and name them by human Ensembl id",
        )
    if looks_like_mouse(names):
        raise InputError(
            f"{found}, which look like mouse genes, after mapping them to human one-to-one orthologues",
            f"at least {minimum} genes with an orthologue in the model",
            "Point gene_key (--gene-key) at mouse symbols or Ensembl ids if these are neither, or lower "
            "minimum_genes if the panel is that small",
        )
    raise InputError(
        found,
        f"at least {minimum} of them, as human Ensembl ids or gene symbols",
        "Point gene_key (--gene-key) at the var column that holds the gene ids, or lower "
        "minimum_genes if the panel is that small",
    )


def _is_copy(name: str, kind: str, present: set[str]) -> bool:
    """Return whether a name that is no current symbol is another name of the file with the suffix of a copy."""
    if kind not in ("alias", "previous"):
        return False
    match = _COPY.fullmatch(name)
    return match is not None and match[1] in present


def _mixture(names: Sequence[str]) -> str:
    """Return how many names are human and how many mouse genes, if both are common; "" otherwise."""
    texts = list(map(str, names))
    enough = max(2 * MINIMUM_GENES, MIXED_FRACTION * len(texts))
    # A cheap filter, because the tables are large and most files have no such names.
    mouse = [text for text in texts if text[1:2].islower() or text.startswith("ENSMUSG")]
    if len(mouse) < enough:
        return ""
    orthologues = load_mouse_table()
    human = load_human_table().genes
    mice = sum(strip_version(text) in orthologues and text not in human for text in mouse)
    people = sum(
        (text.startswith("ENSG") and is_ensembl(text)) or human.get(text, ("",))[0] == "current"
        for text in texts
    )
    if min(mice, people) < enough:
        return ""
    return f"{people:,} of human and {mice:,} of mice"
