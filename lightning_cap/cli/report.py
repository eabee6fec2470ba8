"""``lightning-cap report``: a page about runs and comparisons."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_cap.cli.parsing import CAPParser
from lightning_cap.errors import ConfigError
from lightning_cap.report import write_report

SUMMARY = "Write a page about runs and comparisons, with plots, tables and links to their files."

_DESCRIPTION = f"""{SUMMARY}

The page is one file that needs no network and no scripts. It is made from what runs have written down so far, so also of a run
that goes on or was killed. Several folders are put side by side.
"""


def report_parser(**kwargs: Any) -> CAPParser:
    """The options of ``lightning-cap report``."""
    parser = CAPParser(prog="lightning-cap report", description=_DESCRIPTION, **kwargs)
    parser.example = "lightning-cap report runs/digits_gradual/version_0"
    parser.add_argument(
        "run_dir",
        metavar="RUN_DIR",
        nargs="+",
        type=str,
        help="Folder of a run (that of its logger, or its checkpoints) or of a comparison; or several.",
    )
    parser.add_argument(
        "--output", metavar="FILE", type=str | None, default=None, help="Default: report.html in the first folder."
    )
    return parser


def report(args: Sequence[str]) -> Path:
    """Do what ``lightning-cap report`` is to do.

    Args:
        args: After the word ``report``.

    Returns:
        The page.

    Raises:
        CAPError: What is wrong, in one line.
    """
    given = report_parser().parse_args(list(args))
    try:
        page = write_report(given.run_dir, given.output)
    except ConfigError as error:  # by the names that the user has typed
        told = re.sub(r"^folders(?==)", "RUN_DIR", str(error))
        raise type(error)(re.sub(r"^output(?==)", "--output", told)) from error
    print(f"Written to {page}.")
    return page
