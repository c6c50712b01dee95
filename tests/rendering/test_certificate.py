"""A template is compiled and printed by a second process first, and must print the same in both."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jinja2
import pytest
import tiny
from transformers.utils.chat_template_utils import _compile_jinja_template

from sftstream import ChatEncoder, Refused
from sftstream.cache import directory
from sftstream.rendering import certificate, certificate_process
from sftstream.rendering.certificate import certify
from sftstream.rendering.environment import compiled
from sftstream.rendering.template import ChatTemplate

FOLDED = "{{ 'a' | center(30000000) | length }}" * 6000
"""Jinja computes constants when it compiles a template: 6,000 times 30 MB."""


def template(text: str) -> ChatTemplate:
    return ChatTemplate(tiny.TEMPLATE + text, {"bos_token": "<s>"})


def certificates() -> int:
    return len(list(directory().glob("*/*/*.certificate")))


def test_a_template_that_compiles_for_hours_is_stopped_in_the_second_process() -> None:
    # A process that compiled the template itself would not come to its end.
    with pytest.raises(ValueError, match=r"could not compile .* it needs more than 1 s of CPU time; use another"):
        certify(template(FOLDED), seconds=1)


def test_a_template_that_compiles_with_too_much_memory_is_stopped_in_the_second_process() -> None:
    many = "{{ [" + ", ".join(["'a' | center(30000000)"] * 12) + "] }}"
    with pytest.raises(ValueError, match=r"MemoryError|within 60 s and 256 MiB"):
        certify(template(many))


@pytest.mark.parametrize(
    "text",
    [
        "{{ joiner() | upper }}",
        "{{ (joiner() | string)[-9:] }}",
        "{% if tools %}{{ joiner }}{{ joiner() | upper }}{% endif %}",
        "{% if messages | length > 3 %}{{ joiner() | upper }}{% endif %}",
        "{% if add_generation_prompt and messages[-1].reasoning_content %}{{ joiner() | upper }}{% endif %}",
    ],
)
def test_a_template_that_prints_another_text_in_each_process_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"prints the probe '.*' differently in each process"):
        certify(template(text))


def test_an_order_of_hashes_is_no_value_of_a_template() -> None:
    encoder = ChatEncoder(tiny.fast_tokenizer(), tiny.TEMPLATE.replace("{{- bos_token }}", DIFFERENCE))
    with pytest.raises(Refused, match=r"^template raises: it subtracts from the keys of a dictionary"):
        encoder.encode(tiny.chat("a", "b", "c", "d")["messages"])


DIFFERENCE = "{% if messages | length == 4 %}{{ (messages[0].keys() - {'a': 1}.keys()) | list }}{% endif %}"


def test_an_address_that_no_probe_prints_is_refused_with_the_conversation() -> None:
    text = "{% if messages[0].content == 'b' %}{{ messages[0].items }}{% endif %}"
    encoder = ChatEncoder(tiny.fast_tokenizer(), tiny.TEMPLATE + text)
    with pytest.raises(Refused, match=r"^template prints an address: '<built-in method items .* at 0x.*>' differs"):
        encoder.encode(tiny.chat("b", "a")["messages"])
    said = "a <function f at 0x7f3a00aa00bb>"
    (example,) = encoder.encode(tiny.chat("a", said)["messages"])
    assert encoder.tokenizer.hf.decode(example.tokens[example.loss_mask]) == f"{said}<|eot_id|>"


def test_the_second_process_runs_once_for_a_template_and_each_start_is_compared_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text, before = "{# once #}", certificates()
    certify(template(text))
    assert certificates() == before + 1
    monkeypatch.setattr(sys, "executable", "/nonexistent")
    certify(template(text))
    with pytest.raises(FileNotFoundError):
        certify(template("{# twice #}"))
    monkeypatch.setattr(certificate, "digests", lambda *_: ["0"] * 60)
    with pytest.raises(
        ValueError, match="prints the probe 'question, answer' differently in each process, so a resumed"
    ):
        certify(template(text))


@pytest.mark.parametrize("changed", ["variables", "text", "code"])
def test_a_certificate_holds_for_one_text_with_its_variables_and_one_version(
    changed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = template("{# of one #}{{ x }}")
    certify(first)
    before = certificates()
    certify(first)
    assert certificates() == before
    if changed == "code":
        monkeypatch.setattr(certificate.metadata, "version", lambda _: "0")
    certify({"variables": first.with_variables({"x": 1}), "text": template("{# of two #}{{ x }}")}.get(changed, first))
    assert certificates() == before + 1


def test_a_template_that_prints_the_date_needs_one_certificate_for_all_days() -> None:
    certify(ChatTemplate(tiny.DATED_TEMPLATE, {}))
    before = certificates()
    certify(ChatTemplate(tiny.DATED_TEMPLATE, {}, certificate.Date(2024, 2, 29)))
    assert certificates() == before


def test_without_a_writable_cache_each_start_has_a_second_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no directory")
    monkeypatch.setenv("SFTSTREAM_CACHE", str(tmp_path / "file"))
    certify(template("{# no cache #}"))
    with pytest.raises(ValueError, match="differently in each process"):
        certify(template("{{ joiner() | upper }}"))


def test_the_second_process_has_another_hash_seed_and_imports_no_large_library() -> None:
    code = certificate._START.replace("main()\n", "import json; print(hash('a'), *sys.modules)")
    printed = [
        subprocess.run(
            [sys.executable, "-S", "-c", code, str(Path(certificate.__file__).parents[1]), *sys.path],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        for seed in ("1", "2")
    ]
    assert printed[0][0] != printed[1][0]
    assert not {"torch", "numpy", "transformers", "tokenizers", "msgspec"} & set(printed[0])
    assert {certificate._other_seed()} <= {"1", "2"}
    # Every file of this package that the process imports decides the name of the certificate.
    package = Path(certificate.__file__).parent
    known = {(package / name).resolve() for name in (*certificate.CODE, "environment.py", "certificate_process.py")}
    imported = {name for name in printed[0] if name.startswith("sftstream.")} - {"sftstream.rendering"}
    assert imported == {
        ".".join(("sftstream", *path.relative_to(package.parent).with_suffix("").parts))
        for path in known
        if path.name != "__init__.py"
    }


def names(environment: jinja2.Environment) -> dict[str, Any]:
    return {
        "filters": set(environment.filters),
        "tests": set(environment.tests),
        "globals": set(environment.globals),
        "tags": {tag for extension in environment.extensions.values() for tag in extension.tags},
        "trimmed": (environment.trim_blocks, environment.lstrip_blocks, environment.keep_trailing_newline),
        "undefined": environment.undefined,
        "marks": (environment.block_start_string, environment.variable_start_string, environment.autoescape),
    }


def test_the_sandbox_has_the_names_and_settings_of_transformers() -> None:
    own, theirs = names(compiled("").environment), names(_compile_jinja_template("").environment)
    assert own["filters"] == theirs["filters"] - {"random"} | {"each"}
    assert own["globals"] == theirs["globals"] - {"lipsum", "strftime_now"}
    assert {name: own[name] for name in list(own)[1:] if name != "globals"} == {
        name: theirs[name] for name in list(own)[1:] if name != "globals"
    }


@pytest.mark.parametrize(
    "text",
    [
        "{{ {'b': [1, 'é<'], 'a': none} | tojson }}",
        "{{ {'b': [1, 'é'], 'a': 2} | tojson(indent=2, sort_keys=true, ensure_ascii=true) }}",
        "{% set n = namespace(x=1) %}{% set n.x = 2 %}{{ n.x }}{{ dict(a=1) }}{{ dict.fromkeys(['a'], 1) }}",
        "{% set n = namespace(self=3) %}{{ n.self }}",
        "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% elif i == 5 %}{% break %}{% endif %}{{ i }}{% endfor %}",
        "a\n  {% if true %}\n b \n  {% endif %}\nc\n",
        "{% generation %}a{{ 1 - 2 }}{% endgeneration %}",
        "{% set d = {'a': 1, 'items': 2, 'keys': 3, '_b': 4} %}{{ d.a }}{{ d.b }}{{ d.b is defined }}{{ d._b }}{{ d['items'] }}",
        "{% set d = {'items': 2} %}{% for k, v in d.items() %}{{ k }}{{ v }}{% endfor %}{{ d.get('x', 5) }}",
        "{{ ' a '.strip() }}{{ 'a,b'.split(',') }}{{ 'a'.nothing is defined }}{{ '{}'.format('x') }}{{ 'a'['upper']() }}",
        "{% set n = namespace(a=1) %}{{ n.a }}{{ n.b is defined }}{{ n.b }}",
        "{% for i in [1, 2] %}{{ loop.index }}{{ loop.last }}{{ loop.nothing is defined }}{{ loop.cycle('x', 'y') }}{% endfor %}",
    ],
)
def test_the_sandbox_prints_what_transformers_prints(text: str) -> None:
    assert compiled(text).render() == _compile_jinja_template(text).render()


@pytest.mark.parametrize(
    "text",
    [
        "{{ {}.__class__ }}",
        "{{ ''.__class__ }}",
        "{{ namespace().__class__ }}",
        "{{ namespace().__init__ }}",
        "{{ {}.update({'a': 1}) }}",
        "{% for i in [1] %}{{ loop._iterator }}{% endfor %}",
        "{{ [].append(1) }}",
    ],
)
def test_the_sandbox_hides_what_the_one_of_transformers_hides(text: str) -> None:
    for template in (compiled(text), _compile_jinja_template(text)):
        try:
            assert template.render() == ""
        except jinja2.exceptions.SecurityError:
            continue


@pytest.mark.parametrize("text", ["{% set n = namespace(_x=1) %}", "{% set n = namespace() %}{% set n._x = 1 %}"])
def test_a_namespace_holds_public_names_only(text: str) -> None:
    with pytest.raises(jinja2.exceptions.SecurityError, match="'_x'"):
        compiled(text).render()


def test_the_digests_are_those_of_the_texts() -> None:
    contexts = [{"x": "a"}, {"x": 3}]
    printed = certificate_process.digests(compiled("{{ x.upper() }}{{ strftime_now('%Y') }}"), contexts, "2000-01-01")
    assert printed == [hashlib.sha256(b"A2000").hexdigest(), "refused"]
