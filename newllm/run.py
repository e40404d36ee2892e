"""The story of one run: build, guard, fit, evaluate, record."""

from __future__ import annotations

import logging
import shlex
import sys
import time
import warnings
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping

from newllm import ranks
from newllm.callbacks.checkpoints import Checkpoints
from newllm.callbacks.clock import Clock
from newllm.callbacks.eager_validation import EagerValidation
from newllm.callbacks.logger import Logger
from newllm.callbacks.loggers import build_loggers
from newllm.callbacks.loop import validate_every
from newllm.callbacks.probe import Probe
from newllm.callbacks.profile import ProfileSteps
from newllm.callbacks.progress import Progress
from newllm.callbacks.samples import Samples
from newllm.callbacks.stop import EXIT_CODES, StopAtStep, StopOnSignal
from newllm.callbacks.telemetry import Telemetry
from newllm.callbacks.validate_at_end import ValidateAtEnd
from newllm.callbacks.weight_average import WeightAverage
from newllm.closing import closing_lines
from newllm.config.command_line import refuse
from newllm.config.problems import told
from newllm.config.run_folder import FIRST_PHASE, can_resume
from newllm.config.schema import TrainConfig
from newllm.config.typed import config_hash, plain, real_config
from newllm.cost import check_memory, describe_cost, out_of_memory
from newllm.data.loader import dead_workers_named
from newllm.data.module import TextDataModule, build_data
from newllm.embedding import embedding_table, freeze_embedding, set_embedding, token_embedding
from newllm.evaluation.suite import run_suite
from newllm.generation import sample_texts
from newllm.guards.monitor import Monitor
from newllm.guards.preflight import run_preflight
from newllm.guards.verdict import GuardFailure, Verdict, require_passed, switched_off
from newllm.hardware import (
    check_devices,
    compile_layers,
    set_threads,
    spare_filling,
    trainer_flags,
    use_fused_kernels,
    warn_of_loss,
)
from newllm.host_memory import keep_freed_memory
from newllm.launch import agreed, joined
from newllm.load import load_run, resumed_checkpoint
from newllm.models.base import LanguageModel, count_parameters
from newllm.models.create import build_model, load_published
from newllm.plain_warnings import show_plainly
from newllm.report.curves import draw_curves
from newllm.run_lock import only_writer
from newllm.run_record import RunRecord, last_and_best, read_metrics, read_run
from newllm.trainers.base import TrainingModule
from newllm.trainers.build import build_training_module


@dataclass(frozen=True)
class Prepared:
    """A run before any work: everything built and found possible."""

    config: TrainConfig
    folder: Path
    data: TextDataModule
    model: LanguageModel
    module: TrainingModule
    checkpoint: Path | None


@dataclass(frozen=True)
class Session:
    """The callbacks that know afterwards what happened; the clock is that of the rank that leaves the record."""

    telemetry: Telemetry
    monitor: Monitor | None
    checkpoints: Checkpoints
    stop: StopOnSignal
    stop_at: StopAtStep | None
    clock: Clock | None
    loggers: list[Logger]


def run_training(config: TrainConfig, folder: Path, overrides: list[str]) -> float | None:
    """Run a configuration from beginning to end.

    Args:
        config: the whole configuration.
        folder: run folder.
        overrides: what the user typed.
    Returns:
        The last validation loss, nats per token; None where only the cost was asked for.
    Raises:
        SystemExit: 2 refused before any work, 143 or 130 stopped by SIGTERM or Ctrl-C after saving.
        GuardFailure: the run cannot be believed.
    """
    _quieten()
    config = real_config(config)
    set_threads(config.runtime)
    spare_filling()
    if config.runtime.accelerator == "cpu":
        keep_freed_memory()
    with ExitStack() as held:
        try:
            if config.check:
                print(describe_cost(config))
                return None
            check_devices(config.runtime)
            folder = held.enter_context(joined(config, folder, overrides))
            prepared = agreed(lambda: _prepare_alone(config, folder, held))
        except (ValueError, TypeError) as error:
            refuse([told(error)])
        if ranks.rank() > 0:
            _followed(prepared)
            return None
        warn_of_loss(config.runtime)
        return _recorded(prepared, overrides)


def _prepare_alone(config: TrainConfig, folder: Path, held: ExitStack) -> Prepared:
    """Build everything, and keep other runs out of the folder; the other ranks of this one share it."""
    prepared = _prepare(config, folder)
    if ranks.rank() == 0:
        held.enter_context(only_writer(folder))
    return prepared


