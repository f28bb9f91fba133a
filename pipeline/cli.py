"""The command line: one command a verb. Nothing heavy is imported until a command runs."""

from __future__ import annotations

import errno
import importlib
import inspect
import json
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline import __version__, stages
from pipeline.errors import PipelineError, full_disk
from pipeline.run.layout import Layout
from pipeline.trainings import COMBINED

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.run.graph import Graph

# Commands that stand in modules of their own: name -> (module, attribute, help in one line).
_ELSEWHERE = {
    "setup": (
        "pipeline.setup.command",
        "setup",
        "Install the locked Python libraries, and build llama.cpp and Ollama.",
    ),
    "doctor": ("pipeline.doctor", "doctor", "Show what this machine has and lacks, and what to do about it."),
    "init": ("pipeline.init", "init", "Write a pipeline.toml and sample rows to start from."),
    "plan": (
        "pipeline.plan",
        "plan",
        "Show what every stage will need of memory, disk and time, and whether it fits.",
    ),
    "template": (
        "pipeline.ollama.commands",
        "template",
        "Show how a model's chat template reaches Ollama, and prove it.",
    ),
    "chat": ("pipeline.ollama.commands", "chat", "Talk to the result: in Ollama, or at another rung."),
    "serve": ("pipeline.serve", "serve", "Serve several adapters on one base, chosen by the model's name."),
}
# The order of the help page is the order of the work.
_ORDER = (
    *("setup", "doctor", "init", "plan", "run", "status", "config", *stages.NAMES),
    *("export", "template", "chat", "serve"),
)


class Commands(click.Group):
    """A group that imports a command's module only to run it, and ends every error in one message."""

    def list_commands(self, context: click.Context) -> list[str]:
        return [name for name in _ORDER if name in self.commands or name in _ELSEWHERE]

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name in _ELSEWHERE:
            module, attribute, _ = _ELSEWHERE[name]
            command = getattr(importlib.import_module(module), attribute)
            assert isinstance(command, click.Command)
            return command
        return super().get_command(context, name)

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [
            (name, _ELSEWHERE[name][2] if name in _ELSEWHERE else self.commands[name].get_short_help_str(90))
            for name in self.list_commands(context)
        ]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def resolve_command(self, context: click.Context, args: list[str]) -> Any:
        try:
            return super().resolve_command(context, args)
        except click.UsageError as error:
            import difflib

            close = difflib.get_close_matches(args[0], self.list_commands(context), 1)
            hint = f"Did you mean '{close[0]}'?" if close else "`pipeline --help` lists the commands."
            raise click.UsageError(f"No such command '{args[0]}'. {hint}", context) from error

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except PipelineError as error:
            click.echo(f"error: {error}", err=True)
            context.exit(error.exit_status)
        except KeyboardInterrupt:
            click.echo("interrupted; the same command continues where this one stopped", err=True)
            context.exit(130)
        except BrokenPipeError:
            context.exit(0)
        except OSError as error:
            what = "no space left on the disk; free some and give the same command again"
            click.echo(f"error: {what if full_disk(error) else error}", err=True)
            context.exit(2 if error.errno == errno.ENAMETOOLONG else 1)  # only who gives a command gives such a name
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] == "pipeline" or context.invoked_subcommand == "setup":
                raise  # a fault of this program; or what set-up itself mends
            click.echo(f"error: the library {error.name} is missing: run `pipeline setup`", err=True)
            context.exit(1)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="pipeline")
def main() -> None:
    """Fine-tune a language model with LoRA, and serve in Ollama exactly what was trained.

    A run is described by a pipeline.toml, which `pipeline init` writes; its results are in the run's folder beside it.

    Exit status: 0 done, 1 the run failed, 2 a mistake in what was given.
    """


training_option = click.option(
    "--training",
    default="",
    metavar="NAME",
    help='One of the [[trainings]] of CONFIG, or "combined", instead of each in turn.',
)


