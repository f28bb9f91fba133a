"""Data sets of a hub: hf:OWNER/NAME:CONFIGURATION:SPLIT@REVISION, of which only the name must be given.

Which files a configuration and a split are is told by the datasets library, from the data set's card and the names of
its files alone; then these are fetched, and read like the user's own. No code of a data set is fetched or run. A branch
or a tag is looked up once: what it was then, a commit, is kept beside the files, and a finished run stays what it is.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pipeline.config import HUB
from pipeline.errors import UserError
from pipeline.hub import asking
from pipeline.resources import cache_folder

_NAME = re.compile(
    rf"{HUB}(?P<name>[\w.-]+/[\w.-]+)(:(?P<configuration>[^:@]*))?(:(?P<split>[^:@]+))?(@(?P<revision>[^@]+))?"
)
_CARD = "README.md"


@dataclass(frozen=True)
class HubData:
    """A split of a hub's data set.

    Attributes:
        name: the hub id.
        configuration: one of its configurations; "" for the default one.
        split: e.g. "train".
        revision: a branch, a tag or a commit; None for the main branch.
    """

    name: str
    configuration: str
    split: str
    revision: str | None

    @staticmethod
    def of(given: Path) -> HubData:
        """The data set that a path of the configuration names.

        Raises:
            UserError: it is not written so.
        """
        found = _NAME.fullmatch(str(given))
        if found is None:
            raise UserError(
                f"{given}: a data set of a hub is written {HUB}OWNER/NAME, and further {HUB}OWNER/NAME:CONFIGURATION:"
                f"SPLIT@REVISION, e.g. {HUB}someone/chats::test@v1 for the split test of the default configuration"
            )
        parts = found.groupdict()
        return HubData(parts["name"], parts["configuration"] or "", parts["split"] or "train", parts["revision"])

    def files(self) -> list[Path]:
        """Its files, in the hub's cache, each below a folder that is named by the commit; fetched if need be.

        Raises:
            UserError: the hub does not have it, or it has no such configuration or split.
            PipelineError: the hub cannot be reached.
        """
        return self._kept() or self._fetched()

    @property
    def _record(self) -> Path:
        name = hashlib.sha256(json.dumps(vars(self)).encode()).hexdigest()[:32]
        return cache_folder() / "hub-data" / f"{name}.json"

    def _kept(self) -> list[Path] | None:
        """The files, if all were fetched before and are still there."""
        from huggingface_hub import try_to_load_from_cache

        try:
            kept = json.loads(self._record.read_text(encoding="utf-8"))
            found = [
                try_to_load_from_cache(self.name, file, revision=kept["commit"], repo_type="dataset")
                for file in kept["files"]
            ]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return [Path(path) for path in found] if all(isinstance(path, str) for path in found) else None

    def _fetched(self) -> list[Path]:
        from huggingface_hub import HfApi, hf_hub_download

        from pipeline.run.folder import write_whole

        with asking("data", self.name, self.revision, "files of your own"):
            info = HfApi().dataset_info(self.name, revision=self.revision)
            commit, there = str(info.sha), [file.rfilename for file in info.siblings or ()]
            card = None
            if _CARD in there:
                card = Path(hf_hub_download(self.name, _CARD, revision=commit, repo_type="dataset"))
            files = self._chosen(there, card)
            paths = [Path(hf_hub_download(self.name, file, revision=commit, repo_type="dataset")) for file in files]
        self._record.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self._record, json.dumps(vars(self) | {"commit": commit, "files": files}, indent=1) + "\n")
        return paths

    def _chosen(self, there: list[str], card: Path | None) -> list[str]:
        """The files of the split, found by the datasets library in a folder of empty files with these names."""
        from datasets import get_dataset_config_names, load_dataset_builder

        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "data"
            folder.mkdir()
            for file in there:
                if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts or file.endswith(".py"):
                    continue  # a script is never read: its rows, if it has any, are files too
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                (folder / file).touch()
            if card is not None:
                (folder / _CARD).write_bytes(card.read_bytes())
            try:
                builder = load_dataset_builder(str(folder), self.configuration or None)
            except ValueError as error:
                known = ", ".join(get_dataset_config_names(str(folder)))
                if self.configuration in known.split(", "):
                    raise
                asked = f"configuration {self.configuration!r}" if self.configuration else "default configuration"
                words = str(error).splitlines()[0].replace(str(folder), self.name)
                raise UserError(f"data: {self.name} has no {asked}; it has {known or 'none'} ({words})") from None
            except (FileNotFoundError, OSError) as error:
                words = str(error).splitlines()[0].replace(str(folder), self.name)
                raise UserError(
                    f"data: {self.name} has no files of rows that can be read (scripts are not run): {words}"
                ) from None
            splits = {str(split): files for split, files in (builder.config.data_files or {}).items()}
            if self.split not in splits:
                raise UserError(f"data: {self.name} has no split {self.split!r}; it has {', '.join(splits) or 'none'}")
            root = folder.resolve()
            return [Path(file).resolve().relative_to(root).as_posix() for file in splits[self.split]]