def _followed(prepared: Prepared) -> None:
    """Train as one of the ranks that leave no record; rank 0 tells what comes of it."""
    try:
        require_passed(_preflight(prepared))
        _fit(prepared, _session(prepared, clock=None))
    except GuardFailure:
        raise SystemExit(1) from None


def _recorded(prepared: Prepared, overrides: list[str]) -> float | None:
    """Train and evaluate; the record in the folder says how it ended, whatever happens."""
    config, folder, started = prepared.config, prepared.folder, time.monotonic()
    record = RunRecord(folder)
    try:
        record.begin(
            config=plain(config),
            seed=config.seed,
            config_hash=config_hash(config),
            overrides=overrides,
            **_facts(prepared),
        )
        return _train_and_record(prepared, record, started)
    except BaseException as error:
        with suppress(OSError):  # the full disk that ended the run: its own message is the one to see
            _record_end(record, error, wall_seconds=time.monotonic() - started)
        if isinstance(error, KeyboardInterrupt):  # called from Python: the programs have a handler of their own
            raise SystemExit(EXIT_CODES["SIGINT"]) from None
        raise
    finally:
        print(f"run: {folder}", flush=True)


def _record_end(record: RunRecord, error: BaseException, *, wall_seconds: float) -> None:
    if not record.facts:  # it could not begin
        return
    if record.facts["status"] == "finished":  # trained and recorded: an error in measuring it does not undo that
        command = f"python evaluate.py {shlex.quote(f'run={record.folder}')}"
        print(f"the run is finished, what follows it was left out: {command} measures it")
    elif not isinstance(error, SystemExit | KeyboardInterrupt):
        record.fail(error, wall_seconds=wall_seconds)
    elif record.facts["status"] == "running":
        _record_stop(record, "told to stop before the first step", wall_seconds=wall_seconds)


def _record_stop(record: RunRecord, reason: str, *, wall_seconds: float) -> None:
    """Record a run that stops without a step more than it has saved."""
    last, best = last_and_best(read_metrics(record.folder))
    record.finish(
        status="stopped",
        exit_reason=reason,
        tokens=record.facts.get("tokens", 0),
        tokens_per_second=0.0,
        wall_seconds=wall_seconds,
        metrics=last,
        best_metrics=best,
    )


