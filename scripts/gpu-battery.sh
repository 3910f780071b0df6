#!/usr/bin/env bash
# All that is to be known from a GPU, in one command of at most ten minutes: every kernel against the oracle,
# PEFT parity, repeated runs, times against the frozen floor, PEFT and cuBLASLt (where Python has torch, transformers
# and peft), compute-sanitizer.
#
#     scripts/gpu-pack.sh                       # where Rust and NVRTC are
#     scripts/gpu-battery.sh [RESULTS_DIR]      # where the GPU is, from the repository's root
#
# Needs target/gpu-battery/ and this repository, nothing else. Writes gpu.json, gpu.md, gpu-peft.jsonl and gpu.log (what checks
# that failed said) as it goes, so that what was learned is there if it is stopped. A part that fails, takes too long or does not exist on this
# machine says so and the others go on; the exit status is that of the checks. POLYTAPE_BATTERY_SECONDS (580)
# is the time for all of it.
set -uo pipefail
cd "$(dirname "$0")/.."
bin=$PWD/target/gpu-battery
results=${1:-benches/results}
mkdir -p "$results"
json=$results/gpu.json
md=$results/gpu.md
work=$(mktemp -d)
export POLYTAPE_CACHE=$bin/cache POLYTAPE_ROOT=$PWD POLYTAPE_BACKENDS=gpu
failed=0
started=$SECONDS
ends=$((SECONDS + ${POLYTAPE_BATTERY_SECONDS:-580}))
bases=()
trap 'for pid in ${bases[@]+"${bases[@]}"}; do kill "$pid" 2>/dev/null; done; rm -rf "$work"' EXIT

# The seconds that something may take: its own limit, or what is left of all.
limit() { echo $(($1 < ends - SECONDS ? $1 : ends - SECONDS)); }
# A line for eyes and one for programs.
note() {
    echo "| $1 | $2 | $3 |" >>"$md"
    echo "{\"check\":\"$1\",\"outcome\":\"${2//\"/}\",\"seconds\":$3}" >>"$json"
}

if ! device=$(timeout -k 5 60 "$bin/polytape" doctor --device cuda --json 2>"$work/doctor"); then
    cat "$work/doctor" >&2
    echo "no GPU to test, or the binaries of scripts/gpu-pack.sh do not run here" >&2
    exit 4
fi
{
    echo "# GPU battery, $(date -u +%Y-%m-%d)"
    echo
    timeout 10 nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null || true
    echo
    echo "| check | outcome | seconds |"
    echo "|---|---|---|"
} >"$md"
echo "$device" >"$json"

# Bases for the benches, while the GPU is busy with the checks; one after the other, the small one first.
make_bases() {
    local preset child
    for preset in flan-t5-base flan-t5-xl llama-8b; do
        timeout -k 5 300 "$bin/polytape" init --preset "$preset" --output-dir "$work/$preset.part" -q \
            >"$work/$preset.log" 2>&1 &
        child=$!
        trap 'kill "$child" 2>/dev/null; exit' TERM
        wait "$child" && mv "$work/$preset.part" "$work/$preset"
    done
}
make_bases &
bases+=($!)

# Runs a check within a time limit and notes how it went; 0 where it passed.
check() {
    local name=$1 seconds outcome=passed begun=$SECONDS status
    seconds=$(limit "$2")
    shift 2
    if [ "$seconds" -le 0 ]; then
        note "$name" "not run: out of time" 0
        return 1
    fi
    echo "== $name"
    timeout -k 5 "$seconds" "$@" >"$work/log" 2>&1
    status=$?
    if [ $status = 124 ] || [ $status = 137 ]; then
        outcome="out of time: $(grep -c 'ok$' "$work/log") tests had passed"
        # A kernel that waits for ever looks like this; in the sanitizer it is only slow.
        case $name in compute-sanitizer*) ;; *) failed=1 && grep -v '\.\.\. ok$' "$work/log" | tail -20 ;; esac
    elif [ $status != 0 ]; then
        outcome=FAILED
        failed=1
        grep -v '\.\.\. ok$' "$work/log" | tail -40
    elif grep -q "^skipped" "$work/log"; then
        outcome="skipped: $(grep -m1 "^skipped" "$work/log" | cut -c1-120)"
        failed=1
    fi
    if [ "$outcome" = passed ]; then
        # A suite without tests would pass, too.
        outcome="$(sed -n 's/^test result: ok. \([0-9]*\) passed.*/\1 tests /p' "$work/log")passed"
    else
        { echo "== $name" && tail -c 200000 "$work/log"; } >>"$results/gpu.log"
    fi
    note "$name" "$outcome" $((SECONDS - begun))
    [[ $outcome == *passed ]]
}

