"""An Ollama TEMPLATE that is derived from a Jinja chat template, by asking the Jinja what it does.

Conversations are rendered whose messages are marks, and the results are cut at the marks. An example, with A, B and C
for the marks:

    {% for m in messages %}{{ '[FIRST]' if loop.first }}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>

    user A                          [FIRST]<user>A<assistant>
    user A, assistant B, user C     [FIRST]<user>A<assistant>B<user>C<assistant>

Between the marks stand, in front of a user's message, "[FIRST]<user>" if nothing came before it, and "<user>" after an
answer; in front of an answer "<assistant>"; at the end "<assistant>". So what is written depends on the message's own
role and on the one before it, and that is what the Go template asks:

    {{- $previous := "" }}
    {{- range $index, $_ := .Messages }}
    {{- if eq .Role "user" }}{{ if eq $previous "" }}[FIRST]<user>{{ .Content }}{{ else }}<user>{{ .Content }}{{ end }}
    {{- else if eq .Role "assistant" }}<assistant>{{ .Content }}
    {{- end }}{{ $previous = .Role }}
    {{- end }}<assistant>

Other questions that may decide are whether a user has spoken, whether there is a system message, whether this is the
last message, and whether thinking is wanted (`Observation.facts`). `grow` finds the smallest tree of questions that
explains all that was seen; where two pieces differ though all answers are the same, there is no such template, and
that is the reason which is told.

What the Jinja does to the text of a message itself is learned by `pipeline.prompt.message_text`. Go templates cannot
move a message's text elsewhere, count messages, or tell the time of day.

A derived template is a candidate only: whether it is exact is for a real Go engine and the whole conformance suite to
say (`pipeline.ollama.rendering`).
"""

from __future__ import annotations

import datetime
import itertools
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from pipeline.prompt.cases import CONVERSATIONS
from pipeline.prompt.message_text import Handling, learn, named, quoted
from pipeline.prompt.template import ChatTemplate, TemplateRefused

CHAT = ("system", "user", "assistant")
ROLES = (*CHAT, "tool")
LONGEST = 6  # messages of a probing conversation
LONGEST_WITH_EMPTY = LONGEST_WITH_TOOL = 4

_DAYS = (datetime.datetime(1987, 3, 25, 7, 8, 9), datetime.datetime(2031, 11, 18, 22, 41, 53))
_SYSTEM = "\ue000"  # stands for the system text in a cut piece
_DATE = 0xE010  # the first of the characters that stand for a date, one for each format
_THINK = {None: "unset", False: "off", True: "on"}

Roles = tuple[str, ...]
Piece = str | None  # None: this message leaves no trace at all
Facts = Mapping[str, str]


class NotDerivable(Exception):
    """Why there is no Go template that does what the Jinja does."""


@dataclass(frozen=True)
class Derivation:
    """What came of it.

    Attributes:
        template: the Go template, or None.
        reason: why there is none.
    """

    template: str | None
    reason: str = ""


@dataclass(frozen=True)
class Observation:
    """A piece of text that was seen, and where.

    Attributes:
        facts: answers to the questions that may decide which text it is.
        piece: the text, or None if the message that should follow it was dropped.
    """

    facts: Facts
    piece: Piece


# A tree is a piece, or a fork with the subtree for each answer.
@dataclass(frozen=True)
class Fork:
    """An inner node of a decision tree."""

    fact: str
    answers: tuple[tuple[tuple[str, ...], Tree], ...]


Tree = Piece | Fork


def derive(template: ChatTemplate) -> Derivation:
    """Derive a Go template. It is exact only if the suite, run through a real Go engine, says so."""
    handling = {role: _handling(template, role) for role in ROLES}
    # What a tool said can be too hard while the rest is not.
    for roles in (ROLES, CHAT):
        reasons = []
        # A system message is rendered where it stands; or all of them, the last or the first somewhere else.
        for slot in ("", "all", "last", "first"):
            try:
                return Derivation(_Probe(template, handling, slot, roles).write())
            except NotDerivable as error:
                reasons.append(str(error))
    return Derivation(None, reasons[0])


def _why_refused(template: ChatTemplate) -> str:
    """Why a template takes no plain conversation."""
    words = ""
    for case in CONVERSATIONS:
        try:
            template.render(case.messages, case.tools)
        except TemplateRefused as refusal:
            words = words or refusal.words
        else:
            if case.tools:
                return "the template needs tools"
    return f"it refuses every plain conversation: {words}"


