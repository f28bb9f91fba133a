"""The adapter that a training goes on from: held against what is to be trained, so that it fits number for number.

Training makes an adapter by [lora] as it always does, and then takes over the numbers of the old one. So the two must
be alike in all that decides what a number means: the modules, the rank, the scaling and the kind.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError
from pipeline.model import targets
from pipeline.model.adapter_folder import CONFIG, WEIGHTS, Adapter, fit_to, read_given_adapter
from pipeline.model.base import TOKENIZER_FILES, base_folder
from pipeline.model.trained_tokenizer import tokenizer_source
from pipeline.prompt.tokenizer import saved_tokenizer

if TYPE_CHECKING:
    from pipeline.config import Config


def continued_files(config: Config) -> list[Path]:
    """What decides where a training begins; none where it begins anew."""
    folder = config.train.from_adapter
    return [] if folder is None else [path for name in (CONFIG, WEIGHTS) if (path := folder / name).is_file()]


def read_continued_adapter(config: Config) -> tuple[Adapter, list[str]]:
    """The adapter of train.from_adapter, and what should be known of it, in sentences.

    Raises:
        UserError: it is none, or another one than [lora] makes, and which key to change.
    """
    folder = config.train.from_adapter
    assert folder is not None
    adapter, base = read_given_adapter(folder), base_folder(config.model)
    settings, lora, where = adapter.settings, config.lora, f"train.from_adapter: {folder}"
    if key := next((key for key in ("modules_to_save", "trainable_token_indices") if settings.get(key)), None):
        raise UserError(f"{where}: it trained more than matrices of its own ({key}), from which training cannot go on")
    for key, given in (("lora.save_modules", lora.save_modules), ("model.add_tokens", config.model.add_tokens)):
        if given:
            raise UserError(f"{where}: {key} asks for more than this adapter has: remove one of the two")
    for key, old, new in (
        ("lora.r", settings["r"], lora.r),
        ("lora.alpha", settings["lora_alpha"], lora.alpha),
        ("lora.rslora", bool(settings.get("use_rslora")), lora.rslora),
        ("lora.dora", bool(settings.get("use_dora")), lora.dora),
        ("lora.bias", settings.get("bias", "none"), lora.bias),
    ):
        if old != new:
            raise UserError(f"{where}: was trained with {key} = {json.dumps(old)}, not {json.dumps(new)}: set {key} so")
    for key in ("rank_pattern", "alpha_pattern"):
        if settings.get(key):
            raise UserError(f"{where}: has modules of other ranks or scalings ({key}), and [lora] has one for all")
    _compare_modules(adapter, config, base, where)
    return adapter, _remarks(adapter, config, base)


def _compare_modules(adapter: Adapter, config: Config, base: Path, where: str) -> None:
    remote = config.model.trust_remote_code
    old = set(fit_to(adapter, base, trust_remote_code=remote).modules)
    new = targets.of_base(base, config.lora, trust_remote_code=remote).modules.keys()
    for modules, words in ((old - new, "is changed by it, and not by"), (new - old, "is not changed by it, but by")):
        if modules:
            raise UserError(
                f"{where}: {min(modules)} {words} lora.target_modules and lora.exclude ({len(modules)} such modules): "
                "name those that it was trained with"
            )


def _remarks(adapter: Adapter, config: Config, base: Path) -> list[str]:
    """Tokens that are not trained any more, or another chat template: possible, but maybe not meant."""
    folder, chosen = adapter.folder, config.model.chat_template
    said = list(adapter.remarks)
    if any((folder / name).is_file() for name in TOKENIZER_FILES):
        said += tokenizer_source(folder, base, chosen)[1]  # refuses another vocabulary
        old: Any = saved_tokenizer(folder).chat_template
        if not chosen and old and old != saved_tokenizer(base).chat_template:
            said.append(
                f"train.from_adapter: {folder} was trained with another chat template than the base's, in which the "
                "rows are written now; for its own set model.chat_template to a file of it"
            )
    return said
