"""A loaded model as requests use it. All that is here may take long, and runs off the event loop."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from duomoe.engine.stream import Stream
from duomoe.errors import InputError
from duomoe.llm import LLM
from duomoe.server.answer import Answer
from duomoe.server.chat import ChatAnswer
from duomoe.server.completions import CompletionAnswer
from duomoe.server.errors import invalid
from duomoe.server.fields import Fields, parse_object
from duomoe.server.generation import Generation
from duomoe.server.metrics import Reading
from duomoe.server.params import default_options, sampling_params
from duomoe.server.protocol import (
    NEUTRAL,
    ChatRequest,
    CompletionRequest,
    Conversation,
    Prompt,
    Sampling,
    parse_chat,
    parse_completion,
    parse_conversation,
)
from duomoe.server.service import Service
from duomoe.server.token_text import TokenText
from duomoe.tokenizer import Tokenizer


class ServedModel:
    """A model, and what requests need of it.

    Args:
        llm: the model; this object ends it.
        service: counts what is under way.

    Attributes:
        texts: how single tokens read; None where there is no tokenizer.
    """

    def __init__(self, llm: LLM, service: Service) -> None:
        self.llm, self.service = llm, service
        self.texts = TokenText(llm.tokenizer) if llm.tokenizer is not None else None
        self._defaults = default_options(llm.generation_config)

    def begin_completion(self, body: bytes, tenant: bytes) -> Generation[CompletionRequest]:
        """Submit what a body of /v1/completions asks for.

        Raises:
            ApiError, InputError: when it cannot be done.
        """
        request = parse_completion(parse_object(body))
        name = self.service.check_name(request.model)
        if request.logprobs is not None:
            self._texts()  # tokens are told by their texts
        prompts = [self._encode(prompt) for prompt in request.prompts]
        streams = self._submit(prompts, request.sampling, _salt(tenant, request.salt))
        return Generation(request, name, prompts, streams)

    def begin_chat(self, body: bytes, tenant: bytes) -> Generation[ChatRequest]:
        """Submit what a body of /v1/chat/completions asks for; raises as `begin_completion`."""
        request = parse_chat(parse_object(body))
        name = self.service.check_name(request.model)
        prompt = self._conversation(request.conversation)
        parsers = [self.llm.output_parser(prompt, request.conversation.tools) for _ in range(request.sampling.n)]
        stop = (*request.sampling.options.get("stop", ()), *self.llm.chat_stop)
        sampling = replace(request.sampling, options=request.sampling.options | {"stop": stop})
        streams = self._submit([prompt], sampling, _salt(tenant, request.salt), parsers[0].markers)
        return Generation(request, name, [prompt], streams, parsers)

    def answer(self, generation: Generation[Any]) -> Answer:
        """Return what makes the answer of what is generated."""
        request = generation.request
        if isinstance(request, CompletionRequest):
            return CompletionAnswer(generation, self.texts)
        return ChatAnswer(generation, self._texts())

    def end(self, generation: Generation[Any]) -> None:
        """End what still runs of a request; once."""
        for stream in generation.streams:
            stream.close()
        self.service.give_back_sequences(len(generation.streams))

    def _encode(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str):
            return prompt
        return self._tokenizer().encode(prompt, limit=self.llm.max_model_len)

    def _tokenizer(self) -> Tokenizer:
        if self.llm.tokenizer is None:
            raise InputError("the checkpoint has no tokenizer.json; give prompts as token ids")
        return self.llm.tokenizer

    def _conversation(self, conversation: Conversation) -> list[int]:
        return self.llm.chat_tokens(conversation.messages, conversation.tools, conversation.template_kwargs)

    def _submit(
        self, prompts: Sequence[list[int]], sampling: Sampling, salt: bytes, shown: Sequence[str] = ()
    ) -> list[Stream]:
        """Submit the choices of all prompts, or of none."""
        each = sampling_params(sampling, self._defaults, self.llm.max_model_len)
        count = len(prompts) * sampling.n
        self.service.take_sequences(count)
        streams: list[Stream] = []
        try:
            for prompt in prompts:
                streams += [self.llm.submit(prompt, params, salt=salt, shown=shown) for params in each]
        except BaseException:
            for stream in streams:
                stream.close()
            self.service.give_back_sequences(count)
            raise
        return streams

    def tokenize(self, body: bytes) -> dict[str, Any]:
        """Answer /tokenize: the tokens of a text, or of a conversation.

        Raises:
            ApiError, InputError: when there are none.
        """
        fields = Fields(parse_object(body))
        self.service.check_name(fields.text("model"))
        strings = fields.flag("return_token_strs")
        text, special = fields.text("prompt"), fields.flag("add_special_tokens", True)
        if text is None:
            tokens = self._conversation(parse_conversation(fields))
        else:
            tokens = self._tokenizer().encode(text, special)
        fields.finish((), NEUTRAL)
        told = [self._texts().of(token)[0] for token in tokens] if strings else None
        longest = self.llm.max_model_len
        return {"count": len(tokens), "max_model_len": longest, "tokens": tokens, "token_strs": told}

    def detokenize(self, body: bytes) -> dict[str, Any]:
        """Answer /detokenize: the text of some tokens; raises as `tokenize`."""
        fields = Fields(parse_object(body))
        self.service.check_name(fields.text("model"))
        tokens, size = fields.take("tokens"), self.llm.config.vocab_size
        fields.finish((), {})
        if not isinstance(tokens, list) or not all(type(x) is int and 0 <= x < size for x in tokens):
            raise invalid(f"tokens must be a list of token ids, which go from 0 to {size - 1}", "tokens")
        return {"prompt": self._texts().decode(tokens)}

    def tokenizer_info(self) -> dict[str, Any]:
        """Answer /tokenizer_info: the checkpoint's tokenizer_config.json."""
        return self.llm.tokenizer_config()

    def _texts(self) -> TokenText:
        if self.texts is None:
            raise InputError("the checkpoint has no tokenizer.json")
        return self.texts

    def reading(self) -> Reading | None:
        """Return how the engine stands; None where it has ended. Returns at once."""
        plan = self.llm.plan
        try:
            return Reading(self.llm.stats(), plan.num_slots, plan.num_experts)
        except RuntimeError:
            return None

    def check(self) -> None:
        """Raise unless the engine runs; returns at once.

        Raises:
            RuntimeError: when it does not.
        """
        try:
            self.llm.check()
        except RuntimeError:
            raise RuntimeError("its thread has ended") from None

    def close(self) -> None:
        """End the model; waits for a step that goes on."""
        self.llm.close()


def _salt(tenant: bytes, wanted: str) -> bytes:
    """Return what keeps prefixes apart: those of one API key from another's, and as a request wants."""
    if not tenant and not wanted:
        return b""
    return hashlib.sha256(tenant + wanted.encode("utf-8", "surrogatepass")).digest()
