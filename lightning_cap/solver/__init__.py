"""OBS elimination and reconstruction of blocks; one file per backend, one `eliminate` in front."""

from lightning_cap.solver.eliminate import Elimination, eliminate
from lightning_cap.solver.independent_updates import update_independently
from lightning_cap.solver.reconstruct import reconstruct

__all__ = ["Elimination", "eliminate", "reconstruct", "update_independently"]
