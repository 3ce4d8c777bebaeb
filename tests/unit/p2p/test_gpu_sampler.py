"""A hung driver costs one thread and no GPU's honour for longer than it hangs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from p2p.gpu_sampler import GpuSampler
from p2p.gpus import Gpu, Holder, Reading, Who
from tests.nodes import wait_until

GPU = Gpu(uuid="G1", memory_mb=1_000)


class Driver:
    """NVML as it may be: it answers, or it hangs until `answer` is set."""

    def __init__(self) -> None:
        self.answer = threading.Event()
        self.answer.set()
        self.looks, self.hanging = 0, 0
        self.error: Exception | None = None
        self.gpus: tuple[Gpu, ...] = (GPU,)

    def look(self) -> Reading:
        self.looks += 1
        self.hanging += 1
        self.answer.wait()
        self.hanging -= 1
        if self.error is not None:
            raise self.error
        return Reading(gpus=self.gpus)


Sampling = Callable[..., GpuSampler]


@pytest.fixture
def driver() -> Driver:
    return Driver()


@pytest.fixture
def sampling(driver: Driver) -> Iterator[Sampling]:
    made: list[GpuSampler] = []

    def make(**changes: object) -> GpuSampler:
        settings = {"interval_seconds": 0.01, "deadline_seconds": 0.2, **changes}
        made.append(GpuSampler(driver.look, **settings))  # type: ignore[arg-type]
        return made[-1]

    yield make
    driver.answer.set()
    for sampler in made:
        wait_until(sampler.stop)  # one that hung has to notice first


def test_it_looks_again_and_again(driver: Driver, sampling: Sampling) -> None:
    sampler = sampling()
    assert sampler.reading.sampled is False
    sampler.start()
    assert sampler.reading.gpus == (GPU,)
    driver.gpus = (Gpu(uuid="G1", memory_mb=1_000, used_mb=7),)
    wait_until(lambda: sampler.reading.gpus[0].used_mb == 7)


def test_while_it_hangs_no_gpu_is_healthy_and_then_they_are_again(driver: Driver, sampling: Sampling) -> None:
    sampler = sampling()
    sampler.start()
    threads = threading.active_count()
    driver.answer.clear()
    wait_until(lambda: sampler.reading.error)
    assert sampler.reading.error == "NVML has not answered for over 0.2 s"
    assert [gpu.why for gpu in sampler.reading.gpus] == [sampler.reading.error]
    for _ in range(50):
        sampler.poke()
        assert sampler.reading.error is not None, "asking never waits"
    assert (driver.hanging, threading.active_count()) == (1, threads), "one thread hangs, and no second"
    driver.answer.set()
    wait_until(lambda: sampler.reading.error is None)
    assert sampler.reading.gpus[0].healthy


def test_a_driver_that_hangs_from_the_start_holds_the_start_up_for_the_deadline_only(
    driver: Driver, sampling: Sampling
) -> None:
    driver.answer.clear()
    sampler = sampling()
    sampler.start()
    wait_until(lambda: sampler.reading.error)
    assert sampler.reading.gpus == ()
    assert not sampler.stop(), "what hangs is left behind"
    driver.answer.set()


def test_gpus_appear_when_a_driver_that_hung_at_the_start_comes_back(driver: Driver, sampling: Sampling) -> None:
    driver.answer.clear()
    sampler = sampling(deadline_seconds=0.05)
    sampler.start()
    driver.answer.set()
    wait_until(lambda: sampler.reading.gpus == (GPU,))


def test_a_look_that_fails_is_not_the_end(driver: Driver, sampling: Sampling) -> None:
    sampler = sampling()
    sampler.start()
    driver.error = ValueError("what is this?")
    wait_until(lambda: sampler.reading.error)
    assert sampler.reading.error == "looking at the GPUs failed: ValueError: what is this?"
    assert not sampler.reading.gpus[0].healthy
    driver.error = None
    wait_until(lambda: sampler.reading.gpus[0].healthy)


def test_a_poke_looks_at_once(driver: Driver, sampling: Sampling) -> None:
    sampler = sampling(interval_seconds=3_600)
    sampler.start()
    sampler.poke()
    wait_until(lambda: driver.looks == 2)


def test_processes_are_named_on_the_way(driver: Driver, sampling: Sampling) -> None:
    where: list[str] = []

    def identify(pid: int) -> Who | None:
        where.append(threading.current_thread().name)
        return Who(5, pid, "python") if pid == 7 else None

    told = Holder(0, 10, None, Who(0, 0, "a stranger"))
    driver.gpus = (Gpu(uuid="G1", holders=(Holder(7, 10), Holder(8, 10), told)),)
    sampler = sampling(identify=identify)
    sampler.start()
    assert sampler.reading.gpus[0].holders == (Holder(7, 10, None, Who(5, 7, "python")), Holder(8, 10), told)
    assert set(where) == {"gpu-sampler"}


def test_whoever_wants_to_know_is_told_of_each_look(driver: Driver, sampling: Sampling) -> None:
    told = threading.Event()
    sampler = sampling()
    sampler.on_sample = told.set
    sampler.start()
    assert told.wait(5)
