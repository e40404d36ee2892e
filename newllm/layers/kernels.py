"""Memory kernels: how a bank stores associations and answers queries. The paper's, and two that take out what all keys share.

m: queries of a segment that are asked in this call. L: tokens of the segment so far. n: segments side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from newllm.layers import fused_delta
from newllm.layers.memory import Bank, LinearMemory, Sums, WriteRule, divide, dots
from newllm.layers.scan import delta_rule, running_sums
from newllm.layers.segments import Segments, Tokens, as_tokens, causal_scores, one_segment, split


class Segment(NamedTuple):
    """Segments as a memory sees them: side by side, or each as a row of its own (n with B).

    Attributes:
        queries: features of the queries [n, B, H, m, d].
        keys: features of the keys [n, B, H, L, d].
        key_sum: their sum [n, B, H, d].
        values: [n, B, H, L, d].
        products: what the kernel computed ahead.
    """

    queries: Tensor
    keys: Tensor
    key_sum: Tensor
    values: Tensor
    products: tuple[Tensor, ...] = ()

    def split(self, counts: Sequence[int]) -> list[Segment]:
        """Return segments that stand side by side in groups of these sizes, one after another."""
        return [
            self._of(tensors)
            for tensors in zip(*(split(tensor, counts, dim=0) for tensor in self._tensors()), strict=True)
        ]

    def as_rows(self) -> Segment:
        """Return segments that stand side by side as rows, all texts' first segments, then their second ones."""
        return self._of([tensor.flatten(0, 1) for tensor in self._tensors()])

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.queries, self.keys, self.key_sum, self.values, *self.products

    def _of(self, tensors: Sequence[Tensor]) -> Segment:
        queries, keys, key_sum, values, *products = tensors
        return Segment(queries, keys, key_sum, values, tuple(products))


class Written(NamedTuple):
    """What came of writing segments in turn.

    Attributes:
        found: the sums of its bank as each segment found them, [n, B, ...].
        last: the sums of all banks after the last segment, [N, B, ...].
        novelty: values that each segment associated with its keys [n, B, H, L, d].
    """

    found: Bank
    last: Bank
    novelty: Tensor


