"""An OpenAI-compatible HTTP server for one model: `app.create_app` is its ASGI application, `running.serve` runs it."""

__all__ = ["MAX_BODY_BYTES"]

MAX_BODY_BYTES = 16 * 2**20
"""Of a request, unless told otherwise."""
