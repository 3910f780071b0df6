#!/usr/bin/env python3
"""Converts pickled adapter weights to safetensors, which polytape reads.

    python scripts/convert_pickled.py adapter_model.bin            # PEFT: writes adapter_model.safetensors beside it
    python scripts/convert_pickled.py best.ckpt --output mhr.safetensors   # the authors' (mttl) Lightning checkpoints

A pickle can run code when it is read. torch.load refuses to (weights_only) unless --trust is given, which checkpoints with
settings inside (Lightning's) may need: give it for files whose origin you trust, nowhere else. Of a Lightning checkpoint the
tensors of the adapter are kept (lora_a, lora_b, module_logits); what is left out is printed. Needs torch and safetensors.
"""

import argparse
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

ADAPTER = (".lora_a", ".lora_b", ".module_logits")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--output", type=Path, help="default: the same name with .safetensors")
    parser.add_argument("--trust", action="store_true", help="run what is pickled")
    args = parser.parse_args()
    output = args.output or args.file.with_suffix(".safetensors")
    if output.exists():
        sys.exit(f"{output} exists: nothing is overwritten")
    try:
        content = torch.load(args.file, map_location="cpu", weights_only=not args.trust)
    except Exception as error:
        if args.trust:
            raise
        sys.exit(f"{args.file} is not of tensors alone ({type(error).__name__}), so reading it could run code; if you trust its origin: --trust")
    # Lightning, then a plain dictionary of tensors.
    tensors = content.get("state_dict", content)
    others = [name for name, value in tensors.items() if not isinstance(value, torch.Tensor)]
    tensors = {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)}
    if any(name.endswith(ADAPTER) for name in tensors):
        others += [name for name in tensors if not name.endswith(ADAPTER)]
        tensors = {name: value for name, value in tensors.items() if name.endswith(ADAPTER)}
    if not tensors:
        sys.exit(f"{args.file} has no tensors")
    # Copies: safetensors refuses tensors that share memory, as a shared router's do.
    save_file({name: value.detach().clone().contiguous() for name, value in tensors.items()}, output, metadata={"format": "pt"})
    print(f"{output}: {len(tensors)} tensors" + (f"; left out: {', '.join(others[:8])}{' ...' if len(others) > 8 else ''} ({len(others)})" if others else ""))


if __name__ == "__main__":
    main()
