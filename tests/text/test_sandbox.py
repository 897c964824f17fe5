"""Hostile chat templates end in one line, soon and without much memory; harmless ones do what Jinja does."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import jinja2
import pytest

from kvik.errors import DataError
from kvik.text.chat_template import ChatTemplate

SHORT = [{"role": "user", "content": "hi"}]
LONG = [{"role": "user", "content": "A" * 300_000}]  # raises the bounds on size, so that time is what runs out
GROW = "{% set ns = namespace(x=START) %}{% for i in range(60) %}{% set ns.x = STEP %}{% endfor %}"


def grow(start: str, step: str) -> str:
    return GROW.replace("START", start).replace("STEP", step)


TOO_LARGE = {
    "range": "{% for i in range(10**9) %}x{% endfor %}",
    "string times": "{{ 'a' * 10**9 }}",
    "times string": "{{ 1000000000 * 'a' }}",
    "list times": "{{ ([1] * 1000000000) | length }}",
    "doubled by ~": grow("'aaaa'", "ns.x ~ ns.x"),
    "doubled by +": grow("'aaaa'", "ns.x + ns.x"),
    "doubled lists": grow("[1]", "ns.x + ns.x"),
    "doubled by blocks": "{% set x = 'aaaa' %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 60,
    "doubled by a macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) * 2 }}{% else %}aa{% endif %}{% endmacro %}{{ f(60) }}",
    "shared lists": grow("['a']", "[ns.x, ns.x]") + "{{ ns.x }}",
    "shared dicts": grow("{}", "dict(a=ns.x, b=ns.x)") + "{{ ns.x | tojson }}",
    "shared dict displays": grow("{}", "{1: ns.x, 2: ns.x}"),
    "shared tuples": grow("(1,)", "(ns.x, ns.x)") + "{{ {ns.x: 1} }}",
    "shared keywords": "{% macro f() %}{{ f(a=kwargs, b=kwargs) }}{% endmacro %}{{ f(a=1) }}",
    "shared arguments": "{% macro f() %}{{ f(varargs, varargs) }}{% endmacro %}{{ f(1) }}",
    "compared lists": GROW.replace("START", "[1]").replace("STEP", "[ns.x, ns.x]") + "{{ ns.x == ns.x[:] }}",
    "replaced by method": grow("'aa'", "ns.x.replace('a', 'aa')"),
    "replaced by filter": grow("'aa'", "ns.x | replace('a', 'aa')"),
    "replaced between": "{{ ('a' * 60000) | replace('', 'b' * 60000) }}",
    "joined by filter": "{{ ('a' * 60000) | join('b' * 60000) }}",
    "joined by method": "{{ ('b' * 60000).join(['a'] * 20000) }}",
    "percent": "{{ ('%s' * 30000) % (('x' * 60000,) * 30000) }}",
    "percent by name": "{{ ('%(a)s' * 10000) % {'a': 'x' * 60000} }}",
    "format": "{{ ('{0}' * 20000).format('x' * 60000) }}",
    "indent": "{{ 'a\nb' | indent(1000000000) }}",
    "indent by text": "{{ ('\n' * 60000) | indent('a' * 60000) }}",
    "indent block": "{% filter indent(1000000000, true) %}a{% endfilter %}",
    "output": "{% for i in range(9999) %}{{ 'aaaaaaaaaaaaaaaaaaaa' }}{% endfor %}",
    "many values": "".join(f"{{% set v{i} = 'a' * 60000 %}}" for i in range(1500)),
    "json": "{% set ns = namespace(x=[1] * 9000) %}{% for i in range(60) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x | tojson(indent=16) }}",
}
REFUSED = {
    "width": "{{ '%1000000000d' % 1 }}",
    "width by name": "{{ '%(a)1000000000d' % {'a': 1} }}",
    "width by odd name": "{{ '%(a%%b)1000000000d' % {'a%b': 1} }}",
    "width as argument": "{{ '%*d' % (1000000000, 1) }}",
    "precision": "{{ '%.1000000000f' % 1.5 }}",
    "width made": "{{ ('%' ~ '9999999999' ~ 'd') % 1 }}",
    "width by filter": "{{ '%1000000000d' | format(1) }}",
    "width of format": "{{ '{:1000000000}'.format(1) }}",
    "width nested": "{{ '{:{}}'.format(1, 1000000000) }}",
    "format_map": "{{ '{a:1000000000}'.format_map({'a': 1}) }}",
    "center": "{{ 'a' | center(1000000000) }}",
    "ljust": "{{ 'a'.ljust(1000000000) }}",
    "zfill": "{{ 'a'.zfill(1000000000) }}",
    "expandtabs": "{{ '\t'.expandtabs(1000000000) }}",
    "translate": "{{ 'aaaa'.translate({97: 'a' * 60000}) }}",
    "to_bytes": "{{ (1).to_bytes(1000000000, 'big') }}",
    "batch": "{{ [1] | batch(1000000000, 1) | list }}",
    "lipsum": "{{ lipsum(n=1000000000) }}",
    "power": "{{ 10 ** 10 ** 9 }}",
    "products": grow("3", "ns.x * ns.x"),
    "complex": "{{ (0 - 8) ** 0.5 }}",
    "round": "{{ 5 | round(-1000000000, 'ceil') }}",
    "digits": "{{ ('9' * 60000) | int }}",
    "date": "{{ strftime_now('%0999999999d') }}",
    "summed lists": "{{ ([[1]] * 1000) | sum(start=[]) }}",
    "json indent": "{{ [[1]] | tojson(indent=1000000000) }}",
    "recursive namespace": "{% set ns = namespace() %}{% set ns.x = ns %}{{ ns }}",
    "namespace in a list": "{% set ns = namespace() %}{% set ns.x = [ns] %}{{ ns.x }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "recursive loop": "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "recursive block": "{% block a %}{{ self.a() }}{% endblock %}",
    "class": "{{ ''.__class__.__mro__ }}",
    "subclasses": "{{ messages.__class__.__base__.__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__['sys'] }}",
    "initializer": "{{ namespace.__init__.__globals__ }}",
    "namespace class": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "attr": "{{ messages | attr('__class__') }}",
    "mapped attribute": "{{ messages | map(attribute='__class__') | map(attribute='mro') | list | first | string ~ (1 / 0) }}",
    "format attribute": "{{ '{0.__class__.__mro__}'.format(1) }}",
    "class method": "{{ dict.fromkeys([1]) }}",
    "append": "{{ messages.append(1) }}",
    "update": "{{ messages[0].update({}) }}",
    "include": "{% include 'x' %}",
    "import": "{% import 'x' as y %}",
    "from": "{% from 'x' import y %}",
    "extends": "{% extends 'x' %}",
    "autoescape": "{% autoescape true %}{{ 1 }}{% endautoescape %}",
    "unknown statement": "{% exec 'x' %}",
    "huge source": "x" * 70_000,
    "deep parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep not": "{{ " + "not " * 9000 + "1 }}",
    "deep sum": "{{ " + "1+" * 9000 + "1 }}",
    "deep attributes": "{{ a" + ".b" * 20000 + " }}",
    "deep if": "{% if a %}" * 3000 + "{% endif %}" * 3000,
    "deep for": "{% for x in [1] %}" * 100 + "{% endfor %}" * 100,
    "deep lists": "{{ " + "[" * 8000 + "]" * 8000 + " }}",
    "deep filters": "{{ a" + "|e" * 30000 + " }}",
    "null bytes": "{{ '\0' | nothing }}",
}
FOREVER = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
    "filtered loops": "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "compared in a loop": "{% for i in range(99999) %}{% for j in range(99999) if messages[0].content == j %}{% endfor %}{% endfor %}",
    "searched in a loop": "{% for i in range(99999) if ('B' ~ i) in messages[0].content %}{% endfor %}",
    "exponential macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "exponential loop": "{% for x in [1, 2] recursive %}{{ loop([1, 2]) if loop.depth < 60 }}{% endfor %}",
    "sorted in a loop": "{% for i in range(99999) %}{% if range(99999) | sort %}{% endif %}{% endfor %}",
    "sliced in a loop": "{% set x = range(99999) | list %}{% for i in range(99999) %}{% if x[1:] %}{% endif %}{% endfor %}",
    "split in a loop": "{% for i in range(99999) %}{{ messages[0].content.split('A') and '' }}{% endfor %}",
    "tested in loops": "{% for i in range(99999) %}{% for j in range(99999) if j is none %}{% endfor %}{% endfor %}",
    "called back": "{% macro m() %}{% for i in range(99999) %}{{ caller() }}{% endfor %}{% endmacro %}{% call m() %}{% call m() %}{% endcall %}{% endcall %}",
}


@pytest.mark.parametrize("name", TOO_LARGE)
def test_what_grows_is_refused_before_it_exists(name: str) -> None:
    began = time.monotonic()
    with pytest.raises(DataError, match=r"^chat template: (makes|counts|nests)"):
        ChatTemplate(TOO_LARGE[name], "", "").render(SHORT)
    assert time.monotonic() - began < 4


@pytest.mark.parametrize("name", REFUSED)
def test_what_templates_may_not_do_is_refused(name: str) -> None:
    began = time.monotonic()
    with pytest.raises(DataError, match=r"^chat template: ") as error:
        ChatTemplate(REFUSED[name], "", "").render(SHORT)
    assert "division by zero" not in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600
    assert time.monotonic() - began < 4


@pytest.mark.parametrize("name", FOREVER)
def test_what_takes_long_is_stopped(name: str) -> None:
    began = time.monotonic()
    with pytest.raises(DataError, match=r"^chat template: takes longer than 0.25 s"):
        ChatTemplate(FOREVER[name], "", "", max_seconds=0.25).render(LONG)
    assert time.monotonic() - began < 2.5


def test_the_bound_on_time_holds_in_any_thread() -> None:
    raised: list[DataError] = []

    def render() -> None:
        try:
            ChatTemplate(FOREVER["nested loops"], "", "", max_seconds=0.25).render(LONG)
        except DataError as error:
            raised.append(error)

    thread = threading.Thread(target=render)
    thread.start()
    thread.join(5)
    assert len(raised) == 1


def test_the_largest_source_compiles_in_bounded_time() -> None:
    for source in ("{{a}}" * 13_000, "{{ " + "a~" * 30_000 + "a }}"):
        began = time.monotonic()
        assert ChatTemplate(source, "", "").render(SHORT) == ""
        assert time.monotonic() - began < 10  # 1 s when nothing else runs


def test_memory_stays_small() -> None:
    code = (
        "import resource, sys\n"
        "from text.test_sandbox import TOO_LARGE, SHORT\n"
        "from kvik.text.chat_template import ChatTemplate\n"
        "from kvik.errors import DataError\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for source in TOO_LARGE.values():\n"
        "    try:\n"
        "        ChatTemplate(source, '', '').render(SHORT)\n"
        "    except DataError:\n"
        "        pass\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": ":".join(sys.path)}
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 200  # MiB


@pytest.mark.parametrize(
    "source",
    [
        "{{ 1 + 2 * 3 - 4 / 2 // 1 % 5 ** 2 }} {{ -7 // 2 }} {{ -7 % 3 }} {{ 2 ** -1 }}",
        "{{ 'a' ~ 1 ~ none ~ [1, 'b'] ~ {'c': 2.5} ~ missing }}",
        "{% for x in [3, 1, 2] | sort %}{{ loop.index }}/{{ loop.length }}:{{ x }}{{ ', ' if not loop.last }}{% endfor %}",
        "{% for k, v in {'a': 1, 'b': 2}.items() %}{{ k }}={{ v }};{% endfor %}{{ {'a': 1}.get('z', 'none') }}",
        "{% for x in [1, [2, [3]]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}",
        "{% for x in range(9) if x is odd %}{{ loop.cycle('a', 'b') }}{% if loop.changed(x > 4) %}!{% endif %}{% else %}no{% endfor %}",
        "{% for x in [] %}{% else %}empty{% endfor %}{% for x in range(5) %}{% if x == 3 %}{% break %}{% endif %}{{ x }}{% endfor %}",
        "{% macro f(a, b=2) %}{{ a }}{{ b }}{{ varargs }}{{ kwargs }}{{ caller() }}{% endmacro %}{% call f(1, 3, 4, c=5) %}x{% endcall %}",
        "{% set ns = namespace(n=0) %}{% for x in 'abc' %}{% set ns.n = ns.n + loop.index %}{% endfor %}{{ ns.n }}",
        "{% set x %}a{{ 1 }}{% endset %}{{ x | upper }}{% filter replace('a', 'b') %}aaa{% endfilter %}{% with y = 3 %}{{ y }}{% endwith %}",
        "{{ messages[0]['role'] }}{{ messages[0].content[1:] }}{{ messages[::-1] | length }}{{ messages[-1].role[::-1] }}",
        "{{ ' x '.strip() }}{{ 'a,b'.split(',') }}{{ 'ab'.replace('a', 'c') }}{{ '-'.join(['a', 'b']) }}{{ 'abc'.find('c') }}",
        "{{ '%s|%5.2f|%-3d|%%' % ('a', 1.234, 7) }}{{ '{:>3}{a}'.format(1, a=2) }}{{ '%s' | format('x') }}",
        "{{ 'a' in 'abc' }}{{ 1 not in [1] }}{{ 1 < 2 < 3 }}{{ none is none }}{{ missing is defined }}{{ 'a' is string }}",
        "{{ [1, 2, 3] | sum }}{{ [1, 2] | map('string') | join('-') }}{{ [{'a': 1}] | map(attribute='a') | list }}{{ [0, 1] | select | list }}",
        "{{ 'a' | default('b') }}{{ missing | default('b') }}{{ '' | d('c', true) }}{{ ' x ' | trim }}{{ 'ab' | first }}{{ [1, 2] | last }}",
        "{{ [1, 2, 1] | unique | list }}{{ [1, 2] | reverse | list }}{{ 3.7 | int }}{{ '4' | int + 1 }}{{ 2.567 | round(1) }}{{ -3 | abs }}",
        "{{ {'b': 1, 'a': 2} | dictsort }}{{ {'a': 1} | items | list }}{{ 'a b' | title }}{{ 'x' | e }}{{ '<' | escape }}{{ '<' | safe }}",
        "{{ ['a', 'b'] | map('upper') | list }}{{ [1, 5] | max }}{{ [1, 5] | min }}{{ 'a b c' | wordcount }}{{ 'abcdef' | truncate(4, true, '') }}",
        "{{ 'a\nb' | indent }}{{ 'a\nb' | indent(2, first=true) }}{{ messages | groupby('role') | length }}{{ (1, 2) }}{{ [true, false] }}",
        "{{ 1 if messages else 2 }}{{ (missing or 'x') and 'y' }}{{ not true }}{{ 'a' 'b' }}{{ 1_000 }}{# comment #}{% raw %}{{ x }}{% endraw %}",
        "a\n  {% if true %}  \n b {%- if true -%} c {%- endif %}\n{% endif %}\n{{ '\\n' }}\n",
    ],
)
def test_harmless_templates_do_what_jinja_does(source: str) -> None:
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    assert ChatTemplate(source, "", "").render(SHORT) == environment.from_string(source).render(messages=SHORT)
