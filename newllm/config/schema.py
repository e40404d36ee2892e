"""Types and meanings of every group of the configuration; values and their reasons stand in conf/.

Models, layers, losses, trainers, data sources and evaluations keep their own schema beside their code (a class ending
in `Config`, derived from the base here) and are found by their `kind`; all other groups are described here completely.
Nothing here, nor in a schema beside code, may need torch: mistakes are answered before it is imported.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from newllm.config.extras import no_wandb_login, not_installed
from newllm.config.fields import Count, Depth, Range, Share

Natural = Annotated[int, Range(minimum=0)]


@dataclass(frozen=True, kw_only=True)
class GroupConfig:
    """What all groups share: a schema may check rules that one field's type and range cannot say."""

    def check(self, config: "TrainConfig") -> list[str]:
        """Return a full error sentence for each broken rule between these fields and the rest of the configuration."""
        return []


@dataclass(frozen=True, kw_only=True)
class ModelConfig(GroupConfig):
    """A language model; `kind` names newllm/models/<kind>.py."""

    kind: str

    @property
    def has_feedback(self) -> bool:
        """Whether the model's last hidden state enters the next position: what recurrent trainers need."""
        return getattr(self, "feedback", "none") != "none"

    def is_pointwise(self, layers: "LayersConfig") -> bool:
        """Whether what enters the next position depends on the state of the position before and the tokens, on no earlier state."""
        return False

    @property
    def needs_trainer(self) -> str | None:
        """The only kind of trainer that trains all of the model; None where any fitting one does."""
        return None


@dataclass(frozen=True, kw_only=True)
class LayerConfig(GroupConfig):
    """Parameters of one kind of layer; `kind` names newllm/layers/<kind>.py."""

    kind: str

    @property
    def looks_back(self) -> bool:
        """Whether a position reads anything of those before it."""
        return True


@dataclass(frozen=True, kw_only=True)
class LayersConfig(GroupConfig):
    """A stack of layers. In YAML the parameters of all its kinds stand side by side in one flat node.

    Attributes:
        stack: kind of each layer, from the bottom, one entry per layer.
        kinds: parameters of each kind in the stack.
    """

    stack: tuple[str, ...]
    kinds: dict[str, LayerConfig]

    def check(self, config: "TrainConfig") -> list[str]:
        return [problem for layer in self.kinds.values() for problem in layer.check(config)]


@dataclass(frozen=True, kw_only=True)
class LossConfig(GroupConfig):
    """What is minimised; `kind` names newllm/losses/<kind>.py.

    Attributes:
        reads: what it is computed from; the trainers that give it can minimise it.
    """

    reads: ClassVar[str] = "states"

    kind: str


@dataclass(frozen=True, kw_only=True)
class TrainerConfig(GroupConfig):
    """A training procedure; `kind` names newllm/trainers/<kind>.py.

    Attributes:
        needs_feedback: the procedure trains a recurrence and refuses a model without one.
        allows_feedback: the procedure can train a model with a recurrence.
        only_model: the kind of model that it is for; None where it does not matter.
        reads_in_lanes: texts come in order, one per row of a batch, and the state goes on from batch to batch.
        shares_batches: several processes may share its batches and come to what one would.
        gives: what it hands to the loss: `states` of all positions [B, T, D] with their targets [B, T], or another name that
            only its own losses read.
    """

    needs_feedback: ClassVar[bool] = False
    allows_feedback: ClassVar[bool] = True
    only_model: ClassVar[str | None] = None
    reads_in_lanes: ClassVar[bool] = False
    shares_batches: ClassVar[bool] = False
    gives: ClassVar[str] = "states"

    kind: str
    max_steps: Count  # optimizer steps
    validate_every_steps: Count  # optimizer steps
    checkpoint_every_steps: Count  # optimizer steps
    log_every_steps: Count  # optimizer steps
    accumulate_batches: Count  # batches whose gradients make one optimizer step
    gradient_clip_norm: Annotated[float | None, Range(above=0)]  # L2 norm of all gradients together
    ema_decay: Annotated[float | None, Range(minimum=0, below=1)]  # per optimizer step; null keeps no average
    early_stopping_patience: Annotated[int | None, Range(minimum=1)]  # validations without a better val/loss
    default_feedback: Literal["none", "additive", "gated"]  # model.feedback unless the user says otherwise


