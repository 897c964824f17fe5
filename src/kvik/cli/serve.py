"""`kvik serve`: the model behind OpenAI's HTTP interface."""

from __future__ import annotations

from typing import Annotated

import typer

from kvik.cli.options import EngineOptions, ModelOptions, add_verb, complete_models
from kvik.cli.output import amount, note
from kvik.errors import ParameterError
from kvik.server import MAX_BODY_BYTES
from kvik.weights.catalogue import DEFAULT_MODEL

__all__ = ["register"]

SERVER_PANEL = "Server"


def register(app: typer.Typer) -> None:
    """Add the verb."""
    add_verb(app, "serve", serve)


def serve(
    form: ModelOptions,
    engine: EngineOptions,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="Catalogue name, .gguf file, folder or hub id.", autocompletion=complete_models
        ),
    ] = DEFAULT_MODEL,
    host: Annotated[
        str, typer.Option("--host", metavar="ADDRESS", rich_help_panel=SERVER_PANEL, help="Address to listen on.")
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option("--port", metavar="N", rich_help_panel=SERVER_PANEL, help="Port, 0 to 65535; 0 takes a free one."),
    ] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key",
            metavar="KEY",
            envvar="KVIK_API_KEY",
            rich_help_panel=SERVER_PANEL,
            show_default=False,
            help="What requests must bring; other users of this machine see it here, but not in the variable.",
        ),
    ] = None,
    max_body_bytes: Annotated[
        int,
        typer.Option("--max-body-bytes", metavar="N", rich_help_panel=SERVER_PANEL, help="Longest body of a request."),
    ] = MAX_BODY_BYTES,
    drain_seconds: Annotated[
        float,
        typer.Option(
            "--drain-seconds",
            metavar="S",
            rich_help_panel=SERVER_PANEL,
            help="How long SIGTERM and Ctrl-C wait for running requests.",
        ),
    ] = 30.0,
    access_log: Annotated[
        bool, typer.Option("--access-log", rich_help_panel=SERVER_PANEL, help="A line on stderr for each request.")
    ] = False,
) -> None:
    """Serve a model over HTTP, as OpenAI's API does.

    Chat and text completions, streamed or whole, many at once; /tokenize, /detokenize, /health, /version and /metrics.
    docs/serving.md says which fields are honoured. SIGTERM finishes what runs, refuses what comes, and ends with 0.

    \b
    Examples:
      kvik serve
      kvik serve smollm2-135m --port 8080
      KVIK_API_KEY=secret kvik serve ./model.gguf --host 0.0.0.0
      kvik serve --max-sequences 32 --kv-bytes 2GB
    """  # fmt: skip
    _check(port, api_key, max_body_bytes, drain_seconds)
    params = engine.params()
    try:
        from kvik.server import running
        from kvik.server.app import create_app
    except ImportError as error:
        message = f'kvik serve needs more packages ({error.name} is missing): pip install "kvik[serve]"'
        raise ParameterError(message) from error
    from kvik.async_llm import AsyncLLM

    with running.bind(host, port) as sock:
        llm = form.load(params)
        info = llm.info
        with AsyncLLM(llm) as served:
            app = create_app(served, ref=model, api_key=api_key, max_body_bytes=max_body_bytes)
            app.state.service.warm_up()
            line = (
                f"kvik: {app.state.service.name} at {running.url_of(sock)}, KV cache {info.kv_pool_bytes} bytes "
                f"({amount(info.kv_pool_bytes)}), {info.threads} threads"
            )
            running.serve(
                app, served, sock, drain_seconds=drain_seconds, access_log=access_log, ready=lambda: note(line)
            )


def _check(port: int, api_key: str | None, max_body_bytes: int, drain_seconds: float) -> None:
    if not 0 <= port <= 65535:
        raise ParameterError(f"--port must be in [0, 65535], got {port}")
    if api_key is not None and not (api_key and api_key.isascii() and api_key.isprintable() and " " not in api_key):
        raise ParameterError("--api-key must be printable ASCII without blanks, and not empty")
    if max_body_bytes < 1:
        raise ParameterError(f"--max-body-bytes must be at least 1, got {max_body_bytes}")
    if not 0 <= drain_seconds < 1e6:
        raise ParameterError(f"--drain-seconds must be in [0, 1e6), got {drain_seconds}")
