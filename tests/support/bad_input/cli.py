"""Bad input to the ``lightning-cap`` command: options, YAML, class paths and what Lightning's Trainer refuses."""

from __future__ import annotations

from collections.abc import Mapping

from tests.support import ROOT
from tests.support.bad_input.table import Command

GRADUAL = str(ROOT / "configs/digits_gradual.yaml")
TEXT = (ROOT / "configs/digits_gradual.yaml").read_text().replace("[parts/", f"[{ROOT}/configs/parts/")
PRUNER, SCHEDULE = "--trainer.callbacks.pruner", "--trainer.callbacks.schedule"


def fit(name: str, options: list[str], *words: str, environment: Mapping[str, str | None] | None = None) -> Command:
    """``fit`` of a whole configuration and a wrong option."""
    return Command(f"fit {name}", ["fit", "--config", GRADUAL, *options], words, environment=environment or {})


def config(name: str, content: str | bytes, *words: str) -> Command:
    """A wrong configuration file."""
    return Command(
        f"config: {name}", ["fit", "--config", "config.yaml"], ("config.yaml", *words), {"config.yaml": content}
    )


def changed(old: str, new: str) -> str:
    assert old in TEXT
    return TEXT.replace(old, new)


def based(base: str) -> str:
    """The configuration with another ``base``."""
    return "\n".join(f"base: {base}" if line.startswith("base:") else line for line in TEXT.splitlines())


def yaml(name: str, old: str, new: str, *words: str) -> Command:
    """The configuration with a wrong line."""
    return Command(f"yaml: {name}", ["fit", "--config", "config.yaml"], words, {"config.yaml": changed(old, new)})


def oneshot(name: str, options: list[str], *words: str) -> Command:
    args = ["oneshot", "--config", str(ROOT / "configs/digits_oneshot.yaml"), "--ckpt_path=null", *options]
    return Command(f"oneshot {name}", args, words)


