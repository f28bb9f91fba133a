"""Unsloth's CUDA code on a machine without a GPU: `python -m support.cuda_code FOLDER`, trainings on standard input.

Without a GPU Unsloth loads a backend that shares nothing with what trains on one. Here its CUDA code is imported as its
authors' own tests do (UNSLOTH_ALLOW_CPU), and the train stage runs with it. In the place of the card stand:

- Triton's interpreter, which runs Triton's kernels one program after the other (TRITON_INTERPRET);
- the processor's memory, for every tensor that is asked for on "cuda" (`OnTheProcessor`);
- answers about a card of compute capability 7.5. This program sees that card; transformers and accelerate see none.

Numbers are float32, so that results can be compared to the last digits; Unsloth is told that they are float16, for
which alone it has LoRA kernels of its own. What this does not run: 16-bit numbers and their loss scaling, the 8-bit
optimizer, activations that wait in the machine's memory (from 2 MB on), torch's own attention for joined rows (from
capability 8.0 on; before, and here, each row is a call of its own), and what torch.compile makes of whole layers.

Each line of standard input is a training: {"run": its name, "overrides": of the configuration, "environment":
variables, "scratch": the name of a training that it goes on with}. Each is a process of its own, with Unsloth imported
before.
"""

import gc
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

CARD = SimpleNamespace(
    name="Stand-in", major=7, minor=5, total_memory=16 * 2**30, multi_processor_count=40, warp_size=32
)
# What is counted beside Triton's kernels, by module: functions, or steps of an autograd function.
WATCHED = {
    "unsloth.kernels.fast_lora": ("LoRA_MLP.backward", "LoRA_QKV.backward", "LoRA_W.backward"),
    "unsloth.models.llama": ("unsloth_fused_ce_loss",),
    "unsloth.utils.attention_dispatch": ("_sdpa_packed_segments",),
    "unsloth_zoo.gradient_checkpointing": ("UnslothCheckpointFunction.backward",),
}


def main(folder: Path) -> int:
    """Run trainings of the project in a folder; each leaves `done.json` in its run: its figures, what was called."""
    os.environ.update(
        CUDA_VISIBLE_DEVICES="-1",
        UNSLOTH_ALLOW_CPU="1",
        TRITON_INTERPRET="1",
        UNSLOTH_DISABLE_STATISTICS="1",
        UNSLOTH_DATASET_NUM_PROC="1",
        UNSLOTH_DISABLE_PINNED_MEMORY="1",
        UNSLOTH_RMSNORM_MULTIROW="0",  # the interpreter adds up in another order, which Unsloth would find out slowly
        UNSLOTH_COMPILE_LOCATION=str(folder / "unsloth_compiled_cache"),
    )
    called = _unsloth()
    gc.freeze()  # what is here will stay, in every child: to look through it takes longer than a step
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _train(folder, called, **json.loads(line))
            os._exit(0)  # an exception has ended it otherwise
        if status := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            return status
    return 0


def _train(
    folder: Path,
    called: Counter[str],
    run: str,
    overrides: tuple[str, ...] = (),
    environment: dict[str, str] | None = None,
    scratch: str | None = None,
) -> None:
    from pipeline.defaults import Facts, resolve
    from pipeline.run.layout import Layout
    from pipeline.run.stage import Task
    from pipeline.stages.train import STAGE
    from pipeline.toml_file import load_config

    os.environ.update(environment or {})
    config, given = load_config(folder / "pipeline.toml", list(overrides))
    config, _ = resolve(config, given, Facts(1_000_000, 2048, CARD.total_memory))
    task = Task(
        STAGE, config, folder / run, Layout(folder / run).node("train"), scratch=folder / "scratch" / (scratch or run)
    )
    for path in (task.output, task.scratch):
        path.mkdir(parents=True, exist_ok=True)
    figures = STAGE.run(task)
    (folder / run / "done.json").write_text(json.dumps({"figures": figures, "called": called, "warned": task.warnings}))


