"""ema_update_ and memory: strides, ties, overlaps, sizes, tables, streams."""

import pytest
import torch
from test_ema_update import average, tensors
from torch.testing import assert_close

from m2ae_kernels import ema_update_


def strided_pairs(device):
    """(target, source) of one shape: memory in one order, in two, with gaps, at odd addresses."""
    image = torch.randn(2, 3, 4, 5, device=device)
    yield image.clone().to(memory_format=torch.channels_last), image.flip(0)
    yield image.clone(), image.flip(0).to(memory_format=torch.channels_last)
    yield (
        image.clone().to(memory_format=torch.channels_last),
        image.flip(0).to(memory_format=torch.channels_last),
    )
    yield torch.randn(6, 7, device=device).T, torch.randn(6, 7, device=device).T
    yield torch.randn(6, 7, device=device).T, torch.randn(7, 6, device=device)
    yield torch.randn(9, 8, device=device)[::2, 1::3], torch.randn(5, 3, device=device)
    yield torch.randn(5, 3, device=device), torch.randn(1, 3, device=device).expand(5, 3)
    yield torch.randn(18, device=device)[1:], torch.randn(19, device=device)[2:]
    yield torch.randn(9000, device=device)[3:], torch.randn(8997, device=device)
    yield torch.randn(9000, 2, device=device)[:, 1], torch.randn(9000, device=device)


@pytest.mark.parametrize("case", range(10))
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.float16, torch.float64)])
def test_any_strides(case, dtypes, impl):
    op, device = impl
    target, source = list(strided_pairs(device))[case]
    # `to` keeps dense strides; gaps are made again where it closed them.
    target, source = keep_strides(target, dtypes[0]), keep_strides(source, dtypes[1])
    shadow = torch.empty(target.shape, dtype=torch.bfloat16, device=device)
    expected = average(target, source, 0.9)
    op([target], [source], 0.9, shadows=[shadow])
    assert_close(target, expected)
    assert_close(shadow, target.to(torch.bfloat16), rtol=0, atol=0)


def keep_strides(tensor, dtype):
    room = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    offset = tensor.storage_offset()
    memory = torch.zeros(offset + room, dtype=dtype, device=tensor.device)
    view = memory.as_strided(tensor.shape, tensor.stride(), offset)
    if all(tensor.stride()):
        return view.copy_(tensor)
    memory[offset:].copy_(tensor.as_strided((room,), (1,)))
    return view


def test_gaps_of_a_strided_target_are_not_touched(impl):
    op, device = impl
    memory = torch.randn(7, 6, device=device)
    before = memory.clone()
    op([memory[:, 2:5]], [torch.zeros(7, 3, device=device)], 0.0)
    before[:, 2:5] = 0
    assert torch.equal(memory, before)


def test_tied_targets_are_updated_once(impl):
    op, device = impl
    target, source = torch.zeros(5, device=device), torch.ones(5, device=device)
    op([target, target, target.view(5)], [source, source, source], 0.9)
    assert_close(target, torch.full_like(target, 0.1))


def test_a_target_may_be_its_own_source(impl):
    op, device = impl
    target = torch.randn(5, device=device)
    before = target.clone()
    op([target], [target], 0.9)
    assert torch.equal(target, before)


def test_many_small_tensors(impl):
    op, device = impl
    count = 500  # more than one launch of torch's own multi-tensor kernels takes
    targets = list(torch.randn(count, 64, device=device).unbind())
    sources = list(torch.randn(count, 64, device=device).bfloat16().unbind())
    expected = [average(t, s, 0.9) for t, s in zip(targets, sources, strict=True)]
    op(targets, sources, 0.9)
    assert_close(targets, expected)


def test_any_number_of_threads_gives_the_same_bits(impl):
    op, device = impl
    sources = tensors(torch.bfloat16, device, [(70_000,), (5,), (33_000,)])
    before = tensors(torch.float32, device, [(70_000,), (5,), (33_000,)])
    results = []
    threads = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append([t.clone() for t in before])
        op(results[-1], sources, 0.9)
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert_close(other, results[0], rtol=0, atol=0)


def test_tensors_may_move_between_calls(impl):
    op, device = impl
    for numel in (7, 7, 4000, 7):
        target, source = torch.zeros(numel, device=device), torch.ones(numel, device=device)
        op([target], [source], 0.25)
        assert_close(target, torch.full_like(target, 0.75))


