"""Records tests/data/adafactor.json: three steps of transformers' Adafactor in f64.

    python tests/data/record_adafactor.py        (transformers 5.17, torch 2.11)
"""

import json
import pathlib

import torch
from transformers.optimization import Adafactor

torch.manual_seed(0)
SHAPES = [(2, 3, 4, 5), (3, 4), (1, 6)]


def case(scale_parameter, weight_decay, lr):
    params = [torch.nn.Parameter(torch.randn(s, dtype=torch.float64) * 0.1) for s in SHAPES]
    init = [p.detach().flatten().tolist() for p in params]
    optimizer = Adafactor(
        params, lr=lr, scale_parameter=scale_parameter, relative_step=False, warmup_init=False,
        weight_decay=weight_decay,
    )
    recorded = []
    for step in range(3):
        grads = [torch.randn(s, dtype=torch.float64) * (0.5 + step) for s in SHAPES]
        if step == 1:
            grads[1][0] = 0  # A row without a gradient.
        for param, grad in zip(params, grads):
            param.grad = grad.clone()
        recorded.append([g.flatten().tolist() for g in grads])
        optimizer.step()
    final = [p.detach().flatten().tolist() for p in params]
    return dict(scale_parameter=scale_parameter, weight_decay=weight_decay, lr=lr, shapes=SHAPES,
                init=init, grads=recorded, final=final)


cases = [case(False, 0.0, 1e-2), case(True, 0.0, 3e-3), case(False, 0.01, 1e-1)]
path = pathlib.Path(__file__).with_name("adafactor.json")
path.write_text(json.dumps(cases))
