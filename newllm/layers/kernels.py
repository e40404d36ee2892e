"""Memory kernels: how a bank stores associations and answers queries. The paper's, and two that take out what all keys share.

m: queries of a segment that are asked in this call. L: tokens of the segment so far. n: segments side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from newllm.layers import fused_delta
from newllm.layers.memory import Bank, LinearMemory, WriteRule, divide
from newllm.layers.segments import Segments, Tokens, causal, side_by_side


class Segment(NamedTuple):
    """Segments as a memory sees them: side by side, one of them (without the axis n), or each as a row of its own (n with B).

    Attributes:
        queries: features of the queries [B, H, n, m, d].
        keys: features of the keys [B, H, n, L, d].
        key_sum: their sum [B, H, n, d].
        values: [B, H, n, L, d].
        products: what the kernel computed ahead.
    """

    queries: Tensor
    keys: Tensor
    key_sum: Tensor
    values: Tensor
    products: tuple[Tensor, ...] = ()

    def one_by_one(self) -> list[Segment]:
        """Return segments that stand side by side one by one."""
        return [self._of(tensors) for tensors in zip(*(tensor.unbind(2) for tensor in self._tensors()), strict=True)]

    def as_rows(self) -> Segment:
        """Return segments that stand side by side as rows, a text's segments one after another."""
        if self.keys.shape[2] == 1:  # a step of one token: an operation less for each
            return self._of([tensor.squeeze(2) for tensor in self._tensors()])
        return self._of([tensor.transpose(1, 2).flatten(0, 1) for tensor in self._tensors()])

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.queries, self.keys, self.key_sum, self.values, *self.products

    def _of(self, tensors: Sequence[Tensor]) -> Segment:
        queries, keys, key_sum, values, *products = tensors
        return Segment(queries, keys, key_sum, values, tuple(products))


