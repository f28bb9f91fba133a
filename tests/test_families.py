"""Real families end to end: real tokenizers on small random models, converted for real, made in the real Ollama.

Every conversation's prompt, as Ollama sends it, is transformers' own, and so are its token ids.
"""

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from support import bases, servers, small_models

from pipeline.config import Verify
from pipeline.data.formats import Conversation
from pipeline.ollama.deployment import planned, read_back, template_in_force
from pipeline.ollama.proof import prove_prompts
from pipeline.ollama.serving import llama_server
from pipeline.prompt.cases import conversations
from pipeline.prompt.conformance import COMPARED
from pipeline.prompt.labels import tokenize_texts, training_texts
from pipeline.prompt.template import ChatTemplate, TemplateRefused, render
from pipeline.prompt.tokenizer import load_tokenizer
from pipeline.run.layout import Layout
from pipeline.run.stage import Task
from pipeline.setup.places import tokenizer_folder
from pipeline.stages import convert, modelfile, quantize
from pipeline.verify import prompt as prompt_check
from pipeline.verify import token_ids, trained_labels
from pipeline.verify.artefacts import Artefacts
from pipeline.verify.result import FAIL

STAGES = {"convert": "", "quantize": "q8_0", "modelfile": "q8_0"}
WAYS = {"qwen3": "native", "llama3_1": "go", "gemma2": "go"}


@cache
def tokenizer_of(name: str) -> Any:
    """The one that is trained; loading one of a quarter of a million words takes seconds."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(servers.family_run(name) / "merge" / "model")


@pytest.mark.parametrize("name", servers.FAMILIES)
def test_the_template_is_rendered_as_transformers_does(name: str) -> None:
    """`ChatTemplate` is what everything is measured by, so it is measured here."""
    tokenizer = tokenizer_of(name)
    template = ChatTemplate.from_tokenizer(tokenizer)
    compared = 0
    for case in conversations(template.special_tokens):
        options = {} if case.think is None else {"enable_thinking": case.think}
        try:
            ours = template.render(case.messages, case.tools, case.think)
        except TemplateRefused:
            continue
        messages, tools = [dict(message) for message in case.messages], list(case.tools) or None
        theirs = tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=True, tokenize=False, **options
        )
        assert ours == theirs
        if case.think is None:
            assert render(tokenizer, messages, add_generation_prompt=True, tools=tools) == theirs
        compared += 1
    assert compared > 30


@pytest.mark.parametrize("name", servers.FAMILIES)
def test_served_as_trained(name: str) -> None:
    run = servers.family_run(name)
    config: dict[str, Any] = {"export": {"quant": ["q8_0"]}, "train": {"max_length": 64}}
    task = small_models.make_task(run, "modelfile", "q8_0", **config)
    figures = modelfile.main(task)
    assert figures["way"] == WAYS[name], figures["reason"]

    tokenizer = tokenizer_of(name)
    template = ChatTemplate.from_tokenizer(tokenizer)
    served, gguf, _ = planned(run / "modelfile" / "q8_0")
    client = servers.client()
    model = f"family-{name}:latest"
    digest = client.upload(gguf)
    client.create(model, {**served.body(), "files": {"m.gguf": digest}})
    shown = read_back(client, model, served, template_in_force(served, gguf))
    assert ("tools" in shown["capabilities"]) == (name == "qwen3")
    assert (shown["requires"] is not None) == (WAYS[name] == "native")
    assert shown["details"]["family"] == template.architecture
    suite = conversations(template.special_tokens)
    proof = prove_prompts(
        client, model, template, tokenizer, gguf, suite, joins=bool(served.template), system=served.system
    )
    counts = proof.report.counts
    assert counts["differs"] == 0
    assert proof.other_ids == {}
    assert proof.token_equal == sum(counts[status] for status in COMPARED)
    # Gemma's template refuses turns that do not alternate.
    assert proof.token_equal >= (30 if name == "gemma2" else 45)
    # The served file stops where the trained template ends a turn.
    ends = {"qwen3": "<|im_end|>", "llama3_1": "<|eot_id|>", "gemma2": "<end_of_turn>"}
    assert ends[name] in served.parameters["stop"]
    client.delete(model)


def test_verified_by_the_same_checks() -> None:
    """Nothing differs from the tokenizer that is trained; what does from the base's own is named."""
    name = "qwen3"
    run = servers.family_run(name)
    files = {"q8_0": run / "quantize" / "q8_0" / "model-q8_0.gguf"}
    for model, differs in ((run / "merge" / "model", False), (servers.family(name), True)):
        artefacts = Artefacts(Verify(strings=600), model, None, files, small_models.scratch() / name)
        results = [*token_ids.check_files(artefacts), *prompt_check.check_files(artefacts)]
        assert not [(result.id, result.words) for result in results if result.verdict == FAIL]
        named = [result.sentence for result in results if result.id == "tokenizer.habits"]
        assert any("NFC" in sentence for sentence in named) == differs, named
        assert bool(named) == differs


