"""An Ollama TEMPLATE that is derived from a Jinja chat template, by asking the Jinja what it does.

The one idea: render conversations whose contents are marks, and cut the results at the marks. What lies between two
marks depends on little: the roles on both sides, whether a user or a system has spoken, whether this is the last turn.
A decision tree over those few questions, small enough to be read, says which text goes where, and is written down as a
Go template that walks `.Messages`. Nothing is guessed: what does not fit is reported, and what fits is still only a
candidate until a real Go engine has rendered the whole conformance suite with it.

What Go cannot do and a Jinja may want: trim a message, format a date, move a message's text elsewhere.
"""

from __future__ import annotations

import datetime
import itertools
import json
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from pipeline.ollama.jinja import ChatTemplate, TemplateRefused

ROLES = ("system", "user", "assistant")
LONGEST = 6

_DAYS = (datetime.datetime(1987, 3, 25, 7, 8, 9), datetime.datetime(2031, 11, 18, 22, 41, 53))
_SYSTEM = "\ue000"  # stands for {{ $.System }} in a cut piece
_DATE = "\ue001"  # stands for {{ currentDate }}

Roles = tuple[str, ...]
Piece = str | None  # None: this message leaves no trace at all


class NotDerivable(Exception):
    """Why there is no Go template that does what the Jinja does."""


@dataclass(frozen=True)
class Derivation:
    """What came of it.

    Attributes:
        template: the Go template, or None.
        reason: why there is none.
        trims: roles whose message the Jinja trims, which Go cannot.
    """

    template: str | None
    reason: str = ""
    trims: tuple[str, ...] = ()


@dataclass(frozen=True)
class Observation:
    """A piece of text that was seen, and where.

    Attributes:
        facts: answers to the questions that may decide which text it is.
        piece: the text, or None if the message that should follow it was dropped.
    """

    facts: Mapping[str, str]
    piece: Piece


# A tree is a piece, or a question with the subtree for each answer.
@dataclass(frozen=True)
class Question:
    """An inner node of a decision tree."""

    fact: str
    answers: tuple[tuple[tuple[str, ...], Tree], ...]


Tree = Piece | Question


def derive(template: ChatTemplate) -> Derivation:
    """Derive a Go template. It is exact only if the conformance suite, run through a real Go engine, says so."""
    trims = tuple(role for role in ROLES if _trims(template, role))
    try:
        return Derivation(_Probe(template, in_place=True).write(), trims=trims)
    except NotDerivable as first:
        try:
            return Derivation(_Probe(template, in_place=False).write(), trims=trims)
        except NotDerivable:
            return Derivation(None, str(first), trims)


def _trims(template: ChatTemplate, role: str) -> bool:
    """Whether white space around a message of this role is taken away."""
    before: Roles = ("user",) if role == "assistant" else ()
    after: Roles = () if role == "user" else ("user",)
    place = len(before)

    def rendered(text: str) -> str | None:
        roles = (*before, role, *after)
        messages = [{"role": name, "content": text if i == place else "x"} for i, name in enumerate(roles)]
        try:
            return template.render(messages, today=_DAYS[0])
        except TemplateRefused:
            return None

    bare, spaced = rendered("qzx"), rendered(" \n qzx \n ")
    return bare is not None and spaced is not None and " \n qzx \n " not in spaced


def _mark(number: int) -> str:
    return f"Qzx{chr(65 + number)}xzQ"