class Kernel:
    """What a memory layer asks of a kernel; as it stands here, the linear write that all but the delta rules share.

    Attributes:
        rule: "linear" adds every value; "delta" adds what the bank does not already answer.
        keeps: sums of `Bank` it needs besides matrix and norm.
        has_strengths: tokens say how much of their value they write.
        reads_as_found: sums of `Bank` that reads of several banks take as they are; empty if they take what `prepare` returns.
        reads_open_segment: reads see the tokens of the query's own segment too, up to the query.
        fused: a device's kernel for whole segments of one bank, with which `pass_over` trains; None where there is none.
    """

    keeps: ClassVar[frozenset[str]] = frozenset()
    has_strengths: ClassVar[bool] = False
    reads_as_found: ClassVar[tuple[str, ...]] = ()
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

    def read(self, bank: Bank, segment: Segment) -> Sums:
        """Return what a bank answers to the segment's queries [B, H, m, d]; zeros where it is empty."""
        raise NotImplementedError

    def prepare(self, bank: Bank) -> tuple[Tensor, ...]:
        """Return what reads of one of several banks share until it is written: the map from queries to values [B, H, d, d], others.

        Not called where `reads_as_found` names the sums that reads take as they are.
        """
        raise NotImplementedError

    def read_weighted(self, prepared: tuple[Tensor, ...], segment: Segment, weights: Tensor) -> Tensor:
        """Return the sum of what banks answer to the segment's queries, by weights [B, H, m, d].

        Args:
            prepared: of all banks, side by side on axis 2; or the sums that `reads_as_found` names.
            segment: whose queries are asked.
            weights: of the banks [B, N, H or 1, m or 1]; 0 for one that is empty.
        """
        return weighted_products(segment.queries.unsqueeze(3), weights, prepared[0])

    def novelty(self, bank: Bank, segments: Segment) -> Tensor:
        """Return the values [n, B, H, L, d] that a bank would keep for segments' keys, if reads see the open segment.

        Args:
            bank: [B, ...].
            segments: side by side; each as if it was written first.
        """
        raise NotImplementedError

    def read_open(self, segment: Segment, novelty: Tensor) -> Tensor:
        """Return what the segment adds to the answers of the bank it goes to, if reads see the open segment."""
        raise NotImplementedError

    def write(self, banks: Bank, segments: Segment, targets: Sequence[int]) -> Written:
        """Return what came of writing closed segments in turn; all sums of a bank run over the same tokens.

        Args:
            banks: [N, B, ...].
            segments: side by side.
            targets: the bank that each of them goes to.
        """
        # Of size 0 where the kernel keeps none.
        found = {
            name: sums.new_zeros(len(targets), *sums.shape[1:])
            for name, sums in banks._asdict().items()
            if not sums.numel()
        }
        last = {}
        for name, step in {"norm": segments.key_sum, **self.further_steps(segments)}.items():
            found[name], last[name] = running_sums(getattr(banks, name), step, targets)
        found["matrix"], last["matrix"], novelty = self.write_matrices(banks.matrix, segments, targets, found["norm"])
        return Written(Bank(**found), banks._replace(**last), novelty)

    def write_matrices(
        self, matrices: Tensor, segments: Segment, targets: Sequence[int], norms: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the matrices and novelties of `write`: found [n, B, H, d, d], last [N, B, H, d, d], novelty [n, B, H, L, d].

        Args:
            matrices: of the banks [N, B, H, d, d].
            segments: side by side.
            targets: the bank that each of them goes to.
            norms: of its bank, as each segment found it [n, B, H, d].
        """
        return *running_sums(matrices, segments.keys.mT @ segments.values, targets), segments.values

    def further_steps(self, segments: Segment) -> dict[str, Tensor]:
        """Return what segments add to the sums that the kernel keeps beside matrix and norm, by their names [n, B, ...]."""
        return {}

    def pass_over(self, bank: Bank, segments: Segments) -> tuple[Tensor, Bank]:
        """Return what the bank answers to whole segments while each is written after it was read, and the bank after them.

        Only for kernels with `fused` set.

        Returns:
            Answers [n * B, H, L, d], and the bank.
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

    reads_as_found = ("matrix", "norm")

    def read(self, bank: Bank, segment: Segment) -> Sums:
        return Sums(segment.queries @ bank.matrix, dots(segment.queries, bank.norm.unsqueeze(-2)))

    def read_weighted(self, prepared: tuple[Tensor, ...], segment: Segment, weights: Tensor) -> Tensor:
        matrices, norms = prepared
        # Every answer is one quotient: divided by before it is weighed, the numerators are never there one by one.
        return super().read_weighted((matrices,), segment, divide(weights, self._denominators(norms, segment)))

    def sums_weighted(self, prepared: tuple[Tensor, ...], segment: Segment, weights: Tensor) -> Sums:
        """Return `read_weighted` before its division, sums of numerators and of denominators."""
        matrices, norms = prepared
        denominator = (weights * self._denominators(norms, segment)).sum(1).unsqueeze(-1)
        return Sums(super().read_weighted((matrices,), segment, weights), denominator)

    def _denominators(self, norms: Tensor, segment: Segment) -> Tensor:
        """Norms [B, H, N, d] to what every query would divide by [B, N, H, m]."""
        return dots(segment.queries, norms).permute(0, 3, 1, 2)

    def write_matrices(
        self, matrices: Tensor, segments: Segment, targets: Sequence[int], norms: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self.rule == "linear":
            return super().write_matrices(matrices, segments, targets, norms)
        # The norms are sums of keys alone, known before any value is written: all segments' answers are divided at once.
        asked = divide(segments.keys, dots(segments.keys, -norms.unsqueeze(-2)))
        return delta_rule(matrices, segments.keys, asked, segments.values, targets)

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

    def read(self, bank: Bank, segment: Segment) -> Sums:
        centred, mean_key = self.prepare(bank)
        return Sums((segment.queries - mean_key.unsqueeze(-2)) @ centred, None)

    def prepare(self, bank: Bank) -> tuple[Tensor, ...]:
        mean_key = bank.norm / bank.tokens.clamp(min=1).unsqueeze(-1)
        centred = bank.matrix - mean_key.unsqueeze(-1) * bank.value_sum.unsqueeze(-2)
        fill = 1 + bank.tokens / bank.norm.shape[-1]
        return centred / fill[..., None, None], mean_key

    def read_weighted(self, prepared: tuple[Tensor, ...], segment: Segment, weights: Tensor) -> Tensor:
        centred, mean_keys = prepared
        asked = segment.queries.unsqueeze(3) - mean_keys.unsqueeze(2)  # [B, H, m, N, d]
        return weighted_products(asked, weights, centred)

    def further_steps(self, segments: Segment) -> dict[str, Tensor]:
        values = segments.values
        return {"value_sum": values.sum(dim=3), "tokens": values.new_full((*values.shape[:2], 1), values.shape[3])}


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

    def read(self, bank: Bank, segment: Segment) -> Sums:
        if not _asks_few(segment.queries.shape[2], bank.norm.shape[-1]):
            return Sums(segment.queries @ self.prepare(bank)[0], None)
        # Symmetric: the queries may stand for the right sides, where they are fewer than the values' dims.
        return Sums(torch.linalg.solve(self._penalised(bank), segment.queries.mT).mT @ bank.matrix, None)

    def prepare(self, bank: Bank) -> tuple[Tensor, ...]:
        return (torch.linalg.solve(self._penalised(bank), bank.matrix),)

    def _penalised(self, bank: Bank) -> Tensor:
        scale = self.penalty * (1 + bank.gram.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True))  # [B, H, 1]
        return bank.gram + torch.diag_embed(scale.expand_as(bank.norm))

    def further_steps(self, segments: Segment) -> dict[str, Tensor]:
        return {"gram": segments.keys.mT @ segments.keys}

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
    reads_as_found = ("matrix",)
    reads_open_segment = True

    def __init__(self) -> None:
        super().__init__("delta")

    def arrange(self, segments: Segments) -> Segment:
        queries = torch.nn.functional.normalize(segments.queries, dim=-1)
        keys = torch.nn.functional.normalize(segments.keys, dim=-1)
        # [n, B, H, L, L], of which the solver reads the part below the diagonal
        steps = segments.strengths * causal_scores(keys, keys)
        # Inverted, not solved for both sides: the solver takes one segment after another, products take all of them at once.
        identity = torch.eye(steps.shape[-1], device=steps.device, dtype=steps.dtype).expand_as(steps)
        inverse = torch.linalg.solve_triangular(steps, identity, upper=False, unitriangular=True)
        weighed = inverse * segments.strengths.mT
        asked, fresh = weighed @ -keys, weighed @ segments.values
        scores = causal_scores(queries, keys)  # [n, B, H, m, L]
        return super().arrange(segments)._replace(products=(queries, keys, asked, fresh, scores))

    def take(self, segment: Segment, index_BK: Tensor) -> Segment:
        queries, *middle, scores = segment.products
        chosen = (take_positions(queries, index_BK), *middle, take_positions(scores, index_BK))
        return super().take(segment, index_BK)._replace(products=chosen)

    def novelty(self, bank: Bank, segments: Segment) -> Tensor:
        _, _, asked, fresh, _ = segments.products
        return fresh + asked @ bank.matrix

    def read(self, bank: Bank, segment: Segment) -> Sums:
        return Sums(segment.products[0] @ bank.matrix, None)

    def read_weighted(self, prepared: tuple[Tensor, ...], segment: Segment, weights: Tensor) -> Tensor:
        return weighted_products(segment.products[0].unsqueeze(3), weights, prepared[0])

    def read_open(self, segment: Segment, novelty: Tensor) -> Tensor:
        return segment.products[4] @ novelty

    def write_matrices(
        self, matrices: Tensor, segments: Segment, targets: Sequence[int], norms: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        # The norm keeps the features' sum: where the keys of a bank lie, for the choice between memories.
        _, keys, asked, fresh, _ = segments.products
        return delta_rule(matrices, keys, asked, fresh, targets)

    def pass_over(self, bank: Bank, segments: Segments) -> tuple[Tensor, Bank]:
        assert self.fused is not None, "segments are passed over together by a fused kernel only"
        queries, keys = (torch.nn.functional.normalize(part, dim=-1) for part in (segments.queries, segments.keys))
        count, parts = len(queries), (queries, keys, segments.values, segments.strengths)
        # [B, H, n * L, d], laid out as the kernel reads them.
        q, k, v, strengths = (as_tokens(part.flatten(0, 1), count).transpose(1, 2) for part in parts)
        answers, matrix = fused_delta.pass_over(self.fused, q, k, v, strengths, bank.matrix)
        rows = answers.unflatten(2, (count, -1)).permute(2, 0, 1, 3, 4).flatten(0, 1)
        return rows, bank._replace(matrix=matrix, norm=bank.norm + segments.key_features.sum(dim=(0, 3)))

    def as_one_segment(
        self, queries: Tensor, keys: Tensor, values: Tensor, strengths: Tensor, matrix: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return what `fused_delta.pass_over` returns, by this kernel."""
        segments = self.arrange(one_segment(queries, Tokens(keys, values, strengths)))
        unused = matrix.new_zeros(1, 0)
        banks = Bank(matrix.unsqueeze(0), matrix.new_zeros(1, *matrix.shape[:-1]), unused, unused, unused)
        written = self.write(banks, segments, [0])
        answers = queries @ matrix + self.read_open(segments.as_rows(), written.novelty.squeeze(0))
        return answers, written.last.matrix.squeeze(0)

    def segment_flops(self, length: int, head_dim: int) -> float:
        squares = 2 * 3 * head_dim * length**2  # steps, scores, and the scores' sums of novelties
        solve = length**3 + 2 * 2 * head_dim * length**2  # the inverse, and its products with keys and values
        return squares + solve + 2 * length * head_dim**2


def _asks_few(num_queries: int, head_dim: int) -> bool:
    return num_queries < head_dim


def weighted_products(asked_BHmNd: Tensor, weights_BNHm: Tensor, maps_BHNde: Tensor) -> Tensor:
    """Return the sum of weights * (asked @ maps) over N, [B, H, m, e]: it is the product's own sum, no summand is ever there.

    Args:
        asked_BHmNd: what each of the maps is asked [B, H, m, N or 1, d].
        weights_BNHm: [B, N, H or 1, m or 1].
        maps_BHNde: [B, H, N, d, e].
    """
    # Contiguous: in the order of the weights as they come the product would be copied for the one after it.
    weighed = asked_BHmNd * weights_BNHm.permute(0, 2, 3, 1).contiguous().unsqueeze(-1)
    return weighed.flatten(3) @ maps_BHNde.flatten(2, 3)  # [B, H, m, N*d] @ [B, H, N*d, e]


def take_positions(tensor_BHTd: Tensor, index_BK: Tensor) -> Tensor:
    """Return the chosen positions of each row, [B, H, K, d]."""
    return torch.take_along_dim(tensor_BHTd, index_BK[:, None, :, None], dim=2)


def make_kernel(kind: str, rule: WriteRule | None, ridge_penalty: float) -> Kernel:
    """Return the kernel of a configuration; `rule` None is the kernel's own."""
    if kind == "elu":
        return Elu(rule or "delta")
    return {"centred": Centred, "delta_token": DeltaToken}[kind]() if kind != "ridge" else Ridge(ridge_penalty)
