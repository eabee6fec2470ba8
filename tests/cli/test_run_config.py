"""The configuration that a run leaves behind is one that a run can begin with."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from lightning_cap.cli import main
from lightning_cap.cli.run_config import make_readable

CONFIG = Path(__file__).parents[2] / "configs" / "digits_gradual.yaml"


def test_what_jsonargparse_writes_of_a_timm_model_is_made_readable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(*args: str) -> str:
        monkeypatch.setattr(sys, "argv", ["lightning-cap", *args])
        with pytest.raises(SystemExit):
            main()
        captured = capsys.readouterr()
        return captured.out or captured.err

    saved = tmp_path / "config.yaml"
    saved.write_text(told("fit", "--config", str(CONFIG), "--print_config"))
    monkeypatch.chdir(tmp_path)
    begin = ("fit", "--config", str(saved), "--trainer.max_epochs=2")  # whose schedule goes on to epoch 100
    assert "block_fn" in told(*begin)  # else there is nothing to mend
    make_readable(saved)
    assert saved.read_text().startswith("# lightning.pytorch==")
    assert "schedule" in told(*begin)  # all classes were made
    *_, callback = yaml.safe_load(saved.read_text())["trainer"]["callbacks"]
    assert callback["init_args"]["schedule"]["init_args"]["steps"] == {60: 0.5, 80: 0.75, 100: 0.9}
