"""`python -m pipeline` is the same program as `pipeline`."""

from pipeline.cli import main

main()
