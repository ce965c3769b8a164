"""How a kernel becomes an operator of torch: one name, an implementation per device, and a fake one for tracing."""

from collections.abc import Callable
from typing import Generic, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")
Implementation = TypeVar("Implementation", bound=Callable[..., object])

LIBRARY = torch.library.Library("duomoe", "DEF")


class Operator(Generic[P, R]):
    """An operator in the namespace `duomoe`; call it like the function it was made from.

    It does what torch.library.custom_op does, by the calls beneath it: custom_op imports torch's compiler at the
    first call, which would more than double the time from a process's start to its first token on a CPU.
    """

    def __init__(self, function: Callable[P, R], mutates_args: tuple[str, ...]) -> None:
        self.function = function
        self.name = function.__name__
        self.__doc__ = function.__doc__
        LIBRARY.define(self.name + torch.library.infer_schema(function, mutates_args=mutates_args))
        LIBRARY.impl(self.name, function, "CPU")
        self.overload = getattr(torch.ops.duomoe, self.name).default

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Dispatch by the device of the tensors.

        On a CPU the dispatcher takes a tenth of a small model's decode step, so the function is called as it is, unless
        torch.compile or a dispatch mode is to see an operator.
        """
        if not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() == 0:
            first = args[0]
            if isinstance(first, torch.Tensor) and first.is_cpu:
                return self.function(*args, **kwargs)
        result: R = self.overload(*args, **kwargs)
        return result

    def register_cuda(self, function: Implementation) -> Implementation:
        """Take a function as the implementation on NVIDIA GPUs."""
        LIBRARY.impl(self.name, function, "CUDA")
        return function

    def register_fake(self, function: Implementation) -> Implementation:
        """Take a function that returns results of the right shape and dtype, for torch.compile."""
        torch.library.register_fake(f"duomoe::{self.name}", function, lib=LIBRARY)
        return function


def operator(mutates_args: tuple[str, ...] = ()) -> Callable[[Callable[P, R]], Operator[P, R]]:
    """Make an operator of a function, which is its implementation on the CPU; `mutates_args` are written in place."""
    return lambda function: Operator(function, mutates_args)
