"""The embedding API: load a model folder, generate, stream, or look at its logits."""

import itertools
import os
import secrets
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from duomoe.checkpoint import Checkpoint
from duomoe.config import EngineConfig, format_size
from duomoe.engine.engine import Engine
from duomoe.engine.request import Request
from duomoe.errors import InputError
from duomoe.experts.format import ExpertFormat, plain_format
from duomoe.experts.link import Traffic, open_link
from duomoe.experts.policies import BOUNDED, Policy, Resident
from duomoe.experts.predictor import GatePredictor
from duomoe.experts.store import ExpertStore
from duomoe.memory.kv_cache import PAGE_SIZE, KVCache, kv_page_bytes, pages_for
from duomoe.models import Architecture, Model, architecture_of
from duomoe.models.config import token_ids
from duomoe.models.model import expected_tensors, stacked
from duomoe.sampling import SamplingParams
from duomoe.tokenizer import TextStream, Tokenizer

EMBEDDED_MODEL = Path(__file__).parent / "assets"

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Metrics:
    """How long a request took, in seconds, and what its experts cost.

    `experts` counts what crossed the link between the request's start and its end, for all requests that ran then.
    """

    prompt_tokens: int
    ttft_s: float  # from submission to the first token
    tpot_s: float | None  # mean time between tokens after the first; None for a single token
    e2e_s: float  # from submission to the last token
    experts: Traffic


@dataclass(frozen=True)
class Completion:
    """What a prompt was continued with."""

    text: str
    token_ids: list[int]
    finish_reason: str  # "stop" or "length"
    metrics: Metrics


@dataclass(frozen=True)
class Chunk:
    """What one step added: text that is certain by now (often none), and at the end the whole completion."""

    text: str
    token_id: int
    completion: Completion | None


