"""Tasks of the lm-evaluation-harness, answered by the function that would be deployed; its package is an extra."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch

from newllm.config.extras import not_installed
from newllm.config.fields import Count, Range
from newllm.config.schema import EvaluationConfig
from newllm.data.tokenizer import Tokenizer
from newllm.evaluation.material import Material
from newllm.evaluation.scoring import token_losses
from newllm.generation import GREEDY, SamplingOptions, generate
from newllm.losses.next_token import NO_TARGET
from newllm.reading import BoundedReader
from newllm.streaming import read_block

PIECE_TOKENS = 32  # written between two looks for a text that ends an answer


@dataclass(frozen=True, kw_only=True)
class HarnessConfig(EvaluationConfig):
    """Which tasks, and how much of them.

    Attributes:
        tasks: names the package knows, or paths of task files (.yaml).
        num_fewshot: solved examples before each question; null takes the task's own number.
        limit: documents of each task, the first ones; null takes all.
        batch_size: texts scored at once.
    """

    tasks: list[str]
    num_fewshot: Annotated[int | None, Range(minimum=0)]
    limit: Annotated[int | None, Range(minimum=1)]
    batch_size: Count

    def check(self, config: Any) -> list[str]:
        """Return what is wrong with the tasks, or between them and the run."""
        if not config.data.needs_tokenizer:
            return [
                f"evaluation=[harness]: asks in words, data of kind {config.data.kind} are token ids. "
                "Allowed with it: runs on text. Leave harness out of the list."
            ]
        if not self.tasks:
            return [
                "evaluation.harness.tasks=[]: asks nothing. Allowed: names of tasks, paths of task files. "
                "Write evaluation.harness.tasks=[lambada_openai] or [my_task.yaml]."
            ]
        absent = [task for task in self.tasks if task.endswith(".yaml") and not Path(task).is_file()]
        return [
            *(
                f"evaluation.harness.tasks: {task} does not exist. Allowed: a task file. Check the path."
                for task in absent
            ),
            *not_installed("evaluation=[harness]", "lm_eval", "harness", "the other options of evaluation"),
        ]


def measure(material: Material, options: HarnessConfig) -> dict[str, Any]:
    """Return the metrics of every task, by its name.

    Texts are read from the run's empty state by the exact model: memories keep all of a text, attention without a window
    reaches at most a block's length, as in training; nothing is cut off. A text without a context follows an end of text.

    Args:
        material: model and tokenizer.
        options: the tasks.
    Returns:
        For each task and group its metrics as the package names them, each with its standard error, `documents` and the
        task's `version`.
    Raises:
        ValueError: a task that is not known or whose data cannot be had.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    manager = TaskManager(include_defaults=not all(Path(task).is_file() for task in options.tasks))
    _check_known(options.tasks, manager.all_tasks)
    answers = _answering()(material, options.batch_size)
    try:
        found = lm_eval.simple_evaluate(
            model=answers,
            tasks=list(options.tasks),
            task_manager=manager,
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            log_samples=False,
        )
    except (OSError, ValueError, KeyError, TypeError) as error:  # whatever a task's file or its data raise
        raise ValueError(
            f"evaluation.harness.tasks={list(options.tasks)}: cannot be asked ({type(error).__name__}: "
            f"{' '.join(str(error).split())}). Allowed: tasks whose data are on this machine or can be fetched. "
            "Take a task file with local data, or connect to the hub."
        ) from error
    assert found is not None, "one process asks, so it gets the answers"
    return {name: _of_task(name, metrics, found) for name, metrics in found["results"].items()}


def _check_known(tasks: Sequence[str], known: Sequence[str]) -> None:
    for task in tasks:
        if task not in known and not Path(task).is_file():
            closest = difflib.get_close_matches(task, known, n=1)
            hint = f" Closest: {closest[0]}." if closest else ""
            raise ValueError(
                f"evaluation.harness.tasks: {task} is not a task. Allowed: the {len(known)} that `lm-eval ls tasks` lists, "
                f"or a path of a task file.{hint} Choose one of these."
            )


def _of_task(name: str, metrics: dict[str, Any], found: Any) -> dict[str, Any]:
    numbers = {
        key.removesuffix(",none"): value
        for key, value in metrics.items()
        if isinstance(value, int | float) and "," in key
    }
    counts = found.get("n-samples", {}).get(name, {})
    versions = found.get("versions", {})
    return {**numbers, "documents": counts.get("effective"), "version": versions.get(name)}


