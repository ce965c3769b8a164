"""What clients ask for: the requests of the OpenAI protocol, read and checked field by field.

A field that changes the answer is honoured or refused by name. A field that does not is accepted.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from duomoe.server.errors import invalid
from duomoe.server.fields import Fields

# An answer is the same whatever these say.
ACCEPTED = frozenset(
    [
        "metadata",
        "user",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "verbosity",
        "prediction",
        "request_id",
        "priority",
    ]
)

# These would change the answer; only what holds anyway may be said.
NEUTRAL: Mapping[str, Any] = {
    "best_of": 1,
    "use_beam_search": False,
    "length_penalty": 1.0,
    "early_stopping": False,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "include_stop_str_in_output": False,
    "return_tokens_as_token_ids": False,
    "return_token_ids": False,
    "suffix": "",
    "modalities": ["text"],
    "add_generation_prompt": True,
    "continue_final_message": False,
    "include_reasoning": True,
    "echo": False,
}

MAX_CHOICES = 128  # of one prompt
MAX_PROMPTS = 1024
MAX_STOPS, MAX_STOP_LENGTH = 64, 1024
MAX_STOP_TOKENS = 1024
MAX_BIASES = 1024
MAX_LOGPROBS = 20
MAX_MESSAGES = 8192
MAX_TOOLS = 512
INT64 = 2**63

ROLES = ("system", "developer", "user", "assistant", "tool")

Prompt = str | list[int]


@dataclass(frozen=True)
class GrammarSource:
    """What an answer has to follow, not compiled yet."""

    kind: Literal["json_object", "json_schema", "regex", "lark"]
    source: Any = None  # a schema as an object, or a text; None for json_object


@dataclass(frozen=True)
class Sampling:
    """How choices are drawn.

    Attributes:
        options: fields of `SamplingParams` that the client has set, other than those below.
        n: choices for each prompt.
        seed: of the first choice; None lets each draw its own.
    """

    options: dict[str, Any]
    n: int
    seed: int | None
    grammar: GrammarSource | None


@dataclass(frozen=True)
class Streaming:
    """How an answer is sent: whole, or as events; with usage at the end, or in each event."""

    stream: bool
    usage_at_end: bool
    usage_in_each: bool


@dataclass(frozen=True)
class CompletionRequest:
    """What /v1/completions is asked for.

    Attributes:
        echo: whether choices begin with their prompt.
        logprobs: how many likeliest tokens are told at each place; None is no log-probabilities at all.
        scored: whether the answer is the echoed prompt alone (`max_tokens` is 0).
        salt: what keeps this request's prefixes apart from others'.
    """

    model: str | None
    prompts: list[Prompt]
    sampling: Sampling
    streaming: Streaming
    echo: bool
    logprobs: int | None
    scored: bool
    salt: str


@dataclass(frozen=True)
class Conversation:
    """Messages as a chat template takes them, each checked for its shape."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ChatRequest:
    """What /v1/chat/completions is asked for.

    Attributes:
        one_call: whether only the first tool call of an answer counts.
        logprobs: as in `CompletionRequest`.
    """

    model: str | None
    conversation: Conversation
    sampling: Sampling
    streaming: Streaming
    one_call: bool
    logprobs: int | None
    salt: str


def parse_completion(given: dict[str, Any]) -> CompletionRequest:
    """Return what a body of /v1/completions asks for.

    Raises:
        ApiError: when a field is missing, wrong or not supported.
    """
    fields = Fields(given)
    model, salt = fields.text("model"), fields.text("cache_salt") or ""
    prompts = _prompts(fields.take("prompt"))
    echo, logprobs = fields.flag("echo"), fields.integer("logprobs", 0, MAX_LOGPROBS)
    asked = fields.integer("max_tokens", 0 if echo else 1, INT64)
    options = _options(fields) | {"max_new_tokens": 16 if asked is None else max(1, asked)}
    if logprobs is not None:
        options["logprobs"] = logprobs
        if echo:
            options["prompt_logprobs"] = logprobs
    sampling = _sampling(fields, options, best_of=fields.integer("best_of", 1, MAX_CHOICES))
    streaming = _streaming(fields)
    if streaming.stream and echo and logprobs is not None:
        raise invalid("a prompt's log-probabilities are not streamed; leave out stream", "stream", "unsupported")
    request = CompletionRequest(model, prompts, sampling, streaming, echo, logprobs, asked == 0, salt)
    fields.finish(ACCEPTED, NEUTRAL)
    return request


