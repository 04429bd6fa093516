#!/usr/bin/env bash
# One visit to a GPU machine: check the CUDA runner, time it, then the whole stack. Arguments: steps (default: all).
# Run from the repository root with a python3 that has the worker's and the control plane's requirements.
set -u
export PYTHONPATH=.:proto:kernels${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
output=${OUT:-load_tests/results}
decode=(--run "decode --batch-size 1 --repeats 2" --run "decode --batch-size 32 --repeats 2" --run "decode --batch-size 256 --repeats 1")
prefill=(--run "prefill --repeats 4 --batch-size 8" --run "prefill --input-len 8192 --repeats 2")
for step in ${*:-check bench stack:llama-3.1-8b stack:qwen3-0.6b}; do
  echo "=== $step ($(date +%T))"
  case $step in
    check) timeout 240 python3 -m pytest -c /dev/null --rootdir=. -p no:cacheprovider -q -n 4 --timeout=200 tests/gpu/test_cuda_runner.py 2>&1 | grep -v Warning | tail -60 ;;
    bench) timeout 300 python3 -m load_tests.gpu.step_bench --profile --output "$output/gpu_steps.jsonl" 2>&1 | tail -150 ;;
    bench:*) timeout 240 python3 -m load_tests.gpu.step_bench --shape "${step#bench:}" --profile --output "$output/gpu_steps.jsonl" 2>&1 | tail -100 ;;
    stack:*) timeout 240 python3 -m load_tests.gpu.stack_bench --shape "${step#stack:}" "${decode[@]}" "${prefill[@]}" --run nano --output "$output/gpu_stack.jsonl" 2>&1 | tail -120 ;;
    *) echo "unknown step $step: check, bench, bench:SHAPE or stack:SHAPE"; exit 2 ;;
  esac
done
echo "=== done ($(date +%T))"
