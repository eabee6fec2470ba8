"""Tables, plots and pages of results; reads records, never trains."""

from lightning_cap.report.comparison import markdown, print_comparison, report
from lightning_cap.report.page import write_report

__all__ = ["markdown", "print_comparison", "report", "write_report"]
