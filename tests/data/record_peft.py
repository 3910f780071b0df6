#!/usr/bin/env python3
"""Records what PyTorch and PEFT compute, for tests/parity.rs to compare with.

    python tests/data/record_peft.py            # every case; rewrites tests/data/parity and the two tables beside it
    python tests/data/record_peft.py mt5 tiny   # only these cases

Needs torch, transformers and peft (the versions of the last recording are in parity/README.md and in every
expected.json). The same versions on the same machine write the same values. parity/README.md says what each file holds.

What is recorded is PEFT's own arithmetic on small random models of odd sizes, one row at a time and unpadded, so that
no padding and no mask can blur a row's reference. Three things are ours, and each is checked before anything is written:

- the golden vectors of the specification agree with a float64 PEFT layer (`check_golden`);
- the relaxed Bernoulli written out below, with its noise as an argument, equals torch's bit for bit, clamps and gradients
  included (`relaxed_bernoulli_table`, and again in every routed forward);
- float64 runs take the mean square of a norm in float64 too (transformers takes it in float32).
"""

import argparse
import contextlib
import json
import math
import os
import platform
import random
import shutil
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

if os.environ.get("PYTHONHASHSEED") != "0":  # PEFT writes sets in hash order.
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "PYTHONHASHSEED": "0"})

import peft
import safetensors
import torch
import transformers
from peft import PeftModel, PolyConfig, TaskType, get_peft_model
from peft.tuners.poly.layer import Linear as PolyLinear
from peft.tuners.poly.router import EPS, PolyRouter
from safetensors.torch import load_file, save_file
from torch.distributions.relaxed_bernoulli import RelaxedBernoulli
from transformers import (BartConfig, BartForConditionalGeneration, Gemma3ForCausalLM, Gemma3TextConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, MT5Config, MT5ForConditionalGeneration,
                          Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM, T5Config, T5ForConditionalGeneration)
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.mt5.modeling_mt5 import MT5LayerNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.t5.modeling_t5 import T5Attention, T5LayerNorm
from transformers.pytorch_utils import Conv1D

DATA = Path(__file__).resolve().parent
SIZE_LIMIT_BYTES = 4_000_000
N_STEPS = 10
STEP_ROWS = 3
MAX_NEW_TOKENS = 8
VERSIONS = {
    "torch": torch.__version__.split("+")[0],
    "transformers": transformers.__version__,
    "peft": peft.__version__,
    "safetensors": safetensors.__version__,
    "python": platform.python_version(),
}

# ---- cases ----------------------------------------------------------------------------------------------------------

