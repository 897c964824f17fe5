"""Renders a chat template from an untrusted file, bounded in time and memory.

No thread can interrupt a long operation inside the interpreter, so no single operation may be long: every value that a
template makes is measured, before it exists where it could grow, and refused when it exceeds a limit. Between
operations the clock is read. That takes a hook at every place where a template computes. Jinja's sandbox has them at
operators, calls and item access; loops, comparisons, slices, `~` and list and dict displays get theirs by a rewrite of
the syntax tree. Filters and methods are those on a list; a template that calls anything else is refused.

Importing this module imports jinja2 (about 30 ms); do it when a template is needed.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from types import BuiltinMethodType, MethodType
from typing import Any, ClassVar, NoReturn, TypeVar

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import BlockReference, Context, LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from kvik.text.template_filters import FILTERS, GUARDS, METHODS, checked_format, checked_percent, plain
from kvik.text.template_meter import Meter, Refused

__all__ = ["TemplateEnvironment", "TemplateRaised"]

MAX_SOURCE = 1 << 16
MAX_RANGE = 100_000
_BITS = 64

_Value = TypeVar("_Value")


class TemplateRaised(Exception):
    """The template called raise_exception: the conversation is not one it can write."""


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """Jinja as chat templates expect it (the names of transformers' `apply_chat_template`), with a meter at every step.

    Attributes:
        constants: the string constants in the expressions of the template parsed last.
        texts: its literal texts.
    """

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation], optimized=False,
            finalize=self._shown, cache_size=0,
        )  # fmt: skip
        self._local = threading.local()
        self.constants: set[str] = set()
        self.texts: set[str] = set()
        self.concat = self._joined  # type: ignore[method-assign]
        self.filters = {name: _metered(self, name, function) for name, function in FILTERS.items()}
        self.filters[_TICK] = self._ticked
        self.filters[_MADE] = self._made
        self.filters[_CONCAT] = self._concatenated
        self.tests = {name: _ticking(self, function) for name, function in self.tests.items()}
        self._functions: dict[str, Callable[..., Any]] = {
            "range": _range, "dict": dict, "namespace": _Namespace, "raise_exception": _raise,
            "strftime_now": _strftime,
        }  # fmt: skip
        self.globals.clear()
        self.globals.update(self._functions)

    @property
    def meter(self) -> Meter:
        meter: Meter = self._local.meter
        return meter

    def compile_metered(self, source: str, meter: Meter) -> jinja2.Template:
        if len(source) > MAX_SOURCE:
            raise Refused(f"has {len(source)} characters; at most {MAX_SOURCE} are read")
        self._local.meter = meter
        return self.from_string(source)

    def render_metered(self, template: jinja2.Template, variables: Mapping[str, object], meter: Meter) -> str:
        """The text. Raises Refused, TemplateRaised, or whatever a faulty template runs into."""
        self._local.meter = meter
        context = template.new_context(dict(variables))
        return self._joined(template.root_render_func(context))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        self.constants = {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
        self.texts = {node.data for node in tree.find_all(nodes.TemplateData)}
        rewritten: nodes.Template = _Rewrite().visit(tree)
        return rewritten

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        meter = self.meter
        meter.tick()
        sizes = meter.size(left), meter.size(right)
        if operator == "*":
            for sequence, times, size in ((left, right, sizes[0]), (right, left, sizes[1])):
                if isinstance(sequence, str | list | tuple) and isinstance(times, int):
                    meter.fits(size * max(times, 0))
        elif operator == "+":
            meter.fits(sum(sizes))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * abs(right) > _BITS:
                raise Refused(f"makes an integer of more than {_BITS} bits")
        elif operator == "%" and isinstance(left, str):
            return meter.made(checked_percent(meter, left, right))
        return meter.made(super().call_binop(context, operator, left, right))

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        meter = self.meter
        meter.tick()
        if isinstance(obj, Macro | LoopContext | BlockReference | Undefined):
            return super().call(context, obj, *args, **kwargs)
        method_of = getattr(obj, "__self__", None)
        if isinstance(obj, MethodType) and isinstance(method_of, LoopContext) and obj.__name__ in ("cycle", "changed"):
            return super().call(context, obj, *args, **kwargs)
        named = {name: value for name, value in kwargs.items() if name not in ("_loop_vars", "_block_vars")}
        if any(obj is function for function in self._functions.values()):
            if obj is not _Namespace:  # a namespace may hold anything, since it is never measured
                for value in (*args, *named.values()):
                    meter.size(value)
            result = obj(*args, **named)
            return result if isinstance(result, Namespace) else meter.made(result)
        for value in (*args, *named.values()):
            meter.size(value)
        formatted = getattr(obj, "__wrapped__", None)  # Jinja's sandbox wraps str.format
        if isinstance(formatted, BuiltinMethodType) and formatted.__name__ == "format":
            return meter.made(checked_format(meter, str(formatted.__self__), obj, args, named))
        if isinstance(obj, BuiltinMethodType):
            method = METHODS.get((type(obj.__self__), obj.__name__))
            if method is not None:
                return meter.made(method(meter, obj.__self__, *args, **named))
        name = getattr(obj, "__name__", type(obj).__name__)
        raise Refused(f"calls {name}, which is not among what templates may call")

    def getitem(self, obj: Any, argument: Any) -> Any:
        self.meter.tick()
        return super().getitem(obj, argument)

    def _shown(self, value: Any) -> Any:
        """What `{{ … }}` writes."""
        return value if type(value) is str else self.meter.made(value)

    def _joined(self, parts: Iterable[str]) -> str:
        meter, total, kept = self.meter, 0, []
        for part in parts:
            total += len(part)
            meter.fits(total)
            kept.append(part)
        return meter.made("".join(kept))

    def _ticked(self, value: _Value) -> _Value:
        self.meter.tick()
        return value

    def _made(self, value: _Value) -> _Value:
        return self.meter.made(value)

    def _concatenated(self, values: list[Any]) -> str:
        self.meter.fits(self.meter.size(values))
        return self.meter.made("".join(map(str, values)))


# Names that no template can write as a filter.
_TICK, _MADE, _CONCAT = "kvik tick", "kvik made", "kvik concat"


class _Rewrite(NodeTransformer):
    """Puts the meter where Jinja's sandbox has no hook of its own."""

    _REFUSED: ClassVar[dict[type[nodes.Node], str]] = {
        nodes.Include: "include", nodes.Import: "import", nodes.FromImport: "import", nodes.Extends: "extends",
        nodes.EvalContextModifier: "autoescape", nodes.ScopedEvalContextModifier: "autoescape",
    }  # fmt: skip

    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        if type(node) in self._REFUSED:
            raise Refused(f"uses {{% {self._REFUSED[type(node)]} %}}, which is not among what templates may do")
        return super().generic_visit(node, *args, **kwargs)

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_filtered(nodes.Const(0, lineno=node.lineno), _TICK), lineno=node.lineno))
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _filtered(node.expr, _TICK)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), _CONCAT)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, _MADE) if isinstance(node.arg, nodes.Slice) else node

    def visit_List(self, node: nodes.List) -> nodes.Node:
        return self._display(node, node.items)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        return self._display(node, node.items) if node.ctx == "load" else node

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        return self._display(node, [part for pair in node.items for part in (pair.key, pair.value)])

    def _display(self, node: nodes.Expr, items: Iterable[nodes.Expr]) -> nodes.Node:
        constant = all(isinstance(item, nodes.Const) for item in items)  # then the source bounds it
        self.generic_visit(node)
        return node if constant else _filtered(node, _MADE)


