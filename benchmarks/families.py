"""The families of models that people bring, each taken the whole way: `python -m benchmarks.families --help`.

A small random model of each (benchmarks/small_base.py) is trained four steps, merged, converted, quantized, created in
a real Ollama and verified. A row of the table either passes every check, or is refused by preflight with the cause.
With --write the rows go into docs/families.md, each as soon as it is known; those of other families stay as they are.
"""

import json
import re
import subprocess
import tempfile
import textwrap
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from benchmarks.program import COMMAND, run_of
from benchmarks.small_base import write_small_base
from pipeline.llamacpp.converter import command, convert
from pipeline.llamacpp.quantizer import quantize
from pipeline.model.sentencepiece_file import write_sentencepiece

_PHI3 = ("<|endoftext|>", "<|assistant|>", "<|placeholder1|>", "<|end|>", "<|system|>", "<|user|>")
_QUANT = "q4_k_m"
PAGE = Path(__file__).parent.parent / "docs" / "families.md"
_HEAD = (
    "| family | architecture | way | checks passed | refused or failed, and where | seen |\n|---|---|---|---|---|---|\n"
)
_ABOUT = """# Families of models

Each was taken the whole way as a small random model of its architecture with its real tokenizer: preflight, four steps
of training, merge, convert, quantize, Modelfile, a real Ollama, verify. "Way" is how Ollama renders the prompt: `go` by
a TEMPLATE that was derived and proven, `native` by the file's own Jinja. A row passes every check that ran, or says
which stage refused it and why. What is random here is the model: that a large one of the family learns is not shown.

Some passed with texts left out that llama.cpp gives other ids than the family's tokenizer, each explained id for id;
`data` refuses a row with one (docs/data.md): other white space than ASCII's after a token of Phi-3, and in Mistral Nemo
and gpt-oss words with combining marks or with capital letters beyond ASCII inside them. Of Mistral Nemo's chat template
tools are left out: llama.cpp cannot read it, and the GGUF file carries one of plain conversations derived from it.

Written by `python -m benchmarks.families --write`, a row at a time (`--only NAME`).

"""


@dataclass(frozen=True)
class Family:
    """A kind of base.

    Attributes:
        tokenizer: of a packaged base, or as third_party/pins.toml names it.
        model_type: the architecture, as config.json names it.
        chat_template: whether the tokenizer comes with one; a raw base has none.
        model: further keys of [model].
        added: special tokens beyond the tokenizer's own.
        taking: the white space that its special tokens take: "lstrip", "rstrip".
        rows: of the embedding; 0: one for every token.
        four_bit: stored in bitsandbytes' 4 bits.
        gguf: given as a GGUF file of this type of llama-quantize.
    """

    tokenizer: str
    model_type: str = "llama"
    chat_template: bool = True
    model: str = ""
    added: tuple[str, ...] = ()
    taking: tuple[str, ...] = ()
    rows: int = 0
    four_bit: bool = False
    gguf: str = ""


FAMILIES = {
    "Llama 2, raw": Family("llama2", chat_template=False, model='chat_template = "alpaca"\n'),
    "Llama 2 in 4 bits (bitsandbytes)": Family("llama2", chat_template=False, four_bit=True),
    "Llama 2, a GGUF file": Family("llama2", chat_template=False, gguf="q4_k_m"),
    "Llama 3": Family("llama3"),
    "Llama 3.1, raw": Family("llama3_1", chat_template=False, model='chat_template = "zephyr"\n'),
    "Llama 3.1 Instruct": Family("llama3_1"),
    "Mistral": Family("llama2", "mistral", chat_template=False, model='chat_template = "mistral"\n'),
    "Mistral Nemo": Family("mistral_nemo", "mistral"),
    "Mixtral": Family("llama2", "mixtral", chat_template=False, model='chat_template = "mistral"\n'),
    "Qwen2.5": Family("qwen2_5", "qwen2"),
    "Qwen3": Family("qwen3", "qwen3"),
    "Qwen3, a GGUF file": Family("qwen3", "qwen3", gguf="q8_0"),
    "Qwen3-MoE": Family("qwen3", "qwen3_moe"),
    "Gemma 2": Family("gemma2", "gemma2", model='chat_template = "gemma"\n'),
    "Gemma 3, text": Family("gemma3", "gemma3_text", rows=262144),
    "Gemma 3, vision": Family("gemma3", "gemma3"),
    "Phi-3": Family("llama2", "phi3", added=_PHI3, taking=("rstrip",), model='chat_template = "phi-3"\n'),
    "Phi-4": Family("gpt4", "phi3", added=("<|im_sep|>",), taking=("lstrip", "rstrip")),
    "Granite": Family("smollm2-135m-instruct", "granite"),
    "SmolLM2": Family("smollm2-135m-instruct"),
    "SmolLM3": Family("llama3_1", "smollm3"),
    "OLMo 2": Family("gpt4", "olmo2"),
    "DeepSeek, distilled": Family("deepseek_v3", "llama"),
    "DeepSeek V3": Family("deepseek_v3", "deepseek_v3"),
    "gpt-oss": Family("gpt4o", "gpt_oss"),
    "GPT-2": Family("gpt2", "gpt2"),
    "Falcon": Family("gpt2", "falcon"),
}


