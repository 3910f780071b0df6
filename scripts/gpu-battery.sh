#!/usr/bin/env bash
# All that is to be known from a GPU, in one command of at most ten minutes: every kernel against the oracle,
# compute-sanitizer, PEFT parity, repeated runs, then times against the frozen floor.
#
#     scripts/gpu-pack.sh                       # where Rust and NVRTC are
#     scripts/gpu-battery.sh [RESULTS_DIR]      # where the GPU is, from the repository's root
#
# Needs target/gpu-battery/ and this repository, nothing else. Writes gpu.json and gpu.md. A part that fails
# or does not exist on this machine says so and the others go on; the exit status is that of the checks.
set -uo pipefail
cd "$(dirname "$0")/.."
bin=target/gpu-battery
results=${1:-benches/results}
mkdir -p "$results"
json=$results/gpu.json
md=$results/gpu.md
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export POLYTAPE_CACHE=$PWD/$bin/cache POLYTAPE_ROOT=$PWD POLYTAPE_BACKENDS=gpu
failed=0
started=$SECONDS

if ! device=$("$bin/polytape" doctor --device cuda --json 2>"$work/doctor"); then
    cat "$work/doctor" >&2
    echo "no GPU to test" >&2
    exit 4
fi
{
    echo "# GPU battery, $(date -u +%Y-%m-%d)"
    echo
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null || true
    echo
    echo "| check | outcome | seconds |"
    echo "|---|---|---|"
} >"$md"
echo "$device" >"$json"

# Runs a check within a time limit and notes how it went.
check() {
    local name=$1 limit=$2 outcome=passed begun=$SECONDS
    shift 2
    echo "== $name"
    if ! timeout "$limit" "$@" >"$work/log" 2>&1; then
        outcome=FAILED
        failed=1
        tail -30 "$work/log"
    elif grep -q "^skipped" "$work/log"; then
        outcome="skipped: $(grep -m1 "^skipped" "$work/log" | cut -c1-120)"
        failed=1
    fi
    echo "| $name | $outcome | $((SECONDS - begun)) |" >>"$md"
    echo "{\"check\":\"$name\",\"outcome\":\"${outcome//\"/}\",\"seconds\":$((SECONDS - begun))}" >>"$json"
}

check "every operation against the oracle" 150 "$bin/kernels" --nocapture --test-threads 1 --skip faults --skip fuzzed
check "a kernel's fault is put down to it" 60 env POLYTAPE_CUDA_SYNC=1 POLYTAPE_CASES=2 "$bin/kernels" --nocapture --test-threads 1 --skip faults --skip fuzzed
check "PEFT parity and 20 equal runs" 90 "$bin/parity" --nocapture --test-threads 1 cuda
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -1 || true)
if [ -n "$sanitizer" ]; then
    for tool in memcheck racecheck initcheck; do
        POLYTAPE_CASES=2 check "compute-sanitizer $tool" 60 "$sanitizer" --tool "$tool" --error-exitcode 9 \
            "$bin/kernels" --nocapture --test-threads 1 --skip faults --skip fuzzed
    done
else
    echo "| compute-sanitizer | not on this machine | |" >>"$md"
fi

{
    echo
    echo "| bench, bf16 | median s | frozen floor s | ratio |"
    echo "|---|---|---|---|"
} >>"$md"
seconds_of() { grep -o '"median_s":[0-9.e-]*' | cut -d: -f2; }
# bench PRESET WHAT FLAGS...
bench() {
    local preset=$1 what=$2 model=$work/$1
    shift 2
    [ $((SECONDS - started)) -gt 480 ] && { echo "| $preset $what | out of time | | |" >>"$md"; return; }
    [ -d "$model" ] || timeout 120 "$bin/polytape" init --preset "$preset" --output-dir "$model" -q || return
    local adapted frozen
    adapted=$(timeout 90 "$bin/polytape" bench "$what" --model "$model" --device cuda --dtype bf16 -q "$@" | tee -a "$json" | seconds_of)
    frozen=$(timeout 90 "$bin/polytape" bench "$what" --model "$model" --device cuda --dtype bf16 -q --adapter none "$@" | tee -a "$json" | seconds_of)
    local ratio
    ratio=$(awk -v a="${adapted:-0}" -v f="${frozen:-0}" 'BEGIN { if (f > 0) printf "%.3f", a / f }')
    echo "| $preset $what $* | ${adapted:-failed} | ${frozen:-failed} | $ratio |" >>"$md"
}
bench flan-t5-base train --batch 16 --src 128 --tgt 16 --steps 10
bench flan-t5-base eval --batch 16 --src 128 --tgt 16 --steps 10
bench flan-t5-base generate --batch 16 --src 128 --new 32 --steps 3
bench flan-t5-xl train --batch 16 --src 128 --tgt 16 --steps 5
bench flan-t5-xl generate --batch 16 --src 128 --new 16 --steps 2
echo >>"$md"
echo "Took $((SECONDS - started)) s." >>"$md"
cat "$md"
exit $failed
