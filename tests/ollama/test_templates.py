"""Chat templates that llama.cpp ships, tried for real: none is served differently without saying so.

Tried are those of the families that people fine-tune most, and those with which something is amiss; all of them with
`pytest --all-templates`.
"""

import json
from functools import cache
from pathlib import Path

import pytest
from support import servers, small_models

from pipeline.errors import UserError
from pipeline.llamacpp.gguf_template import write_with_template
from pipeline.llamacpp.llama_server import LlamaServer
from pipeline.llamacpp.programs import source_tree
from pipeline.ollama.llamacpp_rendering import ask_llama_server, carried_template
from pipeline.ollama.rendering import Choice, Engine, choose, refusal
from pipeline.ollama.scratch_model import write_scratch_model
from pipeline.prompt.cases import CONVERSATIONS
from pipeline.prompt.conformance import (
    DIFFERS,
    DROPPED,
    EXACT,
    HARMLESS,
    NOT_SERVED,
    THINKING,
    TRIMMED,
    judge,
)
from pipeline.prompt.go_template import derive
from pipeline.prompt.guard import guarded
from pipeline.prompt.message_text import WHITE_SPACE, Ends, Handling, learn
from pipeline.prompt.template import ChatTemplate, TemplateRefused

# What no way carries, and why it is refused. All others are served exactly.
REFUSED = {"fireworks-ai-llama-3-firefunction-v2": "the template wants a variable `functions`"}
# What llama.cpp renders otherwise: its file carries a template of plain conversations, and tools are left out.
PLAIN = {
    "StepFun3.5-Flash": "llama.cpp trims every message for this template",
    "google-gemma-4-31B-it-interleaved": "llama.cpp has Gemma 4's tools rendered by its own code",
    "meetkai-functionary-medium-v3.1": "the template escapes JSON as HTML, llama.cpp does not",
}
NEED_TOOLS = {
    "CohereForAI-c4ai-command-r-plus-tool_use",
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use",
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use",
}
FAMILIES = (
    *(
        "meta-llama-Llama-3.1",
        "meta-llama-Llama-3.2",
        "Qwen-Qwen",
        "google-gemma-2",
        "microsoft",
        "mistralai",
        "openai",
    ),
    *("HuggingFaceTB", "ibm-granite-granite-3", "deepseek-ai-DeepSeek-R1-Distill-Llama"),
)


def templates() -> dict[str, Path]:
    return {path.stem: path for path in sorted((source_tree() / "models" / "templates").glob("*.jinja"))}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "shipped" in metafunc.fixturenames:
        metafunc.parametrize("shipped", tried(metafunc.config))


def tried(config: pytest.Config) -> list[str]:
    every = config.getoption("--all-templates")
    special = {*REFUSED, *PLAIN, *NEED_TOOLS}
    return [name for name in templates() if every or name.startswith(FAMILIES) or name in special]


@cache
def chosen(name: str) -> Choice:
    return choose(ChatTemplate.from_file(templates()[name]), "auto", servers.engine())


def test_it_is_served_exactly_or_refused_with_the_reason(shipped: str) -> None:
    choice = chosen(shipped)
    assert (choice.way == "refused") == (shipped in REFUSED), choice.reason
    if choice.way == "refused":
        assert choice.go_template is None
        message = str(refusal(choice))
        assert "native: " in message
        assert "+ is what would be sent" in message or "every plain conversation" in message
        return
    report = choice.reports[choice.way]
    assert {outcome.status for outcome in report.outcomes} <= set(HARMLESS)
    assert [outcome.name for outcome in report.outcomes] == [case.name for case in CONVERSATIONS]
    named = report.counts.keys() - {EXACT, "template refuses", "server refuses"}
    # What is not exact byte for byte is said, and what is left out.
    assert len(choice.warnings) == len(named) + (shipped in PLAIN)
    assert any("tools are left out" in words for words in choice.warnings) == (shipped in PLAIN)
    assert (choice.way == "go") == (choice.go_template is not None)
    assert (choice.way == "native") == (choice.jinja is not None) == (choice.requires is not None)