FAMILIES = {
    "t5": (T5Config, T5ForConditionalGeneration),
    "mt5": (MT5Config, MT5ForConditionalGeneration),
    "bart": (BartConfig, BartForConditionalGeneration),
    "gpt2": (GPT2Config, GPT2LMHeadModel),
    "gemma3_text": (Gemma3TextConfig, Gemma3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
ENCODER_DECODERS = ("t5", "mt5", "bart")
NORMS = (T5LayerNorm, MT5LayerNorm, LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm)
V11_LINEARS = ["q", "k", "v", "o", "wi_0", "wi_1", "wo"]


@dataclass
class Case:
    """One model and one adapter. `config` goes to the family's Config, the rest says how the files are written."""

    name: str
    about: str
    config: dict
    poly: dict
    family: str = "t5"
    stored: torch.dtype = torch.float32
    style: str = "transformers-5"  # or "hub-flan-t5", "hub-t5": what older versions left on the Hub; "transformers-4"
    shard_size: str | None = None
    long_row: bool = False  # Longer than relative_attention_max_distance.
    final_tensors: bool = False
    seed: int = 0

    @property
    def causal(self):
        return self.family not in ENCODER_DECODERS


def shape(d_model, heads, d_kv, d_ff, layers, decoder_layers, vocab, **more):
    return dict(d_model=d_model, num_heads=heads, d_kv=d_kv, d_ff=d_ff, num_layers=layers,
                num_decoder_layers=decoder_layers, vocab_size=vocab, dropout_rate=0.0,
                decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, **more)


def decoder(d_model, heads, kv_heads, head_dim, d_ff, layers, vocab, **more):
    return dict(hidden_size=d_model, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim, intermediate_size=d_ff,
                num_hidden_layers=layers, vocab_size=vocab, bos_token_id=2, pad_token_id=0, eos_token_id=1, **more)


def poly(r, n_tasks, n_skills, n_splits, target_modules):
    return dict(r=r, n_tasks=n_tasks, n_skills=n_skills, n_splits=n_splits, target_modules=target_modules)


GATED = dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)
RELU = dict(feed_forward_proj="relu")
CASES = [
    Case("tiny", "v1.0, the smallest; its adapter after ten steps is recorded too",
         shape(24, 2, 8, 36, 1, 1, 101, **RELU), poly(2, 3, 2, 2, ["q", "v"]), final_tensors=True, seed=63),
    Case("v11-untied", "v1.1 with a head of its own, as flan-t5 on the Hub; a source longer than the maximum distance",
         shape(40, 3, 12, 52, 2, 1, 130, **GATED), poly(4, 3, 3, 2, ["q", "v"]), style="hub-flan-t5", long_row=True, seed=50),
    Case("v11-tied", "v1.1 as transformers 5 writes it: tied, not scaled; every linear by name",
         shape(32, 5, 8, 36, 1, 1, 101, **GATED), poly(7, 6, 2, 1, V11_LINEARS), seed=51),
    Case("v10-hub", "v1.0 tied and scaled, as t5-small on the Hub, with the tensor loaders ignore; a regular expression",
         shape(48, 3, 16, 36, 1, 1, 130, relative_attention_num_buckets=8, relative_attention_max_distance=16, **RELU),
         poly(1, 1, 5, 4, r"(encoder|decoder)\.block\.\d+\.layer\.\d\.(SelfAttention\.(q|o)|EncDecAttention\.v|DenseReluDense\.w[io])"),
         style="hub-t5", seed=51),
    Case("sharded", "v1.1 in several files; all-linear, which PEFT saves as seven suffixes; one skill",
         shape(24, 3, 8, 52, 2, 1, 101, **GATED), poly(2, 3, 1, 2, "all-linear"), shard_size="40KB", seed=51),
    Case("mt5", "mT5: tied, never scaled, whatever its config says; PEFT's default targets",
         shape(40, 2, 12, 36, 1, 2, 107, feed_forward_proj="gated-gelu"), poly(2, 6, 3, 4, None), family="mt5", seed=51),
    Case("bf16", "v1.1 stored in bf16; a regular expression",
         shape(48, 2, 16, 52, 1, 1, 101, relative_attention_num_buckets=32, relative_attention_max_distance=16, **GATED),
         poly(4, 3, 5, 4, r".*\.(q|v|wi_1)"), stored=torch.bfloat16, seed=51),
    Case("f16", "v1.0 stored in f16; all-linear on so few linears that PEFT saves their full paths",
         shape(40, 5, 8, 48, 1, 1, 103, **RELU), poly(1, 6, 2, 4, "all-linear"), stored=torch.float16, seed=51),
    Case("llama", "Llama 3: llama3 scaling, a head of its own, heads that do not add up to d_model; PEFT's default targets",
         decoder(36, 3, 1, 16, 52, 2, 101, max_position_embeddings=64, tie_word_embeddings=False, rope_parameters=dict(
             rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)),
         poly(4, 3, 3, 2, None), family="llama", seed=51),
    Case("llama-4", "Llama as transformers 4 wrote it: linear scaling, biases everywhere, tied; all-linear; stored in bf16",
         decoder(24, 4, 2, 6, 36, 1, 103, max_position_embeddings=64, tie_word_embeddings=True, attention_bias=True, mlp_bias=True,
                 rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=2.5)),
         poly(2, 6, 2, 2, "all-linear"), family="llama", style="transformers-4", stored=torch.bfloat16, seed=51),
    Case("mistral", "a window of 5 in every layer, as transformers 4 wrote it",
         decoder(40, 6, 2, 8, 36, 2, 101, max_position_embeddings=64, sliding_window=5, tie_word_embeddings=False),
         poly(2, 3, 2, 4, ["q_proj", "k_proj", "v_proj", "o_proj"]), family="mistral", style="transformers-4", seed=51),
    Case("qwen2", "biases on q, k and v; a window in the second layer alone",
         {**decoder(32, 4, 4, 8, 44, 2, 107, max_position_embeddings=64, tie_word_embeddings=True, use_sliding_window=True,
                    sliding_window=4, max_window_layers=1), "head_dim": None},
         poly(1, 3, 5, 4, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]), family="qwen2", seed=51),
    Case("qwen3", "norms of the heads of q and k, tied; a regular expression",
         decoder(40, 4, 2, 12, 36, 2, 101, max_position_embeddings=64, tie_word_embeddings=True),
         poly(7, 1, 3, 2, r".*\.layers\.\d+\.(self_attn\.[qk]_proj|mlp\.down_proj)"), family="qwen3", seed=51),
    Case("gemma3", "Gemma 3's language model: norms on both sides, a scaled embedding, a window and other angles in two layers of three",
         decoder(36, 4, 2, 10, 52, 3, 103, max_position_embeddings=64, tie_word_embeddings=True, query_pre_attn_scalar=12, sliding_window=5,
                 layer_types=["sliding_attention", "full_attention", "sliding_attention"],
                 rope_parameters=dict(full_attention=dict(rope_type="linear", factor=2.0, rope_theta=5000.0),
                                      sliding_attention=dict(rope_type="default", rope_theta=300.0))),
         poly(2, 3, 3, 2, ["q_proj", "v_proj", "o_proj", "down_proj"]), family="gemma3_text", seed=51),
    Case("bart", "learned positions, norms after the sums, other heads and widths on either side",
         dict(d_model=24, vocab_size=101, max_position_embeddings=32, encoder_layers=1, encoder_attention_heads=3, encoder_ffn_dim=36,
              decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=44, dropout=0.0, pad_token_id=0, bos_token_id=2, eos_token_id=1,
              decoder_start_token_id=0, forced_eos_token_id=None),
         poly(2, 3, 2, 2, ["q_proj", "v_proj", "out_proj", "fc1", "fc2"]), family="bart", seed=51),
    # PEFT's Poly refuses Conv1D, so `base_of` makes linears of them; names and files are GPT-2's.
    Case("gpt2", "GPT-2, tied, scores of a layer divided by its number; the feed-forward layer is not four times as wide",
         dict(n_embd=24, n_head=3, n_inner=44, n_layer=2, vocab_size=101, n_positions=40, scale_attn_by_inverse_layer_idx=True,
              resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, pad_token_id=0, bos_token_id=2, eos_token_id=1),
         poly(2, 3, 3, 2, ["c_attn", "c_proj", "c_fc"]), family="gpt2", seed=51),
]


