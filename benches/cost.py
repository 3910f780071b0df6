#!/usr/bin/env python3
"""What a training step's time depends on: tokens, tasks, skills, splits and rank, one at a time.

    cargo build --release
    python benches/cost.py --bin target/release/polytape --preset flan-t5-small --out cost

Every value of a sweep runs in turns with a reference (`--batch 8 --src 112 --tgt 16`, 8 tasks, S=4, Q=4, r=8), a process each, and is
reported as the ratio of the two medians, so that a machine that slows down slows both. Writes points.jsonl, table.md and cost.svg
(time over the reference's, both axes logarithmic). What is expected: proportional to tokens (the attention beyond), flat in tasks and
splits, and nearly flat in skills and rank, which add to the work of the routed LoRA alone.
"""

import argparse
import json
import math
import statistics
import subprocess
from pathlib import Path

REFERENCE = {"batch": 8, "src": 112, "tgt": 16, "n_tasks": 8, "n_skills": 4, "n_splits": 4, "r": 8}
# Rows of 128 tokens, of which 16 are labels: batch 1 to 128.
SWEEPS = {
    "tokens": [128, 256, 512, 1024, 2048, 4096, 8192, 16384],
    "n_tasks": [1, 8, 100, 1000, 10000],
    "n_skills": [2, 4, 8, 16, 32, 64],
    "n_splits": [1, 2, 4, 8, 16, 32, 64],
    "r": [1, 2, 4, 8, 16, 32, 64],
}
COLOURS = ["#b7410e", "#4a6a8a", "#5b8c5a", "#8a5a83", "#c08a1e"]


def step_s(args, shape):
    command = [args.bin, "bench", "train", "--json", "--model", args.model, "--steps", args.steps, "--target-modules", args.target_modules]
    for name, value in shape.items():
        command += ["--" + name.replace("_", "-"), value]
    if args.threads:
        command += ["--threads", args.threads]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])["median_s"]


def shape_of(name, value):
    return {**REFERENCE, "batch": value // 128} if name == "tokens" else {**REFERENCE, name: value}


def chart(points):
    width, height, left, top = 640, 420, 70, 30
    values = [p["ratio"] for p in points]
    low, high = math.log2(min(values)) - 0.2, math.log2(max(values)) + 0.2
    x = lambda value: left + width * math.log2(value) / math.log2(16384)
    y = lambda ratio: top + height * (high - math.log2(ratio)) / (high - low)
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 110} {top + height + 50}" font-family="sans-serif" font-size="12">',
           '<rect width="100%" height="100%" fill="#fff"/>',
           f'<text x="{left}" y="18">time of a training step over the reference\'s</text>']
    for power in range(0, 15, 2):
        out.append(f'<text x="{x(2 ** power):.0f}" y="{top + height + 18}" text-anchor="middle">{2 ** power:,}</text>')
    for power in range(math.ceil(low), math.floor(high) + 1):
        line = y(2.0 ** power)
        out.append(f'<path d="M{left} {line:.1f}h{width}" stroke="#ddd"/><text x="{left - 6}" y="{line + 4:.1f}" text-anchor="end">{2.0 ** power:g}</text>')
    labels = []
    for colour, name in zip(COLOURS, SWEEPS):
        own = [(x(p["value"]), y(p["ratio"])) for p in points if p["sweep"] == name]
        if own:
            line = " ".join(f"{a:.1f},{b:.1f}" for a, b in own)
            out.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
            out += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"/>' for a, b in own]
            labels.append((own[-1][1] + 4, own[-1][0] + 8, colour, name))
    lowest = {}
    for label_y, label_x, colour, name in sorted(labels):
        lowest[label_x] = max(label_y, lowest.get(label_x, 0.0) + 13)  # One below the other where lines end together.
        out.append(f'<text x="{label_x:.1f}" y="{lowest[label_x]:.1f}" fill="{colour}">{name}</text>')
    return "\n".join([*out, "</svg>"]) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", required=True)
    parser.add_argument("--preset", default="flan-t5-small", help="of `polytape init`; written to the output folder")
    parser.add_argument("--model", type=Path, help="an existing base instead")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sweeps", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    parser.add_argument("--target-modules", default="q,v")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.model is None:
        args.model = args.out / args.preset
        if not (args.model / "config.json").exists():
            subprocess.run([args.bin, "init", "--preset", args.preset, "--output-dir", str(args.model), "--json"], check=True, capture_output=True)
    points = []
    with open(args.out / "points.jsonl", "w") as lines:
        for name in args.sweeps:
            for value in SWEEPS[name]:
                pairs = [(step_s(args, REFERENCE), step_s(args, shape_of(name, value))) for _ in range(args.rounds)]
                ratios = [own / reference for reference, own in pairs]
                points.append({"sweep": name, "value": value, "ratio": statistics.median(ratios), "min": min(ratios), "max": max(ratios),
                               "step_s": statistics.median(own for _, own in pairs)})
                lines.write(json.dumps(points[-1]) + "\n")
                lines.flush()
    table = "| what | value | step over the reference's | range |\n|---|---:|---:|---|\n" + "".join(
        f"| {p['sweep']} | {p['value']:,} | {p['ratio']:.3f} | {p['min']:.3f}-{p['max']:.3f} |\n" for p in points)
    (args.out / "table.md").write_text(table)
    (args.out / "cost.svg").write_text(chart(points))
    print(table)


if __name__ == "__main__":
    main()
