"""One self-contained HTML page that shows a profile, a plan and what it bought. Reads no artifact, computes no plan."""

from placement.report.page import write_report

__all__ = ["write_report"]