class LLM:
    """A model, ready to generate.

    Args:
        path: a folder in Hugging Face layout; None is the model that comes with this package.
        config: how to run it; alternatively its fields as keyword arguments.
        quiet: show no progress bar while loading.

    Raises:
        InputError: when the folder cannot be used, or the options cannot be met.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        config: EngineConfig | None = None,
        *,
        quiet: bool = True,
        **options: object,
    ) -> None:
        if config is not None and options:
            raise TypeError("give either a config or its fields, not both")
        try:
            self.engine_config = config or EngineConfig(**options)  # type: ignore[arg-type]
        except TypeError as error:
            raise TypeError(f"LLM: {error}") from None
        checkpoint = Checkpoint(EMBEDDED_MODEL if path is None else path)
        architecture = architecture_of(checkpoint.config)
        self.config = architecture.parse(checkpoint.config)
        if "lm_head.weight" in checkpoint.tensors:
            # What is stored counts, also where the config says that the head is the embedding.
            self.config = replace(self.config, tie_word_embeddings=False)
        checkpoint.check(expected_tensors(architecture, self.config))
        has_tokenizer = (checkpoint.path / "tokenizer.json").exists()
        self.tokenizer = Tokenizer(checkpoint) if has_tokenizer else None
        generation = checkpoint.read_json("generation_config.json") or {}
        also = token_ids(generation.get("eos_token_id"), "generation_config.json")
        self.eos_token_ids = frozenset(self.config.eos_token_ids) | frozenset(also)

        self._checkpoint = checkpoint
        self._routers = [
            name
            for layer in self.config.moe_layers
            for name, _ in architecture.block_sources(self.config, layer)["router"]
        ]

        self._numbers = itertools.count()
        self._lock = threading.RLock()  # one step at a time; callers in several threads share the batch
        try:
            self._build(checkpoint, architecture, quiet)
        except torch.OutOfMemoryError:
            raise InputError("the GPU's memory is too small; lower --expert-memory, or the longest sequence") from None

    def _build(self, checkpoint: Checkpoint, architecture: Architecture, quiet: bool) -> None:
        """Allocate everything, load the weights, and put the engine together."""
        device = self.engine_config.torch_device()
        dtype = self.engine_config.torch_dtype(self.config)
        compiled = {"auto": device.type == "cuda", "on": True, "off": False}[self.engine_config.compile]

        model = Model(architecture, self.config, device, dtype, compiled)
        expert_format = plain_format(self.config.hidden_size, self.config.moe_intermediate_size, dtype)
        self.policy_name, slots = self._choose_policy(expert_format)
        resident = self.policy_name == "resident"
        store = ExpertStore(
            expert_format,
            len(self.config.moe_layers),
            self.config.num_experts,
            device if resident else torch.device("cpu"),
            pinned=not resident and device.type == "cuda",
        )
        experts = _expert_destinations(architecture, model, store)
        checkpoint.load([*model.destinations(), *experts], quiet=quiet)
        model.share_equal_head()

        self.policy: Policy
        if resident:
            self.policy = Resident(model, store)
        else:
            link = open_link(device, self.engine_config.pace())
            predictor = GatePredictor(model) if self.policy_name == "duo" else None
            self.policy = BOUNDED[self.policy_name](model, store, slots, link, predictor)
        self.max_model_len = min(self.engine_config.max_model_len or self.config.max_position, self.config.max_position)
        num_pages = self._num_pages(device, dtype)
        # Shorter than asked for only where memory does not hold one sequence of that length.
        self.max_model_len = min(self.max_model_len, num_pages * PAGE_SIZE)
        cache = KVCache(self.config, num_pages, device, dtype)
        self.engine = Engine(
            model,
            self.policy,
            cache,
            self.eos_token_ids,
            self.engine_config.max_batch,
            self.max_model_len,
            captured=self.engine_config.graph,
        )
        self.memory = {
            "weights_bytes": model.num_bytes,
            "expert_slots_bytes": slots * expert_format.row_bytes,
            "expert_store_bytes": 0 if resident else store.num_bytes,
            "kv_cache_bytes": cache.num_bytes,
        }

    def generate(self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | None = None) -> list[Completion]:
        """Continue prompts, several at a time.

        Args:
            prompts: strings, or lists of token ids; or a single one of either.
            params: for all of them; None is greedy.

        Returns:
            A completion for each prompt, in order.

        Raises:
            InputError: when a prompt is empty or too long, before anything is generated.
        """
        if not isinstance(prompts, str | list | tuple):
            raise InputError(f"prompts are strings or lists of token ids, not {type(prompts).__name__}")
        single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
        each: Sequence[Prompt] = [prompts] if single else prompts
        requests = [self._request(prompt, params or SamplingParams()) for prompt in each]
        finished: dict[int, Completion] = {}
        for request, chunk in self._run(requests):
            if chunk.completion:
                finished[request.number] = chunk.completion
        return [finished[request.number] for request in requests]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Chunk]:
        """Continue one prompt and yield a chunk for every token; closing the iterator ends the request.

        Requests that are under way advance together, whoever asks: the tokens of a stream that nobody reads wait in it.

        Raises:
            InputError: when the prompt is empty or too long.
        """
        request = self._request(prompt, params or SamplingParams())
        return (chunk for _, chunk in self._run([request]))

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """Return the float32 logits [tokens, vocab] after each token of a prompt.

        Raises:
            InputError: when the prompt is empty or too long, or a token id is not in the vocabulary.
            RuntimeError: when requests that are under way have taken all pages of the KV cache.
        """
        checked = self._tokens(tokens, room=0)
        with self._lock:
            return self.engine.logits(next(self._numbers), checked)

    def fingerprint(self) -> str:
        """Return what tells this model from any other, a hash of its routers; traces and predictors carry it."""
        return self._checkpoint.fingerprint(self._routers)

    def chat_tokens(self, message: str) -> list[int]:
        """Return the prompt for one user message, by the checkpoint's chat template.

        Raises:
            InputError: when there is no tokenizer or no template.
        """
        return self._need_tokenizer().encode_chat(message)

    def _run(self, requests: list[Request]) -> Iterator[tuple[Request, Chunk]]:
        scheduler = self.engine.scheduler
        with self._lock:
            before = self.policy.traffic_so_far()
            for request in requests:
                scheduler.add(request)
        waiting = list(requests)
        try:
            while waiting:
                with self._lock:
                    if not any(request.news or request.error for request in waiting):
                        self.engine.step()  # may advance other callers' requests too; each reads its own news
                for request in waiting:
                    while request.news:
                        text, token = request.news.popleft()
                        ended = request.finish_reason is not None and not request.news
                        yield request, Chunk(text, token, self._completion(request, before) if ended else None)
                    if request.error is not None:
                        raise RuntimeError(f"a step of this request failed: {request.error}") from request.error
                waiting = [request for request in waiting if request.finish_reason is None or request.news]
        finally:
            with self._lock:
                for request in requests:
                    scheduler.remove(request)

    def _completion(self, request: Request, before: Traffic) -> Completion:
        count = len(request.generated)
        assert request.finish_reason is not None
        metrics = Metrics(
            prompt_tokens=len(request.prompt),
            ttft_s=request.first_token - request.submitted,
            tpot_s=(request.last_token - request.first_token) / (count - 1) if count > 1 else None,
            e2e_s=request.last_token - request.submitted,
            experts=self.policy.traffic_so_far().since(before),
        )
        return Completion(request.stream.text, request.generated, request.finish_reason, metrics)

    def _request(self, prompt: Prompt, params: SamplingParams) -> Request:
        if params.stop and self.tokenizer is None:
            raise InputError("--stop needs a tokenizer, and this checkpoint has no tokenizer.json")
        tokens = self._tokens(prompt)
        return Request(
            number=next(self._numbers),
            prompt=tokens,
            params=params,
            seed=secrets.randbits(63) if params.seed is None else params.seed,
            length_limit=self.max_model_len,
            stream=TextStream(self.tokenizer, params.stop, tokens),
        )

    def _tokens(self, prompt: Prompt, room: int = 1) -> list[int]:
        """Return a prompt's token ids, having checked that they fit, with `room` for as many new ones."""
        if not isinstance(prompt, str | list | tuple):
            raise InputError(f"a prompt is a string or a list of token ids, not {type(prompt).__name__}")
        tokens = self._need_tokenizer().encode(prompt) if isinstance(prompt, str) else list(prompt)
        if not tokens:
            raise InputError("the prompt is empty")
        for token in tokens:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < self.config.vocab_size:
                raise InputError(
                    f"{token!r} is not a token id of this model; they go from 0 to {self.config.vocab_size - 1}"
                )
        if len(tokens) + room > self.max_model_len:
            raise InputError(
                f"the prompt has {len(tokens)} tokens; prompt and answer may have {self.max_model_len} tokens"
            )
        return tokens

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise InputError("this checkpoint has no tokenizer.json; give the prompt as token ids")
        return self.tokenizer

    def _choose_policy(self, expert_format: ExpertFormat) -> tuple[str, int]:
        """Return the policy's name and its number of slots."""
        asked, limit = self.engine_config.policy, self.engine_config.expert_bytes()
        if asked not in ("auto", "resident", *BOUNDED):
            raise InputError(f"--policy: {asked!r} is not one of auto, resident, {', '.join(BOUNDED)}")
        row = expert_format.row_bytes
        every = len(self.config.moe_layers) * self.config.num_experts
        fitting = every if limit is None else min(limit // row, every)
        if fitting < min(1, every):
            raise InputError(f"--expert-memory: at least {format_size(row)} ({row} bytes) is needed, for one expert")
        if asked == "resident" and fitting < every:
            raise InputError(
                f"--policy resident needs --expert-memory {every * row} ({format_size(every * row)}) for all {every} "
                f"experts; give more or use --policy lru"
            )
        name = asked if asked != "auto" else "resident" if fitting == every else "lru"
        if name in BOUNDED and limit is None:
            fitting = self.config.num_experts
        if name == "on_demand":  # keeps nothing past a layer
            fitting = min(fitting, self.config.num_experts)
        return name, fitting

    def _num_pages(self, device: torch.device, dtype: torch.dtype) -> int:
        """Return how many KV pages to have: enough for a full batch of full length, or what memory allows."""
        full = self.engine_config.max_batch * pages_for(self.max_model_len)
        if device.type == "cuda":
            available = int(torch.cuda.mem_get_info()[0] * 0.8)
        else:
            available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
        allowed = available // kv_page_bytes(self.config, dtype)
        if allowed < 1:
            raise InputError("no memory is left for KV pages; lower --expert-memory")
        return min(full, allowed)


def _expert_destinations(architecture: Architecture, model: Model, store: ExpertStore) -> Iterator[tuple[str, Tensor]]:
    """Yield each expert tensor's name in the checkpoint and its place in the store."""
    for layer, rows in zip(model.config.moe_layers, store.layers, strict=True):
        views = store.format.views(rows)
        for expert in range(store.num_experts):
            for name, sources in architecture.expert_sources(model.config, layer, expert).items():
                yield from stacked(sources, views[name][expert])
