"""Batch generation: many requests at once over one paged key-value cache.

    prompts -> Scheduler (ints) -> GPT2.forward_paged (tensors) -> sample -> tokens -> stop checks, text -> Completion

Requests join and leave between steps (continuous batching, Yu et al., 2022). Every batch is ragged: no padding, so the
tokens of a request are a function of the weights, its prompt and its parameters alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence

import tiktoken
import torch
from torch import Tensor
from tqdm import tqdm

import gpt2_kernels as ops
from gpt2.blocks import BlockPool
from gpt2.model import GPT2, PagedBatch
from gpt2.request import Completion, Logprob, Output, Request, Sample, make_request
from gpt2.sampling import SamplingParams
from gpt2.scheduler import Chunk, Scheduler
from gpt2.scheduler import Sequence as Text

PREFILL_TOKENS = 2048  # most prompt tokens of one step, so that texts under way keep moving


class Engine:
    """Generates text for many prompts at once. Not for use from several threads.

    model: a GPT2 in eval mode, whose device and dtype are used. tokenizer: None means token ids only, and texts "".
    max_batch: most sequences that run together. num_blocks: size of the cache in blocks of block_size tokens; None
    sizes it from free memory. prefix_caching: prompts that begin alike share the blocks of their common beginning.
    """

    def __init__(
        self,
        model: GPT2,
        tokenizer: tiktoken.Encoding | None = None,
        *,
        max_batch: int = 256,
        num_blocks: int | None = None,
        block_size: int = 16,
        prefix_caching: bool = True,
    ) -> None:
        for name, value in (("max_batch", max_batch), ("num_blocks", num_blocks), ("block_size", block_size)):
            if name == "num_blocks" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"Engine: {name} must be a positive integer, got {value!r}")
        if tokenizer is not None and tokenizer.n_vocab > model.config.vocab_size:
            raise ValueError(
                f"Engine: the tokenizer's tokens must exist in the model ({model.config.vocab_size}), "
                f"got {tokenizer.n_vocab}"
            )
        self.model = model
        self.tokenizer = tokenizer
        config = model.config
        block_shape = (model.cache_heads, block_size, config.head_dim)  # a head's rows side by side
        if num_blocks is None:
            # Two tensors a layer; no more than max_batch sequences of full length can ever use.
            bytes_a_block = 2 * config.n_layer * config.n_embd * block_size * model.wte.weight.element_size()
            most = max_batch * -(-config.n_positions // block_size)
            num_blocks = max(1, min(most, int(_free_memory(model.device)) // bytes_a_block))
        # Not filled: a slot is written before it is read, and untouched pages cost a CPU no memory.
        storage = torch.empty((config.n_layer, 2, num_blocks, *block_shape), dtype=model.dtype, device=model.device)
        self._cache = [(kv[0].transpose(1, 2), kv[1].transpose(1, 2)) for kv in storage]
        self._scheduler = Scheduler(
            BlockPool(num_blocks, block_size),
            max_batch=max_batch,
            prefill_tokens=PREFILL_TOKENS,
            prefix_caching=prefix_caching,
        )
        self._requests: dict[int, Request] = {}
        self._sample_of: dict[Text, Sample] = {}
        self._ready: list[Completion] = []  # finished, not yet handed out by `step`
        self._next_number = 0
        self._prompt_tokens = 0
        self._output_tokens = 0

    # -- requests

    def add(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> int:
        """Queue a prompt (text, or token ids; empty means <|endoftext|>) and return the number of the request.

        Raises ValueError, naming the option, where prompt and parameters do not fit the model.
        """
        return self._enqueue(self._request(prompt, params or SamplingParams()))

    def _enqueue(self, request: Request) -> int:
        request.number = self._next_number
        for sample in request.samples:
            if sample.sequence.max_length > sample.sequence.prompt_length:
                self._scheduler.add(sample.sequence)
                self._sample_of[sample.sequence] = sample
            else:  # the prompt fills every position and on_overflow is "stop"
                sample.finish_reason = "length"
        self._next_number += 1
        self._requests[request.number] = request
        self._prompt_tokens += len(request.prompt)
        self._hand_out(request)
        return request.number

    def abort(self, request_id: int) -> None:
        """End a request: its Completion, as far as it got, comes with the next `step`. Unknown ids are ignored."""
        request = self._requests.get(request_id)
        if request is None:
            return
        for sample in request.samples:
            if sample.finish_reason is None:
                self._finish(sample, "abort")
        self._hand_out(request)

    def step(self) -> list[Completion]:
        """Compute one step for all running requests; returns those that it finished.

        An error inside a step ends every request: their blocks are given back, the error is raised, and the engine can
        be used again.
        """
        try:
            self._advance()
        except BaseException:
            finished = self._ready[:]
            for request in list(self._requests.values()):
                self.abort(request.number)
            self._ready = finished  # nothing that was done before is lost
            raise
        ready, self._ready = self._ready, []
        return ready

    def progress(self, request_id: int) -> list[Output] | None:
        """The outputs of a request as far as they have got, in the order of its samples; None once it is handed out.

        Texts end before half a character and what may yet become a stop string. finish_reason is "" until there is one.
        """
        request = self._requests.get(request_id)
        if request is None:
            return None
        return [
            Output(
                text=s.stream.text,
                tokens=s.sequence.tokens[s.sequence.prompt_length :],
                finish_reason=s.finish_reason or "",
                logprobs=s.logprobs[:] if request.params.logprobs else None,
            )
            for s in request.samples
        ]

    @property
    def unfinished(self) -> int:
        """Requests that have been added and not handed out yet."""
        return len(self._requests) + len(self._ready)

    def stats(self) -> dict[str, int]:
        """Counters since the start. Blocks that hold a known prefix and that nobody uses count as free."""
        pool = self._scheduler.pool
        return {
            "num_blocks": pool.num_blocks,
            "free_blocks": pool.free_blocks,
            "prefix_hits": self._scheduler.prefix_hits,
            "preemptions": 0,  # a sequence is admitted only with all the blocks it may need
            "prompt_tokens": self._prompt_tokens,
            "output_tokens": self._output_tokens,
            "running": len(self._scheduler.running),
            "waiting": len(self._scheduler.waiting),
        }

    # -- whole jobs

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = False,
    ) -> list[Completion]:
        """Completions of all prompts, in their order; params are one for all, or one for each prompt.

        Raises ValueError before any work where a prompt or its parameters do not fit, naming the prompt's number.
        """
        if isinstance(prompts, str) or not isinstance(prompts, Iterable):
            kind = "one string" if isinstance(prompts, str) else repr(prompts)
            raise ValueError(f"Engine.generate: prompts must be a list, got {kind}")
        prompts = list(prompts)
        each = [params] * len(prompts) if params is None or isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise ValueError(f"Engine.generate: params must be one or one per prompt ({len(prompts)}), got {len(each)}")
        added: list[int] = []
        others: list[Completion] = []
        try:
            for index, (prompt, own) in enumerate(zip(prompts, each)):
                try:
                    added.append(self.add(prompt, own))
                except ValueError as e:
                    raise ValueError(f"prompt {index}: {e}") from None
            done: dict[int, Completion] = {}
            wanted = set(added)
            with tqdm(total=len(added), desc="generate", unit="prompt", disable=not progress) as bar:
                while len(done) < len(wanted):
                    before = len(done)
                    for completion in self.step():
                        if completion.request_id in wanted:
                            done[completion.request_id] = completion
                        else:
                            others.append(completion)
                    bar.update(len(done) - before)
            return [done[number] for number in added]
        except BaseException:
            self._drop(added)
            raise
        finally:
            self._ready[:0] = others  # requests of other callers, for their next `step`

    def stream(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> Iterator[str]:
        """Text of one sample as it comes, in whole characters. Closing the iterator ends the request."""
        params = params or SamplingParams()
        if params.n != 1:
            raise ValueError(f"Engine.stream: n must be 1, got {params.n}")
        if self.tokenizer is None:
            raise ValueError("Engine.stream: a tokenizer is needed to make text, got None")
        return self._stream(self._request(prompt, params))  # checked now, queued when the first text is asked for

    def _stream(self, request: Request) -> Iterator[str]:
        number = self._enqueue(request)
        sent = 0
        try:
            while True:
                text = request.samples[0].stream.text
                if len(text) > sent:
                    yield text[sent:]
                    sent = len(text)
                elif request.done:
                    return
                else:
                    finished = self.step()  # of others perhaps, for their next `step`
                    self._ready = finished + self._ready
        finally:
            self._drop([number])

    def _drop(self, numbers: list[int]) -> None:
        """End requests whose results nobody wants."""
        for number in numbers:
            self.abort(number)
        self._ready = [c for c in self._ready if c.request_id not in set(numbers)]

    def _request(self, prompt: str | Sequence[int], params: SamplingParams) -> Request:
        request = make_request(prompt, params, self.model.config, self.tokenizer)
        self._scheduler.check(request.samples[0].sequence)
        return request

    # -- one step

    @torch.no_grad()
    def _advance(self) -> None:
        chunks = self._scheduler.schedule()
        if not chunks:
            return
        hidden = self.model.forward_paged(self._batch(chunks), self._cache)
        self._scheduler.commit(chunks)
        # A token is drawn where a chunk reached the end of its text; other chunks are parts of long prompts.
        ends = torch.tensor([c.last - c.first for c in chunks]).cumsum(0) - 1
        complete = [i for i, c in enumerate(chunks) if c.is_complete]
        if complete:
            rows = ends[complete].to(hidden.device)
            self._sample([self._sample_of[chunks[i].sequence] for i in complete], self.model.logits(hidden[rows]))

    def _batch(self, chunks: list[Chunk]) -> PagedBatch:
        size = self._scheduler.pool.block_size
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        starts = [0]
        for c in chunks:
            blocks = c.sequence.blocks
            tokens += c.sequence.tokens[c.first : c.last]
            positions += range(c.first, c.last)
            slots += [blocks[t // size] * size + t % size for t in range(c.first, c.last)]
            starts.append(len(tokens))
        widest = max(len(c.sequence.blocks) for c in chunks)
        table = [c.sequence.blocks + [0] * (widest - len(c.sequence.blocks)) for c in chunks]

        def int64(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=self.model.device)

        def int32(values: list) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=self.model.device)

        return PagedBatch(
            tokens=int64(tokens),
            positions=int64(positions),
            slots=int64(slots),
            block_table=int32(table),
            context_lens=int32([c.last for c in chunks]),
            cu_seqlens=int32(starts),
            # Prompts always take the prefill path, a single row of one too: another tile could give other bits.
            max_seqlen=max(max(c.last - c.first for c in chunks), 2 if chunks[0].sequence.prefilling else 1),
        )

    def _sample(self, samples: list[Sample], logits: Tensor) -> None:
        """Draw a token for each sample from its row of logits, and finish those that it ends."""
        params = [s.request.params for s in samples]

        def row(values: list, dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=logits.device)

        penalties = [p.repetition_penalty for p in params]
        history = penalty = None
        if any(p != 1.0 for p in penalties):
            penalty = row(penalties, torch.float32)
            history = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
            for i, s in enumerate(samples):
                history[i, s.sequence.tokens] = True
        tokens, logprobs, top = ops.sample(
            logits,
            temperature=row([p.temperature for p in params], torch.float32),
            top_k=row([p.top_k for p in params], torch.int64),
            top_p=row([p.top_p for p in params], torch.float32),
            min_p=row([p.min_p for p in params], torch.float32),
            seeds=row([s.seed for s in samples], torch.int64),
            positions=row([len(s.sequence.tokens) for s in samples], torch.int64),
            history=history,
            repetition_penalty=penalty,
            top_logprobs=max(p.logprobs for p in params),
        )
        chosen, own = tokens.tolist(), logprobs.tolist()
        ids, values = ([], []) if top is None else (top[0].tolist(), top[1].tolist())
        for i, s in enumerate(samples):
            if wanted := s.request.params.logprobs:
                likeliest = tuple(zip(ids[i][:wanted], values[i][:wanted]))
                s.logprobs.append(Logprob(chosen[i], own[i], likeliest))
            self._take(s, chosen[i])

    def _take(self, sample: Sample, token: int) -> None:
        params, sequence = sample.request.params, sample.sequence
        sequence.tokens.append(token)
        self._output_tokens += 1
        is_end = token == self.model.config.eos_token_id and not params.ignore_eos
        if is_end or token in params.stop_token_ids:
            self._finish(sample, "stop")
        else:
            sample.stream.push(token)
            if sample.stream.stopped:
                self._finish(sample, "stop")
            elif len(sequence.tokens) == sequence.max_length:
                self._finish(sample, "length")
        self._hand_out(sample.request)

    def _finish(self, sample: Sample, reason: str) -> None:
        sample.stream.finish()
        sample.finish_reason = "stop" if sample.stream.stopped else reason
        self._sample_of.pop(sample.sequence, None)
        self._scheduler.remove(sample.sequence)

    def _hand_out(self, request: Request) -> None:
        """Once all samples of a request are finished, put its Completion where `step` finds it."""
        if request.done and request.number in self._requests:
            del self._requests[request.number]
            self._ready.append(request.completion())


def _free_memory(device: torch.device) -> float:
    """Bytes that the cache may take: most of what a GPU has free, or a third of what a computer has."""
    if device.type == "cuda":
        return 0.85 * torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            available = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        available = (
            8 * 2**30 if not hasattr(os, "sysconf") else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        )
    return available / 3
