"""Triton decides when a kernel is decorated whether to interpret it, so without a GPU it is told before any import."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
