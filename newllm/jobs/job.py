"""One job of a sweep: skipped where it is done, continued where it was interrupted, and never the end of the others."""

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from newllm.config.command_line import Job
from newllm.config.named_files import named_texts
from newllm.config.overrides import key_of, quoted
from newllm.config.run_folder import can_resume, differences
from newllm.data.text_files import find_files
from newllm.jobs.process import BUSY, run_fresh
from newllm.jobs.record import JobRecord
from newllm.run_record import read_run

SWEEP = "NEWLLM_SWEEP"
"""Environment variable of a job: the folder for the records of its sweep."""
STOPPED = (143, 130, -signal.SIGTERM, -signal.SIGINT)
"""Exit codes of a run that was told to stop."""


def is_job() -> bool:
    """Whether Hydra's task function is called for a job of a sweep, not for a single run."""
    return HydraConfig.get().mode == RunMode.MULTIRUN


def run_job(job: Job, script: Path) -> float | None:
    """Run a job in a fresh process and leave its record; return its last validation loss, None where there is none.

    It raises nothing where the job fails: launchers would end the sweep, or tell it only after the last job.

    Args:
        job: what Hydra asks for.
        script: train.py.
    """
    sweep = Path(os.environ[SWEEP])
    record = JobRecord(
        number=int(HydraConfig.get().job.num),
        overrides=job.overrides,
        folder=str(job.folder),
        status="running",
        started=time.time(),
        device=os.environ.get("CUDA_VISIBLE_DEVICES") or None,
    )
    started = time.monotonic()
    try:
        record.write(sweep)
        record = _outcome(job, script, record)
    except Exception as error:  # a full disk, a damaged run.json, a process that cannot be started: of this job alone
        record = replace(record, status="failed", reason=f"{type(error).__name__}: {error}")
    except BaseException:
        record = replace(record, status="stopped", reason="told to stop")
        raise
    finally:
        record = replace(record, seconds=time.monotonic() - started)
        record.write(sweep)
    return record.val_loss


def log_of(folder: Path) -> Path:
    """Return the file with all that a job says; where SLURM starts several processes of a job, one for each."""
    rank = os.environ.get("SLURM_PROCID", "0")
    return folder / ("log.txt" if rank == "0" else f"log_{rank}.txt")


def _outcome(job: Job, script: Path, record: JobRecord) -> JobRecord:
    if job.config.check:
        code = run_fresh(script, _arguments(job, None), log=None)
        return replace(record, status="checked" if code == 0 else "failed")
    if (job.folder / "DONE").exists():
        changed = differences(job.folder, job.config)
        if changed:
            return replace(
                record, status="refused", reason=f"done with other settings; remove the folder. {changed[0]}"
            )
        return replace(record, status="skipped", val_loss=_val_loss(job.folder), reason=_newer_text(job))
    if not can_resume(job.folder):  # of a start that came to nothing: the options may have changed since
        (job.folder / "config.yaml").unlink(missing_ok=True)
    log = log_of(job.folder)
    begin = log.stat().st_size if log.exists() else 0
    code = run_fresh(script, _arguments(job, job.folder), log=log)
    return _judged(record, code, job.folder, _tail(log, begin))


def _arguments(job: Job, folder: Path | None) -> list[str]:
    """Return the command line of the job as a single run."""
    arguments = [*(text for text in job.overrides if key_of(text) != "resume"), "hydra.mode=RUN"]
    if folder is None:
        return arguments
    if can_resume(folder):
        arguments.append(f"resume={quoted(str(folder))}")
    return [*arguments, f"hydra.run.dir={quoted(str(folder))}"]


def _judged(record: JobRecord, code: int, folder: Path, lines: Sequence[str]) -> JobRecord:
    if code == 0:
        facts = read_run(folder).facts
        status = "done" if facts["status"] == "finished" else "stopped"
        reason = "" if status == "done" else str(facts["exit_reason"])
        return replace(record, status=status, val_loss=_val_loss(folder), reason=reason)
    if code == BUSY:
        return replace(record, status="busy", reason="another process runs this job")
    if code in STOPPED:
        return replace(record, status="stopped", reason="told to stop")
    if code < 0:
        hint = " (out of memory?)" if code == -signal.SIGKILL else ""
        return replace(record, status="killed", reason=f"by {signal.Signals(-code).name}{hint}")
    if code == 2:
        problems = [line.removeprefix("  - ") for line in lines if line.startswith("  - ")]
        return replace(record, status="refused", reason=" ".join(problems) or "see the log")
    if (folder / "FAILED").exists():
        return replace(record, status="failed", reason=str(read_run(folder).facts["exit_reason"]))
    told = [line for line in lines if "HYDRA_FULL_ERROR" not in line]  # how to see more, not what happened
    return replace(record, status="failed", reason=told[-1] if told else f"exit code {code}")


def _newer_text(job: Job) -> str:
    """Return what to tell of a job that is done where its own text has been written since; nothing else reads it again."""
    done = (job.folder / "DONE").stat().st_mtime
    newer = [
        key
        for key, path in named_texts(job.config).items()
        if any(file.stat().st_mtime > done for file in find_files(path, key=key)[0])
    ]
    return f"{' and '.join(newer)} changed since: remove the folder to train on it" if newer else ""


def _val_loss(folder: Path) -> float | None:
    return read_run(folder).facts.get("metrics", {}).get("val/loss")


def _tail(log: Path, begin: int) -> list[str]:
    """Return the lines that this session wrote; none where it was killed before it could."""
    if not log.exists():
        return []
    with open(log, encoding="utf-8", errors="replace") as file:
        file.seek(begin)
        return [line.rstrip() for line in file if line.strip()]
