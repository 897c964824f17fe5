"""`running.serve` without a model: what happens where uvicorn ends by itself."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from kvik.errors import KvikError
from kvik.server import running


@pytest.mark.parametrize("starts", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_serve_ends_where_uvicorn_does(monkeypatch, starts, fails):
    async def serve(self, sockets):
        self.started = starts
        if fails:
            raise RuntimeError("broken")

    monkeypatch.setattr(sys, "setswitchinterval", lambda seconds: None)
    monkeypatch.setattr(running._Uvicorn, "serve", serve)
    app, announced = SimpleNamespace(state=SimpleNamespace(service=None)), []
    with (
        running.bind("127.0.0.1", 0) as sock,
        pytest.raises(RuntimeError if fails else KvikError, match="broken" if fails else "by itself"),
    ):
        running.serve(app, None, sock, drain_seconds=1, access_log=False, ready=lambda: announced.append(True))
    assert not announced
