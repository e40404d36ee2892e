"""Training tokens per second of Pythia: ours, Hugging Face's GPT-NeoX in a loop and in its Trainer, and litgpt."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.apart import HOW, apart
from bench.measure import DEVICE, Found, paired_ratio, require_quiet, table, take_turns
from bench.paused import Paused
from bench.peers import import_peer, missing, problem_with, version_of
from bench.steps import CLIP, bare_step, parallel_loss, random_ids
from newllm.callbacks.peak import peak_flops
from newllm.config.compose import compose_model
from newllm.linear import is_onednn_faster, multiply, outer
from newllm.models.create import create_model
from newllm.processor import multiplies_bf16

PEERS = ["transformers", "litgpt"]


@dataclass(frozen=True)
class Shape:
    """One size to compare at; `steps` optimizer steps make a call."""

    size: str
    vocab_size: int
    batch_size: int
    length: int
    steps: int
    rounds: int


SHAPES = [
    Shape("nano", 4096, 8, 128, 4, 7),
    Shape("small", 4096, 8, 128, 2, 7),
    Shape("pythia_70m", 50304, 2, 256, 1, 4),
]
# A GPU is filled by longer blocks, and everybody is at their best: bf16, compiled.
CUDA_SHAPES = [Shape("pythia_70m", 50304, 16, 2048, 4, 7)]
QUICK = [Shape("nano", 256, 2, 16, 1, 2)]
IS_FAST = DEVICE == "cuda"
PRECISION = "bf16-mixed" if IS_FAST else "32-true"


def repeated(step: Callable[[], object], times: int) -> Callable[[], None]:
    """Return a call that makes so many steps."""

    def call() -> None:
        for _ in range(times):
            step()

    return call


def mixed(loss: Callable[[], Tensor], *, is_bf16: bool = IS_FAST) -> Callable[[], Tensor]:
    """Return the loss computed in bf16, or as it is; without a choice in the precision that the device is measured in."""

    def call() -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=is_bf16):
            return loss()

    return call


def huggingface(shape: Shape) -> nn.Module:
    """Return the same model as ours, as transformers has it, with its fast attention."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    size = compose_model("pythia", size=shape.size, keys={}).size
    config: Any = GPTNeoXConfig(
        vocab_size=shape.vocab_size,
        hidden_size=size.dim,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        intermediate_size=size.mlp_dim,
        max_position_embeddings=2048,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    config._attn_implementation = "sdpa"
    return GPTNeoXForCausalLM(config).to(DEVICE).train()


class OneBlock(torch.utils.data.Dataset):
    """One block, over and over."""

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids.cpu()

    def __len__(self) -> int:
        return 2**20

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids, "labels": self.ids}


def huggingface_loop(shape: Shape) -> Callable[[], object]:
    """Return a call that makes steps of transformers' model in a bare loop."""
    ids, _ = random_ids(shape.batch_size, shape.length, shape.vocab_size)
    model = huggingface(shape)
    # It shifts labels itself: one target less in a row than ours.
    return repeated(bare_step(model, mixed(lambda: model(input_ids=ids, labels=ids).loss)), shape.steps)


def compiled_huggingface_loop(shape: Shape) -> Callable[[], object]:
    """Return the same call with the model compiled."""
    ids, _ = random_ids(shape.batch_size, shape.length, shape.vocab_size)
    model = huggingface(shape)
    run: Any = torch.compile(model)
    return repeated(bare_step(model, mixed(lambda: run(input_ids=ids, labels=ids).loss)), shape.steps)


