"""Model cards of published models, from config and ``card.json``; missing information is stated as unknown."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from cellplm_jax.config import ModelConfig, to_dict
from cellplm_jax.interop.hub import GENERATED

LIBRARY = "cellplm-jax"
UNKNOWN = "Not stated in the model's `card.json`."

# Licence names of the hub, and patterns for them in cards.
_LICENCES = {
    r"\bbsd-?2\b": "bsd-2-clause",
    r"\bbsd-?3\b": "bsd-3-clause",
    r"\bapache\b.*2": "apache-2.0",
    r"\bmit\b": "mit",
    r"\bcc[- ]by[- ]nc[- ]4": "cc-by-nc-4.0",
    r"\bcc[- ]by[- ]4": "cc-by-4.0",
    r"\bcc-?0\b": "cc0-1.0",
}

# Keys of the card, by section.
_COUNTS = ("training_samples", "training_cells", "heldout_samples", "heldout_cells")
_ORIGIN = (
    "made_by",
    "kind",
    "task",
    "fine_tuned_from",
    "loaded_from",
    "steps",
    "seed",
    "machine",
    "versions",
)


def model_card(
    config: ModelConfig,
    genes: list[str],
    card: Mapping[str, Any],
    *,
    parameters: int,
    step: int,
    repository: str,
    estimator: str | None = None,
) -> str:
    """Write the model card of a model as Markdown with YAML front matter.

    Args:
        config: The architecture.
        genes: Gene vocabulary, Ensembl ids.
        card: Contents of ``card.json``.
        parameters: Number of scalar parameters.
        step: Training step of the weights.
        repository: ``"organisation/name"`` of the card.
        estimator: Class name of the estimator in the repository; None: a plain model.

    Returns:
        The text of ``README.md``.
    """
    tables = list(_score_tables(card))
    name = str(card.get("name") or repository)
    if estimator:
        open_with = f"{estimator}.load"
        name = f"{name}, {card.get('task', 'fine-tuned')}"
    else:
        open_with = "load"
    described = card.get("description") or (
        f"A {card.get('kind', 'CellPLM')} model of single cells and spots in the CellPLM architecture: cells are "
        "tokens, and a tissue sample is a sentence."
    )
    parts = [
        f"{_front_matter(card, tables)}\n{GENERATED}",
        f"# {name}\n\n{described}",
        f"## How to load it\n\n{_loading(repository, open_with, estimator)}",
        f"## Data\n\n{_data(card)}",
        f"## How it was made\n\n{_table(('', ''), _facts(card, _ORIGIN, step))}",
        "## Architecture\n\n" + _architecture(config, genes, parameters),
        f"## Scores\n\n{_scores(tables)}",
        f"## Intended use\n\n{card.get('intended_use') or _USE}",
        f"## Limits\n\n{_limits(card)}",
        f"## Licence\n\n{card.get('licence') or card.get('license') or UNKNOWN}",
        f"## Citation\n\n{_CITATION}",
    ]
    return "\n\n".join(parts) + "\n"


_USE = (
    "The intended use is not stated. Models of this kind embed human cells and spots from raw counts, and "
    "are fine-tuned to annotate, impute, denoise and predict perturbations. Research only; not for clinical decisions."
)

_CITATION = """The architecture is that of Wen et al., *CellPLM: Pre-training of Cell Language Model Beyond Single
Cells*, ICLR 2024. This model was made with cellplm-jax, an independent implementation; cite the data above as its
sources ask."""


def _front_matter(card: Mapping[str, Any], tables: list[_Scores]) -> str:
    """Return the YAML front matter, written by the hub's own library so that it is always valid."""
    from huggingface_hub import ModelCardData

    # The columns of nested tables are methods, not metrics.
    plain = [table for table in tables if " / " not in table.path]
    metrics = list(dict.fromkeys(name for table in plain for name in table.columns))
    # A score table may be indexed by step.
    metrics = [name for name in metrics if name != "step"]
    tags = ["biology", "single-cell", "transcriptomics", "cellplm", "jax"]
    tags += [str(card[key]) for key in ("kind", "species") if isinstance(card.get(key), str)]
    if isinstance(card.get("task"), str):
        tags.append(card["task"])
    data = ModelCardData(
        license=licence(card),
        library_name=LIBRARY,
        tags=[re.sub(r"\s+", "-", tag) for tag in tags],
        metrics=metrics or None,
    )
    return f"---\n{data.to_yaml().strip()}\n---"


def licence(card: Mapping[str, Any]) -> str:
    """Return the hub's name of the licence in a card: ``"other"`` if the hub has none, ``"unknown"`` without a licence.

    Args:
        card: Contents of ``card.json``.
    """
    text = str(card.get("licence") or card.get("license") or "").lower()
    if not text:
        return "unknown"
    return next((name for form, name in _LICENCES.items() if re.search(form, text)), "other")


