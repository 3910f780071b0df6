#!/usr/bin/env bash
# Builds the C library and installs it: header, shared and static library, pkg-config file.
#
#   scripts/install-c.sh [PREFIX]     default: /usr/local; DESTDIR is respected
set -euo pipefail
cd "$(dirname "$0")/.."

prefix=${1:-/usr/local}
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -1)
abi=$(sed -n 's/^#define POLYTAPE_ABI_VERSION \([0-9]*\)$/\1/p' include/polytape.h)
target=$(cargo metadata --format-version 1 --no-deps | sed 's/.*"target_directory":"\([^"]*\)".*/\1/')/release

# The library itself, as the two types that C links; GPUs are for the command line and Rust.
build() {
    cargo rustc --release --lib --no-default-features --features capi "$@"
}
build --crate-type cdylib -- -C link-arg=-Wl,-soname,libpolytape.so."$abi"
build --crate-type staticlib

root=${DESTDIR:-}$prefix
mkdir -p "$root/include" "$root/lib/pkgconfig"
install -m 644 include/polytape.h "$root/include/"
install -m 755 "$target/libpolytape.so" "$root/lib/libpolytape.so.$version"
ln -sf "libpolytape.so.$version" "$root/lib/libpolytape.so.$abi"
ln -sf "libpolytape.so.$abi" "$root/lib/libpolytape.so"
install -m 644 "$target/libpolytape.a" "$root/lib/"
cat >"$root/lib/pkgconfig/polytape.pc" <<EOF
prefix=$prefix
includedir=\${prefix}/include
libdir=\${prefix}/lib

Name: polytape
Description: Trains and runs Poly / MHR adapters over a frozen, memory-mapped transformer
Version: $version
Cflags: -I\${includedir}
Libs: -L\${libdir} -lpolytape
Libs.private: -lm -lpthread -ldl
EOF
echo "polytape $version (ABI $abi) is in $root"
