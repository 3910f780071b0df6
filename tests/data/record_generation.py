#!/usr/bin/env python3
"""Records what transformers generates from the models of tests/data/parity, for tests/generation.rs to compare with.

    python tests/data/record_generation.py     # rewrites tests/data/generation.json

Needs torch, transformers, peft and safetensors (the versions of the last recording are in generation.json). PEFT loses an example's
task in a beam search, so each task's adapter is merged into the base's weights first, in float64; the merged model then agrees with
PEFT's evaluation of the same row, which is checked before anything is written. One row at a time, in float64, so that no two
candidates are nearer to each other than rounding.
"""

import json
from pathlib import Path

import peft
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

DATA = Path(__file__).resolve().parent
CASES = ["tiny", "v10-hub", "llama", "qwen3", "gemma3", "bart"]
OPTIONS = [
    {"max_new_tokens": 9, "num_beams": 4},
    {"max_new_tokens": 9, "num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.0},
    {"max_new_tokens": 9, "num_beams": 3, "num_return_sequences": 2, "length_penalty": 2.0, "early_stopping": True},
    {"max_new_tokens": 9, "num_beams": 2, "length_penalty": -1.5, "early_stopping": "never"},
    {"max_new_tokens": 9, "num_beams": 3, "length_penalty": 1.5, "early_stopping": "never"},
    {"max_new_tokens": 9, "num_beams": 3, "min_new_tokens": 6, "repetition_penalty": 1.7},
    {"max_new_tokens": 9, "num_beams": 3, "no_repeat_ngram_size": 2},
    {"max_new_tokens": 9, "repetition_penalty": 1.3},
    {"max_new_tokens": 9, "repetition_penalty": 0.6, "min_new_tokens": 9},
    {"max_new_tokens": 9, "no_repeat_ngram_size": 1},
    {"max_new_tokens": 9, "no_repeat_ngram_size": 3, "min_new_tokens": 4},
]


def merged(folder, task):
    """The base with a task's routed LoRA in its weights."""
    config = AutoConfig.from_pretrained(folder / "base")
    Model = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = Model.from_pretrained(folder / "base", dtype=torch.float64).eval()
    settings = json.loads((folder / "adapter/adapter_config.json").read_text())
    tensors = load_file(folder / "adapter/adapter_model.safetensors")
    n_splits, n_skills, r = settings["n_splits"], settings["n_skills"], settings["r"]
    names = sorted({name.rsplit(".poly_", 1)[0] for name in tensors})
    for name in names:
        a, b = (tensors[f"{name}.poly_lora_{x}"].double() for x in "AB")
        logits = tensors[f"{name}.poly_router.module_logits"].double()[task].view(n_splits, n_skills)
        weights = torch.sigmoid(logits)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-12)
        a = torch.einsum("qs,qsdr->qdr", weights, a).reshape(-1, r)
        b = torch.einsum("qs,qsrd->rqd", weights, b).reshape(r, -1)
        linear = model.get_submodule(name.removeprefix("base_model.model."))
        linear.weight.data += (a @ b).T / r
    return model


def check(model, row, want, folder):
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["label_ids"])
    if model.config.is_encoder_decoder:
        logits = model(input_ids=ids, labels=labels[None]).logits[0]
    else:
        logits = model(input_ids=torch.cat([ids, labels[None]], 1)).logits[0, ids.shape[1] - 1 : -1]
    nll = torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
    assert abs(nll - want) <= 1e-5 * want, (folder, nll, want)


@torch.no_grad()
def record(name):
    folder = DATA / "parity" / name
    expected = json.loads((folder / "expected.json").read_text())
    runs = [{"options": options, "outputs": [], "scores": []} for options in OPTIONS]
    for i, row in enumerate(expected["rows"]):
        model = merged(folder, row["task_id"])
        check(model, row, expected["eval"]["nll"][i], folder)
        ids = torch.tensor([row["input_ids"]])
        for run in runs:
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, **run["options"], return_dict_in_generate=True, output_scores=True)
            n_prompt = 1 if model.config.is_encoder_decoder else ids.shape[1]
            eos = model.generation_config.eos_token_id
            eos = set(eos if isinstance(eos, list) else [eos])
            sequences = []
            for sequence in out.sequences.tolist():
                new = sequence[n_prompt:]
                end = next((j + 1 for j, id in enumerate(new) if id in eos), len(new))
                sequences.append(new[:end])  # What follows the end is padding.
            run["outputs"].append(sequences)
            if run["options"].get("num_beams", 1) > 1:
                run["scores"].append(out.sequences_scores.tolist())
    return {"case": name, "runs": runs}


def main():
    versions = {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__, "peft": peft.__version__}
    recorded = {"versions": versions, "cases": [record(name) for name in CASES]}
    (DATA / "generation.json").write_text(json.dumps(recorded, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
