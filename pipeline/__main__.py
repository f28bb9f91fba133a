"""`pipeline`, and `python -m pipeline`, which is the same program."""

import os
import subprocess
import sys


def main() -> None:
    """Start the command line; where its own libraries are missing or broken, have `pipeline setup` mend them first."""
    try:
        from pipeline.cli import main as command_line
    except Exception as error:
        if isinstance(error, ImportError) and (error.name or "").partition(".")[0] == "pipeline":
            raise  # a fault of this program
        if sys.argv[1:2] != ["setup"] or "PIPELINE_MENDED" in os.environ:
            print(
                f"error: the libraries of the command line cannot be loaded ({type(error).__name__}: {error}): run "
                "`pipeline setup`",
                file=sys.stderr,
            )
            sys.exit(1)
        status = subprocess.run([sys.executable, "-m", "pipeline.setup.libraries"], check=False).returncode
        if status:
            sys.exit(status)
        environment = {**os.environ, "PIPELINE_MENDED": "1"}
        os.execve(sys.executable, [sys.executable, "-m", "pipeline", *sys.argv[1:]], environment)  # noqa: S606
    command_line()


if __name__ == "__main__":
    main()
