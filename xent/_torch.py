"""Every private API of torch that this package uses, each under a name of its own and with the reason for it.

torch has no public way to ask who looks on at a call, and no public door to some of its own machinery. A release that
renames one of them breaks this file, and no other.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._library import autograd
from torch.autograd import forward_ad
from torch.distributed import ProcessGroup, distributed_c10d
from torch.utils import _python_dispatch

# The dispatcher's keys of a plain tensor, on any device, and of a thread that nobody looks on at.
_DEVICES = ("CPU", "CUDA", "HIP", "MPS", "XPU", "PrivateUse1")
_PLAIN_NAMES = [prefix + device for prefix in ("", "Autograd", "Autocast") for device in _DEVICES]
_PLAIN_NAMES += ["BackendSelect", "ADInplaceOrView"]  # and not a view that is yet to be negated: not as it lies there


def _key_set(names: list[str]) -> int:
    keys = [getattr(torch._C.DispatchKey, name) for name in names if hasattr(torch._C.DispatchKey, name)]
    return functools.reduce(operator.or_, [torch._C.DispatchKeySet(key).raw_repr() for key in keys])


_BEYOND = ~_key_set(_PLAIN_NAMES)
_MODE = _key_set(["Python", "PythonTLSSnapshot"])  # a TorchDispatchMode is active
_ModeKey = torch._C._TorchDispatchModeKey
_keys_of_one, _keys_of_this_thread = torch._C._dispatch_keys, torch._C._dispatch_tls_local_include_set
_is_subclass_like = torch._C._dispatch_isTensorSubclassLike  # in a mode, every tensor is
_transform, _jit_trace = torch._C._functorch.peek_interpreter_stack, torch._C._get_tracing_state
_TRACERS = (_ModeKey.FAKE, _ModeKey.PROXY, _ModeKey.FUNCTIONAL)


def needs_operator(*tensors: Tensor | None) -> bool:
    """Whether a mode, transform, tracer, subclass or batching stands between an operator on these tensors and memory.

    torch's own question, of each tensor and of modes. To read their keys, as `is_traced` does, takes twice as long.
    """
    if torch.compiler.is_compiling() or _transform() is not None or _jit_trace() is not None:
        return True
    for tensor in tensors:
        if tensor is not None and (_is_subclass_like(tensor) or tensor.is_neg() or tensor._is_zerotensor()):
            return True  # the last two: not as it lies in memory, and without any
    return False


def is_traced(*tensors: Tensor | None) -> bool:
    """The same, but for modes that look on while real numbers are computed: a counter of FLOPs, a logger.

    They shall see the products and collectives between the calls of the primitives, which a tracer cannot follow.
    """
    if torch.compiler.is_compiling():
        return True
    if any(_keys_of_one(tensor).raw_repr() & _BEYOND for tensor in tensors if tensor is not None):
        return True
    beyond = _keys_of_this_thread().raw_repr() & _BEYOND
    return beyond & ~_MODE != 0 or (beyond != 0 and any(map(torch._C._get_dispatch_mode, _TRACERS)))


_operators: Any = torch.library.Library("xent", "FRAGMENT")  # type: ignore[no-untyped-call]


def differentiate(name: str, backward: Callable[..., Any], setup_context: Callable[..., Any]) -> None:
    """`torch.library.register_autograd` of xent::name at its first call, for it takes a quarter of `import xent`."""

    @functools.cache
    def kernel() -> Any:
        operator = getattr(torch.ops.xent, name).default
        return autograd.make_autograd_impl(operator, autograd.Info(backward, setup_context))

    _operators.impl(name, lambda *given: kernel()(*given), "Autograd", with_keyset=True)


def apply_to_plain(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """`function.apply` of tensors that need no operator: there is no transform whose wrappers it would look for."""
    return super(torch.autograd.Function, function).apply(*arguments)  # type: ignore[misc]


def is_batched_gradient(tensor: Tensor | None) -> bool:
    """Whether this is what torch.autograd.grad(is_grads_batched=True) hands to a backward."""
    if tensor is None or torch.compiler.is_compiling():
        return False
    return torch._C._functorch.is_legacy_batchedtensor(tensor)


def needs_graph(input: Tensor, *others: Tensor | None) -> bool:
    """Whether something else than `input` is differentiated, or forward mode is on for any of these."""
    if torch.is_grad_enabled():
        for other in others:
            if other is not None and other.requires_grad:
                return True
    return forward_ad._current_level >= 0 and any(other is not None and is_dual(other) for other in (input, *others))


def is_dual(tensor: Tensor) -> bool:
    """Whether it carries a tangent."""
    return forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]


def refuse_nested_forward_mode(tensor: Tensor) -> None:
    """In a `jvp`: torch gives a custom Function zero tangents there."""
    levels = torch._C._functorch.get_interpreter_stack() or ()
    if [level.key() for level in levels].count(torch._C._functorch.TransformType.Jvp) > 1:
        raise NotImplementedError(
            "forward mode over forward mode: torch gives a custom Function zero tangents there; "
            "take one of the two derivatives in reverse mode, as torch.func.hessian does"
        )


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for this kind of device: torch raises where it knows none."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def library() -> str:
    """The file of torch's compiled part: what it links, the loader has loaded."""
    return torch._C.__file__


def process_group(name: str) -> ProcessGroup:
    """The group of this name: what an operator's schema can carry of one."""
    return distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type, attr-defined]


def store(group: ProcessGroup) -> Any:
    """Where the processes of this group met, and may leave words for each other."""
    return distributed_c10d._get_process_group_store(group)


def all_reduce(x: Tensor, group: str) -> Tensor:
    """The sum over the ranks, by the collective that compilers and tracers know."""
    collectives = torch.ops._c10d_functional
    return collectives.wait_tensor(collectives.all_reduce(x, "sum", group))  # type: ignore[no-any-return]


@functools.cache
def cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for products of this half-precision dtype, and oneDNN uses them.

    Otherwise those of float32 are faster: torch's own take up to 100 times as long, and bfloat16 that oneDNN puts
    together from float32 instructions (AVX-512 without its BF16 part) 3 to 4 times.
    """
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()  # type: ignore[no-any-return]
    emulated = torch.cpu._is_avx512_supported() and not torch.cpu._is_avx512_bf16_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported() and not emulated


def writes_float32(factor: Tensor) -> bool:
    """Whether products of half-precision factors like this one can write and add to float32: `out_dtype` of torch.mm.

    On CUDA alone, and tried once, since not every release of torch has it there and not every build for ROCm.
    """
    if not factor.is_cuda:
        return False
    rounded = getattr(torch.backends.cuda.matmul, "allow_fp16_accumulation", False)  # the caller's setting
    return not (rounded and factor.dtype == torch.float16) and _adds_float32(factor.dtype, factor.device)


@functools.cache
def _adds_float32(dtype: torch.dtype, device: torch.device) -> bool:
    with _python_dispatch._disable_current_modes():  # nobody who looks on shall see this
        total, factor = torch.zeros(8, 8, device=device), torch.zeros(8, 8, dtype=dtype, device=device)
        try:
            torch.addmm(total, factor, factor, out_dtype=total.dtype, out=total)
        except (RuntimeError, TypeError):
            return False
    return True


def graph_is_kept() -> bool:
    """In a backward: whether the graph will be used again (retain_graph=True), and so must keep its buffers."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def assert_on_device(condition: Tensor, message: str) -> None:
    """No host sync: the assertion fires on the device, some time after the launch, as torch's own does."""
    torch._assert_async(condition, message)
