#!/usr/bin/env python3
"""Shared LoRA, private LoRAs, Poly and MHR on Super-NaturalInstructions, at equal trainable parameters and equal steps.

    cargo build --release
    python examples/superni/run.py --model MODEL --data DATA --output-dir runs            # the whole experiment
    python examples/superni/run.py ... --steps 100 --seeds 0 --adapt-steps 0              # a look

First every method gets the learning rate, of those given, that has the lowest loss on DATA/val.jsonl after training with the first
seed. Then for every method and seed: train on DATA/train.jsonl, evaluate on DATA/test.jsonl; then for every held-out task and number of
shots adapt with z (the routing row), mu (the average) and all, DATA/heldout_val16.jsonl picking the steps, and evaluate on
DATA/heldout_test.jsonl. Prints tables as Markdown, and writes them to OUTPUT_DIR/results.md: mean over tasks, then mean and
range over seeds. What is done is not done again, and an interrupted training goes on from its checkpoint: start it again.
README.md beside this file says what DATA holds. Standard library only.
"""

import argparse
import collections
import json
import os
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

# Skills times rank is the same for all, so the banks have the same number of parameters.
METHODS = {
    "shared": lambda a: ["--routing", "shared", "--r", a.rank * a.n_skills],
    "private": lambda a: ["--routing", "private", "--r", max(1, a.rank * a.n_skills // a.n_tasks)],
    "poly": lambda a: ["--r", a.rank, "--n-skills", a.n_skills, "--n-splits", 1],
    "mhr": lambda a: ["--r", a.rank, "--n-skills", a.n_skills, "--n-splits", a.n_splits],
}
TUNES = {"z": "router", "mu": "average", "all": "all"}


def rows(path):
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def write(path, content):
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(content, encoding="utf-8")
    temporary.replace(path)


def polytape(args, *command):
    command = [args.binary, *map(str, command), "--threads", str(args.threads), "--json", "-q"]
    print("+", shlex.join(command), file=sys.stderr, flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{command[1]} ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def cut(source, to, per_task=None, task=None):
    """Rows of a file, of one task or of each so many. Ids count a file's own tasks, so only the names stay."""
    if not to.exists():
        seen, kept = collections.Counter(), []
        for row in rows(source):
            row.pop("task_id", None)
            seen[row["task"]] += 1
            if (task is None or row["task"] == task) and (per_task is None or seen[row["task"]] <= per_task):
                kept.append(json.dumps(row, ensure_ascii=False) + "\n")
        to.parent.mkdir(parents=True, exist_ok=True)
        write(to, "".join(kept))
    return to


def evaluate(args, adapter, data, metrics=("loss", "exact_match", "rouge_l")):
    """Means over tasks of what each task's rows have on average."""
    generate = ["--max-new-tokens", args.max_new_tokens] if "exact_match" in metrics else ["--generate", "off"]
    result = polytape(args, "eval", "--model", args.model, "--adapter", adapter, "--data", data, "--batch-size", args.eval_batch_size, *generate)
    tasks = result["tasks"].values()
    return {key: statistics.fmean(task[key] for task in tasks) for key in metrics}


def once(path, compute):
    """A result that was computed before, or a new one."""
    if not path.exists():
        result = compute()
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, json.dumps(result))
    return json.loads(path.read_text(encoding="utf-8"))


def train(args, method, rate, seed, steps, out):
    polytape(args, "train", "--model", args.model, "--data", args.rows / "train.jsonl", "--output-dir", out, "--max-steps", steps,
             "--batch-size", args.batch_size, "--learning-rate", rate, "--router-learning-rate", args.router_learning_rate,
             "--warmup-steps", 0.06, "--router-sampling", args.router_sampling, "--target-modules", args.target_modules, "--seed", seed,
             "--save-steps", args.save_steps, "--save-total-limit", 1, "--resume", *METHODS[method](args))


def choose(args, method, rate):
    """The loss on validation rows that a learning rate leads to."""
    out = args.output_dir / "rates" / f"{method}-{rate:g}"

    def compute():
        train(args, method, rate, args.seeds[0], args.rate_steps or args.steps, out)
        return evaluate(args, out, args.rows / "val.jsonl", ("loss",))["loss"]
    return once(out.with_name(out.name + ".json"), compute)


def trained(args, method, rate, seed):
    out = args.output_dir / f"{method}-{seed}"

    def compute():
        train(args, method, rate, seed, args.steps, out)
        config = json.loads((out / "adapter_config.json").read_text())
        return evaluate(args, out, args.rows / "test.jsonl") | {"r": config["r"], "n_skills": config["n_skills"]}
    return once(out.with_suffix(".json"), compute)


def adapted(args, method, rate, seed, task, n_shots, tune):
    trained = args.output_dir / f"{method}-{seed}"
    out = trained.parent / f"{trained.name}-{n_shots}-{tune}-{task}"

    def compute():
        few = cut(args.data / f"heldout_train{n_shots}.jsonl", args.rows / f"{task}-train{n_shots}.jsonl", task=task)
        val = cut(args.data / "heldout_val16.jsonl", args.rows / f"{task}-val.jsonl", task=task)
        test = cut(args.data / "heldout_test.jsonl", args.rows / f"{task}-test.jsonl", args.test_rows, task)
        common = ["--data", few, "--eval-data", val, "--output-dir", out, "--max-steps", args.adapt_steps, "--batch-size", 8, "--seed", seed,
                  "--warmup-steps", 0.06, "--learning-rate", rate, "--router-learning-rate", args.router_learning_rate,
                  "--eval-steps", max(1, args.adapt_steps // 5), "--overwrite-output-dir"]
        if method == "private":  # None of its LoRAs is for this task: a fresh one.
            polytape(args, "train", "--model", args.model, *common, "--routing", "shared", "--r", args.rank, "--target-modules",
                     args.target_modules, "--load-best-model-at-end", "on")
        else:
            sampling = [] if method == "shared" else ["--router-sampling", args.router_sampling]
            polytape(args, "adapt", "--model", args.model, "--adapter", trained, "--task", task, "--tune", TUNES[tune], *common, *sampling)
        return evaluate(args, out, test)
    return once(out.with_suffix(".json"), compute)


def spread(values):
    mean = statistics.fmean(values)
    return f"{mean:.3f}" if len(values) == 1 else f"{mean:.3f} ({min(values):.3f}-{max(values):.3f})"


def table(header, lines):
    lines = [header, ["---"] * len(header), *lines]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def report(args, rates, trained, adapted):
    metrics = ("exact_match", "rouge_l", "loss")
    flags = " ".join(f"{key}={value}" for key, value in sorted(vars(args).items()) if key not in {"model", "data", "output_dir", "binary", "rows"})
    text = f"{flags}\n\n"
    if len(args.learning_rate) > 1:
        text += "## Loss on validation rows by learning rate; the lowest is taken\n\n"
        text += table(["method", *(f"{rate:g}" for rate in args.learning_rate)], [
            [method, *(f"{loss:.3f}" for loss in losses.values())] for method, losses in rates.items()]) + "\n"
    text += "## Training tasks, test rows\n\n"
    text += table(["method", "seeds", *metrics], [
        [f"{method}, {runs[0]['n_skills']} x r {runs[0]['r']}", len(runs), *(spread([run[m] for run in runs]) for m in metrics)]
        for method, runs in trained.items()])
    if adapted:
        text += "\n## Held-out tasks, test rows\n\n"
        text += table(["method", "tuned", "shots", "seeds", *metrics], [
            [method, tune, shots, len(runs), *(spread([statistics.fmean(task[m] for task in run) for run in runs.values()]) for m in metrics)]
            for (method, tune, shots), runs in adapted.items()])
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write(args.output_dir / "results.md", text)
    print(text)


def main():
    root = Path(__file__).resolve().parents[2]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the base's folder, with tokenizer.json")
    parser.add_argument("--data", type=Path, required=True, help="the folder of the rows")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--binary", default=os.environ.get("POLYTAPE", str(root / "target/release/polytape")))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rank", type=int, default=4, help="of Poly's and MHR's skills")
    parser.add_argument("--n-skills", type=int, default=8)
    parser.add_argument("--n-splits", type=int, default=4, help="of MHR")
    parser.add_argument("--target-modules", default="q,k,v,o")
    parser.add_argument("--learning-rate", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2], help="of several each method takes its best")
    parser.add_argument("--rate-steps", type=int, help="of the runs that choose it [default: --steps]")
    parser.add_argument("--router-learning-rate", type=float, default=0.1)
    parser.add_argument("--router-sampling", default="on")
    parser.add_argument("--save-steps", type=int, default=500)
    parser.add_argument("--shots", nargs="+", type=int, choices=[16, 32], default=[16, 32])
    parser.add_argument("--tunes", nargs="+", choices=TUNES, default=list(TUNES))
    parser.add_argument("--adapt-steps", type=int, default=200, help="0: no adaptation")
    parser.add_argument("--train-rows", type=int, help="of a task, at most")
    parser.add_argument("--test-rows", type=int, help="of a task, at most")
    parser.add_argument("--n-held-out", type=int, help="held-out tasks, at most")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--eval-batch-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=0, help="0: all")
    args = parser.parse_args()
    args.rows = args.output_dir / "rows"
    args.rows.mkdir(parents=True, exist_ok=True)
    cut(args.data / "train.jsonl", args.rows / "train.jsonl", args.train_rows)
    cut(args.data / "val.jsonl", args.rows / "val.jsonl", args.test_rows)
    cut(args.data / "test.jsonl", args.rows / "test.jsonl", args.test_rows)
    # What a result depends on: with other settings it would be taken for theirs.
    free = {"output_dir", "binary", "methods", "seeds", "shots", "tunes", "n_held_out", "eval_batch_size", "threads", "rows", "save_steps"}
    settings = json.dumps({key: str(value) for key, value in sorted(vars(args).items()) if key not in free}, indent=1)
    known = args.output_dir / "settings.json"
    if known.exists() and known.read_text(encoding="utf-8") != settings:
        sys.exit(f"{known} has other settings: name another --output-dir, or repeat them")
    write(known, settings)
    args.n_tasks = len({row["task"] for row in rows(args.rows / "train.jsonl")})
    held_out = sorted({row["task"] for row in rows(args.data / "heldout_test.jsonl")})[:args.n_held_out]

    rates, on_trained, on_held_out = {}, collections.defaultdict(list), collections.defaultdict(lambda: collections.defaultdict(list))
    for method in args.methods:
        rates[method] = {rate: choose(args, method, rate) if len(args.learning_rate) > 1 else 0 for rate in args.learning_rate}
    best = {method: min(losses, key=losses.get) for method, losses in rates.items()}
    for seed in args.seeds:
        for method in args.methods:
            on_trained[method].append(trained(args, method, best[method], seed))
            report(args, rates, on_trained, on_held_out)
    for seed in args.seeds if args.adapt_steps else []:
        for method in args.methods:
            for shots in args.shots:
                # Without a learned routing there is one thing to tune: the LoRA.
                for tune in args.tunes if method in ("poly", "mhr") else ["all"]:
                    for task in held_out:
                        on_held_out[method, tune, shots][seed].append(adapted(args, method, best[method], seed, task, shots, tune))
                    report(args, rates, on_trained, on_held_out)


if __name__ == "__main__":
    main()
