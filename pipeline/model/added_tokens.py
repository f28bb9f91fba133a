"""A base that is given more tokens: `model.add_tokens`.

The idea: a base with more tokens is another base. It is written as a folder of its own, tokenizer and embedding grown,
and every stage reads that folder as it reads any other, so that none has to know of it but training, which trains the
new rows. They start at the mean of the old ones, of the embedding and of the head each: a token that is drawn at random
may be likelier than all others at once, one at the mean never is (J. Hewitt, 2021, "Initializing New Word Embeddings
for Pretrained Language Models").
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError
from pipeline.model.adapter_file import renaming
from pipeline.model.config_file import write_vocabulary
from pipeline.model.derived_folder import derived_folder, name_for
from pipeline.model.targets import in_layers, vocabulary_modules, without_weights
from pipeline.model.weights_file import INDEX, Weights, read_weights
from pipeline.model.weights_writer import TensorPlan, WeightsWriter
from pipeline.processes import require_space
from pipeline.prompt.chat_templates import template_source
from pipeline.prompt.control_tokens import looks_like_control
from pipeline.prompt.tokenizer import base_tokenizer

if TYPE_CHECKING:
    from pipeline.config import Model

# Part of the cache's folder name: a change of what is written below needs a new number.
LAYOUT = 1


def with_added_tokens(base: Path, model: Model) -> Path:
    """The folder of a base with the tokens of `model.add_tokens`; the given one where there are none.

    Raises:
        UserError: the base has one of the tokens, or an embedding that cannot be grown.
    """
    if not model.add_tokens:
        return base
    template = template_source(base, model.chat_template)
    control = tuple(token for token in model.add_tokens if token in template or looks_like_control(token))
    files = [path for path in base.iterdir() if path.is_file()]
    name = name_for(f"{base.name}-grown", files, LAYOUT, model.add_tokens, control, model.trust_remote_code)
    said = f"writing {base.name} with {len(model.add_tokens)} more tokens, once"
    return derived_folder(
        name, said, partial(_write, base, model.add_tokens, control, trust_remote_code=model.trust_remote_code)
    )


def rows_of(tokenizer: Any, model: Model) -> list[int]:
    """The rows of the embedding that the added tokens have, in their order."""
    return sorted(tokenizer.convert_tokens_to_ids(list(model.add_tokens)))


def shown_or_not(tokenizer: Any, model: Model) -> list[str]:
    """Which of the added tokens answers show, in a sentence; none without any."""
    if not model.add_tokens:
        return []
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    control = [token for token in model.add_tokens if token in special]
    shown = [token for token in model.add_tokens if token not in special]
    words = [f"control tokens, which no answer shows: {', '.join(control)}"] if control else []
    words += [f"ordinary ones, which stand in answers as they are: {', '.join(shown)}"] if shown else []
    return [f"model.add_tokens: {'; '.join(words)}"]


def _write(
    base: Path, tokens: tuple[str, ...], control: tuple[str, ...], folder: Path, *, trust_remote_code: bool
) -> None:
    weights = read_weights(base)
    require_space(folder.parent, weights.size, "the base with its added tokens")
    tokenizer = base_tokenizer(base, trust_remote_code=trust_remote_code)
    known = max(tokenizer.get_vocab().values()) + 1
    _grow(tokenizer, tokens, control)
    _refuse_changed_texts(tokenizer, [token for token in tokens if token not in control])
    rows = max(tokenizer.get_vocab().values()) + 1
    embeddings = _embeddings(base, weights, trust_remote_code=trust_remote_code)
    rows = max(rows, weights.shapes[embeddings[0]][0])

    folder.mkdir()
    # What the tokenizer's class writes is all of it: a tokenizer.model of before would lack the tokens.
    skipped = (INDEX, "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "added_tokens.json")
    for path in base.rglob("*.py") if trust_remote_code else ():
        shutil.copy(path, folder / path.relative_to(base))
    for path in base.iterdir():
        if path.is_file() and path.suffix not in (".safetensors", ".gguf", ".py") and path.name not in skipped:
            shutil.copy(path, folder / path.name)
    tokenizer.save_pretrained(folder)
    write_vocabulary(folder / "config.json", rows)
    plans = {
        name: TensorPlan(
            weights.file_of[name].name, weights.types[name], _grown(weights.shapes[name], rows, name in embeddings)
        )
        for name in weights.own
    }
    with WeightsWriter(folder, plans) as writer:
        for name in plans:
            for row, piece in weights.pieces(name):
                writer.write(name, row, piece)
            if name in embeddings:
                _write_new_rows(weights, name, known, rows, writer)


def _grown(shape: tuple[int, ...], rows: int, grows: bool) -> tuple[int, ...]:
    return (rows, *shape[1:]) if grows else shape


def _grow(tokenizer: Any, tokens: tuple[str, ...], control: tuple[str, ...]) -> None:
    from tokenizers import AddedToken

    known = tokenizer.get_vocab()
    for token in tokens:
        if token in known:
            raise UserError(
                f"model.add_tokens: {token!r} is token {known[token]:,} of the base already: leave it out of the list"
            )
        special = token in control
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=special)], special_tokens=special)


def _refuse_changed_texts(tokenizer: Any, shown: list[str]) -> None:
    """Refuse a token after which a text does not come back: Llama 2's kind of tokenizer puts a space there."""
    for token in shown:
        text = f"a{token}b"
        if (back := tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"])) != text:
            raise UserError(
                f"model.add_tokens: {token!r}: the base's tokenizer makes {back!r} of {text!r}, so that a text with it "
                "would not be trained as it is: only tokens of the chat template can be added to this base"
            )


def _embeddings(base: Path, weights: Weights, *, trust_remote_code: bool) -> list[str]:
    """The tensors that have a row for every token, as the files name them: the embedding, and a head of its own.

    Raises:
        UserError: the base has others, or these are not stored as matrices.
    """
    model = without_weights(base, trust_remote_code=trust_remote_code)
    embedding, head = vocabulary_modules(model)
    names = renaming(in_layers(model), weights)
    found = [names.to_file(f"{module}.weight") for module in (embedding, head) if module]
    size = model.get_input_embeddings().weight.shape[0]
    others = [
        name
        for name, tensor in model.named_parameters()
        if tensor.shape[0] == size and names.to_file(name) not in found and name.partition(".weight")[0] != head
    ]
    if missing := [name for name in found if name not in weights.shapes]:
        raise UserError(f"model.add_tokens: {base}: has no tensor {missing[0]}, so that its embedding cannot be grown")
    if others:
        raise UserError(
            f"model.add_tokens: {base}: {others[0]} has a value for every token too, which is not grown here: take a "
            "chat template that needs no new tokens (model.chat_template)"
        )
    return found


def _write_new_rows(weights: Weights, name: str, known: int, rows: int, writer: WeightsWriter) -> None:
    """The mean of the rows that have a token, in every row that has none.

    Args:
        weights, name: the old tensor.
        known: how many tokens there were; rows beyond them are spare ones, which nobody trained.
        rows: how many there are to be.
        writer: of the new one.
    """
    import torch

    count, width = weights.shapes[name]
    used = min(known, count)
    total = torch.zeros(width, dtype=torch.float64)
    kind = None
    for row, piece in weights.pieces(name):
        total += piece[: max(0, used - row)].double().sum(0)
        kind = piece.dtype
    mean = (total / used).to(kind)
    writer.write(name, used, mean.repeat(rows - used, 1))