# A fault of one kernel takes the whole process with it: then each test again in a process of its own.
each_alone() {
    local binary=$1 seconds=$2 test
    shift 2
    for test in $(timeout 20 "$binary" --list "$@" 2>/dev/null | sed -n 's/: test$//p'); do
        check "alone: $test" "$seconds" env POLYTAPE_CUDA_SYNC=1 "$binary" --nocapture --test-threads 1 --exact "$test"
    done
}

operations=(--nocapture --skip faults --skip fuzzed)
if ! check "every operation against the oracle" 150 env POLYTAPE_CASES=100 "$bin/kernels" "${operations[@]}" --test-threads 4; then
    each_alone "$bin/kernels" 30 --skip faults --skip fuzzed
fi
if ! check "PEFT parity and 20 equal runs" 90 "$bin/parity" --nocapture --test-threads 1 cuda:: --skip graphs_; then
    each_alone "$bin/parity" 30 cuda:: --skip graphs_
fi
# Steps of two shapes, and decoding: the bits of graphs against those of launches one by one.
check "graphs give the bits of plain launches" 40 "$bin/parity" --nocapture --test-threads 1 cuda::graphs_
check "every launch waited for" 45 env POLYTAPE_CUDA_SYNC=1 POLYTAPE_CASES=2 \
    "$bin/kernels" "${operations[@]}" --test-threads 1
# What multiplies by frozen weights: a Hopper has two, and takes the faster one if it is not told.
gemms=(mma)
if grep -q "sm_90" <<<"$device"; then
    gemms+=(wgmma)
    check "every operation against the oracle, mma" 100 env POLYTAPE_CUDA_GEMM=mma POLYTAPE_CASES=20 \
        "$bin/kernels" "${operations[@]}" --test-threads 4
fi

# Frozen products by each of them.
for gemm in "${gemms[@]}"; do
    seconds=$(limit 40) begun=$SECONDS
    [ "$seconds" -le 0 ] && continue
    if POLYTAPE_CUDA_GEMM=$gemm timeout -k 5 "$seconds" "$bin/polytape" bench gemm --device cuda --json -q \
        --rows 2048 --shapes flan-t5-xl,llama-1b --seconds 0.02 >>"$work/gemm" 2>"$work/log"; then
        note "bench gemm, $gemm" passed $((SECONDS - begun))
    else
        note "bench gemm, $gemm" "FAILED or out of time: $(tail -1 "$work/log" | cut -c1-120)" $((SECONDS - begun))
        failed=1
    fi
done
cat "$work/gemm" >>"$json" 2>/dev/null
{
    echo
    echo "| frozen product, bf16 | ${gemms[*]/%/ ms |}"
    echo "|---|${gemms[*]/*/---|}" | tr -d ' '
    fields='.*"model":"\([^"]*\)","direction":"\([^"]*\)","rows":\([0-9]*\),"d_out":\([0-9]*\),"d_in":\([0-9]*\),'
    sed -n "s/$fields.*\"kernels\":\"\([^\"]*\)\",\"median_s\":\([0-9.e-]*\).*/\1 \2 \3x\4x\5 \6 \7/p" "$work/gemm" 2>/dev/null |
        awk -v kinds="${gemms[*]}" '
            { shape = $1 " " $2 " " $3
              if (!(shape in seen)) { seen[shape] = 1; shapes[++n] = shape }
              if (!((shape, $4) in least) || $5 < least[shape, $4]) least[shape, $4] = $5 }
            END { k = split(kinds, kind, " ")
                  for (i = 1; i <= n; ++i) {
                      line = "| " shapes[i] " |"
                      for (j = 1; j <= k; ++j) line = line sprintf(" %.4f |", 1000 * least[shapes[i], kind[j]])
                      print line } }'
} >>"$md"

