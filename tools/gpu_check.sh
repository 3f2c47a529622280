#!/usr/bin/env bash
# Everything a machine with a GPU can check, in one command and without a network:
#
#   tools/gpu_check.sh                          all steps
#   tools/gpu_check.sh build tests              chosen ones of: build tests sanitize bench
#
# Logs and results go to ${OUT:-out/gpu_check}: one log per step, bench.json, plots, traces, summary.json. A failed step
# does not stop the next one. Exit status: 0 all passed, 1 a step failed, 2 no GPU or wrong arguments.
#
#   PYTHON       interpreter of the environment to check (default python3)
#   PIP_ARGS     more arguments for pip install, e.g. --user, or --break-system-packages in a throw-away container
#   BENCH_ARGS   more arguments for longmem bench all, e.g. --scale small
#   LIMIT        seconds that one step may take (default 600)
#   WHEELS       folder of wheels to install from first (default out/wheels), for a machine without a package index:
#                pip download -d out/wheels --python-version 3.12 --only-binary :all: expecttest filelock hypothesis \
#                  matplotlib safetensors tqdm typer
#                FlashLib is measured as well when its wheel lies there (pip download --no-deps flashlib), FAISS when a
#                build for GPUs is installed.
# shellcheck disable=SC2329  # steps are called by name, at the end
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

out=${OUT:-out/gpu_check}
python=${PYTHON:-python3}
limit=${LIMIT:-600}
wheels=${WHEELS:-out/wheels}
read -ra pip_args <<<"${PIP_ARGS:-}"
read -ra bench_args <<<"${BENCH_ARGS:-}"

groups=("$@")
[[ $# -gt 0 ]] || groups=(build tests sanitize bench)
for group in "${groups[@]}"; do
  case $group in
    build | tests | sanitize | bench) ;;
    *) echo "gpu_check: unknown step '$group', wanted build, tests, sanitize or bench" >&2; exit 2 ;;
  esac
done

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu_check: $python sees no CUDA device (needs PyTorch built for CUDA, and a driver); nothing was checked" >&2
  exit 2
fi

mkdir -p "$out"
failed=0
entries=()

# run NAME COMMAND...: one step with a time limit, its own log and a line in the summary.
run() {
  local name=$1 log="$out/$1.log" begin=$SECONDS status=pass code=0 note=""
  shift
  echo "== $name: $*"
  timeout --kill-after=10 "$limit" "$@" >"$log" 2>&1 || code=$?
  if ((code != 0)); then
    status=fail
    failed=1
    ((code == 124 || code == 137)) && status=timeout
    note=$(grep -v '^[[:space:]]*$' "$log" | tail -n 1 | tr -cd '[:print:]' | sed 's/["\\]/ /g' | cut -c 1-200)
    tail -n 15 "$log"
  fi
  entries+=("{\"step\": \"$name\", \"status\": \"$status\", \"exit_code\": $code, \"seconds\": $((SECONDS - begin)), \"note\": \"$note\"}")
  echo "== $name: $status, $((SECONDS - begin)) s (log: $log)"
}

# Rewritten after every group, so that a run that is cut short leaves what it found.
write_summary() {
  local passed=true joined
  ((failed)) && passed=false
  joined=$(printf '  %s,\n' "${entries[@]}")
  printf '{"passed": %s, "steps": [\n%s\n]}\n' "$passed" "${joined%,}" >"$out/summary.json"
}

find_sanitizer() {
  command -v compute-sanitizer && return
  local candidate
  for candidate in "${CUDA_HOME:-/usr/local/cuda}"/{bin,compute-sanitizer}/compute-sanitizer; do
    [[ -x $candidate ]] && echo "$candidate" && return
  done
  echo compute-sanitizer # not found: the step fails and its log says so
}

step_build() {
  if compgen -G "$wheels/*.whl" >/dev/null; then
    run wheels "$python" -m pip install --no-index --find-links "$wheels" "${pip_args[@]}" \
      expecttest filelock hypothesis matplotlib safetensors tqdm typer
  fi
  if compgen -G "$wheels/flashlib-*.whl" >/dev/null; then
    run flashlib "$python" -m pip install --no-index --no-deps --find-links "$wheels" "${pip_args[@]}" flashlib
  fi
  run requirements "$python" -c \
    "import expecttest, filelock, hypothesis, matplotlib, pybind11, pytest, pytest_benchmark, safetensors, transformers, typer"
  run build env PIP_DISABLE_PIP_VERSION_CHECK=1 \
    "$python" -m pip install -e . --no-build-isolation --no-deps --no-index "${pip_args[@]}"
  run info "$python" -m longmem_kernels.info
}

step_tests() {
  run tests_gpu "$python" -m pytest tests -m gpu -q
  run tests_rest "$python" -m pytest tests -m "not gpu and not network" -q
}

step_sanitize() {
  local sanitizer tool
  sanitizer=$(find_sanitizer)
  for tool in memcheck racecheck initcheck; do
    # Without PyTorch's caching allocator every tensor is an allocation of its own, with bounds to overstep.
    run "sanitize_$tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
      "$sanitizer" --tool "$tool" --error-exitcode 1 "$python" tools/sanitize.py
  done
}

step_bench() {
  # Base shapes come first: the time limit cuts sweeps.
  run bench "$python" -m longmem.cli bench all --device cuda --minutes 7 --json "$out/bench.json" --plots "$out/plots" \
    --keep "${bench_args[@]}"
  run profile "$python" -m longmem.cli profile retrieval --device cuda --out "$out/profile"
  cp -r benchmarks/results "$out/"
  tr '\r' '\n' <"$out/bench.log" | grep -v '^bench: ' # the tables, without the progress bar
  cat "$out/profile.log"
}

run device bash -c "nvidia-smi; nvcc --version; '$python' -m torch.utils.collect_env; exit 0"
grep -m 1 'NVIDIA-SMI' "$out/device.log"
"$python" -c 'import torch; print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")'
for group in "${groups[@]}"; do
  "step_$group"
  write_summary
done

cat "$out/summary.json"
exit "$failed"
