"""`pipeline`, and `python -m pipeline`, which is the same program."""

import os
import subprocess
import sys
from pathlib import Path


def main() -> None:
    """Start the command line. Where its own libraries are missing or broken, `pipeline setup` mends them first."""
    try:
        from pipeline.cli import main as command_line

        command_line()
    except Exception as error:
        if isinstance(error, ImportError) and (error.name or "").partition(".")[0] == "pipeline":
            raise  # a fault of this program
        loaded = "command_line" in locals()
        if loaded and not (isinstance(error, ImportError) and sys.argv[1:2] == ["setup"]):
            raise
        if sys.argv[1:2] != ["setup"] or "PIPELINE_MENDED" in os.environ:
            words = f"the libraries of the command line cannot be loaded ({type(error).__name__}: {error})"
            print(f"error: {words}: run `pipeline setup`", file=sys.stderr)
            sys.exit(1)
        # By its own folder: a folder called pipeline where the user is would hide it, and it may not be installed yet.
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "PIPELINE_MENDED": "1"}
        mend = [sys.executable, "-P", "-m", "pipeline.setup.libraries"]
        if status := subprocess.run(mend, env=environment, check=False).returncode:
            sys.exit(status)
        again = [sys.executable, "-P", "-m", "pipeline", *sys.argv[1:]]
        os.execve(sys.executable, again, environment)  # noqa: S606


if __name__ == "__main__":
    main()
