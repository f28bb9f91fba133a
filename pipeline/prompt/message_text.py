"""What a chat template does to the text of a message, learned by asking, and done again in Go.

Templates trim messages, and drop the thinking from earlier answers. An example: a template that writes
`{{ m.content.split('</think>')[-1] | trim }}` for an answer. `learn` asks what becomes of a few texts, in which MARK
stands for a word that no template writes by itself:

    " MARK"                               becomes  "MARK"      white space is taken from the left
    "MARK\n"                              becomes  "MARK"      and from the right
    "Thinks.</think>MARK"                 becomes  "MARK"      what stands before "</think>" is dropped
    "Thinks.</think>Two.</think>MARK"     becomes  "MARK"      it is the last "</think>" that counts

That is `Handling(Ends(WHITE_SPACE, WHITE_SPACE), "</think>", after=Ends(WHITE_SPACE, WHITE_SPACE))`. Go templates have
no function for either, but can cut one byte off a text and look at what is left, in a loop: `Handling.go` writes that.

    {{- range len . }}                                           as often as the text has bytes:
    {{- if eq (slice $rest 0 8) "</think>" }}                    if what is left begins with "</think>",
        {{ $text = slice $rest 8 }}{{ end }}                     the text is what follows it;
    {{- $rest = slice $rest 1 }}{{- end }}                       look one byte further on
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# What Python's str.strip takes away.
WHITE_SPACE = (
    "\t\n\x0b\x0c\r\x1c\x1d\x1e\x1f \x85\xa0"
    "\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
)
_ASKED = " \n\t\u3000"
_MARK = "QzxMARKxzQ"

# Gives what the template makes of a message's text, None if it refuses.
Ask = Callable[[str], str | None]


@dataclass(frozen=True)
class Ends:
    """Characters that are taken from the beginning and from the end."""

    left: str = ""
    right: str = ""


@dataclass(frozen=True)
class Handling:
    """What happens to a text.

    Attributes:
        plain: what is stripped.
        separator: what stands up to it is dropped; "" for nothing.
        first: the first separator counts, else the last.
        between: and what follows the second is dropped too.
        opener: what stands before it is kept after all; "" if nothing is.
        after: what is stripped of what follows a separator.
    """

    plain: Ends = Ends()
    separator: str = ""
    first: bool = False
    between: bool = False
    opener: str = ""
    after: Ends = Ends()

    def __bool__(self) -> bool:
        return self != Handling()

    def go(self, name: str) -> str:
        """A Go template of this name that writes the text it is given, so handled."""
        lines = [f'{{{{- define "{name}" }}}}{{{{ $text := . }}}}']
        if self.separator:
            lines += self._cut()
        if self.after == self.plain or not self.separator:
            lines += _strip(self.plain)
        else:
            lines += ["{{- if $cut }}", *_strip(self.after)]
            if self.plain != Ends():
                lines += ["{{- else }}", *_strip(self.plain)]
            lines.append("{{- end }}")
        return "\n".join(lines) + "{{ $text }}{{ end }}"

    def _cut(self) -> list[str]:
        """Go that drops what stands up to the separator from $text."""
        size, opened = len(self.separator.encode()), len(self.opener.encode())
        take = f"{{{{ $cut = true }}}}{{{{ $text = slice $rest {size} }}}}"
        if self.between:
            # len (slice $text (len $rest)) is the difference of the lengths: Go templates cannot subtract.
            second = "{{ $text = slice $text 0 (len (slice $text (len $rest))) }}{{ break }}"
            take = "{{ if $cut }}" + second + "{{ end }}" + take
        elif self.first:
            take += "{{ break }}"
        lines = ["{{- $cut := false }}{{ $rest := . }}"]
        if opened:
            lines[0] += "{{ $kept := . }}{{ $open := false }}"
        lines.append("{{- range len . }}")
        if opened:
            test = f"and (not $open) (ge (len $rest) {opened}) (eq (slice $rest 0 {opened}) {quoted(self.opener)})"
            # As above, for the part of the whole text in front of $rest.
            whole = "{{ $open = true }}{{ $kept = slice $kept 0 (len (slice $kept (len $rest))) }}"
            lines.append("{{- if " + test + " }}" + whole + "{{ end }}")
        lines += [
            f"{{{{- if lt (len $rest) {size} }}}}{{{{ break }}}}{{{{ end }}}}",
            f"{{{{- if eq (slice $rest 0 {size}) {quoted(self.separator)} }}}}{take}{{{{ end }}}}",
            "{{- $rest = slice $rest 1 }}",
            "{{- end }}",
        ]
        if opened:
            lines.append('{{- if and $cut $open }}{{ $text = printf "%s%s" $kept $text }}{{ end }}')
        return lines


def learn(source: str, ask: Ask) -> Handling:
    """Learn how a text is handled.

    Args:
        source: the Jinja text: its own `split(...)` arguments are what is tried as separators.
        ask: renders a message with this text, and gives what became of it.
    """
    plain = _ends(ask)
    separators = dict.fromkeys(re.findall(r"""split\(\s*['"]([^'"\\]+)['"]""", source))
    if "</think>" in source:
        separators["</think>"] = None
    for separator in separators:
        for opener in ("", "<think>") if separator == "</think>" else ("",):
            start = f"{opener}Thinks.{separator}"
            if ask(f"{start}{_MARK}") != _MARK:
                continue
            kept = opener if opener and ask(f"Before.{start}{_MARK}") == f"Before.{_MARK}" else ""
            first = ask(f"{start}Two.{separator}{_MARK}") == f"Two.{separator}{_MARK}"
            between = ask(f"{start}Two.{separator}{_MARK}") == "Two."
            return Handling(plain, separator, first, between, kept, _ends(ask, start))
    return Handling(plain)


def _ends(ask: Ask, start: str = "") -> Ends:
    """What is taken from the ends of a text, or of what follows `start`."""

    def taken(left: bool) -> str:
        texts = {character: character + _MARK if left else _MARK + character for character in _ASKED}
        gone = "".join(character for character, text in texts.items() if ask(start + text) == _MARK)
        return WHITE_SPACE if gone == _ASKED else gone

    return Ends(taken(left=True), taken(left=False))


def _strip(ends: Ends) -> list[str]:
    """Go that takes the characters from both ends of $text."""
    lines = []
    if ends.left:
        lines.append(_loop(ends.left, lambda size: f"slice $text 0 {size}", lambda size: f"slice $text {size}"))
    if ends.right:
        # len (slice $text n) is the length without n bytes: Go templates cannot subtract.
        lines.append(
            _loop(
                ends.right,
                lambda size: f"slice $text (len (slice $text {size}))",
                lambda size: f"slice $text 0 (len (slice $text {size}))",
            )
        )
    return lines


def _loop(characters: str, end: Callable[[int], str], rest: Callable[[int], str]) -> str:
    branches = []
    for size in (1, 2, 3):
        wanted = [character for character in characters if len(character.encode()) == size]
        if wanted:
            test = f"eq ({end(size)}) {' '.join(map(quoted, wanted))}"
            test = test if size == 1 else f"and (ge (len $text) {size}) ({test})"
            branches.append(f"if {test} }}}}{{{{ $text = {rest(size)} }}}}")
    chain = "{{ else ".join(branches)
    return (
        "{{- range len $text }}{{ if not $text }}{{ break }}{{ end }}{{ "
        + chain
        + "{{ else }}{{ break }}{{ end }}{{ end }}"
    )


def quoted(text: str) -> str:
    """A Go string in ASCII."""
    simple = {"\n": "\\n", "\t": "\\t", "\r": "\\r", '"': '\\"', "\\": "\\\\"}
    return '"' + "".join(simple.get(c) or (c if " " <= c <= "~" else _escape(c)) for c in text) + '"'


def _escape(character: str) -> str:
    number = ord(character)
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def named(handlings: Sequence[tuple[str, Handling]]) -> dict[Handling, str]:
    """A name for each different handling: the roles that it is for."""
    roles: dict[Handling, list[str]] = {}
    for role, handling in handlings:
        if handling:
            roles.setdefault(handling, []).append(role)
    return {handling: " ".join(names) for handling, names in roles.items()}