# ---- building a case's files ----------------------------------------------------------------------------------------


def build_base(case, folder):
    """Random weights of ordinary sizes, written as `case.style` says."""
    Config, Model = FAMILIES[case.family]
    model = Model(Config(**{k: v for k, v in case.config.items() if v is not None or k.startswith("forced")}))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.copy_(0.3 * torch.randn_like(weight))
            elif weight.dim() == 1:
                weight.copy_(1 + 0.1 * torch.randn_like(weight))
            else:
                # Small embeddings under large block outputs, or a tied head repeats its own input for ever.
                spread = (0.3 if "shared" in name or "embed_tokens" in name or "wte" in name else 3 / math.sqrt(weight.shape[0]) if ".c_" in name else 0.5 if "relative" in name else
                          (2 if name.endswith(("o.weight", "o_proj.weight", "down_proj.weight")) else 1) / math.sqrt(weight.shape[-1]))
                weight.copy_(torch.randn_like(weight) * spread)
        model.get_output_embeddings().weight[1] *= 2  # So that some rows generate the end token.
    model.to(case.stored)
    model.save_pretrained(folder, **({"max_shard_size": case.shard_size} if case.shard_size else {}))
    if case.style.startswith("hub"):
        rewrite_as_hub(case, folder)
    if case.style == "transformers-4":
        rewrite_as_4(folder)
    return Model


def base_of(Model, folder, dtype):
    """A base, with linears for Conv1Ds."""
    model = Model.from_pretrained(folder, dtype=dtype)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Conv1D):
                linear = torch.nn.Linear(child.nx, child.nf, dtype=dtype)
                linear.weight.data, linear.bias.data = child.weight.data.T.contiguous(), child.bias.data
                setattr(module, name, linear)
    return model


