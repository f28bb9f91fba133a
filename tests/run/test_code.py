"""The code of a stage: what runs is part of it, what a person reads or sees is not. Tried on a copy of the program."""

import re
import shutil
from pathlib import Path

import pytest

import pipeline
from pipeline import config
from pipeline.run.code import NO_PART, PART, code_in, code_of
from pipeline.stages import modelfile

STAGE = "pipeline.stages.train"


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """The folder of a copy of the program."""
    shutil.copytree(Path(pipeline.__file__).parent, tmp_path / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def replaced(program: Path, file: str, old: str, new: str) -> None:
    path = program / "pipeline" / file
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def test_it_is_the_modules_that_a_stage_imports() -> None:
    import pipeline.stages.train

    code = code_of(pipeline.stages.train.__name__)
    assert {STAGE, "pipeline.prompt.tokenizer", "pipeline.model.base"} <= code.keys()
    assert not {name for name in code if name in NO_PART or name.startswith("pipeline.setup")} - PART.keys()
    assert "pipeline.stages.merge" not in code


def test_libraries_beside_an_installed_program_are_no_part(program: Path) -> None:
    """A wheel's lie in the same folder; they count by their versions."""
    (program / "numpy.py").write_text("import pipeline.stages.merge\n")
    assert {name.partition(".")[0] for name in code_in(program, STAGE)} == {"pipeline"}
    assert code_in(program, STAGE) == code_of("pipeline.stages.train")


def test_no_rule_that_can_change_a_result_is_left_out() -> None:
    """The configuration's own properties say which files are meant, and these count by their content."""
    sections = [kind for kind in vars(config).values() if isinstance(kind, type) and issubclass(kind, config.Section)]
    own = {name for kind in sections for name, member in vars(kind).items() if isinstance(member, property)}
    assert own == {"called", "given_adapters", "own_template", "run_folder", "tests"}
    assert PART.keys() <= code_of(modelfile.__name__).keys()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (r"\A", "# A remark.\n"),
        (r"\n\n", "\n\n\n"),
        (r"\(\n", "(  # a remark\n\n"),
        (r'(?m)^( *)"""(?=[A-Z])', r'\1"""In other words: '),
        (r"(?m)^if TYPE_CHECKING:\n", "if TYPE_CHECKING:\n    import decimal\n"),
    ],
)
def test_comments_docstrings_layout_and_types_are_no_part(program: Path, old: str, new: str) -> None:
    before, changed = code_in(program, STAGE), 0
    for path in program.rglob("*.py"):
        text, count = re.subn(old, new, path.read_text(encoding="utf-8"))
        path.write_text(text, encoding="utf-8")
        changed += count
    assert changed > 10
    assert code_in(program, STAGE) == before


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("plots.py", "linewidth=1.8", "linewidth=2.5"),
        ("console.py", "bar_width=30", "bar_width=40"),
        ("model/card.py", "trim_blocks=True", "trim_blocks=False"),
        ("setup/build.py", "import", "import json\nimport"),
        ("stages/train.py", "Train the LoRA adapter with", "Train with"),
        ("stages/merge.py", "def main", "def other() -> None: ...\n\n\ndef main"),
    ],
)
def test_looks_set_up_and_other_stages_are_no_part(program: Path, file: str, old: str, new: str) -> None:
    before = code_in(program, STAGE)
    replaced(program, file, old, new)
    assert code_in(program, STAGE) == before


@pytest.mark.parametrize(
    ("stage", "file", "old", "new"),
    [
        ("data", "prompt/labels.py", "IGNORED = -100", "IGNORED = -101"),
        ("train", "stages/train.py", "run=main", "run=other"),
        ("train", "stages/train.py", "steps * settings.warmup", "steps + settings.warmup"),
    ],
)
def test_what_runs_is_part(program: Path, stage: str, file: str, old: str, new: str) -> None:
    module = f"pipeline.stages.{stage}"
    before = code_in(program, module)
    replaced(program, file, old, new)
    after = code_in(program, module)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert changed == {f"pipeline.{file.removesuffix('.py').replace('/', '.')}"}
