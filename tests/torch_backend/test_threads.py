"""Parts of an operator side by side: the same bits for any number of threads, nobody's settings changed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the PyTorch backend needs PyTorch")

from sparse_dlm_attn import Context, PassInfo, PrefixAttention  # noqa: E402
from sparse_dlm_attn_torch import threads  # noqa: E402
from sparse_dlm_attn_torch.threads import one_thread, run_parts, threads_for  # noqa: E402

pytestmark = pytest.mark.skipif(
    threads._setters() is None, reason="this build of PyTorch has no setting of threads for one thread alone"
)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


class Layer:
    """Enough keys for workers: 4 KV heads of 4096 tokens, 64 channels."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.context = Context.from_dense(*torch.randn(2, 1, 4, 4096, 64), 16)
        self.block = torch.randn(2, 1, 4, 16, 64)
        self.queries = torch.randn(3, 1, 8, 16, 64)

    def passes(self, policy: str) -> list[Any]:
        """Return outputs and context states of three passes."""
        attention, memory, results = PrefixAttention(policy, "torch"), None, []
        for index, q in enumerate(self.queries):
            out, memory = attention(q, *self.block, self.context, memory, PassInfo(index))
            results += [out, memory.state.out, memory.state.lse, memory.selection.mask]
        return results


@pytest.fixture(scope="module")
def layer() -> Layer:
    return Layer()


def same_bits(left: list[Any], right: list[Any]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(left, right, strict=True))


@pytest.mark.clause("PURE-3", "PURE-5")
@pytest.mark.parametrize("policy", ["dense", "losa:budget=1024", "quest:budget=1024,pages=own"])
def test_results_have_the_same_bits_for_any_number_of_threads(layer: Layer, policy: str) -> None:
    results = {}
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results[count] = layer.passes(policy)
        assert torch.get_num_threads() == count
    assert any(thread.name.startswith("sparse_dlm_attn_torch") for thread in threading.enumerate())
    assert same_bits(results[1], results[2])
    assert same_bits(results[1], results[3])


def test_workers_take_over_inference_mode(layer: Layer) -> None:
    plain = layer.passes("losa")
    with torch.inference_mode():
        inferred = layer.passes("losa")
        assert torch.is_inference_mode_enabled()
    assert inferred[0].is_inference()
    assert not plain[0].is_inference()
    assert same_bits(plain, inferred)


def test_queries_that_could_have_a_gradient_are_computed_where_none_is_recorded(layer: Layer) -> None:
    wanted = layer.passes("dense")
    with_gradient = Layer()
    with_gradient.queries.requires_grad_()
    with torch.no_grad():
        assert same_bits(with_gradient.passes("dense"), wanted)


def test_several_threads_may_compute_at_once(layer: Layer) -> None:
    wanted, results = layer.passes("losa"), []
    users = [threading.Thread(target=lambda: results.append(same_bits(layer.passes("losa"), wanted))) for _ in range(4)]
    for user in users:
        user.start()
    for user in users:
        user.join()
    assert results == [True] * 4


@pytest.mark.clause("PURE-5")
def test_one_thread_ends_with_the_settings_it_found() -> None:
    of_mkl = threads._setters()[1]
    for error in (None, KeyError):
        try:
            with one_thread() as count:
                assert (count, torch.get_num_threads()) == (3, 1)
                with one_thread() as nested, threads_for(8, 0) as workers:
                    assert (nested, workers) == (3, 2)
                assert torch.get_num_threads() == 1
                if error is not None:
                    raise error
        except KeyError:
            pass
        assert torch.get_num_threads() == 3
        assert of_mkl(0) == 0  # this thread has no setting of its own in MKL


def test_long_or_few_parts_keep_the_threads_of_their_operations() -> None:
    for parts, part_bytes in ((8, threads.MOST_BYTES + 1), (1, 0)):
        with threads_for(parts, part_bytes) as workers:
            assert (workers, torch.get_num_threads()) == (0, 3)
    with threads_for(8, 0, threads.WORTH_SHARING - 1) as workers:
        assert (workers, torch.get_num_threads()) == (0, 1)