def rewrite_as_4(folder):
    """The config with transformers 4's names of the rotary settings and of the dtype."""
    config = json.loads((folder / "config.json").read_text())
    config.update(torch_dtype=config.pop("dtype"), transformers_version="4.48.0")
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    rope_type = rope.pop("rope_type")
    config["rope_scaling"] = None if rope_type == "default" else {"type": rope_type, **rope}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def rewrite_as_hub(case, folder):
    """The config and file metadata of the folders that older versions left on the Hub: no key that transformers 5
    derives, and the names of the aliased embeddings in the metadata."""
    config = json.loads((folder / "config.json").read_text())
    for key in ("dense_act_fn", "is_gated_act", "scale_decoder_outputs", "tie_word_embeddings", "dtype", "classifier_dropout", "is_decoder"):
        config.pop(key, None)
    config.update(n_positions=512, output_past=True)
    tensors = load_file(folder / "model.safetensors")
    aliases = {f"{side}.embed_tokens.weight": "shared.weight" for side in ("encoder", "decoder")}
    if case.style == "hub-flan-t5":
        config.update(tie_word_embeddings=False, transformers_version="4.23.1")
        tensors["lm_head.weight"] = torch.randn(config["vocab_size"], config["d_model"]) / math.sqrt(config["d_model"])
        tensors["lm_head.weight"][1] *= 2
    else:
        config.update(architectures=["T5WithLMHeadModel"])
        config.pop("transformers_version", None)
        config.pop("feed_forward_proj")  # Older than the choice; relu is the default.
        aliases["lm_head.weight"] = "shared.weight"
        # Early versions gave cross-attention a bias table that was never used.
        tensors["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = torch.randn(
            config["relative_attention_num_buckets"], config["num_heads"])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt", **aliases})
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def build_adapter(case, Model, base, folder):
    """PEFT's own initialisation with B not zero, and router logits wide enough to matter (PEFT's are within 1e-3)."""
    task_type = TaskType.CAUSAL_LM if case.causal else TaskType.SEQ_2_SEQ_LM
    config = PolyConfig(task_type=task_type, init_weights=False, **case.poly)
    model = get_peft_model(base_of(Model, base, torch.float32), config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "module_logits" in name:
                weight.copy_(torch.randn_like(weight) * 2)
    model.peft_config["default"].base_model_name_or_path = "base"  # Not this machine's path.
    model.save_pretrained(folder)
    (folder / "README.md").unlink()


def make_rows(case, rng):
    """Five rows of ragged lengths, one with a single source token; some labels end with the end token."""
    vocab, n_tasks = case.config["vocab_size"], case.poly["n_tasks"]
    lengths = [(rng.randint(6, 9), 6), (1, rng.randint(2, 4)), (rng.randint(12, 23), 1), (rng.randint(2, 5), rng.randint(7, 9)),
               (150 if case.long_row else rng.randint(10, 17), rng.randint(3, 5))]
    rows = []
    for n_source, n_target in lengths:
        labels = [rng.randrange(3, vocab) for _ in range(n_target)]
        if n_target > 1 and rng.random() < 0.5:
            labels[-1] = 1
        rows.append(dict(input_ids=[rng.randrange(3, vocab) for _ in range(n_source)], label_ids=labels, task_id=rng.randrange(n_tasks)))
    return rows


# ---- running PEFT ---------------------------------------------------------------------------------------------------


def load(Model, folder, dtype):
    """Base and adapter from the files just written; PEFT keeps the adapter in f32 over a 16-bit base."""
    model = PeftModel.from_pretrained(base_of(Model, folder / "base", dtype), folder / "adapter", is_trainable=True)
    assert all(p.dtype == (torch.float32 if "poly_" in n else dtype) for n, p in model.named_parameters())
    return model


def task_ids(model, row):
    """For PEFT's models; a bare base knows no tasks."""
    return dict(task_ids=torch.tensor([row["task_id"]])) if isinstance(model, PeftModel) else {}


def forward(model, row):
    """One unpadded row; the output with logits [label tokens, vocabulary]."""
    if not model.config.is_encoder_decoder:
        n = len(row["input_ids"])
        ids = torch.tensor([row["input_ids"] + row["label_ids"]])
        out = model(input_ids=ids, attention_mask=torch.ones_like(ids), **task_ids(model, row))
        out.logits = out.logits[:, n - 1:-1]
        return out
    ids = torch.tensor([row["input_ids"]])
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=torch.tensor([row["label_ids"]]), **task_ids(model, row))


def nll(out, row):
    """Summed over the label tokens, in the logits' dtype."""
    return torch.nn.functional.cross_entropy(out.logits[0], torch.tensor(row["label_ids"]), reduction="sum")


def evaluate(model, rows):
    """Outputs of every row, and nll in f64 from the logits, so that only the model's own rounding is in it."""
    model.eval()
    with torch.no_grad():
        outs = [forward(model, row) for row in rows]
    for out in outs:
        out.logits = out.logits.double()
    return outs, [float(nll(out, row)) for out, row in zip(outs, rows)]


def greedy(model, row):
    """New tokens without the start token, and by how much the best token won at the closest step. Without the cache:
    transformers 5.17 sizes it by the encoder's layers and fails on a deeper decoder."""
    ids = torch.tensor([row["input_ids"]])
    first = 1 if model.config.is_encoder_decoder else ids.shape[1]
    with torch.no_grad():
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **task_ids(model, row), do_sample=False, num_beams=1, use_cache=False,
                             max_new_tokens=MAX_NEW_TOKENS, output_logits=True, return_dict_in_generate=True)
    top = torch.cat(out.logits).topk(2).values
    return out.sequences[0, first:].tolist(), float((top[:, 0] - top[:, 1]).min())


@contextlib.contextmanager
def exact_norms():
    """RMS norms take the mean square in float32 even of float64 values; here they do not."""
    def exact(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))
    def exact_gemma(self, x):
        return (1 + self.weight) * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(Gemma3RMSNorm, "forward", exact_gemma))
        for norm in NORMS:
            stack.enter_context(mock.patch.object(norm, "forward", exact))
        yield