def chats_exactly(choice: Choice) -> bool:
    """Whether the derived TEMPLATE is exact but for what tools say, where Ollama would not use it anyway."""
    with_tools = {case.name for case in CONVERSATIONS if case.uses_tools}
    unlike = {case.name for case in choice.reports["go"].outcomes if case.status not in HARMLESS}
    return not unlike or (unlike <= with_tools and "Ollama ignores a TEMPLATE" in choice.reason)


def test_the_table(request: pytest.FixtureRequest) -> None:
    choices = {name: chosen(name) for name in tried(request.config)}
    derived = [name for name, choice in choices.items() if "go" in choice.reports and chats_exactly(choice)]
    for name, choice in choices.items():
        print(f"{name:50} {choice.way:8} {'derived exactly' if name in derived else '':16} {choice.reason}")
    assert len(choices) >= 19
    assert len(derived) >= 0.7 * len(choices)


def test_llama_cpp_renders_it_exactly_or_the_difference_is_named(shipped: str) -> None:
    """The native way of each, where a TEMPLATE is preferred too."""
    choice = chosen(shipped)
    if "native" not in choice.reports:
        choice = choose(ChatTemplate.from_file(templates()[shipped]), "native", servers.engine())
    report = choice.reports["native"]
    assert [outcome.name for outcome in report.outcomes] == [case.name for case in CONVERSATIONS]
    assert report.exact == (shipped not in REFUSED)
    unnamed = {outcome.name for outcome in report.outcomes if outcome.status not in (*HARMLESS, TRIMMED)}
    assert not unnamed


def test_templates_that_need_tools_are_known_by_it(request: pytest.FixtureRequest) -> None:
    names = tried(request.config)
    assert {name for name in names if "the template needs tools" in chosen(name).reason} == NEED_TOOLS


@pytest.mark.parametrize("name", ["Qwen-Qwen3-0.6B", "google-gemma-2-2b-it", "ibm-granite-granite-3.3-2B-Instruct"])
def test_llama_server_itself_renders_as_ollama_says(name: str, tmp_path: Path) -> None:
    template = ChatTemplate.from_file(templates()[name])
    shipped = template.with_source(guarded(template.source))
    path = write_scratch_model(tmp_path / "scratch.gguf", shipped)
    with LlamaServer(path, context=512) as server:
        report = judge(template, CONVERSATIONS, lambda case: ask_llama_server(server, shipped, case), joins=False)
    assert report.exact, report.summary
    ollama = servers.engine().judge_native(template, shipped.source, CONVERSATIONS)
    assert report.counts[EXACT] >= ollama.counts[EXACT]


def test_without_ollama_the_native_way_is_proven_by_llama_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.ollama.rendering.find_ollama", lambda: None)
    template = ChatTemplate.from_file(templates()["microsoft-Phi-3.5-mini-instruct"])
    with Engine() as engine:
        assert not engine.has_go
        choice = choose(template, "auto", engine)
    assert choice.way == "native", choice.reason
    assert "there is no Ollama here" in choice.reason


