"""What a text has to be, as the tokens that may come next: JSON schemas, regular expressions, Lark grammars.

llguidance (Moskal et al. 2025) parses: an Earley parser over a lexer of regular-expression derivatives, walked along a
trie of the vocabulary. A mask is a function of the bytes so far: it has every token after whose bytes some text of the
grammar is still possible, however the text has been cut into tokens. Special tokens are in no mask; end-of-text tokens
are exactly where the text may end, also those that could be text elsewhere.

Importing this module imports no llguidance; the first `Grammars.compile` does, and builds the trie (0.3 s for 49,000
tokens).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from time import thread_time
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from kvik.decoding.grammar_apart import check_apart
from kvik.decoding.grammar_source import LIMITS, grammar_source, shortened
from kvik.errors import ParameterError
from kvik.params import Grammar

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

__all__ = ["CompiledGrammar", "GrammarMatcher", "Grammars", "Pieces"]

Mask = npt.NDArray[np.uint32]

MOST_KEPT, MOST_CHARACTERS_KEPT = 64, 400_000
LONGEST_UNCHECKED = 4000  # characters; longer ones, and those in Lark, are tried in a process of their own first
LONGEST_PIECE, MOST_PIECE_BYTES = 1000, 2_000_000  # of the trie: 1,024 levels, 4 million nodes
BUDGET, BUDGET_PER_TOKEN = 0.5, 0.01  # seconds of CPU a request may spend on its grammar


class Pieces(Protocol):
    """What is asked of a tokenizer (kvik.text.tokenizer.Tokenizer)."""

    vocab_size: int
    special_ids: frozenset[int]

    def piece(self, token: int, after: int | None = None) -> bytes: ...
    def drops_space(self, after: int | None) -> bool: ...


class Grammars:
    """Compiles grammars for one vocabulary and keeps the last ones. Safe to share between threads.

    Args:
        pieces: the tokenizer.
        vocab_size: V of the model; ids that the tokenizer does not have are never allowed.
    """

    def __init__(self, pieces: Pieces, vocab_size: int) -> None:
        self.pieces, self.vocab_size = pieces, vocab_size
        self.num_tokens = min(pieces.vocab_size, vocab_size)
        self._tries: dict[bool, LLTokenizer] = {}
        self._kept: OrderedDict[Grammar, CompiledGrammar] = OrderedDict()
        self._lock = threading.Lock()  # of _kept
        self._compiling = threading.Lock()

    def known(self, grammar: Grammar) -> bool:
        """Whether `compile` has it at hand."""
        return grammar in self._kept

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """The grammar, checked. ParameterError says in one line what is wrong, not supported or too costly.

        New ones are compiled one at a time, each once; one at hand never waits for them.
        """
        found = self._find(grammar)
        if found is None:
            with self._compiling:
                found = self._find(grammar) or self._keep(CompiledGrammar(self, grammar))
        return found

    def _find(self, grammar: Grammar) -> CompiledGrammar | None:
        with self._lock:
            found = self._kept.get(grammar)
            if found is not None:
                self._kept.move_to_end(grammar)
            return found

    def _keep(self, compiled: CompiledGrammar) -> CompiledGrammar:
        with self._lock:
            self._kept[compiled.grammar] = compiled
            while len(self._kept) > 1 and (
                len(self._kept) > MOST_KEPT or sum(len(one.text) for one in self._kept) > MOST_CHARACTERS_KEPT
            ):
                self._kept.popitem(last=False)
        return compiled

    def trie(self, bare: bool) -> LLTokenizer:
        """The vocabulary as llguidance has it; bare: as its tokens are where a first space is taken away.

        After the tokenizer's ids come 256 tokens of one byte each and one for the end of text, which no model draws:
        any bytes can be fed, and what ends a text is ours to say.
        """
        if bare not in self._tries:
            self._tries[bare] = self._build(bare)
        return self._tries[bare]

    def _build(self, bare: bool) -> LLTokenizer:
        from llguidance import LLTokenizer

        special, piece = self.pieces.special_ids, self.pieces.piece
        ids = range(self.num_tokens)
        tokens = [b"" if token in special else piece(token, None if bare else token) for token in ids]
        tokens = [token if len(token) <= LONGEST_PIECE else b"" for token in tokens]
        if sum(map(len, tokens)) > MOST_PIECE_BYTES * (1 + (self.num_tokens > 2**19)):
            raise ParameterError(f"grammar: this model's vocabulary has more than {MOST_PIECE_BYTES:,} bytes")
        tokens += [bytes([value]) for value in range(256)]
        return LLTokenizer(_Wrapper(tokens), slices=[] if bare else None)  # type: ignore[arg-type]


class _Wrapper:
    """What LLTokenizer reads a vocabulary from; its last token, of no bytes, ends the text."""

    is_tokenizer_wrapper = True
    bos_token_id = None
    special_token_ids: tuple[int, ...] = ()

    def __init__(self, tokens: list[bytes]) -> None:
        self.tokens = [*tokens, b""]
        self.eos_token_id = len(tokens)

    def __call__(self, text: object) -> list[int]:
        raise NotImplementedError("grammars force no bytes, so nothing is tokenized")


class CompiledGrammar:
    """A grammar over a vocabulary; `matcher` begins a text of it."""

    def __init__(self, grammars: Grammars, grammar: Grammar) -> None:
        self.grammars, self.grammar = grammars, grammar
        self._source = grammar_source(grammar)
        if len(self._source) > LONGEST_UNCHECKED or grammar.kind == "lark":
            check_apart(self._source)
        self._begun: dict[bool, LLMatcher] = {}
        self._lock = threading.Lock()
        begun = self.begin(False)
        begun.compute_bitmask()
        if begun.is_error():
            raise ParameterError(f"grammar: {shortened(begun.get_error())}")

    def begin(self, bare: bool) -> LLMatcher:
        """A parser of its own at the beginning. bare: as in `Grammars.trie`."""
        from llguidance import LLMatcher, LLParserLimits

        with self._lock:
            found = self._begun.get(bare)
            if found is None:
                limits = LLParserLimits(**LIMITS)
                found = LLMatcher(self.grammars.trie(bare), self._source, limits=limits, log_level=0)
                wrong = found.get_error() or next(iter(found.get_grammar_warnings()), "")
                if wrong:
                    raise ParameterError(f"grammar: {shortened(wrong)}")
                self._begun[bare] = found
            return found.deep_copy()

    def matcher(self, after: int | None, end_ids: Iterable[int]) -> GrammarMatcher:
        """At the beginning of a text that follows the token `after`. end_ids: the tokens that may end it."""
        return GrammarMatcher(self, after, end_ids)


class _Meter:
    """CPU time that the matchers of one request spent, all forks together."""

    def __init__(self) -> None:
        self.spent, self.tokens = 0.0, 0

    def add(self, seconds: float, tokens: int) -> None:
        self.spent += seconds
        self.tokens += tokens
        if self.spent > BUDGET + BUDGET_PER_TOKEN * self.tokens:
            raise ParameterError(
                f"grammar: too costly: {self.tokens} tokens took {self.spent:.1f} s to check, which is over "
                f"{BUDGET:g} s and {BUDGET_PER_TOKEN * 1000:g} ms a token"
            )


class GrammarMatcher:
    """A grammar at a place in its text; see kvik.decoding.state.Matcher.

    ParameterError from `mask` and `accept` where the grammar turns out too costly here.
    """

    def __init__(self, grammar: CompiledGrammar, after: int | None, end_ids: Iterable[int]) -> None:
        grammars = grammar.grammars
        self._grammar, self._before, self._end_ids = grammar, after, frozenset(end_ids)
        self._parser = grammar.begin(False)
        self._ends = np.zeros(-(-grammars.vocab_size // 32), np.uint32)
        for token in self._end_ids:
            self._ends[token // 32] |= np.uint32(1 << token % 32)
        self._tokens: list[int] = []
        self._fed: list[int] = []  # of each token, how many the parser took for it
        self._mask: Mask | None = None
        self._meter = _Meter()

    @property
    def ended(self) -> bool:
        """Whether the last token ended the text."""
        return bool(self._tokens) and self._tokens[-1] in self._end_ids

    @property
    def stopped(self) -> bool:
        """Whether nothing but end-of-text can follow."""
        return self.ended or (self._parser.is_stopped() and not self._parser.is_error())

    def mask(self) -> Mask:
        """[ceil(V / 32)]; not to be written to. All 0 where the vocabulary cannot go on with the text."""
        if self._mask is None:
            begun = thread_time()
            self._mask = self._ends.copy() if self.ended else self._compute()
            self._mask.flags.writeable = False
            self._meter.add(thread_time() - begun, 1)
        return self._mask

    def accept(self, token: int) -> None:
        """A token of the text, or one that ends it."""
        begun = thread_time()
        ids: list[int] = [token]
        if token in self._end_ids:
            ids = []
        elif self._bare:
            first = self._grammar.grammars.num_tokens
            ids = [first + value for value in self._piece(token, self._after)]
        if ids and not self._parser.consume_tokens(ids):
            raise ParameterError(f"grammar: too costly, or no text of it: {shortened(self._parser.get_error())}")
        self._tokens.append(token)
        self._fed.append(len(ids))
        self._mask = None
        self._meter.add(thread_time() - begun, 0)

    def snapshot(self) -> int:
        """The number of tokens accepted."""
        return len(self._tokens)

    def restore(self, snapshot: int) -> None:
        """Go back to when so many tokens were accepted."""
        if not 0 <= snapshot <= len(self._tokens):
            raise ParameterError(f"snapshot must be in [0, {len(self._tokens)}], got {snapshot}")
        if snapshot == len(self._tokens):
            return
        self._parser.rollback(sum(self._fed[snapshot:]))
        if self._parser.is_error():
            raise ParameterError(f"grammar: {shortened(self._parser.get_error())}")
        del self._tokens[snapshot:], self._fed[snapshot:]
        self._mask = None

    def fork(self) -> GrammarMatcher:
        """Another one at the same place, which goes its own way."""
        other = GrammarMatcher.__new__(GrammarMatcher)
        other.__dict__.update(self.__dict__)
        other._parser = self._parser.deep_copy()
        other._tokens, other._fed = list(self._tokens), list(self._fed)
        return other

    # ---- inner

    @property
    def _after(self) -> int | None:
        return self._tokens[-1] if self._tokens else self._before

    @property
    def _bare(self) -> bool:
        """Whether the next token loses its first space."""
        return self._grammar.grammars.pieces.drops_space(self._after)

    def _piece(self, token: int, after: int | None) -> bytes:
        return self._grammar.grammars.pieces.piece(token, after)

    def _compute(self) -> Mask:
        parser = self._bare_parser() if self._bare else self._parser
        mask = np.zeros(len(self._ends), np.uint32)
        allowed = np.frombuffer(parser.compute_bitmask(), "<u4")
        if not parser.is_error():
            count = self._grammar.grammars.num_tokens
            words = -(-count // 32)
            mask[:words] = allowed[:words]
            if count % 32:
                mask[words - 1] &= np.uint32((1 << count % 32) - 1)
        elif not parser.get_error().startswith("NoExtension"):
            raise ParameterError(f"grammar: too costly: {shortened(parser.get_error())}")
        mask &= ~self._ends  # a stop token may be one that the grammar takes as text
        if self._parser.is_accepting():
            mask |= self._ends
        return mask

    def _bare_parser(self) -> LLMatcher:
        """The parser's twin over tokens without their first space, brought to this place."""
        parser = self._grammar.begin(True)
        first, after, ids = self._grammar.grammars.num_tokens, self._before, list[int]()
        for token in self._tokens:
            ids += [first + value for value in self._piece(token, after)]
            after = token
        parser.consume_tokens(ids)
        return parser
