"""The ASGI application: which path does what. Bodies are read, checked and answered by the modules beside this one."""

from __future__ import annotations

import hmac
import json
from collections.abc import Awaitable, Callable, Container, Mapping
from functools import partial
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from kvik import __version__
from kvik.async_llm import AsyncLLM
from kvik.server import MAX_BODY_BYTES, chat, completions, tokens
from kvik.server.body import JsonObject, parse_object, read_body
from kvik.server.errors import ApiError, api_error, shutting_down
from kvik.server.responding import Reply, Respond
from kvik.server.service import Service

__all__ = ["create_app"]

Work = Callable[[Service, JsonObject, Reply], Awaitable[None]]

POSTS: Mapping[str, tuple[Work, Container[str], Mapping[str, str]]] = {
    "/v1/chat/completions": (chat.answer_chat, chat.FIELDS, chat.RENAMED),
    "/v1/completions": (completions.answer_completion, completions.FIELDS, {}),
    "/tokenize": (tokens.tokenize, tokens.FIELDS, {}),
    "/detokenize": (tokens.detokenize, tokens.FIELDS, {}),
}
"""What answers a body, the fields its errors name, and what these are called there."""

_OPEN = frozenset(("/health",))


def create_app(
    llm: AsyncLLM, *, ref: str | None = None, api_key: str | None = None, max_body_bytes: int = MAX_BODY_BYTES
) -> FastAPI:
    """The application of a loaded model; `app.state.service` is its Service.

    Args:
        llm: the model. The caller closes it.
        ref: what the user called it, and requests may; None takes the name in its file.
        api_key: that requests must bring; None for none.
        max_body_bytes: of a request.
    """
    service = Service(llm, ref)
    app = FastAPI(title="Kvik", version=__version__, openapi_url=None, docs_url=None, redoc_url=None)
    app.state.service = service
    for path, how in POSTS.items():
        app.add_api_route(path, _post(service, max_body_bytes, *how), methods=["POST"], response_model=None)
    for path, show in _gets(service).items():
        app.add_api_route(path, show, methods=["GET"], response_model=None)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(Exception, _defect)
    if api_key is not None:
        app.add_middleware(_Key, key=api_key)
    return app


def _post(
    service: Service, limit: int, work: Work, fields: Container[str], renamed: Mapping[str, str]
) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        service.check_taking()
        body = await read_body(request, limit)
        return Respond(partial(_answer, service, work, body), fields, renamed)

    return endpoint


async def _answer(service: Service, work: Work, body: bytes, reply: Reply) -> None:
    with service.answering():
        await work(service, parse_object(body), reply)


def _gets(service: Service) -> dict[str, Callable[..., Awaitable[Response]]]:
    async def models() -> Response:
        return _json({"object": "list", "data": [_card(service)]})

    async def model(name: str) -> Response:
        service.check_model(name)
        return _json(_card(service))

    async def health() -> Response:
        if service.draining:
            raise shutting_down()
        return _json({"status": "ok"})

    async def version() -> Response:
        return _json({"version": __version__})

    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return {
        "/v1/models": models, "/v1/models/{name:path}": model, "/health": health, "/version": version,
        "/metrics": metrics,
    }  # fmt: skip


def _card(service: Service) -> dict[str, Any]:
    return {
        "id": service.name, "object": "model", "created": service.started, "owned_by": "kvik",
        "max_model_len": service.info.context_length,
    }  # fmt: skip


def _json(value: Any) -> Response:
    return Response(json.dumps(value), media_type="application/json")


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return Response(error.body(), error.status, error.headers, "application/json")


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = {404: "unknown_path", 405: "method_not_allowed"}.get(error.status_code)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return await _api_error(request, ApiError(error.status_code, message, code=code, headers=error.headers))


async def _defect(request: Request, error: Exception) -> Response:
    return await _api_error(request, api_error(error))  # uvicorn logs it


class _Key:
    """Lets requests through that bring the key. Compared in constant time, so that nothing of it can be guessed."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app, self._wanted = app, f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in _OPEN:
            given = Headers(scope=scope).get("authorization", "").encode("latin-1")
            if not hmac.compare_digest(given, self._wanted):
                error = ApiError(
                    401, "this server wants its API key: Authorization: Bearer KEY", code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )  # fmt: skip
                await Response(error.body(), 401, error.headers, "application/json")(scope, receive, send)
                return
        await self._app(scope, receive, send)
