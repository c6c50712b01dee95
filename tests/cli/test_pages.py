"""The shell of HTML pages: escapes, and a policy that names the digest of each piece of code."""

from __future__ import annotations

import base64
import hashlib
import re

from sftstream.pages.document import Page, document, tag, text


def test_markup_is_escaped_and_control_characters_are_shown() -> None:
    assert text("<b>\x1b[2J & \"'") == "&lt;b&gt;\\x1b[2J &amp; &quot;&#x27;"
    assert text("a\u202eb\u2066c\ud800\x7f") == r"a\u202eb\u2066c\ud800\x7f"
    assert text("two\nlines\tand \u200d joiners") == "two\nlines\tand \u200d joiners"


def test_values_of_attributes_are_escaped() -> None:
    found = tag("p", text("a<b"), class_="note", data_row='3" onclick="x', hidden=None)
    assert found == '<p class="note" data-row="3&quot; onclick=&quot;x">a&lt;b</p>'


def test_the_policy_names_the_digests_of_the_style_and_of_each_script() -> None:
    page = document(Page("<title>", "<p>body</p>", ("preview.js",)))
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy
    rules = dict(rule.split(" ", 1) for rule in policy[1].split("; "))
    assert (rules["default-src"], rules["base-uri"], rules["form-action"]) == ("'none'", "'none'", "'none'")
    for name, element in (("style-src", "style"), ("script-src", "script")):
        codes = re.findall(rf"<{element}>(.*?)</{element}>", page, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(code.encode()).digest()).decode() for code in codes]
        assert rules[name].split() == [f"'sha256-{digest}'" for digest in digests]
    assert "<title>&lt;title&gt;</title>" in page