def relaxed_bernoulli(z, u):
    """A relaxed Bernoulli sample at temperature 1 from logits z and noise u in [0, 1). The clamps are f32's in f64 too, so
    that the f64 run is the truth of the same function (torch would clamp by z's dtype)."""
    eps, tiny = torch.finfo(torch.float32).eps, torch.finfo(torch.float32).tiny
    p, u = torch.sigmoid(z).clamp(eps, 1 - eps), u.clamp(eps, 1 - eps)
    logit = u.log() - (-u).log1p() + p.log() - (-p).log1p()
    return torch.sigmoid(logit).clamp(tiny, 1 - eps)


def torch_relaxed_bernoulli(z, u):
    """The same from torch's distribution, with its uniform draw replaced by u."""
    with mock.patch("torch.rand", lambda *_, **__: u):
        return RelaxedBernoulli(temperature=1.0, logits=z).rsample()


@contextlib.contextmanager
def recorded_noise(model, noise, row_index):
    """Training-mode routing with u = noise[module path][row]. `row_index` is a one-element list that says which row runs."""
    paths = {router: path.removeprefix("base_model.model.").split(".poly_router")[0]
             for path, router in model.named_modules() if isinstance(router, PolyRouter)}

    def forward(self, task_ids, input_ids):
        z = self.module_logits[task_ids].view(-1, self.n_splits, self.n_skills)
        u = noise[paths[self]][row_index[0]][None].to(z.dtype)
        sample = relaxed_bernoulli(z, u)
        assert z.dtype == torch.float64 or torch.equal(sample, torch_relaxed_bernoulli(z, u)), "not torch's relaxed Bernoulli"
        return sample / (sample.sum(-1, keepdim=True) + EPS)

    with mock.patch.object(PolyRouter, "forward", forward):
        yield


def named_adapter(model):
    """(name as on disk without `base_model.model.`, parameter) of everything that learns, sorted."""
    found = [(n.removeprefix("base_model.model.").replace(".default", ""), p) for n, p in model.named_parameters() if "poly_" in n]
    return sorted(found)


def sampled_gradients(model, rows, noise):
    """Loss of the whole batch under the recorded noise, and the gradient of every adapter tensor."""
    model.train()
    row_index, total = [0], 0.0
    with recorded_noise(model, noise, row_index):
        for row_index[0], row in enumerate(rows):
            total = total + nll(forward(model, row), row)
    loss = total / sum(len(row["label_ids"]) for row in rows)
    loss.backward()
    grads = {name: p.grad.clone() for name, p in named_adapter(model)}
    model.zero_grad(set_to_none=True)
    return float(loss), grads


def train(model, rows):
    """Ten AdamW steps without sampling: the loss before each, and the adapter after the last."""
    model.train()
    for module in model.modules():
        if isinstance(module, PolyRouter):
            module.eval()  # A plain sigmoid; the flag is the router's own.
    params = named_adapter(model)
    optimizer = torch.optim.AdamW([
        dict(params=[p for n, p in params if "module_logits" not in n], lr=1e-2, weight_decay=0.01),
        dict(params=[p for n, p in params if "module_logits" in n], lr=1e-1, weight_decay=0.0),
    ], betas=(0.9, 0.999), eps=1e-8, foreach=False)
    losses = []
    for step in range(N_STEPS):
        batch = [rows[(step * STEP_ROWS + i) % len(rows)] for i in range(STEP_ROWS)]
        loss = sum(nll(forward(model, row), row) for row in batch) / sum(len(row["label_ids"]) for row in batch)
        losses.append(float(loss))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return losses, {name: p.detach().clone() for name, p in params}


# ---- recording ------------------------------------------------------------------------------------------------------