class Kernel:
    """What a memory layer asks of a kernel; as it stands here, the linear write that all but the delta rules share.

    Attributes:
        rule: "linear" adds every value; "delta" adds what the bank does not already answer.
        keeps: sums of `Bank` it needs besides matrix and norm.
        has_strengths: tokens say how much of their value they write.
        reads_open_segment: reads see the tokens of the query's own segment too, up to the query.
        fused: a device's kernel for whole segments of one bank, with which `pass_over` trains; None where there is none.
    """

    keeps: ClassVar[frozenset[str]] = frozenset()
    has_strengths: ClassVar[bool] = False
    reads_open_segment: ClassVar[bool] = False
    fused: fused_delta.Rule | None = None

    def __init__(self, rule: WriteRule = "linear") -> None:
        self.rule: WriteRule = rule

    def empty(
        self,
        batch_size: int,
        num_banks: int,
        num_heads: int,
        head_dim: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> LinearMemory:
        """Return a memory that was never written."""

        def zeros(name: str, *shape: int) -> Tensor:
            is_kept = name in ("matrix", "norm") or name in self.keeps
            sizes = shape if is_kept else (*shape[:-1], 0)
            return torch.zeros(batch_size, num_banks, *sizes, device=device, dtype=dtype)

        return LinearMemory(
            zeros("matrix", num_heads, head_dim, head_dim),
            zeros("norm", num_heads, head_dim),
            zeros("value_sum", num_heads, head_dim),
            zeros("tokens", 1),
            zeros("gram", num_heads, head_dim, head_dim),
            rule=self.rule,
        )

    def memory_bytes(self, num_banks: int, num_heads: int, head_dim: int) -> int:
        """Return the bytes of one text's memory in fp32."""
        per_head = head_dim * (head_dim + 1)
        per_head += head_dim * ("value_sum" in self.keeps) + head_dim**2 * ("gram" in self.keeps)
        return 4 * num_banks * (num_heads * per_head + ("tokens" in self.keeps))

    def arrange(self, segments: Segments) -> Segment:
        """Return the segments as the memory sees them, side by side."""
        keys = segments.key_features
        return Segment(segments.query_features, keys, keys.sum(dim=3), segments.values)

    def take(self, segment: Segment, index_BK: Tensor) -> Segment:
        """Return a segment, or one in each row, with only the chosen queries of the row, [B, H, K, d]."""
        return segment._replace(queries=take_positions(segment.queries, index_BK))

    def prepare(self, bank: Bank, num_queries: int | None) -> tuple[Tensor, ...]:
        """Return what reads of the bank share until it is written, each [B, H, ...].

        Args:
            bank: to read from.
            num_queries: queries per row that will be answered; None if the bank is read again without being written.
        """
        return bank.matrix, bank.norm.unsqueeze(-1)

    def novelty(self, bank: Bank, segment: Segment) -> Tensor:
        """Return the values [B, H, L, d] that writing the segment to the bank would associate with its keys."""
        return segment.values

    def read(self, prepared: tuple[Tensor, ...], segment: Segment) -> Tensor:
        """Return what banks answer to the segment's queries [B, N, H, m, d]; zeros where one is empty.

        Args:
            prepared: of all banks, side by side on axis 1.
            segment: whose queries are asked.
        """
        raise NotImplementedError

    def read_open(self, segment: Segment, novelty: Tensor) -> Tensor:
        """Return what the segment adds to the answers of the bank it goes to, if reads see the open segment."""
        raise NotImplementedError

    def write(self, bank: Bank, segment: Segment, novelty: Tensor) -> Bank:
        """Return the bank with a closed segment written to it; all its sums run over the same tokens."""
        turned = segment.keys.transpose(-1, -2)
        return bank.plus(matrix=turned @ novelty, norm=segment.key_sum)

    def pass_over(self, bank: Bank, segments: Segments) -> tuple[Tensor, Bank]:
        """Return what the bank answers to whole segments while each is written after it was read, and the bank after them.

        Only for kernels with `fused` set.

        Returns:
            Answers [B, H, n * L, d], and the bank.
        """
        raise NotImplementedError

    def recall_flops(self, lengths: Sequence[int], num_banks: int, head_dim: int) -> float:
        """Return the FLOPs on one head of reading all banks for segments of these lengths, written in turn from empty ones."""
        return 2 * sum(lengths) * num_banks * head_dim**2

    def write_flops(self, head_dim: int) -> float:
        """Return the FLOPs of one token written on one head."""
        return 2 * head_dim**2

    def segment_flops(self, length: int, head_dim: int) -> float:
        """Return the FLOPs on one head of what a segment computes before it is written, closed or not."""
        return 0


class Elu(Kernel):
    """Normalised linear attention over everything written.

    Source: Infini-attention (Munkhdalai et al., 2024), eq. 3 to 5. Differs: zeros, not 0/0, while a bank is empty.
    """

    def prepare(self, bank: Bank, num_queries: int | None) -> tuple[Tensor, ...]:
        return (torch.cat([bank.matrix, bank.norm.unsqueeze(-1)], dim=-1),)

    def read(self, prepared: tuple[Tensor, ...], segment: Segment) -> Tensor:
        return divide(*self.sums(prepared, segment).split([segment.values.shape[-1], 1], dim=-1))

    def sums(self, prepared: tuple[Tensor, ...], segment: Segment) -> Tensor:
        """Return the reading before its division, numerator and denominator side by side [B, N, H, m, d + 1]."""
        return segment.queries.unsqueeze(1) @ prepared[0]

    def novelty(self, bank: Bank, segment: Segment) -> Tensor:
        if self.rule == "linear":
            return segment.values
        return segment.values - divide(segment.keys @ bank.matrix, segment.keys @ bank.norm.unsqueeze(-1))

    def recall_flops(self, lengths: Sequence[int], num_banks: int, head_dim: int) -> float:
        return 2 * sum(lengths) * num_banks * head_dim * (head_dim + 1)

    def write_flops(self, head_dim: int) -> float:
        delta = 2 * head_dim * (head_dim + 1) if self.rule == "delta" else 0
        return 2 * head_dim**2 + delta


class Centred(Kernel):
    """Associations of deviations from the mean key and the mean value: what all keys share cannot drown what tells them apart.

    The features are positive, so any query answers mostly with the mean value; the centred sums leave that out. They have no
    normaliser: 1 + n / d, for n tokens, keeps an answer as it is while keys are few, and bounded however many there are.
    """

    keeps = frozenset({"value_sum", "tokens"})

    def prepare(self, bank: Bank, num_queries: int | None) -> tuple[Tensor, ...]:
        mean_key = bank.norm / bank.tokens.clamp(min=1).unsqueeze(-1)
        centred = bank.matrix - mean_key.unsqueeze(-1) * bank.value_sum.unsqueeze(-2)
        fill = 1 + bank.tokens / bank.norm.shape[-1]
        return centred / fill[..., None, None], mean_key.unsqueeze(-2)

    def read(self, prepared: tuple[Tensor, ...], segment: Segment) -> Tensor:
        centred, mean_key = prepared
        return (segment.queries.unsqueeze(1) - mean_key) @ centred

    def write(self, bank: Bank, segment: Segment, novelty: Tensor) -> Bank:
        written = super().write(bank, segment, novelty)
        tokens = torch.full_like(bank.tokens, segment.values.shape[2])
        return written.plus(value_sum=segment.values.sum(dim=2), tokens=tokens)


class Ridge(Kernel):
    """The linear map from keys to values with the least squared error over everything written.

    Args:
        penalty: weight of the map's own size, in units of 1 plus the keys' mean square summed over the tokens. Relative, so
            that sums over a million tokens can still be solved in fp32.
    """

    keeps = frozenset({"gram"})

    def __init__(self, penalty: float) -> None:
        super().__init__()
        self.penalty = penalty

    def prepare(self, bank: Bank, num_queries: int | None) -> tuple[Tensor, ...]:
        scale = self.penalty * (1 + bank.gram.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True))  # [B, H, 1]
        gram = bank.gram + torch.diag_embed(scale.expand_as(bank.norm))
        if _asks_few(num_queries, bank.norm.shape[-1]):
            return gram, bank.matrix
        return (torch.linalg.solve(gram, bank.matrix),)

    def read(self, prepared: tuple[Tensor, ...], segment: Segment) -> Tensor:
        queries = segment.queries.unsqueeze(1)
        if len(prepared) == 1:
            return queries @ prepared[0]
        # Symmetric: the queries may stand for the right sides, where they are fewer than the values' dims.
        gram, matrix = prepared
        return torch.linalg.solve(gram, queries.mT.expand(*gram.shape[:-1], -1)).mT @ matrix

    def write(self, bank: Bank, segment: Segment, novelty: Tensor) -> Bank:
        return super().write(bank, segment, novelty).plus(gram=segment.keys.transpose(-1, -2) @ segment.keys)

    def recall_flops(self, lengths: Sequence[int], num_banks: int, head_dim: int) -> float:
        factors, side = 2 / 3 * head_dim**3, 2 * head_dim**2
        if num_banks > 1:
            solves = num_banks + len(lengths) - 1  # every bank once, then the one that was written
            return solves * (factors + side * head_dim) + side * sum(lengths) * num_banks
        few = (m if _asks_few(m, head_dim) else head_dim for m in lengths)
        return sum(factors + side * sides for sides in few) + side * sum(lengths)

    def write_flops(self, head_dim: int) -> float:
        return 4 * head_dim**2


