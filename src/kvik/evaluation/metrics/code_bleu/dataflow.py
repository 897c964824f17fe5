"""The data-flow component of CodeBLEU: where each variable's value comes from, names left out.

A walk over the tree keeps, for each name, the tokens where it may have got its value, and notes for a token of a variable
which tokens its value comes from. Guo et al. 2021 (GraphCodeBERT, arXiv:2009.08366) describe the graph, Ren et al. 2020
(CodeBLEU, arXiv:2009.10297) its match. What a kind of node does is a rule: a generator that yields the nodes to walk next.
The rules are those of the implementation of CodeBLEU's authors, so that figures can be compared, but for what the
docstring of `code_bleu` lists.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

from kvik.evaluation.metrics.code_bleu.trees import Node, Source

__all__ = ["Flow", "Rule", "TooManySteps", "branch", "cross", "data_flow", "define", "in_order", "loop", "shared_flow"]

MAX_STEPS = 5_000_000
COMES, COMPUTED = "comes from", "computed from"

Item = tuple[int, str, tuple[int, ...]]
"""A variable, how it is related, and to which: variables are numbered as they come, so that names do not count."""


class TooManySteps(Exception):
    """Following the data of a source takes longer than MAX_STEPS."""


@dataclass(slots=True)
class _Fact:
    """Where a token's value comes from. names: of the sources, as often as they stand there; once each if `merged`."""

    name: str
    relation: str
    names: list[str]
    sources: set[int]
    merged: bool = False


Walk = Iterator[Node]
Rule = Callable[["Flow", Node], Walk]


class Flow:
    """The state of one walk.

    Attributes:
        reaching: by name, the tokens that may have given it its value at this point.
        done: by loop and what reached it, what is reaching after it: a loop met again so has nothing new to say.
    """

    def __init__(self, atoms: Sequence[Node]) -> None:
        self.atoms = atoms
        self.reaching: dict[str, frozenset[int]] = {}
        self.done: dict[tuple[object, ...], dict[str, frozenset[int]]] = {}
        self.facts: dict[int, _Fact] = {}
        self._steps = 0

    def spend(self, steps: int) -> None:
        self._steps += steps
        if self._steps > MAX_STEPS:
            raise TooManySteps

    def variables(self, node: Node | None) -> list[Node]:
        """The atoms in a node that are no keywords and no punctuation."""
        if node is None:
            return []
        first, end = node.tokens
        self.spend(end - first)
        return [atom for atom in self.atoms[first:end] if atom.kind != atom.text]

    def use(self, atom: Node) -> None:
        """A value is read; a name that nothing gave a value yet gets it here."""
        if atom.kind == atom.text:
            return
        sources = self.reaching.get(atom.text)
        if sources is not None:
            self.note(atom, COMES, [atom.text], sources)
            return
        if atom.kind == "identifier":
            self.give(atom)
        self.note(atom, COMES, [], frozenset())

    def give(self, atom: Node) -> None:
        """From here on the atom's name has the value it gets at the atom."""
        assert atom.token is not None
        self.reaching[atom.text] = frozenset((atom.token,))

    def note(self, atom: Node, relation: str, names: Sequence[str], sources: Set[int]) -> None:
        assert atom.token is not None
        self.spend(1 + len(names) + len(sources))
        fact = self.facts.get(atom.token)
        if fact is None:
            self.facts[atom.token] = _Fact(atom.text, relation, list(names), set(sources))
            return
        fact.relation, fact.merged = relation, True
        fact.names = list(dict.fromkeys((*fact.names, *names)))
        fact.sources |= sources

    def branches(self) -> dict[str, frozenset[int]]:
        """A copy of what is reaching."""
        self.spend(len(self.reaching))
        return dict(self.reaching)


def data_flow(source: Source, rules: Mapping[str, Rule]) -> Counter[Item]:
    """The data flow of a source: items as often as they come. Raises TooManySteps."""
    flow = Flow(source.atoms)
    stack = [_step(flow, source.root, rules)]
    while stack:
        node = next(stack[-1], None)
        if node is None:
            stack.pop()
        else:
            stack.append(_step(flow, node, rules))
    return _numbered(flow.facts)