# What derivation has to get right, each by a template that does it.

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
LLAMA2 = (
    "{% set s = '' %}{% if messages[0].role == 'system' %}"
    "{% set s = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token }}[INST] {{ s if loop.first else '' }}{{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
LOOP = "{% for m in messages %}"
END = "{% endfor %}A:"
TURN = "{{ m.role }}:{{ m.content }};"
SYSTEMS = "{% for m in messages if m.role == 'system' %}"
OTHERS = "{% for m in messages if m.role != 'system' %}"
DERIVABLE = {
    "ChatML": CHATML,
    "a default system text": "{% if messages[0].role != 'system' %}<|s|>Be good.<|e|>{% endif %}" + CHATML,
    "a system message folded into the first turn": LLAMA2,
    "a first turn that differs": LOOP + "{{ '[FIRST]' if loop.first else '[NEXT]' }}" + TURN + END,
    "a last turn that differs": LOOP + "{% if loop.last %}[LAST]{% endif %}" + TURN + END,
    "an assistant's turn without a name": LOOP + "{{ 'U:' if m.role == 'user' else '' }}{{ m.content }}\n" + END,
    "BOS by the template": "{{ bos_token }}" + CHATML,
    "BOS in every turn": LOOP + "{{ bos_token }}" + TURN + "{{ eos_token }}" + END,
    "trimmed messages": CHATML.replace("m.content", "m.content | trim"),
    "messages trimmed on the left": CHATML.replace("m.content", "m.content.lstrip()"),
    "line breaks stripped": CHATML.replace("m.content", "m.content.strip('\\n')"),
    "thinking dropped": CHATML.replace("m.content", "m.content.split('</think>')[-1]"),
    "thinking dropped, then trimmed": CHATML.replace("m.content", "m.content.split('</think>')[-1] | trim"),
    "thinking up to the first end dropped": CHATML.replace(
        "m.content", "(m.content.split('</think>', 1)[1] if '</think>' in m.content else m.content)"
    ),
    "system messages left out": OTHERS + TURN + END,
    "system texts at the end": OTHERS + TURN + "{% endfor %}S:" + SYSTEMS
    + "{{ m.content }}{{ '\n\n' if not loop.last }}" + END,
    "the last system text in front": "{% set ns = namespace(s='') %}" + SYSTEMS
    + "{% set ns.s = m.content %}{% endfor %}[{{ ns.s }}]" + OTHERS + TURN + END,
    "an empty system message is none": LOOP.replace(" %}", " if m.content or m.role != 'system' %}") + TURN + END,
    "an empty answer is left out": LOOP.replace(" %}", " if m.content or m.role != 'assistant' %}") + TURN + END,
    "today's date as ISO": "{{ strftime_now('%Y-%m-%d') }}" + CHATML,
    "today's date in words": "{{ strftime_now('%B %d, %Y') }}, {{ strftime_now('%d %b %Y') }}." + CHATML,
    "Go's own syntax": "{{ '{{ .System }}' }}{{ '{' }}{{ '{{- end }}' }}" + CHATML.replace("<|", "{{ '{{<' }}"),
    "three quotes and characters that a Modelfile drops": "{{ '\"\"\"\u00a0\u3000\u200d\x07' }}" + CHATML,
    "backslashes and quotes": "{{ '\\\\n \"x\" `y`' }}" + CHATML,
    "white space at both ends": "\n  \n" + CHATML + "  \n\n ",
    "a generation prompt without thinking": CHATML
    + "{% if enable_thinking is defined and not enable_thinking %}[no]{% endif %}",
}  # fmt: skip


@pytest.mark.parametrize("case", DERIVABLE)
def test_derived_exactly(case: str) -> None:
    template = ChatTemplate(DERIVABLE[case], "<s>", "</s>")
    derivation = derive(template)
    assert derivation.template is not None, derivation.reason
    report = servers.engine().judge_go(template, derivation.template, CONVERSATIONS)
    assert report.exact, report.summary
    assert report.counts[EXACT] > 20


@pytest.mark.parametrize("case", DERIVABLE)
def test_a_derived_template_survives_a_modelfile(case: str) -> None:
    from pipeline.ollama.modelfile_text import ServedModel, read_modelfile

    text = derive(ChatTemplate(DERIVABLE[case], "<s>", "</s>")).template
    assert text is not None
    assert ("template", text) in read_modelfile(ServedModel("m.gguf", text).modelfile())


NOT_DERIVABLE = {
    "the time of day": ("{{ strftime_now('%H:%M:%S') }}" + CHATML, "date or the time"),
    "the day of the week": ("{{ strftime_now('%A') }}" + CHATML, "date or the time"),
    "messages backwards": ("{% for m in messages | reverse %}{{ m.content }};{% endfor %}", "order"),
    "messages twice": ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "twice"),
    "numbered turns": ("{% for m in messages %}{{ loop.index }}{{ m.content }}{% endfor %}", "depends on more"),
    "tools wanted": ("{% if not tools %}{{ raise_exception('no') }}{% endif %}" + CHATML, "the template needs tools"),
    "nothing taken": ("{{ raise_exception('never') }}", "refuses every plain conversation: never"),
}


