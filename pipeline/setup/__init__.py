"""Set-up: from a bare machine to everything that a run needs, each part at the one version that is pinned.

Two places are filled: the virtual environment, from requirements.lock, and a cache that all checkouts on the
machine share, from third_party/pins.toml. What is there is left alone, so setting up again costs nothing.
"""
