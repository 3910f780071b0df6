"""Makes the demo's base: a tiny T5 v1.1 over bytes, pretrained on text that this script generates.

    python assets/demo/make_base.py            (torch, transformers, safetensors; one thread)

Ids: 0 pad (and the decoder's start), 1 end, 2 unknown (unused), byte b = 3 + b. 259 in all.

An adapter steers abilities that a base has; so the base learns some about short words. A row of its
corpus is a word, most of the time with an instruction in front: two symbols, the first says in which
order the letters are written, the second says what each letter becomes ("." means as it is).

    "R.baku" -> "ukab"      ".^baku" -> "BAKU"      "T^baku" -> "UBAK"      "baku" -> "baku"

The demo's tasks (src/demo/suite.rs) are an order AND a replacement from DEMO_ORDERS x DEMO_REPLACEMENTS,
WITHOUT an instruction. The base sees those orders and replacements alone, or with a partner from outside
the demo, but none of the demo's pairs, and no word without an instruction that is not just copied or restored
(one or two letters are hidden behind "_").

Deterministic for one version of torch on one machine. The committed base: 3,000 steps, about 8 minutes of one
thread of a Xeon (39 minutes by the clock beside compilers). The last lines printed say what it can: every
single instruction, the pairs that it was trained on and plain copying 0.96 to 1.00 exact on fresh words, and,
WITH an instruction, the demo's pairs, which it never saw, 0.74 to 1.00. So the abilities are there and combine;
what an adapter has to find is which of them a task wants, since a task does not say.
"""

import json
import math
import random
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import T5Config, T5ForConditionalGeneration

STEPS, BATCH, LEARNING_RATE, SEED = 3000, 128, 3e-3, 0
if len(sys.argv) > 1:
    STEPS = int(sys.argv[1])
FOLDER = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).parent / "base"

CONSONANTS, VOWELS = "bcdfghjklmnpqrstvwxyz", "aeiou"
KEYPAD = dict(zip("abcdefghijklmnopqrstuvwxyz", "22233344455566677778889999"))


def shifted(letter, by):
    return chr((ord(letter) - 97 + by) % 26 + 97)


def swap_neighbours(word):
    letters = list(word)
    for i in range(0, len(letters) - 1, 2):
        letters[i], letters[i + 1] = letters[i + 1], letters[i]
    return "".join(letters)