@dataclass(frozen=True, kw_only=True)
class DataConfig(GroupConfig):
    """A source of text; `kind` names newllm/data/<kind>.py.

    Attributes:
        needs_tokenizer: the source gives text; False where it gives token ids itself.
    """

    needs_tokenizer: ClassVar[bool] = True

    kind: str
    block_length: Count  # tokens that predict (T); a block is cut one token longer
    batch_size: Count  # blocks
    eval_batch_size: Count  # blocks
    num_workers: Annotated[int, Range(minimum=0, maximum=1024)]  # loader processes; 0 loads in the main process
    shuffle: bool  # training blocks, anew in each epoch
    validation_share: Annotated[float, Range(minimum=0, below=1)]  # of the documents
    test_share: Annotated[float, Range(minimum=0, below=1)]  # of the documents
    max_train_blocks: Annotated[int | None, Range(minimum=1)]
    max_validation_blocks: Annotated[int | None, Range(minimum=1)]
    max_unseen: Share  # validation tokens whose id never occurs in training, at most
    cache_dir: str  # folder of tokenised texts


@dataclass(frozen=True, kw_only=True)
class SizeConfig(GroupConfig):
    """How large the model is."""

    dim: Count  # D
    num_layers: Depth
    num_heads: Count  # H
    mlp_dim: Count  # hidden units of the feed-forward part


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig(GroupConfig):
    """How text becomes token ids."""

    kind: Literal["bpe", "bytes", "file", "gpt2", "pythia", "unigram"]
    vocab_size: Annotated[int | None, Range(minimum=2, maximum=2**22)]  # token ids; null where the kind decides
    path: str | None  # tokenizer.json, for kind file

    def check(self, config: "TrainConfig") -> list[str]:
        """Return a sentence where the tokenizer to read is not named."""
        if self.kind != "file" or self.path is not None:
            return []
        return ["tokenizer.path=null: is not given. Allowed: a tokenizer.json. Set tokenizer.path."]


@dataclass(frozen=True, kw_only=True)
class EmbeddingConfig(GroupConfig):
    """Where the token embedding comes from."""

    kind: Literal["gpt2", "random", "run", "svd"]
    freeze: bool  # leave it, and scores tied to it, as it starts
    window: Count  # tokens; pairs at most so far apart count, for kind svd
    path: str | None  # run folder, for kind run

    def check(self, config: "TrainConfig") -> list[str]:
        """Return a sentence where the run to take the table from is not named."""
        if self.kind != "run" or self.path is not None:
            return []
        return [
            "embedding.path=null: embedding=run takes the table of another run. Allowed: a run folder. "
            "Set embedding.path to one."
        ]


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(GroupConfig):
    """AdamW; norms, biases and gates are not decayed."""

    lr: Annotated[float, Range(above=0)]  # highest learning rate of the schedule
    beta1: Annotated[float, Range(minimum=0, below=1)]
    beta2: Annotated[float, Range(minimum=0, below=1)]
    eps: Annotated[float, Range(above=0)]
    weight_decay: Annotated[float, Range(minimum=0)]
    gate_lr_factor: Annotated[float, Range(above=0)]  # learning rate of gate parameters over lr


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig(GroupConfig):
    """The learning rate over the optimizer steps."""

    kind: Literal["constant", "cosine", "wsd"]
    warmup_steps: Natural  # optimizer steps from 0 to lr
    min_lr_ratio: Share  # last learning rate over lr
    decay_share: Share  # of max_steps, at the end, in which wsd decays


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig(GroupConfig):
    """The machine: flags of the Lightning Trainer."""

    accelerator: Literal["cpu", "gpu"]
    devices: Count  # processes on a machine, one device each; they share data.batch_size
    strategy: Literal["auto", "ddp", "fsdp"]
    precision: Literal["32-true", "64-true", "bf16-mixed", "16-mixed"]
    compile: bool  # torch.compile
    num_threads: Annotated[
        int | None, Range(minimum=1, maximum=1024)
    ]  # CPU threads of torch; null leaves torch's choice
    deterministic: bool  # refuse operations whose result varies between runs

    def check(self, config: "TrainConfig") -> list[str]:
        """Return what the machine's flags do not allow each other, or the procedure."""
        problems = []
        if self.accelerator == "cpu" and self.strategy == "fsdp":
            problems.append(
                "runtime.strategy=fsdp: shards over GPUs, runtime.accelerator=cpu has none. Allowed on a CPU: auto, ddp. "
                "Choose runtime=ddp_cpu, or runtime=fsdp on a machine with GPUs."
            )
        if self.accelerator == "cpu" and self.precision == "16-mixed":
            problems.append(
                "runtime.precision=16-mixed: is for GPUs, runtime.accelerator=cpu has none. Allowed on a CPU: 32-true, 64-true, "
                "bf16-mixed. Choose runtime.precision=32-true."
            )
        if self.compile and self.strategy == "fsdp":
            problems.append(
                "runtime.compile=true: sharded layers are not compiled. Allowed with runtime.strategy=fsdp: false. "
                "Choose runtime.compile=false or runtime.strategy=ddp."
            )
        if self.devices > 1 and not config.trainer.shares_batches:
            problems.append(
                f"runtime.devices={self.devices}: trainer={config.trainer.kind} runs in one process. Allowed with it: 1. "
                "Choose runtime=cpu or runtime=gpu."
            )
        if self.devices > config.data.batch_size:
            problems.append(
                f"data.batch_size={config.data.batch_size}: cannot be shared out among runtime.devices={self.devices}. "
                f"Allowed: {self.devices} or more. Raise data.batch_size, which counts the rows of all devices together."
            )
        return problems