def test_a_jinja_that_llama_cpp_cannot_read_is_served_without_its_tools() -> None:
    """Mistral Nemo's, on a smaller tokenizer: the file carries what was derived of it, and every rung renders it so."""
    if (nemo := tokenizer_folder("mistral_nemo")) is None:
        pytest.skip("the tokenizer of mistral_nemo is not here: `pipeline setup --dev` fetches it")
    run = small_models.scratch() / "run-unread"
    merged, kind = run / "merge" / "model", {"export": {"quant": ["q8_0"]}}
    shutil.copytree(bases.base("unread", "smollm2-135m-instruct"), merged)
    tokenizer, _ = load_tokenizer(merged)
    tokenizer.chat_template = ChatTemplate.from_folder(nemo).source
    tokenizer.save_pretrained(merged)
    tasks = {name: small_models.make_task(run, name, variant, **kind) for name, variant in STAGES.items()}
    convert.main(tasks["convert"])
    quantize.main(tasks["quantize"])
    figures = modelfile.main(tasks["modelfile"])
    assert figures["way"] == "native", figures["reason"]
    assert any("tools are left out" in words for words in tasks["modelfile"].warnings)

    files = {"q8_0": Layout(run).quantized("q8_0")}
    artefacts = Artefacts(Verify(), merged, Layout(run).gguf_16bit(), files, small_models.scratch() / "unread")
    results = list(prompt_check.check_files(artefacts))
    assert not [(result.id, result.words) for result in results if result.verdict == FAIL]
    assert {result.id for result in results} >= {"prompt.template", "prompt.llamacpp", "prompt.tokens"}
    with llama_server(files["q8_0"], 512) as server:
        assert server.chat([{"role": "user", "content": "Hi"}], 4)
    served, gguf, _ = planned(run / "modelfile" / "q8_0")
    client, model, template = servers.client(), "family-unread:latest", ChatTemplate.from_tokenizer(tokenizer)
    client.create(model, {**served.body(), "files": {"m.gguf": client.upload(gguf)}})
    shown = read_back(client, model, served, template_in_force(served, gguf))
    assert "tools" not in shown["capabilities"]
    suite = conversations(template.special_tokens)
    proof = prove_prompts(client, model, template, tokenizer, gguf, suite, joins=False, system=served.system)
    assert proof.token_equal >= 45
    client.delete(model)
    # Another chat template in the file is found.
    other = small_models.scratch() / "unread-other.gguf"
    shutil.copyfile(servers.family_run("qwen3") / "quantize" / "q8_0" / "model-q8_0.gguf", other)
    wrong = prompt_check.check_file(template, tokenizer, "convert", other, suite)
    assert next(wrong).verdict == FAIL


