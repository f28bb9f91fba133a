"""What a Jinja chat template writes around the messages, learned by asking it.

Conversations are rendered whose messages are marks, and the results are cut at the marks. An example, with A, B and C
for the marks:

    {% for m in messages %}{{ '[FIRST]' if loop.first }}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>

    user A                          [FIRST]<user>A<assistant>
    user A, assistant B, user C     [FIRST]<user>A<assistant>B<user>C<assistant>

Between the marks stand, in front of a user's message, "[FIRST]<user>" if nothing came before it, and "<user>" after an
answer; in front of an answer "<assistant>"; at the end "<assistant>". So what is written depends on the message's own
role and on the one before it.

Other questions that may decide are whether a user has spoken, whether there is a system message, whether this is the
last message, and whether thinking is wanted (`Observation.facts`). `grow` finds the smallest tree of questions that
explains all that was seen; where two pieces differ though all answers are the same, there is no such tree, and that is
the reason which is told. From the trees other templates are written: `pipeline.prompt.go_template`, for Ollama, and
`pipeline.prompt.plain_jinja`, for llama.cpp. Neither moves a message's text elsewhere or counts messages.

What the Jinja does to the text of a message itself is learned by `pipeline.prompt.message_text`.
"""

from __future__ import annotations

import datetime
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

from pipeline.prompt.cases import CONVERSATIONS
from pipeline.prompt.message_text import Handling, learn
from pipeline.prompt.template import ChatTemplate, TemplateRefused

CHAT = ("system", "user", "assistant")
ROLES = (*CHAT, "tool")
LONGEST = 6  # messages of a probing conversation
LONGEST_WITH_EMPTY = LONGEST_WITH_TOOL = 4

_DAYS = (datetime.datetime(1987, 3, 25, 7, 8, 9), datetime.datetime(2031, 11, 18, 22, 41, 53))
SYSTEM = "\ue000"  # stands for the system text in a cut piece
DATE = 0xE010  # the first of the characters that stand for a date, one for each format
_THINK = {None: "unset", False: "off", True: "on"}

Roles = tuple[str, ...]
Piece = str | None  # None: this message leaves no trace at all
Facts = Mapping[str, str]


class NotDerivable(Exception):
    """Why no such trees explain what the Jinja does."""


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


@dataclass(frozen=True)
class Pieces:
    """What a template writes around the messages.

    Attributes:
        trees: by role, what stands in front of a message; no entry where the template takes none of the role.
        end: what stands after the last.
        slot: "" if system messages are rendered where they stand; else which of them, "all", "last" or "first", is
            written where a piece has SYSTEM.
        formats: the date formats that DATE and the characters after it stand for.
        empty_matters: roles whose empty message is more than its text left out: it leaves no trace.
        handling: what is done to a message's text, by role.
    """

    trees: Mapping[str, Tree]
    end: Tree
    slot: str
    formats: Sequence[str]
    empty_matters: Set[str]
    handling: Mapping[str, Handling]

    @property
    def asked(self) -> set[str]:
        """The questions that decide."""
        return {fact for tree in (*self.trees.values(), self.end) for fact in _facts(tree)}

    @property
    def dates(self) -> dict[str, str]:
        """The date formats that are written, by the characters that stand for them."""
        written = {piece for tree in (*self.trees.values(), self.end) for piece in _pieces(tree)}
        characters = {chr(DATE + number): form for number, form in enumerate(self.formats)}
        return {character: form for character, form in characters.items() if any(character in p for p in written)}


def cut(template: ChatTemplate, roles: Roles, *, joined: bool) -> Pieces:
    """Learn what a template writes around the messages.

    Args:
        template: the template.
        roles: whose messages there are.
        joined: neighbouring messages of one role are one by the time that they are rendered.

    Raises:
        NotDerivable: it depends on more than the questions that are asked.
    """
    handling = {role: _handling(template, role) for role in ROLES}
    reasons = []
    # A system message is rendered where it stands; or all of them, the last or the first somewhere else.
    for slot in ("", "all", "last", "first"):
        try:
            return _Probe(template, handling, slot, roles, joined).learn()
        except NotDerivable as error:
            reasons.append(error)
    raise reasons[0]


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
    # A template that writes a tool's name or a call's id writes a mark out of order, and is known by it. Some want nine
    # characters.
    of_tool = {"name": _mark(25), "tool_call_id": f"{_mark(24)}00"} if role == "tool" else {}
    return {"role": role, "content": text, **of_tool}


