#!/usr/bin/env bash
# Builds what scripts/gpu-battery.sh runs, for a machine that has a GPU and neither Rust nor NVRTC:
# stripped test and command-line binaries and compiled kernels, in target/gpu-battery/.
# Needs Rust and NVRTC (pip install nvidia-cuda-nvrtc; POLYTAPE_NVRTC=.../libnvrtc.so.13).
set -euo pipefail
cd "$(dirname "$0")/.."
out=target/gpu-battery
rm -rf "$out"
mkdir -p "$out"

cargo build --release
cp target/release/polytape "$out/polytape"
for test in kernels parity; do
    binary=$(cargo test --release --no-run --test "$test" --message-format json 2>/dev/null |
        grep -o "\"executable\":\"[^\"]*/$test-[^\"]*\"" | tail -1 | cut -d'"' -f4)
    cp "$binary" "$out/$test"
done
strip "$out"/polytape "$out"/kernels "$out"/parity
# The kernels of sm_80 and sm_90a; the test says what else is wrong with them.
POLYTAPE_CACHE=$PWD/$out/cache POLYTAPE_NVRTC_REQUIRED=1 cargo test --release --test cuda_compiles
du -sh "$out"
