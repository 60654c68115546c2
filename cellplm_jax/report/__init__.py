"""Self-contained HTML pages: how one is written, and what the pages of the verbs show."""

from cellplm_jax.report.html import Code, Figure, Section, Table, Text, render_report, write_report

__all__ = ["Code", "Figure", "Section", "Table", "Text", "render_report", "write_report"]
