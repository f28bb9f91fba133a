"""How a model's conversations are to be rendered in Ollama: `go`, `native`, or not at all.

go: a derived TEMPLATE is exact on the whole suite, and Ollama really uses it.
native: no TEMPLATE; Ollama has llama.cpp render the Jinja that the GGUF carries, which is exact.
Neither: refused, with the first difference. Nothing is served that differs without being said.

Both are judged by running the real servers on a scratch model (`pipeline.ollama.scratch_model`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from pipeline.config import TEMPLATE_WAYS
from pipeline.errors import PipelineError, UserError
from pipeline.llamacpp.llama_server import LlamaServer, Refused
from pipeline.ollama.client import Client
from pipeline.ollama.llamacpp_rendering import Carried, ask_llama_server, carried_template
from pipeline.ollama.ollama_server import OllamaServer, find_ollama
from pipeline.ollama.scratch_model import write_scratch_model
from pipeline.prompt.cases import Case, conversations
from pipeline.prompt.conformance import (
    DROPPED,
    JOINED,
    NOT_SAID,
    REORDERED,
    UNREASONED,
    UNTRIMMED,
    Outcome,
    Report,
    for_ollama,
    judge,
    readable_difference,
)
from pipeline.prompt.go_template import Derivation, derive
from pipeline.prompt.guard import guarded
from pipeline.prompt.template import ChatTemplate
from pipeline.setup.ollama_version import MINIMUM_OLLAMA


@dataclass(frozen=True)
class Choice:
    """What was chosen, and why.

    Attributes:
        way: "go", "native" or "refused".
        go_template: the TEMPLATE for "go", else None.
        jinja: the guarded Jinja for "native", else None.
        requires: oldest Ollama that can serve it this way, or None.
        reason: one sentence.
        derivation: what came of deriving a Go template.
        reports: the suite's results for each way that was tried.
        warnings: what a user should know of it.
    """

    way: str
    reason: str
    go_template: str | None = None
    jinja: str | None = None
    requires: str | None = None
    derivation: Derivation | None = None
    reports: Mapping[str, Report] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


class Engine:
    """Real servers that render: an Ollama of our own, or, where there is none, llama-server for the native way alone.

    Args:
        server: an Ollama to use; default: one is started, if there is one.
    """

    def __init__(self, server: OllamaServer | None = None) -> None:
        self._server = server
        self._stack = ExitStack()
        self._client: Client | None = None

    def __enter__(self) -> Engine:
        with ExitStack() as stack:
            self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pipeline-template-")))
            if self._server is None and find_ollama() is not None:
                self._server = stack.enter_context(OllamaServer(self._folder / "models"))
            if self._server is not None:
                self._client = stack.enter_context(Client(self._server.host))
                self._make("scratch-go:latest", None)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def has_go(self) -> bool:
        """Whether Go templates can be run."""
        return self._client is not None

    def _make(self, name: str, template: ChatTemplate | None) -> None:
        assert self._client is not None
        path = write_scratch_model(self._folder / "scratch.gguf", template)
        digest = self._client.upload(path)
        body = {"files": {"scratch.gguf": digest}, "parameters": {"num_ctx": 512, "num_thread": 1}}
        self._client.create(name, body)

    def judge_go(self, template: ChatTemplate, go_template: str, suite: Sequence[Case]) -> Report:
        """Run a Go template on the suite, by itself (whether Ollama would use it is another question).

        Raises:
            UserError: Go cannot parse it.
        """
        client = self._client
        assert client is not None, "there is no Go engine"
        name, base = "scratch-go-template:latest", "scratch-go:latest"
        if template.architecture == "qwen3":
            base = "scratch-qwen3:latest"
            self._make(base, template.with_source(""))
        try:
            client.create(name, {"from": base, "template": go_template})
        except PipelineError as error:
            if "template" not in str(error):  # a full disk, a server that has ended
                raise
            raise UserError(f"the Go template is not valid: {error}") from None
        try:
            return judge(template, suite, lambda case: self._ask(name, case), joins=True)
        finally:
            client.delete(name)

    def judge_native(self, template: ChatTemplate, jinja: str, suite: Sequence[Case]) -> Report:
        """Have the servers render the Jinja itself, guarded as it will be shipped.

        Args:
            template: what was trained.
            jinja: what is shipped.

        Raises:
            Refused: llama.cpp cannot load the template.
        """
        shipped = template.with_source(jinja)
        if self._client is None:
            path = write_scratch_model(self._folder / "scratch.gguf", shipped)
            with LlamaServer(path, context=512) as server:
                return judge(template, suite, lambda case: ask_llama_server(server, shipped, case), joins=False)
        name = "scratch-native:latest"
        self._make(name, shipped)
        try:
            if self._client.show(name)["template"] != shipped.source:
                raise Refused("Ollama took the guarded chat template for a stock one")
            try:
                self._client.load(name)
            except PipelineError as error:
                if "exit status" in str(error):  # so its llama-server ends where it cannot read the template
                    raise Refused(str(error)) from None
                raise
            return judge(template, suite, lambda case: self._ask(name, case), joins=False)
        finally:
            self._client.unload(name)
            self._client.delete(name)

    def uses_go(self, template: ChatTemplate, go_template: str) -> bool:
        """Whether Ollama renders with this TEMPLATE when the GGUF carries this Jinja: it shows the one in force.

        Args:
            template: the one that the GGUF carries.
            go_template: the TEMPLATE.
        """
        client = self._client
        assert client is not None, "there is no Go engine"
        name = "scratch-both:latest"
        self._make(name, template)
        client.create(name, {"from": name, "template": go_template})
        try:
            return bool(client.show(name)["template"] == go_template)
        finally:
            client.delete(name)

    def _ask(self, name: str, conversation: Case) -> str:
        assert self._client is not None
        return self._client.render(name, for_ollama(conversation.messages), conversation.tools, conversation.think)


def choose(
    template: ChatTemplate, way: str = "auto", engine: Engine | None = None, carried: Carried | None = None
) -> Choice:
    """Choose how Ollama is to render this model's conversations.

    Args:
        template: the model's own.
        way: "auto", "go", "native", or the path of a Go template.
        engine: running servers; default: started and stopped here.
        carried: what the GGUF file carries; default: it is found out here.

    Raises:
        UserError: a way was forced that is not possible.
    """
    if engine is None:
        with Engine() as own:
            return choose(template, way, own, carried)
    carried = carried or carried_template(template)
    suite = conversations(template.special_tokens)
    if way not in TEMPLATE_WAYS:
        return _from_file(template, Path(way), engine, suite, carried)

    reports: dict[str, Report] = {}
    derivation = None
    reasons = []
    if way != "native":
        derivation, reason = _try_go(template, engine, suite, reports, carried)
        if not reason:
            assert derivation is not None
            words = f"a derived TEMPLATE is exact ({reports['go'].summary})"
            return Choice(
                "go",
                words,
                derivation.template,
                derivation=derivation,
                reports=reports,
                warnings=_warnings(template, reports["go"], carried),
            )
        reasons.append(f"go: {reason}")
    if way != "go":
        jinja, reason = _try_native(template, engine, suite, reports, carried)
        if not reason:
            reasons.append(f"llama.cpp renders the Jinja exactly ({reports['native'].summary})")
            why, warnings = "; ".join(reasons), _warnings(template, reports["native"], carried)
            return Choice("native", why, None, jinja, MINIMUM_OLLAMA, derivation, reports, warnings)
        reasons.append(f"native: {reason}")
    return Choice("refused", "; ".join(reasons), derivation=derivation, reports=reports)


_WARNINGS = {
    JOINED: "Ollama joins neighbouring messages of one role, with a blank line between, before a TEMPLATE sees them",
    UNTRIMMED: "the Jinja trims white space such as U+00A0 and U+3000 around a message, llama.cpp leaves it",
    DROPPED: "Ollama takes the thinking out of every Qwen3's earlier answers, which the template keeps",
    UNREASONED: "the template writes the reasoning that stands beside an earlier answer, which is not served: train "
    "without it, or with it inside the content",
    NOT_SAID: "a request to think is served as one that does not say, which is what was trained",
    REORDERED: "Ollama reorders the keys of tools; train with tools in the order type, function (name, description, "
    "parameters (type, required, properties))",
}


# What Ollama has code of its own for, whatever template there is (its server/create.go, server/routes.go).
_OWN_CODE = ("gemma4", "laguna", "nemotron_h", "gpt_oss", "gpt-oss")


def _warnings(template: ChatTemplate, report: Report, carried: Carried) -> tuple[str, ...]:
    """What a user should know of an exact way."""
    warnings = tuple(words for status, words in _WARNINGS.items() if report.counts[status])
    warnings += (carried.left_out,) if carried.left_out else ()
    if template.architecture.startswith(_OWN_CODE):
        own = f"Ollama has code of its own for prompts of {template.architecture}: only `deploy` can prove them"
        return (*warnings, own)
    return warnings


def _try_go(
    template: ChatTemplate, engine: Engine, suite: Sequence[Case], reports: dict[str, Report], carried: Carried
) -> tuple[Derivation, str]:
    """Derive and judge; the second value says why it cannot be used, "" if it can."""
    derivation = derive(template)
    if derivation.template is None:
        return derivation, derivation.reason
    if not engine.has_go:
        return derivation, "there is no Ollama here to prove the derived TEMPLATE"
    reports["go"] = report = engine.judge_go(template, derivation.template, suite)
    judgement = "exact" if report.exact else f"not exact ({report.summary})"
    if not engine.uses_go(template.with_source(carried.jinja), derivation.template):
        return derivation, f"{judgement}, but Ollama ignores a TEMPLATE where the Jinja can do more (tools, thinking)"
    return derivation, "" if report.exact else f"the derived TEMPLATE is {judgement}"


def _try_native(
    template: ChatTemplate, engine: Engine, suite: Sequence[Case], reports: dict[str, Report], carried: Carried
) -> tuple[str, str]:
    """Guard and judge; the first value is the guarded Jinja, the second says why it cannot be used, "" if it can."""
    jinja = guarded(carried.jinja)
    try:
        reports["native"] = report = engine.judge_native(template, jinja, suite)
        if report.thinking_switched_on:
            jinja = guarded(carried.jinja, thinking_not_said=True)
            reports["native"] = report = engine.judge_native(template, jinja, suite)
    except Refused as error:
        return jinja, f"llama.cpp cannot use the template: {error}"
    return jinja, "" if report.exact else f"llama.cpp renders it differently ({report.summary})"


def _from_file(template: ChatTemplate, path: Path, engine: Engine, suite: Sequence[Case], carried: Carried) -> Choice:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"ollama.template = {str(path)!r}: {error}; give auto, go, native, or the path of a Go template"
        ) from None
    if not text.strip():
        raise UserError(f"{path}: the template is empty")
    if not engine.has_go:
        raise UserError(f"{path}: there is no Ollama here to prove a TEMPLATE with: run `pipeline setup`")
    report = engine.judge_go(template, text, suite)
    if not engine.uses_go(template.with_source(carried.jinja), text):
        raise UserError(
            f"{path}: Ollama would ignore this TEMPLATE, because the model's own Jinja can do more (tools, thinking); "
            "use ollama.template = 'native'"
        )
    if not report.exact:
        return Choice("refused", f"{path} does not send what was trained ({report.summary})", reports={"go": report})
    warnings = _warnings(template, report, carried)
    return Choice("go", f"given by {path} ({report.summary})", text, reports={"go": report}, warnings=warnings)


def explain(outcome: Outcome) -> str:
    """A difference for a person to read."""
    if outcome.words:
        return f"conversation {outcome.name!r}: the server says: {outcome.words}"
    return (
        f"conversation {outcome.name!r}: - is what was trained, + is what would be sent\n"
        f"{readable_difference(outcome.expected, outcome.served)}"
    )


REMEDY = (
    "What can be done: write a Go template and name it in [ollama] template; or correct the Jinja of the base and "
    "train again; or serve the GGUF with llama-server."
)


def refusal(choice: Choice) -> UserError:
    """The error for a template that cannot be served exactly."""
    lines = [f"the chat template cannot be served exactly: {choice.reason}"]
    for way, report in choice.reports.items():
        outcome = report.first_difference()
        if outcome is not None:
            lines.append(f"{way}: {explain(outcome)}")
    return UserError("\n".join([*lines, REMEDY]))
