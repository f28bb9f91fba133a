"""verify: every stage against the one before it, and the first broken one by name.

A broken link is written down and does not stop the stages after it, so that the report can show it; the command that
ran this ends with status 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline import console
from pipeline.config import Config
from pipeline.resources import resource
from pipeline.run.stage import Work
from pipeline.verify.artefacts import Artefacts
from pipeline.verify.chain import verify
from pipeline.verify.result import FAIL, explain, write
from pipeline.verify.rungs import GGUF_16BIT

NEEDS = ("data", "train", "merge", "convert", "quantize", "modelfile", "deploy", "evaluate")
CONFIG = ("verify", "model", "export", "ollama.parameters", "ollama.system", "data.system", "eval")


def inputs(_: Config) -> list[Path]:
    """The pin of the programs."""
    return [resource("third_party/pins.toml")]


def main(work: Work) -> dict[str, Any]:
    """Write verify.json."""
    content = verify(Artefacts.of_run(work.run, work.config, work.scratch))
    write(work.output / "verify.json", content)
    if content["verdict"] == FAIL:
        console.say(f"  {explain(content)}")
    return {
        "verdict": content["verdict"],
        **{verdict.replace(" ", "_"): count for verdict, count in content["counts"].items()},
        "first_broken": content["first_broken"] and content["first_broken"]["id"],
        "divergence": content.get("divergences", {}).get(GGUF_16BIT),
    }