def _loading(repository: str, open_with: str, estimator: str | None) -> str:
    use = "model.predict(adata)" if estimator else "cellplm.embed(adata, model)"
    return f"""```bash
pip install 'cellplm-jax[hub]'
```

```python
import cellplm_jax as cellplm

model = cellplm.{open_with}("hf://{repository}")  # @REVISION behind it pins a commit
{use}  # adata: raw counts, gene symbols or Ensembl ids
```

Weights are safetensors; nothing is executed or unpickled."""


def _data(card: Mapping[str, Any]) -> str:
    listed = card.get("training_data")
    parts = []
    if isinstance(card.get("data"), str):
        parts.append(card["data"])
    elif isinstance(card.get("data"), list):
        parts.append("\n".join(f"- {entry}" for entry in card["data"]))
    facts = [
        (_words(key), _value(card[key]))
        for key in (*_COUNTS, "datasets", "species", "data_fingerprint")
        if card.get(key) is not None
    ]
    if facts:
        parts.append(_table(("", ""), facts))
    rows = isinstance(listed, list) and all(isinstance(row, dict) for row in listed)
    if rows and listed:
        columns = list(dict.fromkeys(key for row in listed for key in row))
        body = [tuple(_value(row.get(column, "")) for column in columns) for row in listed]
        parts.append(_table(tuple(map(_words, columns)), body))
    elif listed:
        parts.append(_value(listed))
    if not isinstance(card.get("data"), str | list) and not listed:
        parts.insert(0, f"Which data sets: {UNKNOWN[0].lower()}{UNKNOWN[1:]}")
    return "\n\n".join(parts)


def _facts(
    card: Mapping[str, Any],
    keys: tuple[str, ...],
    step: int,
) -> list[tuple[str, str]]:
    facts = [(_words(key), _value(card[key])) for key in keys if card.get(key) is not None]
    training = card.get("training")
    if isinstance(training, dict):
        facts += [
            (f"training: {_words(key)}", _value(value))
            for key, value in training.items()
            if isinstance(value, str | int | float)
        ]
    return [("step of these weights", _value(step)), *facts]


def _architecture(config: ModelConfig, genes: list[str], parameters: int) -> str:
    rows = [("parameters", f"{parameters:,}"), ("genes", f"{len(genes):,} (Ensembl ids)")]
    for name, value in to_dict(config).items():
        if name == "genes":
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{key} {_value(item)}" for key, item in value.items())
        rows.append((_words(name), _value(value)))
    return _table(("", ""), rows)


class _Scores:
    """A table of scores in a card: rows, columns, and its location in the card."""

    def __init__(
        self,
        path: str,
        what: str,
        rows: dict[str, dict[str, float]],
    ):
        self.path = path
        self.what = what
        self.rows = rows
        self.columns = list(dict.fromkeys(column for row in rows.values() for column in row))


def _numbers(value: Any) -> dict[str, float]:
    if not isinstance(value, dict):
        return {}
    # True is an int.
    return {k: v for k, v in value.items() if isinstance(v, int | float) and v is not True}


def _score_tables(card: Mapping[str, Any]) -> Iterator[_Scores]:
    for key, value in card.items():
        if isinstance(value, dict) and key not in ("machine", "versions", "unused_parameters"):
            yield from _tables_in(key, value, str(value.get("what", "")))


def _tables_in(path: str, value: dict[str, Any], what: str) -> Iterator[_Scores]:
    """Yield nested dictionaries of numbers."""
    rows = {
        name: _numbers(inner)
        for name, inner in value.items()
        if isinstance(inner, dict) and len(_numbers(inner)) == len(inner) > 0
    }
    if rows:
        yield _Scores(path, what, rows)
    for name, inner in value.items():
        if isinstance(inner, dict) and name not in rows:
            yield from _tables_in(f"{path} / {name}", inner, what)


def _scores(tables: list[_Scores]) -> str:
    if not tables:
        return "No scores are stated in the model's `card.json`; none were made for this page."
    parts = []
    for table in tables:
        body = [
            (name, *(_value(row.get(column, "")) for column in table.columns))
            for name, row in table.rows.items()
        ]
        caption = f"`card.json`, {table.path}{f': {table.what}' if table.what else ''}."
        parts.append(f"{caption}\n\n{_table(('', *map(_words, table.columns)), body)}")
    return "\n\n".join(parts)


def _limits(card: Mapping[str, Any]) -> str:
    general = (
        "Input is raw counts of human genes (mouse genes through their one-to-one orthologues). An embedding depends "
        "on which cells are embedded together. Batches are not mixed unless the model was trained for it. Compare with "
        "principal components of your own data before relying on it."
    )
    stated = card.get("limits")
    return f"{stated}\n\n{general}" if stated else f"Of this model: {UNKNOWN.lower()} {general}"


def _words(key: str) -> str:
    return key.replace("_", " ")


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{_words(str(key))} {_value(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_value, value)) if value else "none"
    return str(value)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    def line(cells: tuple[str, ...]) -> str:
        return (
            # A card can contain any text, which must not break the table.
            "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
        )

    rule = "|" + "---|" * len(head)
    return "\n".join([line(head), rule, *(line(tuple(map(str, row))) for row in rows)])
