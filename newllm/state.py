"""State: what a model keeps between two calls, as a value that the caller owns."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from newllm.whole_file import whole_file

FORMAT_VERSION = "1"

Part = TypeVar("Part", bound="State")


@dataclass(frozen=True)
class State:
    """What one layer or model keeps for each text of a batch; every operation returns a new value.

    A subclass is a frozen dataclass whose fields are tensors with the batch axis first, other states, tuples of states, or tuples
    with one int per text (counters that decide control flow and therefore live on the host). All zeros means empty, so an
    empty state and a reset row are the same thing. Field metadata `ragged` marks tensors [B, H, L, d] that are right-aligned on
    axis 2, `shared` marks values that are not per text.
    """

    def detach(self) -> Self:
        """Return the state cut from the graph that made it."""
        return self._map(lambda tensor, _: tensor.detach())

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Return the state on another device or in another floating dtype; arguments as in `Tensor.to`."""

        def move(tensor: Tensor, _: dataclasses.Field) -> Tensor:
            # Masks and counters keep their dtype; a dtype in the arguments is for floating tensors.
            if tensor.is_floating_point() or not any(isinstance(a, torch.dtype) for a in (*args, *kwargs.values())):
                return tensor.to(*args, **kwargs)
            return tensor

        return self._map(move)

    def reset(self, mask_B: Tensor | Sequence[bool], *, keep_frozen: bool = True) -> Self:
        """Return the state with the rows where `mask_B` is True emptied; layers with frozen memory keep that unless told otherwise.

        Raises:
            ValueError: more or fewer rows than the state has.
        """
        rows = [bool(row) for row in (mask_B.tolist() if isinstance(mask_B, Tensor) else mask_B)]
        if len(rows) != self.num_rows:
            raise ValueError(
                f"reset: was told of {len(rows)} rows, the state holds {self.num_rows}. Allowed: equal numbers. "
                "Give True or False for each."
            )
        if not any(rows):
            return self
        return self._reset(rows, keep_frozen)

    def select(self, rows: Sequence[int]) -> Self:
        """Return the state of the given rows, in the given order."""
        index = torch.tensor(list(rows))
        return self._map(
            lambda tensor, _: tensor.index_select(0, index.to(tensor.device)),
            lambda counts: tuple(counts[row] for row in rows),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, for all rows together."""
        return sum(
            tensor.numel() * tensor.element_size() for tensor in tensors_of(self).values() if tensor.is_floating_point()
        )

    @property
    def num_rows(self) -> int:
        """Texts in the batch."""
        for field, value in self._values():
            if field.metadata.get("shared"):
                continue
            if isinstance(value, Tensor):
                return value.shape[0]
            if isinstance(value, State):
                return value.num_rows
            if isinstance(value, tuple) and value:
                return value[0].num_rows if isinstance(value[0], State) else len(value)
        raise TypeError(
            f"{type(self).__name__}: holds nothing per text. Allowed: states with at least one field. Add one."
        )

    def save(self, path: str | Path, *, metadata: dict[str, str] | None = None) -> None:
        """Write the state as safetensors, whole or not at all.

        Args:
            path: file to write; folders on the way to it are made.
            metadata: further strings for the header, for instance the fingerprint of the model the state belongs to.
        Raises:
            ValueError: no file can be written there; the state is as it was.
        """
        from safetensors.torch import save as serialize

        advice = (
            "Allowed: a path of a file on a disk that takes it. What was to be saved is still here: save it elsewhere."
        )
        if Path(path).is_dir():
            raise ValueError(f"{path}: is a folder. {advice}")
        header = {"format": FORMAT_VERSION, "kind": type(self).__name__, **(metadata or {})}
        tensors = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in tensors_of(self).items()
        }
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            with whole_file(Path(path)) as file:
                file.write(serialize(tensors, metadata=header))
        except OSError as error:
            is_blocked = isinstance(error, FileExistsError | NotADirectoryError)
            reason = "a folder on the way is a file" if is_blocked else error.strerror
            raise ValueError(f"{path}: cannot be written ({reason}). {advice}") from error

    def load(self, path: str | Path) -> Self:
        """Return the state that `save` wrote, with the structure of this one (for instance a model's `initial_state`).

        Raises:
            ValueError: the file is of another format or structure.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                # Copies: products of numbers that lie where a file happens to have them round otherwise on some processors.
                header, tensors = file.metadata() or {}, {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(
                f"{path}: is damaged or no safetensors file ({error}). Allowed: files written by State.save."
            ) from error
        if header.get("format") != FORMAT_VERSION:
            raise ValueError(
                f"{path}: has state format {header.get('format')!r}. Allowed: {FORMAT_VERSION!r}. Write it again with this version."
            )
        expected = tensors_of(self)
        if set(tensors) != set(expected):
            missing, extra = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
            raise ValueError(
                f"{path}: holds another structure (missing {missing}, extra {extra}). Allowed: a state of the same model."
            )
        return from_tensors(self, tensors)

    def _values(self) -> Iterator[tuple[dataclasses.Field, Any]]:
        return ((field, getattr(self, field.name)) for field in dataclasses.fields(self))

    def _map(
        self,
        on_tensor: Callable[[Tensor, dataclasses.Field], Tensor],
        on_counts: Callable[[tuple[int, ...]], tuple[int, ...]] = lambda counts: counts,
    ) -> Self:
        """Return the state with the functions applied to all its tensors and per-row counters, nested ones included."""
        changed: dict[str, Any] = {}
        for field, value in self._values():
            if isinstance(value, Tensor):
                changed[field.name] = value if field.metadata.get("shared") else on_tensor(value, field)
            elif isinstance(value, State):
                changed[field.name] = value._map(on_tensor, on_counts)
            elif isinstance(value, tuple) and value and isinstance(value[0], State):
                changed[field.name] = tuple(state._map(on_tensor, on_counts) for state in value)
            elif isinstance(value, tuple) and not field.metadata.get("shared"):
                changed[field.name] = on_counts(value)
        return dataclasses.replace(self, **changed)

    def _reset(self, rows: list[bool], keep_frozen: bool) -> Self:
        nested: dict[str, Any] = {}
        for field, value in self._values():
            if isinstance(value, State):
                nested[field.name] = value._reset(rows, keep_frozen)
            elif isinstance(value, tuple) and value and isinstance(value[0], State):
                nested[field.name] = tuple(state._reset(rows, keep_frozen) for state in value)
            elif isinstance(value, Tensor) and not field.metadata.get("shared"):
                mask = torch.tensor(rows, device=value.device).view(-1, *[1] * (value.dim() - 1))
                nested[field.name] = value.masked_fill(mask, 0)
            elif isinstance(value, tuple) and not field.metadata.get("shared"):
                nested[field.name] = tuple(
                    0 if is_reset else count for is_reset, count in zip(rows, value, strict=True)
                )
        return dataclasses.replace(self, **nested)


def tensors_of(state: State, prefix: str = "") -> dict[str, Tensor]:
    """Return every value of a state by its dotted name; counters and flags as int64 tensors."""
    found: dict[str, Tensor] = {}
    for field, value in state._values():
        name = f"{prefix}{field.name}"
        if isinstance(value, Tensor):
            found[name] = value
        elif isinstance(value, State):
            found |= tensors_of(value, f"{name}.")
        elif isinstance(value, tuple) and value and isinstance(value[0], State):
            for index, part in enumerate(value):
                found |= tensors_of(part, f"{name}.{index}.")
        elif isinstance(value, tuple):
            found[name] = torch.tensor(value, dtype=torch.int64)
    return found


def from_tensors(like: State, tensors: dict[str, Tensor], prefix: str = "") -> Any:
    """Return a state structured as `like` from the values that `tensors_of` gave."""
    changed: dict[str, Any] = {}
    for field, value in like._values():
        name = f"{prefix}{field.name}"
        if isinstance(value, Tensor):
            changed[field.name] = tensors[name].to(value.device)
        elif isinstance(value, State):
            changed[field.name] = from_tensors(value, tensors, f"{name}.")
        elif isinstance(value, tuple) and value and isinstance(value[0], State):
            changed[field.name] = tuple(from_tensors(part, tensors, f"{name}.{i}.") for i, part in enumerate(value))
        elif isinstance(value, tuple):
            kind = bool if value and isinstance(value[0], bool) else int
            changed[field.name] = tuple(kind(entry) for entry in tensors[name].tolist())
    return dataclasses.replace(like, **changed)


def parts_of(state: State, kind: type[Part], prefix: str = "") -> dict[str, Part]:
    """Return the parts of a kind, however deep they are nested, by their dotted names."""
    found: dict[str, Part] = {}

    def note(name: str, part: Part) -> Part:
        found[name] = part
        return part

    map_parts(state, kind, note, prefix)
    return found


def map_parts(state: Any, kind: type[Part], change: Callable[[str, Part], Part], prefix: str = "") -> Any:
    """Return the state with every part of a kind replaced by `change(dotted name, part)`."""
    if isinstance(state, kind):
        return change(prefix.removesuffix("."), state)
    changed: dict[str, Any] = {}
    for field, value in state._values():
        name = f"{prefix}{field.name}."
        if isinstance(value, State):
            changed[field.name] = map_parts(value, kind, change, name)
        elif isinstance(value, tuple) and value and isinstance(value[0], State):
            changed[field.name] = tuple(map_parts(part, kind, change, f"{name}{i}.") for i, part in enumerate(value))
    return dataclasses.replace(state, **changed)


def merge_rows(parts: Sequence[tuple[Sequence[int], State]]) -> Any:
    """Return one state from states of disjoint rows: the inverse of `select` over a partition of the batch."""
    order = [row for rows, _ in parts for row in rows]
    back = [order.index(row) for row in range(len(order))]
    first = parts[0][1]
    changed: dict[str, Any] = {}
    for field, value in first._values():
        values = [getattr(state, field.name) for _, state in parts]
        if field.metadata.get("shared"):
            continue
        if isinstance(value, Tensor):
            if field.metadata.get("ragged"):
                values = _right_align(values)
            joined = torch.cat(values)
            changed[field.name] = joined.index_select(0, torch.tensor(back, device=joined.device))
        elif isinstance(value, State):
            changed[field.name] = merge_rows([(rows, getattr(state, field.name)) for rows, state in parts])
        elif isinstance(value, tuple) and value and isinstance(value[0], State):
            changed[field.name] = tuple(
                merge_rows([(rows, getattr(state, field.name)[i]) for rows, state in parts]) for i in range(len(value))
            )
        elif isinstance(value, tuple):
            joined_counts = [count for counts in values for count in counts]
            changed[field.name] = tuple(joined_counts[index] for index in back)
    return dataclasses.replace(first, **changed)


def _right_align(tensors_BHLd: list[Tensor]) -> list[Tensor]:
    """Pad axis 2 on the left with zeros up to the longest."""
    longest = max(tensor.shape[2] for tensor in tensors_BHLd)
    return [torch.nn.functional.pad(tensor, (0, 0, longest - tensor.shape[2], 0)) for tensor in tensors_BHLd]


def by_groups(
    forward: Callable[[Tensor, Any], tuple[Tensor, Any]], hidden_BTD: Tensor, state: Any, keys: Sequence[Any]
) -> tuple[Tensor, Any]:
    """Run a layer on each group of rows whose counters agree, and join the results in the rows' order.

    Rows of a batch stand at the same place of their texts until one of them is reset; a layer therefore writes its forward for rows
    that agree, and this keeps it right, at the price of one call per group, when they do not.

    Args:
        forward: (hidden, state) -> (hidden, state) for rows that agree.
        hidden_BTD: input [B, T, D].
        state: the layer's state.
        keys: one hashable per row; rows with equal keys go together.
    """
    groups: dict[Any, list[int]] = {}
    for row, key in enumerate(keys):
        groups.setdefault(key, []).append(row)
    if len(groups) == 1:
        return forward(hidden_BTD, state)
    outputs, parts = [], []
    for rows in groups.values():
        output, next_state = forward(hidden_BTD[rows], state.select(rows))
        outputs.append(output)
        parts.append((rows, next_state))
    order = [row for rows in groups.values() for row in rows]
    back = torch.tensor([order.index(row) for row in range(len(order))], device=hidden_BTD.device)
    return torch.cat(outputs).index_select(0, back), merge_rows(parts)


def describe(state: State) -> str:
    """Return the names, shapes and dtypes of a state's tensors as JSON, for headers and error texts."""
    return json.dumps({name: [list(tensor.shape), str(tensor.dtype)] for name, tensor in tensors_of(state).items()})