def _quieten() -> None:
    """Our own lines on stderr; of Lightning's only what asks for attention."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    show_plainly()
    # All are about the insides of libraries: nothing a user of ours could change.
    warnings.filterwarnings("ignore", message=".*set_vital.*")
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")
    warnings.filterwarnings("ignore", message=".*`IterableDataset` has `__len__` defined.*")
    warnings.filterwarnings("ignore", message=".*You have overridden `transfer_batch_to_device`.*")


def _prepare(config: TrainConfig, folder: Path) -> Prepared:
    """Build everything, or say what cannot be; nothing is written but the cache of tokenised texts."""
    is_new = config.resume is None or _is_in_first_run(folder)
    checkpoint = None if is_new else resumed_checkpoint(folder, stop_at_step=config.stop_at_step)
    read_metrics(folder)  # a damaged line is told before anything is built: training goes on after the last one
    lightning.seed_everything(config.seed, workers=True, verbose=False)
    saved = folder / "tokenizer.json"
    data = build_data(config, tokenizer_file=saved if config.resume is not None and saved.is_file() else None)
    data.prepare()
    if config.resume is not None:  # before the record says anything of other data
        data.require_same(read_run(folder).facts.get("data_fingerprint", data.fingerprint))
    check_memory(config, data.vocab_size)
    # The weights depend on the seed alone, not on how many numbers reading the data drew.
    torch.manual_seed(config.seed)
    model = build_model(config, data.vocab_size)
    if checkpoint is None:
        load_published(model, config)
    if config.embedding.kind != "random" and checkpoint is None:
        set_embedding(model, embedding_table(config.embedding, data, token_embedding(model).embedding_dim))
    if config.embedding.freeze:
        freeze_embedding(model)
    module = build_training_module(
        model, config, data.token_bytes, num_samples=data.num_train_samples, folder=folder, data=data
    )
    use_fused_kernels(model, config.runtime)
    if config.runtime.compile:
        compile_layers(model)
    return Prepared(config, folder, data, model, module, checkpoint)


def _is_in_first_run(folder: Path) -> bool:
    """Whether an interrupted run has made no step of its own: it was still making the one that comes before."""
    return (folder / FIRST_PHASE).is_dir() and not (folder / "checkpoints" / "last.ckpt").is_file()


def _has_first_run(prepared: Prepared, overrides: list[str]) -> bool:
    """Make the run that this one builds on, inside its folder, and take what it came to; False where it was stopped."""
    config, folder = prepared.module.first_run(), prepared.folder / FIRST_PHASE
    if config is None:
        return True
    if not (folder / "DONE").exists():
        try:
            inner = _prepare(replace(config, resume=str(folder) if can_resume(folder) else None), folder)
        except (ValueError, TypeError) as error:
            refuse([told(error)])
        _recorded(inner, overrides)
        lightning.seed_everything(prepared.config.seed, workers=True, verbose=False)
    if not (folder / "DONE").exists():
        return False
    prepared.module.take(folder)
    return True


def _facts(prepared: Prepared) -> dict[str, Any]:
    """What run.json says of a run before its first step."""
    config, model, data = prepared.config, prepared.model, prepared.data
    length = config.data.block_length
    return {
        "data": data.facts,
        "data_fingerprint": data.fingerprint,
        "vocab_size": data.vocab_size,
        "parameters": count_parameters(model),
        "state_bytes": model.state_bytes(length),
        "flops_per_token": model.flops_per_token(length),
    }


def _train_and_record(prepared: Prepared, record: RunRecord, started: float) -> float | None:
    config, folder = prepared.config, prepared.folder
    if prepared.data.tokenizer is not None:
        prepared.data.tokenizer.save(folder / "tokenizer.json")
    verdicts = _preflight(prepared)
    record.update(guards=[asdict(verdict) for verdict in verdicts])
    require_passed(verdicts)
    if not _has_first_run(prepared, record.facts["overrides"]):
        _record_end(record, SystemExit(0), wall_seconds=time.monotonic() - started)
        return None
    session = _session(prepared, clock=Clock(record, started))
    try:
        _fit(prepared, session)
    except SystemExit:  # a second Ctrl-C
        told = "told twice to stop: at once, without what came after the last checkpoint"
        _record_stop(record, told, wall_seconds=time.monotonic() - started)
        raise
    finally:
        verdicts += session.monitor.verdicts() if session.monitor is not None else [switched_off("monitor")]
        record.update(guards=[asdict(verdict) for verdict in verdicts], data=prepared.data.facts)
    reason = session.stop.reason or (session.stop_at.reason if session.stop_at is not None else None)
    last, best = last_and_best(read_metrics(folder))
    for logger in session.loggers:
        logger.summary(plain(config), last)
        logger.close()
    draw_curves(folder)
    record.finish(
        status="finished" if reason is None else "stopped",
        exit_reason=reason or _ending(prepared, session.checkpoints.last_step),
        tokens=session.telemetry.tokens,
        tokens_per_second=session.telemetry.tokens_per_second,
        wall_seconds=time.monotonic() - started,
        metrics=last,
        best_metrics=best,
    )
    record.update(**prepared.module.facts())
    if reason is not None:
        whole = folder.parent if folder.name == FIRST_PHASE else folder
        print(
            f"stopped by {reason}; saved {session.checkpoints.last_path}. Continue with: {shlex.quote(f'resume={whole}')}"
        )
        if session.stop.exit_code:
            raise SystemExit(session.stop.exit_code)
        return last.get("val/loss")
    results = {}
    if (folder / "checkpoints" / "best.ckpt").is_file():
        results = run_suite(load_run(folder, "best"), config.evaluation)
    else:
        print("nothing is evaluated: val/loss was never finite, so that no weights are the best")
    print(closing_lines(config, folder, results))
    return last.get("val/loss")


def _ending(prepared: Prepared, last_step: int | None) -> str:
    if prepared.module.stop_reason is not None:
        return prepared.module.stop_reason
    if last_step == prepared.module.max_steps:
        return f"trainer.max_steps={last_step} made"
    patience = prepared.config.trainer.early_stopping_patience
    return f"early stopping at step {last_step}: {patience} validations without a better val/loss; the best weights are kept"


def _preflight(prepared: Prepared) -> list[Verdict]:
    if not prepared.config.guards.preflight:
        return [switched_off("preflight")]
    # A loader of its own: looking at a batch must not move the one that training reads.
    batch = next(iter(prepared.data.block_dataloader()))
    return run_preflight(
        prepared.model,
        batch,
        prepared.data,
        prepared.data.tokenizer,
        prepared.config.guards,
        prepared.config.seed,
        is_fresh=prepared.checkpoint is None and getattr(prepared.config.model, "pretrained", None) is None,
    )


def _session(prepared: Prepared, *, clock: Clock | None) -> Session:
    config, folder = prepared.config, prepared.folder
    loggers = build_loggers(config.logger, folder, plain(config))
    telemetry = Telemetry(
        folder,
        log_every_steps=config.trainer.log_every_steps,
        loggers=loggers,
        train_flops_per_token=prepared.module.training_flops_per_token(prepared.model, config),
        precision=config.runtime.precision,
    )
    is_pretrained = getattr(config.model, "pretrained", None) is not None
    floor = (
        None
        if is_pretrained or not prepared.module.predicts_tokens
        else prepared.data.facts.get("floor_nats_per_token")
    )
    monitor = Monitor(config.guards, folder, floor_nats=floor) if config.guards.monitor else None
    checkpoints = Checkpoints(
        folder / "checkpoints", every_steps=config.trainer.checkpoint_every_steps, monitor=prepared.module.monitor
    )
    stop_at = None if config.stop_at_step is None else StopAtStep(config.stop_at_step)
    return Session(telemetry, monitor, checkpoints, StopOnSignal(), stop_at, clock, loggers)


def _callbacks(prepared: Prepared, session: Session) -> list[Callback]:
    """All callbacks, in the order that their work needs: what measures speed before what costs time, checkpoints last."""
    config, module = prepared.config, prepared.module
    options = config.callbacks
    found: list[Callback | None] = [
        ProfileSteps(prepared.folder) if config.profile else None,
        None if options.lag_every_steps is None else Probe(every_steps=options.lag_every_steps),
        session.telemetry,
        session.monitor,
        Progress(every_seconds=options.progress_every_seconds, stream=sys.stderr),
        ValidateAtEnd(),
        EagerValidation() if config.runtime.compile else None,
        session.stop,
        session.stop_at,
        session.clock,
    ]
    if config.trainer.ema_decay is not None:
        found.append(WeightAverage(config.trainer.ema_decay))
    if config.trainer.early_stopping_patience is not None and module.monitor is not None:
        found.append(EarlyStopping(module.monitor, patience=config.trainer.early_stopping_patience, verbose=False))
    if options.sample_every_steps is not None and prepared.data.tokenizer is not None and module.predicts_tokens:
        found.append(_samples(prepared, options.sample_every_steps, session.loggers))
    found.append(session.checkpoints)
    return [callback for callback in found if callback is not None]


def _samples(prepared: Prepared, every_steps: int, loggers: list[Logger]) -> Samples:
    options, longest = prepared.config.callbacks, prepared.model.max_positions
    prompts = next(iter(prepared.data.val_dataloader()))["input_ids"][:2, :16]
    # The last new token is not read.
    new_tokens = (
        options.sample_tokens if longest is None else min(options.sample_tokens, longest - prompts.shape[1] + 1)
    )

    def sample() -> list[str]:
        assert prepared.data.tokenizer is not None, "only text is sampled"
        return sample_texts(
            prepared.model,
            prepared.data.tokenizer,
            prompts,
            max_new_tokens=new_tokens,
            seed=prepared.config.seed,
        )

    return Samples(prepared.folder, every_steps=every_steps, sample=sample, loggers=loggers)


def _fit(prepared: Prepared, session: Session) -> None:
    config, module = prepared.config, prepared.module
    trainer = lightning.Trainer(
        default_root_dir=prepared.folder,
        **trainer_flags(config.runtime),
        max_steps=module.max_steps,
        max_epochs=-1,
        accumulate_grad_batches=module.accumulate_batches,
        val_check_interval=1,  # `validate_every` has the last word
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=_callbacks(prepared, session),
    )
    validate_every(trainer, config.trainer.validate_every_steps)
    with session.stop, dead_workers_named(config.data.num_workers):
        try:
            trainer.fit(module, datamodule=prepared.data, ckpt_path=prepared.checkpoint)
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(out_of_memory(config, prepared.data.vocab_size)) from error