MEMORY = torch.zeros(8)


@pytest.mark.parametrize(
    "targets,sources,shadows",
    [
        ([MEMORY[:5], MEMORY[3:]], [torch.ones(5), torch.ones(5)], None),
        ([MEMORY[:4], MEMORY[:4]], [torch.ones(4), torch.ones(4)], None),  # tied, but two sources
        ([MEMORY[:4]], [MEMORY[2:6]], None),
        ([MEMORY.view(2, 4)[:, :2]], [MEMORY.view(2, 4)[:, :2].T], None),  # itself, transposed
        ([MEMORY[:4]], [torch.ones(4)], [MEMORY.view(torch.bfloat16)[2:6]]),
        ([torch.zeros(20).as_strided((4, 4), (1, 2))], [torch.ones(4, 4)], None),
    ],
)
def test_kernels_reject_memory_that_overlaps(targets, sources, shadows, impl, request):
    op, device = impl
    if device != "cpu" or "reference" in request.node.name:
        pytest.skip("CPU tensors; the reference does not look at addresses")
    before = MEMORY.clone()
    with pytest.raises(ValueError, match="overlap"):
        op(targets, sources, 0.9, shadows=shadows)
    assert torch.equal(MEMORY, before)  # nothing was touched


def test_many_dimensions_that_do_not_merge(impl, request):
    op, _ = impl
    shape = (2,) * 10
    target = torch.zeros((3,) * 10)[(slice(2),) * 10]
    if "reference" in request.node.name:
        pytest.skip("the reference has no limit")
    with pytest.raises(ValueError, match="expected at most 8 dimensions that do not merge"):
        op([target], [torch.ones(shape)], 0.9)


@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    numel = 2**31 + 8193
    target, source = (torch.zeros(numel, dtype=torch.uint8) for _ in range(2))
    source[2**31 - 1 :] = 7
    ema_update_([target], [source], 0.9)
    assert target[2**31 - 2 :].tolist() == [0] + [7] * 8194


def test_graph_capture_needs_a_known_set(impl, request, monkeypatch):
    op, _ = impl
    if "emulated" not in request.node.name:
        pytest.skip("about the table of the CUDA host code")
    known, new, source = torch.zeros(3), torch.zeros(3), torch.ones(3)
    op([known], [source], 0.5)
    monkeypatch.setenv("M2AE_EMU_CAPTURING", "1")
    op([known], [source], 0.5)
    assert known.tolist() == [0.75] * 3
    with pytest.raises(ValueError, match="updated once before the graph capture"):
        op([new], [source], 0.5)


@pytest.mark.gpu
def test_graph_follows_the_decay_tensor_without_a_sync(no_sync):
    targets, sources = tensors(torch.float32, "cuda"), tensors(torch.bfloat16, "cuda")
    decay = torch.tensor(1.0, dtype=torch.float64, device="cuda")
    ema_update_(targets, sources, decay)
    no_sync()
    ema_update_(targets, sources, decay)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ema_update_(targets, sources, decay)
    torch.cuda.set_sync_debug_mode("default")
    for value in (0.9, 0.5, 0.0):
        expected = [average(t, s, value) for t, s in zip(targets, sources, strict=True)]
        decay.fill_(value)
        graph.replay()
        assert_close(targets, expected)


@pytest.mark.gpu
def test_two_streams_update_two_sets():
    streams = [torch.cuda.Stream() for _ in range(2)]
    targets = [[torch.zeros(1 << 20, device="cuda")] for _ in streams]
    source = torch.ones(1 << 20, device="cuda")
    torch.cuda.synchronize()
    for _ in range(10):
        for stream, target in zip(streams, targets, strict=True):
            with torch.cuda.stream(stream):
                ema_update_(target, [source], 0.5)
    torch.cuda.synchronize()
    for (target,) in targets:
        assert_close(target, torch.full_like(target, 1 - 0.5**10))


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements_on_cuda():
    numel = 2**31 + 8193
    target = torch.zeros(numel, dtype=torch.bfloat16, device="cuda")
    source = torch.zeros(numel, dtype=torch.bfloat16, device="cuda")
    source[2**31 - 1 :] = 8
    ema_update_([target], [source], 0.5)
    assert target[2**31 - 2 :].tolist() == [0] + [4] * 8194
