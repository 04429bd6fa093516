#!/usr/bin/env bash
# One visit to a GPU machine: check every kernel compiled, then time. Arguments: steps to run (default: all).
# RESULTS_DIR: where the numbers and the table of linears go besides the tree. Needs python3 with torch, triton, pytest, pytest-xdist and hypothesis; run from the repository root.
set -u
export PYTHONPATH=.:kernels PYTHONUNBUFFERED=1
steps=${*:-"check bench decode prefill linears"}
for step in $steps; do
  echo "=== $step ($(date +%T))"
  case $step in
    check) timeout 230 python3 -m pytest -c /dev/null --rootdir=. -p no:cacheprovider -q -n 14 --timeout=150 tests/gpu/kernels 2>&1 | grep -v Warning | tail -40 ;;
    bench) timeout 150 python3 -m load_tests.kernels.bench 2>&1 ;;
    bench:*) timeout 150 python3 -m load_tests.kernels.bench "${step#bench:}" 2>&1 ;;
    linears) timeout 400 python3 -m load_tests.kernels.linear_sweep --out "${RESULTS_DIR:-kernels/stepwire_kernels/tuned}" 2>&1 ;;
    experts|latent|packed) timeout 400 python3 -m load_tests.kernels.sweep "$step" --top 6 2>&1 ;;
    *) timeout 120 python3 -m load_tests.kernels.sweep "$step" 2>&1 ;;
  esac
done
if [ -n "${RESULTS_DIR:-}" ]; then cp load_tests/results/kernels.jsonl "$RESULTS_DIR"/; fi
echo "=== done ($(date +%T))"