def configured(command: Callable[..., None]) -> Callable[..., None]:
    """The argument and the options of every command that works on a configuration."""
    command = training_option(command)
    command = click.option(
        "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a value, e.g. train.epochs=2."
    )(command)
    words = "A pipeline.toml, or its folder; without it, the one in this folder."
    return click.argument("config", type=click.Path(path_type=Path), default="pipeline.toml", help=words)(command)


def each(
    path: Path,
    overrides: Sequence[str],
    training: str,
    *,
    gpu_memory: int | None = None,
    reads_input: bool = False,
    one: bool = False,
) -> Iterator[tuple[Config, dict[str, str]]]:
    """As `resolved`, of every one of a configuration's trainings in turn, or of the one that is named.

    A mistake in the last of them is found before anything is done with the first. When its turn comes, each is resolved
    again: the combination has the questions that are found in the runs of the others. Where `one` document is printed,
    one of them has to be named.
    """
    from pipeline.console import say
    from pipeline.errors import UserError

    names = (training,) if training else _trainings(path) or ("",)
    _share_launcher()
    if one and len(names) > 1:
        raise UserError(f"{path}: it has several trainings, and one is printed: --training {', '.join(names)}")
    for name in names[1:]:
        resolved(path, overrides, name, gpu_memory=gpu_memory, reads_input=reads_input)
    for name in names:
        if len(names) > 1:
            say(f"training {name}" if name != COMBINED else "the trainings, combined")
        yield resolved(path, overrides, name, gpu_memory=gpu_memory, reads_input=reads_input)


def _trainings(path: Path) -> tuple[str, ...]:
    from pipeline.toml_file import trainings_of

    return trainings_of(path / "pipeline.toml" if path.is_dir() else path)


def resolved(
    path: Path,
    overrides: Sequence[str],
    training: str = "",
    *,
    gpu_memory: int | None = None,
    reads_input: bool = False,
) -> tuple[Config, dict[str, str]]:
    """The configuration with every default filled in, and where each value came from.

    Args:
        path: a pipeline.toml, or its folder.
        overrides: "key=value" each.
        training: one of the configuration's trainings; "" where it has none.
        gpu_memory: the defaults are those for a card of so many bytes, 0: for a machine without one; None: for the
            machine that the run began on, or this one.
        reads_input: what comes on standard input is data, where the configuration says so.
    """
    from pipeline.defaults import Facts, resolve
    from pipeline.model.facts import facts
    from pipeline.run.folder import read_manifest
    from pipeline.run.provenance import first_machine
    from pipeline.run.standard_input import with_standard_input
    from pipeline.setup import gpu
    from pipeline.toml_file import load_config

    if path.is_dir():
        path = path / "pipeline.toml"
    config, given = load_config(path, overrides, training)
    config = with_standard_input(config, read=reads_input)
    parameters, context = facts(config.model.base, config.model.revision)
    first = first_machine(read_manifest(config.run_folder), config.model)
    if gpu_memory is not None:
        return resolve(config, given, Facts(parameters, context, gpu_memory or None))
    memory = first["gpu_memory_bytes"] if first else gpu.memory()
    return resolve(config, given, Facts(parameters, context, memory, kept=first is not None))


def _graph(config: Config) -> Graph:
    """The program's own stages."""
    from pipeline.run.graph import Graph

    return Graph(stages.all_stages(config))


def bring_up_to_date(config: Config, sources: dict[str, str], names: Sequence[str], force: bool = False) -> None:
    """Run these stages, and all that they need, where they are not up to date."""
    graph = _graph(config)
    targets = [node for name in names for node in graph.nodes_of(name, config)]
    if not targets:
        from pipeline.console import say

        say(f"{', '.join(names)}: nothing to do under this configuration")
    graph.run(config, sources, targets, force=force, launcher=click.get_current_context().obj)