def parse_chat(given: dict[str, Any]) -> ChatRequest:
    """Return what a body of /v1/chat/completions asks for.

    Raises:
        ApiError: when a field is missing, wrong or not supported.
    """
    fields = Fields(given)
    model, salt = fields.text("model"), fields.text("cache_salt") or ""
    conversation = parse_conversation(fields)
    asked = fields.integer("max_tokens", 1, INT64)
    limit = fields.integer("max_completion_tokens", 1, INT64) or asked
    options = _options(fields) | {"max_new_tokens": INT64 if limit is None else limit}  # as long as the context
    top = fields.integer("top_logprobs", 0, MAX_LOGPROBS)
    logprobs = (top or 0) if fields.flag("logprobs") else None
    if top and logprobs is None:
        raise invalid("top_logprobs needs logprobs: true", "top_logprobs")
    if logprobs is not None:
        options["logprobs"] = logprobs
    sampling = _sampling(fields, options)
    one_call = not fields.flag("parallel_tool_calls", True)
    request = ChatRequest(model, conversation, sampling, _streaming(fields), one_call, logprobs, salt)
    fields.finish(ACCEPTED, NEUTRAL)
    return request


def _prompts(given: Any) -> list[Prompt]:
    """Return the prompts: a text, a list of texts, a list of token ids, or a list of such lists."""
    if isinstance(given, str):
        return [given]
    if not isinstance(given, list) or not given:
        raise invalid("prompt must be a text, a list of texts, a list of token ids, or a list of such lists", "prompt")
    if all(isinstance(each, int) and not isinstance(each, bool) for each in given):
        return [given]
    if len(given) > MAX_PROMPTS:
        raise invalid(f"prompt: at most {MAX_PROMPTS} prompts in one request, got {len(given)}", "prompt")
    for number, each in enumerate(given):
        tokens = isinstance(each, list) and all(isinstance(x, int) and not isinstance(x, bool) for x in each)
        if not each or not (isinstance(each, str) or tokens):
            raise invalid(f"prompt[{number}] must be a text or a list of token ids, not empty", f"prompt[{number}]")
    return given


def _options(fields: Fields) -> dict[str, Any]:
    """Return the fields of `SamplingParams` that both endpoints have, those that were given."""
    top_k = fields.integer("top_k", -1, 2**31 - 1)
    found: dict[str, Any] = {
        "temperature": fields.number("temperature", 0, 1e6),
        "top_p": _above_zero(fields.number("top_p", 0, 1)),
        "top_k": max(0, top_k) if top_k is not None else None,  # -1 is another spelling of no limit
        "min_p": fields.number("min_p", 0, 1),
        "repetition_penalty": fields.number("repetition_penalty", 1e-6, 1e6),
        "presence_penalty": fields.number("presence_penalty", -2, 2),
        "frequency_penalty": fields.number("frequency_penalty", -2, 2),
        "min_tokens": fields.integer("min_tokens", 0, INT64),
        "stop": tuple(fields.texts("stop", MAX_STOPS, MAX_STOP_LENGTH)) or None,
        "stop_token_ids": _stop_tokens(fields),
        "logit_bias": _logit_bias(fields),
        "ignore_eos": fields.flag("ignore_eos") or None,
    }
    return {name: value for name, value in found.items() if value is not None}


def _above_zero(top_p: float | None) -> float | None:
    """Return a share that keeps at least the likeliest token, which is what OpenAI's clients mean by 0."""
    return None if top_p is None else max(top_p, 1e-9)


def _stop_tokens(fields: Fields) -> tuple[int, ...] | None:
    given = fields.take("stop_token_ids")
    if given is None:
        return None
    tokens = isinstance(given, list) and all(isinstance(x, int) and not isinstance(x, bool) for x in given)
    if not tokens or len(given) > MAX_STOP_TOKENS:
        raise invalid(f"stop_token_ids must be a list of at most {MAX_STOP_TOKENS} token ids", "stop_token_ids")
    return tuple(given) or None


def _logit_bias(fields: Fields) -> dict[int, float] | None:
    given = fields.mapping("logit_bias") or {}
    if len(given) > MAX_BIASES:
        raise invalid(f"logit_bias: at most {MAX_BIASES} tokens, got {len(given)}", "logit_bias")
    biases = {}
    for token, bias in given.items():
        number = isinstance(bias, int | float) and not isinstance(bias, bool) and -100 <= bias <= 100
        if not (token.isascii() and token.isdigit() and len(token) < 12) or not number:
            raise invalid("logit_bias must map token ids to numbers from -100 to 100", "logit_bias")
        biases[int(token)] = float(bias)
    return biases or None


def _sampling(fields: Fields, options: dict[str, Any], best_of: int | None = None) -> Sampling:
    n = fields.integer("n", 1, MAX_CHOICES) or 1
    if best_of not in (None, n):
        raise invalid("best_of is supported only where it equals n", "best_of", "unsupported")
    return Sampling(options, n, fields.integer("seed", -INT64, INT64 - 1), _grammar(fields))


def _streaming(fields: Fields) -> Streaming:
    stream = fields.flag("stream")
    options = fields.object("stream_options") or Fields({})
    each = options.flag("continuous_usage_stats")
    streaming = Streaming(stream, options.flag("include_usage"), each)
    options.flag("include_obfuscation")  # padding, which loopback and TLS clients do without
    options.finish((), {})
    return streaming


