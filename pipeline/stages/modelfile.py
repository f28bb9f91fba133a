"""modelfile: how Ollama is to serve each GGUF file, proven before it is written down.

The chat template is tried on real servers (`pipeline.ollama.rendering`): a derived TEMPLATE where that is exact and
used, the GGUF's own Jinja where that is. `create.json` carries everything for `deploy`; the Modelfile beside it is for
people, and is left out where its format cannot say what is meant.
"""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import PipelineError
from pipeline.llamacpp.gguf_file import inspect
from pipeline.llamacpp.gguf_template import write_with_template
from pipeline.ollama.llamacpp_rendering import carried_template
from pipeline.ollama.modelfile_text import ServedModel, served_system, write
from pipeline.ollama.parameters import parameters
from pipeline.ollama.rendering import choose, explain, refusal
from pipeline.processes import require_space
from pipeline.prompt.template import ChatTemplate
from pipeline.resources import resource
from pipeline.run.stage import Stage, Task

if TYPE_CHECKING:
    from pipeline.config import Config


def files(config: "Config", _: str) -> list[Path]:
    """The Modelfile's template, and the user's own Go template, if there is one."""
    own = [config.ollama.own_template] if config.ollama.own_template else []
    return [resource("templates/Modelfile.j2"), *own]


def main(task: Task) -> dict[str, Any]:
    """Choose, check, write."""
    config = task.config
    model = task.layout.merged_model
    gguf = task.layout.quantized(task.variant)
    template = ChatTemplate.from_folder(model)
    carried = inspect(gguf).metadata.get("tokenizer.chat_template")
    meant = carried_template(template)
    if carried != meant.jinja:
        raise PipelineError(
            f"{gguf.name} carries another chat template than the merged model has: convert it again "
            "(`pipeline convert --force`)"
        )
    choice = choose(template, config.ollama.template, carried=meant)
    if choice.way == "refused":
        raise refusal(choice)
    for warning in choice.warnings:
        task.warn(warning)
    summary = task.layout.data_summary  # which an adapter from elsewhere may come without
    needed = json.loads(summary.read_text(encoding="utf-8"))["context_needed"] if summary.is_file() else 0
    final = task.layout.modelfile(task.variant).parent
    if choice.jinja is not None:
        require_space(task.output, gguf.stat().st_size, "the GGUF file with its chat template guarded")
        write_with_template(gguf, task.output / gguf.name, choice.jinja)
        path = gguf.name
    else:
        path = Path(os.path.relpath(gguf, final)).as_posix()
    adapter = next(iter(task.layout.served_adapters), None)
    served = ServedModel(
        gguf=path,
        adapter=Path(os.path.relpath(adapter, final)).as_posix() if adapter else "",
        template=choice.go_template or "",
        system=served_system(config),
        parameters=parameters(model, template, config.ollama.parameters, needed),
        licenses=(config.ollama.license,) if config.ollama.license else (),
        requires=choice.requires or "",
    )
    not_written = write(
        served, task.new(task.layout.modelfile(task.variant)), task.new(task.layout.create_request(task.variant))
    )
    if not_written:
        task.warn(f"{not_written}. `pipeline deploy` sends it through the JSON API, which carries everything")
    reports = {
        way: {
            "summary": report.summary,
            "outcomes": {outcome.name: outcome.status for outcome in report.outcomes},
            "first_difference": explain(difference) if (difference := report.first_difference()) else None,
        }
        for way, report in choice.reports.items()
    }
    record = {"way": choice.way, "reason": choice.reason, "suite": reports}
    task.new(task.layout.template_choice(task.variant)).write_text(
        json.dumps(record, indent=2) + "\n", encoding="utf-8"
    )
    return {
        "way": choice.way,
        "reason": choice.reason,
        "template_characters": len(served.template),
        "parameters": served.parameters,
        "modelfile": not not_written,
        "suite": {way: report.summary for way, report in choice.reports.items()},
    }


STAGE = Stage(
    name="modelfile",
    summary="Write the Modelfile, with a template that renders the trained prompt.",
    run=main,
    # The length of the trained rows, the merged model's tokenizer, the one GGUF file, and an adapter beside it.
    needs=lambda variant: ("data", "merge", "convert", f"quantize/{variant}"),
    reads={"data": ("data.json",), "convert": ("adapter.gguf",)},
    settings=("ollama.system", "ollama.template", "ollama.parameters", "ollama.license", "data.system"),
    files=files,
    libraries=("transformers", "tokenizers", "jinja2"),
    programs=("llama.cpp", "ollama"),
    variants=lambda config: config.export.quant,
    figures=("way", "suite"),
    judged=True,
)
