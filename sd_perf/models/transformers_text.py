"""The text tower and its tokenizer as transformers' `CLIPTextModel` and `CLIPTokenizer`.

Stable Diffusion v2 takes the states before the last block, through the final LayerNorm (see
`text_encoder`). A CLIPTextModel without the last block gives them as its last hidden state; so do
the published pipelines (23 of 24 layers).

Shape letters: D channels.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from sd_perf.errors import CheckpointError
from sd_perf.models.text_encoder import OpenClipTextEncoder

_NAMES = {
    "token_embedding": "embeddings.token_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final": "final_layer_norm",
}
_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_ACTIVATIONS = {"GELU": "gelu", "QuickGELU": "quick_gelu"}
_START, _END, _PAD = "<|startoftext|>", "<|endoftext|>", "<|pad|>"
_UNUSED = ("text_projection", "attn_mask", "logit_scale", "logit_bias")


def text_config(encoder: OpenClipTextEncoder) -> dict[str, Any]:
    """The content of `config.json` for the tower without its last block.

    Raises CheckpointError for a tower that CLIPTextModel cannot express.
    """
    tower: Any = encoder.tower
    block = tower.transformer.resblocks[0]
    activation = type(block.mlp.gelu).__name__
    if activation not in _ACTIVATIONS or tower.attn_mask is None:
        raise _other_tower("its activation or its attention, which is not causal")
    embedding = tower.token_embedding.weight
    return {
        "architectures": ["CLIPTextModel"],
        "bos_token_id": encoder.tokenizer.sot_token_id,
        "eos_token_id": encoder.tokenizer.eot_token_id,
        "hidden_act": _ACTIVATIONS[activation],
        "hidden_size": embedding.shape[1],
        "intermediate_size": block.mlp.c_fc.out_features,
        "layer_norm_eps": tower.ln_final.eps,
        "max_position_embeddings": tower.context_length,
        "model_type": "clip_text_model",
        "num_attention_heads": block.attn.num_heads,
        "num_hidden_layers": len(tower.transformer.resblocks) - 1,
        "pad_token_id": 0,
        # What transformers computes in unless it is told otherwise, as diffusers does unless it is.
        "torch_dtype": "float32",
        "vocab_size": embedding.shape[0],
    }


def text_weights(encoder: OpenClipTextEncoder) -> dict[str, torch.Tensor]:
    """The tower's weights, without those of its last block, under transformers' names.

    open_clip has one matrix for queries, keys and values, (3D, D), transformers three. Raises
    CheckpointError for a weight that a CLIPTextModel does not have.
    """
    tower: Any = encoder.tower
    last = f"transformer.resblocks.{len(tower.transformer.resblocks) - 1}."
    weights: dict[str, torch.Tensor] = {}
    for name, value in tower.state_dict().items():
        if name.startswith(last) or name in _UNUSED:
            continue
        weights |= {f"text_model.{theirs}": part for theirs, part in _renamed(name, value)}
    return weights


def _renamed(name: str, value: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """The names in transformers of a weight of open_clip, and what each of them holds of it."""
    path, table = "", _NAMES
    if name.startswith("transformer.resblocks."):
        number, _, name = name.removeprefix("transformer.resblocks.").partition(".")
        path, table = f"encoder.layers.{number}.", _BLOCK
    if path and name.startswith("attn.in_proj_"):
        kind = name.removeprefix("attn.in_proj_")
        parts = zip("qkv", value.chunk(3), strict=True)
        return [(f"{path}self_attn.{letter}_proj.{kind}", part) for letter, part in parts]
    for ours, theirs in table.items():
        if name == ours or name.startswith(f"{ours}."):
            return [(f"{path}{theirs}{name.removeprefix(ours)}", value)]
    raise _other_tower(f"the weight {name}")


def _other_tower(what: str) -> CheckpointError:
    return CheckpointError(
        f"the text encoder has a form that transformers' CLIPTextModel lacks: {what}; export with "
        "--format ldm"
    )


def write_tokenizer(encoder: OpenClipTextEncoder, folder: Path) -> None:
    """Make the folder of a `CLIPTokenizer` that gives the tower's tokens.

    Padding is token 0, which is "!" within a word, too. It has a name of its own here: under "!",
    as in published pipelines, the tokenizer would take every "!" of a caption for padding.
    """
    folder.mkdir()
    tokenizer = encoder.tokenizer
    special = {tokenizer.sot_token_id: _START, tokenizer.eot_token_id: _END}
    vocabulary = {special.get(token, name): token for name, token in tokenizer.encoder.items()}
    merges = "".join(f"{first} {second}\n" for first, second in tokenizer.bpe_ranks)
    names = {
        "bos_token": _START,
        "eos_token": _END,
        "pad_token": _PAD,
        "unk_token": _END,
    }
    entries = {
        **names,
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": encoder.tokenizer.context_length,
        "tokenizer_class": "CLIPTokenizer",
    }
    (folder / "vocab.json").write_text(
        json.dumps({**vocabulary, _PAD: 0}, ensure_ascii=False), encoding="utf-8"
    )
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(names, indent=2) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(entries, indent=2) + "\n")