def _unsloth() -> Counter[str]:
    """Import Unsloth's CUDA code; return what counts the calls of its parts."""
    import unsloth  # noqa: I001  (first: it patches what is imported after it)
    import matplotlib.figure  # noqa: F401  (once, and not in every child)
    import torch
    from unsloth.context_parallel import patch_sft_trainer
    from unsloth.kernels import utils
    from unsloth.models import llama, loader, rl
    from unsloth.trainer import _patch_trl_trainer

    # What it does to TRL's trainers where there is a card, and leaves out with UNSLOTH_ALLOW_CPU.
    os.environ["UNSLOTH_ALLOW_CPU"] = "0"
    rl.PatchFastRL(FastLanguageModel=llama.FastLlamaModel)
    _patch_trl_trainer()
    patch_sft_trainer()

    _put_a_card(torch.cuda)
    llama.DEVICE_COUNT = 1
    llama._base_weight_dtype = lambda module: torch.float16
    loader.ALLOW_BITSANDBYTES = True
    utils._can_use_scratch = lambda device: False  # memory that is used again, on a stream of the card's
    load = unsloth.FastLanguageModel.from_pretrained

    def in_float32(*args: Any, **options: Any) -> Any:
        return load(*args, **options | {"dtype": torch.float32, "device_map": "cpu"})

    unsloth.FastLanguageModel.from_pretrained = staticmethod(in_float32)
    _on_the_processor().__enter__()
    return _count_calls()


def _put_a_card(cuda: Any) -> None:
    there = cuda.is_available

    def is_available() -> bool:
        asking: str = sys._getframe(1).f_globals["__name__"]
        return asking.startswith("pipeline.") or there()

    cuda.is_available = is_available
    cuda.is_bf16_supported = lambda including_emulation=True: including_emulation
    cuda.get_device_capability = lambda *_: (CARD.major, CARD.minor)
    cuda.get_device_properties = lambda *_: CARD
    cuda.get_device_name = lambda *_: CARD.name
    cuda.mem_get_info = lambda *_: (CARD.total_memory, CARD.total_memory)
    cuda.max_memory_allocated = lambda *_: 1
    cuda.current_device = lambda: 0
    cuda.device = lambda *_: nullcontext()
    cuda.empty_cache = cuda.synchronize = lambda *_: None


def _on_the_processor() -> Any:
    import torch
    from torch.overrides import TorchFunctionMode

    processor = torch.device("cpu")

    def moved(value: Any) -> Any:
        asked = isinstance(value, str | torch.device) and str(value).startswith("cuda")
        return processor if asked else value

    class OnTheProcessor(TorchFunctionMode):
        """Takes "cuda" for "cpu" in every call of torch."""

        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = {name: moved(value) for name, value in (kwargs or {}).items()}
            if isinstance(kwargs.get("device"), int):
                kwargs["device"] = processor
            return function(*map(moved, args), **kwargs)

    return OnTheProcessor()


def _count_calls() -> Counter[str]:
    from importlib import import_module

    from triton.runtime.interpreter import GridExecutor, interpreter_builder

    object.__setattr__(interpreter_builder.options, "sanitize_overflow", False)  # a check that takes half of the time
    called: Counter[str] = Counter()

    def counted(function: Callable[..., Any], name: Callable[..., str]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            called[name(*args)] += 1
            return function(*args, **options)

        return call

    GridExecutor.__call__ = counted(GridExecutor.__call__, lambda executor, *_: executor.fn.__name__)
    for module, names in WATCHED.items():
        for name in names:
            *owner, last = name.split(".")
            holder = getattr(import_module(module), owner[0]) if owner else import_module(module)
            call = counted(getattr(holder, last), lambda *_, name=name: name)
            setattr(holder, last, staticmethod(call) if owner else call)
    return called


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