class _Probe:
    """One attempt: system messages are rendered where they stand (in_place), or wherever `.System` then goes."""

    def __init__(self, template: ChatTemplate, in_place: bool) -> None:
        self.template = template
        self.in_place = in_place
        self.entries: dict[str, list[Observation]] = {role: [] for role in ROLES}
        self.ends: list[Observation] = []
        self.empty_system_is_none = False

    def write(self) -> str:
        """Observe, decide, and write the Go template."""
        for roles in _sequences():
            self._observe(roles)
        if not self.ends:
            raise NotDerivable("it refuses every plain conversation")
        self._observe_empty_system()
        trees = {role: grow(seen) for role, seen in self.entries.items() if seen}
        return _write(trees, grow(self.ends), self.in_place, self.empty_system_is_none)

    def _observe(self, roles: Roles) -> None:
        for think in (None, False, True):
            try:
                text = self._rendered(roles, think)
            except TemplateRefused:
                continue
            self._cut(roles, text, {None: "unset", False: "off", True: "on"}[think])

    def _rendered(self, roles: Roles, think: bool | None, empty: int = -1) -> str:
        messages = [
            {"role": role, "content": "" if number == empty else _mark(number)}
            for number, role in enumerate(roles)
        ]
        first, second = (
            self.template.served(self.template.render(messages, think=think, today=day)) for day in _DAYS
        )
        texts = [
            text.replace(day.strftime("%Y-%m-%d"), _DATE)
            for text, day in zip((first, second), _DAYS, strict=True)
        ]
        if texts[0] != texts[1]:
            raise NotDerivable("it writes the date in a form that Go templates in Ollama cannot write")
        return texts[0]

    def _cut(self, roles: Roles, text: str, think: str) -> None:
        """Cut a rendering at its marks and note what lies between them."""
        if not self.in_place:
            systems = [_mark(number) for number, role in enumerate(roles) if role == "system"]
            if systems:
                text = text.replace("\n\n".join(systems), _SYSTEM)
        facts = {
            "previous": "",
            "seen": "no",
            "system": "yes" if roles[0] == "system" or (not self.in_place and "system" in roles) else "no",
            "last": "no",
        }
        for number, role in enumerate(roles):
            if role == "system" and not self.in_place:
                if _mark(number) in text:
                    raise NotDerivable("it puts the system message where Go cannot")
                continue
            facts = facts | {"last": "yes" if number == len(roles) - 1 else "no"}
            count = text.count(_mark(number))
            if count == 0:
                self.entries[role].append(Observation(facts, None))
                continue
            if count > 1:
                raise NotDerivable(f"it writes a message of the {role} twice")
            piece, text = text.split(_mark(number))
            if "Qzx" in piece:
                raise NotDerivable("it changes the order of the messages")
            self.entries[role].append(Observation(facts, piece))
            facts = facts | {"previous": role, "seen": "yes" if role == "user" else facts["seen"]}
        if "Qzx" in text:
            raise NotDerivable("it changes the order of the messages")
        end = {key: value for key, value in facts.items() if key != "last"}
        self.ends.append(Observation(end | {"think": think}, text))

    def _observe_empty_system(self) -> None:
        """Some templates take an empty system message for none."""
        for after in (("user",), ("user", "assistant", "user")):
            try:
                empty = self._rendered(("system", *after), None, empty=0)
                full = self._rendered(("system", *after), None).replace(_mark(0), "")
                none = self._rendered(after, None)
            except TemplateRefused:
                continue
            for number in reversed(range(len(after))):
                none = none.replace(_mark(number), _mark(number + 1))
            if empty != full and empty == none:
                self.empty_system_is_none = True


def _sequences() -> Iterator[Roles]:
    """Orders of roles as Ollama's Go templates meet them: no two neighbours alike, a user at the end."""
    for length in range(1, LONGEST + 1):
        for roles in itertools.product(ROLES, repeat=length):
            alike = any(a == b for a, b in itertools.pairwise(roles))
            if roles[-1] == "user" and not alike:
                yield roles


def grow(seen: Sequence[Observation]) -> Tree:
    """The smallest decision tree that explains every observation.

    Raises:
        NotDerivable: two observations with the same facts differ.
    """
    facts = list(seen[0].facts)
    trees = []
    for order in itertools.permutations(facts):
        tree = _grow(seen, order)
        trees.append((_size(tree), order != tuple(facts), tree))
    return min(trees, key=lambda entry: entry[:2])[2]


def _grow(seen: Sequence[Observation], facts: Sequence[str]) -> Tree:
    pieces = {observation.piece for observation in seen}
    if len(pieces) == 1:
        return seen[0].piece
    for number, fact in enumerate(facts):
        groups: dict[str, list[Observation]] = {}
        for observation in seen:
            groups.setdefault(observation.facts[fact], []).append(observation)
        if len(groups) == 1:
            continue
        subtrees = {answer: _grow(group, facts[number + 1 :]) for answer, group in groups.items()}
        merged: list[tuple[tuple[str, ...], Tree]] = []
        for answer, subtree in subtrees.items():
            for index, (answers, other) in enumerate(merged):
                if other == subtree:
                    merged[index] = ((*answers, answer), other)
                    break
            else:
                merged.append(((answer,), subtree))
        if len(merged) == 1:
            return merged[0][1]
        return Question(fact, tuple(sorted(merged, key=lambda entry: (len(entry[0]), entry[0]))))
    raise NotDerivable("what it writes between two messages depends on more than their order")


