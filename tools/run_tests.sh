#!/usr/bin/env bash
# Set everything up and run the tests. Arguments go to pytest: bash tools/run_tests.sh tests/core -k scan
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/setup_env.sh

# One torch thread per worker: the tests are tiny, and two workers on two cores beat two threads in one.
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
workers="$("$PYTHON" -c 'import os; print(max(1, min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())))')"

if [[ $# -eq 0 ]]; then
  "$PYTHON" -m ruff check .
fi
"$PYTHON" -m pytest -q -n "$workers" "$@" </dev/null
