#!/usr/bin/env python3
"""Times polytape against Hugging Face PEFT on the same weights (T5 or decoder-only), and checks first that both compute the same thing.

    pip install torch==2.11.0 transformers==5.17.0 peft==0.21.2
    cargo build --release
    python benches/peft/compare.py --bin target/release/polytape --out results

For every preset, dtype, adapter and mode:

1. `polytape init` writes a base with random weights; both sides load that folder.
2. Check (once for all modes): nll of five ragged rows, under an adapter that PEFT has initialised, from `polytape eval` and from PEFT.
3. Timing: polytape, PEFT, polytape, PEFT, ... for --rounds rounds, so that a machine that slows down slows both. Every run is
   a process of its own, so that peak memory is its own. A run's time is the median of --steps steps after two that are not counted.

The adapter `poly` samples its router in training. `lora` is PEFT's LoRA against a polytape Poly adapter with one skill, one split and
one task, which has LoRA's parameters. `none` is the frozen base; its training step is the forward and the backward to both embeddings.

With --device cuda both sides run on the GPU, and the memory compared is what each has taken of it, in use or kept for reuse.

The output folder receives runs.jsonl (a line a run), summary.jsonl (a line a combination), table.md and chart.svg. Exit status 1 if a
check or a run failed. `--sides peft` runs without a polytape binary, on a folder given by --model.
"""

import argparse
import datetime
import json
import os
import platform
import random
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

N_WARM_UP = 2
# Largest relative difference of a row's nll. bf16 rounds every activation to 8 bits, on each side in its own places.
NLL_TOLERANCE = {"f32": 1e-4, "bf16": 1e-2}
SHAPE = ["batch", "src", "tgt", "new", "r", "n_skills", "n_splits", "n_tasks", "target_modules", "steps", "threads", "device"]
CHECK_LENGTHS = [(9, 5), (1, 3), (33, 16), (70, 1), (20, 8)]  # Source and label tokens.

# ---- the PEFT side: one process a run ---------------------------------------------------------------------------------


def peft_model(spec, check=False):
    """The base from `spec["model"]` with a fresh adapter. For a check, one that changes the output (B and the logits not small)."""
    import torch
    from peft import LoraConfig, PolyConfig, TaskType, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    torch.manual_seed(0)
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[spec["dtype"]]
    if is_causal(spec["model"]):
        model, task_type = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=dtype), TaskType.CAUSAL_LM
    else:
        model = AutoModelForSeq2SeqLM.from_pretrained(spec["model"], dtype=dtype, dropout_rate=0.0)
        task_type = TaskType.SEQ_2_SEQ_LM
    common = dict(task_type=task_type, r=spec["r"], target_modules=spec["target_modules"].split(","))
    if spec["adapter"] == "none":
        return model.requires_grad_(False)
    if spec["adapter"] == "lora" and not check:
        return get_peft_model(model, LoraConfig(**common))
    model = get_peft_model(model, PolyConfig(**common, **routing(spec), init_weights=not check))
    if check:
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "module_logits" in name:
                    weight.copy_(2 * torch.randn_like(weight))
    return model


def is_causal(folder):
    """Whether a model folder is of a decoder-only family: its labels follow its input in one sequence."""
    return "CausalLM" in json.loads((Path(folder) / "config.json").read_text())["architectures"][0]


def peft_check(spec):
    """Writes the adapter for the other side, and gives the nll of every row of `spec["rows"]`, each run alone."""
    import torch

    model = peft_model(spec, check=True).to(spec["device"]).eval()
    if spec["adapter"] != "none":
        model.save_pretrained(spec["adapter_dir"])
    result = []
    with torch.no_grad():
        for row in spec["rows"]:
            ids, labels = (torch.tensor(row[key], device=spec["device"]) for key in ("input_ids", "label_ids"))
            ids = ids[None]
            routed = {} if spec["adapter"] == "none" else {"task_ids": torch.tensor([row["task_id"]], device=spec["device"])}
            if is_causal(spec["model"]):
                ids = torch.cat([ids, labels[None, :-1]], 1)
                logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **routed).logits[0, -len(labels):]
            else:
                logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels[None], **routed).logits[0]
            result.append(float(torch.nn.functional.cross_entropy(logits.double(), labels, reduction="sum")))
    return {"nll": result}