def _share_launcher() -> None:
    """Have one launcher, the context's object, start all stages of this command; whoever calls it may give theirs."""
    from pipeline.run.launcher import Launcher

    context = click.get_current_context()
    if context.obj is None:
        context.obj = context.with_resource(closing(Launcher()))


@main.command(epilog="Example: pipeline run my/pipeline.toml --set train.epochs=2 --until merge")
@configured
@click.option("--until", metavar="STAGE", help="Stop after this stage.")
@click.option("--no-preflight", is_flag=True, help="Do not try the untouched base first.")
def run(config: Path, overrides: tuple[str, ...], training: str, until: str | None, no_preflight: bool) -> None:
    """Run every stage that is not up to date.

    After an interruption the same command goes on where it was. Exit status 1 if a stage or a check of `verify` failed.
    """
    from pipeline.errors import UserError

    if until is not None and until not in stages.NAMES:
        raise UserError(f"--until {until}: no such stage; one of {', '.join(stages.NAMES)}")
    names = stages.NAMES[: stages.NAMES.index(until) + 1] if until else stages.NAMES
    wanted = [name for name in names if not (no_preflight and name == "preflight")]
    _share_launcher()
    if not training and "train" in names:
        every = [resolved(config, overrides, name, reads_input=True) for name in _trainings(config)]
        for settings, sources in every:
            if settings.data.train:  # what is wrong with rows of the last one is said before the first is trained
                bring_up_to_date(settings, sources, ["data"])
    for settings, sources in each(config, overrides, training, reads_input=True):
        bring_up_to_date(settings, sources, wanted)
        _say_where(settings)
        if "verify" in names:
            _say_proof(settings)


def _say_proof(config: Config) -> None:
    """How many checks passed, those that did not, and the end of the command if one failed."""
    from pipeline.console import results, say
    from pipeline.verify.result import FAIL, NOT_RUN, PASS, require_passed, summary, table

    content = json.loads(Layout(config.run_folder).verify_json.read_text(encoding="utf-8"))
    say(f"verify: {summary(content)}")
    if content["counts"][PASS] < len(content["checks"]):
        results().print(table(content, (FAIL, NOT_RUN)))
    require_passed(content)


def _say_where(config: Config) -> None:
    from pipeline.console import say

    page = Layout(config.run_folder).report
    say(f"results: {page if page.exists() else config.run_folder}")


@main.command(epilog="Example: pipeline export my/pipeline.toml --quant q4_k_m --quant q8_0")
@configured
@click.option("--quant", multiple=True, metavar="TYPE", help="Quantization type; may be repeated.")
@click.option(
    "--as",
    "form",
    type=click.Choice(["merged", "adapter"]),
    help="Files of the merged model, or of the base with the adapter as a file of its own beside them.",
)
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="A LoRA adapter that was trained elsewhere, instead of CONFIG. Several are combined.",
)
@click.option(
    "--weight",
    "weights",
    multiple=True,
    type=float,
    metavar="NUMBER",
    help="With several --adapter: what each counts, in their order.",
)
@click.option("--combine", metavar="WAY", help="With several --adapter: how, as adapter.combine.")
@click.option("--density", type=float, metavar="NUMBER", help="With --combine: the share of the values that is kept.")
@click.option("--base", metavar="MODEL", help="With --adapter: its base; without it, the one that it names.")
@click.option("--template", metavar="TEMPLATE", help="With --adapter: the chat template that it was trained with.")
@click.option(
    "--data",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="With --adapter: test questions, for all or, repeated, for each.",
)
def export(
    config: Path,
    overrides: tuple[str, ...],
    training: str,
    quant: tuple[str, ...],
    form: str | None,
    adapters: tuple[Path, ...],
    weights: tuple[float, ...],
    combine: str | None,
    density: float | None,
    base: str | None,
    template: str | None,
    data: tuple[Path, ...],
) -> None:
    """Make the GGUF files and their Modelfiles from the trained adapter.

    The commands that create each model in an Ollama by hand are shown at the end. With --adapter a configuration is
    written into a new folder here, which every other command takes.
    """
    from pipeline.errors import UserError

    if adapters:
        from pipeline.adapter_project import write_project

        if click.get_current_context().get_parameter_source("config") is not click.core.ParameterSource.DEFAULT:
            raise UserError(f"--adapter stands in the place of CONFIG: give it without {config}")
        config = write_project(
            adapters, base, template, data, quant, form, weights=weights, combine=combine, density=density
        )
    elif base or template or data or weights or combine or density:
        raise UserError(
            "--base, --template, --data, --weight, --combine and --density belong to --adapter, an adapter's folder"
        )
    if quant:
        overrides = (*overrides, f"export.quant={json.dumps(list(quant))}")
    if form:
        overrides = (*overrides, f"export.as={form}")
    for settings, sources in each(config, overrides, training):
        bring_up_to_date(settings, sources, ["modelfile"])
        _say_exported(settings)