def _handling(template: ChatTemplate, role: str) -> Handling:
    """What the template does to the text of a message of this role: an early one, as most messages are."""
    roles = {"system": ("system", "user"), "tool": ("user", "assistant", "tool")}.get(
        role, ("user", "assistant", "user")
    )
    place = roles.index(role)

    def rendered(text: str) -> str:
        turns = [_message(name, text if i == place else _mark(i)) for i, name in enumerate(roles)]
        return template.render(turns, today=_DAYS[0])

    try:
        start, found, end = rendered(_mark(place)).partition(_mark(place))
    except TemplateRefused:
        return Handling()

    def ask(text: str) -> str | None:
        try:
            whole = rendered(text)
        except TemplateRefused:
            return None
        inside = whole.startswith(start) and whole.endswith(end)
        return whole[len(start) : len(whole) - len(end)] if inside else None

    return learn(template.source, ask) if found else Handling()


def _mark(number: int) -> str:
    return f"Qzx{chr(65 + number)}xzQ"


def _message(role: str, text: str) -> dict[str, str]:
    # A template that writes a tool's name writes a mark out of order, and is known by it.
    of_tool = {"name": _mark(25), "tool_call_id": "call00001"} if role == "tool" else {}
    return {"role": role, "content": text, **of_tool}


class _Probe:
    """One attempt to understand the template.

    Args:
        handling: what it does to a text, by role.
        slot: "" if system messages are taken to be rendered where they stand; else which of them, "all", "last" or
            "first", goes somewhere else.
        roles: whose messages there are.
    """

    def __init__(self, template: ChatTemplate, handling: Mapping[str, Handling], slot: str, roles: Roles) -> None:
        self.template = template
        self.roles = roles
        self.handling = handling
        self.slot = slot
        self.formats = date_formats(template.source)
        self.entries: dict[str, list[Observation]] = {role: [] for role in roles}
        self.ends: list[Observation] = []
        self.empty_matters: set[str] = set()

    def write(self) -> str:
        """Observe, decide, and write the Go template."""
        for roles in _sequences(self.roles, LONGEST):
            self._observe(roles)
        if not self.ends:
            raise NotDerivable(_why_refused(self.template))
        self.empty_matters = {role for role in self.roles if self._empty_matters(role)}
        for roles in _sequences(self.roles, LONGEST_WITH_EMPTY):
            for place, role in enumerate(roles):
                if role in self.empty_matters:
                    self._observe(roles, place)
        trees = {role: grow(seen) for role, seen in self.entries.items() if seen}
        return _Writer(self, trees, grow(self.ends)).text()

    def _observe(self, roles: Roles, empty: int = -1) -> None:
        for think, name in _THINK.items():
            try:
                text = self._rendered(roles, think, empty)
            except TemplateRefused:
                continue
            self._cut(roles, text, name, empty)

    def _rendered(self, roles: Roles, think: bool | None, empty: int = -1) -> str:
        messages = [_message(role, "" if number == empty else _mark(number)) for number, role in enumerate(roles)]
        texts = []
        for day in _DAYS:
            text = self.template.served(self.template.render(messages, think=think, today=day))
            for number, form in enumerate(self.formats):
                text = text.replace(day.strftime(form), chr(_DATE + number))
            texts.append(text)
        if texts[0] != texts[1]:
            raise NotDerivable("it writes the date or the time in a form that Ollama's Go templates cannot write")
        return texts[0]

    def _cut(self, roles: Roles, text: str, think: str, empty: int) -> None:
        """Cut a rendering at its marks and note what lies between them."""
        systems = [number for number, role in enumerate(roles) if role == "system"]
        if self.slot and systems:
            chosen = {"all": systems, "last": systems[-1:], "first": systems[:1]}[self.slot]
            full = [_mark(number) for number in chosen if number != empty]
            if full:
                text = text.replace("\n\n".join(full), _SYSTEM)
        facts = {
            "previous": "",
            "seen": "no",
            "system": self._system_fact(roles, systems, empty),
            "last": "no",
            "think": think,
        }
        for number, role in enumerate(roles):
            if role == "system" and self.slot:
                if _mark(number) in text:
                    raise NotDerivable("it moves the system message to where Go cannot")
                continue
            facts = facts | {"last": "yes" if number == len(roles) - 1 else "no"}
            seen = "yes" if role == "user" else facts["seen"]
            if number == empty:
                # It writes nothing by itself; what follows is written with it in mind.
                facts = facts | {"previous": _after_empty(facts["previous"], role), "seen": seen}
                continue
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
            facts = facts | {"previous": role, "seen": seen}
        if "Qzx" in text:
            raise NotDerivable("it changes the order of the messages")
        self.ends.append(Observation({key: value for key, value in facts.items() if key != "last"}, text))

    def _system_fact(self, roles: Roles, systems: Sequence[int], empty: int) -> str:
        counted = systems if self.slot else [0] if roles[0] == "system" else []
        if not counted:
            return "no"
        return "empty" if "system" in self.empty_matters and set(counted) <= {empty} else "yes"

    def _empty_matters(self, role: str) -> bool:
        """Whether an empty message is more than its text left out."""
        for roles in _sequences(self.roles, 3):
            for place, name in enumerate(roles):
                if name == role:
                    try:
                        full = self._rendered(roles, None).replace(_mark(place), "")
                        if self._rendered(roles, None, place) != full:
                            return True
                    except TemplateRefused:
                        continue
        return False