def peft_bench(spec):
    """Times one mode; the counterpart of `polytape bench`."""
    import peft
    import torch
    import transformers

    import_anon_mib = proc_status_mib("RssAnon")
    model = peft_model(spec).to(spec["device"])
    vocab = model.config.vocab_size
    random_ids = torch.Generator().manual_seed(1)
    ids = torch.randint(3, vocab, (spec["batch"], spec["src"]), generator=random_ids).to(spec["device"])
    labels = torch.randint(3, vocab, (spec["batch"], spec["tgt"]), generator=random_ids).to(spec["device"])
    prompt = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    causal = is_causal(spec["model"])
    if causal:
        labels = ids  # As `polytape bench`: trained on all of the source, and --tgt does not matter.
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    if spec["adapter"] == "poly":
        prompt["task_ids"] = torch.arange(spec["batch"], device=spec["device"]) % spec["n_tasks"]
        inputs["task_ids"] = torch.arange(spec["batch"], device=spec["device"]) % spec["n_tasks"]
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4) if trainable else None

    def train():
        out = model(**inputs, labels=labels)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(out.loss)

    def train_frozen():
        """No weight learns, so the embeddings ask for a gradient: otherwise torch would skip the backward."""
        embed = model.get_input_embeddings()
        source = embed(ids).detach().requires_grad_()
        if causal:
            out = model(attention_mask=inputs["attention_mask"], inputs_embeds=source, labels=labels)
            out.loss.backward()
            return float(out.loss)
        target = embed(model._shift_right(labels)).detach().requires_grad_()
        out = model(attention_mask=inputs["attention_mask"], inputs_embeds=source, decoder_inputs_embeds=target, labels=labels)
        out.loss.backward()
        return float(out.loss)

    @torch.no_grad()
    def evaluate():
        return float(model(**inputs, labels=labels).loss)

    @torch.no_grad()
    def generate():
        out = model.generate(**prompt, max_new_tokens=spec["new"], min_new_tokens=spec["new"], do_sample=False, num_beams=1)
        assert out.shape == (spec["batch"], spec["new"] + (spec["src"] if causal else 1))  # And the prompt, or the start token.

    step = {"train": train if trainable else train_frozen, "eval": evaluate, "generate": generate}[spec["mode"]]
    model.train(spec["mode"] == "train")
    on_gpu = spec["device"] == "cuda"
    with AnonPeak() as memory:
        for _ in range(N_WARM_UP):
            step()
    times = []
    for _ in range(spec["steps"]):
        start = time.perf_counter()
        loss = step()
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        memory.sample()
    n_tokens = spec["batch"] * (spec["new"] if spec["mode"] == "generate" else spec["src"] + (0 if causal else spec["tgt"]))
    median = statistics.median(times)
    return dict(median_s=median, min_s=min(times), tok_per_s=n_tokens / median, rss_mib=proc_status_mib("VmHWM"),
                anon_mib=memory.peak_mib, import_anon_mib=import_anon_mib,
                device_mib=torch.cuda.max_memory_reserved() >> 20 if on_gpu else None,
                isa=torch.cuda.get_device_name() if on_gpu else torch.backends.cpu.get_cpu_capability(), threads=torch.get_num_threads(), loss=loss,
                torch=torch.__version__, transformers=transformers.__version__, peft=peft.__version__)


class AnonPeak:
    """Peak of RssAnon, which the kernel does not keep. A thread samples it while warm-up steps run, since a step's peak is
    inside the step; timed steps are left alone and sampled between."""

    def __enter__(self):
        self.peak_mib, self.stop = 0.0, threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while not self.stop.wait(0.005):
            self.sample()

    def sample(self):
        self.peak_mib = max(self.peak_mib, proc_status_mib("RssAnon"))

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join()
        self.sample()


def proc_status_mib(key):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return round(int(line.split()[1]) / 1024, 1)
    raise KeyError(key)


def peft_process(spec):
    """Body of the process that `run_peft` starts: specification in as JSON, result out as the last line."""
    import torch
    import transformers

    torch.set_num_threads(spec["threads"])
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    print(json.dumps((peft_check if "rows" in spec else peft_bench)(spec)))


# ---- starting either side -------------------------------------------------------------------------------------------


class RunFailed(Exception):
    pass