def _filtered(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks what a model wrote; it renders as its contents."""

    tags = {"generation"}  # noqa: RUF012 (declared so by Jinja)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(Namespace):
    """`namespace(a=1)`: the only thing a template can change. Underscored names stay the interpreter's."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        values = dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if not isinstance(name, str) or name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}")


def _range(*args: int) -> range:
    numbers = range(*args)
    if len(numbers) > MAX_RANGE:
        raise Refused(f"counts to more than {MAX_RANGE}")
    return numbers


def _raise(message: object = "") -> NoReturn:
    raise TemplateRaised(str(message))


def _strftime(pattern: str) -> str:
    if len(pattern) > 128 or re.search(r"%[-_0^#+]*[0-9]", pattern):
        raise Refused(f"asks for a date as {pattern[:40]!r}")
    return datetime.now().strftime(pattern)


def _metered(environment: TemplateEnvironment, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose arguments are measured before it runs. Some want an object of Jinja's as first argument."""
    own = 1 if hasattr(function, "jinja_pass_arg") else 0
    guard = GUARDS.get(name)

    def metered(*args: Any, **kwargs: Any) -> Any:
        meter = environment.meter
        meter.tick()
        for value in (*args[own:], *kwargs.values()):
            meter.size(value)
        if guard is not None:
            guard(meter, *args[own:], **kwargs)
        return meter.made(plain(function(*args, **kwargs)))

    if own:
        vars(metered)["jinja_pass_arg"] = vars(function)["jinja_pass_arg"]
    return metered


def _ticking(environment: TemplateEnvironment, function: Any) -> Callable[..., Any]:
    def ticking(*args: Any, **kwargs: Any) -> Any:
        environment.meter.tick()
        return function(*args, **kwargs)

    vars(ticking).update(getattr(function, "__dict__", {}))
    return ticking