def _grammar(fields: Fields) -> GrammarSource | None:
    """Return what an answer has to follow, as OpenAI says it or as vLLM does."""
    wanted = [_response_format(fields), _structured_outputs(fields)]
    found = [each for each in wanted if each is not None]
    if len(found) > 1:
        raise invalid("give one of response_format and structured_outputs", "structured_outputs")
    return found[0] if found else None


def _response_format(fields: Fields) -> GrammarSource | None:
    wanted = fields.object("response_format")
    if wanted is None:
        return None
    kind = wanted.text("type")
    if kind == "json_schema":
        inner = wanted.object("json_schema")
        schema = None if inner is None else inner.mapping("schema")
        if schema is None:
            raise invalid("response_format.json_schema.schema is missing", "response_format")
        return GrammarSource("json_schema", schema)
    if kind not in ("text", "json_object"):
        raise invalid("response_format.type must be text, json_object or json_schema", "response_format")
    return GrammarSource("json_object") if kind == "json_object" else None


def _structured_outputs(fields: Fields) -> GrammarSource | None:
    wanted = fields.object("structured_outputs")
    if wanted is None:
        return None
    texts = {"regex": wanted.text("regex"), "lark": wanted.text("grammar")}
    found = [GrammarSource(kind, text) for kind, text in texts.items() if text is not None]  # type: ignore[arg-type]
    if (schema := wanted.mapping("json")) is not None:
        found.append(GrammarSource("json_schema", schema))
    if wanted.flag("json_object"):
        found.append(GrammarSource("json_object"))
    wanted.finish((), {})
    if len(found) != 1:
        raise invalid("structured_outputs must have one of json, json_object, regex and grammar", "structured_outputs")
    return found[0]


def parse_conversation(fields: Fields) -> Conversation:
    """Return the conversation among a request's fields, which also /tokenize has.

    Raises:
        ApiError: when a message or tool is not what it should be; the error names it.
    """
    messages = fields.take("messages")
    if not isinstance(messages, list) or not 0 < len(messages) <= MAX_MESSAGES:
        raise invalid(f"messages must be a list of 1 to {MAX_MESSAGES} messages", "messages")
    kwargs = fields.mapping("chat_template_kwargs") or {}
    if (effort := fields.text("reasoning_effort")) is not None:
        kwargs = {"reasoning_effort": effort} | kwargs
    checked = [_message(message, f"messages[{number}]") for number, message in enumerate(messages)]
    return Conversation(checked, _tools(fields), kwargs)


def _message(given: Any, where: str) -> dict[str, Any]:
    """Return a message as it came, once it is known to have a role, text, and calls where a role has them."""
    if not isinstance(given, dict):
        raise invalid(f"{where} must be an object with a role and a content", where)
    fields = Fields(given, where)
    role = fields.text("role")
    if role not in ROLES:
        raise invalid(f"{where}.role must be one of {', '.join(ROLES)}", f"{where}.role")
    content, calls = fields.take("content"), fields.take("tool_calls")
    if content is None and not (role == "assistant" and (calls or "reasoning_content" in given)):
        raise invalid(f"{where}.content is missing", f"{where}.content")
    if content is not None and not isinstance(content, str):
        _check_parts(content, f"{where}.content")
    if calls is not None:
        _check_calls(calls, f"{where}.tool_calls")
    for name in ("name", "tool_call_id", "reasoning_content", "refusal"):
        fields.text(name)
    fields.finish((), {})
    return {name: value for name, value in given.items() if value is not None}


def _check_parts(parts: Any, where: str) -> None:
    """Check that content is a list of text parts."""
    if not isinstance(parts, list):
        raise invalid(f"{where} must be a text or a list of text parts", where)
    for number, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in (None, "text"):
            raise invalid(f"{where}[{number}]: parts of type {kind!r} are not supported; text is", where, "unsupported")
        if kind is None or not isinstance(part.get("text"), str):
            raise invalid(f"{where}[{number}] must be an object with type text and a text", where)


def _check_calls(calls: Any, where: str) -> None:
    """Check that an assistant's calls are functions with names and arguments."""
    for call in calls if isinstance(calls, list) else [None]:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise invalid(f"{where} must be a list of calls, each with a function that has a name", where)
        if not isinstance(function.get("arguments", ""), str | dict):
            raise invalid(f"{where}: the arguments of a function are a text", where)


def _tools(fields: Fields) -> list[dict[str, Any]] | None:
    """Return the tools that an answer may call, or None."""
    tools, choice = fields.take("tools"), fields.take("tool_choice")
    if tools is not None and (not isinstance(tools, list) or len(tools) > MAX_TOOLS):
        raise invalid(f"tools must be a list of at most {MAX_TOOLS} functions", "tools")
    for number, tool in enumerate(tools or []):
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise invalid(f"tools[{number}] must have type function, and a function with a name", f"tools[{number}]")
    if choice not in (None, "auto", "none"):
        raise invalid(
            "tool_choice must be auto or none: a call that is forced is not supported", "tool_choice", "unsupported"
        )
    return None if choice == "none" or not tools else tools
