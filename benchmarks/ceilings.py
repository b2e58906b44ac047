"""What this GPU can do at best, measured: copy bandwidth and bfloat16 matrix rate."""

import statistics

import torch


def median_seconds(fn, repeats: int = 15) -> float:
    """Median time of one call on the device, after three warm-up calls."""
    for _ in range(3):
        fn()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        fn()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def main() -> None:
    """Print the device, TB/s of a 4 GiB copy and TFLOP/s of an 8192-cube product."""
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    source = torch.randn(1 << 30, device="cuda")
    target = torch.empty_like(source)
    seconds = median_seconds(lambda: target.copy_(source))
    print(f"copy, bytes read and written: {2 * source.nbytes / seconds / 1e12:.2f} TB/s")
    n = 8192
    x, y = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    seconds = median_seconds(lambda: x @ y)
    print(f"bfloat16 product {n} x {n} x {n}: {2 * n**3 / seconds / 1e12:.0f} TFLOP/s")


if __name__ == "__main__":
    main()
