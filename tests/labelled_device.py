# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""CUDA devices that aren't there: tensors that say they are on `cuda:0` or `cuda:1` and are computed on the CPU.

Inside of `with LabelledDevices() as devices:` code takes its CUDA branches. What a GPU would refuse raises (tensors of
different devices in one operation), and what would make the host wait for a GPU is written down with the line that
asked for it: values and sizes that are read, and copies from the host. It works on any build of torch, with autograd,
at the level of single operators; what is compiled doesn't run here, and neither do autocast and kernels that have no
form on a CPU.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

DEVICES = 2
_CPU = torch.device("cpu")

# Operators that give the host a value, or the size of their result.
_READS = {
    "_local_scalar_dense",
    "_unique2",
    "bincount",
    "equal",
    "masked_select",
    "multinomial",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
_COPIES = {"_to_copy", "copy_", "copy"}
# Operators without a kernel, beside views.
_FREE = {
    "_local_scalar_dense",
    "_unsafe_view",
    "alias",
    "detach",
    "empty",
    "empty_like",
    "empty_strided",
    "lift_fresh",
    "new_empty",
    "new_empty_strided",
}


class Labelled(Tensor):
    """A tensor with the label of a CUDA device. To torch's own code it is one of the CPU's.

    Attributes:
        inner: the values.
        device: the label.
    """

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device) -> Labelled:
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=inner.device,
        )
        made.inner, made._label = inner, device
        return made

    device = property(lambda self: self._label)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """For threads, which modes don't reach."""
        return _the_devices().run(func, args, kwargs or {})

    def to(self, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        return _the_devices().moved(Tensor.to, (self, *args), kwargs)

    def cpu(self, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        return self.to("cpu")

    def __repr__(self, **kwargs: Any) -> str:
        return f"Labelled({self.device}, {self.inner!r})"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, **kwargs: Any) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first.")

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def __deepcopy__(self, memo: Any) -> Labelled:
        copied = Labelled(self.inner.clone(), self.device).requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            copied._is_param = True  # type: ignore[attr-defined]
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A file holds the values; whoever loads it says where they go."""
        return self.inner.__reduce_ex__(protocol)


class _Move(torch.autograd.Function):
    """From one device to another, and the gradient back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, device: torch.device) -> Tensor:
        ctx.device = x.device
        with torch._C._DisableTorchDispatch():
            inner = _plain(x).clone()
        return inner if device.type == "cpu" else Labelled(inner, device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return _Move.apply(grad, ctx.device), None


class LabelledGenerator(torch.Generator):
    """Random numbers of a device; the CPU's."""

    def __new__(cls, device: Any = "cpu") -> Any:
        return super().__new__(cls, "cpu")


# The devices that there are.
_active: list[LabelledDevices] = []


def _the_devices() -> LabelledDevices:
    if not _active:
        raise RuntimeError("tensors that say they are on CUDA, outside of LabelledDevices")
    return _active[-1]


class _Factories(TorchFunctionMode):
    """What makes tensors on a device, or brings them there, and ends in CUDA's own code before any operator."""

    def __init__(self, devices: LabelledDevices):
        super().__init__()
        self.devices = devices

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return self.devices.moved(func, args, kwargs)
        if func is Tensor.backward:
            loss, *others = args
            if "gradient" in kwargs:
                kwargs["grad_tensors"] = kwargs.pop("gradient")
            with self:  # checkpoints compute again in there
                return torch.autograd.backward(loss, *others, **kwargs)
        if func is torch.device and args and type(args[0]) is int:
            return torch.device("cuda", args[0])
        if func not in (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor):
            # Further down an explicit CPU is what torch's own code believes the device to be.
            if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cpu":
                args = _plain(args)
            return func(*args, **kwargs)
        device = kwargs.pop("device", None)
        if device is None and func is Tensor.new_tensor:
            device = args[0].device
        if device is None and len(args) and isinstance(args[0], Labelled):
            device = args[0].device
        if args and isinstance(args[0], list | tuple):
            args = (self.devices.listed(args[0]), *args[1:])
        made = func(*args, **kwargs)
        return made if device is None else self.devices.move(made, torch.device(device))


class LabelledDevices(TorchDispatchMode):
    """See above.

    Args:
        package: part of the path of the files whose lines are named; what others ask for is named by their own line.

    Attributes:
        reads: how often the host waited for a value or a size, by place: "windows.py:12 nonzero".
        copies: how often the host waited for a tensor that it copied to a device, by place.
        kernels: how many operators ran on a device, views and copies from the host aside, by place.
        strict: whether waiting raises, as after `torch.cuda.set_sync_debug_mode("error")`.
    """

    def __init__(self, package: str = "/casa_hf/"):
        super().__init__()
        self.package = package
        self.reads: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()
        self.strict = False
        self._counting = True
        self._stack = ExitStack()
        self._depth = 0

    def __enter__(self) -> LabelledDevices:
        # A mode is entered again within its own handler.
        self._depth += 1
        if self._depth == 1:
            self._stack.enter_context(self._pretending())
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._depth -= 1
        if not self._depth:
            self._stack.close()

    @contextmanager
    def _pretending(self) -> Iterator[None]:
        replaces = torch.__future__.get_swap_module_params_on_conversion()
        with ExitStack() as stack:
            # `Module.to` would put labelled values into unlabelled parameters.
            torch.__future__.set_swap_module_params_on_conversion(True)
            stack.callback(torch.__future__.set_swap_module_params_on_conversion, replaces)
            stack.enter_context(patch.object(torch, "Generator", LabelledGenerator))
            if not torch.cuda.is_available():
                stack.enter_context(patch.object(torch.cuda, "_lazy_init", lambda: None))
            stack.enter_context(_Factories(self))
            _active.append(self)
            stack.callback(_active.remove, self)
            yield

    def move(self, x: Tensor, device: torch.device, waits: bool = True) -> Tensor:
        """The tensor on a device, by a copy unless it is there."""
        device = _with_index(device)
        if x.device == device:
            return x
        if isinstance(x, Labelled) and device.type == "cpu":
            self._wait(self.reads, "to the host")
        elif not isinstance(x, Labelled) and x.device.type == "cpu" and x.numel() and waits:
            self._wait(self.copies, "from the host")
        return _Move.apply(x, device)

    def listed(self, numbers: Any) -> Any:
        """A list of numbers, some of which may have to be read from a device."""
        if isinstance(numbers, list | tuple):
            return [self.listed(number) for number in numbers]
        return numbers.item() if isinstance(numbers, Labelled) and not numbers.ndim else numbers

    def moved(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
        """What `Tensor.to`, `cpu` or `cuda` give."""
        x, *others = args
        named = {name: kwargs.get(name) for name in ("device", "dtype", "copy")}
        if func is Tensor.cpu:
            named["device"] = "cpu"
        elif func is Tensor.cuda:
            named["device"] = named["device"] or (others[0] if others else "cuda")
        else:
            flags = []
            for other in [*others, *([kwargs["other"]] if "other" in kwargs else [])]:
                if isinstance(other, Tensor):
                    named |= {"device": other.device, "dtype": other.dtype}
                elif isinstance(other, torch.dtype):
                    named["dtype"] = other
                elif isinstance(other, bool):
                    flags.append(other)
                elif other is not None:
                    named["device"] = other
            named["copy"] = named["copy"] or flags[1:] == [True]
        device = named["device"]
        device = x.device if device is None else torch.device("cuda", device) if isinstance(device, int) else device
        moved = x if named["dtype"] is None else Tensor.to(x, named["dtype"])
        moved = self.move(moved, torch.device(device), waits=not kwargs.get("non_blocking"))
        return moved.clone() if named["copy"] and moved is x else moved

    # ---------------------------------------------------------------- what a test asks

    def forget(self) -> None:
        """Start counting anew."""
        self.reads.clear()
        self.copies.clear()
        self.kernels.clear()

    @property
    def waits(self) -> int:
        """How often the host waited since `forget`, for values, sizes and copies."""
        return self.reads.total() + self.copies.total()

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """For what stands in for a kernel: whatever it reads, the kernel wouldn't."""
        before, self._counting = self._counting, False
        try:
            yield
        finally:
            self._counting = before

    @contextmanager
    def as_gpu(self, count: int = DEVICES) -> Iterator[None]:
        """Let `torch.cuda` answer for the devices, for programs that ask it.

        Args:
            count: how many it has.
        """

        class Event:
            def __init__(self, **kwargs: Any):
                self.time = 0.0

            def record(self) -> None:
                self.time = time.perf_counter()

            def elapsed_time(self, other: Any) -> float:
                return 1e3 * (other.time - self.time)

        def set_sync_debug_mode(mode: Any) -> None:
            self.strict = mode in ("error", 2)

        def load(*args: Any, map_location: Any = "cpu", **kwargs: Any) -> Any:
            loaded = own_load(*args, map_location="cpu", **kwargs)
            return tree_map(lambda x: x.to(map_location) if isinstance(x, Tensor) else x, loaded)

        own_load = torch.load
        answers: dict[str, Any] = {
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "device_count": lambda: count,
            "set_device": lambda device: None,
            "is_bf16_supported": lambda including_emulation=True: True,
            "memory_reserved": lambda device=None: 0,
            "manual_seed": lambda seed: None,
            "manual_seed_all": lambda seed: None,
            "get_rng_state": lambda device="cuda": torch.get_rng_state(),
            "get_rng_state_all": lambda: [torch.get_rng_state()] * count,
            "set_rng_state_all": lambda states: None,
            "current_device": lambda: 0,
            "get_device_name": lambda device=None: "a CPU with a label",
            "get_device_capability": lambda device=None: (9, 0),
            "synchronize": lambda device=None: None,
            "empty_cache": lambda: None,
            "memory_allocated": lambda device=None: 0,
            "max_memory_allocated": lambda device=None: 1,
            "reset_peak_memory_stats": lambda device=None: None,
            "set_sync_debug_mode": set_sync_debug_mode,
            "Event": Event,
        }
        with ExitStack() as stack:
            for name, answer in answers.items():
                stack.enter_context(patch.object(torch.cuda, name, answer))
            stack.enter_context(patch.object(torch, "load", load))
            stack.enter_context(patch.object(torch.Tensor, "pin_memory", lambda tensor, device=None: tensor))
            yield

    # ---------------------------------------------------------------- operators

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """An operator's result, with the label of its arguments, or of the device that it is told."""
        tensors = [*_tensors(args), *_tensors(kwargs.values())]
        labelled = [tensor for tensor in tensors if isinstance(tensor, Labelled)]
        target = kwargs.get("device")
        if not labelled and (target is None or target.type != "cuda"):
            return func(*args, **kwargs)
        if torch.is_inference_mode_enabled() and func.has_kernel_for_dispatch_key(
            torch._C.DispatchKey.CompositeImplicitAutograd
        ):
            with self:
                return func.decompose(*args, **kwargs)

        name = func.overloadpacket.__name__
        if labelled and target is not None and target.type == "cpu":
            target = None  # torch's own code believes that it is the CPU; what moves comes through `move`
        home = _check_devices(name, args, tensors, labelled)
        self._count(name, args, kwargs, tensors, target)
        if target is not None:
            home = _with_index(target)
        elif name in _COPIES:
            home = args[0].device
        result = func(*_plain(args), **{key: _plain(value) for key, value in kwargs.items()})
        runs_there = home is not None and home.type != "cpu" and not func.is_view and name not in _FREE
        if self._counting and runs_there and any(made.numel() for made in _tensors([result])):
            self.kernels[f"{_line(self.package)} {name}"] += 1
        if home is None or home.type == "cpu":
            return result
        own = {id(tensor.inner): tensor for tensor in labelled}

        def labelled_result(value: Any) -> Any:
            if isinstance(value, list | tuple):
                return type(value)(map(labelled_result, value))
            if not isinstance(value, Tensor):
                return value
            mine = own.get(id(value))  # changed in place
            if mine is None:
                return Labelled(value, home)
            assert mine.shape == value.shape, f"{name} changes the shape of a tensor in place"
            return mine

        return labelled_result(result)

    def _count(self, name: str, args: Any, kwargs: Any, tensors: list[Tensor], target: torch.device | None) -> None:
        first = args[0] if args and isinstance(args[0], Tensor) else None
        on_device = isinstance(first, Labelled)
        if name in _COPIES:
            assert first is not None
            goes_to = target or first.device
            source = first if name == "_to_copy" else args[1]
            if isinstance(source, Labelled) and goes_to.type == "cpu":
                self._wait(self.reads, name)
            elif not isinstance(source, Labelled) and goes_to.type == "cuda" and source.ndim:
                self._wait(self.copies, name)
        elif name in _INDEXING:
            indices = [index for index in args[1] if index is not None]
            if any(isinstance(index, Labelled) and index.dtype in (torch.bool, torch.uint8) for index in indices):
                fills = name != "index" and args[2].numel() == 1 and len(indices) == 1  # that is done by a mask
                if not fills:
                    self._wait(self.reads, name)
            if on_device and any(not isinstance(index, Labelled) for index in indices):
                self._wait(self.copies, name)
        elif name == "repeat_interleave":
            if any(isinstance(x, Labelled) for x in args[:2]) and kwargs.get("output_size") is None:
                self._wait(self.reads, name)
        elif name in _READS and any(isinstance(tensor, Labelled) for tensor in tensors):
            self._wait(self.reads, name)

    def _wait(self, counter: Counter[str], name: str) -> None:
        if not self._counting:
            return
        place = f"{_line(self.package)} {name}"
        counter[place] += 1
        if self.strict:
            raise RuntimeError(f"the host waits for the device: {place}")


def values(x: Any) -> Any:
    """What a labelled tensor, or whatever is made of such, holds; nothing is counted."""
    return tree_map(_plain, x)


def _tensors(arguments: Any) -> Iterator[Tensor]:
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, list | tuple):
            yield from _tensors(argument)


def _plain(x: Any) -> Any:
    """An operator's argument without labels."""
    if isinstance(x, Labelled):
        return x.inner
    if isinstance(x, list | tuple):
        return type(x)(map(_plain, x))
    return _CPU if isinstance(x, torch.device) and x.type == "cuda" else x


def _with_index(device: torch.device) -> torch.device:
    if device.type != "cuda":
        return device
    index = device.index or 0
    if index >= DEVICES:
        raise RuntimeError(f"CUDA error: invalid device ordinal {index}")
    return torch.device("cuda", index)


def _check_devices(name: str, args: Any, tensors: list[Tensor], labelled: list[Any]) -> torch.device | None:
    """The one device of an operator's tensors.

    Raises:
        RuntimeError: if there are several. Numbers on the CPU, indices on the CPU, and copies are allowed.
    """
    if not labelled:
        return None
    home = labelled[0].device
    if name in _COPIES:
        return home
    exempt = set()
    if name in _INDEXING:
        exempt = {id(index) for index in args[1] if index is not None and not isinstance(index, Labelled)}
    for tensor in tensors:
        if tensor.device != home and id(tensor) not in exempt and (tensor.ndim or isinstance(tensor, Labelled)):
            raise RuntimeError(
                f"{name}: expected all tensors to be on the same device, but found {home} and {tensor.device}, shape "
                f"{tuple(tensor.shape)}"
            )
    return home


def _line(package: str) -> str:
    """The innermost line of the package's files, or else of whoever isn't torch."""
    frame = sys._getframe(1)
    fallback = None
    while frame is not None:
        path = frame.f_code.co_filename
        if package in path:
            return f"{Path(path).name}:{frame.f_lineno}"
        if fallback is None and "/torch/" not in path and path != __file__:
            fallback = f"{Path(path).parent.name}/{Path(path).name}:{frame.f_lineno}"
        frame = frame.f_back
    return fallback or "?"
