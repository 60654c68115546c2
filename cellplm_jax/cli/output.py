"""What the verbs write: lines for people."""

from __future__ import annotations

import argparse
import sys
from typing import Any


def say(text: str, stream: Any = None) -> None:
    """Write a line, to standard output by default."""
    stream = sys.stdout if stream is None else stream
    stream.write(f"{text}\n")


def say_table(table: dict[str, dict[str, float]]) -> None:
    """Write scores of several methods as a table."""
    columns = (
        "ari",
        "ari_coarse",
        "nmi",
        "knn_accuracy",
        "masked_correlation",
        "nb_log_likelihood",
    )
    width = max(map(len, table)) + 2
    say(" " * width + "".join(f"{name:>20}" for name in columns))
    for method, scores in table.items():
        values = (f"{scores[name]:20.4f}" if name in scores else f"{'-':>20}" for name in columns)
        say(f"{method:<{width}}" + "".join(values))


def say_scores(scores: dict[str, float]) -> None:
    """Write scores in one line."""
    say("  ".join(f"{name} {value:.3f}" for name, value in scores.items()))


def number_of(count: int, what: str) -> str:
    """Return a count and what is counted, such as ``"2 genes"``."""
    return f"{count} {what}" if count == 1 else f"{count:,} {what}s"


def say_fitted(arguments: argparse.Namespace, what: str, facts: dict[str, Any]) -> None:
    """Say in one line what was fitted."""
    line = f"wrote {arguments.out}: {what}, {facts['training_cells']} training cells"
    if "best_epoch" in facts:
        line += f", epoch {facts['best_epoch']} of {facts['epochs']} kept, {facts['seconds']:.0f} s"
    say(line)
