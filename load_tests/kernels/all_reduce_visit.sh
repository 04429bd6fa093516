#!/usr/bin/env bash
# One visit to a machine with two GPUs for the sums over ranks: checks first, then times, then the table, then two ranks
# of a small model against one. Arguments: steps to run (default: all). RESULTS_DIR: where numbers and table go besides
# the tree. Needs python3 with torch, triton, pytest, hypothesis; run from the repository root.
set -u
export PYTHONPATH=.:proto:kernels${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1
steps=${*:-"check bench sweep pair"}
out=${RESULTS_DIR:-}
for step in $steps; do
  echo "=== $step ($(date +%T))"
  case $step in
    check) timeout 240 python3 -m tests.gpu.all_reduce_ranks 2>&1 | grep -v Warning | cut -c1-600 | tail -90 ;;
    bench) timeout 75 python3 -m load_tests.kernels.all_reduce bench 2>&1 | tail -30 ;;
    sweep) timeout 120 python3 -m load_tests.kernels.all_reduce sweep ${out:+--out "$out"} 2>&1 | tail -48 ;;
    large) timeout 90 python3 -m load_tests.kernels.all_reduce large ${out:+--out "$out"} 2>&1 | tail -28 ;;
    pair) timeout 200 python3 -m pytest -c /dev/null --rootdir=. -p no:cacheprovider -q --durations=10 tests/gpu/test_parallel_ranks.py 2>&1 | tail -40 ;;
    decode) timeout 150 python3 -m load_tests.gpu.compare_ranks load_tests/shapes/llama-3.1-8b --load-format dummy --limit 1000 2>&1 | tail -30 ;;
    pipeline) timeout 150 python3 -m load_tests.gpu.compare_ranks load_tests/shapes/llama-3.1-8b --load-format dummy --limit 1000 --tensor-parallel-size 1 --pipeline-parallel-size 2 2>&1 | tail -30 ;;
  esac
done
if [ -n "$out" ] && [ -f load_tests/results/kernels.jsonl ]; then cp load_tests/results/kernels.jsonl "$out"/; fi
echo "=== done ($(date +%T))"