def _answering() -> type:
    """Return the class that the package asks: it derives from one of the package's own."""
    from lm_eval.api.model import TemplateLM

    class Answering(TemplateLM):
        """A run's model as the harness knows models.

        Args:
            material: model and tokenizer.
            batch_size: texts scored at once.
        """

        def __init__(self, material: Material, batch_size: int) -> None:
            super().__init__()
            assert material.tokenizer is not None, "only text is asked for"
            self._material, self._tokenizer, self._batch_size = material, material.tokenizer, batch_size
            self._length = material.run.config.data.block_length

        @property
        def eot_token_id(self) -> int:
            return self._tokenizer.eos_id

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return self._tokenizer.encode(string)

        def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
            return encode_pair(self._tokenizer, context, continuation)

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            return self._scores([(context, continuation) for _, context, continuation in requests])

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            texts = [self.tok_encode(request.args[0]) for request in requests]
            return [score for score, _ in self._scores([([self.eot_token_id], ids) for ids in texts])]

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            return [self._written(*request.args) for request in requests]

        def _scores(self, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
            # Texts of about one length together: the shorter ones of a batch wait for the longest.
            order = sorted(range(len(pairs)), key=lambda place: -len(pairs[place][0]) - len(pairs[place][1]))
            scores: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
            for start in range(0, len(order), self._batch_size):
                places = order[start : start + self._batch_size]
                found = score_continuations(
                    self._material.model,
                    [pairs[place] for place in places],
                    block_length=self._length,
                    padding=self.eot_token_id,
                )
                for place, score in zip(places, found, strict=True):
                    scores[place] = score
            return scores

        def _written(self, context: str, options: dict[str, Any]) -> str:
            prompt = self.tok_encode(context) or [self.eot_token_id]
            ends = options.get("until") or []
            ends = [ends] if isinstance(ends, str) else ends
            sampling = sampling_options(options)
            reader = BoundedReader(self._material.model, max(2, self._length // 2 * 2))
            state = self._material.model.initial_state(1)
            ids = torch.tensor([prompt], device=self._material.device)
            written: list[int] = []
            most = int(options.get("max_gen_toks", 256))
            while len(written) < most:
                count = min(PIECE_TOKENS, most - len(written))
                piece = generate(
                    reader,
                    ids,
                    state,
                    max_new_tokens=count,
                    options=sampling,
                    eos_id=self.eot_token_id,
                    seed=len(written),
                )
                written += piece.token_ids[0].tolist()
                ids, state = piece.token_ids[:, -1:], piece.state
                text = self._tokenizer.decode(_until(written, self.eot_token_id))
                if self.eot_token_id in written or any(end in text for end in ends):
                    break
            text = self._tokenizer.decode(_until(written, self.eot_token_id))
            return min((text.split(end)[0] for end in ends if end), key=len, default=text)

    return Answering


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Return the ids of a context and those of what follows it; EOS where the context has none.

    Spaces at the context's end go to the continuation: tokenizers cut before them. Where a token of the two together reaches over
    the cut, each is encoded by itself: the whole's ids after as many as the context has would be another text, or none.
    """
    words = context.rstrip()
    continuation = context[len(words) :] + continuation
    ids, whole = tokenizer.encode(words), tokenizer.encode(words + continuation)
    follows = whole[len(ids) :] if whole[: len(ids)] == ids else tokenizer.encode(continuation)
    return ids or [tokenizer.eos_id], follows


def _until(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids


def sampling_options(options: dict[str, Any]) -> SamplingOptions:
    """Return how an answer is drawn, from a task's generation options; greedily unless it says do_sample."""
    if not options.get("do_sample", False):
        return GREEDY
    return SamplingOptions(
        temperature=float(options.get("temperature", 1.0)),
        top_k=options.get("top_k"),
        top_p=float(options.get("top_p", 1.0)),
        min_p=0.0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
    )


@torch.inference_mode()
def score_continuations(
    model: Any, pairs: Sequence[tuple[list[int], list[int]]], *, block_length: int, padding: int
) -> list[tuple[float, bool]]:
    """Return for each (context, continuation) the log-likelihood of the continuation in nats, and whether greedy choice gives it.

    Args:
        model: any language model.
        pairs: token ids; a context holds at least one.
        block_length: tokens that attention without a window reaches at most.
        padding: any token id: what stands after a text's end is read by nothing that counts.
    """
    device = next(model.parameters()).device
    longest = max(1, *(len(context) + len(continuation) - 1 for context, continuation in pairs))
    inputs = torch.full((len(pairs), longest), padding, device=device)
    labels = torch.full_like(inputs, NO_TARGET)
    for row, (context, continuation) in enumerate(pairs):
        ids = torch.tensor([*context, *continuation], device=device)
        inputs[row, : len(ids) - 1] = ids[:-1]
        labels[row, len(context) - 1 : len(ids) - 1] = ids[len(context) :]
    nats = torch.zeros(len(pairs), dtype=torch.float64, device=device)
    is_greedy = torch.ones(len(pairs), dtype=torch.bool, device=device)
    state: Any = model.initial_state(len(pairs))
    for start, stop in _blocks(longest, block_length):
        output = read_block(model, state, inputs[:, start:stop], context_tokens=block_length // 2)
        losses, is_correct = token_losses(model, output.hidden, labels[:, start:stop])
        nats += losses.sum(dim=1)
        is_greedy &= (is_correct | (labels[:, start:stop] == NO_TARGET)).all(dim=1)
        state = output.state
    return list(zip((-nats).tolist(), is_greedy.tolist(), strict=True))


def _blocks(length: int, block_length: int) -> list[tuple[int, int]]:
    """The first block whole, then halves: with the half before them that attention keeps, they are as long as a block."""
    starts = [0, *range(block_length, length, max(1, block_length // 2))]
    return list(zip(starts, [*starts[1:], length], strict=True))
