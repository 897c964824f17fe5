"""What a request can be refused with, as OpenAI's error object: message, type, param, code."""

from __future__ import annotations

import json
import os
import re
import sys
import traceback
from collections.abc import Container, Mapping
from http import HTTPStatus

from kvik.errors import DataError, KvikError, ParameterError, StorageError, TryAgainError, one_line

__all__ = ["ApiError", "api_error", "report_defect", "shutting_down"]

MAX_MESSAGE = 600
"""Characters of a message: it may quote what a client sent."""
MAX_PARAM = 100

_TYPES = {401: "authentication_error", 429: "rate_limit_error", 503: "service_unavailable"}
_PATH = re.compile(r"(?:the )?([a-z_]+)((?:\[\d+\]|\.[a-z_]+)*)")


class ApiError(Exception):
    """A refusal. param: the field of the body it is about, cut after 100 characters; headers: of the response."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        text = one_line(message)
        self.status, self.code = status, code
        self.param = None if param is None else param[:MAX_PARAM]
        self.message = text if len(text) <= MAX_MESSAGE else text[:MAX_MESSAGE] + "…"
        self.headers = dict(headers or {})
        super().__init__(self.message)

    def body(self) -> bytes:
        """The error object as JSON."""
        other = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = _TYPES.get(self.status, other)
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode()


def shutting_down() -> ApiError:
    """To whoever comes while the server ends."""
    return ApiError(503, "the server is shutting down", code="shutting_down", headers={"Retry-After": "5"})


def api_error(error: Exception, fields: Container[str] = (), renamed: Mapping[str, str] | None = None) -> ApiError:
    """Any exception as what a client is told.

    fields: of the body; a ParameterError that begins with one names it as its param. renamed: what a field is called in
    the body, where that differs.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ParameterError):
        return _refusal(str(error), fields, renamed or {})
    if isinstance(error, TryAgainError):
        return ApiError(429, str(error), code="overloaded", headers={"Retry-After": "1"})
    if isinstance(error, KvikError):
        return ApiError(500, f"the model failed on this request: {_without_path(error)}", code="engine_error")
    status = HTTPStatus.INTERNAL_SERVER_ERROR
    return ApiError(status, f"this is a defect in Kvik: {type(error).__name__}; see the server's log", code="defect")


def _without_path(error: KvikError) -> str:
    """What a client may know: files of the server's machine are not its business."""
    if isinstance(error, StorageError):  # its text has paths anywhere
        return "see the server's log"
    if isinstance(error, DataError) and error.path is not None:
        return str(error).removeprefix(one_line(f"{os.fspath(error.path)}: "))
    return str(error)


def _refusal(message: str, fields: Container[str], renamed: Mapping[str, str]) -> ApiError:
    found = _PATH.match(message)
    param = None
    if found is not None and (name := renamed.get(found[1], found[1])) in fields:
        param = name + found[2]
        message = param + message[found.end() :]
    return ApiError(400, message, param=param, code="invalid_value")


def report_defect(error: Exception) -> None:
    """Write what should not have happened to the server's log, which is stderr."""
    if not isinstance(error, KvikError):
        traceback.print_exception(error, file=sys.stderr)
    else:
        print(f"kvik: error: {error}", file=sys.stderr, flush=True)
