"""The frozen OpenCLIP text tower: captions to text states, as Stable Diffusion v2 conditions on them.

The states are those before the last transformer block, through the final LayerNorm ("penultimate", Rombach et al.'s
FrozenOpenCLIPEmbedder); tokens are padded with 0 and every position is attended. The tower is open_clip's own code.

Shape letters: B captions, T text tokens, D channels.
"""

from __future__ import annotations

from pathlib import Path

import torch

from sd_perf.config import TextEncoderConfig
from sd_perf.errors import CheckpointError, ConfigError
from sd_perf.files import one_line
from sd_perf.models.open_clip_library import import_open_clip, register_model
from sd_perf.models.weight_files import load_into, read_ldm_checkpoint, split_components

VOCABULARY = 49408
"""tokens of CLIP's byte-pair encoding"""


class OpenClipTextEncoder(torch.nn.Module):
    """`encoder(captions) -> (B, T, D)` float32 on the encoder's device, without gradients."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        open_clip = import_open_clip("text_encoder.model")
        name = register_model(open_clip, "text_encoder.model", config.model)
        model_config = open_clip.get_model_config(name)
        weights = _text_weights(config.weights)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # what weights: random means
            self.tower = open_clip.model._build_text_tower(model_config["embed_dim"], model_config["text_cfg"])
        self.tokenizer = open_clip.SimpleTokenizer(context_length=self.tower.context_length)
        self.width = self.tower.ln_final.normalized_shape[0]
        if weights is not None:
            load_into(self.tower, weights, "the text encoder", config.weights)
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, captions: list[str]) -> torch.Tensor:
        tower = self.tower
        tokens = self.tokenizer(captions).to(tower.positional_embedding.device)
        states = tower.token_embedding(tokens) + tower.positional_embedding
        for block in tower.transformer.resblocks[:-1]:
            states = block(states, attn_mask=tower.attn_mask)
        return tower.ln_final(states).float()


def _text_weights(file: str) -> dict[str, torch.Tensor] | None:
    """Text-tower weights of an LDM checkpoint or a whole open_clip model, or None for "random".

    The causal mask is a constant and left out.
    """
    if file == "random":
        return None
    if not file:
        raise ConfigError("text_encoder.weights: '' cannot be used; it must be a file of weights (or \"random\")")
    path = Path(file)
    is_ldm = path.suffix == ".ckpt"
    state = split_components(read_ldm_checkpoint(path))["text"] if is_ldm else _read_open_clip(path)
    tower = {name: value for name, value in state.items() if not name.startswith("visual.")}
    for constant in ("attn_mask", "logit_scale", "logit_bias"):
        tower.pop(constant, None)
    return tower


def _read_open_clip(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; text_encoder.weights names the text encoder's weights")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return _with_whole_vocabulary(load_file(path))
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each format has its own errors for damaged files
        raise CheckpointError(f"{path}: not a file of open_clip weights ({one_line(error)})") from error


def _with_whole_vocabulary(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights whose token embedding is complete.

    Of CLIP's 49,408 tokens a small world knows a dozen. Its file keeps only their rows (`token_embedding.rows`, with
    their numbers in `token_embedding.ids`); every other token is 0: it takes a place in the caption, and means nothing.
    """
    if "token_embedding.rows" in state:
        rows, ids = state.pop("token_embedding.rows"), state.pop("token_embedding.ids")
        whole = torch.zeros(VOCABULARY, rows.shape[1], dtype=rows.dtype)
        whole[ids] = rows
        state["token_embedding.weight"] = whole
    return state


def read_clip(config: TextEncoderConfig) -> tuple[torch.nn.Module, Any]:
    """open_clip's whole frozen model (`encode_image`, `encode_text`), float32 on the CPU, and its tokenizer.

    `config.weights` is a file of open_clip weights. Pictures are normalised as open_clip's own preprocessing does.
    """
    open_clip = _import_open_clip()
    entries = _model_config(open_clip, config.model)
    model = open_clip.CLIP(**entries)
    state = _read_open_clip(Path(config.weights))
    load_into(model, {name: value for name, value in state.items() if name != "attn_mask"}, "CLIP", config.weights)
    return model.requires_grad_(False).eval(), open_clip.SimpleTokenizer(context_length=model.context_length)