@pytest.mark.parametrize("case", NOT_DERIVABLE)
def test_not_derivable_and_the_reason_is_told(case: str) -> None:
    source, words = NOT_DERIVABLE[case]
    derivation = derive(ChatTemplate(source, "<s>", "</s>"))
    assert derivation.template is None
    assert words in derivation.reason


@pytest.mark.parametrize(
    ("what", "source"),
    [
        ("upper case", CHATML.replace("m.content", "m.content | upper")),
        ("a text replaced", CHATML.replace("m.content", "m.content | replace('Four', '4')")),
        ("a word in a message changes the rest", "{{ '[long]' if messages[-1].content | length > 1000 }}" + CHATML),
        ("the number of turns counts", CHATML + "{{ '!' if messages | length > 20 }}"),
    ],
)
def test_what_probing_cannot_see_is_seen_by_the_suite(what: str, source: str) -> None:
    template = ChatTemplate(source, "<s>", "</s>")
    choice = choose(template, "go", servers.engine())
    assert choice.way == "refused", what
    if "go" in choice.reports:
        assert choice.reports["go"].first_difference() is not None


UNREAD = "{% set ignored = messages | selectattr('content', 'no_such_test') %}"  # Jinja2 never runs it


@pytest.mark.parametrize(("given", "way"), [("auto", "go"), ("native", "native")])
def test_a_template_that_llama_cpp_cannot_read_is_written_anew(given: str, way: str) -> None:
    """For plain conversations; what tools say is refused, and not left out of a prompt in silence."""
    tools = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML.replace("m.content", "(m.tool_calls or m.content)")
    template = ChatTemplate(UNREAD + tools, "<s>", "</s>")
    carried = carried_template(template)
    assert "selectattr: unknown test" in carried.left_out
    assert "tools are left out" in carried.left_out
    choice = choose(template, given, servers.engine())
    assert choice.way == way, choice.reason
    assert choice.jinja == (guarded(carried.jinja) if way == "native" else None)
    assert carried.left_out in choice.warnings
    report = choice.reports[way]
    assert report.counts[EXACT] > 50
    refused = {outcome.name for outcome in report.outcomes if outcome.status == NOT_SERVED}
    assert refused >= {case.name for case in CONVERSATIONS if case.tools or (case.uses_tools and way == "native")}


@pytest.mark.parametrize(
    "case",
    [
        *("a system message folded into the first turn", "a last turn that differs", "thinking dropped, then trimmed"),
        *("line breaks stripped", "system texts at the end", "the last system text in front", "backslashes and quotes"),
        *("an empty system message is none", "today's date in words", "a generation prompt without thinking"),
    ],
)
def test_what_is_written_anew_is_exact_in_llama_cpp(case: str) -> None:
    template = ChatTemplate(UNREAD + DERIVABLE[case], "<s>", "</s>")
    assert "selectattr: unknown test" in carried_template(template).left_out


def test_one_that_cannot_be_written_anew_is_told_in_llama_cpps_words() -> None:
    """Its llama-server does not start: no prompt differs, none is made."""
    counts = "{{ messages | length }}" + CHATML
    choice = choose(ChatTemplate(UNREAD + counts, "<s>", "</s>"), "native", servers.engine())
    assert choice.way == "refused"
    assert "native" not in choice.reports
    for told in (choice.reason, str(refusal(choice))):
        assert "llama.cpp cannot use the template" in told
        assert "Unable to generate parser for this template" in told
        assert "selectattr: unknown test" in told
        assert "differs" not in told


def test_a_date_is_named_where_it_is_why_go_cannot() -> None:
    choice = choose(ChatTemplate("{{ strftime_now('%A') }}" + CHATML), "auto", servers.engine())
    assert choice.way == "native"
    assert "go: it writes the date or the time" in choice.reason


