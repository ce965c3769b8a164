"""`python -m duomoe.generate`: continue a prompt on the command line.

The text goes to stdout as it is decoded; everything else goes to stderr.
"""

import argparse
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duomoe.chat_options import add_chat_options, read_messages, template_kwargs
from duomoe.command import Parser, add_running_options, engine_config, progress_is_visible, run_command, say, write
from duomoe.errors import InputError
from duomoe.startup import Startup
from duomoe.text_file import read_text

if TYPE_CHECKING:
    from duomoe.grammar import Grammar
    from duomoe.llm import LLM, Completion, Logprobs
    from duomoe.model_folder import ModelFolder
    from duomoe.sampling import SamplingParams


def parser() -> argparse.ArgumentParser:
    """Return the command line's grammar."""
    p = Parser(prog="python -m duomoe.generate", description="Continue a prompt with a Mixture-of-Experts model.")
    add_running_options(p)
    source = p.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT", help="the prompt (default: read from standard input)")
    source.add_argument("--prompt-file", metavar="FILE", help="a UTF-8 file that holds the prompt")
    source.add_argument("--messages", metavar="FILE", help="a JSON file: a list of messages, each {role, content}")
    p.add_argument("--chat", action="store_true", help="apply the checkpoint's chat template to the prompt")
    add_chat_options(p)
    p.add_argument("--json", action="store_true", help="print one JSON object instead of streaming text")
    told = "with --json, tell log-probabilities of"
    p.add_argument("--logprobs", type=int, metavar="N", help=f"{told} each token and of the N likeliest")
    p.add_argument("--prompt-logprobs", type=int, metavar="N", help=f"{told} the prompt's tokens likewise")
    p.add_argument(
        "--verbose",
        action="store_true",
        help="show the memory plan, quantisation errors, layers that do not pack and how long the parts of starting "
        "took, on stderr",
    )
    add_sampling_options(p)
    return p


def add_sampling_options(p: argparse.ArgumentParser) -> None:
    """Add the choices of how the next token is chosen; `sampling_params` reads them."""
    sampling = p.add_argument_group("sampling")
    sampling.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="(default: 128)")
    sampling.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default)")
    sampling.add_argument("--top-k", type=int, default=0, metavar="K", help="keep the K likeliest (default: 0, all)")
    sampling.add_argument("--top-p", type=float, default=1.0, metavar="P", help="keep this probability (default: 1)")
    sampling.add_argument("--min-p", type=float, default=0.0, metavar="P", help="keep this share of the likeliest's")
    sampling.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="divides logits of tokens that were there",
    )
    sampling.add_argument(
        "--presence-penalty", type=float, default=0.0, metavar="X", help="off the logits of tokens in the output"
    )
    sampling.add_argument("--frequency-penalty", type=float, default=0.0, metavar="X", help="the same for each time")
    sampling.add_argument(
        "--logit-bias", action="append", default=[], metavar="TOKEN=X", help="add to a token's logit; repeatable"
    )
    sampling.add_argument("--seed", type=int, metavar="S", help="makes sampling repeatable")
    sampling.add_argument("--stop", action="append", default=[], metavar="STR", help="end before this text; repeatable")
    sampling.add_argument(
        "--stop-token-id", action="append", type=int, default=[], metavar="ID", help="end with this token; repeatable"
    )
    sampling.add_argument("--min-tokens", type=int, default=0, metavar="N", help="no end by a token before so many")
    sampling.add_argument("--ignore-eos", action="store_true", help="go on after an end-of-sequence token")
    grammar = sampling.add_mutually_exclusive_group()
    grammar.add_argument("--json-object", action="store_true", help="answer with a JSON object")
    grammar.add_argument("--json-schema", metavar="FILE", help="answer with JSON by this schema")
    grammar.add_argument("--regex", metavar="TEXT", help="answer with what this regular expression matches")
    grammar.add_argument("--grammar", metavar="FILE", help="answer by this grammar, in llguidance's variant of Lark's")


def sampling_params(args: argparse.Namespace) -> "SamplingParams":
    """Return what was chosen with the options of `add_sampling_options`."""
    from duomoe.sampling import SamplingParams

    given = vars(args) | {
        "stop_token_ids": args.stop_token_id,
        "logit_bias": _biases(args.logit_bias),
        "grammar": _grammar(args),
    }
    return SamplingParams(**{field.name: given[field.name] for field in fields(SamplingParams) if field.name in given})


def _biases(texts: Sequence[str]) -> dict[int, float]:
    """Return what is added to the logits of tokens."""
    found: dict[int, float] = {}
    for text in texts:
        token, _, bias = text.partition("=")
        try:
            number, value = int(token), float(bias)
        except ValueError:
            raise InputError(f"--logit-bias is TOKEN=NUMBER, as 42=-5, got {text!r}") from None
        if number in found:
            raise InputError(f"--logit-bias is given twice for token {number}")
        found[number] = value
    return found


def _grammar(args: argparse.Namespace) -> "Grammar | None":
    """Return what the answer has to follow, if anything."""
    from duomoe.grammar import Grammar

    if args.json_object:
        return Grammar.json_object()
    if args.json_schema is not None:
        return Grammar.json_schema(read_text(Path(args.json_schema), piped=True))
    if args.regex is not None:
        return Grammar.regex(args.regex)
    return None if args.grammar is None else Grammar.lark(read_text(Path(args.grammar), piped=True))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # whatever the locale says: a model's text is Unicode
    return run_command(lambda: _run(parser().parse_args(argv)))


