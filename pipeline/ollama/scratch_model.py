"""A model of a few kilobytes that real servers load in no time: it is asked for prompts, never for answers.

What a server sends depends on the chat template, on the texts of BOS and EOS and on whether the tokenizer adds them;
and in Ollama on the architecture's name: it drops thinking from the earlier answers of every "qwen3". So templates are
tried on this one, and only the one that is chosen is tried on the real model, when it is deployed.
"""

from pathlib import Path

from pipeline.prompt.template import ChatTemplate

_WIDTH = 32
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6


def write_scratch_model(path: Path, template: ChatTemplate | None = None) -> Path:
    """Write the GGUF file.

    Args:
        path: the file.
        template: the chat template that it carries; one without a source, or None, for a model without one.

    Returns:
        The path.
    """
    import gguf
    import numpy as np

    bos = template.bos_token if template and template.bos_token else "<s>"
    eos = template.eos_token if template and template.eos_token else "</s>"
    tokens = ["<unk>", bos, eos if eos != bos else "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += ["\u2581", *(chr(code) for code in range(ord("a"), ord("z") + 1))]
    types = [_UNKNOWN, _CONTROL, _CONTROL, *[_BYTE] * 256, *[_NORMAL] * 27]

    # A qwen3 is a llama with norms on its queries and keys. No other name matters, but to code that ignores templates.
    qwen3 = template is not None and template.architecture == "qwen3"
    writer = gguf.GGUFWriter(path, "qwen3" if qwen3 else "llama")
    writer.add_name("scratch")
    writer.add_context_length(131072)
    writer.add_embedding_length(_WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(_WIDTH)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_rope_dimension_count(_WIDTH)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_file_type(0)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types(types)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(1 if eos == bos else 2)
    writer.add_add_bos_token(template.adds_bos if template else False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    if template is not None and template.source:
        writer.add_chat_template(template.source)

    random = np.random.default_rng(0)
    shapes = {
        "token_embd.weight": (len(tokens), _WIDTH),
        "output.weight": (len(tokens), _WIDTH),
        "output_norm.weight": (_WIDTH,),
        "blk.0.attn_norm.weight": (_WIDTH,),
        "blk.0.ffn_norm.weight": (_WIDTH,),
        **{f"blk.0.{name}.weight": (_WIDTH, _WIDTH) for name in ("attn_q", "attn_k", "attn_v", "attn_output")},
        **{f"blk.0.{name}.weight": (_WIDTH, _WIDTH) for name in ("ffn_gate", "ffn_up", "ffn_down")},
        **({f"blk.0.{name}.weight": (_WIDTH,) for name in ("attn_q_norm", "attn_k_norm")} if qwen3 else {}),
    }
    for name, shape in shapes.items():
        writer.add_tensor(name, random.normal(scale=0.02, size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