# What a difference is called.

TRIMS = CHATML.replace("m.content", "m.content | trim")


@pytest.mark.parametrize(("trained", "served"), [(TRIMS, CHATML), (CHATML, TRIMS)])
def test_trimming_is_called_so(trained: str, served: str) -> None:
    go = derive(ChatTemplate(served)).template
    assert go is not None
    report = servers.engine().judge_go(ChatTemplate(trained), go, CONVERSATIONS)
    assert {outcome.status for outcome in report.outcomes} <= {*HARMLESS, TRIMMED}
    assert report.counts[TRIMMED] > 5
    assert not report.exact


@pytest.mark.parametrize("trained", [CHATML, TRIMS])
@pytest.mark.parametrize("more", ["\n", " "])
def test_other_white_space_is_not_called_trimming(trained: str, more: str) -> None:
    go = derive(ChatTemplate(trained)).template
    assert go is not None
    report = servers.engine().judge_go(ChatTemplate(trained), go + more, CONVERSATIONS)
    assert {outcome.status for outcome in report.outcomes} == {DIFFERS, NOT_SERVED}


def test_only_what_ollama_itself_does_not_support_is_harmless() -> None:
    """A template may use the same words; and a refusal has to be of what was asked for."""
    asked = "{% if tools or messages[0].role == 'system' %}"
    refuses = asked + "{{ raise_exception('m does not support tools') }}{% endif %}"
    suite = [case for case in CONVERSATIONS if case.tools or case.think or case.name.startswith("1 turn")]
    report = servers.engine().judge_native(ChatTemplate(CHATML), guarded(refuses + CHATML), suite)
    statuses = {outcome.name: outcome.status for outcome in report.outcomes}
    assert statuses.pop("1 turn") == EXACT
    assert statuses.pop("thinking on") == NOT_SERVED
    assert set(statuses.values()) == {DIFFERS}
    assert any("does not support tools" in outcome.words for outcome in report.outcomes)
    plain = servers.engine().judge_native(ChatTemplate(CHATML), guarded(CHATML), suite)
    assert {outcome.name for outcome in plain.outcomes if outcome.status == NOT_SERVED} == {
        case.name for case in suite if case.tools or case.think
    }


@pytest.mark.parametrize("way", ["go", "native"])
def test_thinking_that_ollama_drops_for_qwen3_is_named(way: str) -> None:
    """It does so by the architecture's name, before any template."""
    for architecture, expected in (("qwen3", 2), ("qwen3moe", 0), ("", 0)):
        choice = choose(ChatTemplate(CHATML, architecture=architecture), way, servers.engine())
        assert choice.way == way, choice.reason
        assert choice.reports[way].counts[DROPPED] == expected
        assert any("Qwen3" in warning for warning in choice.warnings) == bool(expected)


def test_code_of_ollamas_own_is_warned_of() -> None:
    choice = choose(ChatTemplate(CHATML, architecture="nemotron_h_moe"), "auto", servers.engine())
    assert any("only `deploy` can prove" in warning for warning in choice.warnings)


@pytest.mark.parametrize("adds_bos", [True, False])
def test_exactly_one_bos(adds_bos: bool) -> None:
    template = ChatTemplate("{{ bos_token }}" + CHATML, "<s>", "</s>", adds_bos)
    for way in ("go", "native"):
        choice = choose(template, way, servers.engine())
        assert choice.way == way, choice.reason
    derived = derive(template).template
    assert derived is not None
    assert ("<s>" in derived) != adds_bos


# The ways.


def test_a_template_is_ignored_where_the_jinja_can_do_more() -> None:
    tools = (
        CHATML + "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m.tool_calls }}{% endfor %}"
    )
    template = ChatTemplate(tools.replace("{{ m.tool_calls }}", ""), "<s>", "</s>")
    choice = choose(template, "go", servers.engine())
    assert choice.way == "refused"
    assert "ignores a TEMPLATE" in choice.reason


