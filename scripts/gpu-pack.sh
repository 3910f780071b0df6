#!/usr/bin/env bash
# Builds what scripts/gpu-battery.sh runs, for a machine that has a GPU and neither Rust nor NVRTC:
# stripped test and command-line binaries and compiled kernels, in target/gpu-battery/ (put together beside it
# and renamed, so that a build that fails leaves the last one).
# Needs Rust and NVRTC (pip install nvidia-cuda-nvrtc; POLYTAPE_NVRTC=.../libnvrtc.so.13, or where .ci/run puts
# it). The other machine's C library must not be older than this one's.
set -euo pipefail
cd "$(dirname "$0")/.."
out=target/gpu-battery
part=$out.part
rm -rf "$part"
mkdir -p "$part"
if [ -z "${POLYTAPE_NVRTC:-}" ]; then
    POLYTAPE_NVRTC=$(ls "$PWD"/target/nvrtc/lib/python3*/site-packages/nvidia/*/lib/libnvrtc.so.* 2>/dev/null | head -1 || true)
fi
export POLYTAPE_NVRTC

# First the kernels of sm_80 and sm_90a, which the build's profile does not change; the test says what else is
# wrong with them.
POLYTAPE_CACHE=$PWD/$part/cache POLYTAPE_NVRTC_REQUIRED=1 cargo test --test cuda_compiles
cargo build --release
cp target/release/polytape "$part/polytape"
for test in kernels parity; do
    # The messages go through a file: an error must stop this script, and be seen.
    cargo test --release --no-run --test "$test" --message-format json-render-diagnostics >"$part/messages"
    binary=$(grep -o "\"executable\":\"[^\"]*/$test-[^\"]*\"" "$part/messages" | tail -1 | cut -d'"' -f4)
    cp "$binary" "$part/$test"
done
rm "$part/messages"
strip "$part"/polytape "$part"/kernels "$part"/parity
for binary in polytape kernels parity; do
    echo "$binary needs $(grep -ao 'GLIBC_2\.[0-9]*' "$part/$binary" | sort -uV | tail -1)"
done
rm -rf "$out"
mv "$part" "$out"
du -sh "$out"
