"""`nectar serve book.nectar ...`: mlx-lm's OpenAI-compatible server, where each .nectar is a model's id.

The server, its batches, its prompt cache and its options are mlx-lm's. `serving` adds the models it may load, the
prompts (they continue a context), and what keeps a server safe: a key, limits, and an orderly end. mlx-lm loads and
generates in one thread; a batch holds requests for one id only, so contexts never mix.
"""

import argparse
import json
import logging
import os
import signal
import sys
from collections.abc import Sequence

from mlx_lm import server as mlx_server
from mlx_lm.generate import DEFAULT_QUANTIZED_KV_START

from . import agent, cli
from .serving import server


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(make_parser(), _work, argv)


def make_parser() -> argparse.ArgumentParser:
    """Our options, and those that mlx-lm's server reads."""
    parser = cli.Parser("serve", "Serves .nectar files over HTTP, OpenAI-compatible; each file's name is a model's id.")
    parser.add_argument("nectars", nargs="+", metavar="nectar", help="a .nectar file, or the id of one on the hub")
    parser.add_argument("--model", help="the model to use (default: the name of the one the files were fitted on)")
    agent.add_options(parser, cli.say)
    cli.add_retrieval(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=int, default=8080, metavar="N", help="port to listen on (8080)")
    parser.add_argument("--api-key", default=os.environ.get("NECTAR_API_KEY"), help="(default: NECTAR_API_KEY)")
    parser.add_argument("--max-body", type=int, default=8 << 20, metavar="BYTES", help="largest request (8 MiB)")
    parser.add_argument("--max-requests", type=int, default=128, metavar="N", help="open at a time (128)")
    parser.add_argument(
        "--allowed-origins",
        type=lambda text: text.split(","),
        default=[],  # mlx-lm's default lets every web page send requests
        metavar="ORIGINS",
        help="web pages that may send requests, separated by commas (none)",
    )
    parser.add_argument(
        "--log-level", choices=("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"), default="INFO", help="(INFO)"
    )
    _add_generation(parser)
    _add_performance(parser)
    for name in server.FOREIGN:
        flag = f"--{name.replace('_', '-')}"
        if name in ("adapter_path", "chat_template"):
            parser.add_argument(flag, default="", help=argparse.SUPPRESS)
        else:
            parser.add_argument(flag, action="store_true", help=argparse.SUPPRESS)
    return parser


def _add_generation(parser: argparse.ArgumentParser) -> None:
    """Defaults of a request."""
    parser.add_argument("--temp", type=float, default=0.0, help="sampling temperature (0.0)")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from the likeliest tokens of this mass (1.0)")
    parser.add_argument("--top-k", type=int, default=0, metavar="N", help="sample from the N likeliest tokens (0: all)")
    parser.add_argument("--min-p", type=float, default=0.0, help="least probability relative to the likeliest (0.0)")
    parser.add_argument("--max-tokens", type=int, default=512, metavar="N", help="the longest answer (512)")
    parser.add_argument(
        "--chat-template-args",
        type=json.loads,
        default={},
        metavar="JSON",
        help="""arguments for the chat template, e.g. '{"enable_thinking":false}'""",
    )


def _add_performance(parser: argparse.ArgumentParser) -> None:
    """Batches, caches and speculative decoding."""
    parser.add_argument("--draft-model", help="a smaller model for speculative decoding")
    parser.add_argument("--num-draft-tokens", type=int, default=3, metavar="N", help="tokens to draft at a time (3)")
    parser.add_argument(
        "--decode-concurrency", type=int, default=32, metavar="N", help="requests that are decoded in one batch (32)"
    )
    parser.add_argument(
        "--prompt-concurrency", type=int, default=8, metavar="N", help="prompts that are read in one batch (8)"
    )
    parser.add_argument("--prefill-step-size", type=int, default=2048, metavar="N", help="tokens a step (2048)")
    parser.add_argument("--prompt-cache-size", type=int, default=10, metavar="N", help="prompts kept in memory (10)")
    parser.add_argument("--prompt-cache-bytes", type=cli.size, metavar="SIZE", help="largest size of these, e.g. 2G")
    parser.add_argument(
        "--kv-bits", type=int, help="bits of the live tokens' cache, 4 or 8; requests are then served one at a time"
    )
    parser.add_argument("--kv-group-size", type=int, default=64, metavar="N", help="group size of --kv-bits (64)")
    parser.add_argument(
        "--quantized-kv-start",
        type=int,
        default=DEFAULT_QUANTIZED_KV_START,
        metavar="N",
        help=f"the token from which --kv-bits quantizes ({DEFAULT_QUANTIZED_KV_START})",
    )


def start(args: argparse.Namespace) -> server.Server:
    """A server that is bound and has its models loaded; NectarError for an error in the user's input."""
    return server.start(args, cli.load_nectar, log=cli.say)


def _work(args: argparse.Namespace) -> None:
    if args.install_agent:
        return agent.install(args.nectars, log=cli.say)
    logging.basicConfig(level=args.log_level, format="%(asctime)s %(levelname)s %(message)s")
    mlx_server.maybe_set_recommended_wired_limit()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    httpd = start(args)
    host, port = httpd.server_address[:2]
    cli.say(f"serving {', '.join(args.nectars)} at http://{host!s}:{port}/v1")
    try:
        httpd.serve_forever()
    except KeyboardInterrupt:
        cli.say("stopping")
    finally:
        httpd.stop()


if __name__ == "__main__":
    sys.exit(main())