def shared_flow(prediction: Counter[Item], reference: Counter[Item]) -> tuple[int, int]:
    """How many of the reference's items the prediction has, and how many there are."""
    return (prediction & reference).total(), reference.total()


def _step(flow: Flow, node: Node, rules: Mapping[str, Rule]) -> Walk:
    flow.spend(1)
    if node.token is not None:
        flow.use(node)
        return iter(())
    return rules.get(node.kind, in_order)(flow, node)


def _numbered(facts: Mapping[int, _Fact]) -> Counter[Item]:
    """Facts of tokens that have a source or are one, in the order of tokens, names replaced by numbers."""
    linked = {token for token, fact in facts.items() if fact.sources}
    for fact in facts.values():
        linked |= fact.sources
    numbers: dict[str, int] = {}
    items: Counter[Item] = Counter()
    for token in sorted(linked & facts.keys()):
        fact = facts[token]
        sources = [numbers.setdefault(name, len(numbers)) for name in fact.names]
        own = numbers.setdefault(fact.name, len(numbers))
        items[own, fact.relation, tuple(sorted(sources) if fact.merged else sources)] += 1
    return items


def in_order(flow: Flow, node: Node) -> Walk:
    """One child after the other."""
    yield from node.children


def define(relation: str = COMES) -> Rule:
    """`name` gets `value`, if there is one."""

    def rule(flow: Flow, node: Node) -> Walk:
        value = node.child("value")
        if value is None:
            for name in flow.variables(node.child("name")):
                flow.note(name, relation, [], frozenset())
                flow.give(name)
            return
        yield value
        cross(flow, node.child("name"), value, relation)

    return rule


def cross(flow: Flow, target: Node | None, value: Node | None, relation: str) -> None:
    """Each variable of a target gets each of a value, one source at a time."""
    sources = flow.variables(value)
    for name in flow.variables(target):
        for source in sources:
            assert source.token is not None
            flow.note(name, relation, [source.text], {source.token})
        flow.give(name)


def at_once(flow: Flow, target: Node | None, value: Node | None) -> None:
    """Each variable of a target is computed from all of a value together."""
    sources = flow.variables(value)
    names = [source.text for source in sources]
    tokens = {source.token for source in sources if source.token is not None}
    for name in flow.variables(target):
        flow.note(name, COMPUTED, names, tokens)
        flow.give(name)


def branch(alternatives: Set[str]) -> Rule:
    """Children in order, until one of a kind in `alternatives`: from there on each begins with what reached the node.

    What reaches past the node is what reaches past any of these ways, and what reached it, unless there is an else.
    """

    def rule(flow: Flow, node: Node) -> Walk:
        before, ways = flow.branches(), []
        first, complete = True, False
        for child in node.children:
            complete |= "else" in child.kind
            if child.kind in alternatives or not first:
                ways.append(flow.reaching)
                flow.reaching, first = dict(before), False
                flow.spend(len(before))
            yield child
        ways.append(flow.reaching)
        flow.reaching = _union(flow, ways if complete else [*ways, before])

    return rule


def _union(flow: Flow, ways: Sequence[Mapping[str, frozenset[int]]]) -> dict[str, frozenset[int]]:
    """What reaches along any of several ways."""
    merged: dict[str, frozenset[int]] = {}
    for way in ways:
        flow.spend(len(way))
        for name, tokens in way.items():
            there = merged.get(name)
            if there is None:
                merged[name] = tokens
            elif there is not tokens and there != tokens:
                merged[name] = there | tokens
                flow.spend(len(there) + len(tokens))
    return merged


def loop(body: Rule) -> Rule:
    """A node whose rule is walked once for each different state that reaches it.

    Rules of loops walk a body twice, so that the second time sees what the first left: 2^d times for d loops in each
    other. But walking a loop again with the same tokens reaching its names notes the same again and leaves the same.
    """

    def rule(flow: Flow, node: Node) -> Walk:
        names = dict.fromkeys(atom.text for atom in flow.variables(node))
        flow.spend(len(names))
        key = (id(node), *(flow.reaching.get(name) for name in names))
        if key not in flow.done:
            yield from body(flow, node)
            flow.done[key] = {name: flow.reaching[name] for name in names if name in flow.reaching}
        flow.reaching.update(flow.done[key])

    return rule