LINES: list[Command] = [
    Command("no such command", ["fti"], ("'fti'", "'fit'")),
    Command("no command", ["--config", GRADUAL], ("export", "fit")),
    Command("no configuration", ["fit"], ("fit.model", "--config FILE")),
    Command("an option of no command", ["fit", "--config", GRADUAL, "--confg", "x"], ("--confg", "did you mean '--config'?")),
    fit("--trainer.max_epoch", ["--trainer.max_epoch=3"], "did you mean '--trainer.max_epochs'?"),
    fit("--modl.weight_decay", ["--modl.weight_decay=3"], "did you mean '--model'?"),
    fit("a letter of a setting", [f"{PRUNER}.block_sise=32"], "trainer.callbacks.pruner: Option 'block_sise' is not accepted",
        "did you mean 'block_size'?"),
    fit("no such setting of a model", ["--model.weight_decays=1"], "model: ", "did you mean 'weight_decay'?"),
    fit("no such setting of a timm model", ["--model.model.in_chan=1"], "model.model: ", "did you mean 'in_chans'?"),
    fit("no such setting of an optimizer", ["--model.optimizer.lrr=0.1"], "model.optimizer: ", "did you mean 'lr'?"),
    fit("no such setting of any callback", ["--trainer.callbacks.prunr.damp=1"], "no callback has", "did you mean 'pruner'?"),
    fit("letters for a count", [f"{PRUNER}.num_gradients=abc"], "pruner.num_gradients: give a whole number, not abc"),
    fit("null for a count", [f"{PRUNER}.num_gradients=null"], "pruner.num_gradients: give a whole number, not None"),
    fit("no gradients", [f"{PRUNER}.num_gradients=0"], "num_gradients=0: give a whole number of at least 1"),
    fit("letters for a number", ["--model.weight_decay=abc"], "model.weight_decay: give a number or null, not abc"),
    fit("letters for a learning rate", ["--model.optimizer.lr=abc"], "model.optimizer.lr: give a number", "not abc"),
    fit("letters for epochs", ["--trainer.max_epochs=abc"], "trainer.max_epochs: give a whole number or null, not abc"),
    fit("a list for a number", ["--data.batch_size=[1]"], "data.batch_size: give a whole number"),
    fit("no such choice", [f"{PRUNER}.ranking=best"], "pruner.ranking: give 'marginal', 'cumulative', 'auto', not best"),
    fit("a seed below 0", ["--seed_everything=-1"], "seed_everything=-1"),
    fit("a class of a near name", ["--data=DigitDataModule"], "data: ", "did you mean 'DigitsDataModule'?"),
    fit("a class that its module lacks", ["--data=lightning_cap.data.DigitDataModule"], "did you mean 'DigitsDataModule'?"),
    fit("a module that is not there", ["--data=lightning_cap.dat.DigitsDataModule"], "did you mean 'data'?"),
    fit("a package that is not there", ["--data=lightning_capp.data.DigitsDataModule"], "did you mean 'lightning_cap'?"),
    fit("a class of another kind", ["--data=lightning_cap.pruners.CAP"], "data: ", "LightningDataModule"),
    fit("no such pruner", [f"{PRUNER}=CPA"], "trainer.callbacks.pruner: ", "did you mean 'CAP'?"),
    fit("no such optimizer", ["--model.optimizer=AdamV"], "model.optimizer: give a class path, not AdamV"),
    fit("a callback of no class", ["--trainer.callbacks=[1]"], "trainer.callbacks: ", "Callback"),
    fit("an epoch given twice", [f"{SCHEDULE}.steps={{1: 0.5, 1: 0.6}}"], f"{SCHEDULE}.steps: 1 is given twice"),
    fit("half an epoch in a schedule", [f"{SCHEDULE}.steps={{0.5: 0.5}}"], "0.5"),
    fit("no schedule", [f"{SCHEDULE}=null"], "trainer.callbacks", "schedule"),
    fit("epochs in place of a schedule", ["--trainer.callbacks.schedule={1: a}"], "schedule: "),
    fit("a schedule longer than the run", ["--trainer.max_epochs=3"], "max_epochs=3"),
    fit("no accelerator", ["--trainer.accelerator=gpu"], "accelerator='gpu'", environment={"CUDA_VISIBLE_DEVICES": ""}),
    fit("no package for a TPU", ["--trainer.accelerator=tpu"], "torch_xla"),
    fit("no device", ["--trainer.devices=0", "--trainer.accelerator=cpu"], "trainer: ", "devices='0'"),
    fit("no step between validations", ["--trainer.check_val_every_n_epoch=0"], "trainer.check_val_every_n_epoch=0"),
    fit("no batch in a step", ["--trainer.accumulate_grad_batches=0"], "trainer.accumulate_grad_batches=0"),
    fit("logs where none can be", ["--trainer.logger.save_dir=/dev/null/x"], "trainer.logger=", "/dev/null/x", "cannot be written"),
    fit("heads that do not fit", ["--model.model.num_heads=5"], "VisionTransformer", "divisible"),
    fit("no such checkpoint", ["--ckpt_path=nowhere.ckpt"], "ckpt_path='nowhere.ckpt'"),
    fit("a folder for a checkpoint", ["--ckpt_path=."], "ckpt_path='.'", "folder"),
    fit("a value of --print_config", ["--print_config=x"], "--print_config"),
    Command("no such file", ["fit", "--config", "nowhere.yaml"], ("--config 'nowhere.yaml'", "no such file")),
    Command("a folder for a file", ["fit", "--config", "."], ("--config '.'", "folder")),
    Command("--config=", ["fit", "--config="], ("--config",)),
    Command("--config without a file", ["fit", "--config"], ("--config", "expected one argument")),
    config("empty", "", "is empty"),
    config("a list", "- 1\n- 2\n", "holds no settings by name"),
    config("bytes", bytes(range(256)), "no UTF-8 text"),
    config("UTF-16", TEXT.encode("utf-16"), "no UTF-8 text"),
    config("a tab", "trainer:\n\tmax_epochs: 3\n", "line 2", "is no YAML"),
    config("a key given twice", changed("  max_epochs: 130", "  max_epochs: 130\n  max_epochs: 3"), "'max_epochs' is given twice"),
    config("an epoch given twice", changed("{60: 0.50, 80:", "{60: 0.50, 60:"), "60 is given twice"),
    config("base is a number", based("3"), "base=3: give a list of YAML files"),
    config("base holds a number", based("[3]"), "base=[3]: 3 is no file"),
    config("base is not there", based("[parts/nowhere.yaml]"), "base 'parts/nowhere.yaml': there is no such file"),
    config("base is itself", based("[config.yaml]"), "config.yaml -> config.yaml is a circle"),
    config("base is a folder", based("['.']"), "base '.': is a folder"),
    config("a configuration in a configuration", f"config: [other.yaml]\n{TEXT}", "'config' in a file is not read", "base"),
    Command("a typo in a base", ["fit", "--config", "config.yaml"], ("did you mean 'trainer.max_epochs'?",),
            {"config.yaml": "base: [part.yaml]\n", "part.yaml": changed("max_epochs:", "max_epoch:")}),
    yaml("a section", "trainer:", "trainr:", "'trainr", "did you mean 'trainer"),
    yaml("a setting of the Trainer", "max_epochs:", "max_epoch:", "did you mean 'trainer.max_epochs'?"),
    yaml("a setting of the pruner", "damp:", "dampp:", "trainer.callbacks", "did you mean 'damp'?"),
    yaml("null for a count", "num_gradients: 2048", "num_gradients:", "num_gradients=None: give a whole number"),
    yaml("a class path", "lightning_cap.pruners.CAP", "lightning_cap.pruners.CPA", "did you mean 'CAP'?"),
    yaml("a class of another kind", "lightning_cap.pruners.CAP", "lightning_cap.CyclicLinearLR", "Pruner"),
    yaml("a string for a mapping", "steps: {60: 0.50, 80: 0.75, 100: 0.90}", "steps: half", "steps: give a mapping"),
    yaml("a setting of the schedule", "80: 0.75, 100: 0.90}", "80: 0.75, 100: 0.90}\n            allow_decreas: true",
         "trainer.callbacks.schedule: ", "did you mean 'allow_decrease'?"),
    oneshot("neither pruner nor pruners", ["--pruner=null"], "neither given"),
    oneshot("no sparsity", ["--sparsities=[]"], "sparsities"),
    oneshot("a sparsity above 1", ["--sparsities=[1.5]"], "1.5"),
    oneshot("no such setting", ["--sparsity=[0.5]"], "did you mean '--sparsities'?"),
]  # fmt: skip


