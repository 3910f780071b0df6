#!/usr/bin/env python3
"""Times `polytape train` against PEFT Poly under the Hugging Face Trainer: tokenising, steps, evaluation and checkpoints included.

    pip install torch==2.11.0 transformers==5.17.0 peft==0.21.2 accelerate datasets
    cargo build --release
    python benches/peft/trainer.py --bin target/release/polytape --model MODEL --data train.jsonl --eval-data val.jsonl

MODEL is an encoder-decoder with a tokenizer.json; a row of the data is {"task": name, "input": text, "target": text}.

1. Check: the base's loss on the evaluation rows, a label token each, from both sides.
2. Timing: polytape, PEFT, polytape, PEFT, ... for --rounds rounds, each a process of its own that trains --steps steps of --batch-size
   rows from the texts, evaluates the loss every --eval-steps, and saves every --save-steps and at the end. PEFT's time starts after its
   imports and when the base is loaded; polytape's is the whole process's. Both sample the router, both in the order of a shuffle.

Prints a line of JSON a run, then a table. Exit status 1 if the check fails.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LOSS_TOLERANCE = {"f32": 1e-4, "bf16": 1e-2}


def rows_of(path):
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


# ---- the PEFT side: one process a run ---------------------------------------------------------------------------------


def peft_process(spec):
    import torch
    from datasets import Dataset
    from peft import PolyConfig, TaskType, get_peft_model
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments, utils

    torch.set_num_threads(spec["threads"])
    utils.logging.set_verbosity_error()
    utils.logging.disable_progress_bar()
    torch.manual_seed(spec["seed"])
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[spec["dtype"]]
    model = AutoModelForSeq2SeqLM.from_pretrained(spec["model"], dtype=dtype, dropout_rate=0.0)
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    start = time.perf_counter()
    tasks = {}
    for row in rows_of(spec["data"]):
        tasks.setdefault(row["task"], len(tasks))

    def tokenized(path):
        def encode(batch):
            out = dict(tokenizer(batch["input"], truncation=True, max_length=spec["src"]))
            out["labels"] = tokenizer(text_target=batch["target"], truncation=True, max_length=spec["tgt"])["input_ids"]
            return out | {"task_ids": [tasks[task] for task in batch["task"]]}
        data = Dataset.from_list([{key: row[key] for key in ("task", "input", "target")} for row in rows_of(path)])
        return data.map(encode, batched=True, remove_columns=data.column_names)

    train, validation = tokenized(spec["data"]), tokenized(spec["eval_data"])
    collate = DataCollatorForSeq2Seq(tokenizer, model=model)
    if spec["check"]:
        total, n_tokens = 0.0, 0
        model.eval()
        with torch.no_grad():
            for at in range(0, len(validation), 16):
                batch = collate([{k: v for k, v in row.items() if k != "task_ids"} for row in validation.select(range(at, min(at + 16, len(validation))))])
                logits = model(**batch).logits.double()
                total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100, reduction="sum"))
                n_tokens += int((batch["labels"] != -100).sum())
        return print(json.dumps({"loss": total / n_tokens}))
    model = get_peft_model(model, PolyConfig(task_type=TaskType.SEQ_2_SEQ_LM, r=spec["r"], n_tasks=len(tasks), n_skills=spec["n_skills"],
                                             n_splits=spec["n_splits"], target_modules=spec["target_modules"].split(",")))
    arguments = Seq2SeqTrainingArguments(
        output_dir=spec["out"], max_steps=spec["steps"], per_device_train_batch_size=spec["batch_size"], per_device_eval_batch_size=spec["eval_batch_size"],
        learning_rate=spec["lr"], lr_scheduler_type="linear", eval_strategy="steps", eval_steps=spec["eval_steps"], save_steps=spec["save_steps"],
        save_total_limit=1, logging_steps=10, report_to=[], remove_unused_columns=False, use_cpu=True, disable_tqdm=True, seed=spec["seed"],
        prediction_loss_only=True)
    trainer = Seq2SeqTrainer(model=model, args=arguments, train_dataset=train, eval_dataset=validation, data_collator=collate)
    trainer.train()
    model.save_pretrained(Path(spec["out"]) / "adapter")
    seconds = time.perf_counter() - start
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    print(json.dumps({"seconds": seconds, "eval_loss": losses[-1]}))


# ---- starting either side -------------------------------------------------------------------------------------------


def last_json(command):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{Path(str(command[0])).name} ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]  # Others print dictionaries of Python.


def run_peft(spec):
    return last_json([sys.executable, __file__, "--peft-process", json.dumps(spec)])[-1]


def run_polytape(binary, spec):
    start = time.perf_counter()
    lines = last_json([
        binary, "train", "--model", spec["model"], "--data", spec["data"], "--eval-data", spec["eval_data"], "--output-dir", spec["out"], "--max-steps",
        spec["steps"], "--batch-size", spec["batch_size"], "--learning-rate", spec["lr"], "--lr-scheduler-type", "linear", "--eval-steps",
        spec["eval_steps"], "--save-steps", spec["save_steps"], "--save-total-limit", 1, "--r", spec["r"], "--n-skills", spec["n_skills"],
        "--n-splits", spec["n_splits"], "--target-modules", spec["target_modules"], "--router-sampling", "on", "--max-source-length", spec["src"],
        "--max-target-length", spec["tgt"], "--dtype", spec["dtype"], "--threads", spec["threads"], "--seed", spec["seed"], "--json"])
    seconds = time.perf_counter() - start
    losses = [line["eval_loss"] for line in lines if line.get("eval_loss") is not None]
    return {"seconds": seconds, "eval_loss": losses[-1]}


def check(binary, spec):
    base = last_json([binary, "eval", "--model", spec["model"], "--data", spec["eval_data"], "--generate", "off", "--dtype", spec["dtype"],
                      "--max-source-length", spec["src"], "--max-target-length", spec["tgt"], "--threads", spec["threads"], "--json"])[-1]["loss"]
    expected = run_peft({**spec, "check": True})["loss"]
    gap = abs(base - expected) / expected
    print(json.dumps({"check": "loss of the base", "polytape": base, "transformers": expected, "relative": gap}), flush=True)
    if not gap <= LOSS_TOLERANCE[spec["dtype"]]:
        sys.exit(f"the base's loss differs by {gap:.1e}, more than {LOSS_TOLERANCE[spec['dtype']]:.0e}")


def main():
    if sys.argv[1:2] == ["--peft-process"]:
        return peft_process(json.loads(sys.argv[2]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=Path, required=True)
    for flag in ("model", "data", "eval-data"):
        parser.add_argument("--" + flag, required=True)
    for flag, default in dict(steps=200, batch_size=16, eval_batch_size=32, eval_steps=100, save_steps=100, src=512, tgt=128, r=4, n_skills=8, n_splits=4,
                              seed=0, rounds=3, threads=os.cpu_count()).items():
        parser.add_argument("--" + flag.replace("_", "-"), type=int, default=default, help=f"default {default}")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--target-modules", default="q,v")
    parser.add_argument("--dtype", choices=LOSS_TOLERANCE, default="f32")
    args = parser.parse_args()
    spec = {key: value for key, value in vars(args).items() if key not in ("bin", "rounds")} | {"check": False}
    check(args.bin.resolve(), spec)
    results = {"polytape": [], "peft": []}
    n_rows = args.steps * args.batch_size
    for number in range(args.rounds):
        for side in results:
            with tempfile.TemporaryDirectory() as out:
                own = {**spec, "out": str(Path(out) / "run")}
                result = run_polytape(args.bin.resolve(), own) if side == "polytape" else run_peft(own)
            results[side].append(result)
            print(json.dumps({"side": side, "round": number, "rows_per_s": n_rows / result["seconds"], **result}), flush=True)
    print("| side | s | training rows/s | loss on evaluation rows |\n|---|---:|---:|---:|")
    for side, runs in results.items():
        seconds = statistics.median(run["seconds"] for run in runs)
        print(f"| {side} | {seconds:.1f} | {n_rows / seconds:.1f} | {runs[-1]['eval_loss']:.3f} |")
    ratios = [peft["seconds"] / own["seconds"] for own, peft in zip(results["polytape"], results["peft"])]
    print(f"{statistics.median(ratios):.2f} times faster ({min(ratios):.2f}-{max(ratios):.2f})")


if __name__ == "__main__":
    main()
