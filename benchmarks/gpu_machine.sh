#!/usr/bin/env bash
# Builds the kernels for the GPU of this machine, runs every check that needs one, and times them.
#
#   benchmarks/gpu_machine.sh                    all parts: build checks bench
#   benchmarks/gpu_machine.sh build test         some of them; checks is test memcheck racecheck synccheck side by side
#   PEERS=DIR benchmarks/gpu_machine.sh bench    with the peers' benchmark kit in DIR
#   benchmarks/gpu_machine.sh build fullsize figure long    whole models of 2.7B parameters, random weights: numbers against the CPU,
#                                                times beside PyTorch and the teacher, a million tokens; 16 GB of disk
#
# Needs nvcc, cmake, ninja, and a python3 with torch, numpy and pytest; nothing is installed or downloaded.
# Variables: PYTHON (python3), BUILD_DIR (build/gpu), OUT (BUILD_DIR/logs), ARCH (the GPU's, "90"), TEST_ARGS, BENCH_ARGS,
# SANITIZED (cases of tests/gpu/sanitizer_run.py), JOBS (4); TENSORRT_INCLUDE_DIR adds the TensorRT plugin and the mini host,
# which then go through tests and sanitizers too; ONNXRUNTIME_INCLUDE_DIR adds the library for ONNX Runtime, whose test needs
# onnxruntime-gpu in python3 or in the folder ONNXRUNTIME_GPU. For fullsize, figure and long: FULL_SIZE (build/full-size), folder of
# the bundles, which are made unless they are there; FIGURE_SECONDS (280), LONG_SECONDS (240).
# A part that fails does not stop the others; the exit code is 1 when one did.
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
BUILD_DIR=${BUILD_DIR:-build/gpu}
case $BUILD_DIR in /*) ;; *) BUILD_DIR=$PWD/$BUILD_DIR ;; esac
OUT=${OUT:-$BUILD_DIR/logs}
JOBS=${JOBS:-4}
export PYTHONPATH=src PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export MMM_KERNEL_LIBRARY=${MMM_KERNEL_LIBRARY:-$BUILD_DIR/libmmm_kernels.so}
mkdir -p "$BUILD_DIR" "$OUT"
parts=${*:-build checks bench}
checks=(test memcheck racecheck synccheck)
failed=() summary=()

note() { # part, outcome, seconds
  summary+=("$(printf '%-10s %-8s %4d s' "$1" "$2" "$3")")
  [ "$2" = ok ] || failed+=("$1")
}

build() {
  local arch=${ARCH:-$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)}
  local options=(-DMMM_CUDA=ON "-DMMM_CUDA_ARCHITECTURES=${arch:?no GPU found; set ARCH}" -DCMAKE_BUILD_TYPE=Release)
  [ -z "${TENSORRT_INCLUDE_DIR:-}" ] || options+=("-DMMM_TENSORRT_INCLUDE_DIR=$TENSORRT_INCLUDE_DIR")
  [ -z "${ONNXRUNTIME_INCLUDE_DIR:-}" ] || options+=("-DMMM_ONNXRUNTIME_INCLUDE_DIR=$ONNXRUNTIME_INCLUDE_DIR")
  { cmake -S plugins -B "$BUILD_DIR" -G Ninja "${options[@]}" && cmake --build "$BUILD_DIR" --parallel; } \
    >"$OUT/build.log" 2>&1
  local code=$?
  [ $code = 0 ] || tail -n 40 "$OUT/build.log"
  grep -E "warning|spill stores" "$OUT/build.log" | grep -v " 0 bytes spill stores" | head -n 20
  return $code
}

# Each file of tests in a process of its own: a kernel that breaks the CUDA context, or hangs, costs that file alone.
run_tests() {
  local logs code=0 name file
  logs=$(mktemp -d)
  [ ! -x "$BUILD_DIR/mmm_mini_host" ] || export MMM_TENSORRT_PLUGIN_DIR="${MMM_TENSORRT_PLUGIN_DIR:-$BUILD_DIR}"
  [ ! -e "$BUILD_DIR/libmmm_onnxruntime.so" ] || export MMM_ONNXRUNTIME_LIBRARY="$BUILD_DIR/libmmm_onnxruntime.so"
  printf '%s\n' tests/gpu/test_*.py | xargs -P "$JOBS" -I {} bash -c '
    name=$(basename "{}" .py)
    case $name in test_onnxruntime_cuda | test_session_cuda) PYTHONPATH="${ONNXRUNTIME_GPU:+$ONNXRUNTIME_GPU:}$PYTHONPATH" ;; esac
    MMM_ERROR_TABLE="$1/$name.table" timeout -k 5 "${TEST_LIMIT:-120}" "$2" -m pytest -p no:cacheprovider -rfEs --tb=short \
      ${TEST_ARGS:-} "{}" >"$1/$name.log" 2>&1
    echo $? >"$1/$name.code"' _ "$logs" "$PYTHON"
  : >"$OUT/test.log"
  for file in tests/gpu/test_*.py; do
    name=$(basename "$file" .py)
    printf '\n==== %s: exit code %s\n' "$file" "$(cat "$logs/$name.code")" | tee -a "$OUT/test.log"
    cat "$logs/$name.log" >>"$OUT/test.log"
    grep -E "^(FAILED|ERROR|SKIPPED|E  |!!)|passed|failed|error" "$logs/$name.log" | cut -c 1-220 | tail -n 25
    case $(cat "$logs/$name.code") in 0 | 5) ;; *) code=1 ;; esac # 5: TEST_ARGS selected none of this file
  done
  cat "$logs"/*.table 2>/dev/null | awk '!seen[$0]++' | tee "$OUT/errors.txt"
  rm -rf "$logs"
  return $code
}

sanitize() { # tool
  local tool code=0 cases
  tool=$(command -v compute-sanitizer || ls -d /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -n 1)
  [ -n "$tool" ] || { echo "compute-sanitizer was not found"; return 1; }
  # shellcheck disable=SC2086
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout -k 5 "${SANITIZER_LIMIT:-90}" "$tool" --tool "$1" --error-exitcode 9 \
    --print-limit 20 "$PYTHON" tests/gpu/sanitizer_run.py ${SANITIZED:-} >"$OUT/$1.log" 2>&1
  code=$?
  [ $code != 124 ] || echo "stopped at its time limit"
  tail -n 12 "$OUT/$1.log" | cut -c 1-220
  [ -x "$BUILD_DIR/mmm_mini_host" ] || return $code
  cases=$(mktemp -d)
  "$PYTHON" tests/gpu/mini_host.py "$cases" || return 1
  for case in "$cases"/*/; do # the plugin file itself: a small program, so that each takes seconds
    # shellcheck disable=SC2046
    timeout -k 5 60 "$tool" --tool "$1" --error-exitcode 9 --print-limit 20 "$BUILD_DIR/mmm_mini_host" \
      "$BUILD_DIR/libmmm_tensorrt.so" --device cuda $(cat "$case/options") --inputs "$case/in" --outputs "$case/out" \
      >"$case/log" 2>&1 || { code=$?; echo "$(basename "$case"): exit code $code"; }
    printf '%s: ' "plugin, $(basename "$case")" >>"$OUT/$1.log"
    grep -v '^{' "$case/log" >>"$OUT/$1.log"
    printf '%s: %s\n' "plugin, $(basename "$case")" "$(grep SUMMARY "$case/log" | cut -d' ' -f2-)"
  done
  rm -rf "$cases"
  return $code
}