def test_an_exception_ends_all_parts_before_it_is_raised() -> None:
    running, ran = [], []

    def compute(part: int) -> None:
        running.append(part)
        time.sleep(0.01)
        if part == 2:
            raise ZeroDivisionError("part 2")
        ran.append(part)
        running.remove(part)

    with pytest.raises(ZeroDivisionError, match="part 2"), one_thread():
        run_parts(compute, range(1000), 2)
    assert running == [2]  # the others have ended
    assert len(ran) < 900  # and most have not begun
    done: list[int] = []
    run_parts(done.append, range(10), 2)
    assert sorted(done) == list(range(10))


@pytest.mark.skipif(
    threads._pause() is None or not os.path.isdir("/proc/self/task"), reason="OpenMP before 5.0, or no Linux"
)
def test_threads_of_openmp_do_not_spin_beside_workers() -> None:
    with one_thread() as count:
        run_parts(lambda _: time.sleep(0.01), range(9), count - 1)  # the workers are there
    before = set(os.listdir("/proc/self/task"))  # some of other tests, which may end at any time
    torch.randn(1 << 20).exp_()
    of_openmp = set(os.listdir("/proc/self/task")) - before
    seen = []

    def compute(part: int) -> None:
        deadline = time.monotonic() + 30
        while of_openmp & set(os.listdir("/proc/self/task")) and time.monotonic() < deadline:
            time.sleep(0.001)
        seen.append(of_openmp & set(os.listdir("/proc/self/task")))

    with one_thread() as count:
        run_parts(compute, [0], count - 1)
    assert (len(of_openmp), seen) == (2, [set()])
    total = torch.ones(1 << 22).sum()  # others start
    assert float(total) == 1 << 22


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_forked_process_starts_workers_of_its_own() -> None:
    def names() -> set[str]:
        seen: set[str] = set()

        def see(_: int) -> None:
            time.sleep(0.01)
            seen.add(threading.current_thread().name)

        with one_thread() as count:
            run_parts(see, range(9), count - 1)
        return seen

    torch.randn(1 << 20).exp_()  # OpenMP has threads, which the child has not
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # a handler in Python would not run if it hangs
        signal.alarm(30)
        os._exit(0 if len(names()) > 1 else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert len(names()) > 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
@pytest.mark.parametrize("policy", ["dense", "losa:budget=1024"])
def test_a_process_forked_after_the_import_computes_as_its_parent_does(layer: Layer, policy: str) -> None:
    """Whatever threads its parent had, and in its own children too."""
    wanted = layer.passes(policy)

    def computes(generations: int) -> bool:
        numbers = torch.ones(1 << 20).exp_()  # an operation that PyTorch shares out to OpenMP's threads
        if not same_bits(layer.passes(policy), wanted) or numbers.isnan().any():
            return False
        if generations == 0:
            return True
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # a handler in Python would not run if it hangs
            signal.alarm(60)
            os._exit(0 if computes(generations - 1) else 1)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    assert computes(2)


def test_an_operator_works_while_the_interpreter_ends() -> None:
    code = (
        "import atexit, torch\n"
        "from sparse_dlm_attn_torch.threads import one_thread, run_parts\n"
        "torch.set_num_threads(2)\n"
        "def compute():\n"
        "    done = []\n"
        "    with one_thread() as count:\n"
        "        run_parts(done.append, range(8), count - 1)\n"
        "    print(sorted(done))\n"
        "compute()\n"
        "atexit.register(compute)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "[0, 1, 2, 3, 4, 5, 6, 7]\n" * 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_process_forked_before_the_import_does_not_wait_for_threads_it_has_not() -> None:
    code = (
        "import os, signal, torch\n"
        "torch.set_num_threads(2)\n"
        "torch.randn(1 << 20).exp_()\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    signal.alarm(30)\n"
        "    from sparse_dlm_attn_torch.threads import one_thread, run_parts\n"
        "    done = []\n"
        "    with one_thread() as count:\n"
        "        run_parts(done.append, range(8), count - 1)\n"
        "    os._exit(0 if len(done) == 8 else 1)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "0\n"
