"""Whether the curvature says what an error in a matrix costs: KL predicted and measured, one matrix at a time.

    python -m bench.curvature MODEL [--every 3] [--windows 8]

Each matrix gets noise of three sizes, then the errors of GPTQ and of round to nearest at 3 bits; the model is run as
transformers runs it, and KL is over all tokens of the windows that the curvature was measured on.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from bench.measure import table
from bitwright.api import quantize_tensor
from bitwright.numerics.codec import decode
from bitwright.pipeline.calibration_pass import calibration_tokens
from bitwright.pipeline.curvature import curvature
from bitwright.pipeline.planned_recipe import Settings, prepared

NOISE = (0.02, 0.1, 0.3)  # of the weights' standard deviation
SCHEME = "int3-g64"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--every", type=int, default=3)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=256)
    a = parser.parse_args()
    plan, _ = prepared(a.model, Settings("gguf", samples=a.windows, seqlen=a.seqlen))
    ids = calibration_tokens(plan, "general", 0).seen
    found = curvature(plan, ids, lambda *_: None)
    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32).eval()
    before = model(ids).logits.log_softmax(-1)
    torch.manual_seed(0)
    rows = []
    for name in sorted(found.modules)[:: a.every]:
        module, seen = model.get_submodule(name), list[Tensor]()
        hook = module.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].flatten(0, 1)))
        model(ids)
        hook.remove()
        x, weight = seen[0], module.weight.data
        errors = [size * weight.std() * torch.randn_like(weight) for size in NOISE]
        gram = x.T @ x / len(x)
        errors += [decode(quantize_tensor(weight, SCHEME, method=m, gram=gram)) - weight for m in ("gptq", "rtn")]
        ratios = []
        for error in errors:
            lost = (found.tokens[name][:, None] * (x @ error.T).square()).mean(0)
            predicted = float((lost * found.modules[name]).sum())
            module.weight.data = weight + error
            after = model(ids).logits.log_softmax(-1)
            ratios.append(float((before.exp() * (before - after)).sum(-1).mean()) / predicted)
        module.weight.data = weight
        rows.append([name, *(f"{ratio:.2f}" for ratio in ratios)])
        print(rows[-1], flush=True)
    print(table(["matrix: measured / predicted KL", *(f"noise {s}" for s in NOISE), "gptq", "rtn"], rows))


if __name__ == "__main__":
    main()