def _say_exported(settings: Config) -> None:
    from pipeline.console import say
    from pipeline.figures import size
    from pipeline.ollama.target import names_of

    for kind, name in names_of(settings.ollama.name, settings.export.quant).items():
        modelfile = Layout(settings.run_folder).modelfile(kind)
        if modelfile.is_file():  # where none can carry the model, the stage has said so
            say(f"ollama create {name} -f {shlex.quote(str(modelfile))}")
    for adapter in Layout(settings.run_folder).served_adapters:
        say(f"{size(adapter.stat().st_size)} each, and the base's file, which they share with every model on it")


@main.command(epilog="Example: pipeline status my/pipeline.toml")
@configured
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(config: Path, overrides: tuple[str, ...], training: str, as_json: bool) -> None:
    """Show every stage, its state and its main figures.

    A stage is fresh, stale (and why) or missing. CONFIG may also be a run's folder.
    """
    if Layout(config).config.is_file():
        from pipeline.toml_file import read_run

        _show_status(read_run(config.absolute()), as_json)
        return
    for settings, _ in each(config, overrides, training, one=as_json):
        _show_status(settings, as_json)


def _show_status(settings: Config, as_json: bool) -> None:
    rows = _graph(settings).status(settings)
    if as_json:
        click.echo(json.dumps({"run": str(settings.run_folder), "stages": rows}, indent=1, ensure_ascii=False))
        return
    from rich.table import Table

    from pipeline.console import results
    from pipeline.figures import duration, main_figures, peak_memory

    figures = {stage.name: stage.figures for stage in stages.all_stages(settings)}
    table = Table("stage", "state", "time", "memory", "figures", title=str(settings.run_folder), title_justify="left")
    for row in rows:
        seconds = row["seconds"]
        table.add_row(
            row["stage"],
            row["state"] if row["reason"] is None or row["state"] == "missing" else f"{row['state']}: {row['reason']}",
            "" if seconds is None else duration(seconds),
            "" if seconds is None else peak_memory(row),
            main_figures(figures[row["stage"].partition("/")[0]], row["figures"]),
            style={"stale": "yellow", "missing": "dim"}.get(row["state"]),
        )
    results().print(table)


@main.command("config", epilog="Example: pipeline config my/pipeline.toml --set model.base=my-model-folder")
@configured
@click.option("--json", "as_json", is_flag=True, help="Print JSON: values, sources and meanings.")
def show_config(config: Path, overrides: tuple[str, ...], training: str, as_json: bool) -> None:
    """Print every key of the configuration: its value, meaning, and where the value came from.

    What is printed is a pipeline.toml itself.
    """
    for settings, sources in each(config, overrides, training, one=True):
        _show_config(settings, sources, as_json)


