"""What is verified: the files of a chain, wherever they came from.

A run has all of them. An export made by another program has a Hugging Face folder and a GGUF file; the checks that need
more say that they did not run.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import Eval, Verify
from pipeline.data.questions import Question, asked
from pipeline.defaults import LONGEST_ROW
from pipeline.errors import PipelineError, UserError
from pipeline.llamacpp.gguf_file import GGUFInfo, inspect
from pipeline.model.base import as_trained
from pipeline.model.held_out import RowLoss, compared_tokens, first_tokens, mean_loss, read_held_out
from pipeline.model.sixteen_bit_type import sixteen_bit_type
from pipeline.model.weights_file import read_weights, weight_files
from pipeline.prompt.tokenizer import saved_tokenizer
from pipeline.run.layout import Layout
from pipeline.verify.reconvert import reconvert, unquantized_type
from pipeline.verify.rungs import GGUF_16BIT, made_by

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.prompt.template import ChatTemplate

ROWS = 500  # of a run, whose token ids are compared


@dataclass
class Artefacts:
    """The files of one chain.

    Attributes:
        settings: the thresholds.
        model: the merged model, a Hugging Face folder.
        sixteen_bit: the unquantized GGUF file.
        quantized: the quantized ones, by the name of their type in lower case.
        scratch: a folder for what is needed on the way.
        base, adapter: what was merged; None for an export of another program.
        gguf_adapter: the adapter as a GGUF file, which the GGUF files are used with: they are the base's then. None
            where they are the merged model's.
        given: the folders of the adapters that were given, as they lie; none where one was trained.
        run, config: the run's folder and its configuration; None for an export.
        ollama: the name of an export's model in the Ollama that is usually asked; None where none is judged.
        merged_into: "16bit" or "dequantized".
        removed: why the merged model has no weights any more; "" where it has. The rest of its folder is there.
        merge_row_losses: the loss on each held-out row (summed, trained tokens) of the base and of the adapter on both,
            as `merge` measured them.
    """

    settings: Verify
    model: Path
    sixteen_bit: Path | None
    quantized: dict[str, Path]
    scratch: Path
    base: Path | None = None
    adapter: Path | None = None
    gguf_adapter: Path | None = None
    given: tuple[Path, ...] = ()
    ollama: str | None = None
    run: Path | None = None
    config: Config | None = None
    merged_into: str = "16bit"
    removed: str = ""
    merge_row_losses: dict[str, list[RowLoss]] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def of_run(run: Path, config: Config, scratch: Path) -> Artefacts:
        """The files of a run's folder.

        Raises:
            UserError: there is no merged model in it.
        """
        from pipeline.model.merge_target import has_two_bases, sixteen_bit_base

        layout = Layout(run)
        model = layout.merged_model
        if not (model / "config.json").is_file():
            raise UserError(f"{run}: has no merged model ({model.relative_to(run)}): run `pipeline run` first")
        # In the order of the configuration; a type that it no longer names is not part of the run.
        quantized = {kind: path for kind in config.export.quant if (path := layout.quantized(kind)).is_file()}
        merged = layout.merge_base
        merge: dict[str, Any] = {"taken": "16bit"}
        if merged.is_file():
            merge = json.loads(merged.read_text(encoding="utf-8"))
        return Artefacts(
            settings=config.verify,
            model=model,
            sixteen_bit=_if_there(layout),
            quantized=quantized,
            scratch=scratch,
            base=sixteen_bit_base(config, scratch / "base"),
            adapter=layout.adapter,
            gguf_adapter=next(iter(layout.served_adapters), None),
            given=config.given_adapters,
            run=run,
            config=config,
            merged_into=merge["taken"] if has_two_bases(config) else "16bit",
            removed="" if config.merge.keep or weight_files(model) else "merge.keep = false",
            merge_row_losses=merge.get("row_losses", {}),
        )

    @staticmethod
    def of_export(model: Path, gguf: Path, settings: Verify, scratch: Path) -> Artefacts:
        """A Hugging Face folder and the GGUF file that another program made of it.

        Raises:
            UserError: the folder is none.
            PipelineError: the file is no GGUF file.
        """
        if not (model / "config.json").is_file():
            raise UserError(f"{model}: has no config.json; give the folder that the GGUF file was made from")
        if not weight_files(model):
            raise UserError(f"{model}: has no *.safetensors; give the folder that the GGUF file was made from")
        if unquantized_type(gguf):
            return Artefacts(settings, model, gguf, {}, scratch)
        return Artefacts(settings, model, None, {_type_of_name(gguf): gguf}, scratch)

    def add_adapter(self, folder: Path, named: str | None = None) -> None:
        """Say what an export was merged from. An adapter that does not fit is left for its check to say so.

        Args:
            folder: the adapter's.
            named: the base; without it, the one that the adapter names.

        Raises:
            UserError: it is no adapter, or there is no such base.
        """
        from pipeline.model.adapter_folder import base_of, fit_to, read_given_adapter, write_taken
        from pipeline.model.base import resolve_base
        from pipeline.model.four_bit import in_16bit
        from pipeline.model.trained_tokenizer import tokenizer_source

        found = read_given_adapter(folder)
        named = named or base_of(found)
        self.given, self.base = (folder,), in_16bit(resolve_base(named), self.scratch / "base")
        try:
            fit = fit_to(found, self.base)
            # Whichever chat template it is, the merged folder's is what is compared with the file's.
            source, _ = tokenizer_source(folder, self.base, self.tokenizer.chat_template)
        except UserError:
            return
        self.adapter = self.scratch / "train" / "adapter"
        write_taken(found, fit, saved_tokenizer(source), self.adapter, named)

    @property
    def without_metric(self) -> bool:
        """Answers are not judged: then the held-out loss takes their place at every rung that has one."""
        return self.config is not None and (self.config.eval.metric == "none" or not self.config.tests)

    @cached_property
    def tokenizer(self) -> Any:
        """The served model's tokenizer."""
        return saved_tokenizer(self.model)

    @cached_property
    def template(self) -> ChatTemplate:
        """The served model's chat template."""
        from pipeline.prompt.template import ChatTemplate

        return ChatTemplate.from_tokenizer(self.tokenizer, str(self.model))

    @property
    def files(self) -> Iterator[tuple[str, Path]]:
        """Every GGUF file with the stage that made it."""
        if self.sixteen_bit is not None:
            yield made_by(GGUF_16BIT), self.sixteen_bit
        for kind, path in self.quantized.items():
            yield made_by(kind), path

    @cached_property
    def expected(self) -> GGUFInfo:
        """What the pinned converter makes of the folder that the GGUF files were made from."""
        if self.gguf_adapter is None or self.base is None:
            return self._converted(self.model, "again")
        return self._converted(as_trained(self.base, self.tokenizer, self.scratch / "base-as-trained"), "again-base")

    def _converted(self, model: Path, name: str) -> GGUFInfo:
        """Of a model whose weights were removed the metadata alone."""
        outtype = None if self.sixteen_bit is None else unquantized_type(self.sixteen_bit)
        # Shared by all subjects of one folder: converting takes longer than most checks.
        folder = self.scratch / name
        folder.mkdir(parents=True, exist_ok=True)
        return reconvert(
            model, folder, outtype or sixteen_bit_type(read_weights(model)), without_weights=bool(self.removed)
        )

    @property
    def reference(self) -> Path:
        """The 16-bit file that the quantized ones were made from."""
        return self.sixteen_bit or self.expected.path

    @cached_property
    def merged_reference(self) -> Path:
        """The merged model as a 16-bit file, whose predictions are the measure for the quantized ones."""
        return self.reference if self.gguf_adapter is None else self._converted(self.model, "again").path

    @property
    def longest_answer(self) -> int:
        """Tokens that an answer is waited for."""
        return (self.config.eval if self.config is not None else Eval()).max_new_tokens

    @cached_property
    def held_out(self) -> tuple[str, list[tuple[list[int], list[int]]]]:
        """The first rows of (ids, labels) that the model was not trained on, as many as a check asks for, and where
        they are from; labels may be empty.
        """
        limit = self.config.train.max_length if self.config is not None else LONGEST_ROW
        if self.run is not None:
            where, held_out = read_held_out(Layout(self.run), limit)
            rows = list(itertools.islice(held_out, ROWS))
            rows += first_tokens(held_out, self._tokens - sum(len(ids) for ids, _ in rows))
            if rows:
                return where, rows
        return "the conformance suite", [(ids[:limit], []) for ids in self.suite_ids]

    @property
    def has_rows(self) -> bool:
        """Whether the run has rows, whatever their kind."""
        return self.run is not None and bool(read_held_out(Layout(self.run))[0])

    @cached_property
    def suite_ids(self) -> list[list[int]]:
        """Token ids of the conformance suite's prompts, without those that the template refuses."""
        from pipeline.prompt.cases import conversations
        from pipeline.prompt.template import TemplateRefused, token_ids

        rows = []
        for case in conversations(self.template.special_tokens):
            try:
                text = self.template.render(case.messages, case.tools, case.think)
            except TemplateRefused:
                continue
            rows.append(token_ids(self.tokenizer, text))
        return rows

    @cached_property
    def _tokens(self) -> int:
        return self.settings.tokens or compared_tokens(read_weights(self.model).stored_values)

    def compared_rows(self) -> list[tuple[list[int], list[int]]]:
        """As many held-out rows as have the configured number of tokens together."""
        return first_tokens(self.held_out[1], self._tokens)

    @cached_property
    def merge_losses(self) -> dict[str, float]:
        """What `merge` measured, over those of its rows that are compared here: nats for each trained token."""
        compared = len(self.compared_rows())
        return {name: mean_loss(losses[:compared]) for name, losses in self.merge_row_losses.items()}

    @property
    def merge_measured_all(self) -> bool:
        """Whether `merge` has measured every row that is compared here."""
        return all(len(losses) >= len(self.compared_rows()) for losses in self.merge_row_losses.values())

    @cached_property
    def questions(self) -> list[Question]:
        """What the model is asked: the run's first questions, none where its rows are whole texts; a few plain ones
        where there is no run, or no data.
        """
        limit = self.settings.stopping_prompts
        if self.run is not None and self.config is not None:
            limit = min(limit, self.config.eval.limit or limit)
        if self.run is not None and ((questions := asked(Layout(self.run).data, limit)) or self.has_rows):
            return questions
        plain = ("Hi", "What is the capital of France?", "Name three colours.", "2 + 2?", "Say yes or no.")
        texts = [Question([{"role": "user", "content": text}], place=repr(text)) for text in plain]
        return texts[:limit]


def _if_there(layout: Layout) -> Path | None:
    """The 16-bit GGUF file, if there is exactly one."""
    try:
        return layout.gguf_16bit()
    except PipelineError:
        return None


def _type_of_name(path: Path) -> str:
    """The type that a file's name promises, e.g. "q4_k_m"; what the file says of itself where the name has none."""
    from pipeline.llamacpp.quantizer import quantization_types

    known = quantization_types()
    stem = path.stem.upper()
    named = [name for name in known if stem.endswith(name)]
    if named:
        return max(named, key=len).lower()
    number = inspect(path).metadata.get("general.file_type")
    return next((name.lower() for name, kind in known.items() if kind.number == number), "unknown")
