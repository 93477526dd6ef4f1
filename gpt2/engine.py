"""Batch generation: many requests at once over one paged key-value cache.

    prompts -> Scheduler (ints) -> prefill / Decoder (tensors) -> tokens -> stop checks, text -> Completion

Requests join and leave between steps (continuous batching, Yu et al., 2022). Every batch is ragged: texts are not
padded to a common length. No sum's order depends on the other rows, so a request's tokens depend only on the weights,
its prompt and its parameters. Idle rows, whose results are discarded, pad a batch to the size of its CUDA graph.

On a GPU, an engine step makes a plan, launches it, and then reads the tokens of the previous plan, so that the host
works while the device does. The device gets DECODE_STEPS tokens of each text to generate at a time (one while prompts
are being read).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import random
import secrets
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import tiktoken
import torch
from torch import Tensor
from tqdm import tqdm

from gpt2.blocks import BlockPool
from gpt2.cache import PagedCache, agree, upload
from gpt2.decode import Decoder, Drawn, most_logprobs
from gpt2.model import GPT2, PagedBatch
from gpt2.request import Completion, Logprob, Output, Request, Sample, make_request
from gpt2.sampling import SamplingParams
from gpt2.scheduler import Chunk, Plan, Scheduler
from gpt2.scheduler import Sequence as Text

PREFILL_TOKENS = 2048  # most prompt tokens computed in one step, so that running texts keep moving
DECODE_STEPS = 8  # tokens a GPU generates for each text before the host reads them


@dataclasses.dataclass(frozen=True)
class Started:
    """Work given to the device: the samples whose tokens it draws, and where the tokens will be."""

    samples: list[Sample]
    drawn: Drawn


class Engine:
    """Generates text for many prompts at once. Not thread-safe.

    model: a GPT2 in eval mode, whose device and dtype are used. tokenizer: None means token ids only; texts are "".
    max_batch: most sequences running at once. num_blocks: size of the cache in blocks of block_size tokens; None sizes
    it from free memory. prefix_caching: prompts with a common prefix share the blocks that hold it. cuda_graphs: on a
    GPU, replay the captured step instead of launching each of its kernels. cache_dtype: None for the model's, or
    torch.float8_e4m3fn: half the bytes of bfloat16, with keys and values rounded to 4 bits of precision.
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
        cuda_graphs: bool = True,
        cache_dtype: torch.dtype | None = None,
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
        on_gpu = model.device.type == "cuda"
        self._steps, self._most_unread = (DECODE_STEPS, 1) if on_gpu else (1, 0)
        # Events, graphs and streams belong to the current device, which need not be the model's.
        self._current_device = torch.cuda.device(model.device) if on_gpu else contextlib.nullcontext()
        self._cache = PagedCache(
            model, num_blocks=num_blocks, block_size=block_size, max_batch=max_batch, dtype=cache_dtype
        )
        self._decoder = Decoder(
            model, self._cache, rows=max_batch, most_steps=DECODE_STEPS, cuda_graphs=cuda_graphs and on_gpu
        )
        self._scheduler = Scheduler(
            BlockPool(self._cache.num_blocks, block_size),
            max_batch=max_batch,
            prefill_tokens=PREFILL_TOKENS,
            prefix_caching=prefix_caching,
        )
        self._unread: deque[list[Started]] = deque()  # one list per plan
        self._swapped: dict[Text, Tensor] = {}  # keys and values in host memory
        self._requests: dict[int, Request] = {}
        self._sample_of: dict[Text, Sample] = {}
        # Seeds for requests without one: random, but the same in all processes that share the model.
        self._seeds = random.Random(agree(model, secrets.randbits(63)))
        self._ready: list[Completion] = []  # finished, not yet handed out by `step`
        self._next_number = 0
        self._prompt_tokens = 0
        self._output_tokens = 0

    # -- requests

    def add(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> int:
        """Queue a prompt (text, or token ids; empty means <|endoftext|>) and return the request's number.

        Raises ValueError, naming the option, if the prompt and its parameters do not fit the model.
        """
        return self._enqueue(self._request(prompt, params or SamplingParams()))

    def _enqueue(self, request: Request) -> int:
        request.number = self._next_number
        self._next_number += 1
        self._requests[request.number] = request
        self._prompt_tokens += len(request.prompt)
        for sample in request.samples:
            if sample.sequence.max_length > sample.sequence.prompt_length:
                self._sample_of[sample.sequence] = sample
                self._scheduler.add(sample.sequence)
            else:  # the prompt fills every position and on_overflow is "stop"
                sample.finish("length")
        self._hand_out(request)
        return request.number

    def abort(self, request_id: int) -> None:
        """End a request; the next `step` returns its Completion, as far as it got. Unknown ids are ignored."""
        request = self._requests.get(request_id)
        if request is None:
            return
        for sample in request.samples:
            if sample.finish_reason is None:
                self._finish(sample, "abort")
        self._hand_out(request)

    def step(self) -> list[Completion]:
        """Compute one step for all running requests; returns those that have finished.

        An error inside a step ends every request: their blocks are released, the error is raised, and the engine can
        be used again. The exception is a GPU that takes no more work from this process, as after an illegal memory
        access: every step with work to do then raises, and only a new process helps.
        """
        try:
            self._advance()
        except BaseException:
            self._give_up()
            raise
        ready, self._ready = self._ready, []
        return ready

    def progress(self, request_id: int) -> list[Output] | None:
        """The outputs of a request so far, in the order of its samples; None once its Completion is ready.

        Texts leave out an incomplete last character and what may yet become a stop string. finish_reason is "" until
        there is one.
        """
        request = self._requests.get(request_id)
        if request is None:
            return None
        return [
            Output(
                text=s.text,
                tokens=s.sequence.tokens[s.sequence.prompt_length :],
                finish_reason=s.finish_reason or "",
                logprobs=s.logprobs[:] if request.params.logprobs else None,
            )
            for s in request.samples
        ]

    def _give_up(self) -> None:
        """End every request and forget whatever a failed step may have left half done, the device's state last."""
        for request in self._requests.values():
            for sample in request.samples:
                if sample.finish_reason is None:
                    sample.finish("abort")
        self._requests.clear()
        self._sample_of.clear()
        self._swapped.clear()
        self._unread.clear()
        self._scheduler.reset()
        self._decoder.clear()

    @property
    def unfinished(self) -> int:
        """Requests that have been added but not handed out yet."""
        return len(self._requests) + len(self._ready)

    def stats(self) -> dict[str, int]:
        """Counters since the start. Unused blocks that still hold a known prefix count as free."""
        pool = self._scheduler.pool
        return {
            "num_blocks": pool.num_blocks,
            "free_blocks": pool.free_blocks,
            "prefix_hits": self._scheduler.prefix_hits,
            "preemptions": self._scheduler.preemptions,
            "prompt_tokens": self._prompt_tokens,
            "output_tokens": self._output_tokens,
            "running": len(self._scheduler.running),
            "waiting": len(self._scheduler.waiting),
            "cache_bytes": self._cache.bytes,
        }

    # -- whole jobs

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = False,
    ) -> list[Completion]:
        """Completions of all prompts, in order; params is one SamplingParams for all, or one for each prompt.

        Raises ValueError, naming the prompt's number, before any work if a prompt or its parameters do not fit.
        """
        if isinstance(prompts, str) or not isinstance(prompts, Iterable):
            kind = "one string" if isinstance(prompts, str) else repr(prompts)
            raise ValueError(f"Engine.generate: prompts must be a list, got {kind}")
        prompts = list(prompts)
        each = [params] * len(prompts) if params is None or isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise ValueError(f"Engine.generate: params must be one or one per prompt ({len(prompts)}), got {len(each)}")
        first, added = self._next_number, []
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
            self._drop(range(first, self._next_number))
            raise
        finally:
            self._ready[:0] = others  # requests of other callers, for their next `step`

    def stream(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> Iterator[str]:
        """Text of one sample as it is generated, in whole characters. Closing the iterator ends the request."""
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
                text = request.samples[0].text
                if len(text) > sent:
                    yield text[sent:]
                    sent = len(text)
                elif request.done:
                    return
                else:
                    finished = self.step()  # perhaps other callers' requests, for their next `step`
                    self._ready = finished + self._ready
        finally:
            self._drop([number])

    def _drop(self, numbers: Iterable[int]) -> None:
        """End requests whose results nobody wants."""
        unwanted = set(numbers)
        for number in unwanted:
            self.abort(number)
        self._ready = [c for c in self._ready if c.request_id not in unwanted]

    def _request(self, prompt: str | Sequence[int], params: SamplingParams) -> Request:
        fresh_seed = functools.partial(self._seeds.getrandbits, 63)
        request = make_request(prompt, params, self.model.config, self.tokenizer, fresh_seed)
        self._scheduler.check(request.samples[0].sequence)
        return request

    # -- one step

    @torch.no_grad()
    def _advance(self) -> None:
        plan = self._scheduler.schedule(self._steps)
        if plan.is_empty:
            self._decoder.keep([])
        else:
            with self._current_device:
                self._unread.append(self._start(plan))
            self._scheduler.commit(plan)
        while len(self._unread) > (0 if plan.is_empty else self._most_unread):
            for started in self._unread.popleft():
                self._read(started)

    def _start(self, plan: Plan) -> list[Started]:
        """Launch a plan on the device.

        On a GPU nothing here waits for the device, except the capture of a new graph and the saving of blocks that
        pinned memory has no room for.
        """
        decoder, cache = self._decoder, self._cache
        for text, blocks in plan.swap_out:
            self._swapped[text] = cache.save(blocks, self._swapped.values())
        for text, first in plan.swap_in:
            cache.restore(text.blocks, self._swapped.pop(text), first)
        if plan.copies:
            cache.copy(plan.copies)
        decoder.keep([s for s in plan.decode if decoder.has(s)])
        decoder.grow([(s, first) for s, first in plan.grown if decoder.has(s)])
        returning = [self._sample_of[s] for s in plan.decode if not decoder.has(s)]
        if returning:
            decoder.join(returning, decoder.new_rows(returning))
        started = []
        if plan.decode:
            drawn = decoder.run(plan.steps)
            started.append(Started(list(decoder.samples), drawn))
        if plan.prefill:
            started += self._prefill(plan.prefill)
        return started

    def _prefill(self, chunks: list[Chunk]) -> list[Started]:
        hidden = self.model.forward_paged(self._batch(chunks), self._cache.layers)
        # A token is drawn for each prompt that is now complete; the other chunks are parts of long prompts.
        last_rows, row = [], -1
        for c in chunks:
            row += c.last - c.first
            if c.is_complete:
                last_rows.append(row)
        if not last_rows:
            return []
        samples = [self._sample_of[c.sequence] for c in chunks if c.is_complete]
        top = most_logprobs([s.request.params for s in samples], self.model.config.vocab_size)
        rows = self._decoder.new_rows(samples)
        logits = self.model.logits(hidden[upload(last_rows, torch.int64, self.model.device)])
        drawn, logprobs, likeliest = rows.draw(logits, top)
        tokens = drawn.new_empty(1, len(samples))
        rows.advance(drawn, tokens, torch.zeros_like(drawn[:1]), self._cache.block_size)
        details = None
        if likeliest is not None:
            details = logprobs.unsqueeze(0), likeliest[0].unsqueeze(0), likeliest[1].unsqueeze(0)
        started = Started(samples, Drawn(tokens, details))
        chosen = [i for i, s in enumerate(samples) if s.sequence.prompt_length + 1 < s.sequence.max_length]
        self._decoder.join([samples[i] for i in chosen], rows, chosen)
        return [started]

    def _batch(self, chunks: list[Chunk]) -> PagedBatch:
        size = self._cache.block_size
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
        device = self.model.device
        each_token = upload([tokens, positions, slots], torch.int64, device)
        return PagedBatch(
            tokens=each_token[0],
            positions=each_token[1],
            slots=each_token[2],
            block_table=upload(table, torch.int32, device),
            context_lens=upload([c.last for c in chunks], torch.int32, device),
            cu_seqlens=upload(starts, torch.int32, device),
            # Prompts always take the prefill path, even for a single row: another tile could give other bits.
            max_seqlen=max(2, *(c.last - c.first for c in chunks)),
        )

    def _read(self, started: Started) -> None:
        """Append the drawn tokens to their texts, and finish the texts that end."""
        each, details = started.drawn.read()
        for i, (sample, tokens) in enumerate(zip(started.samples, each)):
            if sample.finish_reason is not None:
                continue  # it ended while these were being generated
            if tokens[-1] < 0:
                tokens = tokens[: tokens.index(-1)]
            count = sample.take(tokens, self.model.config.eos_token_id)
            self._output_tokens += count
            if details is not None and (wanted := sample.request.params.logprobs):
                for token, (logprob, ids, values) in zip(tokens[:count], details[i]):
                    sample.logprobs.append(Logprob(token, logprob, tuple(zip(ids[:wanted], values[:wanted]))))
            if sample.finish_reason is not None:
                self._forget(sample)
                self._hand_out(sample.request)

    def _finish(self, sample: Sample, reason: str) -> None:
        sample.finish(reason)
        self._forget(sample)

    def _forget(self, sample: Sample) -> None:
        self._sample_of.pop(sample.sequence, None)
        self._swapped.pop(sample.sequence, None)
        self._scheduler.remove(sample.sequence)

    def _hand_out(self, request: Request) -> None:
        """Once all samples of a request are finished, put its Completion where `step` finds it."""
        if request.done and request.number in self._requests:
            del self._requests[request.number]
            self._ready.append(request.completion())