def planned(name: str, options: list[str], *words: str, files: Mapping[str, str | bytes] | None = None) -> Command:
    """``plan`` of a configuration of a training run."""
    args = ["plan", "--no_measure", "--json", "--config", "config.yaml" if files else GRADUAL, *options]
    return Command(f"plan {name}", args, words, files or {})


LINES += [
    Command("plan nothing", ["plan"], ("--config FILE",)),
    Command("plan a file that is not there", ["plan", "--config", "none.yaml"], ("'none.yaml'", "no such file")),
    planned("an empty file", [], "is empty", files={"config.yaml": ""}),
    planned("a foreign file", [], "is no YAML", files={"config.yaml": "trainer:\n\tmax_epochs: 3\n"}),
    planned("bytes", [], "no UTF-8 text", files={"config.yaml": bytes(range(256))}),
    planned("a typo in a file", [], "did you mean 'trainer.max_epochs'?",
            files={"config.yaml": changed("max_epochs:", "max_epoch:")}),
    planned("a typo in an option", [f"{PRUNER}.dampp=1"], "did you mean 'damp'?"),
    planned("a schedule longer than the run", ["--trainer.max_epochs=3"], "max_epochs=3"),
    planned("globs that match nothing", ["--trainer.callbacks.include=['*.fc3.weight']"], "'*.fc3.weight' matches no parameter"),
    planned("no memory", ["--trainer.callbacks.pruner.max_memory=1kB"], "max_memory: the pruning event needs"),
    planned("a folder that cannot be", ["--trainer.callbacks.dirpath=/proc/nowhere"], "dirpath='/proc/nowhere'"),
    planned("an amount of memory", ["--device_memory=much"], "device_memory='much'"),
    planned("no amount of main memory", ["--host_memory=-1"], "host_memory='-1'"),
    planned("no number of images", ["--train_images=0"], "train_images=0"),
    planned("too few images", ["--train_images=4"], "batch_size=128", "4 samples"),
    planned("an option with a typo", ["--device_memry=80GB"], "--device_memry; did you mean '--device_memory'?"),
    planned("no devices", ["--trainer.accelerator=gpu", "--trainer.devices=0"], "trainer.devices=0"),
    planned("a strategy that shards", ["--trainer.accelerator=gpu", "--trainer.strategy=fsdp"], "shards parameters"),
    planned("no value of an option", ["--device_memory"], "--device_memory", "expected one argument"),
    Command("plan of a comparison without sparsities",
            ["plan", "--config", str(ROOT / "configs/digits_oneshot.yaml"), "--sparsities=[]"], ("sparsities=[]",)),
]  # fmt: skip
