"""An Ollama TEMPLATE that does what a Jinja chat template does.

What is written around the messages is learned by `pipeline.prompt.template_pieces`: it depends on the message's own
role, on the one before it and on a few other questions, and these the Go template asks. For the example there:

    {{- $previous := "" }}
    {{- range $index, $_ := .Messages }}
    {{- if eq .Role "user" }}{{ if eq $previous "" }}[FIRST]<user>{{ .Content }}{{ else }}<user>{{ .Content }}{{ end }}
    {{- else if eq .Role "assistant" }}<assistant>{{ .Content }}
    {{- end }}{{ $previous = .Role }}
    {{- end }}<assistant>

Go templates cannot move a message's text elsewhere, count messages, or tell the time of day.

A derived template is a candidate only: whether it is exact is for a real Go engine and the whole conformance suite to
say (`pipeline.ollama.rendering`).
"""

from __future__ import annotations

import datetime
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.prompt.message_text import named, quoted
from pipeline.prompt.template import ChatTemplate
from pipeline.prompt.template_pieces import (
    CHAT,
    ROLES,
    SYSTEM,
    Fork,
    NotDerivable,
    Pieces,
    Tree,
    after_empty,
    cut,
)


@dataclass(frozen=True)
class Derivation:
    """What came of it.

    Attributes:
        template: the Go template, or None.
        reason: why there is none.
    """

    template: str | None
    reason: str = ""


def derive(template: ChatTemplate) -> Derivation:
    """Derive a Go template. It is exact only if the suite, run through a real Go engine, says so."""
    reason = ""
    # What a tool said can be too hard while the rest is not.
    for roles in (ROLES, CHAT):
        try:
            return Derivation(_Writer(cut(template, roles, joined=True)).text())
        except NotDerivable as error:
            reason = str(error)
    return Derivation(None, reason)


_CONDITIONS = {
    ("seen", "yes"): "$seen",
    ("seen", "no"): "not $seen",
    ("last", "yes"): "$last",
    ("last", "no"): "not $last",
    ("think", "on"): "$.Think",
    ("think", "off"): "and $.IsThinkSet (not $.Think)",
    ("think", "unset"): "not $.IsThinkSet",
}
_MONTH = "%m"
_SLICES = {"%Y": "slice currentDate 0 4", "%m": "slice currentDate 5 7", "%d": "slice currentDate 8 10"}


