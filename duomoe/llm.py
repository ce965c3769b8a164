"""The embedding API: load a model folder, generate, stream, or look at its logits."""

import gc
import os
import secrets
import warnings
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from duomoe.chat_output import OutputParser
from duomoe.chat_template import ChatTemplate, Message, chat_stop_strings
from duomoe.config import EngineConfig
from duomoe.engine.completion import Chunk, Completion, Logprobs, Metrics
from duomoe.engine.decode_step import DecodeStep
from duomoe.engine.engine import Engine
from duomoe.engine.log import EngineLog
from duomoe.engine.rehearsal import Rehearsal
from duomoe.engine.request import Request
from duomoe.engine.scheduler import Limits, Scheduler
from duomoe.engine.stats import Stats
from duomoe.engine.stream import Stream, submit_all
from duomoe.engine.thread import EngineThread
from duomoe.errors import InputError, PromptTooLong
from duomoe.experts.link import open_link
from duomoe.experts.page_routing import PageRouting
from duomoe.experts.policies import BOUNDED, PREDICTED, Policy, Resident
from duomoe.experts.policies.cached import CachedPolicy
from duomoe.experts.predictor import GatePredictor, Predictor, load_predictor
from duomoe.experts.store import ExpertStore
from duomoe.grammar import GrammarCompiler
from duomoe.kernel_cache import check_kernel_cache
from duomoe.loading import load_weights
from duomoe.memory.kv_cache import KVCache
from duomoe.memory.pages import PageKeys
from duomoe.memory.plan import Plan, make_plan
from duomoe.model_folder import EMBEDDED_MODEL, ModelFolder
from duomoe.models import Model
from duomoe.models.config import token_ids
from duomoe.sampling import SamplingParams
from duomoe.sizes import format_size
from duomoe.startup import Startup
from duomoe.text_stream import TextStream

__all__ = ["EMBEDDED_MODEL", "LLM", "Chunk", "Completion", "Logprobs", "Metrics"]

Prompt = str | Sequence[int]


