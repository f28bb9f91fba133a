"""verify: every stage against the one before it, and the first broken one by name.

A broken link is written down and does not stop the stages after it, so that the report can show it; the command that
ran this ends with status 1.
"""

from __future__ import annotations

from typing import Any

from pipeline import console
from pipeline.model.merge_target import merge_files
from pipeline.run.stage import EVERY_JUDGED_STAGE, Stage, Task
from pipeline.stages import judged_stages
from pipeline.verify.artefacts import Artefacts
from pipeline.verify.chain import BROKE_OFF, verify
from pipeline.verify.result import FAIL, explain, write
from pipeline.verify.rungs import GGUF_16BIT
from pipeline.verify.training import training_files


def main(task: Task) -> dict[str, Any]:
    """Write verify.json."""
    content = verify(Artefacts.of_run(task.run, task.config, task.scratch), judged_stages())
    write(task.new(task.layout.verify_json), content)
    if content["verdict"] == FAIL:
        console.say(f"  {explain(content)}")
    return {
        "verdict": content["verdict"],
        **{verdict.replace(" ", "_"): count for verdict, count in content["counts"].items()},
        "first_broken": content["first_broken"] and content["first_broken"]["id"],
        "broke_off": sum(check["sentence"] == BROKE_OFF for check in content["checks"]),
        "divergence": content.get("divergences", {}).get(GGUF_16BIT),
    }


def unfinished(figures: dict[str, Any]) -> str | None:
    """Why it has to be tried again: what ended a check may have been the machine."""
    return "a check was ended by an error" if figures.get("broke_off") else None


STAGE = Stage(
    name="verify",
    summary="Prove every stage against the one before it, and name the first broken one.",
    run=main,
    needs=(EVERY_JUDGED_STAGE,),
    settings=(
        *("verify", "model", "merge.base", "merge.model", "merge.keep", "export.quant", "export.as"),
        *("train.load_in_4bit", "train.max_length", "data.test", "data.on_overlong", "data.window", "data.system"),
        *("ollama.parameters", "ollama.system", "eval"),
    ),
    indifferent_to=("adapter", "adapters", "train.seed"),
    files=lambda config, _: [*merge_files(config), *training_files(config)],
    libraries=(
        "torch",
        "transformers",
        "peft",
        "bitsandbytes",
        "tokenizers",
        "safetensors",
        "scipy",
        "numpy",
        "jinja2",
    ),
    programs=("llama.cpp", "ollama"),
    unfinished=unfinished,
    figures=("verdict", "pass", "fail", "not_run", "first_broken"),
)