def _size(tree: Tree) -> int:
    return 1 if not isinstance(tree, Question) else 1 + sum(_size(subtree) for _, subtree in tree.answers)


# Writing Go.

_CONDITIONS = {
    ("seen", "yes"): "$seen",
    ("seen", "no"): "not $seen",
    ("system", "yes"): "$system",
    ("system", "no"): "not $system",
    ("last", "yes"): "$last",
    ("last", "no"): "not $last",
    ("think", "on"): "$.Think",
    ("think", "off"): "and $.IsThinkSet (not $.Think)",
    ("think", "unset"): "not $.IsThinkSet",
}


def _write(trees: Mapping[str, Tree], end: Tree, in_place: bool, empty_system_is_none: bool) -> str:
    asked = {fact for tree in (*trees.values(), end) for fact in _facts(tree)}
    lines = []
    if asked & {"previous"}:
        lines.append('{{- $previous := "" }}')
    if "seen" in asked:
        lines.append("{{- $seen := false }}")
    if "system" in asked:
        if in_place:
            content = " (index .Messages 0).Content" if empty_system_is_none else ""
            test = '(eq (index .Messages 0).Role "system")'
            lines.append(
                "{{- $system := false }}{{ if .Messages }}{{ $system = and " + test + content + " }}{{ end }}"
            )
            if not content:
                lines[-1] = lines[-1].replace(f"and {test}", test[1:-1])
        else:
            lines.append("{{- $system := .System }}")
    lines.append("{{- range $index, $_ := .Messages }}")
    if "last" in asked:
        lines.append("{{- $last := eq (len (slice $.Messages $index)) 1 }}")
    keyword = "if"
    for role in ROLES:
        if role not in trees:
            continue
        condition = f'eq .Role "{role}"'
        if role == "system" and empty_system_is_none:
            condition = f"and ({condition}) .Content"
        after = "{{ $previous = .Role }}" if "previous" in asked else ""
        if role == "user" and "seen" in asked:
            after += "{{ $seen = true }}"
        lines.append(
            "{{- " + keyword + " " + condition + " }}" + _branch(trees[role], "{{ .Content }}" + after)
        )
        keyword = "else if"
    if keyword != "if":
        lines.append("{{- end }}")
    lines.append("{{- end }}" + _branch(end, ""))
    return "\n".join(lines)


def _facts(tree: Tree) -> Iterable[str]:
    if isinstance(tree, Question):
        yield tree.fact
        for _, subtree in tree.answers:
            yield from _facts(subtree)


def _branch(tree: Tree, then: str) -> str:
    """Go text for a tree; `then` follows every piece that is followed by a message."""
    if tree is None:
        return ""
    if not isinstance(tree, Question):
        return go_text(tree) + then
    *firsts, (_, otherwise) = tree.answers
    text = ""
    for number, (answers, subtree) in enumerate(firsts):
        text += "{{ " + ("else " if number else "") + f"if {_condition(tree.fact, answers)}" + " }}"
        text += _branch(subtree, then)
    return text + "{{ else }}" + _branch(otherwise, then) + "{{ end }}"


def _condition(fact: str, answers: Sequence[str]) -> str:
    if fact == "previous":
        return "eq $previous " + " ".join(f'"{answer}"' for answer in answers)
    conditions = [_CONDITIONS[fact, answer] for answer in answers]
    return conditions[0] if len(conditions) == 1 else "or " + " ".join(f"({text})" for text in conditions)


def go_text(piece: str) -> str:
    """Text as a Go template writes it, in characters that a Modelfile can carry too."""
    text = ""
    for number, character in enumerate(piece):
        following = piece[number + 1 : number + 2]
        if character == _SYSTEM:
            text += "{{ $.System }}"
        elif character == _DATE:
            text += "{{ currentDate }}"
        elif character == "{" and following in ("{", "", _SYSTEM, _DATE):
            text += '{{ "{" }}'
        elif character == '"' and piece[max(0, number - 2) : number] == '""':
            text += '{{ "\\"" }}'
        elif character not in "\n\t" and (unicodedata.category(character)[0] in "CZ" and character != " "):
            text += "{{ " + json.dumps(character) + " }}"
        else:
            text += character
    return text
