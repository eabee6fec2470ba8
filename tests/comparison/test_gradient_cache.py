"""Gradient rows that several pruners share."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_cap.calibration.batches import CalibrationBatches
from lightning_cap.calibration.gradients import GradientCollector
from lightning_cap.comparison.gradient_cache import InFile, InMemory, SharedRows, find, share
from lightning_cap.errors import CAPError, ConfigError, DataError
from lightning_cap.sparsity.targets import Targets
from lightning_cap.utilities import distributed
from tests.support.processes import on_ranks
from tests.support.toy import Toy, ToyData, loss


def toy() -> tuple[nn.Module, Targets]:
    torch.manual_seed(0)
    net = Toy().net.eval()
    return net, Targets.from_model(net, include=["0.weight", "4.weight"])


def collector(count: int, m: int = 1) -> GradientCollector:
    net, targets = toy()
    batches = CalibrationBatches(DataLoader(ToyData(), batch_size=8), count * m, m, 3, 0)
    return GradientCollector(net, targets, loss, batches, count, m)


def same(one: Any, other: Any) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(torch.equal(a[name], b[name]) for a, b in pairs for name in a)


def joined(source: Any) -> dict[str, Tensor]:
    chunks = list(source)
    return {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}


@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("memory", [None, 1])
def test_shared_rows_are_those_of_an_own_collection(tmp_path: Path, m: int, memory: int | None) -> None:
    targets = toy()[1]
    rows = share(collector(44, m), targets, 44, tmp_path, "key", memory)
    assert rows is not None
    assert isinstance(rows.chunks, InFile) == (memory is not None)
    assert same(rows, collector(44, m))
    assert same(rows, rows)  # read again
    assert rows.total == 44
    for count in (8, 24, 43):
        first = SharedRows(rows.chunks, rows.counts, count, rows.devices, rows.row_bytes, 0.0)
        got, want = joined(first), joined(collector(count, m))
        for name in want:
            assert got[name].shape == want[name].shape
            if count % 8 == 0:
                assert torch.equal(got[name], want[name])
            else:  # the last batch was computed whole: equal up to rounding
                torch.testing.assert_close(got[name], want[name])
    assert rows.memory().row == max(c["0.weight"].shape[0] for c in rows) * 4 * targets.numel
    rows.chunks.close()
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_an_earlier_run_is_taken_up_if_it_is_whole_and_of_the_same_key(tmp_path: Path) -> None:
    targets = toy()[1]
    assert find(targets, 16, tmp_path, "key") is None
    rows = share(collector(16), targets, 16, tmp_path, "key", 1)
    assert rows is not None
    again = find(targets, 12, tmp_path, "key")
    assert again is not None
    assert same(again, SharedRows(rows.chunks, rows.counts, 12, rows.devices, rows.row_bytes, 0.0))
    assert find(targets, 17, tmp_path, "key") is None  # more than there are
    assert find(targets, 16, tmp_path, "other") is None
    (file,) = tmp_path.glob("*.bin")
    file.write_bytes(file.read_bytes()[:-4])
    assert find(targets, 16, tmp_path, "key") is None


def test_a_collection_that_was_interrupted_is_not_taken_up(tmp_path: Path) -> None:
    class Broken:
        def __iter__(self) -> Any:
            yield from list(collector(16))[:1]
            raise RuntimeError("killed")

    targets = toy()[1]
    with pytest.raises(RuntimeError, match="killed"):
        share(Broken(), targets, 16, tmp_path, "key", 1)
    assert find(targets, 16, tmp_path, "key") is None
    rows = share(collector(16), targets, 16, tmp_path, "key", 1)
    assert rows is not None
    assert same(rows, collector(16))


def test_without_room_nothing_is_read(tmp_path: Path) -> None:
    assert share(iter(()), toy()[1], 16, None, "key", 1) is None
    with pytest.raises(ConfigError, match="max_rows_memory='much'"):
        share(iter(()), toy()[1], 16, None, "key", "much")


def _rank_rows(folder: str, count: int) -> list[dict[str, Tensor]]:
    found = []
    for memory in (None, 1):
        rows = share(collector(44), toy()[1], 44, Path(folder), "key", memory)
        assert rows is not None
        assert rows.total == 44
        first = SharedRows(rows.chunks, rows.counts, count, rows.devices, rows.row_bytes, 0.0)
        assert [c["4.weight"].shape for c in first] == [c["4.weight"].shape for c in collector(count)]
        found.append(joined(first))
    return found


@pytest.mark.xdist_group("processes")
def test_ranks_keep_their_own_rows(tmp_path: Path) -> None:
    want = joined(collector(20))
    for one, two in zip(*on_ranks(2, tmp_path, _rank_rows, str(tmp_path), 20), strict=True):
        assert (len(one["4.weight"]), len(two["4.weight"])) == (12, 8)
        for name in want:
            got = torch.cat([one[name][:8], two[name], one[name][8:]])
            torch.testing.assert_close(got, want[name])


def failing(name: str, call: int = 0) -> Any:
    """A method of `InFile` that meets a full disk at one of its calls."""
    real, calls = getattr(InFile, name), [0]

    def method(self: Any, *args: Any, **_: Any) -> Any:
        calls[0] += 1
        if calls[0] > call:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, *args)

    return method


@pytest.mark.parametrize(("name", "call"), [("begin", 0), ("add", 0), ("add", 2), ("end", 0)])
def test_a_full_disk_means_that_rows_are_not_shared(
    tmp_path: Path, name: str, call: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(InFile, name, failing(name, call))
    assert share(collector(44), toy()[1], 44, tmp_path, "key", 1) is None
    assert list(tmp_path.iterdir()) == []
    assert "No space left on device" in caplog.text


def test_so_does_a_folder_that_cannot_be_made_and_memory_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    assert share(iter(()), toy()[1], 16, tmp_path / "file" / "folder", "key", 1) is None

    def full(self: InMemory, chunk: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(InMemory, "add", full)
    assert share(collector(16), toy()[1], 16, None, "key", None) is None


def test_rows_that_cannot_be_read_again_are_named_and_not_taken_up(tmp_path: Path) -> None:
    targets = toy()[1]
    rows = share(collector(16), targets, 16, tmp_path, "key", 1)
    assert rows is not None
    (file,) = tmp_path.glob("*.bin")
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(DataError, match=r"gradient rows: .* ends too early"):
        list(rows)
    assert list(tmp_path.iterdir()) == []


def _rank_failures(folder: str) -> list[str]:
    """What happens on this rank when the disk fails on the second one alone."""
    found = []
    for name, call in (("begin", 0), ("add", 1), ("end", 0)):
        with pytest.MonkeyPatch.context() as patch:
            if distributed.rank() == 1:
                patch.setattr(InFile, name, failing(name, call))
            found.append(str(share(collector(44), toy()[1], 44, Path(folder) / name, "key", 1)))
        found.append(str(distributed.gather_objects(sorted((Path(folder) / name).iterdir()))[0]))
    with pytest.MonkeyPatch.context() as patch:
        if distributed.rank() == 1:
            patch.setattr(Path, "mkdir", failing("begin"))  # fails at once
        found.append(str(share(collector(44), toy()[1], 44, Path(folder) / "new", "key", 1)))
    rows = share(collector(44), toy()[1], 44, Path(folder) / "read", "key", 1)
    with pytest.MonkeyPatch.context() as patch:
        if distributed.rank() == 1:
            patch.setattr(InFile, "read", failing("read", 1))
        try:
            found.append(str(len(list(rows or ()))))
        except CAPError as error:
            found.append("no space to read" if "No space left on device" in str(error) else str(error))
    return found


@pytest.mark.xdist_group("processes")
def test_a_disk_that_fails_on_one_rank_is_known_to_all(tmp_path: Path) -> None:
    for rank in on_ranks(2, tmp_path, _rank_failures, str(tmp_path)):
        assert rank == [*(["None", "[]"] * 3), "None", "no space to read"]
