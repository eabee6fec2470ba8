"""What a Trainer is configured for, which need not be this machine."""

from __future__ import annotations

from dataclasses import dataclass

import lightning.pytorch as pl
import torch
from lightning.pytorch.accelerators import CPUAccelerator, CUDAAccelerator

from lightning_cap.fisher.memory_plan import Deployment
from lightning_cap.utilities.memory import free_memory, parse_bytes

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a plan is asked for, besides the configuration.

    Attributes:
        accelerator: That the run is configured for, where it is not here: ``"gpu"`` or ``"cuda"``; empty if it is.
        device_memory: Of each device, as ``"80GB"`` or bytes. Default: that of this machine, if it has such a device.
        host_memory: Main memory of a machine. Default: what is free on this one, unless the run is to be on GPUs that are not here.
        train_images: For training, all in all. See `random_data`.
        measure: Whether seconds are measured.
        advice: Told besides, where an event does not fit into the memory of this machine.

    Raises:
        ConfigError: An amount of memory is none.
    """

    accelerator: str = ""
    device_memory: int | str | None = None
    host_memory: int | str | None = None
    train_images: int | None = None
    measure: bool = True
    advice: str = ""

    def __post_init__(self) -> None:
        parse_bytes(self.device_memory, "device_memory")
        parse_bytes(self.host_memory, "host_memory")


def machine_of(trainer: pl.Trainer, settings: Settings, model_bytes: int) -> Deployment:
    """Where a run is to be, with what is free for an event when the model is there.

    Args:
        trainer: As configured, on the CPU where its accelerator is not here.
        settings: Of the plan.
        model_bytes: Weights, gradients and the optimizer's state, for each process.
    """
    processes, local = max(1, trainer.world_size), max(1, trainer.num_devices)
    on_device = parse_bytes(settings.device_memory, "device_memory")
    on_host = parse_bytes(settings.host_memory, "host_memory")
    if not settings.accelerator and isinstance(trainer.accelerator, CPUAccelerator):
        given = on_host if on_host is not None else on_device
        free = free_memory(CPU) if given is None else given - local * model_bytes
        each = None if free is None else max(1, free // local)
        return Deployment(CPU, each, each, processes, settings.advice)
    elsewhere = bool(settings.accelerator)
    cuda = elsewhere or isinstance(trainer.accelerator, CUDAAccelerator)
    if on_device is None and cuda and not elsewhere:
        on_device = torch.cuda.get_device_properties(0).total_memory
    if on_host is None and not elsewhere:
        on_host = free_memory(CPU)
    return Deployment(
        torch.device("cuda") if cuda else trainer.strategy.root_device,
        None if on_device is None else max(1, on_device - model_bytes),
        None if on_host is None else max(1, on_host // local),
        processes,
    )
