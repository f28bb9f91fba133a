"""The pinned libllama, called directly: the exact logits of a GGUF file at every position, as float32.

Over HTTP llama-server gives the few likeliest tokens of generated positions only, and llama-perplexity writes log
probabilities as 16-bit steps (up to 16/65535 = 2e-4 wrong), on fixed-size chunks of running text. Neither can show a
divergence of 1e-6 on rows of chat. Calling the library can, and costs no copy of the weights beside the mapped file.

A file that llama.cpp aborts on takes this process with it: check a file of unknown origin in a LlamaServer first.
"""

import contextlib
import ctypes
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from pipeline.errors import PipelineError, UserError
from pipeline.llamacpp.ggml import shared_library
from pipeline.processes import cores

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_F32, _F16 = 0, 1  # ggml types of the attention cache
_GGML_LOG_LEVEL_ERROR = 4
_LOG_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_errors: list[str] = []


class _ModelParameters(ctypes.Structure):
    """llama_model_params of include/llama.h."""

    _fields_ = (
        ("devices", ctypes.c_void_p),
        ("tensor_buft_overrides", ctypes.c_void_p),
        ("n_gpu_layers", ctypes.c_int32),
        ("split_mode", ctypes.c_int),
        ("load_mode", ctypes.c_int),
        ("lazy_mode", ctypes.c_int),
        ("main_gpu", ctypes.c_int32),
        ("tensor_split", ctypes.c_void_p),
        ("progress_callback", ctypes.c_void_p),
        ("progress_callback_user_data", ctypes.c_void_p),
        ("kv_overrides", ctypes.c_void_p),
        ("vocab_only", ctypes.c_bool),
        ("check_tensors", ctypes.c_bool),
        ("use_extra_bufts", ctypes.c_bool),
        ("no_host", ctypes.c_bool),
        ("no_alloc", ctypes.c_bool),
        ("load_mtp", ctypes.c_bool),
    )


class _ContextParameters(ctypes.Structure):
    """llama_context_params of include/llama.h."""

    _fields_ = (
        ("n_ctx", ctypes.c_uint32),
        ("n_batch", ctypes.c_uint32),
        ("n_ubatch", ctypes.c_uint32),
        ("n_seq_max", ctypes.c_uint32),
        ("n_rs_seq", ctypes.c_uint32),
        ("n_outputs_max", ctypes.c_uint32),
        ("n_outputs_max_per_seq", ctypes.c_uint32),
        ("n_threads", ctypes.c_int32),
        ("n_threads_batch", ctypes.c_int32),
        ("ctx_type", ctypes.c_int),
        ("rope_scaling_type", ctypes.c_int),
        ("pooling_type", ctypes.c_int),
        ("attention_type", ctypes.c_int),
        ("flash_attn_type", ctypes.c_int),
        ("rope_freq_base", ctypes.c_float),
        ("rope_freq_scale", ctypes.c_float),
        ("yarn_ext_factor", ctypes.c_float),
        ("yarn_attn_factor", ctypes.c_float),
        ("yarn_beta_fast", ctypes.c_float),
        ("yarn_beta_slow", ctypes.c_float),
        ("yarn_orig_ctx", ctypes.c_uint32),
        ("defrag_thold", ctypes.c_float),
        ("cb_eval", ctypes.c_void_p),
        ("cb_eval_user_data", ctypes.c_void_p),
        ("type_k", ctypes.c_int),
        ("type_v", ctypes.c_int),
        ("abort_callback", ctypes.c_void_p),
        ("abort_callback_data", ctypes.c_void_p),
        ("embeddings", ctypes.c_bool),
        ("offload_kqv", ctypes.c_bool),
        ("no_perf", ctypes.c_bool),
        ("op_offload", ctypes.c_bool),
        ("swa_full", ctypes.c_bool),
        ("kv_unified", ctypes.c_bool),
        ("samplers", ctypes.c_void_p),
        ("n_samplers", ctypes.c_size_t),
        ("ctx_other", ctypes.c_void_p),
    )


