"""tests/emu itself: right kernels give right results, and planted faults are seen."""

import ctypes

import cuda_toolkit
import emulator
import pytest
import torch
from torch.testing import assert_close

pytestmark = pytest.mark.skipif(
    not cuda_toolkit.HAS_HEADERS, reason="needs the CUDA headers and g++"
)
BLOCKS, THREADS = 5, 96
RIGHT, NO_BARRIER, SHUFFLES, DIVERGING, ZEROS, TOO_LARGE, VOTES, LARGEST = range(8)


@pytest.fixture(scope="module")
def library(request):
    folder = request.config.cache.mkdir("emulator")
    source = cuda_toolkit.ROOT / "tests/emu/selftest.cu"
    library = ctypes.CDLL(str(emulator.compile_library([source], folder, [])))
    library.selftest_error.restype = ctypes.c_char_p
    return library


@pytest.fixture
def run(library, monkeypatch):
    def run(kernel, order):
        monkeypatch.setenv("M2AE_EMU_ORDER", order)
        of_threads = kernel in (VOTES, LARGEST)
        x, sums = torch.rand(BLOCKS, THREADS), torch.zeros(THREADS if of_threads else BLOCKS)
        pointers = ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(sums.data_ptr())
        library.selftest(kernel, *pointers, BLOCKS)
        return x.sum(1), sums, library.selftest_error().decode()

    return run


@pytest.mark.parametrize("order", emulator.ORDERS)
@pytest.mark.parametrize("kernel", [RIGHT, SHUFFLES])
def test_sums_are_right(kernel, order, run):
    expected, sums, error = run(kernel, order)
    assert error == ""
    assert_close(sums, expected)


@pytest.mark.parametrize("order", ["forward", "shuffle"])
def test_a_missing_barrier_gives_wrong_sums(order, run):
    expected, sums, _ = run(NO_BARRIER, order)
    assert not torch.isclose(sums, expected).all()


@pytest.mark.parametrize("order", emulator.ORDERS)
def test_a_deadlock_is_reported(order, run):
    *_, error = run(DIVERGING, order)
    assert "deadlock in block 0" in error
    assert "__syncthreads" in error
    assert "__shfl_xor_sync" in error


@pytest.mark.parametrize("order", emulator.ORDERS)
def test_votes_of_lanes_that_have_ended_count(order, run):
    _, votes, error = run(VOTES, order)
    assert error == ""
    assert (votes == 32).all()


@pytest.mark.parametrize("order", emulator.ORDERS)
def test_the_largest_number_of_a_warp(order, run):
    _, largest, error = run(LARGEST, order)
    assert error == ""
    of_warps = (torch.arange(THREADS) * 7919 % 97).view(-1, 32).amax(1)
    assert_close(largest, of_warps.float().repeat_interleave(32))


def test_fresh_shared_memory_is_not_zero(run):
    _, sums, _ = run(ZEROS, "forward")
    assert sums[0] == 0


def test_an_impossible_launch_is_reported(run):
    *_, error = run(TOO_LARGE, "forward")
    assert "no GPU takes" in error
