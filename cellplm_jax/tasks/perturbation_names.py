"""Names of perturbations: one canonical form for the spellings of the field.

Screens write a combination as ``A+B``, ``A_B``, ``A;B`` or ``A|B``, add the control (``A+ctrl``), number the guides of
a target (``STAT1g2``, ``STAT1_2``, ``sgSTAT1-1``), and name genes by current, previous or alias symbols or by Ensembl
ids, in any case. :func:`read_names` decides on the values of one file what these mean;
:meth:`PerturbationNames.canonical` then maps every spelling of a perturbation to one name.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import pandas as pd

from cellplm_jax.data.genes import find_gene, is_ensembl, load_human_table, symbols_of
from cellplm_jax.errors import InputError, nearest

SEPARATOR = "+"
"""Separator of the targets of a canonical combination."""

SEPARATORS = (SEPARATOR, ";", "|", "&", ",", "/", "__", "_")
"""Separators that files use, tried in this order."""

_GROUPS = (
    "control controls ctrl ctl",
    "nontargeting nontarget nt ntc negctrl negcontrol negativecontrol negative neg scramble scrambled safetargeting",
    "unperturbed untreated unstimulated unstim mock",
    "vehicle vehicledmso dmso",
    "pbs",
)
CONTROL_WORDS = {word: group for group, words in enumerate(_GROUPS) for word in words.split()}
"""Well-known names of control cells (lower case, letters only), with the number of their group of synonyms."""

_NUMBER = r"[-_. ]?(?:sgrna|grna|guide|sg|g)?[-_. ]?\d{1,5}$"
_MARKED_NUMBER = r"(?:[-_. ](?:sgrna|grna|guide|sg|g)?[-_. ]?|(?:sg|g))\d{1,2}$"
_PREFIX = r"^(?:sg|g)(?:rna)?[-_. ]?"

GeneReading = Literal["any", "current", "none"]


@dataclass(frozen=True, eq=False)
class PerturbationNames:
    """Rules that map the spellings of perturbations to canonical names.

    The canonical name of a gene is its current symbol (its name in the vocabulary if the symbol is not unique); of
    another condition, its first spelling in alphabetical order; of a combination, its targets, sorted, with ``"+"``
    between them. The control is dropped from combinations, and a repeated target counts once.

    Attributes:
        control: Canonical name of the control.
        vocabulary: Genes of the model.
        genes: Names read as genes: ``"any"`` spelling; only ``"current"`` symbols and Ensembl ids as written (for
            screens of drugs: an alias is mostly a coincidence there); or ``"none"``.
        conditions: Canonical name of every known condition that is not a gene, by its folded spelling.
        rejected: Separators that do not separate targets in the file of the fit.
        plain: Names are only split at ``"+"`` and sorted, as in predictors that were saved without rules.
    """

    control: str
    vocabulary: Sequence[str]
    genes: GeneReading = "any"
    conditions: Mapping[str, str] = field(default_factory=dict)
    rejected: tuple[str, ...] = ()
    plain: bool = False
    _read: dict[str, str] = field(default_factory=dict, init=False, repr=False)

    def canonical(self, name: str | None) -> str:
        """Return the canonical name of a spelling; an empty string for None.

        Args:
            name: A perturbation as a file or a user writes it.
        """
        if not name or name == self.control:
            return name or ""
        if name not in self._read:
            parts = self._plain_parts(name) if self.plain else self._targets(name.strip())
            # Without targets only the control was in the name.
            self._read[name] = SEPARATOR.join(self.sort(parts)) or self.control
        return self._read[name]

    def parts(self, canonical: str) -> list[str]:
        """Return the targets of a canonical name; none for the control.

        Args:
            canonical: From :meth:`canonical`.
        """
        if not canonical or canonical == self.control:
            return []
        # A condition can contain the separator ("IFN+").
        whole = not self.plain and self.conditions.get(fold(canonical)) == canonical
        return [canonical] if whole else self._plain_parts(canonical)

    def sort(self, names: Iterable[str]) -> list[str]:
        """Return names in an order that does not depend on the spelling of conditions.

        Args:
            names: Canonical names.
        """
        return sorted(names) if self.plain else sorted(names, key=lambda name: (fold(name), name))

    def as_dict(self) -> dict[str, Any]:
        """Return the rules as JSON, without the vocabulary."""
        return {
            "control": self.control,
            "genes": self.genes,
            "conditions": dict(self.conditions),
            "rejected": list(self.rejected),
            "plain": self.plain,
        }

    def _plain_parts(self, name: str) -> list[str]:
        return [part for part in (text.strip() for text in name.split(SEPARATOR)) if part]

    def _targets(self, name: str) -> list[str]:
        """Return the canonical targets of a spelling, without the control."""
        parts = self.split(name)
        return [part for part in dict.fromkeys(parts or [name]) if part != self.control]

    def split(self, name: str) -> list[str]:
        """Return the canonical targets of a spelling, with the control; none if it is not recognised.

        Args:
            name: Without spaces around it.
        """
        single = self.single(name)
        if single is not None:
            return [single]
        return next(filter(None, (self.split_at(separator, name) for separator in SEPARATORS)), [])

    def split_at(self, separator: str, name: str) -> list[str]:
        """Return the canonical targets of a combination; none if the separator does not separate known targets.

        Args:
            separator: One of :data:`SEPARATORS`.
            name: Neither a gene nor a known condition.
        """
        if separator not in name or separator in self.rejected:
            return []
        texts = [text for text in (part.strip() for part in name.split(separator)) if text]
        # A number after a separator is that of a guide.
        parts = [None if text.isdigit() else self.single(text) for text in texts]
        # "+" separates also unknown targets; both sides must look like names ("CD3+" and "(a+b)" do not).
        if separator == SEPARATOR and len(texts) > 1 and all(map(_is_name, texts)):
            return [part or text for part, text in zip(parts, texts, strict=True)]
        return [part for part in parts if part] if None not in parts else []

    def single(self, name: str) -> str | None:
        """Return the canonical name of the control, a known condition, a gene or a guide; None: it is none of these.

        Args:
            name: Without spaces around it.
        """
        if fold(name) == fold(self.control):
            return self.control
        if fold(name) in self.conditions:
            return self.conditions[fold(name)]
        if self._is_control_word(name):
            return self.control
        gene = self.gene(name)
        if gene:
            return gene
        if self._is_control_guide(name):
            return self.control
        return next(filter(None, map(self.gene, _stems(name))), None)

    def _is_control_word(self, name: str) -> bool:
        return is_control_word(name) and _letters(_stem(self.control)) in CONTROL_WORDS

    def _is_control_guide(self, name: str) -> bool:
        """Return whether a name is a numbered guide of the control."""
        if (
            _letters(_stem(name)) in CONTROL_WORDS
            and _letters(_stem(self.control)) in CONTROL_WORDS
        ):
            return True
        text = re.sub(_PREFIX, "", name, flags=re.I)
        return bool(_letters(self.control)) and any(
            fold(re.sub(_MARKED_NUMBER, "", stem, flags=re.I)) == fold(self.control)
            for stem in (name, text)
        )

    def gene(self, name: str) -> str:
        """Return the canonical name of a gene; an empty string if the name is not read as a gene.

        Args:
            name: A symbol or an Ensembl id.
        """
        if self.genes == "none":
            return ""
        gene = resolve_gene(name, self.vocabulary)
        # In a screen of drugs, abbreviations are often previous symbols of genes.
        if self.genes == "current" and not (is_ensembl(name) or gene == name):
            return ""
        return gene


def read_names(
    values: Iterable[str | None],
    control: Any,
    vocabulary: Sequence[str],
    *,
    key: str,
    targets: Literal["auto", "genes", "conditions"] = "auto",
) -> PerturbationNames:
    """Decide what the perturbations of a file mean.

    A name that is a gene or a known condition is not split. ``"+"`` always separates; another character
    does if at least half of the names that contain it split into genes and known conditions. With
    ``targets="auto"``, previous symbols and aliases are read as genes if at least half of the names are genes.

    Args:
        values: Perturbation of every cell; None: missing.
        control: Its value for control cells, text or number; None: the value with a well-known name.
        vocabulary: Genes of the model.
        key: Name of the column, for messages.
        targets: See :meth:`cellplm_jax.PerturbationPredictor.fit`.

    Returns:
        The rules.

    Raises:
        InputError: No value is the control, or several could be and none was given.
    """
    counts = Counter(value.strip() for value in values if value is not None)
    chosen = _control_of(counts, control, key)
    spellings = sorted(counts, key=lambda name: (fold(name), name))
    # Another well-known name in the same column is a perturbation, unless it is a synonym.
    others = {
        fold(name): name
        for name in reversed(spellings)
        if is_control_word(name) and not _same_word(name, chosen)
    }
    names = PerturbationNames(
        chosen,
        vocabulary,
        "none" if targets == "conditions" else "any",
        others,
    )
    if targets == "auto":
        # Decided on all names of the file before any of them is split.
        names = replace(names, genes=_gene_reading(spellings, names))
    combined = {name for name in spellings if any(s in name for s in SEPARATORS)}
    names = _with_conditions(names, [name for name in spellings if name not in combined])
    for separator in SEPARATORS[1:]:
        left = [name for name in spellings if separator in name and names.single(name) is None]
        earlier = SEPARATORS[: SEPARATORS.index(separator)]
        # Names that an earlier separator splits say nothing about this one.
        left = [name for name in left if not any(names.split_at(s, name) for s in earlier)]
        split = [name for name in left if names.split_at(separator, name)]
        if 2 * len(split) < len(left):
            names = replace(names, rejected=(*names.rejected, separator))
    return _with_conditions(names, spellings)


def message_of(names: PerturbationNames, values: Iterable[str | None], given: Any, key: str) -> str:
    """Describe in one line what was read.

    Args:
        names: From :func:`read_names`.
        values: Perturbation of every cell.
        given: The control that was given; None: it was found by its name.
        key: Name of the column.
    """
    spellings = sorted({value for value in values if value is not None})
    read = {name: names.canonical(name) for name in spellings}
    control = [name for name in spellings if read[name] == names.control]
    number = len(spellings) - len(control)
    targets = set(read.values()) - {names.control}
    text = (
        f"Read {len(targets)} perturbation{'s' * (len(targets) != 1)} from {number} "
        f"spelling{'s' * (number != 1)} in obs['{key}']; control: '{names.control}'"
    )
    if given is None:
        text += ", a well-known name"
    if len(control) > 1:
        text += f", in {len(control)} spellings"
    changed = [
        f"'{name}' is '{read[name]}'"
        for name in spellings
        if read[name] not in (name, names.control)
    ]
    if changed:
        text += f". {', '.join(changed[:3])}" + (" and others" if len(changed) > 3 else "")
    return text + "."


def labels_with_numbers(labels: np.ndarray, column: pd.Series) -> np.ndarray:
    """Return labels with the numbers of a number column written without trailing zeros.

    Args:
        labels: [cells], str or None.
        column: The column of ``obs`` that they come from.
    """
    dtype: Any = column.dtype
    dtype = dtype.categories.dtype if isinstance(dtype, pd.CategoricalDtype) else dtype
    if not pd.api.types.is_numeric_dtype(dtype) or pd.api.types.is_bool_dtype(dtype):
        return labels
    result = np.empty(len(labels), object)
    result[:] = [None if label is None else format(float(label), "g") for label in labels]
    return result


def resolve_gene(name: str, vocabulary: Sequence[str]) -> str:
    """Return the canonical name of a gene.

    Args:
        name: An Ensembl id or a symbol.
        vocabulary: Genes of the model; other human genes are resolved with the bundled table.

    Returns:
        Its current symbol, or its name in the vocabulary if the symbol is not unique; an empty string if it is no gene.
    """
    for genes in (vocabulary, human_genes()):
        column, _ = find_gene(name, genes)
        if column >= 0:
            symbol = symbols_of([genes[column]])[0]
            return symbol if find_gene(symbol, genes)[0] == column else genes[column]
    return ""


@functools.cache
def human_genes() -> tuple[str, ...]:
    """Return the Ensembl ids of the bundled table of human genes."""
    return tuple(load_human_table().symbols)


def fold(name: str) -> str:
    """Return a name in lower case, with one dash for spaces, dashes and underscores.

    Args:
        name: Any text.
    """
    return re.sub(r"[\s_-]+", "-", name.strip().casefold())


def is_control_word(name: str) -> bool:
    """Return whether a name is a well-known one of control cells, such as ``"ctrl"`` or ``"non-targeting"``.

    Args:
        name: Any text.
    """
    return not re.search(r"\d", name) and _letters(name) in CONTROL_WORDS


def _control_of(counts: Counter[str], control: Any, key: str) -> str:
    """Return the value of the control cells."""
    known = sorted(counts)
    shown = ", ".join(map(repr, known[:8])) + (" and more" if len(known) > 8 else "")
    if control is None:
        words = [name for name in known if is_control_word(name)]
        # CTRL is also a gene: the control only if there is no other.
        words = [name for name in words if name != "CTRL"] or words
        words = words or [name for name in known if _control_stem(name)]
        # Synonyms are one control; words of different groups (untreated and DMSO) need a decision.
        if words and len({CONTROL_WORDS[_letters(_control_stem(name))] for name in words}) == 1:
            most = max(words, key=lambda name: (counts[name], name))
            return most if is_control_word(most) else _control_stem(most)
        what = f"{len(words)} values are well-known names ({', '.join(map(repr, words[:4]))})"
        raise InputError(
            f"control was not given, and {what if words else 'no value'} of obs['{key}']"
            + ("" if words else " is a well-known name"),
            f"the value of the control cells, one of: {shown or 'none, all are missing'}",
            "Pass control",
        )
    number = isinstance(control, int | float | np.number) and not isinstance(control, bool)
    text = format(float(control), "g") if number else str(control).strip()
    # A boolean column whose control was named by its number.
    if text not in counts and text in ("0", "1") and set(known) <= {"True", "False"}:
        text = str(text == "1")
    same = [name for name in known if fold(name) == fold(text)]
    guides = [n for n in known if fold(text) in (fold(_stem(n)), fold(_control_stem(n)))]
    if text in counts or (guides and not same and text):
        return text
    if same:
        return same[0]
    raise InputError(
        f"no cell has the control '{text}' in obs['{key}']",
        f"one of its values: {shown or 'none, all are missing'}",
        nearest(text, known, "Pass the value of the control cells"),
    )


def _gene_reading(spellings: Sequence[str], names: PerturbationNames) -> GeneReading:
    """Return how freely names are read as genes: by any spelling if at least half of them are genes."""
    genes = others = 0
    for name in spellings:
        if names.single(name) == names.control:
            continue
        texts = [name, *_stems(name)]
        texts += [part.strip() for s in SEPARATORS if s in name for part in name.split(s)]
        texts = [stem for text in texts for stem in (text, *_stems(text))]
        current = any(_is_current(text, names.gene(text)) for text in texts)
        genes = genes + current
        others = others + (not current)
    return "any" if genes and genes >= others else "current"


def _is_current(name: str, gene: str) -> bool:
    return bool(gene) and (is_ensembl(name) or gene.casefold() == name.casefold())


def _with_conditions(names: PerturbationNames, spellings: Sequence[str]) -> PerturbationNames:
    """Return the rules with the conditions among the spellings, and the unknown parts of combinations."""
    conditions = dict(names.conditions)
    for name in spellings:
        for part in names.split(name) or [name]:
            if names.single(part) is None:
                conditions.setdefault(fold(part), part)
    return replace(names, conditions=conditions)


def _same_word(name: str, control: str) -> bool:
    letters = [_letters(name), _letters(_stem(control))]
    return letters[0] == letters[1] or (
        all(text in CONTROL_WORDS for text in letters)
        and CONTROL_WORDS[letters[0]] == CONTROL_WORDS[letters[1]]
    )


def _letters(name: str) -> str:
    return re.sub(r"[^a-z]", "", name.casefold())


def _stem(name: str) -> str:
    """Return a name without the number of a guide."""
    return re.sub(
        _NUMBER,
        "",
        re.sub(_PREFIX, "", name, flags=re.I),
        flags=re.I,
    )


def _control_stem(name: str) -> str:
    """Return the well-known name of control cells in a guide or a pair of guides; an empty string if it is none."""
    for separator in ("\n", *SEPARATORS):
        stems = [_stem(text) for text in name.split(separator) if text]
        if stems and all(_letters(stem) in CONTROL_WORDS for stem in stems):
            return stems[0]
    return ""


def _stems(name: str) -> list[str]:
    """Return the possible targets of a guide: without its number, without a leading "sg", without both."""
    short = re.sub(_PREFIX, "", name, flags=re.I)
    stems = [re.sub(_MARKED_NUMBER, "", text, flags=re.I) for text in (name, short)]
    return [stem for stem in dict.fromkeys([stems[0], short, stems[1]]) if stem and stem != name]


def _is_name(text: str) -> bool:
    return bool(re.search(r"[^\W_]", text)) and text.count("(") == text.count(")")