class _Probe:
    """One attempt to understand the template.

    Args:
        handling: what it does to a text, by role.
        slot: "" if system messages are taken to be rendered where they stand; else which of them, "all", "last" or
            "first", goes somewhere else.
        roles: whose messages there are.
        joined: no two neighbours are of one role, but tools.
    """

    def __init__(
        self, template: ChatTemplate, handling: Mapping[str, Handling], slot: str, roles: Roles, joined: bool
    ) -> None:
        self.template = template
        self.joined = joined
        self.roles = roles
        self.handling = handling
        self.slot = slot
        self.formats = date_formats(template.source)
        self.entries: dict[str, list[Observation]] = {role: [] for role in roles}
        self.ends: list[Observation] = []
        self.empty_matters: set[str] = set()

    def learn(self) -> Pieces:
        """Observe and decide."""
        for roles in self._sequences(LONGEST):
            self._observe(roles)
        if not self.ends:
            raise NotDerivable(_why_refused(self.template))
        self.empty_matters = {role for role in self.roles if self._empty_matters(role)}
        for roles in self._sequences(LONGEST_WITH_EMPTY):
            for place, role in enumerate(roles):
                if role in self.empty_matters:
                    self._observe(roles, place)
        trees = {role: grow(seen) for role, seen in self.entries.items() if seen}
        return Pieces(trees, grow(self.ends), self.slot, self.formats, self.empty_matters, self.handling)

    def _observe(self, roles: Roles, empty: int = -1) -> None:
        text = None
        for think, name in _THINK.items():
            if think is None or "enable_thinking" in self.template.source:  # else it is the same text again
                try:
                    text = self._rendered(roles, think, empty)
                except TemplateRefused:
                    text = None
            if text is not None:
                self._cut(roles, text, name, empty)

    def _rendered(self, roles: Roles, think: bool | None, empty: int = -1) -> str:
        messages = [_message(role, "" if number == empty else _mark(number)) for number, role in enumerate(roles)]
        texts = []
        for day in _DAYS if "strftime_now" in self.template.source else _DAYS[:1]:
            text = self.template.served(self.template.render(messages, think=think, today=day))
            for number, form in enumerate(self.formats):
                text = text.replace(day.strftime(form), chr(DATE + number))
            texts.append(text)
        if texts[0] != texts[-1]:
            raise NotDerivable("it writes the date or the time in a form that Ollama's Go templates cannot write")
        return texts[0]

    def _cut(self, roles: Roles, text: str, think: str, empty: int) -> None:
        """Cut a rendering at its marks and note what lies between them."""
        systems = [number for number, role in enumerate(roles) if role == "system"]
        if self.slot and systems:
            chosen = {"all": systems, "last": systems[-1:], "first": systems[:1]}[self.slot]
            full = [_mark(number) for number in chosen if number != empty]
            if full:
                text = text.replace("\n\n".join(full), SYSTEM)
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
                facts = facts | {"previous": after_empty(facts["previous"], role), "seen": seen}
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

    def _sequences(self, longest: int) -> Iterator[Roles]:
        """Orders of roles as a template meets them, the model's turn next."""
        for length in range(1, longest + 1):
            for roles in itertools.product(self.roles, repeat=length):
                alike = self.joined and any(a == b != "tool" for a, b in itertools.pairwise(roles))
                known = "tool" not in roles or (length <= LONGEST_WITH_TOOL and "user" in roles[: roles.index("tool")])
                if roles[-1] in ("user", "tool") and known and not alike:
                    yield roles

    def _empty_matters(self, role: str) -> bool:
        """Whether an empty message is more than its text left out."""
        for roles in self._sequences(3):
            for place, name in enumerate(roles):
                if name == role:
                    try:
                        full = self._rendered(roles, None).replace(_mark(place), "")
                        if self._rendered(roles, None, place) != full:
                            return True
                    except TemplateRefused:
                        continue
        return False


def after_empty(previous: str, role: str) -> str:
    """What is remembered as the role before, after an empty message that leaves no trace."""
    return f"{previous} -{role}"


def date_formats(source: str) -> list[str]:
    """The date formats of a Jinja that Go can write too: those of year, month and day, the longest first."""
    found = set(re.findall(r"""strftime_now\(\s*['"]([^'"]*)['"]""", source)) | {"%Y-%m-%d"}
    return sorted((form for form in found if not re.sub(r"%[YmdbB]", "", form).count("%")), key=lambda f: (-len(f), f))


def grow(seen: Sequence[Observation]) -> Tree:
    """The smallest decision tree that explains every observation.

    Raises:
        NotDerivable: two observations with the same facts differ.
    """
    facts = list(seen[0].facts)
    # Most were seen many times, and each order of the facts goes through all of them.
    seen = list({(*observation.facts.values(), observation.piece): observation for observation in seen}.values())
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