def run(command, timeout):
    """The last line of a command's output as JSON."""
    try:
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired as error:
        raise RunFailed(f"more than {timeout} s") from error
    if done.returncode:
        reason = re.sub(r"(?:/[\w.+-]+)+/", "", (done.stderr.strip() or "no message").splitlines()[-1])  # Without folders.
        raise RunFailed(f"exit status {done.returncode}: {reason}")  # -9: usually out of memory.
    lines = done.stdout.strip().splitlines()
    return json.loads(lines[-1]) if lines else None


def run_peft(spec, timeout):
    return run([sys.executable, __file__, "--peft-process", json.dumps(spec)], timeout)


def routing(spec):
    """LoRA is Poly with nothing to choose from."""
    if spec["adapter"] == "lora":
        return dict(n_tasks=1, n_skills=1, n_splits=1)
    return {key: spec[key] for key in ("n_tasks", "n_skills", "n_splits")}


def run_polytape(binary, spec, timeout):
    command = [binary, "bench", spec["mode"], "--json", "--adapter", "none" if spec["adapter"] == "none" else "poly"]
    for key in ("model", "batch", "src", "tgt", "new", "r", "target_modules", "steps", "dtype", "threads", "device"):
        command += ["--" + key.replace("_", "-"), spec[key]]
    for key, value in routing(spec).items():
        command += ["--" + key.replace("_", "-"), value]
    return run(command, timeout)


def check(binary, spec, timeout):
    """Largest relative difference between the two sides' nll of a row."""
    vocab = json.loads((Path(spec["model"]) / "config.json").read_text())["vocab_size"]
    n_tasks, rng = routing(spec)["n_tasks"], random.Random(7)
    rows = [dict(task_id=i % n_tasks, input_ids=[rng.randrange(3, vocab) for _ in range(n_source)],
                 label_ids=[rng.randrange(3, vocab) for _ in range(n_label)]) for i, (n_source, n_label) in enumerate(CHECK_LENGTHS)]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        expected = run_peft({**spec, "rows": rows, "adapter_dir": str(folder / "adapter")}, timeout)["nll"]
        if binary is None:
            return None
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        command = [binary, "eval", "--model", spec["model"], "--data", folder / "rows.jsonl", "--dtype", spec["dtype"],
                   "--threads", spec["threads"], "--device", spec["device"], "--per-example", folder / "nll.jsonl", "--json"]
        if spec["adapter"] != "none":
            command += ["--adapter", folder / "adapter"]
        run(command, timeout)
        found = [json.loads(line)["nll"] for line in (folder / "nll.jsonl").read_text().splitlines()]
    if len(found) != len(expected):
        raise RunFailed(f"polytape eval gave {len(found)} rows, not {len(expected)}")
    worst = max(abs(f - e) / abs(e) for f, e in zip(found, expected))
    if not worst <= NLL_TOLERANCE[spec["dtype"]]:
        raise RunFailed(f"nll differs by {worst:.1e}, more than {NLL_TOLERANCE[spec['dtype']]:.0e}")
    return worst


# ---- results --------------------------------------------------------------------------------------------------------


def summarize(label, runs, nll_gap):
    """Medians over the rounds, and the range of the paired rounds' ratios."""
    row = {**label, "nll_gap": nll_gap}
    by_side = {side: [r for r in runs if r["side"] == side] for side in ("polytape", "peft")}
    for side, own in by_side.items():
        for key in ("median_s", "min_s", "tok_per_s", "rss_mib", "anon_mib", "device_mib") if own else ():
            if own[0].get(key) is not None:
                row[f"{side}_{key}"] = statistics.median(r[key] for r in own)
    if all(by_side.values()):
        ratios = [b["median_s"] / a["median_s"] for a, b in zip(by_side["polytape"], by_side["peft"])]
        row.update(speedup=row["peft_median_s"] / row["polytape_median_s"], speedup_min=min(ratios), speedup_max=max(ratios),
                   anon_ratio=row["peft_anon_mib"] / row["polytape_anon_mib"])
    return row


