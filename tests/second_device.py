"""A second device that computes on the host: tensors of it and of the host do not mix, as on a GPU.

`install()` changes torch for the whole process and cannot be undone: use it in a process of its own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch._dynamo  # imports itself at the first random tensor, which must not go through the mode below
from lightning.pytorch.accelerators import Accelerator
from torch import Tensor, nn
from torch.utils._contextlib import _DecoratorContextManager
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "second"
# Of these a GPU takes indices from the host, or copies from it.
MIX = {"aten::copy_", "aten::_to_copy", "aten::_foreach_copy_", "aten::index", "aten::index_put_"}
# Elementwise operations take single numbers of the host, these do not.
NO_NUMBERS = {"aten::cat", "aten::stack", "aten::mm", "aten::bmm"}


computed = 0  # operations on tensors of the device


class OnSecondDevice(Tensor):
    """A tensor that says it is on the second device, and holds its values on the host."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> OnSecondDevice:
        options = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made = Tensor._make_wrapper_subclass(cls, held.size(), device=torch.device(NAME, 0), **options)
        made.held = held
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> OnSecondDevice:
        return OnSecondDevice(inner["held"])

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        made: Tensor = OnSecondDevice(self.held.detach().clone())
        made = nn.Parameter(made, self.requires_grad) if isinstance(self, nn.Parameter) else made
        memo[id(self)] = made
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.held.detach().__reduce_ex__(protocol)

    def tolist(self) -> Any:
        return self.held.detach().tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"can't convert a {NAME} tensor to numpy. Use Tensor.cpu()")

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    away = [tensor for tensor in tensors if isinstance(tensor, OnSecondDevice)]
    asked = kwargs.get("device")
    to_second = asked is not None and torch.device(asked).type == NAME
    if not away and not to_second:
        return func(*args, **kwargs)
    global computed
    computed += 1
    name = func.name().partition(".")[0]
    if name == "aten::_fused_sdp_choice":
        return 0  # the plain form, of operations that compute anywhere
    _check_devices(name, tensors, len(away))
    to_host = asked is not None and not to_second
    inner_args, inner_kwargs = tree_map(
        lambda leaf: leaf.held if isinstance(leaf, OnSecondDevice) else leaf,
        (args, kwargs if asked is None else {**kwargs, "device": torch.device("cpu")}),
    )
    result = func(*inner_args, **inner_kwargs)
    if name == "aten::copy_":
        return args[0]
    if to_host:
        return result.clone() if any(result is tensor.held for tensor in away) else result
    known = {id(tensor.held): tensor for tensor in away}
    return tree_map(
        lambda leaf: known.get(id(leaf), OnSecondDevice(leaf)) if isinstance(leaf, Tensor) else leaf, result
    )


def _check_devices(name: str, tensors: list[Tensor], num_away: int) -> None:
    if name in MIX or num_away in (0, len(tensors)):
        return
    on_host = [tensor for tensor in tensors if not isinstance(tensor, OnSecondDevice)]
    if name in NO_NUMBERS or any(tensor.dim() > 0 for tensor in on_host):
        raise RuntimeError(f"{name}: expected all tensors on one device, found some on {NAME}:0 and some on cpu")


class SecondDevice(Accelerator):
    """Lightning's view of it."""

    def setup_device(self, device: torch.device) -> None:
        pass

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}

    def teardown(self) -> None:
        pass

    @staticmethod
    def parse_devices(devices: Any) -> list[int]:
        return [0]

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [torch.device(NAME, 0)]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return NAME


class _NoGradient(_DecoratorContextManager):
    """Stands for inference_mode, in which such tensors cannot be made."""

    def __init__(self, mode: bool = True) -> None:
        self.mode = mode

    def clone(self) -> _NoGradient:
        return _NoGradient(self.mode)

    def __enter__(self) -> None:
        self.was_enabled = torch.is_grad_enabled()
        torch.set_grad_enabled(self.was_enabled and not self.mode)

    def __exit__(self, *_: Any) -> None:
        torch.set_grad_enabled(self.was_enabled)


def install() -> None:
    """Give this process the device."""
    _setup_privateuseone_for_python_backend(NAME)
    module = getattr(torch, NAME)
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    # Random numbers are the host's.
    module.get_rng_state = lambda device=None: torch.empty(0, dtype=torch.uint8)
    module.set_rng_state = lambda state, device=None: None
    torch.__future__.set_swap_module_params_on_conversion(True)  # tied weights stay tied
    torch.inference_mode = torch.autograd.grad_mode.inference_mode = _NoGradient  # type: ignore
    generator = torch.Generator
    torch.Generator = lambda device="cpu": generator()  # type: ignore[assignment, misc]
    make = torch.tensor

    def tensor(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        made = make(data, *args, **kwargs)
        return made if device is None else made.to(device)

    torch.tensor = tensor  # type: ignore[assignment]
    _Dispatch().__enter__()
