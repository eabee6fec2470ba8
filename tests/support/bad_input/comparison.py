"""Bad input to comparisons and their reports. Nothing has run, and nothing is in the folder, when it is refused."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule

from lightning_cap.cli import CAPTrainer
from lightning_cap.comparison import LossSurface, compare
from lightning_cap.comparison.records import SurfaceRecord
from lightning_cap.errors import CAPError, ConfigError, DataError, PatternError, UnsupportedError
from lightning_cap.pruners import CAP, DropAndGrow, Magnitude
from lightning_cap.report import markdown, print_comparison, report
from lightning_cap.report.curves import plot_accuracy, plot_grid, plot_losses
from lightning_cap.report.heatmaps import plot_surface
from lightning_cap.report.mask_plots import mask_agreement, plot_layers
from tests.support.bad_input.table import NO_COUNTS, NO_HEALS, NO_NUMBERS, Command, Line, wrong
from tests.support.checkpoints import RunsCode, checkpoint
from tests.support.comparing import Data
from tests.support.comparison_records import UNPRUNED
from tests.support.toy import Toy, cap, trainer

_CONFIG = str(Path(__file__).parents[3] / "configs" / "digits_compare.yaml")
_NO_LISTS: tuple[Any, ...] = ("0.5", 0.5, None, True, {}, {"a": 1}, object, [])
_NO_SIZES = tuple(value for value in NO_COUNTS if not (isinstance(value, int) and value == 0))
_NO_BATCHES = tuple(value for value in NO_COUNTS if value is not None)
_TWO = {"CAP": cap(), "GM": Magnitude()}


def _compare(**given: Any) -> Any:
    return compare(
        **{
            "trainer": trainer("."),
            "model": Toy(scheduler=False),
            "pruners": _TWO,
            "sparsities": [0.5],
            "datamodule": Data(),
            **given,
        }
    )


_compare.__name__ = "compare"


def _oneshot(**given: Any) -> Any:
    run = CAPTrainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    return run.oneshot(
        **{"model": Toy(scheduler=False), "pruner": Magnitude(), "sparsities": [0.5], "datamodule": Data(), **given}
    )


_oneshot.__name__ = "oneshot"


def _line(
    name: str,
    words: tuple[str, ...],
    error: type[CAPError] = ConfigError,
    prepare: Callable[[Path], Any] | None = None,
    **given: Any,
) -> Line:
    return Line(f"compare: {name}", lambda _: _compare(**given), error, words, prepare or (lambda folder: None))


def _results(text: str) -> Callable[[Path], Any]:
    def make(folder: Path) -> None:
        (folder / "out").mkdir()
        (folder / "out/results.jsonl").write_text(text)

    return make


def _occupied(folder: Path) -> None:
    (folder / "file").write_text("not a folder")


def _command(words: tuple[str, ...], *args: str, **files: bytes) -> Command:
    named = {name.replace("_ckpt", ".ckpt"): content for name, content in files.items()}
    return Command(f"oneshot {' '.join(args)}: {words[-1]}", ["oneshot", "--config", _CONFIG, *args], words, named)


def _saved(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


LINES = [
    _command(("ckpt_path='runs/digits_dense/dense.ckpt'", "No such file")),
    _command(("ckpt_path='a.ckpt'", "could run code"), "--ckpt_path=a.ckpt", a_ckpt=_saved({"x": RunsCode()})),
    _command(("ckpt_path='a.ckpt'", "another model"), "--ckpt_path=a.ckpt", a_ckpt=_saved(checkpoint())),
    _command(("output_dir='/proc/none'", "cannot be written to"), "--ckpt_path=null", "--output_dir=/proc/none"),
    *wrong(_compare, "trainer", None, "trainer", 3, CAPTrainer),
    *wrong(_compare, "model", None, "model", 3, torch.nn.Linear(2, 2)),
    *wrong(_compare, "datamodule", "data", 3, [1], Data, torch.ones(3)),
    *wrong(_compare, "datamodule", None, words=["val_dataloader()"]),
    _line("no val_dataloader", ("datamodule=Lightning", "val_dataloader()"), datamodule=LightningDataModule()),
    _line("no validation_step", ("model=LightningModule", "validation_step()"), model=LightningModule()),
    *wrong(_compare, "pruners", None, "CAP", 3, [], {}, [CAP()], CAP),
    *wrong(_compare, "sparsities", *_NO_LISTS),
    *wrong(_compare, "seeds", *_NO_LISTS, [0.0], [True], ["0"], [None], [float("nan")], [0, 0], [-1]),
    *wrong(_compare, "include", "net.*", 3, True, [3], [""], {"a": 1}),
    *wrong(_compare, "exclude", "net.*", 3, True, [None], {"a": 1}),
    *wrong(_compare, "folder", 3, True, "", ["a"], object),
    *wrong(_compare, "ckpt_path", 3, True, ["a"], "", object, "best", "last", "hpc"),
    *wrong(_compare, "num_recomputations", *NO_COUNTS, 10**12),
    *wrong(_compare, "heal", *NO_HEALS),
    *wrong(_compare, "recalibrate", None, 1, "yes", []),
    *wrong(_compare, "recomputation_path", None, True, "cubic", ["linear"], 2),
    *wrong(_compare, "grids", "damp", 3, True, ["damp"], object),
    *wrong(_compare, "surface", "CAP", 3, {"pruners": ["CAP", "GM"]}, LossSurface),
    *wrong(_compare, "fisher_block", *_NO_SIZES, given={"folder": "out"}),
    *wrong(_compare, "fisher_block", 257, 10**9, given={"folder": "out"}, words=["from 1 to 256"]),
    *wrong(_compare, "save_weights", "yes", 1, 0, [True], given={"folder": "out"}),
    *wrong(_compare, "loss_samples", *_NO_SIZES, 10**9),
    *wrong(_compare, "max_rows_memory", "much", True, -1, 0, [3]),
    *wrong(LossSurface, "pruners", "CAP", None, 3, ["CAP"], ["a", "b", "c"], [1, 2], given={"sparsity": 0.5}),
    *wrong(LossSurface, "sparsity", *NO_NUMBERS, 1.0, -0.1, given={"pruners": ["CAP", "GM"]}),
    *wrong(LossSurface, "points", *NO_COUNTS, 1, 10**6, given={"pruners": ["CAP", "GM"], "sparsity": 0.5}),
    *wrong(
        LossSurface,
        "batches",
        *_NO_BATCHES,
        given={"pruners": ["CAP", "GM"], "sparsity": 0.5},
    ),
    *wrong(LossSurface, "margin", *NO_NUMBERS, -0.1, 11, given={"pruners": ["CAP", "GM"], "sparsity": 0.5}),
    *(
        _line(f"a sparsity of {value!r}", ("sparsities=", "in [0, 1)"), PatternError, sparsities=[value])
        for value in ("0.5", None, True, float("nan"), float("inf"), 1.0, -0.1, 50, [0.5])
    ),
    *(
        _line(f"a pruner that is {value!r}", ("pruners['a']=",), pruners={"a": value})
        for value in ("CAP", None, 3, CAP, [CAP()])
    ),
    *(
        _line(f"a pruner called {name[:20]!r}", ("pruners: ", "is no name"), pruners={name: Magnitude()})
        for name in ("a\nb", "a\0b", "n" * 300, "\x1b[31m")
    ),
    *(
        _line(f"a pruner called {name!r}", ("pruners: ", "cannot be used"), pruners={name: Magnitude()})
        for name in ("", "..", "/", "unpruned", "Masks")
    ),
    _line("a name that is no string", ("pruners: 3 is no name",), pruners={3: Magnitude()}),
    _line("a pruner that regrows", ("DropAndGrow",), UnsupportedError, pruners={"RigL": DropAndGrow()}),
    *(
        _line(f"a grid of {value!r}", ("grids: damp=",), grids={"damp": value})
        for value in ("0.1", 0.1, None, [], {}, True, [0.1, 0.1], [1, 1.0])
    ),
    *(_line(f"a grid with a damp of {value!r}", ("damp=",), grids={"damp": [value]}) for value in (-1.0, float("nan"))),
    *(
        _line(f"a grid with {value!r} recomputations", ("num_recomputations=",), grids={"num_recomputations": [value]})
        for value in ("2", None, 2.5, 0, True, 10**12)
    ),
    _line("a grid of no setting", ("grids: no pruner", "'dam'"), grids={"dam": [1.0]}),
    _line("a grid of a number", ("grids: no pruner", "setting 3"), grids={3: [1.0]}),
    _line("a folder that is a file", ("folder='file'", "cannot be written to"), prepare=_occupied, folder="file"),
    _line("a folder in a file", ("folder='file/out'", "cannot be written to"), prepare=_occupied, folder="file/out"),
    _line("a folder in no folder", ("folder='/proc/none'", "cannot be written to"), folder="/proc/none"),
    _line("too long a folder", ("folder=", "cannot be written to"), folder="a" * 300),
    *(
        _line(f"results that are {text!r}", ("results.jsonl, line 1",), DataError, _results(text), folder="out")
        for text in (
            "5\n",
            "null\n",
            "[]\n",
            '"x"\n',
            "{}\n",
            '{"record": "event"}\n',
            '{"record": "comparison", "version": 1}\n',
            "x\n\n",
        )
    ),
    _line("no checkpoint", ("ckpt_path='a.ckpt'", "cannot be read"), DataError, ckpt_path="a.ckpt"),
    _line(
        "another model's checkpoint",
        ("ckpt_path='a.ckpt'", "another model"),
        DataError,
        lambda folder: torch.save(checkpoint(), folder / "a.ckpt"),
        ckpt_path="a.ckpt",
        folder="out",
    ),
    *wrong(_oneshot, "pruner", "CAP", 3, CAP),
    *wrong(_oneshot, "pruners", "CAP", 3, {}, given={"pruner": None}),
    *wrong(_oneshot, "output_dir", None, 3, "", True),
    *wrong(_oneshot, "output_dir", "/proc/none", words=["cannot be written to"]),
    *wrong(_oneshot, "ckpt_path", "a.ckpt", error=DataError, words=["cannot be read"]),
    *wrong(markdown, "records", None, [], "records", 3, [3], [{"pruner": "CAP"}]),
    *wrong(print_comparison, "records", None, [], "records", [None]),
    *wrong(plot_accuracy, "records", None, [], [3], given={"path": Path("a.png")}),
    *wrong(plot_losses, "records", None, [], [3], given={"path": Path("a.png")}),
    *wrong(plot_layers, "records", None, [], [3], given={"path": Path("a.png")}),
    *wrong(plot_grid, "records", None, [], [3], given={"path": Path("a.png"), "setting": "damp"}),
    *wrong(plot_grid, "setting", None, 3, "damp", given={"path": Path("a.png"), "records": [UNPRUNED]}),
    *wrong(mask_agreement, "records", None, [], [3], given={"folder": Path("a")}),
    *wrong(plot_surface, "surface", None, {}, SurfaceRecord, given={"path": Path("a.png")}),
    *wrong(plot_accuracy, "path", "a.png", Path("a"), Path("a.gif"), given={"records": [UNPRUNED]}),
    *wrong(report, "records", None, [], "records", given={"folder": Path("out")}),
]
