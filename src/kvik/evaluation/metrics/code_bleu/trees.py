"""Source code as a tree of our own, from tree-sitter's; comments and docstrings are left out.

Nothing here or in the data flow recurses: code may be nested 100,000 deep.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from kvik.errors import ParameterError

if TYPE_CHECKING:
    import tree_sitter

__all__ = ["Grammar", "Node", "Shapes", "Source", "parse", "versions"]

Shapes = dict[tuple[object, ...], int]
"""Numbers of the shapes of subtrees. Two trees are compared by numbers from the same dict."""


@dataclass(slots=True, eq=False)
class Node:
    """A node of the syntax tree.

    Attributes:
        kind: the grammar's name for it; keywords and punctuation are named by their own text.
        role: the field of its parent it stands in, like "left".
        text: of an atom (a leaf, or a string with all that is inside), else "".
        token: number of the atom in the source, from 0; None for other nodes.
        children: in order.
        tokens: the half-open range of atoms in it.
    """

    kind: str
    role: str | None
    text: str = ""
    token: int | None = None
    children: list[Node] = field(default_factory=list)
    tokens: tuple[int, int] = (0, 0)

    def child(self, role: str) -> Node | None:
        """The first child in a role."""
        return next((node for node in self.children if node.role == role), None)


@dataclass(frozen=True)
class Grammar:
    """How a language is read.

    Attributes:
        package: the package with its tree-sitter grammar, as pip names it.
        comments: kinds of nodes that are comments.
        strings: kinds of nodes that are one token, whatever is inside.
        is_docstring: whether a node with all its children is text about the code.
    """

    package: str
    comments: Set[str]
    strings: Set[str]
    is_docstring: Callable[[Node], bool]


@dataclass(frozen=True)
class Source:
    """A text parsed.

    root: the tree. atoms: its atoms in order. shapes: of the root and every subtree of more than one node, how often each.
    broken: whether the text is no valid code to the grammar; the tree then has ERROR or missing nodes.
    """

    root: Node
    atoms: tuple[Node, ...]
    shapes: Counter[int]
    broken: bool


def parse(text: str, grammar: Grammar, shapes: Shapes) -> Source:
    """The tree of a text. Raises ParameterError where tree-sitter or the language's grammar is not installed."""
    data = text.encode("utf-8", "replace")
    tree = _parser(grammar.package).parse(data)
    builder = _Builder(data, grammar, shapes)
    for event in _events(tree.walk(), grammar.comments):
        if event is None:
            builder.leave()
        else:
            builder.enter(*event)
    return Source(builder.root, tuple(builder.atoms), Counter(builder.found), tree.root_node.has_error)


def versions(grammar: Grammar) -> dict[str, str]:
    """What the trees depend on, like {"tree-sitter": "0.26.1", "tree-sitter-java": "0.23.5"}."""
    from importlib.metadata import version

    _parser(grammar.package)
    return {name: version(name) for name in ("tree-sitter", grammar.package)}


@cache
def _parser(package: str) -> tree_sitter.Parser:
    name = "tree-sitter"
    try:
        import tree_sitter

        name = package
        language: Any = import_module(package.replace("-", "_"))
    except ImportError:
        raise ParameterError(f'code_bleu needs {name}: pip install "kvik[eval]"') from None
    return tree_sitter.Parser(tree_sitter.Language(language.language()))


def _events(cursor: tree_sitter.TreeCursor, skip: Set[str]) -> Iterator[tuple[tree_sitter.Node, str | None] | None]:
    """Each node with its role on the way down, None on the way up again; nodes of the kinds in `skip` not at all."""
    while True:
        node = cursor.node
        assert node is not None
        if node.type not in skip:
            yield node, cursor.field_name
            if cursor.goto_first_child():
                continue
            yield None
        while not cursor.goto_next_sibling():
            if not cursor.goto_parent():
                return
            yield None


@dataclass(slots=True)
class _Open:
    """A node whose children are being read.

    visible: whether a shape shows it (punctuation and keywords are not shown). label, parts: what its shape is made of.
    in_string: whether its inside is no tokens. atoms, found: how many there were before it.
    """

    node: Node
    visible: bool
    label: tuple[str, ...]
    in_string: bool
    atoms: int
    found: int
    parts: list[object] = field(default_factory=list)


class _Builder:
    """Nodes are made on the way down, shapes on the way up."""

    root: Node

    def __init__(self, data: bytes, grammar: Grammar, shapes: Shapes) -> None:
        self._data, self._grammar, self._shapes = data, grammar, shapes
        self._stack: list[_Open] = []
        self.atoms: list[Node] = []
        self.found: list[int] = []

    def enter(self, given: tree_sitter.Node, role: str | None) -> None:
        node = Node(given.type, role)
        within = bool(self._stack) and self._stack[-1].in_string
        leaf, string = given.child_count == 0, node.kind in self._grammar.strings
        before = len(self.atoms)
        if self._stack and not within and (leaf or string):
            node.text = self._data[given.start_byte : given.end_byte].decode("utf-8", "replace")
            node.token = before
            self.atoms.append(node)
        label: tuple[str, ...] = (node.kind,)
        if given.is_missing:
            label = (node.kind, "missing")
        elif leaf and given.is_error:
            label = (node.kind, chr(self._data[given.start_byte]) if given.start_byte < len(self._data) else "")
        visible = given.is_named or given.is_missing
        self._stack.append(_Open(node, visible, label, within or string, before, len(self.found)))

    def leave(self) -> None:
        done = self._stack.pop()
        node = done.node
        if node.children and self._stack and self._grammar.is_docstring(node):
            del self.atoms[done.atoms :], self.found[done.found :]
            return
        node.tokens = (done.atoms, len(self.atoms))
        shape = self._shapes.setdefault((done.label, *done.parts), len(self._shapes))
        if node.children or not self._stack:
            self.found.append(shape)
        if not self._stack:
            self.root = node
            return
        above = self._stack[-1]
        above.node.children.append(node)
        if done.visible:
            above.parts.append((node.role, shape))
        else:
            above.parts.extend(done.parts)
