"""Merge, convert and quantize, against the raw programs: `python -m benchmarks.export --parameters 0.1e9`.

The raw programs are PEFT's merge_and_unload, llama.cpp's convert_hf_to_gguf.py and its llama-quantize, one after the
other, on the same base and the same adapter. What no exporter can do without is llama-quantize alone.
"""

import contextlib
import shutil
import sys
import tempfile
from pathlib import Path

import click

from benchmarks.measure import Sample, child, medians, one_after_the_other, table
from benchmarks.program import COMMAND, project, recorded, run_of, sample_of, settings

STAGES = ("merge", "convert", "quantize")
EXPORT = "pipeline: merge, convert, quantize"
ROWS = [
    {"messages": [{"role": "user", "content": f"What is {n} + 1?"}, {"role": "assistant", "content": str(n + 1)}]}
    for n in range(4)
]
# One short step, only for an adapter to export. In 16 bits: else `merge` also measures which base the adapter fits
# better, which the raw programs do not.
ADAPTER = (
    "train.steps=1", "train.warmup=0", "train.batch=1", "train.accumulation=1", "train.max_length=128",
    "train.load_in_4bit=false",
)  # fmt: skip


@click.command()
@click.option("--parameters", type=float, default=0.1e9, show_default=True, help="The model's size.")
@click.option("--tokenizer", default="smollm2-135m-instruct", show_default=True, help="e.g. llama3_1.")
@click.option("--quant", default="q4_k_m", show_default=True, help="The quantization type.")
@click.option("--count", default=3, show_default=True, help="How often each side is run.")
@click.option("--folder", type=click.Path(path_type=Path), help="An empty folder with room for 12 bytes a parameter.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="A setting of the program.")
def main(
    parameters: float, tokenizer: str, quant: str, count: int, folder: Path | None, overrides: tuple[str, ...]
) -> None:
    """Measure both ways of an export, stage by stage and together."""
    with contextlib.ExitStack() as stack:
        folder = folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="benchmark-")))
        base = folder / "base"
        size = ("--parameters", str(parameters), "--tokenizer", tokenizer)
        child(sys.executable, "-m", "benchmarks.random_model", base, *size)
        config = project(folder / "project", str(base), ROWS)
        options = settings([*ADAPTER, f"export.quant={quant}", *overrides])
        child(*COMMAND, "train", config, *options)
        run = run_of(config)

        def program() -> dict[str, Sample]:
            for stage in STAGES:
                shutil.rmtree(run.node(stage), ignore_errors=True)
            whole = child(*COMMAND, "quantize", config, *options)
            nodes = ("merge", "convert", f"quantize/{quant}")
            stages = {f"pipeline: {node}": sample_of(recorded(config, node)) for node in nodes}
            return stages | {"pipeline: all": whole}

        def by_hand() -> dict[str, Sample]:
            merged, whole, quantized = folder / "merged", folder / "whole.gguf", folder / "quantized.gguf"
            steps = {
                "by hand: merge": _merge(base, run.adapter, merged),
                "by hand: convert": _convert(merged, whole),
                "llama-quantize alone": _quantize(whole, quantized, quant),
            }
            shutil.rmtree(merged)
            whole.unlink()
            quantized.unlink()
            return steps | {"by hand: all": one_after_the_other(list(steps.values()))}

        measured = medians(count, by_hand, program)
    nodes = ("merge", "convert", f"quantize/{quant}")
    measured[EXPORT] = one_after_the_other([measured[f"pipeline: {node}"] for node in nodes])
    against = {
        "pipeline: merge": "by hand: merge",
        "pipeline: convert": "by hand: convert",
        f"pipeline: quantize/{quant}": "llama-quantize alone",
        "pipeline: all": "by hand: all",
        "by hand: all": "llama-quantize alone",
        EXPORT: "llama-quantize alone",
    }
    print(table(measured, against))


def _merge(base: Path, adapter: Path, merged: Path) -> Sample:
    return child(sys.executable, "-m", "benchmarks.bare_merge", base, adapter, merged)


def _convert(merged: Path, whole: Path) -> Sample:
    from pipeline.llamacpp.programs import source_tree

    script = source_tree() / "convert_hf_to_gguf.py"
    return child(sys.executable, script, merged, "--outfile", whole, "--outtype", "bf16")


def _quantize(whole: Path, quantized: Path, quant: str) -> Sample:
    from pipeline.llamacpp.programs import program

    return child(program("llama-quantize"), whole, quantized, quant.upper())


if __name__ == "__main__":
    main()
