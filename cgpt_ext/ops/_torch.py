"""What every op's file needs from torch: registration, and the test for calling a kernel without the dispatcher.

torch.library's define/impl costs 2.3 us a call where custom_op costs 8 to 11, and a direct call 0.5: so eager calls
on plain tensors skip the dispatcher, and everything else (torch.compile, torch.jit.trace, fake and meta tensors,
subclasses such as DTensor) goes through the registered op, whose fake tells torch the shapes and strides.
"""

from collections.abc import Callable

import torch

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_AUTOCAST = (torch.float32, torch.bfloat16, torch.float16)


def direct(*arguments) -> bool:
    """Whether a launcher may be called on `arguments` as they are, without torch's dispatcher.

    Lists are judged by their first tensor. Where the first argument is no meta tensor none should be, and the border
    says so.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    for x in arguments:
        if type(x) is list:
            x = x[0] if x else None
        if type(x) not in _PLAIN and isinstance(x, torch.Tensor):
            return False
    first = arguments[0]
    first = first[0] if type(first) is list and first else first
    return not (isinstance(first, torch.Tensor) and first.is_meta)


def on_gpu(x: torch.Tensor) -> bool:
    """Whether the CUDA kernels serve x: where an op goes about its work differently than on a CPU."""
    return x.device.type == "cuda"


def register(schema: str, launch: Callable, fake: Callable) -> Callable:
    """Defines `cgpt_ext::<schema>`, served by `launch` on CPU and CUDA.

    Returns the op as a function of positional arguments, which calls `launch` itself where `direct` allows it.
    """
    name = "cgpt_ext::" + schema[: schema.index("(")]
    torch.library.define(name, schema[schema.index("(") :])
    torch.library.impl(name, ("cpu", "cuda"), launch)
    torch.library.register_fake(name, fake)
    namespace, op = name.split("::")
    registered = getattr(getattr(torch.ops, namespace), op).default

    def call(*arguments):
        return (launch if direct(*arguments) else registered)(*arguments)

    return call


def check_tensors(op: str, **arguments: torch.Tensor | None) -> None:
    """Raises TypeError naming the first argument that is neither a tensor nor None."""
    for name, value in arguments.items():
        if value is not None and not isinstance(value, torch.Tensor):
            raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")


def require_tensors(op: str, **arguments: torch.Tensor) -> None:
    """Raises TypeError naming the first argument that is not a tensor, None included."""
    for name, value in arguments.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")


def autocast(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """The tensors as torch.autocast hands them to a matrix product of torch's own: in its dtype where it is on."""
    device = next(t.device.type for t in tensors if t is not None)
    if device == "meta" or not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [t.to(dtype) if t is not None and t.dtype in _AUTOCAST else t for t in tensors]