def record(case):
    torch.manual_seed(case.seed)
    rng = random.Random(case.seed)
    folder = DATA / "parity" / case.name
    shutil.rmtree(folder, ignore_errors=True)
    Model = build_base(case, folder / "base")
    build_adapter(case, Model, folder / "base", folder / "adapter")
    rows = make_rows(case, rng)
    tensors = {}

    model = load(Model, folder, torch.float32)
    check_head(case, model)
    adapted = sorted(n.removeprefix("base_model.model.") for n, m in model.named_modules() if isinstance(m, PolyLinear))
    outs, row_nll = evaluate(model, rows)
    if not case.causal:
        tensors["eval.encoder.0"] = outs[0].encoder_last_hidden_state[0]
    for i, out in enumerate(outs):
        tensors[f"eval.logits.{i}"] = out.logits[0].float()
    generated, margins = zip(*(greedy(model, row) for row in rows))
    assert min(margins) > 1e-3, f"{case.name}: a greedy step is nearly a tie ({min(margins):.1e}); take another seed"

    noise = {path: torch.rand(len(rows), case.poly["n_splits"], case.poly["n_skills"]) for path in adapted}
    if case.poly["n_skills"] > 1:
        noise[adapted[0]].view(-1)[0] = 0.0  # torch.rand can give it, and only the clamp saves the logarithm.
    loss, grads = sampled_gradients(model, rows, noise)
    tensors |= {f"noise.{path}": u for path, u in noise.items()}
    tensors |= {f"grad.{name}": g for name, g in grads.items()}
    losses, final = train(model, rows)
    if case.final_tensors:
        tensors |= {f"final.{name}": t for name, t in final.items()}

    base = base_of(Model, folder / "base", torch.float32)
    _, base_nll = evaluate(base, rows)
    base_generated, base_margins = zip(*(greedy(base, row) for row in rows))
    assert min(base_margins) > 1e-3, f"{case.name}: a greedy step of the base is nearly a tie; take another seed"

    # The same in f64: how much of a difference from the above is rounding alone.
    with exact_norms():
        model = load(Model, folder, torch.float32).double()
        _, nll_f64 = evaluate(model, rows)
        loss_f64, grads_f64 = sampled_gradients(model, rows, noise)
        losses_f64, final_f64 = train(model, rows)
    # A single skill's weight is 1 whatever its logit: those gradients are rounding noise, which Adam then scales up to its rate.
    live = [n for n in grads if case.poly["n_skills"] > 1 or "module_logits" not in n]
    grad_gap = max(float((grads[n] - grads_f64[n]).abs().max() / grads_f64[n].abs().max()) for n in live)
    final_gap = max(float((final[n] - final_f64[n]).abs().max()) for n in live)
    assert not case.final_tensors or final_gap < 1e-4, f"{case.name}: Adam amplifies rounding to {final_gap:.1e}; take another seed"

    # bf16 as PEFT runs it (base bf16, adapter f32), and the truth for it: f64 over the same rounded weights.
    model = load(Model, folder, torch.bfloat16)
    outs_bf16, nll_bf16 = evaluate(model, rows)
    with exact_norms():
        outs_truth, nll_truth = evaluate(model.double(), rows)
    errors = []
    for i, (out, truth) in enumerate(zip(outs_bf16, outs_truth)):
        tensors[f"bf16.logits.{i}"] = out.logits[0].float()
        tensors[f"truth.logits.{i}"] = truth.logits[0]
        errors.append((out.logits - truth.logits).flatten())
    errors = torch.cat(errors)

    expected = {
        "about": case.about, "versions": VERSIONS, "seed": case.seed,
        "attention": model.base_model.model.config._attn_implementation,
        "stored": str(case.stored).removeprefix("torch."), "poly": case.poly, "adapted": adapted, "rows": rows,
        "eval": {"nll": row_nll, "nll_f64": nll_f64, "greedy": list(generated), "greedy_min_margin": min(margins)},
        "base": {"nll": base_nll, "greedy": list(base_generated), "greedy_min_margin": min(base_margins)},
        "noise": {"loss": loss, "loss_f64": loss_f64, "grad_gap": grad_gap},
        "train": {"losses": losses, "losses_f64": losses_f64, "final_gap": final_gap, "step_rows": STEP_ROWS, "learning_rate": 1e-2,
                  "router_learning_rate": 1e-1, "weight_decay": 0.01, "router_weight_decay": 0.0, "betas": [0.9, 0.999], "eps": 1e-8},
        "bf16": {"nll": nll_bf16, "nll_truth": nll_truth, "logits_rms_error": float(errors.pow(2).mean().sqrt()),
                 "logits_max_error": float(errors.abs().max())},
    }
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "expected.safetensors", metadata={"format": "pt"})
    write_json(folder / "expected.json", expected)
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    print(f"{case.name:11} {size / 1024:5.0f} KiB  {len(adapted):2} linears  f32-f64: nll {gap(row_nll, nll_f64):.1e} grad {grad_gap:.1e} "
          f"losses {gap(losses, losses_f64):.1e} final {final_gap:.1e}  bf16 rms {expected['bf16']['logits_rms_error']:.1e}  "
          f"margin {min(margins):.1e}  losses {losses[0]:.3f} -> {losses[-1]:.3f}")


