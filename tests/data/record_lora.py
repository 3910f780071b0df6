#!/usr/bin/env python3
"""Records plain LoRA folders as PEFT writes them, for the tests of `export` and `import`.

    python tests/data/record_lora.py

`lora/peft`: what PEFT writes for a LoRA with the rank and targets of `parity/tiny/adapter` (names, shapes and fields are
compared with an exported folder; the numbers are PEFT's initialisation). `lora/one`, `lora/two`: LoRAs of that base with other
ranks, targets and scales, random numbers in A and B. `lora/expected.json`: rows and the nll that PEFT computes with each.
With torch 2.11.0 (CPU), transformers 5.17.0, peft 0.21.2.
"""

import json
import random
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSeq2SeqLM

HERE = Path(__file__).parent
BASE = HERE / "parity/tiny/base"
FOLDERS = {
    "peft": dict(r=2, lora_alpha=1, target_modules=["q", "v"]),
    "one": dict(r=3, lora_alpha=6, target_modules=["q", "v", "wo"], rank_pattern={"decoder.*wo": 2}, alpha_pattern={"EncDecAttention.q": 5}),
    "two": dict(r=4, lora_alpha=2, use_rslora=True, target_modules=r".*\.(k|v)"),
}


def base():
    return AutoModelForSeq2SeqLM.from_pretrained(BASE, dtype=torch.float32)


def main():
    torch.manual_seed(7)
    rng = random.Random(7)
    rows = [{"input_ids": [rng.randrange(3, 101) for _ in range(rng.randint(2, 12))],
             "label_ids": [rng.randrange(3, 101) for _ in range(rng.randint(1, 6))]} for _ in range(4)]
    expected = {"rows": rows, "nll": {}}
    for name, config in FOLDERS.items():
        folder = HERE / "lora" / name
        model = get_peft_model(base(), LoraConfig(task_type="SEQ_2_SEQ_LM", **config))
        if name != "peft":
            with torch.no_grad():
                for key, weight in model.named_parameters():
                    if "lora_" in key:
                        weight.copy_(torch.randn_like(weight) * 0.2)
        # Of the fixture's adapter, whose name of the base an exported folder keeps.
        model.peft_config["default"].base_model_name_or_path = "base"
        model.save_pretrained(folder)
        (folder / "README.md").unlink()
        path = folder / "adapter_config.json"  # Sets are written in another order each time.
        config = json.loads(path.read_text())
        if isinstance(config["target_modules"], list):
            config["target_modules"].sort()
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        loaded = PeftModel.from_pretrained(base(), folder).eval()
        with torch.no_grad():
            expected["nll"][name] = [nll(loaded, row) for row in rows]
    (HERE / "lora/expected.json").write_text(json.dumps(expected) + "\n")


def nll(model, row):
    labels = torch.tensor([row["label_ids"]])
    logits = model(input_ids=torch.tensor([row["input_ids"]]), labels=labels).logits[0].double()
    return -logits.log_softmax(-1).gather(1, labels[0][:, None]).sum().item()


if __name__ == "__main__":
    main()