def huggingface_trainer(shape: Shape, folder: str) -> Callable[[], object]:
    """Return a call that makes steps with transformers' Trainer; what it prepares falls into the first call."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    ids, _ = random_ids(1, shape.length, shape.vocab_size)

    def train(pause: Callable[[], None]) -> None:
        class Turns(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if state.global_step % shape.steps == 0:
                    pause()

        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=10**6,
            per_device_train_batch_size=shape.batch_size,
            learning_rate=1e-4,
            max_grad_norm=CLIP,
            optim="adamw_torch_fused",
            lr_scheduler_type="constant",
            logging_steps=10,  # as often as ours
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=DEVICE == "cpu",
            bf16=IS_FAST,
            torch_compile=IS_FAST,
        )
        Trainer(huggingface(shape), arguments, train_dataset=OneBlock(ids[0]), callbacks=[Turns()]).train()

    return Paused(train)


def litgpt(shape: Shape) -> Callable[[], object]:
    """Return a call that makes steps of litgpt's Pythia with the loss of its own pretraining loop."""
    model_module, utils = import_peer("litgpt.model"), import_peer("litgpt.utils")
    inputs, labels = random_ids(shape.batch_size, shape.length, shape.vocab_size)
    size = compose_model("pythia", size=shape.size, keys={}).size
    config = import_peer("litgpt.config").Config.from_name(
        "pythia-70m",
        n_layer=size.num_layers,
        n_head=size.num_heads,
        n_embd=size.dim,
        intermediate_size=size.mlp_dim,
        padded_vocab_size=shape.vocab_size,
        vocab_size=shape.vocab_size,
    )
    model = model_module.GPT(config).to(DEVICE).train()
    model.max_seq_length = shape.length
    run: Any = torch.compile(model) if IS_FAST else model
    return repeated(bare_step(model, mixed(lambda: utils.chunked_cross_entropy(run(inputs), labels))), shape.steps)


def products_alone(model: nn.Module, shape: Shape) -> Callable[[], object]:
    """Return a call of what every trainer of the shape must compute: the products of the linear maps and attention, both ways.

    By the library that is the faster one here, in the precision of the weights, from tensors that are there already; no loss, norm,
    optimizer step nor anything between layers.
    """
    rows = shape.batch_size * shape.length
    linears = [module.weight.detach() for module in model.modules() if isinstance(module, nn.Linear)]
    tensors = [(weight, torch.randn(rows, weight.shape[1]), torch.randn(rows, weight.shape[0])) for weight in linears]
    size = compose_model("pythia", size=shape.size, keys={}).size
    heads = shape.batch_size, size.num_heads, shape.length, size.dim // size.num_heads
    asked = [torch.randn(heads, requires_grad=True) for _ in range(3)]
    upstream = torch.randn(heads)

    def call() -> None:
        for weight, inputs, by_outputs in tensors:
            multiply(inputs, weight)
            multiply(by_outputs, weight.T)
            outer(by_outputs, inputs)
        for _ in range(size.num_layers):
            attended = nn.functional.scaled_dot_product_attention(*asked, is_causal=True)
            torch.autograd.grad(attended, asked, upstream)

    return call


def by_mkl(step: Callable[[], object]) -> Callable[[], object]:
    """Return a call that leaves all products to MKL, as everywhere but on processors where oneDNN is the faster one."""

    def call() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of GPUs, by the switch itself
            with torch.backends.mkldnn.flags(enabled=False):
                step()

    return call


def peers(shape: Shape, folder: str, stack: ExitStack) -> dict[str, Callable[[], object]]:
    """Return the other trainers that can be measured here; `stack` ends the processes that were started for them."""
    found: dict[str, Callable[[], object]] = {}
    if problem_with("transformers") is None:
        found["HF loop"] = stack.enter_context(apart(huggingface_loop, shape))
        if IS_FAST:
            found["HF loop, compiled"] = stack.enter_context(apart(compiled_huggingface_loop, shape))
        else:
            found["HF loop, in our process"] = huggingface_loop(shape)
        found["HF Trainer"] = stack.enter_context(apart(huggingface_trainer, shape, folder))
    if problem_with("litgpt") is None:
        found["litgpt"] = stack.enter_context(apart(litgpt, shape))
    return found


