"""Where a run keeps what: every path in its folder has its name here, and is spelled nowhere else."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pipeline.errors import PipelineError
from pipeline.resources import without_links


@dataclass(frozen=True)
class Layout:
    """The paths of a run.

    Attributes:
        run: the run's folder.
    """

    run: Path

    @staticmethod
    def of_adapter(folder: Path) -> Layout | None:
        """The run in whose folder an adapter lies where training leaves it; None for one that lies elsewhere."""
        adapter = without_links(folder)
        layout = Layout(adapter.parent.parent)
        return layout if layout.adapter == adapter else None

    def node(self, stage: str, variant: str = "") -> Path:
        """What a stage, or one of its variants, leaves."""
        return self.run / stage / variant

    # The run as a whole.

    @property
    def manifest(self) -> Path:
        """What each stage was made from, and what it left."""
        return self.run / "manifest.json"

    @property
    def config(self) -> Path:
        """The configuration with every value set."""
        return self.run / "config.json"

    @property
    def standard_input(self) -> Path | None:
        """The rows that came on standard input, in a file whose name says their kind; None where none came yet."""
        return next(iter(sorted(self.run.glob("standard-input.*"))), None)

    @property
    def events(self) -> Path:
        """What happened, one JSON object a line."""
        return self.run / "events.jsonl"

    def log(self, stage: str, variant: str = "") -> Path:
        """What libraries and programs printed in a stage."""
        return self.run / "logs" / f"{_flat(stage, variant)}.log"

    def server_log(self, rung: str) -> Path:
        """What llama-server said while a rung was asked."""
        return self.run / "logs" / f"llama-server-{rung}.log"

    @property
    def tracker(self) -> Path:
        """What an experiment tracker writes."""
        return self.run / "logs" / "tracker"

    def partial(self, stage: str, variant: str = "") -> Path:
        """Where a stage works until it is done."""
        return self.run / ".partial" / _flat(stage, variant)

    # data

    @property
    def data(self) -> Path:
        """The checked conversations and their tokens."""
        return self.node("data")

    def rows(self, name: str) -> Path:
        """The conversations of a set: train, validation or test."""
        return self.data / f"{name}.jsonl"

    @property
    def test_sets(self) -> Path:
        """How many of the test rows are whose, where adapters that are combined have some of their own."""
        return self.data / "test-sets.json"

    def tokens(self, name: str) -> Path:
        """The token ids and labels of a set: train or validation."""
        return self.data / f"{name}.tokens.arrow"

    @property
    def data_summary(self) -> Path:
        """The figures of the data, with counts and places of what was found, and examples."""
        return self.data / "data.json"

    @property
    def findings(self) -> Path:
        """Every finding in the data with its place."""
        return self.data / "findings.jsonl"

    # train

    @property
    def adapter(self) -> Path:
        """The LoRA adapter, with the tokenizer that was trained."""
        return self.node("train") / "adapter"

    @property
    def batches(self) -> Path:
        """Every batch as the trainer used it."""
        return self.node("train") / "batches.jsonl"

    @property
    def history(self) -> Path:
        """The losses by step."""
        return self.node("train") / "history.json"

    @property
    def loss_curve(self) -> Path:
        """The losses by step, drawn."""
        return self.node("train") / "loss.svg"

    # merge

    @property
    def merged_model(self) -> Path:
        """The merged model, a Hugging Face folder."""
        return self.node("merge") / "model"

    # The weights of that folder; with `merge.keep = false` convert has these removed, and not the rest.
    MERGED_WEIGHTS: ClassVar = "model/*.safetensors*"

    @property
    def merge_base(self) -> Path:
        """Which weights the adapter was merged into, and why."""
        return self.node("merge") / "base.json"

    # convert, quantize

    def converted(self, kind: str) -> Path:
        """The GGUF file of a 16-bit type."""
        return self.node("convert") / f"model-{kind}.gguf"

    def gguf_16bit(self) -> Path:
        """The one 16-bit GGUF file that is there.

        Raises:
            PipelineError: there is none, or more than one.
        """
        folder = self.node("convert")
        files = sorted({*folder.glob("*.gguf")} - {self.gguf_adapter})
        if len(files) != 1:
            found = ", ".join(file.name for file in files) or "none"
            raise PipelineError(f"{folder} should hold one GGUF file and holds {found}: run `pipeline convert` again")
        return files[0]

    @property
    def proof(self) -> Path:
        """What was proven of the merged weights before they were removed; none where they stay."""
        return self.node("convert") / "proof.json"

    @property
    def gguf_adapter(self) -> Path:
        """The adapter as a GGUF file, where the files above are the base's."""
        return self.node("convert") / "adapter.gguf"

    @property
    def served_adapters(self) -> tuple[Path, ...]:
        """The adapter that the GGUF files are served with; none where they are the merged model's."""
        return (self.gguf_adapter,) if self.gguf_adapter.is_file() else ()

    def quantized(self, kind: str) -> Path:
        """The GGUF file of a quantization type."""
        return self.node("quantize", kind) / f"model-{kind}.gguf"

    # modelfile

    def modelfile(self, kind: str) -> Path:
        """The Modelfile for a quantization type."""
        return self.node("modelfile", kind) / "Modelfile"

    def create_request(self, kind: str) -> Path:
        """What is sent to Ollama to create the model of a quantization type."""
        return self.node("modelfile", kind) / "create.json"

    def template_choice(self, kind: str) -> Path:
        """Which way of rendering was chosen, and what was tried."""
        return self.node("modelfile", kind) / "template.json"

    # deploy

    @property
    def deployment(self) -> Path:
        """What was deployed where, and its proof."""
        return self.node("deploy") / "deploy.json"

    @property
    def ollama_models(self) -> Path:
        """The models of an Ollama of our own."""
        return self.run / "ollama"

    @property
    def published(self) -> Path:
        """The digests that the run gave, or was about to give, each name in Ollama."""
        return self.run / "ollama-published.json"

    # evaluate

    def answers(self, rung: str) -> Path:
        """The answers at a rung."""
        return self.node("evaluate", rung) / "answers.jsonl"

    @property
    def evaluation(self) -> Path:
        """The answers at every rung, side by side."""
        return self.node("evaluate", "table") / "evaluation.json"

    # preflight, verify, report

    @property
    def preflight_json(self) -> Path:
        """What was found of the untouched base and the machine."""
        return self.node("preflight") / "preflight.json"

    @property
    def verify_json(self) -> Path:
        """The verdicts."""
        return self.node("verify") / "verify.json"

    @property
    def report(self) -> Path:
        """The run's page."""
        return self.node("report") / "report.html"

    @property
    def ladder(self) -> Path:
        """The chart of the rungs."""
        return self.node("report") / "ladder.svg"


def _flat(stage: str, variant: str) -> str:
    """A node's name as that of one file or folder."""
    return f"{stage}__{variant}" if variant else stage
