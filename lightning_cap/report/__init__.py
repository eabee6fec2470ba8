"""Tables and plots of results; reads results, never trains."""

from lightning_cap.report.sweep import plot_sweep, print_sweep

__all__ = ["plot_sweep", "print_sweep"]