class DeltaToken(Kernel):
    """The delta rule at every token: M += s k (v - k M), with unit keys and a strength s in 0 to 1 per token and head.

    A segment is written at once, by the WY form of the product of its steps: with A = I + tril(s K K^T, -1), the values that
    its tokens write are A^-1 (s V) - A^-1 (s K) M. Reads see every token up to their own, so the segments only decide banks.

    Source: DeltaNet in parallel over the sequence (Yang et al., 2024), sections 2.2 and 3.2.
    """

    has_strengths = True
    reads_open_segment = True

    def __init__(self) -> None:
        super().__init__("delta")

    def arrange(self, segments: Segments) -> Segment:
        queries = torch.nn.functional.normalize(segments.queries, dim=-1)
        keys = torch.nn.functional.normalize(segments.keys, dim=-1)
        strong_keys = segments.strengths * keys
        steps = strong_keys @ keys.mT  # [B, H, n, L, L], of which the solver reads the part below the diagonal
        sides = torch.cat([strong_keys, segments.strengths * segments.values], dim=-1)
        # From the right, transposed: BLAS wants columns, and this way nothing is copied.
        solved = torch.linalg.solve_triangular(steps.mT, sides.mT, upper=True, left=False, unitriangular=True)
        erased, fresh = solved.mT.chunk(2, dim=-1)
        scores = causal(queries @ keys.mT)  # [B, H, n, m, L]
        return super().arrange(segments)._replace(products=(queries, keys, erased, fresh, scores))

    def take(self, segment: Segment, index_BK: Tensor) -> Segment:
        queries, *middle, scores = segment.products
        chosen = (take_positions(queries, index_BK), *middle, take_positions(scores, index_BK))
        return super().take(segment, index_BK)._replace(products=chosen)

    def novelty(self, bank: Bank, segment: Segment) -> Tensor:
        _, _, erased, fresh, _ = segment.products
        return fresh - erased @ bank.matrix

    def read(self, prepared: tuple[Tensor, ...], segment: Segment) -> Tensor:
        return segment.products[0].unsqueeze(1) @ prepared[0]

    def read_open(self, segment: Segment, novelty: Tensor) -> Tensor:
        return segment.products[4] @ novelty

    def write(self, bank: Bank, segment: Segment, novelty: Tensor) -> Bank:
        # The norm keeps the features' sum: where the keys of this bank lie, for the choice between memories.
        keys = segment.products[1]
        return bank.plus(matrix=keys.transpose(-1, -2) @ novelty, norm=segment.key_sum)

    def pass_over(self, bank: Bank, segments: Segments) -> tuple[Tensor, Bank]:
        assert self.fused is not None, "segments are passed over together by a fused kernel only"
        queries, keys = (torch.nn.functional.normalize(part, dim=-1) for part in (segments.queries, segments.keys))
        q, k, v, strengths = (part.flatten(2, 3) for part in (queries, keys, segments.values, segments.strengths))
        answers, matrix = fused_delta.pass_over(self.fused, q, k, v, strengths, bank.matrix)
        return answers, bank._replace(matrix=matrix).plus(norm=segments.key_features.sum(dim=(2, 3)))

    def as_one_segment(
        self, queries: Tensor, keys: Tensor, values: Tensor, strengths: Tensor, matrix: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return what `fused_delta.pass_over` returns, by this kernel."""
        (segment,) = self.arrange(side_by_side(queries, Tokens(keys, values, strengths), 1)).one_by_one()
        unused = matrix.new_zeros(0)
        bank = Bank(matrix, matrix.new_zeros(matrix.shape[:-1]), unused, unused, unused)
        novelty = self.novelty(bank, segment)
        return queries @ matrix + self.read_open(segment, novelty), self.write(bank, segment, novelty).matrix

    def segment_flops(self, length: int, head_dim: int) -> float:
        squares = 2 * 3 * head_dim * length**2  # steps, scores, and the scores' sums of novelties
        solve = 2 * head_dim * length**2  # half a square, twice as wide
        return squares + solve + 2 * length * head_dim**2


def _asks_few(num_queries: int | None, head_dim: int) -> bool:
    return num_queries is not None and num_queries < head_dim


def take_positions(tensor_BHTd: Tensor, index_BK: Tensor) -> Tensor:
    """Return the chosen positions of each row, [B, H, K, d]."""
    return torch.take_along_dim(tensor_BHTd, index_BK[:, None, :, None], dim=2)


def make_kernel(kind: str, rule: WriteRule | None, ridge_penalty: float) -> Kernel:
    """Return the kernel of a configuration; `rule` None is the kernel's own."""
    if kind == "elu":
        return Elu(rule or "delta")
    return {"centred": Centred, "delta_token": DeltaToken}[kind]() if kind != "ridge" else Ridge(ridge_penalty)