{
    echo
    echo "| bench, bf16 | median s | frozen floor s | ratio |"
    echo "|---|---|---|---|"
} >>"$md"
# timed FLAGS...: the median of a bench, or why there is none.
timed() {
    local seconds status
    seconds=$(limit 45)
    [ "$seconds" -le 0 ] && { echo "out of time"; return; }
    timeout -k 5 "$seconds" "$bin/polytape" bench "$@" --device cuda --dtype bf16 -q >"$work/bench" 2>"$work/log"
    status=$?
    cat "$work/bench" >>"$json"
    if [ $status = 124 ] || [ $status = 137 ]; then
        echo "out of time"
    elif [ $status != 0 ]; then
        cat "$work/log" >&2
        echo "failed"
    else
        grep -o '"median_s":[0-9.e-]*' "$work/bench" | head -1 | cut -d: -f2
    fi
}
# bench PRESET WHAT FLAGS...
bench() {
    local preset=$1 what=$2 adapted frozen ratio
    shift 2
    # The base may still be on its way.
    while [ ! -d "$work/$preset" ] && kill -0 "${bases[0]}" 2>/dev/null && [ "$(limit 1)" = 1 ]; do sleep 1; done
    if [ ! -d "$work/$preset" ]; then
        echo "| $preset $what $* | no base: $(tail -1 "$work/$preset.log" 2>/dev/null) | | |" >>"$md"
        return
    fi
    adapted=$(timed "$what" --model "$work/$preset" "$@")
    frozen=$(timed "$what" --model "$work/$preset" --adapter none "$@")
    ratio=$(awk -v a="$adapted" -v f="$frozen" 'BEGIN { if (f + 0 > 0) printf "%.3f", a / f }')
    echo "| $preset $what $* | $adapted | $frozen | $ratio |" >>"$md"
}
for preset in flan-t5-base flan-t5-xl; do
    bench $preset train --batch 16 --src 128 --tgt 16 --steps 10
    bench $preset train --batch 16 --src 128 --tgt 16 --steps 10 --target-modules all-linear
    bench $preset eval --batch 16 --src 128 --tgt 16 --steps 10
    bench $preset generate --batch 16 --src 128 --new 32 --steps 3
done
bench llama-8b train --batch 16 --src 1024 --steps 3
bench llama-8b train --batch 16 --src 1024 --steps 3 --target-modules all-linear
bench llama-8b eval --batch 16 --src 1024 --steps 3
bench llama-8b generate --batch 128 --n-tasks 128 --src 16 --new 32 --steps 2
bench llama-8b generate --batch 128 --n-tasks 128 --src 16 --new 32 --steps 2 --do-sample

{
    echo
    echo "| graphs, bf16, small batches | median s | launched one by one s | ratio |"
    echo "|---|---|---|---|"
} >>"$md"
# Where launches weigh most. graphs WHAT FLAGS...
graphs() {
    local what=$1 with without ratio
    shift
    with=$(timed "$what" --model "$work/flan-t5-base" "$@")
    without=$(POLYTAPE_CUDA_GRAPHS=off timed "$what" --model "$work/flan-t5-base" "$@")
    ratio=$(awk -v a="$with" -v f="$without" 'BEGIN { if (f + 0 > 0) printf "%.3f", a / f }')
    echo "| flan-t5-base $what $* | $with | $without | $ratio |" >>"$md"
}
if [ -d "$work/flan-t5-base" ]; then
    graphs train --batch 1 --src 128 --tgt 16 --steps 10
    graphs generate --batch 1 --src 128 --new 32 --steps 3
