"""Decoding on the device: one row of state for each text, and a step that advances all rows by one token.

A step reads the rows, runs the model, draws a token for each row and updates the rows, copying nothing from the host
and waiting for nothing. On a GPU it is captured as one CUDA graph per batch size and replayed. The host changes rows
between steps: texts join, leave and get blocks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import gpt2_kernels as ops
from gpt2.cache import PagedCache, upload
from gpt2.model import GPT2, PagedBatch
from gpt2.sampling import SamplingParams
from gpt2.scheduler import Sequence as Text

if TYPE_CHECKING:
    from gpt2.request import Sample

TOKEN, POSITION, SLOT, LIMIT, END, SEED, TOP_K = range(7)  # rows of `Rows.ints`
TEMPERATURE, TOP_P, MIN_P, PENALTY = range(4)  # rows of `Rows.floats`
BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)  # batch sizes that have a graph; past these, doubled


@dataclasses.dataclass
class Rows:
    """State of R texts; a row whose context is 0 is idle."""

    ints: Tensor  # (7, R) int64: the last token, its position and cache slot; length and token that end the text; ...
    floats: Tensor  # (4, R) float32: sampling parameters
    contexts: Tensor  # (R,) int32, keys to attend to in the next step; 0 is idle
    table: Tensor  # (R, blocks) int32
    history: Tensor | None  # (R, V) bool, tokens of each text, if some row penalises repetition

    @staticmethod
    def of(samples: list[Sample], vocabulary: int, eos_token_id: int, width: int, device: torch.device) -> Rows:
        """Rows of texts whose tokens are all known to the host, before their last token is fed to the model."""
        sequences, params = [s.sequence for s in samples], [s.request.params for s in samples]
        ints = [
            [s.tokens[-1] for s in sequences],
            [len(s.tokens) - 1 for s in sequences],
            [-1] * len(samples),  # `place` finds it
            [s.max_length for s in sequences],
            [-1 if p.ignore_eos else eos_token_id for p in params],
            [s.seed for s in samples],
            [p.top_k for p in params],
        ]
        penalties = [p.repetition_penalty for p in params]
        floats = [[p.temperature for p in params], [p.top_p for p in params], [p.min_p for p in params], penalties]
        history = None
        if any(p != 1.0 for p in penalties):
            history = torch.zeros((len(samples), vocabulary), dtype=torch.bool, device=device)
            rows = [i for i, (s, p) in enumerate(zip(sequences, penalties)) if p != 1.0 for _ in s.tokens]
            tokens = [token for s, p in zip(sequences, penalties) if p != 1.0 for token in s.tokens]
            where = tuple(upload([rows, tokens], torch.int64, device))
            history[where] = history.new_ones(())  # a Python number would be copied, and waited for
        return Rows(
            upload(ints, torch.int64, device),
            upload(floats, torch.float32, device),
            upload([len(s.tokens) for s in sequences], torch.int32, device),
            upload([s.blocks + [0] * (width - len(s.blocks)) for s in sequences], torch.int32, device),
            history,
        )

    def first(self, n: int) -> Rows:
        """The first n rows, as views."""
        history = None if self.history is None else self.history[:n]
        return Rows(self.ints[:, :n], self.floats[:, :n], self.contexts[:n], self.table[:n], history)

    def put(self, target: slice | Tensor, rows: Rows, source: slice | Tensor) -> None:
        """Copy `source` of `rows` to `target` of these."""
        self.ints[:, target] = rows.ints[:, source]
        self.floats[:, target] = rows.floats[:, source]
        self.contexts[target] = rows.contexts[source]
        self.table[target] = rows.table[source]
        if self.history is not None and rows.history is not None:
            self.history[target] = rows.history[source]

    def place(self, block_size: int) -> None:
        """Find the cache slot of each row's token, after its position or its blocks have changed."""
        position = self.ints[POSITION]
        block = self.table.gather(1, (position // block_size).unsqueeze(1)).squeeze(1)
        slot = block * block_size + position % block_size  # int64
        self.ints[SLOT] = torch.where(self.contexts > 0, slot, -1)

    def draw(self, logits: Tensor, top_logprobs: int) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """The token that follows each row's, its log-probability, and the likeliest tokens with theirs."""
        return ops.sample(
            logits,
            temperature=self.floats[TEMPERATURE],
            top_k=self.ints[TOP_K],
            top_p=self.floats[TOP_P],
            min_p=self.floats[MIN_P],
            seeds=self.ints[SEED],
            positions=self.ints[POSITION] + 1,
            history=self.history,
            repetition_penalty=None if self.history is None else self.floats[PENALTY],
            top_logprobs=top_logprobs,
        )

    def advance(self, drawn: Tensor, record: Tensor, count: Tensor, block_size: int) -> None:
        """Append each row's drawn token, idle the rows that it ends, and store it in row `count` of `record`."""
        token, position, slot, limit, end = self.ints[:5]
        ops.advance_(drawn, token, position, slot, self.contexts, limit, end, self.table, record, count, block_size)


class Drawn:
    """Tokens (steps, n) int64 on their way to the host, -1 where a text had ended.

    details, if requested: log-probabilities (steps, n), and the m likeliest tokens' ids and log-probabilities
    (steps, n, m).
    """

    def __init__(self, tokens: Tensor, details: tuple[Tensor, Tensor, Tensor] | None) -> None:
        self._tokens = _to_host(tokens)
        self._details = None if details is None else [_to_host(t) for t in details]
        self._event = None
        if tokens.device.type == "cuda":
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> tuple[list[list[int]], list[list] | None]:
        """Each text's tokens, and its (log-probability, ids, log-probabilities) per token; waits for the device."""
        if self._event is not None:
            self._event.synchronize()
        tokens = self._tokens.T.tolist()
        if self._details is None:
            return tokens, None
        logprobs, ids, likeliest = (t.transpose(0, 1).tolist() for t in self._details)
        return tokens, [list(zip(*of_text)) for of_text in zip(logprobs, ids, likeliest)]


def _to_host(tensor: Tensor) -> Tensor:
    if tensor.device.type == "cpu":
        return tensor.clone()  # the next step writes over it
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


class Decoder:
    """The rows of all decoding texts, and the step that advances them.

    samples: the sample that each row belongs to, in row order; rows past them are idle.
    """

    def __init__(self, model: GPT2, cache: PagedCache, *, rows: int, most_steps: int, cuda_graphs: bool) -> None:
        self.model, self.cache = model, cache
        self.device = device = model.device
        self.samples: list[Sample] = []
        self._row_of: dict[Text, int] = {}
        if cuda_graphs:
            rows = bucket(rows)
        self.width = -(-model.config.n_positions // cache.block_size)
        self._rows = Rows(
            torch.zeros((7, rows), dtype=torch.int64, device=device),
            torch.ones((4, rows), dtype=torch.float32, device=device),
            torch.zeros(rows, dtype=torch.int32, device=device),
            torch.zeros((rows, self.width), dtype=torch.int32, device=device),
            None,
        )
        self._starts = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self._count = torch.zeros(1, dtype=torch.int64, device=device)  # steps since `run` began
        self._tokens = torch.empty((most_steps, rows), dtype=torch.int64, device=device)
        self._details: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # see `Drawn`; by the number of likeliest tokens
        self._graphs: dict[tuple[int, bool, int], torch.cuda.CUDAGraph] | None = {} if cuda_graphs else None
        self._stream: torch.cuda.Stream | None = None  # where graphs are captured
        self._pool: Any = None  # their memory

    # -- the host changes rows

    def new_rows(self, samples: list[Sample]) -> Rows:
        """Rows of texts about to join, not yet among the decoder's."""
        return Rows.of(samples, self.model.config.vocab_size, self.model.config.eos_token_id, self.width, self.device)

    def join(self, samples: list[Sample], rows: Rows, chosen: list[int] | None = None) -> None:
        """Append the rows of `samples`; `chosen` says which of `rows` they are, by default all."""
        if rows.history is not None and self._rows.history is None:
            shape = (self._rows.contexts.shape[0], self.model.config.vocab_size)
            self._rows.history = torch.zeros(shape, dtype=torch.bool, device=self.device)
        first = len(self.samples)
        picked = slice(None) if chosen is None else upload(chosen, torch.int64, self.device)
        self._rows.put(slice(first, first + len(samples)), rows, picked)
        for row, sample in enumerate(samples, first):
            self.samples.append(sample)
            self._row_of[sample.sequence] = row

    def keep(self, wanted: list[Text]) -> None:
        """Drop the rows of all texts but these, and move the last rows into the gaps."""
        if len(wanted) == len(self.samples):
            return
        staying = set(wanted)
        n = len(staying)
        gaps = [row for row, s in enumerate(self.samples[:n]) if s.sequence not in staying]
        moved = [row for row in range(n, len(self.samples)) if self.samples[row].sequence in staying]
        if gaps:
            source, target = upload([moved, gaps], torch.int64, self.device)
            self._rows.put(target, self._rows, source)
            for to, row in zip(gaps, moved):
                self.samples[to] = self.samples[row]
        self._rows.contexts[n:] = 0
        del self.samples[n:]
        self._row_of = {s.sequence: row for row, s in enumerate(self.samples)}

    def clear(self) -> None:
        """Drop every row, in whatever state an interrupted call has left them."""
        self.samples.clear()
        self._row_of.clear()
        self._rows.contexts.zero_()

    def has(self, sequence: Text) -> bool:
        return sequence in self._row_of

    def grow(self, grown: list[tuple[Text, int]]) -> None:
        """Enter texts' new blocks in the table; `grown` holds (text, index of its first new block)."""
        entries = [
            (self._row_of[s], column, s.blocks[column]) for s, first in grown for column in range(first, len(s.blocks))
        ]
        if entries:
            row, column, block = upload([list(e) for e in zip(*entries)], torch.int64, self.device)
            self._rows.table[row, column] = block.to(torch.int32)

    # -- the device advances them

    def run(self, steps: int) -> Drawn:
        """Advance every row by `steps` tokens, or until it ends."""
        n = len(self.samples)
        params = [s.request.params for s in self.samples]
        top = most_logprobs(params, self.model.config.vocab_size)
        penalties = any(p.repetition_penalty != 1.0 for p in params)
        if top and top not in self._details:
            shape = self._tokens.shape
            self._details[top] = (
                torch.empty(shape, dtype=torch.float32, device=self.device),
                torch.empty((*shape, top), dtype=torch.int64, device=self.device),
                torch.empty((*shape, top), dtype=torch.float32, device=self.device),
            )
        rows = n if self._graphs is None else bucket(n)
        graph = None if self._graphs is None else self._graph(rows, penalties, top)
        # Since the last step rows may have gained blocks, or left. Idle rows, which a graph has too, get no slot.
        self._rows.first(rows).place(self.cache.block_size)
        self._count.zero_()
        for _ in range(steps):
            if graph is None:
                self._step(rows, penalties, top)
            else:
                graph.replay()
        details = None
        if top:
            logprobs, ids, likeliest = self._details[top]
            details = logprobs[:steps, :n], ids[:steps, :n], likeliest[:steps, :n]
        return Drawn(self._tokens[:steps, :n], details)

    @torch.no_grad()
    def _step(self, n: int, penalties: bool, top: int) -> None:
        rows = self._rows.first(n)
        if not penalties:
            rows.history = None
        elif rows.history is not None:
            rows.history.scatter_(1, rows.ints[TOKEN].unsqueeze(1), True)
        batch = PagedBatch(
            tokens=rows.ints[TOKEN],
            positions=rows.ints[POSITION],
            slots=rows.ints[SLOT],
            block_table=rows.table,
            context_lens=rows.contexts,
            cu_seqlens=self._starts[: n + 1],
            max_seqlen=1,
        )
        logits = self.model.logits(self.model.forward_paged(batch, self.cache.layers), decode=True)
        drawn, logprobs, likeliest = rows.draw(logits, top)
        if likeliest is not None:
            for kept, values in zip(self._details[top], (logprobs, *likeliest)):
                kept[:, :n].index_copy_(0, self._count, values.unsqueeze(0))
        rows.advance(drawn, self._tokens[:, :n], self._count, self.cache.block_size)

    def _graph(self, n: int, penalties: bool, top: int) -> torch.cuda.CUDAGraph:
        """The captured step of n rows."""
        assert self._graphs is not None
        key = n, penalties, top
        if key not in self._graphs:
            contexts = self._rows.contexts.clone()
            self._rows.contexts.zero_()
            self._rows.place(self.cache.block_size)  # idle rows without a slot: a step changes nothing
            self._count.zero_()
            try:
                self._graphs[key] = self._capture(*key)
            finally:
                self._rows.contexts.copy_(contexts)
        return self._graphs[key]

    def _capture(self, n: int, penalties: bool, top: int) -> torch.cuda.CUDAGraph:
        if self._stream is None:
            self._stream, self._pool = torch.cuda.Stream(self.device), torch.cuda.graph_pool_handle()
        # All on one stream: first a step outside the graph, which compiles and loads every kernel and leaves
        # paged_attention's tickets where the graph will find them.
        stream, pool = self._stream, self._pool
        self._stream = self._pool = None  # for good, if this fails: an aborted capture still holds them
        stream.wait_stream(torch.cuda.current_stream(self.device))
        try:
            with torch.cuda.stream(stream):
                self._step(n, penalties, top)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    self._step(n, penalties, top)
        finally:
            torch.cuda.current_stream(self.device).wait_stream(stream)
        self._stream, self._pool = stream, pool
        return graph


def most_logprobs(params: Sequence[SamplingParams], vocabulary: int) -> int:
    """How many likeliest tokens are enough for all: a power of 2, so that few buffer sizes and graphs are needed."""
    most = max(p.logprobs for p in params)
    return min(1 << (most - 1).bit_length(), vocabulary) if most else 0


def bucket(n: int) -> int:
    """The smallest batch size with a graph that holds n rows."""
    for size in BUCKETS:
        if n <= size:
            return size
    size = BUCKETS[-1]
    while size < n:
        size *= 2
    return size