def project(folder: Path, family: Family, *, rows: int = 48) -> Path:
    """A folder with a family's small base, rows of one and of two turns, and a configuration; its pipeline.toml."""
    folder.mkdir(parents=True, exist_ok=True)
    base = write_small_base(
        folder / "base",
        family.tokenizer,
        family.model_type,
        chat_template=family.chat_template,
        rows=family.rows,
        added=family.added,
        taking=family.taking,
        four_bit=family.four_bit,
    )
    if family.gguf:
        base = _as_gguf(base, folder, family.gguf)
    return configure(folder, base, family.model, rows=rows)


def _as_gguf(base: Path, folder: Path, kind: str) -> Path:
    write_sentencepiece(base)
    convert(command(base, folder / "base-f16.gguf", "f16"), folder)
    quantize(folder / "base-f16.gguf", folder / f"base-{kind}.gguf", kind)
    return folder / f"base-{kind}.gguf"


def configure(folder: Path, base: Path, model: str = "", *, rows: int = 48) -> Path:
    """A folder with rows and a configuration for a base; its pipeline.toml."""
    folder.mkdir(parents=True, exist_ok=True)
    conversations = [
        [
            {"role": "user", "content": f"Say {number}." + " Please." * (number % 5)},
            {"role": "assistant", "content": f"{number} it is."},
            {"role": "user", "content": "And the next?"},
            {"role": "assistant", "content": f"{number + 1}."},
        ][: 2 + number % 2 * 2]
        for number in range(rows)
    ]
    lines = "".join(json.dumps({"messages": messages}) + "\n" for messages in conversations)
    (folder / "train.jsonl").write_text(lines, encoding="utf-8")
    config = folder / "pipeline.toml"
    # A random model says what it says: what is judged is that the same is said everywhere.
    judged = "[verify]\ntokens = 400\nstrings = 400\nstopping = 0\nloss_lost = 2\nanswers_lost = 1\n"
    settings = "[train]\nsteps = 4\nbatch = 4\nmax_length = 256\n[eval]\nmax_new_tokens = 8\n"
    data = '[data]\ntrain = "train.jsonl"\nvalidation_fraction = 0.25\n'
    config.write_text(f"[model]\nbase = {json.dumps(str(base))}\n{model}{data}{settings}{judged}", encoding="utf-8")
    return config


def whole_way(config: Path, *options: str) -> dict[str, Any]:
    """Run the program on a project.

    Returns:
        status: of the command; said: its error, in one line; output: all that it told; way: how Ollama renders the
        prompt; checks: verify's verdicts and how many of each; failed: the checks that did.
    """
    done = subprocess.run(
        [*COMMAND, "run", str(config), *options], capture_output=True, text=True, errors="replace", check=False
    )
    run = run_of(config)
    proof = _json(run.verify_json)
    return {
        "status": done.returncode,
        # What the program says; what another one said, quoted in it, does not begin a line.
        "said": " ".join(re.split(r"^error: ", done.stderr, flags=re.MULTILINE)[-1].split()) if done.returncode else "",
        "output": done.stderr,
        "way": _json(run.template_choice(_QUANT)).get("way", ""),
        "checks": proof.get("counts", {}),
        "failed": [row["id"] for row in proof.get("checks", []) if row["verdict"] == "fail"],
    }


def _json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return content


def read_page(path: Path) -> dict[str, str]:
    """The rows of a page, by their families; none where it is not there."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return {name: line for line in lines if (name := line.split("|")[1].strip() if "|" in line else "") in FAMILIES}


def page(rows: Mapping[str, str]) -> str:
    """The page with a row for every family."""
    lines = [rows.get(name, f"| {name} | {family.model_type} | | | not run | |") for name, family in FAMILIES.items()]
    return _ABOUT + _HEAD + "\n".join(lines) + "\n"


def row(name: str, found: Mapping[str, Any]) -> str:
    """A family's row of the table: what `whole_way` has found."""
    words = "; ".join([*found["failed"], found["said"]]).strip("; ")
    words = textwrap.shorten(words, 300, placeholder=" ...").replace("|", "\\|")
    today = f"{datetime.now(UTC):%Y-%m-%d}"
    passed = found["checks"].get("pass", "")
    return f"| {name} | {FAMILIES[name].model_type} | {found['way']} | {passed} | {words} | {today} |"


def _means(given: str, name: str) -> bool:
    return given == name if given in FAMILIES else given.lower() in name.lower()


@click.command()
@click.option("--only", multiple=True, help="A family, by its name or a part of several; more than once: several.")
@click.option("--keep", type=click.Path(path_type=Path), help="Leave the projects in this folder.")
@click.option("--write", is_flag=True, help="Put the rows into docs/families.md.")
def main(only: tuple[str, ...], keep: Path | None, write: bool) -> None:
    """Print the table of families."""
    chosen = [name for name in FAMILIES if not only or any(_means(part, name) for part in only)]
    print(_HEAD, end="", flush=True)
    for name in chosen:
        with tempfile.TemporaryDirectory() as temporary:
            folder = (keep or Path(temporary)) / name.lower().replace(" ", "-").replace(",", "")
            started = time.perf_counter()
            try:
                found = whole_way(project(folder, FAMILIES[name]))
            except Exception as error:  # a base that transformers cannot make here
                found = {"checks": {}, "way": "", "failed": [], "said": f"{type(error).__name__}: {error}", "status": 1}
            found["said"] = found["said"].replace(f"{folder}/", "")
        print(row(name, found), f"{time.perf_counter() - started:.0f} s", flush=True)
        if write:
            PAGE.write_text(page(read_page(PAGE) | {name: row(name, found)}), encoding="utf-8")


if __name__ == "__main__":
    main()