ORDERS = {
    "R": lambda w: w[::-1],                       # reversed
    "L": lambda w: w[1:] + w[:1],                 # the first letter last
    "S": swap_neighbours,                         # letters change places in pairs
    "T": lambda w: w[-1:] + w[:-1],               # the last letter first
    "H": lambda w: w[len(w) // 2:] + w[:len(w) // 2],  # the second half first
    "E": lambda w: w[::2] + w[1::2],              # every other letter, then the rest
    "F": lambda w: w[:len(w) // 2],               # the first half alone
}
REPLACEMENTS = {
    "^": str.upper,
    "+": lambda w: "".join(shifted(c, 1) for c in w),    # the next letter of the alphabet
    "-": lambda w: "".join(shifted(c, -1) for c in w),   # the one before
    "*": lambda w: "".join("*" if c in VOWELS else c for c in w),
    "#": lambda w: "".join(KEYPAD[c] for c in w),
    "%": lambda w: "".join(shifted(c, 13) for c in w),
    "=": lambda w: "".join(c if c in VOWELS else "-" for c in w),
}
DEMO_ORDERS, DEMO_REPLACEMENTS = "RLS", "^+-*"
PAIRS = [(o, r) for o in ORDERS for r in REPLACEMENTS if not (o in DEMO_ORDERS and r in DEMO_REPLACEMENTS)]


def word(rng):
    """5 to 8 letters, all different, consonants and vowels in turns or (one in four) anyhow."""
    n = rng.randint(5, 8)
    if rng.random() < 0.25:
        return "".join(rng.sample(CONSONANTS + VOWELS, n))
    first, second = (CONSONANTS, VOWELS) if rng.random() < 0.5 else (VOWELS, CONSONANTS)
    letters = [rng.sample(first, (n + 1) // 2), rng.sample(second, n // 2)]
    return "".join(letters[i % 2][i // 2] for i in range(n))


def row(rng):
    w, kind = word(rng), rng.random()
    if kind < 0.08:
        return w, w
    if kind < 0.16:
        letters = list(w)
        for i in rng.sample(range(len(w)), rng.randint(1, 2)):
            letters[i] = "_"
        return "".join(letters) + w[::-1], w  # Restored from its reverse.
    if kind < 0.40:
        order, replacement = rng.choice(list(ORDERS)), "."
    elif kind < 0.64:
        order, replacement = ".", rng.choice(list(REPLACEMENTS))
    else:
        order, replacement = rng.choice(PAIRS)
    return order + replacement + w, apply(order, replacement, w)


def apply(order, replacement, w):
    w = ORDERS[order](w) if order != "." else w
    return REPLACEMENTS[replacement](w) if replacement != "." else w


def ids(text):
    return [3 + b for b in text.encode()] + [1]


def padded(texts, fill):
    rows = [ids(t) for t in texts]
    n = max(map(len, rows))
    return torch.tensor([r + [fill] * (n - len(r)) for r in rows])


def batch(rows):
    inputs = padded([i for i, _ in rows], 0)
    return {"input_ids": inputs, "attention_mask": (inputs != 0).long(), "labels": padded([o for _, o in rows], -100)}


CONFIG = T5Config(
    vocab_size=259, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_decoder_layers=2, num_heads=4,
    relative_attention_num_buckets=32, relative_attention_max_distance=64, dropout_rate=0.0,
    feed_forward_proj="gated-gelu", tie_word_embeddings=True, pad_token_id=0, eos_token_id=1,
    decoder_start_token_id=0, dtype="bfloat16",
)


@torch.no_grad()
def exact_match(model, rows):
    b = batch(rows)
    out = model.generate(input_ids=b["input_ids"], attention_mask=b["attention_mask"], max_new_tokens=12)
    said = [[t for t in o.tolist() if t > 1] for o in out]
    return sum(s == ids(t)[:-1] for s, (_, t) in zip(said, rows)) / len(rows)


def main():
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    model = T5ForConditionalGeneration(CONFIG)
    for module in model.modules():  # The same function as transformers' gelu_new, in one kernel instead of seven.
        if hasattr(module, "wi_1"):
            module.act = torch.nn.GELU(approximate="tanh")
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98))
    warm = STEPS // 20
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * max(0, s - warm) / (STEPS - warm))))
    start, total = time.time(), 0.0
    for step in range(1, STEPS + 1):
        loss = model(**batch([row(rng) for _ in range(BATCH)])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        total += loss.item()
        if step % 100 == 0:
            print(f"step {step}  loss {total / 100:.4f}  {time.time() - start:.0f} s", flush=True)
            total = 0.0

    model.to(torch.bfloat16)
    FOLDER.mkdir(parents=True, exist_ok=True)
    tensors = {n: t.contiguous() for n, t in model.state_dict().items()
               if n not in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")}
    save_file(tensors, FOLDER / "model.safetensors", metadata={"format": "pt"})
    config = json.loads(CONFIG.to_json_string())
    config["architectures"] = ["T5ForConditionalGeneration"]
    (FOLDER / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    generation = {"decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    (FOLDER / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")

    model.float().eval()
    fresh = random.Random(SEED + 1)
    for order, replacement in [(o, ".") for o in ORDERS] + [(".", r) for r in REPLACEMENTS] + PAIRS[::6] + \
            [(o, r) for o in DEMO_ORDERS for r in DEMO_REPLACEMENTS]:
        words = [word(fresh) for _ in range(50)]
        score = exact_match(model, [(order + replacement + w, apply(order, replacement, w)) for w in words])
        seen = "" if (order, replacement) in PAIRS or "." in (order, replacement) else "   never seen"
        print(f"{order}{replacement}  exact match {score:.2f}{seen}")
    words = [word(fresh) for _ in range(50)]
    print(f"no instruction: copies {exact_match(model, [(w, w) for w in words]):.2f}")


if __name__ == "__main__":
    main()