class _Batch(ctypes.Structure):
    """llama_batch of include/llama.h."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.c_void_p),
        ("n_seq_id", ctypes.c_void_p),
        ("seq_id", ctypes.c_void_p),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "llama_backend_init": (None, ()),
    "llama_log_set": (None, (_LOG_CALLBACK, ctypes.c_void_p)),
    "llama_model_default_params": (_ModelParameters, ()),
    "llama_context_default_params": (_ContextParameters, ()),
    "llama_model_load_from_file": (ctypes.c_void_p, (ctypes.c_char_p, _ModelParameters)),
    "llama_model_free": (None, (ctypes.c_void_p,)),
    "llama_init_from_model": (ctypes.c_void_p, (ctypes.c_void_p, _ContextParameters)),
    "llama_free": (None, (ctypes.c_void_p,)),
    "llama_model_get_vocab": (ctypes.c_void_p, (ctypes.c_void_p,)),
    "llama_vocab_n_tokens": (ctypes.c_int32, (ctypes.c_void_p,)),
    "llama_vocab_is_eog": (ctypes.c_bool, (ctypes.c_void_p, ctypes.c_int32)),
    "llama_tokenize": (
        ctypes.c_int32,
        (
            *(ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32),
            *(ctypes.POINTER(ctypes.c_int32), ctypes.c_int32, ctypes.c_bool, ctypes.c_bool),
        ),
    ),
    "llama_adapter_lora_init": (ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_char_p)),
    "llama_set_adapters_lora": (
        ctypes.c_int32,
        (
            *(ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t),
            ctypes.POINTER(ctypes.c_float),
        ),
    ),
    "llama_get_memory": (ctypes.c_void_p, (ctypes.c_void_p,)),
    "llama_memory_clear": (None, (ctypes.c_void_p, ctypes.c_bool)),
    "llama_decode": (ctypes.c_int32, (ctypes.c_void_p, _Batch)),
    "llama_get_logits": (ctypes.POINTER(ctypes.c_float), (ctypes.c_void_p,)),
}


@_LOG_CALLBACK
def _keep_errors(level: int, text: bytes, _: object) -> None:
    if level == _GGML_LOG_LEVEL_ERROR:
        _errors.append(text.decode("utf-8", "replace").strip())


@cache
def _llama() -> ctypes.CDLL:
    library = shared_library("llama")
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments
    # The structures above are those of the pin. Another version's would be read at the wrong offsets: its own
    # defaults, which are known, tell.
    context, model = library.llama_context_default_params(), library.llama_model_default_params()
    known = (
        context.n_ctx,
        context.n_batch,
        context.n_ubatch,
        context.type_k,
        context.yarn_beta_fast,
        context.ctx_other,
    )
    if known != (512, 2048, 512, _F16, -1.0, None) or not (model.use_extra_bufts and not model.vocab_only):
        raise UserError("libllama is not of the pinned version: unset PIPELINE_LLAMACPP and run `pipeline setup`")
    library.llama_log_set(_keep_errors, None)
    library.llama_backend_init()
    return library


class LlamaModel:
    """A GGUF file loaded into this process, on the CPU. A context manager.

    Args:
        path: the GGUF file.
        adapter: a LoRA adapter as GGUF, applied at scale 1.
        context: longest sequence, in tokens.
        exact: keep the attention cache in float32 and leave flash attention out, so that what is measured is the
            file's weights; False computes as llama-server does by default.
        threads: threads to compute with; 0 for one a core.
        vocabulary_only: read no weights; what is asked of it are tokens.

    Raises (on entering):
        UserError: no such file.
        PipelineError: llama.cpp cannot load it, with what it said.

    Attributes:
        vocabulary_size: how many logits each position has.
    """

    def __init__(
        self,
        path: Path,
        *,
        adapter: Path | None = None,
        context: int = 4096,
        exact: bool = True,
        threads: int = 0,
        vocabulary_only: bool = False,
    ) -> None:
        self.path = path
        self.adapter = adapter
        self.context = context
        self.exact = exact
        self.threads = threads or cores()
        self.vocabulary_only = vocabulary_only
        self.vocabulary_size = 0
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        for path in (self.path, self.adapter):
            if path is not None and not path.is_file():
                raise UserError(f"{path}: no such file")
        with contextlib.ExitStack() as stack:
            self._load(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _load(self, stack: contextlib.ExitStack) -> None:
        library = _llama()
        _errors.clear()
        model_parameters = library.llama_model_default_params()
        model_parameters.n_gpu_layers = 0
        model_parameters.vocab_only = self.vocabulary_only
        model = library.llama_model_load_from_file(os.fsencode(self.path), model_parameters)
        if not model:
            raise PipelineError(f"llama.cpp cannot load {self.path}:\n  " + "\n  ".join(_errors[-6:]))
        stack.callback(library.llama_model_free, model)
        self._vocabulary = library.llama_model_get_vocab(model)
        self.vocabulary_size = library.llama_vocab_n_tokens(self._vocabulary)
        if self.vocabulary_only:
            return

        parameters = library.llama_context_default_params()
        parameters.n_ctx = self.context
        parameters.n_batch = parameters.n_ubatch = min(512, self.context)
        parameters.n_outputs_max_per_seq = 0  # as many as there are tokens
        parameters.n_threads = parameters.n_threads_batch = self.threads
        parameters.no_perf = True
        if self.exact:
            parameters.type_k = parameters.type_v = _F32
            parameters.flash_attn_type = 0
        self._batch_size = int(parameters.n_batch)
        self._handle = library.llama_init_from_model(model, parameters)
        if not self._handle:
            raise PipelineError(
                f"llama.cpp has no room for {self.context} tokens of {self.path}:\n  " + "\n  ".join(_errors[-6:])
            )
        stack.callback(library.llama_free, self._handle)
        if self.adapter is not None:
            self._apply(library, model, self.adapter)

    def _apply(self, library: ctypes.CDLL, model: int, path: Path) -> None:
        adapter = library.llama_adapter_lora_init(model, os.fsencode(path))  # freed with the model
        if not adapter or library.llama_set_adapters_lora(
            self._handle, (ctypes.c_void_p * 1)(adapter), 1, (ctypes.c_float * 1)(1.0)
        ):
            raise PipelineError(f"llama.cpp cannot apply {path} to {self.path}:\n  " + "\n  ".join(_errors[-6:]))

    def tokenize(self, text: str, add_special: bool = False, parse_special: bool = True) -> list[int]:
        """The ids of a text; the arguments are those of LlamaServer.tokenize."""
        data = text.encode("utf-8")
        room = len(data) + 8
        ids = (ctypes.c_int32 * room)()
        count = _llama().llama_tokenize(self._vocabulary, data, len(data), ids, room, add_special, parse_special)
        if count < 0:
            raise PipelineError(f"{self.path}: a text of {len(data)} bytes cannot be tokenized ({count})")
        return list(ids[:count])

    def ends_turn(self, id: int) -> bool:
        """Whether llama.cpp stops generating at this token."""
        return bool(_llama().llama_vocab_is_eog(self._vocabulary, id))

    def logits(self, ids: Sequence[int]) -> "NDArray[np.float32]":
        """The logits after each token of a sequence.

        Args:
            ids: token ids, at most `context` of them; nothing is added.

        Returns:
            [len(ids), vocabulary_size], float32.

        Raises:
            PipelineError: an id is outside the vocabulary, the sequence is too long, or computing failed.
        """
        import numpy as np

        if not ids or len(ids) > self.context:
            raise PipelineError(f"{self.path}: a sequence of {len(ids)} tokens in a context of {self.context}")
        if min(ids) < 0 or max(ids) >= self.vocabulary_size:
            raise PipelineError(f"{self.path}: a token id is outside the vocabulary of {self.vocabulary_size}")
        library = _llama()
        library.llama_memory_clear(library.llama_get_memory(self._handle), True)
        result = np.empty((len(ids), self.vocabulary_size), dtype=np.float32)
        for start in range(0, len(ids), self._batch_size):
            part = ids[start : start + self._batch_size]
            tokens = (ctypes.c_int32 * len(part))(*part)
            wanted = (ctypes.c_int8 * len(part))(*[1] * len(part))
            # Positions and the sequence's number are left out: llama.cpp goes on where it was.
            status = library.llama_decode(self._handle, _Batch(n_tokens=len(part), token=tokens, logits=wanted))
            if status:
                raise PipelineError(f"{self.path}: llama_decode returned {status}: " + "; ".join(_errors[-3:]))
            rows = library.llama_get_logits(self._handle)
            result[start : start + len(part)] = np.ctypeslib.as_array(rows, (len(part), self.vocabulary_size))
        return result
