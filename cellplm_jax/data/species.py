"""Species of a file, recognised by the form of its gene names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

_SPECIES = {
    "BTA": "cow",
    "CAF": "dog",
    "DAR": "zebrafish",
    "GAL": "chicken",
    "MFA": "crab-eating macaque",
    "MMU": "rhesus macaque",
    "OCU": "rabbit",
    "PTR": "chimpanzee",
    "RNO": "rat",
    "SSC": "pig",
}
_OTHER_ID = re.compile(r"ENS(?!MUS)([A-Z]{3})[A-Z]*G\d{11}(\.\d+)?")
_MOUSE_ID = re.compile(r"ENSMUSG\d{11}(\.\d+)?")
_MOUSE_SYMBOL = re.compile(r"[A-Z][a-z]+[a-z0-9.\-]*|\d+[A-Z]\d+Rik|mt-[A-Z][a-z0-9]+")
_OTHER_SYMBOLS = {
    "zebrafish": re.compile(r"(si:|zgc:|wu:|im:).+"),
    "fruit fly": re.compile(r"CG\d{4,5}"),
    "worm": re.compile(r"[A-Z]\d{1,2}[A-Z]\d{1,2}[A-Z]?\.\d+"),
}
# Any letter.
_LETTER = re.compile(r"[^\W\d_]")


def other_species(names: Sequence[str]) -> str:
    """Return the species of the names by their Ensembl ids or typical symbols, if it is neither human nor mouse.

    Args:
        names: Gene names [names].

    Returns:
        Such as ``"rat"``; ``""`` for human, mouse and symbols.
    """
    prefixes = Counter(
        match[1] for name in names if (match := _OTHER_ID.fullmatch(str(name).strip())) is not None
    )
    if not prefixes:
        texts = [str(name) for name in names]
        for species, form in _OTHER_SYMBOLS.items():
            # 2 % are enough: only a part of the genes of these species has such names, and human genes have none.
            if 50 * sum(form.fullmatch(text) is not None for text in texts) > len(texts):
                return species
        return ""
    prefix, number = prefixes.most_common(1)[0]
    if 2 * number <= len(names):
        return ""
    return _SPECIES.get(prefix, f"another species (Ensembl ids of 'ENS{prefix}')")


def looks_like_mouse(names: Sequence[str]) -> bool:
    """Return whether most names are mouse ids or capitalised like mouse symbols.

    Args:
        names: Gene names [names].
    """
    # Numbers are names of nothing, and would outvote the symbols.
    named = [str(name) for name in names if _LETTER.search(str(name))]
    mouse = sum(bool(_MOUSE_ID.fullmatch(n) or _MOUSE_SYMBOL.fullmatch(n)) for n in named)
    return 2 * mouse > len(named)
