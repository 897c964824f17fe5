"""A server that speaks OpenAI's protocol, as a model of `kvik.evaluation.model`.

`transport` asks and waits, `tokens` is the server's tokenizer, `scoring` and `answers` say what is asked and read what
comes, `endpoint` puts these together.
"""

from kvik.evaluation.endpoint.endpoint import Endpoint

__all__ = ["Endpoint"]
