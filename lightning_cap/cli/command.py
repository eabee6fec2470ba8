"""The ``lightning-cap`` command: Lightning's subcommands, and those that are no methods of the Trainer."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from lightning_cap.cli.export import SUMMARY as EXPORT_SUMMARY
from lightning_cap.cli.export import export, export_parser
from lightning_cap.cli.finetune_sweep import SUMMARY as SWEEP_SUMMARY
from lightning_cap.cli.finetune_sweep import finetune_sweep, finetune_sweep_parser
from lightning_cap.cli.lightning_cli import CAPCLI, CAPTrainer, SaveConfig
from lightning_cap.cli.mistakes import mistake_behind
from lightning_cap.cli.parsing import CAPParser
from lightning_cap.cli.plan import SUMMARY as PLAN_SUMMARY
from lightning_cap.cli.plan import plan, plan_parser
from lightning_cap.cli.report import SUMMARY as REPORT_SUMMARY
from lightning_cap.cli.report import report, report_parser

_RUN: dict[str, Callable[[list[str]], Any]] = {
    "export": export,
    "finetune-sweep": finetune_sweep,
    "plan": plan,
    "report": report,
}


class _Command(CAPCLI):
    """All subcommands."""

    @classmethod
    def others(cls) -> Mapping[str, tuple[CAPParser, str]]:
        return {
            "export": (export_parser(), EXPORT_SUMMARY),
            "finetune-sweep": (finetune_sweep_parser(), SWEEP_SUMMARY),
            "plan": (plan_parser(), PLAN_SUMMARY),
            "report": (report_parser(), REPORT_SUMMARY),
        }


def main(args: list[str] | None = None) -> None:
    """Entry point of the console script. A user's mistake ends it with one line and exit code 2; the rest keeps its traceback.

    Args:
        args: Command line, None for that of the process.
    """
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # class paths may name a file of the user's beside the configuration
    overwrite: dict[str, Any] = {"overwrite": True}
    given = sys.argv[1:] if args is None else args
    try:
        if given and given[0] in _RUN:
            _RUN[given[0]](given[1:])
            return
        _Command(trainer_class=CAPTrainer, args=args, save_config_callback=SaveConfig, save_config_kwargs=overwrite)
    except Exception as error:
        mistake = mistake_behind(error)
        if mistake is None:
            raise
        told = SystemExit(f"lightning-cap: error: {' '.join(str(mistake).split())}")
        print(told, file=sys.stderr)
        told.code = 2  # as argparse's own mistakes
        raise told from None