def _run(args: argparse.Namespace) -> None:
    if not args.json and (args.logprobs is not None or args.prompt_logprobs is not None):
        raise InputError("--logprobs and --prompt-logprobs are told in the object of --json; add it")
    prompt = _read_prompt(args)
    startup = Startup(quiet=not progress_is_visible())
    # Torch takes seconds to import: late, so that --help and a mistyped option answer at once.
    with startup.part("importing"):
        from duomoe.llm import LLM
        from duomoe.model_folder import ModelFolder

    params = sampling_params(args)
    with startup.part("opening"):
        folder = ModelFolder(args.model)
        tokens = _tokens(folder, prompt, args)
    with startup.counting_kernels():
        llm = LLM(folder, engine_config(args), startup=startup, prompts=[len(tokens)])
        params = llm.chat_params(params) if _is_chat(args) else params
        llm.prepare(params)
        completion = _generate(llm, tokens, params, args)
    if args.json:
        write(json.dumps(as_json(completion, llm, prompt), ensure_ascii=False) + "\n")
    if args.verbose:
        say(llm.startup.line())
    say(_summary(completion, llm))


def _is_chat(args: argparse.Namespace) -> bool:
    return bool(args.chat or args.messages)


def _tokens(folder: "ModelFolder", prompt: str | list[dict[str, Any]], args: argparse.Namespace) -> list[int]:
    from duomoe.chat_template import ChatTemplate

    limit = folder.config.max_position
    tokenizer = folder.need_tokenizer()
    if isinstance(prompt, str) and not args.chat:
        return tokenizer.encode(prompt, limit=limit)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if args.system is not None:
        messages = [{"role": "system", "content": args.system}, *messages]
    template = ChatTemplate(folder.checkpoint, tokenizer)
    return template.tokens(messages, template_kwargs=template_kwargs(args), limit=limit)


def _generate(llm: "LLM", tokens: list[int], params: "SamplingParams", args: argparse.Namespace) -> "Completion":
    """Say what there is to say of the model, and write the continuation as it comes."""
    if args.verbose:
        say(llm.plan.table())
        if any(llm.quantisation_errors):
            each = zip(llm.config.moe_layers, llm.quantisation_errors, strict=True)
            say("experts' error by quantisation: " + ", ".join(f"layer {n} {100 * error:.2f} %" for n, error in each))
        if llm.unpacked_layers:
            say("experts that do not pack and stay plain: layer " + ", ".join(map(str, llm.unpacked_layers)))
    for chunk in llm.stream(tokens, params):
        if not args.json:
            write(chunk.text + ("\n" if chunk.completion else ""))
        if chunk.completion:
            return chunk.completion
    raise AssertionError("a stream ends with its completion")


def as_json(completion: "Completion", llm: "LLM", prompt: str | list[dict[str, Any]]) -> dict[str, object]:
    """Return a completion as the one object that --json prints."""
    metrics = completion.metrics
    return {
        "prompt": prompt,
        "prompt_tokens": metrics.prompt_tokens,
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "logprobs": _told(completion.logprobs),
        "prompt_logprobs": _told(completion.prompt_logprobs),
        "ttft_s": metrics.ttft_s,
        "tpot_s": metrics.tpot_s,
        "e2e_s": metrics.e2e_s,
        "policy": llm.policy_name,
        "memory": llm.memory,
        "start": llm.startup.as_dict(),
        "experts": asdict(metrics.experts) | {"prefetch_wasted_bytes": metrics.experts.prefetch_wasted_bytes},
    }


def _told(logprobs: "Sequence[Logprobs | None] | None") -> list[dict[str, Any] | None] | None:
    return None if logprobs is None else [None if each is None else asdict(each) for each in logprobs]


def _read_prompt(args: argparse.Namespace) -> str | list[dict[str, Any]]:
    """Return the prompt's text, or a chat's messages."""
    if not _is_chat(args) and (args.system is not None or args.template_arg):
        raise InputError("--system and --template-arg are for chats; add --chat")
    if args.messages is not None:
        return read_messages(Path(args.messages))
    if args.prompt_file is not None:
        return read_text(Path(args.prompt_file), piped=True)
    try:
        if args.prompt is not None:
            args.prompt.encode("utf-8")  # bytes on the command line that are no UTF-8 arrive as lone surrogates
            return str(args.prompt)
        if sys.stdin is None or sys.stdin.isatty():
            raise InputError("no prompt; give --prompt TEXT, --prompt-file FILE, or text on standard input")
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeError:
        raise InputError("the prompt is not UTF-8 text") from None


def _summary(completion: "Completion", llm: "LLM") -> str:
    from duomoe.sizes import format_size

    metrics = completion.metrics
    count = len(completion.token_ids)
    tpot = f"TPOT {metrics.tpot_s * 1e3:.1f} ms, " if metrics.tpot_s is not None else ""
    return (
        f"{metrics.prompt_tokens} + {count} tokens, TTFT {metrics.ttft_s * 1e3:.0f} ms, {tpot}"
        f"{count / metrics.e2e_s:.1f} tokens/s, {llm.policy_name}, "
        f"{format_size(metrics.experts.link_bytes)} over the link"
    )


if __name__ == "__main__":
    sys.exit(main())
