#!/usr/bin/env bash
# Hostile calls and damaged files, tests/test_fuzz.py, with the C++ kernels under AddressSanitizer and
# UndefinedBehaviorSanitizer (GCC; the sanitized copy goes to build/sanitized, the installed one is left alone).
#
#     tools/fuzz.sh [INPUTS] [FIRST_SEED]
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
LONGMEM_SANITIZE=address,undefined LONGMEM_BUILD=cpu "$PYTHON" setup.py --quiet build --build-lib build/sanitized

# Python is not built with the sanitizer, whose library must come first. What Python never frees is no leak of ours.
export LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)"
export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
# A call by hand may bring expanded tensors of terabytes: the sanitizer answers as a machine without room would.
ASAN_OPTIONS+=:max_allocation_size_mb=4000
export PYTHONPATH="$PWD/build/sanitized:$PWD/tests" LONGMEM_FUZZ="${1:-10000}" LONGMEM_FUZZ_FROM="${2:-0}"
# From another folder, so that the sanitized package is the one that is imported.
cd tests
exec "$(cd .. && realpath -s "$PYTHON")" -P -c '
import sys, longmem_kernels, pytest
print("testing", longmem_kernels.__file__)
sys.exit(pytest.main(["-p", "no:cacheprovider", "-q", "-s", "test_fuzz.py"]))'