def test_what_a_template_rewrites_is_still_the_answer() -> None:
    """Thinking that it moves, and calls of tools that it writes after what is said."""
    call = {"type": "function", "function": {"name": "lamp", "arguments": {"on": True}}}
    answers: list[dict[str, Any]] = [
        {"role": "assistant", "content": "<think>\nWhich one?\n</think>\n\nI switch it on.", "tool_calls": [call]},
        {"role": "assistant", "content": "", "reasoning_content": "Done.", "tool_calls": [call]},
        {"role": "assistant", "content": "<think>\nDone.\n</think>\n\nIt is on."},
    ]
    tokenizer = tokenizer_of("qwen3")
    for answer in answers:
        messages = [{"role": "user", "content": "Light!"}, answer]
        (text,) = training_texts(tokenizer, messages, None)
        (row,) = tokenize_texts(tokenizer, [text])
        owner = trained_labels.Owner(Conversation(messages, ""))
        faults = trained_labels.Faults()
        trained_labels.judge_row(tokenizer, row.input_ids, row.labels, owner, "", faults, None)
        assert faults == trained_labels.Faults(), answer
        wrong = trained_labels.Owner(Conversation([messages[0], answer | {"content": "No."}], ""))
        trained_labels.judge_row(tokenizer, row.input_ids, row.labels, wrong, "", faults, None)
        assert faults.spans.count == 1


def test_a_template_changed_on_the_way_is_caught(tmp_path: Path) -> None:
    """One space more in what is served: the proof has to see it."""
    from pipeline.errors import PipelineError

    run = servers.family_run("qwen3")
    client, name = servers.client(), "changed:latest"
    tokenizer = tokenizer_of("qwen3")
    template = ChatTemplate.from_tokenizer(tokenizer)
    gguf = run / "quantize" / "q8_0" / "model-q8_0.gguf"
    changed = tmp_path / "changed.gguf"
    from pipeline.llamacpp.gguf_template import write_with_template

    prefix = guard_with_a_space(template.source)
    write_with_template(gguf, changed, prefix)
    client.create(name, {"files": {"m.gguf": client.upload(changed)}})
    with pytest.raises(PipelineError, match="Ollama sends other prompts than were trained"):
        prove_prompts(client, name, template, tokenizer, changed, conversations(), joins=False, system="")
    client.delete(name)


def guard_with_a_space(source: str) -> str:
    from pipeline.prompt.guard import guarded

    whole = guarded(source)
    prefix = whole[: len(whole) - len(source)]
    changed = prefix.replace(" " * 9 + "#}", "#}{{ ' ' }}")  # as long as it was, so that the file stays aligned
    assert changed != prefix
    return changed + source


def test_a_model_with_another_tokenizer_is_caught(tmp_path: Path) -> None:
    """The prompts are equal as text, and the ids are not."""
    from transformers import AutoTokenizer

    from pipeline.errors import PipelineError

    gguf, _, _ = small_models.quantized()
    tokenizer = AutoTokenizer.from_pretrained(small_models.base_folder())
    template = ChatTemplate.from_tokenizer(tokenizer)
    other = tokenizer_of("qwen3")
    task: Task = small_models.make_task(small_models.base_run(), "modelfile", "q4_k_m", train={"max_length": 64})
    modelfile.main(task)
    served, _, _ = planned(task.output)
    client, name = servers.client(), "other:latest"
    client.create(name, {**served.body(), "files": {"m.gguf": client.upload(gguf)}})
    with pytest.raises(PipelineError, match="other token ids from position"):
        prove_prompts(client, name, template, other, gguf, conversations(), joins=True, system="")
    client.delete(name)
    assert json.loads((task.output / "template.json").read_text())["way"] == "go"


def test_the_special_tokens_that_a_template_writes_are_tried_first() -> None:
    tokens = ChatTemplate.from_folder(servers.family("llama3_1")).special_tokens
    assert len(tokens) > 200
    assert {"<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"} < set(tokens[:8])
