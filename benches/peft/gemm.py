#!/usr/bin/env python3
"""The frozen linears of `polytape bench gemm` in PyTorch, in turns with polytape's.

    pip install torch==2.11.0
    cargo build --release
    python benches/peft/gemm.py --bin target/release/polytape --dtype f32 --weights f32 --rows 1024 --shapes flan-t5-base

polytape checks each shape against its f64 oracle before it times it. On the CPU both sides go through enough copies of a weight that none is
in a cache when its turn comes; with --device cuda both queue ten products of one weight and wait for the last (PyTorch's are cuBLASLt's or
cuBLAS's, as it chooses; polytape's are of POLYTAPE_CUDA_GEMM). PyTorch multiplies in the type of the weights (a bf16 weight by bf16 rows);
polytape's rows are of --dtype. Prints a Markdown table: GFLOP/s of both and the ratio's median and range over the rounds, then the geometric mean.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import time

WEIGHT_BYTES = 192 << 20
QUEUED_ON_GPU = 10  # As `polytape bench gemm --device cuda`.


def polytape(args):
    command = [args.bin, "bench", "gemm", "--json", "--dtype", args.dtype, "--weights", args.weights, "--rows", args.rows, "--shapes", args.shapes,
               "--seconds", args.seconds, "--threads", args.threads, "--device", args.device]
    lines = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True).stdout.splitlines()
    shapes = [json.loads(line) for line in lines]
    return {key(shape): gflop_per_s(key(shape), shape["median_s"]) for shape in shapes if "rows" in shape}


def key(shape):
    return shape["model"], shape["direction"], shape["rows"], shape["d_out"], shape["d_in"]


def gflop_per_s(shape, seconds):
    *_, rows, d_out, d_in = shape
    return 2e-9 * rows * d_out * d_in / seconds


def pytorch(shapes, args):
    import torch

    torch.set_num_threads(args.threads)
    on_gpu = args.device == "cuda"
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[args.weights]
    found = {}
    for shape in shapes:
        _, direction, rows, d_out, d_in = shape
        weight = torch.randn(d_out, d_in).to(args.device, dtype)
        n_weights = 1 if on_gpu else math.ceil(WEIGHT_BYTES / weight.nbytes)
        weights = [weight] + [weight.clone() for _ in range(n_weights - 1)]
        x = torch.randn(rows, d_in if direction == "forward" else d_out).to(args.device, dtype)
        out = torch.empty(rows, d_out if direction == "forward" else d_in, dtype=dtype, device=args.device)
        queued = QUEUED_ON_GPU if on_gpu else 1
        times, start, n = [], time.perf_counter(), 0
        with torch.inference_mode():
            while n < 6 or time.perf_counter() - start < args.seconds:
                w = weights[n % len(weights)]
                before = time.perf_counter()
                for _ in range(queued):
                    torch.mm(x, w.T if direction == "forward" else w, out=out)
                if on_gpu:
                    torch.cuda.synchronize()
                times.append((time.perf_counter() - before) / queued)
                n += 1
        found[shape] = gflop_per_s(shape, statistics.median(times[1:]))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["f32", "bf16"], default="f32")
    parser.add_argument("--weights", choices=["f32", "bf16"], default="f32")
    parser.add_argument("--rows", default="512,1024,4096")
    parser.add_argument("--shapes", default="flan-t5-base")
    parser.add_argument("--seconds", type=float, default=0.3, help="of a measurement, at least")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    rounds = []
    for _ in range(args.rounds):
        own = polytape(args)
        rounds.append((own, pytorch(own, args)))
    print("| model | direction | rows x out x in | polytape GFLOP/s | PyTorch GFLOP/s | times faster |\n|---|---|---|---:|---:|---:|")
    means = []
    for shape in rounds[0][0]:
        ratios = [own[shape] / peer[shape] for own, peer in rounds]
        own, peer = (statistics.median(side[shape] for side in sides) for sides in zip(*rounds))
        means.append(statistics.median(ratios))
        model, direction, *sizes = shape
        print(f"| {model} | {direction} | {' x '.join(map(str, sizes))} | {own:.0f} | {peer:.0f} | {means[-1]:.2f} ({min(ratios):.2f}-{max(ratios):.2f}) |")
    print(f"\ngeometric mean: {statistics.geometric_mean(means):.2f} times as fast as PyTorch")


if __name__ == "__main__":
    main()
