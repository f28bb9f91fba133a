"""A run's page as a browser's parser sees it: its elements, its texts, and its tables by their headings."""

import base64
import json
from html.parser import HTMLParser
from pathlib import Path


class Page(HTMLParser):
    """A page that was read.

    Attributes:
        elements: every tag with its attributes, in order; comments and declarations as "!".
        texts: what stands between tags, character references resolved.
        tables: heading -> rows -> the text of each cell.
    """

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, tuple[tuple[str, str | None], ...]]] = []
        self.texts: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self._heading = ""
        self._inside = ""
        self.feed(text)
        self.close()

    @classmethod
    def of(cls, path: Path) -> "Page":
        return cls(path.read_text(encoding="utf-8"))

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def shows_the_proof(self, run: Path) -> None:
        """Every check of a run's verify.json has its row, in its order."""
        proof = json.loads((run / "verify" / "verify.json").read_text(encoding="utf-8"))
        assert [row[:3] for row in self.tables["Proof"][1:]] == [
            [check["verdict"], check["stage"], f"{check['sentence']} {check['id']}{check['words']}"]
            for check in proof["checks"]
        ]

    def pictures(self) -> list[str]:
        """The SVG documents of its images, each of which must hold all of its picture."""
        found = []
        for tag, attributes in self.elements:
            if tag == "img":
                kind, _, data = (dict(attributes)["src"] or "").partition(",")
                assert kind == "data:image/svg+xml;base64"
                found.append(base64.b64decode(data, validate=True).decode())
        return found

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, tuple(attrs)))
        if tag == "h2":
            self._heading = ""
        elif tag == "tr":
            self.tables.setdefault(self._heading, []).append([])
        elif tag in ("td", "th"):
            self.tables[self._heading][-1].append("")
        if tag in ("h2", "td", "th"):
            self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        if tag == self._inside:
            self._inside = ""

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self._inside == "h2":
            self._heading += data
        elif self._inside:
            self.tables[self._heading][-1][-1] += data

    def handle_comment(self, data: str) -> None:
        self.elements.append(("!", ((data, None),)))

    def handle_decl(self, decl: str) -> None:
        self.handle_comment(decl)

    def unknown_decl(self, data: str) -> None:
        self.handle_comment(data)

    def handle_pi(self, data: str) -> None:
        self.handle_comment(data)
