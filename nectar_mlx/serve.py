"""`nectar serve book.nectar ...`: answers over HTTP as OpenAI's and Ollama's servers do; each file is a model."""

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from . import agent, cli
from .errors import NectarError

if TYPE_CHECKING:
    from .library import Library
    from .serving import server


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(make_parser(), _work, argv)


def make_parser() -> argparse.ArgumentParser:
    parser = cli.Parser("serve", "Serves .nectar files over HTTP, as OpenAI and Ollama do; a file's name is a model's.")
    parser.add_argument(
        "nectars", nargs="+", metavar="FILE", help="files, folders of them, ids on the hub; or: library"
    )
    cli.add_model(parser)
    cli.add_library(parser)
    agent.add_options(parser, cli.say)
    cli.add_retrieval(parser)
    _add_access(parser)
    _add_generation(parser)
    _add_performance(parser)
    return parser


def _add_access(parser: argparse.ArgumentParser) -> None:
    """Where it listens, and to whom."""
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=int, default=8080, metavar="N", help="port to listen on (8080; 0: a free one)")
    parser.add_argument(
        "--api-key-file", metavar="FILE", help="its first line is the key that clients need (default: NECTAR_API_KEY)"
    )
    parser.add_argument(
        "--allowed-origins", type=_names, default=[], metavar="ORIGINS", help="web pages elsewhere that may ask (none)"
    )
    parser.add_argument(
        "--allowed-hosts", type=_names, default=[], metavar="NAMES", help="names of this machine, besides its own"
    )
    parser.add_argument("--max-body", type=cli.size, default=8_000_000, metavar="SIZE", help="largest request (8 MB)")
    parser.add_argument("--max-requests", type=int, default=512, metavar="N", help="open at a time (512)")
    levels = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
    parser.add_argument("--log-level", choices=levels, default="INFO", help="(INFO: a line for each request)")


def _add_generation(parser: argparse.ArgumentParser) -> None:
    """Defaults of a request."""
    parser.add_argument("--temp", type=float, default=0.0, help="sampling temperature (0.0)")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from the likeliest tokens of this mass (1.0)")
    parser.add_argument("--top-k", type=int, default=0, metavar="N", help="sample from the N likeliest tokens (0: all)")
    parser.add_argument("--min-p", type=float, default=0.0, help="least probability relative to the likeliest (0.0)")
    parser.add_argument("--max-tokens", type=int, default=512, metavar="N", help="the longest answer (512)")
    parser.add_argument(
        "--chat-template-args",
        type=_object,
        default={},
        metavar="JSON",
        help="""arguments for the chat template, e.g. '{"enable_thinking":true}'""",
    )


def _add_performance(parser: argparse.ArgumentParser) -> None:
    """Batches, caches and memory."""
    parser.add_argument("--memory", type=cli.size, metavar="SIZE", help="for files and answers (half of what is free)")
    parser.add_argument(
        "--decode-concurrency", type=int, default=32, metavar="N", help="answers that are written at a time (32)"
    )
    parser.add_argument(
        "--prefill-step-size", type=int, default=512, metavar="N", help="tokens of a prompt read at a time (512)"
    )
    parser.add_argument("--prompt-cache-size", type=int, default=32, metavar="N", help="conversations kept (32)")
    parser.add_argument("--prompt-cache-bytes", type=cli.size, metavar="SIZE", help="largest size of these, e.g. 2G")
    parser.add_argument(
        "--kv-bits", type=int, choices=(4, 8), help="bits of the live tokens' cache; answers are then not batched"
    )


def start(args: argparse.Namespace) -> "server.Server":
    """A server that is bound and has its model loaded; NectarError for an error in the user's input."""
    from .answering import Sampling
    from .serving import server
    from .serving.admission import Settings
    from .serving.guard import Access
    from .serving.service import Defaults

    for name in ("max_body", "max_requests", "max_tokens", "decode_concurrency", "prefill_step_size"):
        if getattr(args, name) < 1:
            raise NectarError(f"--{name.replace('_', '-')} must be at least 1")
    sampling = {"temperature": args.temp, "top_p": args.top_p, "top_k": args.top_k, "min_p": args.min_p}
    Sampling(**sampling)
    options = server.Options(
        host=args.host,
        port=args.port,
        max_body=args.max_body,
        access=Access(hosts=[*args.allowed_hosts, args.host], origins=args.allowed_origins, key=_key(args)),
        defaults=Defaults(sampling=sampling, max_tokens=args.max_tokens, template=args.chat_template_args),
        settings=Settings(
            concurrency=args.decode_concurrency,
            max_open=args.max_requests,
            prefill_step=args.prefill_step_size,
            kv_bits=args.kv_bits,
            exact=args.exact,
            kept_prompts=max(0, args.prompt_cache_size),
            kept_bytes=1 << 62 if args.prompt_cache_bytes is None else args.prompt_cache_bytes,
            memory=args.memory,
        ),
    )
    library, model, adapter = _library(args)
    nectars = args.nectars if library is None else []
    return server.start(nectars, model, options, library=library, adapter=adapter, fetch=args.fetch, log=cli.say)


def _library(args: argparse.Namespace) -> "tuple[Library | None, str | None, str | None]":
    """The library, where it is to be served, the model and its adapter."""
    if cli.LIBRARY not in args.nectars:
        if args.library is not None:
            raise NectarError("--library is for `library` in the place of a .nectar")
        return None, args.model, args.adapter
    if len(args.nectars) > 1:
        raise NectarError("`library` is served alone; a file or folder of that name is ./library")
    from . import from_library
    from .installed import choose

    library = from_library.open_library(args, make=True)
    identity = library.identity
    if identity is None:
        choose(args, log=cli.say)
        return library, args.model, args.adapter
    if args.model not in (None, identity.name) or args.adapter not in (None, identity.adapter):
        raise NectarError(
            f"the library is fitted on {identity.described}: leave out --model and --adapter, or fit it anew with them "
            "by `nectar update`"
        )
    return library, identity.name, identity.adapter or None


def _work(args: argparse.Namespace) -> None:
    if args.install_agent:
        return agent.install(args.nectars, log=cli.say)
    from mlx_lm.generate import maybe_set_recommended_wired_limit

    logging.basicConfig(level=args.log_level, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("uvicorn").setLevel("ERROR")
    maybe_set_recommended_wired_limit()
    running = start(args)
    host = f"[{running.host}]" if ":" in running.host else running.host
    address = f"http://{host}:{running.port}"
    names = running.service.names
    which = ", ".join(names) if len(names) <= 8 else f"{len(names):,} files"
    cli.say(f"serving {which}: a page at {address}/, for programs {address}/v1")
    running.run()


def _key(args: argparse.Namespace) -> str:
    """From the file or the environment: other users of the machine see a command's arguments."""
    if args.api_key_file is None:
        return os.environ.get("NECTAR_API_KEY", "").strip()
    try:
        key = (Path(args.api_key_file).read_text().splitlines() or [""])[0].strip()
    except (OSError, UnicodeDecodeError) as error:
        raise NectarError(f"{args.api_key_file}: no key can be read ({error})") from None
    if not key:
        raise NectarError(f"{args.api_key_file}: its first line is empty, which is no key")
    return key


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _object(text: str) -> dict[str, object]:
    try:
        value = json.loads(text)
    except RecursionError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("must be a JSON object")
    return value


if __name__ == "__main__":
    sys.exit(main())
