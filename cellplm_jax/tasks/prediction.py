"""What a task predicts for the cells of an AnnData or of a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Prediction:
    """Prediction of a task for the cells of an AnnData or of a file: what is added to it, by name, and more.

    Attributes:
        obs: Columns of cells.
        var: Columns of genes.
        obsm: Arrays with one row per cell.
        layers: Arrays [n_obs, n_vars].
        uns: Provenance.
        messages: Messages about the input.
        result: Return value of ``predict``; None: the AnnData itself.
    """

    obs: Mapping[str, Any] = field(default_factory=dict)
    var: Mapping[str, Any] = field(default_factory=dict)
    obsm: Mapping[str, Any] = field(default_factory=dict)
    layers: Mapping[str, Any] = field(default_factory=dict)
    uns: Mapping[str, Any] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    result: Any = None

    @property
    def entries(self) -> dict[str, Mapping[str, Any]]:
        """What is added, by part of the AnnData."""
        return {name: getattr(self, name) for name in ("obs", "var", "obsm", "layers", "uns")}
