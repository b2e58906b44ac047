"""grouped_mm on a GPU: no waits, a graph with other groups, tiles of every height, bad offsets."""

import itertools

import pytest
import torch
from gpu_streams import captured, own_stream
from grouped_mm_cases import FORMS, assert_matches, case_of, leaves, of_leaves, offsets

pytestmark = pytest.mark.gpu
SIZES = [300, 0, 77, 500]


def step(op, operands, options):
    out = op(**operands, **options)
    return out, *of_leaves(out.square().sum(), operands, None).values()


def cases(dtype):
    """(operands, options) of every form, and of gathered rows."""
    for form in FORMS:
        options = {"activation": "swiglu"} if form[2] == "3" else {}
        given = {"device": "cuda", "dtype": dtype}
        yield leaves(case_of(form, SIZES, 200, 64, 96, tail=5, **given)), options
    operands = leaves(case_of("2x3", SIZES, 0, 64, 96, **given))
    a_ids = torch.randint(-1, sum(SIZES), (2000,), device="cuda", dtype=torch.int32)
    yield operands, {"a_ids": a_ids, "activation": "gelu"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_sync(dtype, on_gpu, no_sync):
    given = list(cases(dtype))
    for operands, options in given:
        step(on_gpu, operands, options)  # compiles, which may wait
    no_sync()
    for operands, options in given:
        step(on_gpu, operands, options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_and_backward_in_one_graph(dtype, on_gpu):
    for operands, options in cases(dtype):
        graph, outputs = captured(
            lambda operands=operands, options=options: step(on_gpu, operands, options)
        )
        for sizes in ([0, 0, 877, 0], [100, 200, 300, 50]):
            with torch.no_grad():
                if operands["offs"] is not None:
                    operands["offs"].copy_(offsets(sizes, "cuda"))
                operands["mat_a"].normal_()
            graph.replay()
            replayed = [t.clone() for t in outputs]
            assert all(map(torch.equal, replayed, step(on_gpu, operands, options)))


def test_another_stream(on_gpu):
    operands = leaves(case_of("2x3", SIZES, 0, 64, 96, device="cuda"))
    expected = step(on_gpu, operands, {})
    with own_stream(busy=True):
        copies = leaves({n: None if t is None else t.clone() for n, t in operands.items()})
        result = step(on_gpu, copies, {})  # on what was not there before
    assert all(map(torch.equal, result, expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_tiles_of_every_height(form, dtype, on_gpu):
    # By the rows of an average group; operands are aligned, and are not.
    given = {"tail": 3, "device": "cuda", "dtype": dtype}
    for rows, width in itertools.product((1, 12, 30, 60, 400), (64, 50)):
        operands = case_of(form, [rows, 0, 2 * rows + 1], rows, width, 3 * width, **given)
        assert_matches(on_gpu, operands, dtype)
        if form[2] == "3":
            assert_matches(on_gpu, operands, dtype, activation="geglu")


def test_offsets_out_of_range_are_harmless(on_gpu):
    # The CPU refuses them; here that would be a wait. Nothing may be read or written elsewhere.
    operands = leaves(case_of("2x3", SIZES, 0, 64, 96, device="cuda"))
    for offs in ([300, 1 << 30, 377, 877], [-7, 300, 300, 877]):
        given = operands | {"offs": torch.tensor(offs, dtype=torch.int32, device="cuda")}
        step(on_gpu, given, {})
    torch.cuda.synchronize()
    assert_matches(on_gpu, operands)
