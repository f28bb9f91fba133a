"""A Jinja chat template that does with plain conversations what another one does, and nothing more.

llama.cpp does not know all of Jinja. Mistral Nemo's template asks `messages | selectattr("tool_calls", "undefined")`,
which llama.cpp refuses, whatever the conversation. What that template writes around the messages is learned by
`pipeline.prompt.template_pieces`, and is written down again in words that llama.cpp knows. For the example there:

    {%- for message in messages -%}
    {%- if message.role == 'user' -%}
    {%- if ns.previous == '' -%}{{- '[FIRST]<user>' -}}{%- else -%}{{- '<user>' -}}{%- endif -%}
    {{- message.content -}}{%- set ns.previous = message.role -%}
    {%- elif message.role == 'assistant' -%}{{- '<assistant>' -}}{{- message.content -}} ...

What a tool says is refused, in words that `pipeline.prompt.conformance` knows. They must not name tools in the plural:
Ollama would take the template for one that can use them.

As a derived TEMPLATE this is a candidate: whether it is exact, the conformance suite says
(`pipeline.ollama.carried_template`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from pipeline.prompt.message_text import WHITE_SPACE, Ends, Handling
from pipeline.prompt.template import ChatTemplate
from pipeline.prompt.template_pieces import CHAT, SYSTEM, Fork, Pieces, Tree, after_empty, cut

_CONDITIONS = {
    ("seen", "yes"): "ns.seen",
    ("seen", "no"): "not ns.seen",
    ("last", "yes"): "loop.last",
    ("last", "no"): "not loop.last",
    ("think", "on"): "enable_thinking is defined and enable_thinking",
    ("think", "off"): "enable_thinking is defined and not enable_thinking",
    ("think", "unset"): "enable_thinking is not defined",
}
_CONTENT = "message.content"
REFUSAL = "this chat template takes no message of the role "


def plain_jinja(template: ChatTemplate) -> str:
    """Write it.

    Raises:
        NotDerivable: there is none.
    """
    return _Writer(cut(template, CHAT, joined=False)).text()


class _Writer:
    """Writes the Jinja of what was learned. Every tag takes the white space around it, so that lines can be broken."""

    def __init__(self, pieces: Pieces) -> None:
        self.pieces = pieces
        self.dates = pieces.dates

    def text(self) -> str:
        """The whole template."""
        lines = [_tag("set ns = namespace(previous='', seen=false, system='no', text='')"), *self._system()]
        lines.append(_tag("for message in messages"))
        keyword, asked = "if", self.pieces.asked
        remembered = _tag("set ns.previous = message.role") if "previous" in asked or self.pieces.empty_matters else ""
        for role in (role for role in CHAT if role in self.pieces.trees):
            after = _tag("set ns.seen = true") if role == "user" and "seen" in asked else ""
            if role in self.pieces.empty_matters:
                empty = _tag(f"set ns.previous = ns.previous ~ {_quoted(after_empty('', role))}")
                lines.append(_tag(f"{keyword} message.role == {_quoted(role)} and not {_CONTENT}") + empty + after)
                keyword = "elif"
            after = self._content(role, _CONTENT) + remembered + after
            lines.append(_tag(f"{keyword} message.role == {_quoted(role)}"))
            lines.append(self._branch(self.pieces.trees[role], after))
            keyword = "elif"
        others = "elif message.role != 'system'" if self.pieces.slot else "else"  # a slot has it elsewhere
        lines.append(_tag(others) + f"{{{{- raise_exception({_quoted(REFUSAL)} ~ message.role) -}}}}")
        lines += [_tag("endif"), _tag("endfor"), self._branch(self.pieces.end, "")]
        return "\n".join(line for line in lines if line)

    def _system(self) -> list[str]:
        """What is known of the system messages before any message is written."""
        content = _CONTENT
        if self.pieces.slot == "all":
            content = f"ns.text ~ ('' if ns.system == 'no' else '\\n\\n') ~ {_CONTENT}"
        only = {"first": "ns.system == 'no'", "": "loop.first"}.get(self.pieces.slot)
        lines = [
            _tag("for message in messages"),
            _tag("if message.role == 'system'" + (f" and {only}" if only else "")),
            _tag(f"set ns.text = {content}") + _tag("set ns.system = 'yes'"),
            _tag("endif") + _tag("endfor"),
        ]
        if "system" in self.pieces.empty_matters:
            empty = "if ns.system == 'yes' and not ns.text"
            lines.append(_tag(empty) + _tag("set ns.system = 'empty'") + _tag("endif"))
        return lines if self.pieces.slot or "system" in self.pieces.asked else []

    def _branch(self, tree: Tree, then: str) -> str:
        """Jinja for a tree; `then` follows every piece that is followed by a message."""
        if tree is None:
            return ""
        if not isinstance(tree, Fork):
            return self._literal(tree) + then
        *firsts, (_, otherwise) = tree.answers
        text = ""
        for number, (answers, subtree) in enumerate(firsts):
            text += _tag(f"{'elif' if number else 'if'} {_condition(tree.fact, answers)}")
            text += self._branch(subtree, then)
        return text + _tag("else") + self._branch(otherwise, then) + _tag("endif")

    def _literal(self, piece: str) -> str:
        """A piece of text, with the system text and the date where they stand."""
        text = ""
        for part in re.split(f"([{SYSTEM}{''.join(self.dates)}])", piece):
            if part == SYSTEM:
                text += self._content("system", "ns.text")
            elif part in self.dates:
                text += f"{{{{- strftime_now({_quoted(self.dates[part])}) -}}}}"
            elif part:
                text += f"{{{{- {_quoted(part)} -}}}}"
        return text

    def _content(self, role: str, value: str) -> str:
        return f"{{{{- {_handled(self.pieces.handling[role], value)} -}}}}"


def _handled(handling: Handling, value: str) -> str:
    """An expression for a message's text, so handled."""
    plain = value + _stripped(handling.plain)
    if not handling.separator:
        return plain
    separator = _quoted(handling.separator)
    rest = f"{value}.split({separator}{', 1' if handling.first else ''})[{1 if handling.between else -1}]"
    if handling.opener:
        opener = _quoted(handling.opener)
        rest = f"(({value}.split({opener})[0] if {opener} in {value} else '') ~ {rest})"
    return f"({rest}){_stripped(handling.after)} if {separator} in {value} else {plain}"


def _stripped(ends: Ends) -> str:
    if ends.left == ends.right:
        return f".strip({_characters(ends.left)})" if ends.left else ""
    calls = {"lstrip": ends.left, "rstrip": ends.right}
    return "".join(f".{name}({_characters(characters)})" for name, characters in calls.items() if characters)


def _characters(characters: str) -> str:
    return "" if characters == WHITE_SPACE else _quoted(characters)


def _condition(fact: str, answers: Sequence[str]) -> str:
    if fact in ("previous", "system"):
        return " or ".join(f"ns.{fact} == {_quoted(answer)}" for answer in answers)
    return " or ".join(f"({_CONDITIONS[fact, answer]})" for answer in answers)


def _tag(words: str) -> str:
    return f"{{%- {words} -%}}"


def _quoted(text: str) -> str:
    """A Jinja string."""
    escapes = {"\\": "\\\\", "'": "\\'", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
    return "'" + "".join(escapes.get(character, character) for character in text) + "'"