def alternatives(shape: Shape, folder: str, stack: ExitStack) -> dict[str, Callable[[], object]]:
    """Return everything that can be measured here at a shape; `stack` ends the processes that were started for it."""
    inputs, labels = random_ids(shape.batch_size, shape.length, shape.vocab_size)
    own = create_model("pythia", size=shape.size, vocab_size=shape.vocab_size, seed=0).to(DEVICE).train()
    if IS_FAST:
        from newllm.hardware import compile_layers  # imports transformers, which must see accelerate then

        compile_layers(own)
    found = {"ours": repeated(bare_step(own, mixed(parallel_loss(own, inputs, labels))), shape.steps)}
    if not IS_FAST and is_onednn_faster():
        found["ours, MKL's products"] = by_mkl(found["ours"])
    if not IS_FAST and multiplies_bf16():
        half = create_model("pythia", size=shape.size, vocab_size=shape.vocab_size, seed=0).train()
        found["ours, bf16-mixed"] = repeated(
            bare_step(half, mixed(parallel_loss(half, inputs, labels), is_bf16=True)), shape.steps
        )
    found |= peers(shape, folder, stack)
    if not IS_FAST:  # compiled, a device overlaps them with everything else
        found["products alone"] = repeated(products_alone(own, shape), shape.steps)
    return found


def share_of_peak(shape: Shape, tokens_per_second: float) -> str:
    """Return the share of the device's peak that is spent on the model's own products; nothing where the peak is not known."""
    peak = peak_flops(torch.cuda.get_device_name() if IS_FAST else "cpu", PRECISION)
    if peak is None:
        return ""
    with torch.device("meta"):
        model = create_model("pythia", size=shape.size, vocab_size=shape.vocab_size)
    return f"{tokens_per_second * model.training_flops_per_token(shape.length) / peak:.1%}"


def run(quick: bool) -> Found:
    """Measure all sizes."""
    lines, figures = [], {}
    for shape in QUICK if quick else CUDA_SHAPES if IS_FAST else SHAPES:
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            rows = take_turns(alternatives(shape, folder, stack), rounds=shape.rounds)
        if not quick:
            require_quiet(rows, f"training, {shape.size}")
        tokens = shape.batch_size * shape.length * shape.steps
        for row in rows:
            ratio = paired_ratio(row, rows[0])
            speed, warmup = f"{tokens / row.median:,.0f}", f"{row.warmup_seconds:.1f} s"
            where = f"{shape.size}, V {shape.vocab_size}, B {shape.batch_size}, T {shape.length}"
            lines.append(
                [
                    where,
                    row.name,
                    speed,
                    f"{ratio:.2f}",
                    share_of_peak(shape, tokens / row.median),
                    f"{row.spread:.0%}",
                    warmup,
                ]
            )
            print(*lines[-1], sep=" | ", flush=True)
        figures[shape.size] = {row.name: row.figures() | {"tokens_per_call": tokens} for row in rows}
    head = ["shape", "", "tokens/s", "time / ours", "MFU", "spread", "warm-up"]
    versions = ", ".join(f"{name} {version_of(name)}" for name in PEERS if problem_with(name) is None)
    how = "bf16, compiled" if IS_FAST else "fp32 where nothing is said, eager"
    told = f"{how}, fused AdamW, gradient norm clipped, median of the rounds. {versions}."
    if not IS_FAST and is_onednn_faster():
        told += " MKL has no AVX-512 products for this processor: ours leaves large ones to oneDNN, the others take torch's, that is MKL's."
    if not IS_FAST:
        told += (
            f" Each of the others runs {HOW}, from which the HF loop in our process gains too."
            " products alone: the matrix products of the linear maps and of attention, forward and backward, by the library that is "
            "faster here, and nothing else: what is left when everything around them is free."
        )
    return Found(f"{table(head, lines)}\n\n{told}{missing(PEERS)}", figures)