fi

# Each kernel is ten to a hundred times slower in it.
sanitize() {
    local sanitizer tool
    {
        echo
        echo "| compute-sanitizer | outcome | seconds |"
        echo "|---|---|---|"
    } >>"$md"
    sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -1 || true)
    if [ -z "$sanitizer" ]; then
        note "compute-sanitizer" "not on this machine" 0
    elif ! timeout -k 5 30 "$sanitizer" --error-exitcode 9 "$bin/polytape" doctor --device cuda >"$work/log" 2>&1; then
        note "compute-sanitizer" "does not run here: $(grep -m1 -iE 'not supported|error' "$work/log" | tr '|"' '/ ' | cut -c1-100)" 0
    else
        for tool in memcheck racecheck initcheck; do
            check "compute-sanitizer $tool" 60 env POLYTAPE_CASES=2 "$sanitizer" --tool "$tool" --error-exitcode 9 \
                "$bin/kernels" "${operations[@]}" --test-threads 1
        done
    fi
}

# Peers, in turns with polytape by the scripts of benches/peft/; what is printed goes into the results.
python=${POLYTAPE_PYTHON:-python3}
timeout 60 "$python" -c 'import peft, torch, transformers; assert torch.cuda.is_available()' 2>"$work/log" || python=
# peer NAME SECONDS TABLE SCRIPT FLAGS...: TABLE is the file with the Markdown.
peer() {
    local name=$1 seconds begun=$SECONDS table=$3 outcome=passed status
    seconds=$(limit "$2")
    shift 3
    if [ -z "$python" ]; then
        outcome="not run: no Python with torch on this GPU, transformers and peft ($(tail -1 "$work/log" | cut -c1-80))"
    elif [ "$seconds" -le 0 ]; then
        outcome="not run: out of time"
    else
        timeout -k 5 "$seconds" "$python" "$@" --bin "$bin/polytape" --device cuda >"$work/out" 2>"$work/peer.log"
        status=$?
        if [ $status = 124 ] || [ $status = 137 ]; then
            outcome="out of time"
        elif [ $status != 0 ]; then # Among other things where the two do not compute the same.
            outcome="FAILED: $(tail -1 "$work/peer.log" | tr '|"' '/ ' | cut -c1-160)"
            failed=1
        fi
    fi
    {
        echo
        echo "Against $name: $outcome, $((SECONDS - begun)) s."
        echo
        grep -h '^[|g]' "$table" 2>/dev/null
    } >>"$md"
    echo "{\"check\":\"against $name\",\"outcome\":\"${outcome//\"/}\",\"seconds\":$((SECONDS - begun))}" >>"$json"
}
rm -f "$work/out"
peer "cuBLASLt, frozen products" 60 "$work/out" benches/peft/gemm.py --dtype bf16 --weights bf16 --rows 2048 \
    --shapes flan-t5-xl,llama-1b --seconds 0.02 --rounds 1
peer "PEFT at the shape of T5-XL" 120 "$work/peft-xl/table.md" benches/peft/compare.py --model "$work/flan-t5-xl" \
    --out "$work/peft-xl" --modes train --adapters poly --batch 16 --steps 3 --rounds 1
sanitize
peer "PEFT at the shape of Llama 8B" 150 "$work/peft-llama/table.md" benches/peft/compare.py --model "$work/llama-8b" \
    --out "$work/peft-llama" --modes train --adapters poly --batch 8 --src 1024 --steps 2 --rounds 1 --target-modules q_proj,v_proj
peer "PEFT at the shape of flan-t5-base" 100 "$work/peft-base/table.md" benches/peft/compare.py --model "$work/flan-t5-base" \
    --out "$work/peft-base" --modes train,generate --adapters poly --batch 16 --steps 5 --rounds 1
cat "$work"/peft-*/runs.jsonl >"$results/gpu-peft.jsonl" 2>/dev/null

{
    echo
    echo "Took $((SECONDS - started)) s."
} >>"$md"
cat "$md"
exit $failed