def _show_config(settings: Config, sources: dict[str, str], as_json: bool) -> None:
    from pipeline.config import meanings
    from pipeline.toml_file import as_comment, as_toml

    values, meaning = settings.model_dump(mode="json"), meanings()
    if as_json:
        document = {"values": values, "sources": sources, "meanings": meaning}
        click.echo(json.dumps(document, indent=1, ensure_ascii=False))
        return
    section = ""
    for key, place in sources.items():
        table, _, name = key.rpartition(".")
        if table != section:
            click.echo(f"\n[{table}]")
            section = table
        value = values[table][name] if table else values[name]
        line = f"# {name} = (not set)" if value is None else f"{name} = {as_toml(value)}"
        click.echo(f"{line:<40} {as_comment(f'{meaning[key]} [{place}]')}")


def stage_command(name: str, example: str) -> Callable[[Callable[..., None]], click.Command]:
    """Make a function the command of a stage; its help is the stage's summary and the function's docstring."""

    def decorate(function: Callable[..., None]) -> click.Command:
        text = f"{stages.summary(name)}\n\n{inspect.cleandoc(function.__doc__ or '')}"
        return main.command(name, help=text, epilog=f"Example: {example}")(configured(function))

    return decorate


force_option = click.option("--force", is_flag=True, help="Run it even when it is up to date.")


def _plain_stage_command(name: str) -> None:
    @stage_command(name, f"pipeline {name} my/pipeline.toml")
    @force_option
    def command(config: Path, overrides: tuple[str, ...], training: str, force: bool) -> None:
        """What it needs from earlier stages is brought up to date first."""
        for settings, sources in each(config, overrides, training):
            bring_up_to_date(settings, sources, [name], force)


@stage_command("preflight", "pipeline preflight my/pipeline.toml")
@click.option("--json", "as_json", is_flag=True, help="Print preflight.json.")
def preflight(config: Path, overrides: tuple[str, ...], training: str, as_json: bool) -> None:
    """The base is converted, quantized, served and verified; disk, memory and versions are looked at, every time.
    `pipeline run` does this first, once. Exit status 2 if something would fail.
    """
    from pipeline.console import say

    for settings, sources in each(config, overrides, training, one=as_json):
        if missing := [adapter.path for adapter in settings.adapters if adapter.path and not adapter.path.is_dir()]:
            say(f"{missing[0]}: is not trained yet: what is made of it is looked at then")
            continue
        bring_up_to_date(settings, sources, ["preflight"], force=True)
        content = json.loads(Layout(settings.run_folder).preflight_json.read_text(encoding="utf-8"))
        _print_checks(content, as_json)


def _print_checks(content: dict[str, Any], as_json: bool) -> None:
    from pipeline.verify.folders import show

    if as_json:
        click.echo(json.dumps(content, indent=1, ensure_ascii=False))
    else:
        show(content)


@stage_command("data", "pipeline data my/pipeline.toml --show 3")
@click.option("--show", type=click.IntRange(min=1), metavar="N", help="Print the first rows as the model sees them.")
@click.option("--ids", is_flag=True, help="With --show: every token with its id.")
@force_option
def data(config: Path, overrides: tuple[str, ...], training: str, show: int | None, ids: bool, force: bool) -> None:
    """What stands in brackets is trained, and nothing else. What was found in the rows, with its place, is in
    data/findings.jsonl of the run's folder.
    """
    from pipeline.errors import UserError

    if ids and show is None:
        raise UserError("--ids goes with --show, e.g. --show 3 --ids")
    for settings, sources in each(config, overrides, training, reads_input=True):
        bring_up_to_date(settings, sources, ["data"], force)
        if show is not None:
            _show_rows(settings, show, ids)


def _show_rows(config: Config, count: int, ids: bool) -> None:
    from pipeline.model.trained_tokenizer import trained_tokenizer
    from pipeline.prompt.shown import show

    tokenizer, _ = trained_tokenizer(config)
    show(tokenizer, Layout(config.run_folder).tokens("train"), count, ids=ids)


