"""What a case of a campaign returns.

A campaign is a module ``campaign_NAME.py`` with two functions: ``prepare(folder)`` makes its inputs in an empty folder,
and ``try_case(inputs, seed)`` tries one case, which depends on the seed only.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """Result of one case.

    Attributes:
        kind: Row of the table, such as a format or a command.
        result: Column of the table, such as ``"refused"``.
        ok: Whether the result is allowed.
        detail: Everything that is needed to understand a failure.
        seconds: A time that the table shows as a maximum; 0: none.
    """

    kind: str
    result: str
    ok: bool
    detail: str = ""
    seconds: float = 0.0