def check_head(case, model):
    """That the files say what the case is about: whose head, and whether its input is scaled."""
    inner = model.base_model.model
    if case.causal:
        tied = inner.lm_head.weight.data_ptr() == inner.get_input_embeddings().weight.data_ptr()
        assert tied == case.config.get("tie_word_embeddings", True), f"{case.name}: tied {tied}"
        return
    if case.family == "bart":
        assert inner.lm_head.weight.data_ptr() == inner.model.shared.weight.data_ptr()
        return
    tied = inner.lm_head.weight.data_ptr() == inner.shared.weight.data_ptr()
    assert tied == (case.style != "hub-flan-t5"), f"{case.name}: tied {tied}"
    scaled = getattr(inner.config, "scale_decoder_outputs", False)  # mT5 has no such key and never scales.
    assert scaled == (case.config["feed_forward_proj"] == "relu"), f"{case.name}: scaled {scaled}"


def gap(a, b):
    return max(abs(x - y) / abs(y) for x, y in zip(a, b))


def write_json(path, value):
    path.write_text(json.dumps(value, separators=(",", ":")) + "\n")


# ---- tables beside the cases ----------------------------------------------------------------------------------------


def golden_layer():
    """Section 5.1 of the specification as a float64 PEFT layer; its input and task ids."""
    linear = torch.nn.Linear(4, 4, bias=False).double()
    layer = PolyLinear(linear, "default", PolyConfig(r=1, n_tasks=2, n_skills=2, n_splits=2)).double()
    with torch.no_grad():
        linear.weight.copy_(torch.arange(1, 17).view(4, 4) / 16)
        layer.poly_lora_A["default"].copy_((torch.arange(8).view(2, 2, 2, 1) + 1) / 8)
        layer.poly_lora_B["default"].copy_((torch.arange(8).view(2, 2, 1, 2) + 1 - 4.5) / 4)
        layer.poly_router["default"].module_logits.copy_(torch.tensor([[0, 1, -1, 2], [0.5, -0.5, 1.5, -2]]))
    x = torch.tensor([[[1, -1, 2, 0.5], [0, 1, 0, -1]], [[-0.5, 1, 1, 1], [2, 0, -1, 0]]], dtype=torch.float64, requires_grad=True)
    return layer, x, torch.tensor([1, 0])


GOLDEN_U = [[[0.25, 0.5], [0.75, 0.1]], [[0.9, 0.6], [0.3, 0.8]]]
GOLDEN = {  # As printed in the specification.
    "eval": {
        "w": [0.6224593312, 0.3775406688, 0.8727521370, 0.1272478630, 0.4061545150, 0.5938454850, 0.2339152960, 0.7660847040],
        "y": [-0.6464202849, 0.3734621936, 1.9854371424, 3.0053196210, 0.1751752457, 0.0658185461, -0.2075091625, -0.3168658621,
              -0.6363348584, 0.4936084010, 2.8073802446, 3.9373235040, 0.0933487231, 0.2759491147, 0.3005325777, 0.4831329693],
        "d_z": [-0.0687879324, 0.0369998486, -1.1686371586, 0.1905523964, 0.0310570661, -0.0512044455, -0.1088202263, 0.5254118798],
        "d_a": [0.5949240948, 0.4432229425, -0.1811118104, 1.8731799568, 4.4369144707, 2.2265180568, 3.7522645636, 3.7040573690],
        "d_b": [-1.2154852257, 0.7239750029, -1.1925999580, 0.7597103984, 4.1236310891, 6.0936594229, 4.6924441504, 6.6141864023],
        "d_x": [4.0678673335, 4.6094026949, 5.5208030184, 6.0623383798, -0.4144102795, -0.4730026811, -0.5928927543, -0.6514851559,
                6.1552344751, 7.1449624372, 9.4876991781, 10.4774271403, 0.7560537680, 0.8749168705, 1.1035083416, 1.2223714441],
    },
    "train": {
        "w": [0.4843762875, 0.5156237125, 0.9843330236, 0.0156669764, 0.5284637360, 0.4715362640, 0.1234208655, 0.8765791345],
        "y": [-0.4943256357, 0.5081223294, 1.8880509193, 2.8904988843, 0.1064522294, 0.0126995254, -0.1748139948, -0.2685666988,
              -0.7853960784, 0.3545368217, 2.9414753218, 4.0814082218, 0.1665857765, 0.3269916136, 0.2356301710, 0.3960360081],
        "d_z": [-0.0061275402, 0.0120682097, -0.9097123490, 0.0344656449, 0.0098361493, -0.0094874248, -0.0049771162, 0.0708296939],
        "d_a": [-0.4625547188, 2.0121474647, -0.2895998708, 1.6558815614, 3.5373617461, 1.5788162372, 4.5336862107, 4.6958534646],
        "d_b": [-1.2672886586, 0.6932691599, -1.1963664740, 0.6821918732, 3.6077758399, 5.4148510980, 5.2825505285, 7.3145914360],
        "d_x": [3.9131894844, 4.3971975889, 5.0657081048, 5.5497162092, -0.3557889915, -0.4006035062, -0.4699703511, -0.5147848657,
                6.3295087350, 7.4090505355, 10.3644377657, 11.4439795662, 0.6206090569, 0.7185689646, 0.8941776803, 0.9921375880],
    },
}