class _Writer:
    """Writes the Go template of what was learned."""

    def __init__(self, pieces: Pieces) -> None:
        self.pieces = pieces
        self.trees, self.slot, self.empty_matters = pieces.trees, pieces.slot, pieces.empty_matters
        self.asked, self.dates = pieces.asked, pieces.dates
        self.names = named([(role, pieces.handling[role]) for role in ROLES if role in self.trees or self.slot])

    def text(self) -> str:
        """The whole template."""
        lines = [handled.go(name) for handled, name in self.names.items()]
        lines += self._months() + self._beginning()
        lines.append("{{- range $index, $_ := .Messages }}")
        if "last" in self.asked:
            lines.append("{{- $last := eq (len (slice $.Messages $index)) 1 }}")
        keyword = "if"
        for role in (role for role in ROLES if role in self.trees):
            after = self._after(role)
            if role in self.empty_matters:
                empty = "{{ $previous = printf " + quoted(after_empty("%s", role)) + " $previous }}"
                seen = "{{ $seen = true }}" if role == "user" and "seen" in self.asked else ""
                lines.append(f'{{{{- {keyword} and (eq .Role "{role}") (not .Content) }}}}{empty}{seen}')
                keyword = "else if"
            body = self._branch(self.trees[role], self._content(role, ".Content") + after)
            lines.append(f'{{{{- {keyword} eq .Role "{role}" }}}}{body}')
            keyword = "else if"
        lines += ["{{- end }}"] * (keyword != "if")
        lines.append("{{- end }}" + self._branch(self.pieces.end, ""))
        return "\n".join(lines)

    def _beginning(self) -> list[str]:
        """The variables that the trees ask for."""
        lines = []
        if "previous" in self.asked or self.empty_matters - ({"system"} if self.slot else set()):
            lines.append('{{- $previous := "" }}')
        if "seen" in self.asked:
            lines.append("{{- $seen := false }}")
        if self.slot == "all":
            lines.append("{{- $text := .System }}")
        elif self.slot:
            once = " (not $text)" if self.slot == "first" else ""
            test = f'and (eq .Role "system"){once}' if once else 'eq .Role "system"'
            lines.append(
                '{{- $text := "" }}{{ range .Messages }}{{ if ' + test + " }}{{ $text = .Content }}{{ end }}{{ end }}"
            )
        if "system" in self.asked:
            lines.append('{{- $system := "no" }}')
            test = '{{ if eq .Role "system" }}{{ $system = "yes" }}{{ end }}'
            lines.append("{{- range .Messages }}" + test + ("" if self.slot else "{{ break }}") + "{{ end }}")
            if "system" in self.empty_matters:
                text = "$text" if self.slot else "(index .Messages 0).Content"
                lines.append(
                    '{{- if eq $system "yes" }}{{ if not ' + text + ' }}{{ $system = "empty" }}{{ end }}{{ end }}'
                )
        return lines

    def _after(self, role: str) -> str:
        """What is remembered after a message."""
        text = "{{ $previous = .Role }}" if "previous" in self.asked or self.empty_matters else ""
        return text + ("{{ $seen = true }}" if role == "user" and "seen" in self.asked else "")

    def _content(self, role: str, value: str) -> str:
        name = self.names.get(self.pieces.handling[role])
        return f'{{{{ template "{name}" {value} }}}}' if name else f"{{{{ {value} }}}}"

    def _months(self) -> list[str]:
        """A template that writes a month's name, if one is wanted."""
        lines = []
        for code in ("%b", "%B"):
            if any(code in form for form in self.dates.values()):
                months = [datetime.date(2000, number, 1) for number in range(1, 13)]
                tests = [f'if eq . "{month.strftime(_MONTH)}" }}}}{month.strftime(code)}' for month in months]
                lines.append(f'{{{{- define "{code}" }}}}{{{{ ' + "{{ else ".join(tests) + "{{ end }}{{ end }}")
        return lines

    def _branch(self, tree: Tree, then: str) -> str:
        """Go text for a tree; `then` follows every piece that is followed by a message."""
        if tree is None:
            return ""
        if not isinstance(tree, Fork):
            return self._literal(tree) + then
        *firsts, (_, otherwise) = tree.answers
        text = ""
        for number, (answers, subtree) in enumerate(firsts):
            text += "{{ " + ("else " if number else "") + f"if {_condition(tree.fact, answers)}" + " }}"
            text += self._branch(subtree, then)
        return text + "{{ else }}" + self._branch(otherwise, then) + "{{ end }}"

    def _literal(self, piece: str) -> str:
        """A piece of text, with the system text and the date where they stand."""
        parts = re.split(f"([{SYSTEM}{''.join(self.dates)}])", piece)
        text = ""
        for part in parts:
            if part == SYSTEM:
                text += self._content("system", "$text")
            elif part in self.dates:
                text += _date(self.dates[part])
            else:
                text += go_text(part)
        return text


def _date(form: str) -> str:
    if form == "%Y-%m-%d":
        return "{{ currentDate }}"
    text = ""
    for part in re.split("(%.)", form):
        if part in ("%b", "%B"):
            text += f'{{{{ template "{part}" (slice currentDate 5 7) }}}}'
        else:
            text += f"{{{{ {_SLICES[part]} }}}}" if part in _SLICES else go_text(part)
    return text


def _condition(fact: str, answers: Sequence[str]) -> str:
    if fact in ("previous", "system"):
        return f"eq ${fact} " + " ".join(quoted(answer) for answer in answers)
    conditions = [_CONDITIONS[fact, answer] for answer in answers]
    return conditions[0] if len(conditions) == 1 else "or " + " ".join(f"({text})" for text in conditions)


def go_text(text: str) -> str:
    """Text as a Go template writes it, in characters that a Modelfile can carry too."""
    written = ""
    for number, character in enumerate(text):
        following = text[number + 1 : number + 2]
        if character == "{" and following in ("{", ""):
            written += '{{ "{" }}'
        elif character == '"' and text[max(0, number - 2) : number] == '""':
            written += '{{ "\\"" }}'
        elif character not in "\n\t " and unicodedata.category(character)[0] in "CZ":
            written += "{{ " + quoted(character) + " }}"
        else:
            written += character
    return written