@dataclass(frozen=True, kw_only=True)
class CallbacksConfig(GroupConfig):
    """What is shown and recorded while training."""

    progress_every_seconds: Annotated[float, Range(above=0)]
    sample_every_steps: Annotated[int | None, Range(minimum=1)]  # null writes no text samples
    sample_tokens: Count  # length of a text sample
    lag_every_steps: Annotated[int | None, Range(minimum=1)]  # lag, memory, halting, gradients; null probes none


@dataclass(frozen=True, kw_only=True)
class LoggerConfig(GroupConfig):
    """Where metrics go besides metrics.jsonl."""

    tensorboard: bool
    csv: bool
    wandb: bool  # Weights & Biases; WANDB_PROJECT, WANDB_MODE=offline and its other variables hold

    def check(self, config: "TrainConfig") -> list[str]:
        """Return a sentence where Weights & Biases is asked for and cannot be had."""
        if not self.wandb:
            return []
        missing = not_installed("logger.wandb=true", "wandb", "wandb", "logger=tensorboard, csv, none")
        return missing or no_wandb_login()


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(GroupConfig):
    """A measurement on a finished run; `kind` names newllm/evaluation/<kind>.py.

    Attributes:
        across_runs: the measurement compares several finished runs, so none can make it at its own end.
    """

    across_runs: ClassVar[bool] = False

    kind: str


@dataclass(frozen=True, kw_only=True)
class GuardsConfig(GroupConfig):
    """What a run proves about itself before step 0, and watches for during training."""

    preflight: bool  # checks on the real model and batch before step 0
    monitor: bool  # watch during training
    causality_positions: Count  # random positions at which later tokens are changed
    initial_loss_low: Annotated[float, Range(above=0)]  # times ln V; a first loss below it is reported
    initial_loss_high: Annotated[float, Range(above=0)]  # times ln V; a first loss above it is reported
    spike_deviations: Annotated[float, Range(above=0)]  # robust deviations above the running median
    spike_window: Annotated[int, Range(minimum=2)]  # optimizer steps in the running median
    max_nonfinite_steps: Natural  # steps with NaN or Inf that are skipped before the run stops
    leak_steps: Natural  # first optimizer steps in which a loss below the n-gram floor stops the run
    max_validation_gap: Annotated[float | None, Range(above=0)]  # nats of val/loss above train/loss; null: any
    plant_nan_at_step: Annotated[
        int | None, Range(minimum=1)
    ]  # test of the guards: the loss of this optimizer step becomes NaN


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides a run of train.py."""

    name: str  # the run lies in <output_dir>/<name>/
    seed: Annotated[int, Range(minimum=0, maximum=2**32 - 1)]
    check: bool  # build on the meta device, print sizes, do not train
    profile: bool  # write a trace of a few steps and their dearest operations into the run folder
    resume: str | None  # run folder to continue, or auto
    stop_at_step: Annotated[int | None, Range(minimum=1)]  # optimizer step after which the session saves and ends
    output_dir: str
    model: ModelConfig
    layers: LayersConfig
    size: SizeConfig
    loss: LossConfig
    trainer: TrainerConfig
    data: DataConfig
    tokenizer: TokenizerConfig
    embedding: EmbeddingConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    runtime: RuntimeConfig
    callbacks: CallbacksConfig
    logger: LoggerConfig
    evaluation: dict[str, EvaluationConfig]  # by name of the option
    guards: GuardsConfig


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Everything that decides a run of evaluate.py."""

    run: str  # run folder
    checkpoint: Literal["best", "last"]
    split: Literal["test", "validation"]
    batch_size: Annotated[int | None, Range(minimum=1)]  # blocks; null takes the run's own
    prompt: str | None  # text that evaluation=[generation] continues; null leaves evaluation.generation.prompt
    evaluation: dict[str, EvaluationConfig]  # by name of the option
    runtime: RuntimeConfig
