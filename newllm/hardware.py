"""What the machine can do: refused before any work where it cannot, said where it does not pay, as flags of Lightning's Trainer."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, Strategy
from torch import nn

from newllm import ranks
from newllm.config.schema import RuntimeConfig
from newllm.layers import fused_delta
from newllm.layers.base import Layer
from newllm.layers.memory_layer import MemoryLayer
from newllm.processor import multiplies_bf16

log = logging.getLogger(__name__)


def check_devices(runtime: RuntimeConfig) -> None:
    """Check that the devices are there.

    Raises:
        ValueError: a GPU is asked for where there is none, or more of them than there are.
    """
    if runtime.accelerator != "gpu":
        return
    if not torch.cuda.is_available():
        asked = "runtime.strategy=fsdp" if runtime.strategy == "fsdp" else "runtime.accelerator=gpu"
        raise ValueError(
            f"{asked}: torch finds no CUDA device. Allowed here: cpu. Choose runtime=cpu or runtime=ddp_cpu."
        )
    found = torch.cuda.device_count()
    if runtime.devices > found:
        raise ValueError(
            f"runtime.devices={runtime.devices}: torch finds {found} CUDA devices on this machine. Allowed: 1 to {found}. "
            "Set runtime.devices, and start the same command on more machines with torchrun or SLURM."
        )


def spare_filling() -> None:
    """Leave new memory as it is where `runtime.deterministic=true`: torch would write every result twice, first with NaN.

    That finds operations which read what nobody wrote; the digits are the same without it.
    """
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def set_threads(runtime: RuntimeConfig) -> None:
    """Give torch its CPU threads; processes on one CPU share the cores unless told otherwise."""
    if runtime.num_threads is not None:
        torch.set_num_threads(runtime.num_threads)
    elif runtime.accelerator == "cpu" and runtime.devices > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // runtime.devices))


def warn_of_loss(runtime: RuntimeConfig) -> None:
    """Say which choices of precision and compilation cost more than they give here."""
    if runtime.accelerator == "cpu":
        if runtime.precision == "bf16-mixed" and not multiplies_bf16():
            log.warning(
                "runtime.precision=bf16-mixed: this CPU has no instructions for bf16, its products are many times slower than those of "
                "fp32. runtime.precision=32-true is faster here."
            )
        if runtime.compile:
            log.warning(
                "runtime.compile=true: compiling takes minutes on a CPU and gains nothing. runtime.compile=false is faster here."
            )
        return
    if runtime.precision == "bf16-mixed" and not torch.cuda.is_bf16_supported(including_emulation=False):
        log.warning(
            "runtime.precision=bf16-mixed: %s has no bf16 arithmetic and emulates it. runtime.precision=16-mixed is faster here.",
            torch.cuda.get_device_name(),
        )
    if runtime.precision == "64-true":
        log.warning("runtime.precision=64-true: GPUs are many times slower in fp64. It is for comparing digits.")


def compile_layers(model: nn.Module) -> None:
    """Compile every layer by itself: what surrounds them changes from procedure to procedure, their shapes do not."""
    for layer in model.modules():
        if isinstance(layer, Layer):
            layer.compile()


def use_fused_kernels(model: nn.Module, runtime: RuntimeConfig) -> None:
    """Train layers of memory_kernel=delta_token with flash-linear-attention where it pays, is installed, and is right here.

    It is compared with this package's own form on the GPU of the run, in the sizes of every layer, before the first step. Passes
    without gradient, validation among them, keep to the own form.
    """
    if runtime.accelerator != "gpu" or "16" not in runtime.precision:
        return
    layers = [layer for layer in model.modules() if isinstance(layer, MemoryLayer) and layer.takes_fused]
    if not layers:
        return
    try:
        rule = fused_delta.installed()
    except fused_delta.NotUsableError as error:
        problems: set[str | None] = {str(error)}
    else:
        if rule is None:
            return
        problems = {layer.use_fused(rule, "cuda") for layer in layers} - {None}
    for problem in sorted(problems, key=str):
        log.warning(
            "layers.memory_kernel=delta_token: flash-linear-attention is not used, %s. Training goes on with the own form, which is "
            "slower and right.",
            problem,
        )
    if not problems:
        log.info(
            "layers.memory_kernel=delta_token: trains with flash-linear-attention, its gradients agree with the own form's"
        )


def trainer_flags(runtime: RuntimeConfig) -> dict[str, Any]:
    """Return the flags of Lightning's Trainer that say where a run computes; its processes have joined already."""
    return {
        "accelerator": runtime.accelerator,
        "devices": runtime.devices,
        "num_nodes": ranks.world_size() // runtime.devices if ranks.world_size() > 1 else 1,
        "strategy": _strategy(runtime),
        "plugins": [LightningEnvironment()],  # the place of each process is known; SLURM is not asked again
        "precision": runtime.precision,
        "deterministic": runtime.deterministic,
    }


def _strategy(runtime: RuntimeConfig) -> Strategy | str:
    if runtime.strategy == "fsdp":
        # One unit per layer; embedding and norms stay in the outermost, gathered for the whole step.
        return FSDPStrategy(auto_wrap_policy={Layer}, state_dict_type="full")
    if ranks.world_size() == 1:
        return "auto"
    # Some procedures leave parameters without gradient in some steps. No buffer differs between ranks.
    return DDPStrategy(find_unused_parameters=True, broadcast_buffers=False)