def check_golden():
    """Stops unless PEFT agrees with the printed golden vectors."""
    for mode, printed in GOLDEN.items():
        layer, x, task_ids = golden_layer()
        layer.train(mode == "train")
        router, u = layer.poly_router["default"], torch.tensor(GOLDEN_U, dtype=torch.float64)
        with mock.patch("torch.rand", lambda *_, **__: u):  # Read by the relaxed Bernoulli alone.
            w = router(task_ids=task_ids, input_ids=x)
            y = layer(x, task_ids=task_ids)
        (y.pow(2).sum() / 2).backward()
        found = dict(w=w, y=y, d_z=router.module_logits.grad, d_a=layer.poly_lora_A["default"].grad,
                     d_b=layer.poly_lora_B["default"].grad, d_x=x.grad)
        for name, values in printed.items():
            error = (found[name].flatten() - torch.tensor(values, dtype=torch.float64)).abs().max()
            if error > 1e-9:
                sys.exit(f"golden vector {mode} {name}: PEFT differs by {error:.1e}")
    print("golden vectors: PEFT agrees in float64")


def relaxed_bernoulli_table():
    """Samples and their derivatives over a grid that reaches every clamp, in f32."""
    logits = [-200.0, -120.0, -88.0, -28.0, -17.0, -16.0, -15.9, -15.0, -8.0, -2.0, -0.5, 0.0, 0.5, 2.0, 8.0, 15.0, 15.9, 16.0, 17.0, 28.0, 88.0, 120.0]
    noise = [0.0, 2.0**-24, 2.0**-23, 1e-4, 0.1, 0.25, 0.5, 0.75, 0.9, 0.9999, 1 - 2.0**-23, 1 - 2.0**-24]
    u = torch.tensor(noise).repeat(len(logits), 1)
    runs = []
    for sample in (relaxed_bernoulli, torch_relaxed_bernoulli):
        z = torch.tensor(logits)[:, None].repeat(1, len(noise)).requires_grad_()
        s = sample(z, u)
        s.sum().backward()
        runs.append((s.detach(), z.grad))
    # torch keeps 'logits' and takes its probabilities from them, so values and gradients are the same expressions.
    assert all(torch.equal(a, b) for a, b in zip(*runs)), "not torch's relaxed Bernoulli at the clamps"
    s, d_z = runs[0]
    write_json(DATA / "parity" / "relaxed_bernoulli.json",
               {"versions": VERSIONS, "logits": logits, "noise": u[0].tolist(), "sample": s.tolist(), "d_logits": d_z.tolist()})


def bucket_table():
    """T5's buckets for relative positions -600..=600 as [bucket, count] runs."""
    first, last, cases = -600, 600, []
    positions = torch.arange(first, last + 1)
    for num_buckets, max_distance in ((32, 128), (8, 16), (32, 16), (8, 128)):
        for bidirectional in (True, False):
            runs = []
            for bucket in T5Attention._relative_position_bucket(positions, bidirectional, num_buckets, max_distance).tolist():
                if runs and runs[-1][0] == bucket:
                    runs[-1][1] += 1
                else:
                    runs.append([bucket, 1])
            cases.append(dict(bidirectional=bidirectional, num_buckets=num_buckets, max_distance=max_distance, runs=runs))
    write_json(DATA / "bucket_reference.json", {"versions": VERSIONS, "first": first, "last": last, "cases": cases})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [c.name for c in CASES]
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"default: all of {' '.join(names)}")
    wanted = parser.parse_args().cases
    if unknown := set(wanted) - set(names):
        parser.error(f"no such case: {' '.join(sorted(unknown))}")
    torch.set_num_threads(1)  # One order of summation, whatever the machine.
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    print(" ".join(f"{k} {v}" for k, v in VERSIONS.items()))
    check_golden()
    (DATA / "parity").mkdir(exist_ok=True)
    relaxed_bernoulli_table()
    bucket_table()
    for case in CASES:
        if not wanted or case.name in wanted:
            record(case)
    size = sum(f.stat().st_size for f in (DATA / "parity").rglob("*") if f.is_file())
    print(f"total {size / 1e6:.2f} MB")
    if size > SIZE_LIMIT_BYTES:
        sys.exit(f"more than {SIZE_LIMIT_BYTES} bytes")


if __name__ == "__main__":
    main()