# All of them at once: each is mostly one processor core, and none of them measures time.
run_checks() {
  local check code=0
  for check in "${checks[@]}"; do
    (
      rm -f "$OUT/$check.code"
      run_part "$check" >"$OUT/$check.out" 2>&1
      echo $? >"$OUT/$check.code"
    ) &
  done
  wait
  for check in "${checks[@]}"; do
    printf '\n#### %s: exit code %s\n' "$check" "$(cat "$OUT/$check.code")"
    cat "$OUT/$check.out"
    [ "$(cat "$OUT/$check.code")" = 0 ] || code=1
  done
  return $code
}

bench() {
  local options=() code
  [ -z "${PEERS:-}" ] || options+=(--peers "$PEERS")
  # shellcheck disable=SC2086
  timeout -k 5 "${BENCH_LIMIT:-300}" "$PYTHON" benchmarks/kernels.py ${options[@]+"${options[@]}"} --results "$OUT" \
    ${BENCH_ARGS:-} 2>"$OUT/bench.err" | tee "$OUT/bench.txt"
  code=$?
  tail -n 30 "$OUT/bench.err" | cut -c 1-220
  return $code
}

# Whole models. The bundles are exported from random checkpoints once, which takes minutes.
FULL_SIZE=${FULL_SIZE:-build/full-size}

