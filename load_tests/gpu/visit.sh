#!/usr/bin/env bash
# One visit to a GPU machine: check the CUDA runner, time it, then the whole stack. Arguments: steps (default: all).
# Run from the repository root with a python3 that has the worker's and the control plane's requirements.
set -u
export PYTHONPATH=.:proto:kernels${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
output=${OUT:-load_tests/results}
for step in ${*:-check bench:llama-3.1-8b bench:llama-3.2-1b bench:qwen3-0.6b stack:llama-3.1-8b stack:qwen3-0.6b}; do
  echo "=== $step ($(date +%T))"
  shape=${step#*:}
  case $step in
    check) timeout 240 python3 -m pytest -c /dev/null --rootdir=. -p no:cacheprovider -q -n 8 --timeout=200 tests/gpu/test_cuda_runner.py 2>&1 | grep -v Warning | tail -60 ;;
    profile:*) timeout 240 python3 -m load_tests.gpu.step_bench --shape "$shape" --profile --output "$output/gpu_steps.jsonl" 2>&1 | grep -v "graph captured" | tail -100 ;;
    bench:*) timeout 240 python3 -m load_tests.gpu.step_bench --shape "$shape" --output "$output/gpu_steps.jsonl" 2>&1 | grep -v "graph captured" | tail -40 ;;
    stack:*) timeout 240 python3 -m load_tests.gpu.stack_bench --shape "$shape" --output "$output/gpu_stack.jsonl" \
      --run "decode --batch-size 1 --repeats 2" --run "decode --batch-size 32 --repeats 2" --run "decode --batch-size 256 --repeats 2" \
      --run "prefill --repeats 4" --run "prefill --input-len 8192 --repeats 2" --run nano \
      --run "random --num-requests 256 --max-concurrency 64" 2>&1 | grep -v "^short\|^one\|^batch" | tail -120 ;;
    quick:*) timeout 240 python3 -m load_tests.gpu.stack_bench --shape "$shape" --output "$output/gpu_stack.jsonl" \
      --run "decode --batch-size 1 --repeats 2" --run "prefill --repeats 4" --run nano \
      --run "random --num-requests 256 --max-concurrency 64" 2>&1 | grep -v "^short\|^one\|^batch" | tail -80 ;;
    *) echo "unknown step $step: check, bench:SHAPE, profile:SHAPE, stack:SHAPE or quick:SHAPE"; exit 2 ;;
  esac
done
echo "=== done ($(date +%T))"