@stage_command("deploy", "pipeline deploy my/pipeline.toml --host 127.0.0.1:11434 --name my-model --dry-run")
@click.option("--host", metavar="ADDRESS", help="A running Ollama, e.g. 127.0.0.1:11434.")
@click.option("--name", metavar="NAME", help="The model's name in Ollama.")
@click.option("--replace", is_flag=True, help="Replace a model of this name that this run did not make.")
@click.option("--dry-run", is_flag=True, help="Show what would be sent to Ollama, and send nothing.")
@force_option
def deploy(
    config: Path,
    overrides: tuple[str, ...],
    training: str,
    host: str | None,
    name: str | None,
    replace: bool,
    dry_run: bool,
    force: bool,
) -> None:
    """What it needs from earlier stages is brought up to date first."""
    given = {"host": host, "name": name}
    overrides = (*overrides, *(f"ollama.{key}={json.dumps(value)}" for key, value in given.items() if value))
    if replace:
        overrides = (*overrides, "ollama.replace=true")
    for settings, sources in each(config, overrides, training):
        if dry_run:
            bring_up_to_date(settings, sources, ["modelfile"])
            from pipeline.stages.deploy import preview

            click.echo("\n".join(preview(settings, settings.run_folder)))
        else:
            bring_up_to_date(settings, sources, ["deploy"], force)


@stage_command("verify", "pipeline verify --hf merged/ --gguf model-Q4_K_M.gguf")
@click.option("--hf", type=click.Path(path_type=Path), metavar="DIR", help="A Hugging Face folder, instead of CONFIG.")
@click.option("--gguf", type=click.Path(path_type=Path), metavar="FILE", help="The GGUF file that was made from it.")
@click.option("--ollama", metavar="NAME", help="A model in Ollama that was made from it; --gguf may then be left out.")
@click.option("--adapter", type=click.Path(path_type=Path), metavar="DIR", help="The adapter that was merged into it.")
@click.option("--base", metavar="MODEL", help="With --adapter: its base; without it, the one that it names.")
@click.option("--force", is_flag=True, help="Verify again, also where nothing has changed since.")
@click.option("--json", "as_json", is_flag=True, help="Print verify.json.")
@click.pass_context
def verify(
    context: click.Context,
    config: Path,
    overrides: tuple[str, ...],
    training: str,
    hf: Path | None,
    gguf: Path | None,
    ollama: str | None,
    adapter: Path | None,
    base: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """What is needed is brought up to date first. CONFIG may also be a run's folder, which is taken as it is. With --hf
    and --gguf, or --ollama, an export of another program is verified, by the checks that need no more than that; with
    --adapter its merge too.

    Exit status 1 if a check failed. A check that could not run is shown as such, never as passed.
    """
    from pipeline.verify.folders import Export, verify_export, verify_folder

    export = Export(hf, gguf, ollama, adapter, base)
    contents: Iterable[dict[str, Any]]
    if export.given:
        contents = [verify_export(export, stages.judged_stages(), overrides)]
    elif Layout(config).config.is_file():
        contents = [verify_folder(config.absolute(), stages.judged_stages(), overrides)]
    else:
        contents = (_verified(*run, force) for run in each(config, overrides, training, one=as_json))
    failed = False
    for content in contents:
        _print_checks(content, as_json)
        failed |= content["verdict"] != "pass"
    if failed:
        context.exit(1)


def _verified(settings: Config, sources: dict[str, str], force: bool) -> dict[str, Any]:
    bring_up_to_date(settings, sources, ["verify"], force)
    content: dict[str, Any] = json.loads(Layout(settings.run_folder).verify_json.read_text(encoding="utf-8"))
    return content


for _name in stages.NAMES:
    if _name not in main.commands:  # those above have options of their own
        _plain_stage_command(_name)

if __name__ == "__main__":
    sys.exit(main())
