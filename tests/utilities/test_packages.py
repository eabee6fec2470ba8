"""Packages that are missing."""

from __future__ import annotations

import pytest

from lightning_cap.errors import ConfigError, DataError
from lightning_cap.utilities.packages import require_package


def test_a_missing_package_is_one_error_that_says_how_to_get_it() -> None:
    require_package("torch", "X", "any")
    with pytest.raises(ConfigError) as by_extra:
        require_package("no_such_package", "X", "quantization")
    assert str(by_extra.value) == (
        "X needs the package no_such_package, not installed here: pip install 'lightning-cap[quantization]'."
    )
    with pytest.raises(DataError, match=r"not installed here: pip install no_such_package\.$"):
        require_package("no_such_package", "name='hf/a'", error=DataError)