def _after_empty(previous: str, role: str) -> str:
    return f"{previous} -{role}"


def date_formats(source: str) -> list[str]:
    """The date formats of a Jinja that Go can write too: those of year, month and day, the longest first."""
    found = set(re.findall(r"""strftime_now\(\s*['"]([^'"]*)['"]""", source)) | {"%Y-%m-%d"}
    return sorted((form for form in found if not re.sub(r"%[YmdbB]", "", form).count("%")), key=lambda f: (-len(f), f))


def _sequences(names: Roles, longest: int) -> Iterator[Roles]:
    """Orders of roles as Ollama's Go templates meet them: no two neighbours alike but tools, the model's turn next."""
    for length in range(1, longest + 1):
        for roles in itertools.product(names, repeat=length):
            alike = any(a == b != "tool" for a, b in itertools.pairwise(roles))
            known = "tool" not in roles or (length <= LONGEST_WITH_TOOL and "user" in roles[: roles.index("tool")])
            if roles[-1] in ("user", "tool") and known and not alike:
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
        return Fork(fact, tuple(sorted(merged, key=lambda entry: (len(entry[0]), entry[0]))))
    raise NotDerivable("what it writes between two messages depends on more than their order")


def _size(tree: Tree) -> int:
    return 1 if not isinstance(tree, Fork) else 1 + sum(_size(subtree) for _, subtree in tree.answers)


# Writing Go.

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
    """Writes the Go template of a probe's trees."""

    def __init__(self, probe: _Probe, trees: Mapping[str, Tree], end: Tree) -> None:
        self.trees, self.end = trees, end
        self.slot, self.formats, self.empty_matters = probe.slot, probe.formats, probe.empty_matters
        self.names = named([(role, probe.handling[role]) for role in ROLES if role in trees or probe.slot])
        self.handling = probe.handling
        self.asked = {fact for tree in (*trees.values(), end) for fact in _facts(tree)}

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
                empty = "{{ $previous = printf " + quoted(_after_empty("%s", role)) + " $previous }}"
                seen = "{{ $seen = true }}" if role == "user" and "seen" in self.asked else ""
                lines.append(f'{{{{- {keyword} and (eq .Role "{role}") (not .Content) }}}}{empty}{seen}')
                keyword = "else if"
            body = self._branch(self.trees[role], self._content(role, ".Content") + after)
            lines.append(f'{{{{- {keyword} eq .Role "{role}" }}}}{body}')
            keyword = "else if"
        lines += ["{{- end }}"] * (keyword != "if")
        lines.append("{{- end }}" + self._branch(self.end, ""))
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
        name = self.names.get(self.handling[role])
        return f'{{{{ template "{name}" {value} }}}}' if name else f"{{{{ {value} }}}}"

    def _months(self) -> list[str]:
        """A template that writes a month's name, if one is wanted."""
        used = [form for number, form in enumerate(self.formats) if self._uses(chr(_DATE + number))]
        lines = []
        for code in ("%b", "%B"):
            if any(code in form for form in used):
                months = [datetime.date(2000, number, 1) for number in range(1, 13)]
                tests = [f'if eq . "{month.strftime(_MONTH)}" }}}}{month.strftime(code)}' for month in months]
                lines.append(f'{{{{- define "{code}" }}}}{{{{ ' + "{{ else ".join(tests) + "{{ end }}{{ end }}")
        return lines

    def _uses(self, character: str) -> bool:
        return any(character in piece for tree in (*self.trees.values(), self.end) for piece in _pieces(tree))

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
        dates = {chr(_DATE + number): form for number, form in enumerate(self.formats)}
        parts = re.split(f"([{_SYSTEM}{''.join(dates)}])", piece)
        text = ""
        for part in parts:
            if part == _SYSTEM:
                text += self._content("system", "$text")
            elif part in dates:
                text += _date(dates[part])
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


def _facts(tree: Tree) -> Iterable[str]:
    if isinstance(tree, Fork):
        yield tree.fact
        for _, subtree in tree.answers:
            yield from _facts(subtree)


def _pieces(tree: Tree) -> Iterable[str]:
    if isinstance(tree, Fork):
        for _, subtree in tree.answers:
            yield from _pieces(subtree)
    elif tree is not None:
        yield tree


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
