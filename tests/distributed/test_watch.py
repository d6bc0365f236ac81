"""What a host does while its device waits for other ranks, without a device."""

from __future__ import annotations

import threading
import time

import pytest

torch = pytest.importorskip("torch")
from torch.distributed import HashStore  # noqa: E402

from sparse_dlm_attn_distributed import RankError  # noqa: E402
from sparse_dlm_attn_distributed.watch import Watch  # noqa: E402


def pair(timeout: float = 0.3) -> tuple[Watch, Watch]:
    """The watches of two ranks."""
    store = HashStore()
    here, there = (Watch(store, rank, (0, 1), timeout) for rank in (0, 1))
    return here, there


def test_a_device_that_is_done_costs_nothing() -> None:
    here, _ = pair()
    here.wait_for_device(lambda: True)
    here.begin()


def test_a_wait_for_the_device_ends_in_time_names_the_late_rank_and_stops_the_device() -> None:
    here, there = pair()
    stopped: list[str] = []
    here.on_failure(lambda: stopped.append("device"))
    here.begin()
    begun = time.monotonic()
    with pytest.raises(RankError, match=r"ranks 1 did not come within 0\.3 s on the device") as caught:
        here.wait_for_device(lambda: False)
    assert time.monotonic() - begun < 2.0
    assert caught.value.ranks == (1,)
    assert stopped == ["device"]
    with pytest.raises(RankError, match="did not come"):  # from now on, without waiting
        here.begin()
    time.sleep(0.2)
    with pytest.raises(RankError, match="did not come"):  # the late rank hears of it
        there.begin()


def test_a_failure_that_another_rank_tells_ends_the_wait_at_once() -> None:
    here, there = pair(timeout=30.0)
    telling = threading.Timer(0.1, there.fail, ["rank 1 failed: MemoryError: no room"])
    telling.start()
    begun = time.monotonic()
    with pytest.raises(RankError, match="no room"):
        here.wait_for_device(lambda: False)
    assert time.monotonic() - begun < 5.0
    telling.join()


def test_a_rank_that_a_kernel_has_missed_is_an_error_though_the_device_is_done() -> None:
    here, _ = pair()
    missed: list[int] = []
    here.on_look(lambda: missed)
    here.wait_for_device(lambda: True)
    missed.append(1)
    with pytest.raises(RankError, match="ranks 1 did not come") as caught:
        here.wait_for_device(lambda: True)
    assert caught.value.ranks == (1,)


def test_some_ranks_can_compare_without_the_others() -> None:
    here, _ = pair()
    assert here.collect("alone", "mine", [0]) == {0: "mine"}
    with pytest.raises(RankError, match="ranks 1"):
        here.collect("all", "mine")


def test_tensors_in_host_memory_are_read_as_they_are() -> None:
    here, _ = pair()
    tensor = torch.arange(3)
    assert here.read(tensor) is tensor