def table(rows, heading):
    lines = ["# polytape and PEFT", "", *heading, "",
             "| model | dtype | mode | adapter | polytape s | PEFT s | times faster | polytape tok/s | PEFT tok/s "
             "| polytape anon / rss / GPU MiB | PEFT anon / rss / GPU MiB | nll gap |",
             "|" + "---|" * 4 + "---:|" * 8]
    for row in rows:
        head = [row["model"], row["dtype"], row["mode"], row["adapter"]]
        if "error" in row:
            lines.append("| " + " | ".join([*head, row["error"].replace("|", "/"), *[""] * 7]) + " |")
            continue

        def cell(key, style):
            return format(row[key], style) if row.get(key) is not None else "-"

        faster = f"{row['speedup']:.2f} ({row['speedup_min']:.2f}-{row['speedup_max']:.2f})" if "speedup" in row else "-"
        lines.append("| " + " | ".join([
            *head, cell("polytape_median_s", ".4g"), cell("peft_median_s", ".4g"), faster, cell("polytape_tok_per_s", ".0f"),
            cell("peft_tok_per_s", ".0f"), *[" / ".join(cell(f"{s}_{kind}_mib", ".0f") for kind in ("anon", "rss", "device")) for s in ("polytape", "peft")],
            cell("nll_gap", ".0e")]) + " |")
    return "\n".join(lines) + "\n"


def chart(rows):
    """Tokens per second, a pair of bars a combination. Each pair has its own scale: presets differ by a hundred times."""
    rows = [row for row in rows if "speedup" in row]
    left, width, step, bar = 250, 420, 46, 15
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 190} {len(rows) * step + 50}" font-family="sans-serif" font-size="12">',
           '<rect width="100%" height="100%" fill="#fff"/>',
           f'<text x="{left}" y="20"><tspan fill="#b7410e">polytape</tspan> and <tspan fill="#4a6a8a">PEFT</tspan>, tokens per second</text>']
    for i, row in enumerate(rows):
        y, top = 36 + i * step, max(row["polytape_tok_per_s"], row["peft_tok_per_s"])
        out.append(f'<text x="{left - 8}" y="{y + bar + 4}" text-anchor="end">{row["model"]} {row["dtype"]} {row["mode"]} {row["adapter"]}</text>')
        for j, (side, colour) in enumerate((("polytape", "#b7410e"), ("peft", "#4a6a8a"))):
            rate = row[f"{side}_tok_per_s"]
            length, ratio = width * rate / top, f" ({row['speedup']:.1f} times)" if side == "polytape" else ""
            out.append(f'<rect x="{left}" y="{y + j * (bar + 2)}" width="{length:.1f}" height="{bar}" fill="{colour}"/>')
            out.append(f'<text x="{left + length + 6:.1f}" y="{y + j * (bar + 2) + 12}">{rate:,.0f}{ratio}</text>')
    return "\n".join([*out, "</svg>"]) + "\n"


def heading(args, runs):
    """What a reader needs to judge or repeat the numbers; of paths only the last part."""
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), platform.machine())
    words = [Path(w).name if os.sep in w and os.path.exists(w) else w for w in sys.argv]
    last = {r["side"]: r for r in runs}
    versions = [f"{key} {last['peft'][key]}" for key in ("torch", "transformers", "peft")] if "peft" in last else []
    imports = f", {last['peft']['import_anon_mib']:.0f} MiB of PEFT's before it loads a model" if "peft" in last else ""
    isas = [f"{side} on {r['isa']}" for side, r in last.items()]
    return [f"{cpu}, {os.cpu_count()} logical cores, {args.threads} threads; {', '.join([*versions, *isas])}; {datetime.date.today()}.",
            f"Batch {args.batch}, source {args.src}, target {args.tgt}, {args.new} new tokens; r={args.r}, S={args.n_skills}, Q={args.n_splits}, "
            f"K={args.n_tasks} on {args.target_modules}. Medians of {args.rounds} interleaved rounds of {args.steps} steps; in brackets the "
            "range over rounds. anon: peak memory that is not mapped files" + imports + ".", "", f"    {shlex.join(words)}"]


# ---- command line ---------------------------------------------------------------------------------------------------


