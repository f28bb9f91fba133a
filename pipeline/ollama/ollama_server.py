"""An Ollama of our own: a real server on a free loopback port, with a home of its own, gone when we are.

A user's Ollama is never touched by it: other port, other models, other home. The server is stopped by its process id,
and the kernel stops it if this process is killed.
"""

import os
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType

from pipeline.errors import PipelineError, UserError
from pipeline.processes import ON_THIS_MACHINE, free_port, start, stop, wait_until
from pipeline.resources import expanded
from pipeline.setup.ollama_version import MINIMUM_OLLAMA, new_enough, program_version, system_ollama

START_SECONDS = 60


def find_ollama() -> Path | None:
    """The Ollama program: PIPELINE_OLLAMA, else the one that set-up built, else a system one that is new enough.

    Raises:
        UserError: PIPELINE_OLLAMA names no program, or one that is too old.
    """
    if given := os.environ.get("PIPELINE_OLLAMA"):
        path = expanded(given, "PIPELINE_OLLAMA")
        if not os.access(path, os.X_OK) or path.is_dir():
            raise UserError(f"PIPELINE_OLLAMA={given}: not a program; give the path of the ollama executable")
        version = program_version(path)
        if not new_enough(version):
            raise UserError(
                f"PIPELINE_OLLAMA={given}: Ollama {version} is too old: {MINIMUM_OLLAMA} or newer is needed; name "
                "another, or unset PIPELINE_OLLAMA"
            )
        return path.resolve()
    from pipeline.setup.places import ollama_program

    if built := ollama_program():
        return built
    return system_ollama()


class OllamaServer:
    """`ollama serve` as a context manager.

    Args:
        models: folder of the server's models (OLLAMA_MODELS); made if absent.
        program: the executable; default: `find_ollama()`.
        log: where its output is kept; default: a file in its temporary home.
        environment: further variables, e.g. {"OLLAMA_DEBUG": "1"}.

    Attributes:
        host: its address, "http://127.0.0.1:PORT".
        log: the file with all that it printed.

    Raises:
        UserError: there is no Ollama.
        PipelineError: it did not start; with the end of its log.
    """

    def __init__(
        self,
        models: Path,
        *,
        program: Path | None = None,
        log: Path | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.models = models
        self.host = ""
        self._program = program
        self._environment = environment or {}
        self._log = log
        self._home: tempfile.TemporaryDirectory[str] | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """The running server's process id."""
        return self._process.pid if self._process is not None else None

    @property
    def log(self) -> Path:
        """The file with everything the server printed."""
        if self._log is None:
            raise RuntimeError("the server has not been started")
        return self._log

    def __enter__(self) -> "OllamaServer":
        program = self._program or find_ollama()
        if program is None:
            raise UserError("there is no Ollama on this machine: `pipeline setup` builds one (it needs Go)")
        self.models.mkdir(parents=True, exist_ok=True)
        self._home = tempfile.TemporaryDirectory(prefix="pipeline-ollama-", ignore_cleanup_errors=True)
        home = Path(self._home.name)
        self._log = self._log or home / "ollama.log"
        try:
            # A port that is free now may be taken a moment later: then the server exits, and the next one is tried.
            for _ in range(5):
                if self._start(program, home):
                    return self
            raise PipelineError(f"Ollama did not start. The end of its log:\n{self._log_tail()}")
        except BaseException:
            self.stop()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _start(self, program: Path, home: Path) -> bool:
        self.host = f"http://127.0.0.1:{free_port()}"
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("OLLAMA_")},
            "OLLAMA_HOST": self.host,
            "OLLAMA_MODELS": str(self.models),
            "OLLAMA_KEEP_ALIVE": "10m",
            "OLLAMA_NOPRUNE": "0",
            "HOME": str(home),
            "NO_PROXY": "127.0.0.1,localhost",
            **self._environment,
        }
        with self.log.open("ab") as log:
            self._process = start([program, "serve"], log, environment)
        if wait_until(self._ready, self._process, START_SECONDS):
            return True
        self._end_process()
        return False

    def _ready(self) -> bool:
        import httpx

        try:
            return httpx.get(f"{self.host}/api/version", timeout=2, **ON_THIS_MACHINE).is_success
        except httpx.TransportError:
            return False

    def stop(self) -> None:
        """Stop the server and the model runners that it started. Does nothing if it is not running."""
        self._end_process()
        if self._home is not None:
            self._home.cleanup()
            self._home = None

    def _end_process(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            stop(process)  # it stops its runners itself

    def log_text(self) -> str:
        """All that the server printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def _log_tail(self) -> str:
        return "\n".join(self.log_text().splitlines()[-10:])