@pytest.mark.parametrize("path", ["/not/there", "missing.gotmpl"])
def test_a_template_file_that_is_not_there(path: str) -> None:
    with pytest.raises(UserError, match=r"ollama\.template"):
        choose(ChatTemplate(CHATML), path, servers.engine())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"  \n", "is empty"),
        (b"\xff\xfe\x00", "ollama.template"),
        (b"{{ range .Messages }}{{ .Content }}", "not valid"),
        (b"{{ .Messages | nosuchfunction }}", "not valid"),
        (b'{{ template "nothing" . }}', "refused"),
    ],
)
def test_hostile_template_files(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "my.gotmpl"
    path.write_bytes(content)
    if words == "refused":
        assert choose(ChatTemplate(CHATML), str(path), servers.engine()).way == "refused"
    else:
        with pytest.raises(UserError, match=words):
            choose(ChatTemplate(CHATML), str(path), servers.engine())


def test_a_users_own_template_is_taken_if_it_is_exact_and_refused_if_not(tmp_path: Path) -> None:
    template = ChatTemplate(CHATML)
    text = derive(template).template
    assert text is not None
    path = tmp_path / "my.gotmpl"
    path.write_text(text)
    assert choose(template, str(path), servers.engine()).go_template == text
    path.write_text(text.replace("<|im_end|>", "<|im_stop|>"))
    choice = choose(template, str(path), servers.engine())
    assert choice.way == "refused"
    assert choice.reports["go"].counts[DIFFERS] > 0
    assert "my.gotmpl" in str(refusal(choice))


# The guard.


@pytest.mark.parametrize("mentioned", [False, True])
@pytest.mark.parametrize("start", ["", "\n", "\n\n", "  ", "\t\n ", "{%- set x = 1 %}\n", "<s>", " x"])
def test_a_guard_renders_to_nothing(start: str, mentioned: bool) -> None:
    source = start + CHATML
    source = "{# date_string clear_thinking #}" * mentioned + source
    template = ChatTemplate(source, "<s>", "</s>")
    shipped = guarded(source, thinking_not_said=True)
    assert shipped.endswith(source)
    for case in CONVERSATIONS:
        assert template.with_source(shipped).render(case.messages) == template.render(case.messages)
    assert (len(shipped.encode()) - len(source.encode())) % 512 == 0
    assert guarded(shipped) == shipped


def test_a_stock_template_is_what_ollama_would_install_without_it(tmp_path: Path) -> None:
    """The trap that the guard is for, seen: it is no longer needed if this fails."""
    from pipeline.ollama.client import Client

    client: Client = servers.client()
    template = ChatTemplate.from_file(templates()["google-gemma-2-2b-it"])
    for name, source in (("bare:latest", template.source), ("kept:latest", guarded(template.source))):
        path = write_scratch_model(tmp_path / "scratch.gguf", template.with_source(source))
        client.create(name, {"files": {"scratch.gguf": client.upload(path)}})
    assert "{{" in client.show("bare:latest")["template"]
    assert client.show("bare:latest")["template"] != template.source
    assert client.show("kept:latest")["template"] == guarded(template.source)


def test_a_guarded_file_differs_in_nothing_else(tmp_path: Path) -> None:
    from pipeline.llamacpp.gguf_file import check, inspect

    source = write_scratch_model(tmp_path / "a.gguf", ChatTemplate(CHATML))
    write_with_template(source, tmp_path / "b.gguf", guarded(CHATML))
    before, after = inspect(source), check(tmp_path / "b.gguf")
    assert after.metadata.pop("tokenizer.chat_template") == guarded(before.metadata.pop("tokenizer.chat_template"))
    assert after.metadata == before.metadata
    for old, new in zip(before.tensors, after.tensors, strict=True):
        assert (old.name, old.shape, old.type) == (new.name, new.shape, new.type)
        assert bytes(before.data(old)) == bytes(after.data(new))


def test_thinking_that_ollama_switches_on_is_seen_and_undone() -> None:
    source = CHATML + "{% if enable_thinking %}<think>{% else %}<think></think>{% endif %}"
    template = ChatTemplate(source, "<s>", "</s>")
    bare = servers.engine().judge_native(template, guarded(source), CONVERSATIONS)
    assert bare.counts[THINKING] > 40
    choice = choose(template, "native", servers.engine())
    assert choice.way == "native", choice.reason
    assert choice.reports["native"].counts[EXACT] > 50
    assert any("think" in warning for warning in choice.warnings)


# What happens to a text.


@pytest.mark.parametrize(
    ("expression", "handling"),
    [
        ("t", Handling()),
        ("t | trim", Handling(Ends(WHITE_SPACE, WHITE_SPACE))),
        ("t.rstrip()", Handling(Ends("", WHITE_SPACE))),
        ("t.strip('\n')", Handling(Ends("\n", "\n"))),
        ("t.split('</think>')[-1]", Handling(separator="</think>")),
        ("t.split('</think>', 1)[-1]", Handling(separator="</think>", first=True)),
        ("t.split('[X]')[-1].lstrip('\n')", Handling(Ends("\n", ""), "[X]", after=Ends("\n", ""))),
        ("t.split('</think>')[1] if '</think>' in t else t", Handling(separator="</think>", between=True)),
        (
            "t.split('<think>')[0] ~ t.split('</think>')[-1] if '</think>' in t else t",
            Handling(separator="</think>", opener="<think>"),
        ),
    ],
)
def test_handling_is_learned(expression: str, handling: Handling) -> None:
    from jinja2.sandbox import SandboxedEnvironment

    source = "{{ " + expression.replace("\n", "\\n") + " }}"
    template = SandboxedEnvironment().from_string(source)
    assert learn(source, lambda text: template.render(t=text)) == handling


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ messages[5].content.nothing.at.all }}", "has no element 5"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ range(10**9) | list }}", "OverflowError"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
        ("{{ messages[0].content * 10**18 }}", "MemoryError"),
        ("{{ messages | sum }}", "TypeError"),
    ],
)
def test_a_refusal_is_no_crash(source: str, words: str) -> None:
    with pytest.raises(TemplateRefused, match=words):
        ChatTemplate(source).render([{"role": "user", "content": "x"}])


