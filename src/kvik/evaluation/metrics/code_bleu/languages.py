"""The languages of CodeBLEU: for each its keywords, its grammar, and what its kinds of nodes do to data.

A language is one entry of LANGUAGES. Kinds and roles are those of the tree-sitter grammar.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass

from kvik.evaluation.metrics.code_bleu.dataflow import COMPUTED, Flow, Rule, Walk, at_once, branch, cross, define, loop
from kvik.evaluation.metrics.code_bleu.trees import Grammar, Node

__all__ = ["LANGUAGES", "Language"]


@dataclass(frozen=True)
class Language:
    """keywords: tokens of full weight. grammar: how it is read. rules: by kind of node."""

    keywords: Set[str]
    grammar: Grammar
    rules: Mapping[str, Rule]


# Python


def _is_docstring(node: Node) -> bool:
    """A statement that is text and nothing else."""
    return (
        node.kind == "expression_statement"
        and len(node.children) == 1
        and node.children[0].kind in ("string", "concatenated_string")
    )


def _assign(flow: Flow, left: Node | None, right: Node | None) -> Walk:
    """Both sides part by part where they have as many parts, whole otherwise."""
    lefts, rights = _parts(left), _parts(right)
    if len(lefts) != len(rights) or not lefts:
        lefts, rights = [left] if left else [], [right] if right else []
    yield from rights
    for target, value in zip(lefts, rights, strict=False):
        at_once(flow, target, value)


def _parts(node: Node | None) -> list[Node]:
    return [] if node is None or node.token is not None else [child for child in node.children if child.kind != ","]


def _assignment(flow: Flow, node: Node) -> Walk:
    right = node.child("right")
    if right is not None:  # else it is an annotation
        yield from _assign(flow, node.child("left"), right)


def _comprehension_clause(flow: Flow, node: Node) -> Walk:
    yield node.children[-1]
    at_once(flow, node.child("left"), node.children[-1])


def _clauses_first(flow: Flow, node: Node) -> Walk:
    """A comprehension's variables have their values before what is made of them."""
    yield from (child for child in node.children if child.kind == "for_in_clause")
    yield from (child for child in node.children if child.kind != "for_in_clause")


def _python_for(flow: Flow, node: Node) -> Walk:
    for _ in range(2):
        yield from _assign(flow, node.child("left"), node.child("right"))
        yield from (child for child in node.children if child.role in ("body", "alternative"))


def _twice(flow: Flow, node: Node) -> Walk:
    for _ in range(2):
        yield from node.children


_COMPREHENSIONS = (
    "list_comprehension",
    "set_comprehension",
    "dictionary_comprehension",
    "generator_expression",
    "ERROR",
)

_PYTHON_KEYWORDS = (
    "False None True and as assert async await break case class continue def del elif else except finally for from "
    "global if import in is lambda match nonlocal not or pass raise return try type while with yield"
)

PYTHON = Language(
    keywords=frozenset(_PYTHON_KEYWORDS.split()),
    grammar=Grammar(
        "tree-sitter-python", frozenset({"comment", "line_continuation"}), frozenset({"string"}), _is_docstring
    ),
    rules={
        "default_parameter": define(),
        "assignment": _assignment,
        "augmented_assignment": _assignment,
        "for_in_clause": _comprehension_clause,
        "if_statement": branch(frozenset({"elif_clause", "else_clause"})),
        "for_statement": loop(_python_for),
        "while_statement": loop(_twice),
        **dict.fromkeys(_COMPREHENSIONS, _clauses_first),
    },
)

# Java


def _java_assignment(flow: Flow, node: Node) -> Walk:
    right = node.child("right")
    if right is not None:
        yield right
        cross(flow, node.child("left"), right, COMPUTED)


def _update(flow: Flow, node: Node) -> Walk:
    cross(flow, node, node, COMPUTED)
    return iter(())


def _java_for(flow: Flow, node: Node) -> Walk:
    """All once; then again what comes after a declaration."""
    yield from node.children
    kinds = [child.kind for child in node.children]
    if "local_variable_declaration" in kinds:
        yield from node.children[kinds.index("local_variable_declaration") + 1 :]


def _for_each(flow: Flow, node: Node) -> Walk:
    name, value, body = node.child("name"), node.child("value"), node.child("body")
    for _ in range(2):
        if value is not None:
            yield value
        cross(flow, name, value, COMPUTED)
        if body is not None:
            yield body


_JAVA_KEYWORDS = (
    "abstract assert boolean break byte case catch char class const continue default do double else enum extends final "
    "finally float for goto if implements import instanceof int interface long native new package private protected "
    "public return short static strictfp super switch synchronized this throw throws transient try void volatile while"
)

JAVA = Language(
    keywords=frozenset(_JAVA_KEYWORDS.split()),
    grammar=Grammar(
        "tree-sitter-java",
        frozenset({"line_comment", "block_comment", "comment"}),
        frozenset({"string_literal", "character_literal"}),
        lambda node: False,
    ),
    rules={
        "variable_declarator": define(),
        "assignment_expression": _java_assignment,
        "update_expression": _update,
        "if_statement": branch(frozenset({"if_statement", "else"})),
        "for_statement": loop(_java_for),
        "enhanced_for_statement": loop(_for_each),
        "while_statement": loop(_twice),
    },
)

LANGUAGES: Mapping[str, Language] = {"python": PYTHON, "java": JAVA}
