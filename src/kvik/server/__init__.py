"""An OpenAI-compatible HTTP server for one model: `app.create_app` is its ASGI application, `running.serve` runs it."""
