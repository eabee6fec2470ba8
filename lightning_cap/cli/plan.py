"""``lightning-cap plan``: what ``fit`` or ``oneshot`` would do and cost, told from the same configuration, without its data."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from lightning.pytorch.strategies import StrategyRegistry

from lightning_cap.callbacks.checks import refuse_sharding_by
from lightning_cap.cli.bases import setting_names
from lightning_cap.cli.files import CONFIG, check_files
from lightning_cap.cli.lightning_cli import CAPCLI, CAPTrainer, comparison_arguments
from lightning_cap.cli.messages import near
from lightning_cap.cli.parsing import CAPParser
from lightning_cap.errors import ConfigError
from lightning_cap.planning import RunPlan, plan_fit, plan_oneshot, print_plan
from lightning_cap.planning.machine import Settings
from lightning_cap.utilities.arguments import require_whole, shown

SUMMARY = "Tell what fit, or oneshot, would do and cost, without its data and without training."

_DESCRIPTION = f"""{SUMMARY}

It takes what fit takes, or where the configuration has sparsities, what oneshot takes: --config FILE, and any setting after it.
Prints what is pruned and what is not and why, sparsity and learning rate over the run, and for the pruning events memory, disk and
seconds, measured for about a second here. What fit would refuse is refused here. Nothing is written and nothing is downloaded.
"""
_ONESHOT = ("sparsities", "pruner", "pruners")
_GPUS = ("gpu", "cuda")
_ELSEWHERE = "If the run is to be on GPUs that are not here, give --device_memory, such as 80GB."


class _Options(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"plan: {message}")


def plan_parser() -> CAPParser:
    """The options of ``lightning-cap plan`` that are its own, for the list of commands."""
    parser = CAPParser(prog="lightning-cap plan", description=_DESCRIPTION)
    _add_options(parser)
    parser.add_argument(
        "-c", "--config", type=str | None, default=None, help="As of fit or oneshot; other settings follow."
    )
    return parser


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="Print one JSON document and nothing else.")
    for name, told in (
        (
            "--device_memory",
            "Memory of each GPU, as 80GB: plan for GPUs that are not here. Default: that of this machine.",
        ),
        (
            "--host_memory",
            "Main memory of a machine, as 512GB. Default: what is free here, unless the GPUs are not here.",
        ),
        ("--train_images", "Training samples, where the data module does not tell how many there are."),
    ):
        parser.add_argument(name, default=None, help=told)
    parser.add_argument("--no_measure", action="store_true", help="Do not measure seconds.")


class PlanCLI(CAPCLI):
    """The command line of a run, which is planned instead.

    Args:
        settings: Of the plan.
        args: Those of the run, its subcommand first.

    Attributes:
        plan: Of the run.
    """

    plan: RunPlan

    def __init__(self, settings: Settings, args: list[str]) -> None:
        self._given, self._accelerator, self._advice, self._notes = settings, "", "", list[str]()
        super().__init__(trainer_class=CAPTrainer, args=args, save_config_callback=None)

    def look_at_checkpoint(self, path: Any, resumes: bool) -> None:
        """One that is not there yet is no mistake: the run before it may not have been."""
        if isinstance(path, str) and path.strip() and not Path(path).exists():
            self._notes.append(
                f"ckpt_path={shown(path)} is not there (yet): planned for a model without zeros, from epoch 0"
            )
            return
        super().look_at_checkpoint(path, resumes)
        if path is not None:
            self._notes.append("ckpt_path is not loaded: planned for a model without zeros, from epoch 0")

    def before_instantiate_classes(self) -> None:
        """No weights are loaded, and what is not here is not asked for: the Trainer is of the CPU then."""
        super().before_instantiate_classes()
        trainer = self._own_config["trainer"]
        wanted = str(trainer.get("accelerator") or "auto").lower()
        if not torch.cuda.is_available():
            if wanted in _GPUS or (wanted == "auto" and self._given.device_memory is not None):
                self._accelerator = "gpu"
                _refuse_sharding(trainer.get("strategy"))
                trainer["accelerator"], trainer["devices"] = "cpu", self._count(trainer.get("devices", "auto"))
            elif wanted == "auto":
                self._advice = _ELSEWHERE
        model = self._own_config.get("model")
        given = model.get("init_args") if model is not None else None
        if given is None:
            return
        if given.get("pretrained") is True:
            given["pretrained"] = False
            self._notes.append("pretrained=true: nothing is downloaded, the weights are random")
        if given.get("checkpoint") is not None:
            self._notes.append(f"checkpoint={shown(given['checkpoint'])} is not loaded, the weights are random")
            given["checkpoint"] = None

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Its ``fit`` and ``oneshot`` plan."""
        trainer = super().instantiate_trainer(**kwargs)
        vars(trainer).update(fit=self._fit, oneshot=self._oneshot)
        return trainer

    @property
    def _settings(self) -> Settings:
        return replace(self._given, accelerator=self._accelerator, advice=self._advice)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the plan leaves out."""
        return tuple(self._notes)

    @property
    def _own_config(self) -> Any:
        return self.config[self.config["subcommand"]]

    def _count(self, devices: Any) -> int:
        """How many devices a machine has."""
        if isinstance(devices, (list, tuple)):
            return len(devices)
        if isinstance(devices, str) and "," in devices:
            return len([part for part in devices.split(",") if part.strip()])
        if isinstance(devices, str) and devices.strip().isdecimal():
            devices = int(devices)
        if devices in ("auto", -1, "-1"):
            self._notes.append(f"trainer.devices={devices}: planned for one device a machine; give their number")
            return 1
        require_whole("trainer.devices", devices, example=8)
        return int(devices)

    def _fit(self, model: Any, datamodule: Any = None, **_: Any) -> None:
        self.plan = plan_fit(self.trainer, model, datamodule, self._settings)

    def _oneshot(self, model: Any, datamodule: Any = None, ckpt_path: Any = None, **given: Any) -> None:
        self.plan = plan_oneshot(self.trainer, model, datamodule, self._settings, **comparison_arguments(**given))


def plan(args: Sequence[str]) -> RunPlan:
    """Do what ``lightning-cap plan`` is to do.

    Args:
        args: After the word ``plan``.

    Returns:
        The plan that was printed.

    Raises:
        CAPError: What ``fit`` or ``oneshot`` would refuse.
    """
    if any(arg in ("-h", "--help") for arg in args):
        plan_parser().print_help()
        raise SystemExit(0)
    options = _Options(add_help=False, allow_abbrev=False)
    _add_options(options)
    own, rest = options.parse_known_args(list(args))
    names = [string for action in options._actions for string in action.option_strings]
    for given in rest:
        option = given.partition("=")[0]
        if meant := near(option, names, 0.8) if option.startswith("--") else "":
            raise ConfigError(f"plan: unrecognized arguments: {option}{meant}")
    images = own.train_images
    if images is not None:
        images = int(images) if str(images).isdecimal() else images
        require_whole("--train_images", images, example=1281167)
    settings = Settings(
        device_memory=own.device_memory, host_memory=own.host_memory, train_images=images, measure=not own.no_measure
    )
    with _told_elsewhere():
        cli = PlanCLI(settings, [_command(rest), *rest])
    found = cli.plan.with_notes(cli.notes)
    if own.json:
        print(json.dumps(found.to_json()))
    else:
        print_plan(found)
    return found


def _command(args: Sequence[str]) -> str:
    """``"oneshot"`` where a configuration file or an option names something that only this has, else ``"fit"``."""
    check_files(args)
    options = list(args)
    for place, argument in enumerate(options):
        option, equals, value = argument.partition("=")
        if option.removeprefix("--").split(".")[0] in _ONESHOT and option.startswith("--"):
            return "oneshot"
        if option in CONFIG and (equals or place + 1 < len(options)):
            file = Path(value if equals else options[place + 1])
            if file.is_file() and not setting_names(file).isdisjoint(_ONESHOT):
                return "oneshot"
    return "fit"


def _refuse_sharding(strategy: Any) -> None:
    """Of a strategy for GPUs that are not here, by its name."""
    if isinstance(strategy, str) and strategy in StrategyRegistry:
        refuse_sharding_by(StrategyRegistry[strategy]["strategy"])


@contextlib.contextmanager
def _told_elsewhere() -> Iterator[None]:
    """Keep standard output for the plan, and Lightning's news of a run to itself."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*LightningCLI's args parameter.*")
            yield
    finally:
        logger.setLevel(level)