full_size_bundle() { # dtype
  [ -e "$FULL_SIZE/$1/manifest.json" ] || { mkdir -p "$FULL_SIZE" && "$PYTHON" benchmarks/full_size_bundle.py --dtype "$1" "$FULL_SIZE/$1"; }
}

on_library() { # command, with the library just built and ONNX Runtime for GPUs
  PYTHONPATH="$PYTHONPATH:${ONNXRUNTIME_GPU:-}" "$@"
}

library() { # the library for ONNX Runtime: named, or just built, or that of `mmm-export plugins build`
  local built=$BUILD_DIR/libmmm_onnxruntime.so
  [ ! -e "$built" ] || echo "$built"
}

fullsize() {
  full_size_bundle fp16 || return 1
  MMM_FULL_SIZE_BUNDLE=$FULL_SIZE/fp16 MMM_ONNXRUNTIME_LIBRARY=${MMM_ONNXRUNTIME_LIBRARY:-$(library)} on_library \
    "$PYTHON" -m pytest -p no:cacheprovider -rfEs --tb=short tests/gpu/test_full_size_cuda.py 2>&1 | tee "$OUT/fullsize.log"
  return "${PIPESTATUS[0]}"
}

whole_models() { # script, seconds, further options
  local script=$1 seconds=$2 name kernels=${MMM_ONNXRUNTIME_LIBRARY:-$(library)}
  shift 2
  name=$(basename "$script" .py)
  full_size_bundle bf16 || return 1
  on_library "$PYTHON" "$script" --bundle "$FULL_SIZE/bf16" --kernels "${kernels:-auto}" --seconds "$seconds" "$@" 2>&1 | tee "$OUT/$name.log"
  return "${PIPESTATUS[0]}"
}

figure() {
  local options=()
  [ -z "${PEERS:-}" ] || options+=(--peers "$PEERS")
  whole_models benchmarks/paper_figure.py "${FIGURE_SECONDS:-280}" ${options[@]+"${options[@]}"}
}

long() { whole_models benchmarks/long_runs.py "${LONG_SECONDS:-240}"; }

run_part() {
  case $1 in
    build) build ;;
    checks) run_checks ;;
    test) run_tests ;;
    memcheck | racecheck | initcheck | synccheck) sanitize "$1" ;;
    bench | fullsize | figure | long) "$1" ;;
    *) echo "unknown part; wanted build, checks, test, memcheck, racecheck, synccheck, bench, fullsize, figure, long" && false ;;
  esac
}

for part in $parts; do
  begin=$SECONDS
  printf '\n######## %s\n' "$part"
  run_part "$part" && outcome=ok || outcome=FAILED
  note "$part" $outcome $((SECONDS - begin))
done

printf '\n######## summary (logs: %s)\n' "$OUT"
printf '%s\n' "${summary[@]}"
[ ${#failed[@]} = 0 ]
