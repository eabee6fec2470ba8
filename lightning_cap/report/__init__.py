"""Tables and plots of results; reads records, never trains."""

from lightning_cap.report.comparison import markdown, print_comparison, report

__all__ = ["markdown", "print_comparison", "report"]
