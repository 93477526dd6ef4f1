"""`gpt2 serve`: the Explorer page and an OpenAI-compatible API over the batch engine.

Needs the extra `serve` (starlette and uvicorn), which nothing else in the package does.
"""

from __future__ import annotations

import argparse
import ipaddress
import pathlib
import socket
import sys
from typing import TYPE_CHECKING

from gpt2.commands import load

if TYPE_CHECKING:
    from gpt2.model import GPT2

LOOPBACK = ("localhost", "127.0.0.1", "::1", "[::1]")


def serve(options: argparse.Namespace) -> None:
    """Serve until interrupted. ValueError or OSError if the options, the port or the model are no good."""
    try:
        import uvicorn

        from gpt2.explorer.server import Limits, Server, create_app
    except ModuleNotFoundError as e:
        missing = (e.name or "").partition(".")[0]
        if missing not in ("starlette", "uvicorn"):
            raise
        raise ValueError(f"{missing} is not installed: pip install 'gpt2-kernels[serve]'") from None
    for name in ("max_batch", "max_requests", "time_limit"):
        if not getattr(options, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} must be above 0, got {getattr(options, name)}")
    key = _key(options.api_key)
    name = pathlib.PurePath(options.model).name  # a folder's own name
    listener = _listen(options.host, options.port)  # a port in use is reported before a model is loaded
    with listener:
        model, tokenizer = load(options)

        from gpt2.engine import Engine

        warm_up(model)
        app = create_app(
            Engine(model, tokenizer, max_batch=options.max_batch),
            name,
            limits=Limits(requests=options.max_requests, seconds=options.time_limit),
            api_key=key,
            origins=options.cors_origin,
            # A host name that another site has pointed here gets no answer (DNS rebinding).
            hosts=LOOPBACK if _is_loopback(options.host) else ("*",),
        )
        config = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="on",
            log_level="error",
            access_log=False,
            server_header=False,
            limit_concurrency=2 * options.max_requests + 64,  # connections, idle ones too
            timeout_keep_alive=30,
            timeout_graceful_shutdown=5,
        )
        listener.listen(2048)
        host, port = listener.getsockname()[:2]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        print(
            f"gpt2 serve: {name}, {str(model.dtype).removeprefix('torch.')} on {model.device}\n"
            f"  Explorer  {url}/\n"
            f"  API       {url}/v1" + ("" if key else "  (no key)"),
            file=sys.stderr,
            flush=True,
        )
        Server(config).run(sockets=[listener])


def warm_up(model: GPT2) -> None:
    """Compile what is not compiled yet: the kernels of prefill and, for the second token, those of decoding."""
    from gpt2.engine import Engine
    from gpt2.sampling import SamplingParams

    Engine(model, max_batch=1, num_blocks=1).generate([[]], SamplingParams(max_tokens=2, ignore_eos=True))


def _key(given: str | None) -> str | None:
    """The key as given, or read from the file named after @."""
    if given is not None and given.startswith("@"):
        with open(given[1:], encoding="utf-8") as file:
            given = file.read().strip()
    if given is not None and (not given or not given.isascii() or not given.isprintable()):
        raise ValueError("--api-key must be printable ASCII and not empty")
    return given


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port <= 65535:
        raise ValueError(f"--port must be in 0..65535, got {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as e:
        raise ValueError(f"--host must be a name or address of this machine, got {host!r} ({e})") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as e:
        listener.close()
        raise OSError(f"cannot listen on {host}, port {port}: {e.strerror or e}") from None
    return listener


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