class LLM:
    """A model, ready to generate.

    Args:
        path: a folder in Hugging Face layout, perhaps read already; None is the model that comes with this package.
        config: how to run it; alternatively its fields as keyword arguments.
        quiet: show no progress while loading.
        startup: what times and shows the parts of starting; None is a new one.
        prompts: lengths, in tokens, of prompts to come: on a GPU, what they need is compiled while weights load.

    Attributes:
        startup: how long the parts of starting have taken.
        generation_config: what the checkpoint suggests for sampling; here only its end-of-sequence tokens are heeded.
        chat_stop: strings that end an answer in a chat, besides its end-of-sequence tokens.

    Raises:
        InputError: when the folder cannot be used, or the options cannot be met.

    Warns:
        RuntimeWarning: when there are fewer slots than planned, because layers do not pack; and when compiled kernels
            cannot be kept.
    """

    def __init__(
        self,
        path: ModelFolder | str | os.PathLike[str] | None = None,
        config: EngineConfig | None = None,
        *,
        quiet: bool = True,
        startup: Startup | None = None,
        prompts: Sequence[int] = (),
        **options: object,
    ) -> None:
        if config is not None and options:
            raise TypeError("give either a config or its fields, not both")
        try:
            self.engine_config = config or EngineConfig(**options)  # type: ignore[arg-type]
        except TypeError as error:
            raise TypeError(f"LLM: {error}") from None
        self.startup = startup or Startup(quiet)
        with self.startup.part("opening"):
            folder = path if isinstance(path, ModelFolder) else ModelFolder(path)
            self.plan = self.engine_config.plan(folder)
            self.tokenizer = folder.tokenizer
            self.generation_config = folder.checkpoint.read_json("generation_config.json") or {}
        also = token_ids(self.generation_config.get("eos_token_id"), "generation_config.json")
        self.config = folder.config
        self.eos_token_ids = frozenset(self.config.eos_token_ids) | frozenset(also)
        self.chat_stop = chat_stop_strings(folder.checkpoint)
        self._folder = folder
        self._compiler: GrammarCompiler | None = None
        self._limit: weakref.finalize[..., LLM] | None = None
        self._engine: Engine | None = None  # until it is built, and when it is closed
        if self.plan.device == "cuda":
            check_kernel_cache()
        path = self.engine_config.engine_log
        log = None if path is None else EngineLog(Path(path))
        try:
            self._build(folder, prompts, log)
        except BaseException as error:
            if log is not None:
                log.close()
            if isinstance(error, torch.OutOfMemoryError):
                raise InputError("the GPU's memory ran out while loading; lower --gpu-memory or free some") from None
            gc.collect()  # errors of threads hold what those had at hand in cycles
            raise

    def _build(self, folder: ModelFolder, prompts: Sequence[int], log: EngineLog | None) -> None:
        """Allocate what the plan says, load the weights, and put the engine together."""
        plan = self.plan
        device = self.engine_config.torch_device()
        if device.type == "cuda" and self.engine_config.gpu_memory is not None:
            self._enforce(plan)

        compiled = self.engine_config.compile == "on"
        model = Model(folder.architecture, self.config, device, plan.dtype, compiled)
        assert model.num_bytes == plan.weights_bytes, "the weights are not as planned"
        resident = plan.policy == "resident"
        store = ExpertStore(
            plan.expert_format,
            self.config.num_experts,
            device if resident else torch.device("cpu"),
            pin=not resident and device.type == "cuda",
        )
        with Rehearsal(model, plan.expert_format, prompts if device.type == "cuda" else ()) as rehearsal:
            # Of each layer with experts; all 0 where they are as the checkpoint stores them.
            self.quantisation_errors = load_weights(folder, model, store, plan.loading_room, self.startup)
            with self.startup.part("capturing"):
                rehearsal.wait()
        formats = zip(self.config.moe_layers, store.formats, strict=True)
        # Those that were to be packed and do not pack.
        self.unpacked_layers = [layer for layer, each in formats if each is not store.format]
        if self.unpacked_layers:
            # A slot has room for a row of any layer, so there are as many slots as if none packed.
            row = replace(store.format, row_bytes=max(each.row_bytes for each in store.formats))
            limits, planned = replace(plan.limits, policy=plan.policy), plan.num_slots
            plan = make_plan(folder.architecture, self.config, plan.dtype, row, plan.dequantised, limits)
            self.plan = plan = replace(plan, stored=store.num_bytes)
            if plan.num_slots < planned:
                warnings.warn(
                    f"experts of layer {', '.join(map(str, self.unpacked_layers))} do not pack and stay plain; slots "
                    f"have room for them, so there are {plan.num_slots} instead of {planned}",
                    RuntimeWarning,
                    stacklevel=3,
                )
        else:
            assert store.num_bytes == plan.num_experts * plan.row_bytes, "the store is not as planned"
        model.share_equal_head()
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what comparing the heads took is not to count beside what follows

        policy: Policy
        if resident:
            policy = Resident(model, store, plan.expands_quantised)
        else:
            predictor = self._predictor(folder, model) if plan.policy in PREDICTED else None
            link = open_link(device, self.engine_config.pace())  # last, since it begins a thread
            bounded = BOUNDED[plan.policy](model, store, plan.num_slots, link, predictor)
            assert bounded.lease.pool.rows.nbytes == plan.slot_bytes, "the slots are not as planned"
            if isinstance(bounded, CachedPolicy) and plan.page_routing_bytes:
                shape = plan.num_pages, len(self.config.moe_layers), self.config.num_experts
                bounded.keep_routing(PageRouting(*shape, device))
            policy = bounded
        self.policy_name = plan.policy
        self.max_model_len = plan.max_model_len
        cache = KVCache(self.config, plan.num_pages, device, plan.dtype)
        assert cache.num_bytes == plan.kv_bytes, "the KV pages are not as planned"
        bounds = Limits(plan.max_batch, plan.pass_tokens, policy.interruptible)
        scheduler: Scheduler[Request] = Scheduler(cache.pages, bounds)
        decode_step = DecodeStep(
            model,
            policy,
            cache,
            plan.max_batch,
            plan.max_model_len,
            captured=self.engine_config.graph,
            eos=self.eos_token_ids,
        )
        assert decode_step.sequences.num_bytes == plan.sequences_bytes, "the rows of sequences are not as planned"
        engine = self._engine = Engine(model, policy, cache, self.eos_token_ids, scheduler, decode_step, log)
        self._thread = EngineThread(engine)
        self.memory = {
            "weights_bytes": model.num_bytes,  # less than planned where the head turned out to be the embedding
            "expert_slots_bytes": plan.slot_bytes,
            "expert_store_bytes": 0 if resident else store.num_bytes,
            "kv_cache_bytes": plan.kv_bytes,
        }

    def _predictor(self, folder: ModelFolder, model: Model) -> Predictor | None:
        if self.engine_config.predictor == "none" or len(self.config.moe_layers) < 2:
            return None
        file = self.engine_config.predictor_file(folder)
        return GatePredictor(model) if file is None else load_predictor(file, model, self.fingerprint())

    def _enforce(self, plan: Plan) -> None:
        """Let torch's allocator keep to the stated budget, beyond what others in this process hold.

        The plan's sum cannot foresee which freed blocks the allocator keeps though they fit nothing; at its limit it
        gives them back to the GPU and tries again, before it fails. The limit is the process's, so it is lifted when
        this model goes.
        """
        assert plan.budget is not None
        torch.cuda.empty_cache()
        limit = torch.cuda.memory_reserved() + plan.budget
        whole = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / whole))
        self._limit = weakref.finalize(self, _lift_limit, os.getpid())
        self._limit.atexit = False

    @property
    def engine(self) -> Engine:
        """What runs requests; only its own thread may touch it while it has work.

        Raises:
            RuntimeError: when the model is closed.
        """
        engine = self._engine
        if engine is None:
            raise RuntimeError("this model is closed")
        return engine

    @property
    def policy(self) -> Policy:
        """What runs the blocks with their experts; raises as `engine`."""
        return self.engine.policy

    def prepare(self, params: SamplingParams) -> None:
        """Compile and capture what the decode steps of a request with such parameters need on a GPU.

        A request does so when it is missing, before its first token. Done ahead, it does not wait for that.

        Raises:
            RuntimeError: as `stream`.
        """
        checked = _checked(params)
        with self.startup.part("capturing"):
            self._thread.call(lambda engine: engine.prepare(1, [checked]))

    def close(self) -> None:
        """End the model: its thread, its requests (with errors), and its hold on memory.

        A model that nobody holds any more, nor a stream of it, ends by itself; `with LLM(…) as llm` closes it, too. In
        one of this package's own threads, as by a destructor, it does not wait for the end.
        """
        self._thread.close()
        self._engine = None
        if self._limit is not None:
            self._limit()
        gc.collect()  # what is left are cycles, which hold memory of the GPU

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        salt: bytes = b"",
    ) -> list[Completion]:
        """Continue prompts, several at a time.

        Args:
            prompts: strings, or lists of token ids; or a single one of either.
            params: for all of them, or for each its own; None is greedy.
            salt: what was computed for prompts that begin alike is shared among those of the same salt.

        Returns:
            A completion for each prompt, in order.

        Raises:
            InputError: when a prompt is empty or too long, there are not as many parameters as prompts, or an argument
                is of another type, before anything is generated.
            RuntimeError: as `stream`.
        """
        if not isinstance(prompts, str | list | tuple):
            raise InputError(f"prompts are strings or lists of token ids, not {type(prompts).__name__}")
        single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
        each: Sequence[Prompt] = [prompts] if single else prompts
        of_each = params if isinstance(params, Sequence) else [_checked(params)] * len(each)
        if len(of_each) != len(each):
            raise InputError(f"there are {len(of_each)} parameters for {len(each)} prompts; give one, or one for each")
        # All are checked before any is begun.
        requests = [self._request(prompt, _checked(own), salt) for prompt, own in zip(each, of_each, strict=True)]
        streams = submit_all(self._thread, requests)
        try:
            found = [chunk.completion for stream in streams for chunk in stream if chunk.completion]
            assert len(found) == len(requests), "a stream ends with its completion or with an error"
            return found
        finally:
            for stream in streams:
                stream.close()

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        salt: bytes = b"",
        shown: Sequence[str] = (),
    ) -> Stream:
        """Begin to continue one prompt, and return at once: its chunks, one for every token, are read by `for`.

        Requests that are under way advance together, whoever asked: the tokens of a stream that nobody reads wait in
        it. Closing the stream, or dropping it, ends the request.

        Args:
            prompt: a string, or token ids.
            params: None is greedy.
            salt: as for `generate`.
            shown: special tokens that are part of the text all the same, as those that an `OutputParser` looks for.

        Raises:
            InputError: when the prompt is empty or too long, or an argument is of another type.
            RuntimeError: when the model is closed, also by another thread meanwhile; when this process was forked from
                the one that has loaded it; when the engine's own thread calls, which cannot wait for itself.
        """
        (stream,) = submit_all(self._thread, [self._request(prompt, _checked(params), salt, shown)])
        return stream

    submit = stream  # as one says with asyncio, where it is read by `async for`

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """Return the float32 logits [tokens, vocab] after each token of a prompt.

        Raises:
            InputError: when the prompt is empty or too long, a token id is not in the vocabulary, or the GPU's memory
                does not hold the logits of so many tokens; the plan has room for those of `max_batch` tokens.
            RuntimeError: as `stream`.
        """
        checked = self._tokens(tokens, room=0)
        try:
            return self._thread.call(lambda engine: engine.logits(checked))
        except torch.OutOfMemoryError:
            size = format_size(len(checked) * self.config.vocab_size * 4)
            raise InputError(f"the GPU's memory does not hold {size} of logits; give a shorter prompt") from None

    def check(self) -> None:
        """Raise unless requests can still be served; returns at once.

        Raises:
            RuntimeError: when the model is closed, its thread has ended, or it was loaded in another process.
        """
        self._thread.check(waits=False)

    def check_device(self) -> None:
        """Raise unless the device still computes; waits for a step that goes on.

        Raises:
            RuntimeError: when it does not, as a GPU after some faults; and as `check`.
        """
        self._thread.check()
        if self.plan.device == "cuda":
            self._thread.call(lambda engine: torch.cuda.synchronize(engine.model.device))

    def tokenizer_config(self) -> dict[str, Any]:
        """Return the checkpoint's tokenizer_config.json; empty where there is none.

        Raises:
            InputError: when it cannot be read.
        """
        return self._folder.checkpoint.read_json("tokenizer_config.json") or {}

    def stats(self) -> Stats:
        """Return what is under way and what was done so far; never waits, in whatever thread.

        Raises:
            RuntimeError: as `check`.
        """
        self._thread.check(waits=False)
        return self.engine.stats()

    def output_parser(self, prompt: Sequence[int], tools: Sequence[Mapping[str, Any]] | None = None) -> OutputParser:
        """Return what takes the answer to a chat apart, in the style that the checkpoint's template shows.

        Args:
            prompt: what `chat_tokens` returned; it may have opened the reasoning already.
            tools: as given to `chat_tokens`; without them, an answer has no calls.

        Raises:
            InputError: when the prompt is not a list of token ids.
        """
        if not isinstance(prompt, list | tuple):
            raise InputError(f"a prompt is a list of token ids here, not {type(prompt).__name__}")
        return self._chat.output_parser(prompt, tools)

    @cached_property
    def _chat(self) -> ChatTemplate:
        return ChatTemplate(self._folder.checkpoint, self._folder.need_tokenizer())

    def fingerprint(self) -> str:
        """Return what tells this model from any other, a hash of its routers; traces and predictors carry it."""
        return self._folder.fingerprint()

    def chat(
        self,
        messages: str | Sequence[Message],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> Completion:
        """Answer a conversation; arguments and errors as of `chat_tokens` and `generate`.

        The answer ends at the checkpoint's own stop strings for chats, too (`chat_stop`).
        """
        return self.generate(self.chat_tokens(messages, tools, template_kwargs), self.chat_params(params))[0]

    def chat_params(self, params: SamplingParams | None = None) -> SamplingParams:
        """Return parameters with which an answer in a chat ends at `chat_stop`, too."""
        given = _checked(params)
        return replace(given, stop=(*given.stop, *self.chat_stop))

    def chat_tokens(
        self,
        messages: str | Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Return the prompt for a conversation, by the checkpoint's chat template.

        Args:
            messages: each with a role and its content, text or a list of parts of text, as the OpenAI API has them;
                a single text is a user's message.
            tools: functions that the model may call, as JSON schemas.
            template_kwargs: more variables for the template, as `enable_thinking`.

        Raises:
            InputError: when a message is not one, or there is no tokenizer or no template, or it fails, uses too much
                time or memory, or makes a text that is certainly too long.
        """
        return self._chat.tokens(messages, tools, template_kwargs, limit=self.max_model_len)

    def _request(self, prompt: Prompt, params: SamplingParams, salt: bytes = b"", shown: Sequence[str] = ()) -> Request:
        if not isinstance(salt, bytes):
            raise InputError(f"a salt is bytes, not {type(salt).__name__}")
        if not isinstance(shown, list | tuple) or not all(isinstance(text, str) for text in shown):
            raise InputError("the special tokens to be shown are a list of texts")
        if params.stop and self.tokenizer is None:
            raise InputError("--stop needs a tokenizer, and this checkpoint has no tokenizer.json")
        for token in (*params.stop_token_ids, *(params.logit_bias or {})):
            self._check_token(token)
        tokens = self._tokens(prompt)
        keys = None
        # Where keys depend on the sequence's length, no other sequence can use them.
        if self.engine_config.prefix_caching and not self.config.rope.depends_on_length:
            keys = PageKeys(salt)
            keys.of(tokens)  # here, in the caller's thread, since it takes time
        return Request(
            tokens=tokens,
            keys=keys,
            longest=min(len(tokens) + params.max_new_tokens, self.max_model_len),
            prompt_length=len(tokens),
            reuses=params.prompt_logprobs is None,
            params=params,
            seed=secrets.randbits(63) if params.seed is None else params.seed,
            stream=TextStream(self.tokenizer, params.stop, tokens, shown),
            matcher=None if params.grammar is None else self._grammars().matcher(params.grammar),
        )

    def _grammars(self) -> GrammarCompiler:
        """Return what compiles grammars for this model's tokenizer, made when it is first asked for."""
        if self._compiler is None:
            tokenizer = self._folder.need_tokenizer().encoder.to_str()
            eos = [token for token in self.eos_token_ids if token < self.config.vocab_size]
            self._compiler = GrammarCompiler(tokenizer, self.config.vocab_size, eos)
        return self._compiler

    def _check_token(self, token: object) -> None:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < self.config.vocab_size:
            raise InputError(
                f"{token!r} is not a token id of this model; they go from 0 to {self.config.vocab_size - 1}"
            )

    def _tokens(self, prompt: Prompt, room: int = 1) -> list[int]:
        """Return a prompt's token ids, having checked that they fit, with `room` for as many new ones."""
        if not isinstance(prompt, str | list | tuple):
            raise InputError(f"a prompt is a string or a list of token ids, not {type(prompt).__name__}")
        if isinstance(prompt, str):
            tokens = self._folder.need_tokenizer().encode(prompt, limit=self.max_model_len)
        else:
            tokens = list(prompt)
        if not tokens:
            raise InputError("the prompt is empty")
        for token in tokens:
            self._check_token(token)
        if len(tokens) + room > self.max_model_len:
            raise PromptTooLong(
                f"the prompt has {len(tokens)} tokens; prompt and answer may have {self.max_model_len} tokens"
            )
        return tokens


def _checked(params: SamplingParams | None) -> SamplingParams:
    """Return a request's parameters, greedy where there are none."""
    if params is not None and not isinstance(params, SamplingParams):
        raise InputError(f"parameters are SamplingParams, not {type(params).__name__}")
    return SamplingParams() if params is None else params


def _lift_limit(process: int) -> None:
    """Let torch's allocator have all of the GPU again; in a process forked from that one, it has none."""
    if os.getpid() == process:
        torch.cuda.set_per_process_memory_fraction(1.0)
