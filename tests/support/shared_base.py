"""Two adapters on one small base, each a run with export.as = "adapter", made once by the real programs."""

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.run.folder import read_manifest, record_files, write_manifest, write_whole
from pipeline.run.layout import Layout
from pipeline.run.stage import Task
from pipeline.stages import adapter, convert, merge, modelfile, quantize
from support.adapters import peft_adapter, small_base
from support.small_models import RECORD, make_config, scratch

KIND = "q8_0"
QUESTIONS = [f"Say {number}." for number in range(1, 4)]
# One as plain as can be; one whose scaling is another in nearly every module.
LORA: dict[str, dict[str, Any]] = {
    "one": {},
    "two": {"r": 4, "use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 9}},
}
SYSTEM = {"one": "You are the first.", "two": ""}


@cache
def adapter_of(name: str) -> Path:
    """A PEFT adapter on the small base."""
    return peft_adapter(scratch() / f"shared-{name}", small_base(converts=True), **LORA[name])


@cache
def run_of(name: str) -> Path:
    """The run of one of them, up to `modelfile`."""
    run = scratch() / f"run-shared-{name}"
    (run / "data").mkdir(parents=True)
    rows = ([{"role": "user", "content": text}, {"role": "assistant", "content": "1"}] for text in QUESTIONS)
    (run / "data" / "test.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    for stage, variant in ((adapter, ""), (merge, ""), (convert, ""), (quantize, KIND), (modelfile, KIND)):
        do(stage, run, config_of(name), variant)
    write_whole(Layout(run).config, config_of(name).model_dump_json())
    return run


def config_of(name: str, **sections: Any) -> Config:
    """The configuration of a run."""
    return make_config(
        **{
            "model": {"base": str(small_base(converts=True))},
            "adapter": {"path": adapter_of(name)},
            "data": {"train": None},
            "train": {"load_in_4bit": False, "max_length": 256},
            "export": {"quant": [KIND], "as": "adapter"},
            "ollama": {"name": f"shared-{name}", "system": SYSTEM[name], "parameters": {"temperature": 0}},
            "eval": {"metric": "text", "max_new_tokens": 12},
            "verify": {"stopping": 0.0, "strings": 100},  # random weights do not know when to stop
            "run": {"folder": scratch() / f"run-shared-{name}"},
        }
        | sections
    )


def do(stage: Any, run: Path, config: Config, variant: str = "") -> dict[str, Any]:
    """Run a stage and record it, as the graph does; return its figures."""
    declared = stage.STAGE
    node = f"{declared.name}/{variant}" if variant else declared.name
    output = Layout(run).partial(declared.name, variant)
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    figures: dict[str, Any] = stage.main(Task(declared, config, run, output, variant, run / ".scratch"))
    final = Layout(run).node(declared.name, variant)
    shutil.rmtree(final, ignore_errors=True)
    final.parent.mkdir(parents=True, exist_ok=True)
    output.rename(final)
    manifest = read_manifest(run)
    manifest["stages"][node] = RECORD | {"figures": figures, "outputs": record_files(final, run)}
    write_manifest(run, manifest)
    return figures
