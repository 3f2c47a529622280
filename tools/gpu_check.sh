#!/usr/bin/env bash
# Everything a machine with a GPU can check, in the time there is: see tools/gpu_check.py.
#
#   tools/gpu_check.sh 5     build, all gpu tests and every base shape, within five minutes
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu_check.py" "$@"
