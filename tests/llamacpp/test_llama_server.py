"""llama-server on the packaged base: asked, stopped, and readable when it cannot start."""

import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import httpx
import psutil
import pytest
from support import small_models

from pipeline.errors import PipelineError, UserError
from pipeline.llamacpp.llama_server import LlamaServer
from pipeline.ollama.scratch_model import write_scratch_model
from pipeline.ollama.serving import llama_server
from pipeline.prompt.cases import Case
from pipeline.prompt.guard import guarded
from pipeline.prompt.template import ChatTemplate
from pipeline.prompt.tokenizer import saved_tokenizer
from pipeline.verify.prompt import check_file
from pipeline.verify.result import PASS

MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaServer]:
    log = tmp_path_factory.mktemp("log") / "server.log"
    # In 16 bits: quantized once more, so small a model may say anything, and another on another processor.
    with LlamaServer(small_models.converted()[0], context=1024, log=log) as running:
        yield running


def test_special_tokens_are_read_where_they_are_meant(server: LlamaServer) -> None:
    text = "<|im_start|>user\nHéllo 123 🦙<|im_end|>\n"
    ids = server.tokenize(text)
    assert (ids[0], ids[-2]) == (1, 2)
    assert server.tokenize(text, parse_special=False)[0] != 1
    assert server.tokenize("") == []


def test_the_template_is_the_trained_one(server: LlamaServer) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(small_models.base_folder())
    expected = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert server.apply_template(MESSAGES) == expected


# As Llama 3.1's: llama.cpp says what day it is, transformers does not. It also says to think, without being asked to.
DATED = (
    "{% if date_string is not defined %}{% set date_string = '26 Jul 2024' %}{% endif %}{{ date_string }}: "
    "{% for message in messages %}{{ message.content }}{% endfor %}"
    "{% if enable_thinking is defined and enable_thinking %}{{ raise_exception('it was not said') }}{% endif %}"
)


def test_a_guarded_template_is_rendered_as_trained(tmp_path: Path) -> None:
    template = ChatTemplate(DATED)
    path = write_scratch_model(tmp_path / "dated.gguf", template)
    with LlamaServer(path, context=64, template=DATED.partition("{% if enable")[0]) as server:
        assert "26 Jul 2024" not in server.apply_template(MESSAGES)
    with LlamaServer(path, context=64, template=guarded(DATED, thinking_not_said=True)) as server:
        assert server.apply_template(MESSAGES) == template.render(MESSAGES)
        assert server.command[-2] == "--chat-template-file"
    assert not Path(server.command[-1]).exists()


def test_a_recorded_command_can_be_typed_again(tmp_path: Path) -> None:
    path = write_scratch_model(tmp_path / "dated.gguf", ChatTemplate(DATED))
    with llama_server(path, 64, tmp_path / "logs" / "asked.log") as server:
        rendered, command = server.apply_template(MESSAGES), server.command
    template = Path(command[command.index("--chat-template-file") + 1])
    assert template == tmp_path / "logs" / "asked.jinja"
    assert rendered == ChatTemplate(DATED).render(MESSAGES)
    assert template.read_text() == guarded(DATED, thinking_not_said=True)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as again:
        transport = httpx.HTTPTransport(retries=20)  # until it listens
        with httpx.Client(base_url=server.url, transport=transport, trust_env=False) as client:
            assert client.get("/health").status_code in (httpx.codes.OK, httpx.codes.SERVICE_UNAVAILABLE)
        again.terminate()


def test_chat_and_verify_ask_with_the_guarded_template(tmp_path: Path) -> None:
    template = ChatTemplate(DATED)
    path = write_scratch_model(tmp_path / "dated.gguf", template)
    with llama_server(path) as server:
        next(server.stream(MESSAGES))
    suite = (Case("asked", tuple(MESSAGES)),)
    results = list(islice(check_file(template, saved_tokenizer(small_models.base_folder()), "q8_0", path, suite), 2))
    assert [(result.id, result.verdict) for result in results] == [("prompt.template", PASS), ("prompt.llamacpp", PASS)]
    assert str(results[1].figure).startswith("guarded as it is served: 1 exact; bare: refused: ")


def test_answers_are_the_same_every_time(server: LlamaServer) -> None:
    prompt = server.apply_template(MESSAGES)
    first = server.complete(prompt, 24, n_probs=3)
    server.complete("something else in between", 5)
    again = server.complete(server.tokenize(prompt), 24, n_probs=3)
    assert first["content"] == again["content"]
    assert "France" in first["content"]
    assert first["tokens"] == again["tokens"]
    assert first["completion_probabilities"] == again["completion_probabilities"]
    assert len(first["completion_probabilities"][0]["top_logprobs"]) == 3
    assert server.chat(MESSAGES, 24).strip() == first["content"].strip()


def test_a_stop_text_ends_the_answer(server: LlamaServer) -> None:
    answer = server.complete(server.apply_template(MESSAGES), 50, stop=["France"])
    assert answer["stop_type"] == "word"
    assert "France" not in answer["content"]


def test_a_refused_request_is_a_readable_error(server: LlamaServer) -> None:
    with pytest.raises(PipelineError, match="exceeds the available context size"):
        server.complete([5] * 3000, 1)


def test_a_refused_question_of_a_chat_is_a_readable_error(server: LlamaServer) -> None:
    with pytest.raises(PipelineError, match="exceeds the available context size"):
        list(server.stream([{"role": "user", "content": "word " * 3000}]))
    assert "France" in "".join(islice(server.stream(MESSAGES), 12))  # and it goes on


def test_an_answer_that_breaks_off_is_a_readable_error() -> None:
    with LlamaServer(small_models.quantized()[0], context=2048) as server:
        pieces = server.stream([{"role": "user", "content": "Count from 1 to 1000, one number a line."}])
        next(pieces)
        server.process.kill()
        with pytest.raises(PipelineError, match="llama-server stopped answering: ."):
            list(pieces)


def test_it_is_stopped_and_its_log_kept(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    with LlamaServer(small_models.quantized()[0], context=256, log=log) as server:
        url, process = server.url, server.process
        assert url.startswith("http://127.0.0.1:")
        assert httpx.get(f"{url}/health").is_success
    assert process.poll() is not None
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{url}/health")
    assert "model loaded" in log.read_text()


def test_it_ends_with_the_process_that_started_it() -> None:
    code = (
        "import sys, time; from pathlib import Path; from pipeline.llamacpp.llama_server import LlamaServer;"
        "server = LlamaServer(Path(sys.argv[1]), context=256).__enter__();"
        "print(server.process.pid, flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(small_models.quantized()[0])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        assert child.is_running()
        parent.kill()
    deadline = time.monotonic() + 20
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "llama-server outlived its parent"
        time.sleep(0.05)


def test_a_file_that_cannot_be_loaded(tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(small_models.quantized()[0].read_bytes()[:50_000_000])
    with (
        pytest.raises(PipelineError, match=r"cannot load .*cut\.gguf(.|\n)*corrupted or incomplete"),
        LlamaServer(cut),
    ):
        pass
    with pytest.raises(UserError, match="no such file"), LlamaServer(tmp_path / "nothing.gguf"):
        pass
