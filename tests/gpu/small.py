"""Every op once with every implementation that a device has, at small sizes: `python small.py cuda`.

What compute-sanitizer runs; it slows kernels by one or two orders of magnitude.
"""

import sys

import torch

from cgpt_ext import dispatch
from problems import ONE_EACH, OP, chosen


def main(device: str) -> None:
    torch.manual_seed(0)
    for build, size in ONE_EACH:
        op = OP.get(build, build.__name__)
        if device not in dispatch.devices(op):
            continue
        for name in dispatch.implementations(op, device):
            if name == "triton":  # compiled by another compiler from text without our pointers
                continue
            with chosen(op, device, name):
                try:
                    build(device, torch.bfloat16, *size).run()
                except (TypeError, ValueError) as error:
                    print(f"{build.__name__} {name}: refused: {error}")
                    continue
            print(f"{build.__name__} {name}: ran")
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(sys.argv[1])
