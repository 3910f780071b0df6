#!/usr/bin/env python3
"""Loads what `polytape export` writes in live PEFT and transformers, and compares logits with the recorded ones.

    cargo build && python tests/data/check_export.py [CASE ...]

For every case of `parity/` (see its README) and every task of its rows: the LoRA folder through PeftModel.from_pretrained on the
base, and the merged folder through from_pretrained, both in f32, against PEFT's recorded logits of the Poly adapter. Prints the
largest difference of each, and the largest logit. Merged weights are rounded to the type of their file, so `bf16`, `f16` and `llama-4`
differ by that. With torch 2.11.0 (CPU), transformers 5.17.0, peft 0.21.2.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

HERE = Path(__file__).parent
POLYTAPE = HERE.parents[1] / "target/debug/polytape"


def logits(model, row, causal):
    inputs, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["label_ids"]])
    if not causal:
        return model(input_ids=inputs, labels=labels).logits[0]
    return model(input_ids=torch.cat([inputs, labels], 1)).logits[0, inputs.shape[1] - 1:-1]


def main():
    torch.set_grad_enabled(False)
    cases = sys.argv[1:] or sorted(path.parent.name for path in HERE.glob("parity/*/adapter"))
    for case in cases:
        folder = HERE / "parity" / case
        rows = json.loads((folder / "expected.json").read_text())["rows"]
        recorded = load_file(folder / "expected.safetensors")
        causal = not json.loads((folder / "base/config.json").read_text()).get("is_encoder_decoder", False)
        Model = AutoModelForCausalLM if causal else AutoModelForSeq2SeqLM
        worst, largest = {"lora": 0.0, "merged": 0.0}, 0.0
        for task in sorted({row["task_id"] for row in rows}):
            for kind in worst:
                with tempfile.TemporaryDirectory() as parent:
                    out = Path(parent) / "out"
                    flags = ["--merged"] if kind == "merged" else []
                    subprocess.run([POLYTAPE, "export", "--model", folder / "base", "--adapter", folder / "adapter", "--task", str(task),
                                    "--output-dir", out, "-q", "--json", *flags], check=True, stdout=subprocess.DEVNULL)
                    if kind == "lora":
                        model = PeftModel.from_pretrained(Model.from_pretrained(folder / "base", dtype=torch.float32), out).eval()
                    else:
                        model = Model.from_pretrained(out, dtype=torch.float32).eval()
                    for i, row in enumerate(rows):
                        if row["task_id"] == task:
                            want = recorded[f"eval.logits.{i}"].double()
                            worst[kind] = max(worst[kind], (logits(model, row, causal).double() - want).abs().max().item())
                            largest = max(largest, want.abs().max().item())
        print(f"{case:<12} lora {worst['lora']:.2e}  merged {worst['merged']:.2e}  largest logit {largest:.2e}")


if __name__ == "__main__":
    main()
