"""report: one self-contained page. What was trained, what it cost, and what was lost where.

Every figure comes from the run's folder; nothing is measured here. All text is escaped, and the two charts are images,
so that nothing in the run can become part of the page's markup.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.figures import duration, main_figures, peak_memory, size, written
from pipeline.plots import ladder
from pipeline.resources import resource
from pipeline.run.folder import read_manifest
from pipeline.run.stage import EVERY_JUDGED_STAGE, Stage, Task
from pipeline.stages import all_stages
from pipeline.verify.rungs import BASE

EXAMPLES = 8
LONGEST = 400  # characters of a question or an answer that the page shows


def main(task: Task) -> dict[str, Any]:
    """Write report.html."""
    from jinja2 import Environment, StrictUndefined

    manifest = read_manifest(task.run)
    # A type that the configuration no longer names is kept, and is no part of the result.
    # What a former page cost is none of it either.
    names = [name for name in manifest["nodes"] if name in manifest["stages"] and name != "report"]
    stages = {name: manifest["stages"][name] for name in names}
    figures = {stage.name: stage.figures for stage in all_stages(task.config)}
    evaluation = _read(task.layout.evaluation) if "evaluate/table" in stages else {}  # left by a run that had test data
    deployed = _read(task.layout.deployment)
    proof = _read(task.layout.verify_json)
    served = deployed["models"][0]["name"] if deployed.get("deployed") else None
    scores = [
        {"rung": rung, "exact_match": score["exact_match"], "interval": score["interval_95"]}
        for rung, score in evaluation.get("rungs", {}).items()
    ]

    environment = Environment(undefined=StrictUndefined, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(resource("templates/report.html.j2").read_text(encoding="utf-8"))
    page = template.render(
        name=task.config.ollama.name,
        base=task.config.model.base,
        rank=stages["train"]["figures"].get("rank", task.config.lora.r),
        types=task.config.export.quant,
        served=served,
        cards=_cards(task.config, stages, evaluation),
        scores=scores,
        asked=len(evaluation.get("rows", ())),
        metric=task.config.eval.metric,
        adapters=evaluation.get("adapters", {}),
        proof=_proof(proof),
        loss_chart=_image(task.layout.loss_curve) if task.layout.loss_curve.is_file() else "",
        ladder_chart=_ladder(task, evaluation, proof),
        examples=_examples(evaluation),
        files=_files(stages),
        stages=[_stage(name, record, figures) for name, record in stages.items()],
        warnings=[(name, warning) for name, record in stages.items() for warning in record["warnings"]],
        made_with=_made_with(manifest),
        configuration=_configuration(manifest),
    )
    task.new(task.layout.report).write_text(page, encoding="utf-8")
    return {"bytes": len(page.encode())}


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


def _proof(proof: dict[str, Any]) -> dict[str, Any]:
    """verify.json with its figures written for a person."""
    checks = [
        check
        | {
            "figure": written("", check["figure"]),
            "threshold": written("", check["threshold"]),
        }
        for check in proof.get("checks", ())
    ]
    return proof | {"checks": checks} if proof else {}


def _ladder(task: Task, evaluation: dict[str, Any], proof: dict[str, Any]) -> str:
    """The chart of right answers and divergences; nothing where no answers were judged."""
    rungs = evaluation.get("rungs", {})
    if not rungs:
        return ""
    answers = {name: (rung["exact_match"], *rung["interval_95"]) for name, rung in rungs.items()}
    path = task.new(task.layout.ladder)
    ladder(answers, proof.get("divergences", {}), path)
    return _image(path)


def _image(svg: Path) -> str:
    """A picture as the address of an image, which holds all of it."""
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.read_bytes()).decode()}"


def _cards(config: Config, stages: dict[str, Any], evaluation: dict[str, Any]) -> list[dict[str, str]]:
    cards = []
    rungs = evaluation.get("rungs", {})
    if BASE in rungs and len(rungs) > 1:
        last = list(rungs)[-1]
        cards.append(
            {
                "value": f"{rungs[BASE]['exact_match']:.3f} → {rungs[last]['exact_match']:.3f}",
                "meaning": f"exact match, base to {last}",
            }
        )
    train = stages["train"]["figures"]
    if "validation_loss_first" in train:
        cards.append(
            {
                "value": f"{train['validation_loss_first']:.2f} → {train['validation_loss_kept']:.3f}",
                "meaning": f"validation loss; step {train['kept_step']} of {train['steps']} is kept",
            }
        )
    quantized = stages[f"quantize/{config.export.quant[0]}"]["figures"]
    cards.append({"value": size(quantized["bytes"]), "meaning": f"{config.export.quant[0]} file"})
    cards.append({"value": duration(sum(record["seconds"] for record in stages.values())), "meaning": "all stages"})
    peak = max(record["peak_memory_bytes"] for record in stages.values())
    cards.append({"value": size(peak), "meaning": "peak memory"})
    if "peak_gpu_bytes" in train:
        cards.append({"value": size(train["peak_gpu_bytes"]), "meaning": "peak GPU memory"})
    return cards


def _examples(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """The first rows, and first of all those that the last rung got wrong: they are what one wants to see."""
    rows = evaluation.get("rows", [])
    wrong = [row for row in rows if row["correct"] and list(row["correct"].values())[-1] is False]
    right = [row for row in rows if row not in wrong]
    chosen = wrong[: EXAMPLES // 2]
    chosen += right[: EXAMPLES - len(chosen)]
    return [
        {
            "question": _shortened(row["messages"][-1]["content"]),
            "expected": _shortened(row["expected"]),
            "answers": [(rung, _shortened(answer), row["correct"][rung]) for rung, answer in row["answers"].items()],
        }
        for row in chosen
    ]


def _shortened(text: str) -> str:
    more = len(text) - LONGEST
    return f"{text[:LONGEST]}… ({more:,} more characters)" if more > 0 else text


def _files(stages: dict[str, Any]) -> list[dict[str, str]]:
    kinds = (".gguf", ".safetensors")
    return [
        {"name": name, "size": "removed" if file.get("removed") else size(file["size"]), "sha256": file["sha256"]}
        for record in stages.values()
        for name, file in record["outputs"].items()
        if name.endswith(kinds) or name.endswith("Modelfile")
    ]


def _stage(name: str, record: dict[str, Any], figures: dict[str, tuple[str, ...]]) -> dict[str, str]:
    return {
        "name": name,
        "time": duration(record["seconds"]),
        "memory": peak_memory(record),
        "figures": main_figures(figures[name.partition("/")[0]], record["figures"]),
    }


def _made_with(manifest: dict[str, Any]) -> list[tuple[str, Any]]:
    machine = manifest["machine"]
    rows: list[tuple[str, Any]] = [
        ("machine", f"{machine['system']}, {machine['cores']} cores, {size(machine['memory_bytes'])} memory")
    ]
    rows += [(name, version) for name, version in manifest["versions"].items() if version]
    for name, pin in manifest["pins"].items():
        rows.append((f"{name} (pin)", " ".join(str(value) for value in pin.values())))
    return rows


def _configuration(manifest: dict[str, Any]) -> list[tuple[str, Any, str]]:
    values, sources = manifest["config"]["values"], manifest["config"]["sources"]
    rows = []
    for key, source in sources.items():
        section, _, name = key.rpartition(".")
        rows.append((key, json.dumps(values[section][name] if section else values[name], ensure_ascii=False), source))
    return rows


STAGE = Stage(
    name="report",
    summary="Write the run's page: report.html.",
    run=main,
    needs=(EVERY_JUDGED_STAGE, "verify"),
    # The page has a table of the whole configuration.
    settings=tuple(section for section in Config.model_fields if section != "run"),
    files=lambda config, _: [resource("templates/report.html.j2")],
)
