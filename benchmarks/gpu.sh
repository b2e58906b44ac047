#!/usr/bin/env bash
# Everything that needs a GPU, in two calls of under 10 minutes:
#   benchmarks/gpu.sh FOLDER tests    build, gpu-marked tests, compute-sanitizer
#   benchmarks/gpu.sh FOLDER bench    build, the machine's ceilings, all benchmarks
# For a machine with torch >= 2.11, triton, nvcc and pytest, and no network. Every step has its own
# time limit, a failing one does not stop the others, logs and results go to FOLDER, and the table of
# steps comes last. Without a GPU the steps that need one are skipped.
set -uo pipefail
if [[ $# -ne 2 || ! $2 =~ ^(tests|bench)$ ]]; then
  echo "usage: benchmarks/gpu.sh FOLDER tests|bench" >&2
  exit 2
fi
cd "$(dirname "$0")/.."
mkdir -p "$1"
out=$(cd "$1" && pwd)
summary="$out/$2-summary.txt"
: >"$summary"
failed=0

# step NAME SECONDS NEEDS_GPU COMMAND...
step() {
  local name=$1 limit=$2 needs_gpu=$3 start=$SECONDS verdict
  shift 3
  if [[ $needs_gpu == gpu && $has_gpu == no ]]; then
    verdict="skipped: no GPU"
  elif timeout "$limit" "$@" >"$out/$name.log" 2>&1; then
    verdict=ok
  else
    verdict="FAILED ($?), see $name.log"
    failed=1
    tail -n 25 "$out/$name.log"
  fi
  printf '%-12s %4ds  %s\n' "$name" $((SECONDS - start)) "$verdict" | tee -a "$summary"
}

has_gpu=$(python3 -c 'import torch; print("yes" if torch.cuda.is_available() else "no")')
step build 150 any python3 -m pip install --no-build-isolation --no-deps -e .
if [[ $2 == tests ]]; then
  step kernels 60 any python3 -m m2ae_kernels
  step tests 200 any python3 -m pytest -q -m gpu
  step sync 60 any python3 -m pytest -q -m gpu -k 'sync or graph or stream'
  sanitizer=(compute-sanitizer --error-exitcode 1 --target-processes all)
  step memcheck 70 gpu "${sanitizer[@]}" --tool memcheck python3 benchmarks/small_shapes.py
  step racecheck 50 gpu "${sanitizer[@]}" --tool racecheck python3 benchmarks/small_shapes.py
  cat "$out/kernels.log"
else
  step ceilings 60 gpu python3 benchmarks/ceilings.py
  export BENCH_ROWS="$out/rows.json"
  columns=(--benchmark-columns=median,iqr,rounds --benchmark-json="$out/benchmark.json")
  if [[ $has_gpu == yes ]]; then
    step benchmarks 360 gpu python3 -m pytest benchmarks -q -k cuda "${columns[@]}"
    cat "$out/ceilings.log"
    sed -n '/ratios to eager/,/benchmark/p' "$out/benchmarks.log"
  else
    step benchmarks 360 any python3 -m pytest benchmarks -q --benchmark-disable
  fi
fi
echo
cat "$summary"
exit $failed
