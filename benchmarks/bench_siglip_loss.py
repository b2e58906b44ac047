"""siglip_loss against the sigmoid loss in eager PyTorch, compiled, and in siglip-kernel.

python benchmarks/bench_siglip_loss.py [--device cuda] [--threads 2] [--shapes 1024x256,4096x512]
    [--dtypes float32,bfloat16] [--directions both] [--seconds 20] [--no-memory]

prints a table of rows that took turns: milliseconds, how many times ours, and the peak memory of
one call. On Linux CPUs run it also with GLIBC_TUNABLES=glibc.malloc.mmap_threshold=17179869184:\
glibc.malloc.trim_threshold=17179869184, which lets eager PyTorch keep its temporaries.
"""

import argparse
import importlib.util
import shutil

import pytest
import side_by_side
import torch
import torch.nn.functional as F

from m2ae_kernels import siglip_loss

SCALE, BIAS = 10.0, -10.0
SHAPES = {"cpu": (1024, 4096, 16384), "cuda": (4096, 16384, 65536)}
DIMS = (256, 512, 1024)
ROWS = ["eager", "eager_shared_logits", "siglip_kernel", "ours"]


def eager(images, texts, scale, bias):
    """As open_clip writes it: a matrix of labels, and logits times labels."""
    images, texts = F.normalize(images), F.normalize(texts)
    logits = scale * images @ texts.mT + bias
    labels = 2 * torch.eye(len(images), device=images.device, dtype=images.dtype) - 1
    return -F.logsigmoid(labels * logits).sum() / len(images)


def eager_shared_logits(images, texts, scale, bias):
    """The best form by hand: every entry as a negative, and softplus(-l) = softplus(l) - l."""
    images, texts = F.normalize(images), F.normalize(texts)
    logits = scale * images @ texts.mT + bias
    return (F.softplus(logits).sum() - logits.diagonal().sum()) / len(images)


def ours(images, texts, scale, bias):
    return siglip_loss(images, texts, scale, bias, normalize=True)


def siglip_kernel(images, texts, scale, bias):
    from siglip_kernel import fused_siglip_loss

    return fused_siglip_loss(F.normalize(images), F.normalize(texts), scale.log(), bias)


def rows_on(device):
    """The implementations that can run here, by name."""
    rows = {"eager": eager, "eager_shared_logits": eager_shared_logits}
    if device == "cuda" or shutil.which("c++") is not None:
        rows["compile"] = torch.compile(eager_shared_logits, dynamic=False)
    if device == "cuda" and importlib.util.find_spec("siglip_kernel") is not None:
        rows["siglip_kernel"] = siglip_kernel
    return rows | {"m2ae_kernels": ours}


def call(function, N, D, dtype, direction, device):
    """A function without arguments that runs one row."""
    torch.manual_seed(0)
    inputs = [torch.randn(N, D, device=device).to(dtype).requires_grad_() for _ in range(2)]
    inputs += [torch.tensor(x, device=device, requires_grad=True) for x in (SCALE, BIAS)]

    def forward():
        with torch.no_grad():
            return function(*inputs)

    def both():
        for tensor in inputs:
            tensor.grad = None
        function(*inputs).backward()

    return {"forward": forward, "both": both}[direction]


def products(direction):
    """How many of 2 N N D operations a form that keeps its logits needs."""
    return {"forward": 1, "both": 3}[direction]


@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("impl", ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", range(3))
def bench_siglip_loss(size, dtype, impl, direction, device, bench):
    """One shape of each size; the table over all shapes is what this file prints as a program."""
    N, D = SHAPES[device][size], DIMS[size % 2]
    function = rows_on(device).get("m2ae_kernels" if impl == "ours" else impl)
    if function is None:
        pytest.skip(f"{impl} is not installed, or does not run on {device}")
    if device == "cpu" and size > 0:
        pytest.skip("takes seconds per call: python benchmarks/bench_siglip_loss.py")
    if device == "cuda" and (size, impl) in ((2, "eager"), (2, "eager_shared_logits")):
        pytest.skip("takes 50 GB or more")
    bench(
        f"siglip_loss {direction} N={N} D={D} {dtype}",
        call(function, N, D, dtype, direction, device),
        flops=products(direction) * 2 * N * N * D,
        impl=impl,
    )


def table(device, shapes, dtypes, directions, seconds, memory):
    print(side_by_side.machine(device))
    for N, D in shapes:
        for dtype in dtypes:
            for direction in directions:
                rows = {
                    name: call(function, N, D, getattr(torch, dtype), direction, device)
                    for name, function in rows_on(device).items()
                }
                results = side_by_side.compare(rows, "m2ae_kernels", device, seconds)
                print(f"N={N} D={D} {dtype} {direction}")
                for name, (milliseconds, ratio) in results.items():
                    line = f"  {name:20} {milliseconds:10.2f} ms {ratio:7.2f} x ours"
                    if memory:
                        given = ("--peak-of", name, device, N, D, dtype, direction)
                        threads = ("--threads", torch.get_num_threads())
                        peak = side_by_side.in_fresh_process(__file__, *threads, *given)
                        line += f" {peak:10.1f} MB peak"
                    print(line, flush=True)


def peak_of(name, device, N, D, dtype, direction):
    function = rows_on(device)[name]
    # Whatever the first call of all loads, and what compiling takes, is not of the shape's.
    call(function, 64, int(D), getattr(torch, dtype), direction, device)()
    measured = call(function, int(N), int(D), getattr(torch, dtype), direction, device)
    if name == "compile":
        measured()
    print(side_by_side.peak_mb(measured, device))


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shapes", help="NxD,...")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--directions", default="forward,both")
    parser.add_argument("--seconds", type=float, default=20.0, help="per group of rows")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--peak-of", nargs=6, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.peak_of:
        return peak_of(*given.peak_of)
    shapes = [(N, D) for N in SHAPES[given.device] for D in DIMS]
    if given.shapes:
        shapes = [tuple(map(int, shape.split("x"))) for shape in given.shapes.split(",")]
    lists = given.dtypes.split(","), given.directions.split(",")
    return table(given.device, shapes, *lists, given.seconds, not given.no_memory)


if __name__ == "__main__":
    main()