def parse_args():
    words = lambda text: text.split(",")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=Path, help="the polytape binary")
    parser.add_argument("--out", type=Path, required=True, help="output folder; bases are kept in models/ there")
    parser.add_argument("--presets", type=words, default=["flan-t5-small", "flan-t5-base"], help="of `polytape init`, comma-separated")
    parser.add_argument("--model", type=Path, help="an existing folder instead of presets")
    parser.add_argument("--modes", type=words, default=["train", "eval", "generate"])
    parser.add_argument("--adapters", type=words, default=["poly", "none"], help="of poly,lora,none")
    parser.add_argument("--dtypes", type=words, default=["bf16"], help="of f32,bf16")
    for flag, default in dict(batch=8, src=128, tgt=16, new=32, r=8, n_skills=4, n_splits=4, n_tasks=8, steps=7, rounds=3,
                              threads=os.cpu_count(), timeout=1800).items():
        parser.add_argument("--" + flag.replace("_", "-"), type=int, default=default, help=f"default {default}")
    parser.add_argument("--target-modules", default="q,v")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--sides", choices=["both", "peft"], default="both")
    args = parser.parse_args()
    for flag, known in dict(modes=["train", "eval", "generate"], adapters=["poly", "lora", "none"], dtypes=["f32", "bf16"]).items():
        if unknown := set(getattr(args, flag)) - set(known):
            parser.error(f"--{flag}: {', '.join(sorted(unknown))} is not one of {', '.join(known)}")
    if args.sides == "both" and not args.bin:
        parser.error("--bin is needed, or --sides peft")
    if not args.bin and not args.model:
        parser.error("presets are written by polytape: give --bin, or a folder with --model")
    if args.bin:
        args.bin = args.bin.resolve()  # subprocess looks a bare name up in PATH.
    return args


def base_folder(args, preset, dtype):
    """The folder both sides load; written once and kept."""
    if args.model:
        return args.model
    folder = args.out / "models" / f"{preset}-{dtype}"
    if not (folder / "config.json").exists():
        run([args.bin, "init", "--preset", preset, "--dtype", dtype, "--seed", 0, "--output-dir", folder, "--json"], args.timeout)
    return folder


def interleaved_runs(args, spec):
    """Yields every run of one combination."""
    for round_index in range(args.rounds):
        if args.sides == "both":
            yield dict(side="polytape", round=round_index, **run_polytape(args.bin, spec, args.timeout))
        yield dict(side="peft", round=round_index, **run_peft(spec, args.timeout))


def compare_modes(args, name, spec, runs_file):
    """A summary row for every mode of one preset, dtype and adapter, and all the runs."""
    try:
        nll_gap, failure = check(args.bin if args.sides == "both" else None, spec, args.timeout), None
    except RunFailed as error:
        nll_gap, failure = None, f"check failed: {error}"
    rows, all_runs = [], []
    for mode in args.modes:
        moded, runs = {**spec, "mode": mode}, []
        label = {**moded, "model": name}
        try:
            for result in interleaved_runs(args, moded) if failure is None else ():
                runs.append({**result, **label})
                runs_file.write(json.dumps(runs[-1]) + "\n")
                runs_file.flush()
            row = {**label, "error": failure} if failure else summarize(label, runs, nll_gap)
        except RunFailed as error:
            row = {**label, "error": f"failed after {len(runs)} runs: {error}"}
        rows.append(row)
        all_runs += runs
        told = [row.get("error")] if "error" in row else [f"{s} {row[s + '_median_s']:.4g} s" for s in ("polytape", "peft") if s + "_median_s" in row]
        told += [f"{row['speedup']:.2f} times faster"] if "speedup" in row else []
        print(name, spec["dtype"], mode, spec["adapter"] + ":", ", ".join(told), file=sys.stderr)
    return rows, all_runs


def main():
    if sys.argv[1:2] == ["--peft-process"]:
        return peft_process(json.loads(sys.argv[2]))
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rows, all_runs = [], []
    with open(args.out / "runs.jsonl", "w") as runs_file:
        for preset in [args.model.name] if args.model else args.presets:
            for dtype in args.dtypes:
                folder = base_folder(args, preset, dtype)
                for adapter in args.adapters:
                    spec = {key: getattr(args, key) for key in SHAPE} | dict(model=str(folder), dtype=dtype, adapter=adapter)
                    found, runs = compare_modes(args, preset, spec, runs_file)
                    rows += found
                    all_runs += runs
    (args.out / "summary.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (args.out / "table.md").write_text(table(rows, heading(args, all_runs)))
    (args.out / "chart.svg").write_text(chart(rows))
    print(args.out / "table.md")
    sys.exit(any("error" in row for row in rows))


if __name__ == "__main__":
    main()