def test_a_syntax_error_is_told_with_its_line() -> None:
    with pytest.raises(UserError, match=r"no valid Jinja: line 3: .*unknown tag 'oops'"):
        choose(ChatTemplate("a\nb\n{% oops %}"), "auto", servers.engine())


def test_the_command_shows_it_all(tmp_path: Path) -> None:
    from support.commands import pipeline

    path = tmp_path / "my.jinja"
    path.write_text(CHATML)
    shown = pipeline("template", path)
    assert shown.exit_code == 0, shown.output
    for words in ("way: go", "TEMPLATE:", "{{- range $index, $_ := .Messages }}", "three quotes", "exact"):
        assert words in shown.output
    told = json.loads(pipeline("template", path, "--json").stdout)
    assert told["way"] == "go"
    assert len(told["suite"]["go"]) == len(CONVERSATIONS)
    path.write_text("{{ raise_exception('never') }}")
    refused = pipeline("template", path)
    assert refused.exit_code == 1
    assert "refused" in refused.output
    assert "What can be done: write a Go template" in refused.output


@pytest.mark.parametrize("given", [small_models.BASE, "folder", "file"])
def test_the_command_takes_a_name_a_folder_and_a_file(given: str) -> None:
    from support.commands import pipeline

    model = {"folder": str(small_models.base_folder()), "file": str(small_models.original_gguf())}.get(given, given)
    answer = pipeline("template", model, "--json")
    assert answer.exit_code == 0, answer.output
    told = json.loads(answer.stdout)
    assert told["way"] == "go"
    assert told["template"] == told["derived"]
    assert "You are a helpful AI assistant named SmolLM" in told["template"]
    assert {outcome["status"] for outcome in told["suite"]["go"].values()} <= set(HARMLESS)
