"""What this machine has: memory, and a GPU's memory. Sizes in bytes."""

import shutil
import subprocess


def memory() -> int:
    """All of the memory."""
    import psutil

    return int(psutil.virtual_memory().total)


def free_memory() -> int:
    """What programs can still take of it without swapping."""
    import psutil

    return int(psutil.virtual_memory().available)


def gpu_memory() -> int | None:
    """All of the first CUDA device's memory, or None without one. Asks the driver's tool: torch takes seconds."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    first = answer.stdout.split("\n")[0].strip()
    return int(first) * 2**20 if answer.returncode == 0 and first.isdigit() else None


def free_gpu_memory() -> int:
    """What is free of the current CUDA device's memory; 0 without one. Imports torch."""
    import torch

    return int(torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else 0
