"""A model behind an OpenAI-compatible endpoint, as options."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from kvik.cli.strategy_options import option
from kvik.errors import ParameterError
from kvik.params import EngineParams

if TYPE_CHECKING:
    from kvik.evaluation.endpoint import Endpoint
    from kvik.text.tokenizer import Tokenizer

__all__ = ["EndpointOptions", "load_tokenizer", "refuse_engine"]

ENDPOINT_PANEL = "Endpoint"


@dataclass(frozen=True, kw_only=True)
class EndpointOptions:
    """Where it is, which of its models, with which key and tokens."""

    endpoint: Annotated[
        str | None,
        option("--endpoint", "An OpenAI-compatible server, like http://127.0.0.1:8000/v1.", ENDPOINT_PANEL, "",
                metavar="URL"),
    ] = None  # fmt: skip
    endpoint_model: Annotated[
        str | None,
        option("--endpoint-model", "Its model's name.", ENDPOINT_PANEL, "the only one it has", metavar="NAME"),
    ] = None  # fmt: skip
    endpoint_context: Annotated[
        int | None,
        option("--endpoint-context", "Tokens its model takes, at least 2.", ENDPOINT_PANEL, "what the server says",
                metavar="N"),
    ] = None  # fmt: skip
    endpoint_timeout: Annotated[
        float | None,
        option("--endpoint-timeout", "Seconds that one answer may take, above 0, at most 86400.", ENDPOINT_PANEL, "60",
                metavar="X"),
    ] = None  # fmt: skip
    api_key_env: Annotated[
        str | None,
        option("--api-key-env", "Environment variable that holds its key.", ENDPOINT_PANEL, "", metavar="VAR"),
    ] = None  # fmt: skip
    tokenizer: Annotated[
        str | None,
        option("--tokenizer", "Where the model's tokenizer is: a model reference, or a folder with tokenizer.json.",
                ENDPOINT_PANEL, "what the server says", metavar="REF"),
    ] = None  # fmt: skip

    def check(self) -> None:
        """Raise ParameterError for options that do not go together, and for a key that is not there."""
        if self.endpoint is None:
            for field in fields(self):
                if getattr(self, field.name) is not None:
                    raise ParameterError(f"--{field.name.replace('_', '-')} needs --endpoint, which says where it is")
        elif self.endpoint_context is not None and self.endpoint_context < 2:
            raise ParameterError(f"--endpoint-context must be at least 2, got {self.endpoint_context}")
        elif self.endpoint_timeout is not None and not 0 < self.endpoint_timeout <= 86_400:
            raise ParameterError(f"--endpoint-timeout must be in (0, 86400], got {self.endpoint_timeout:g}")
        elif self.api_key_env is not None and not os.environ.get(self.api_key_env):
            raise ParameterError(f"--api-key-env names {self.api_key_env}, which is not set")

    def open(self) -> Endpoint:
        """The endpoint; `endpoint` is given. Raises what it does where there is none."""
        from kvik.evaluation.endpoint import Endpoint

        assert self.endpoint is not None
        key = None if self.api_key_env is None else os.environ[self.api_key_env]
        tokenizer = None if self.tokenizer is None else load_tokenizer(self.tokenizer)
        timeout: dict[str, Any] = {} if self.endpoint_timeout is None else {"timeout": self.endpoint_timeout}
        return Endpoint(
            self.endpoint, model=self.endpoint_model, api_key=key, tokenizer=tokenizer,
            context_length=self.endpoint_context, **timeout,
        )  # fmt: skip


def load_tokenizer(ref: str) -> Tokenizer:
    """The tokenizer of a model reference, or of a folder that has nothing else. Raises as loading a model does."""
    from kvik.text.tokenizer import Tokenizer

    folder = Path(ref).expanduser()
    if (folder / "tokenizer.json").is_file() and not (folder / "config.json").is_file():
        return Tokenizer.from_hub(folder)
    from kvik.models.reading import describe
    from kvik.weights.store import ModelStore

    return describe(ModelStore().resolve(ref).path).tokenizer


def refuse_engine(machine: EngineParams) -> None:
    """Raise ParameterError where the engine's options were given, though no model runs here."""
    for field in fields(EngineParams):
        if getattr(machine, field.name) != field.default:
            raise ParameterError(f"--{field.name.replace('_', '-')} is about a model run here, and --endpoint is not")
