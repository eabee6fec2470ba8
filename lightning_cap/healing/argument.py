"""What can be given as ``heal``."""

from __future__ import annotations

from lightning_cap.errors import ConfigError
from lightning_cap.healing.base import Heal
from lightning_cap.healing.distill import DistillHeal
from lightning_cap.healing.layerwise import LayerwiseHeal
from lightning_cap.utilities.arguments import require_instance, shown

_NAMED: dict[str, type[Heal]] = {"layerwise": LayerwiseHeal, "distill": DistillHeal}


def as_heal(value: object) -> Heal | None:
    """``value`` itself if it is a `Heal` or None, or that of a name with its defaults.

    Raises:
        ConfigError: It is something else.
    """
    if value is None or isinstance(value, Heal):
        return value
    if isinstance(value, str) and value in _NAMED:
        return _NAMED[value]()
    if isinstance(value, type):
        require_instance("heal", value, Heal, "LayerwiseHeal()")
    raise ConfigError(
        f"heal={shown(value)}: give 'layerwise', 'distill', a Heal, such as LayerwiseHeal(ridge=0.1), or None."
    )
