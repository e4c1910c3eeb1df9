"""The frozen OpenCLIP text tower: captions to the text states that Stable Diffusion v2 takes.

As in the LDM code base (`ldm/modules/encoders/modules.py`, FrozenOpenCLIPEmbedder, layer
"penultimate"), the last transformer block is skipped and the final LayerNorm applied. Tokens are
padded with 0, and padding is attended like any token. The tower is open_clip's own code.

Shape letters: B captions, T text tokens, D channels.
"""

from __future__ import annotations

from pathlib import Path

import torch

from sd_perf.config import TextEncoderConfig
from sd_perf.models.open_clip_library import (
    built,
    import_open_clip,
    read_open_clip_weights,
    register_model,
)
from sd_perf.models.weight_files import (
    PREFIXES,
    load_into,
    read_ldm_checkpoint,
    require_fit,
    split_components,
)


class OpenClipTextEncoder(torch.nn.Module):
    """`encoder(captions)`: text states (B, T, D) float32 of B captions, on the encoder's device.

    Raises ConfigError where open_clip or the model is missing, CheckpointError for weights that are
    missing or do not fit.
    """

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        open_clip = import_open_clip("text_encoder.model")
        name = register_model(open_clip, "text_encoder.model", config.model)
        model_config = open_clip.get_model_config(name)
        weights = _text_weights(config)

        def build() -> torch.nn.Module:
            return open_clip.model._build_text_tower(
                model_config["embed_dim"],
                model_config["text_cfg"],
                quick_gelu=model_config.get("quick_gelu", False),
            )

        if weights is not None:
            with torch.device("meta"):  # no memory is taken for sizes that the weights have not
                tower = built("text_encoder.model", config.model, build)
                require_fit(tower, weights, "the text encoder", config.weights)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # so that weights: random are the same in every run
            self.tower = built("text_encoder.model", config.model, build)
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


def _text_weights(config: TextEncoderConfig) -> dict[str, torch.Tensor] | None:
    """Weights of the text tower in an LDM checkpoint or an open_clip file; None for "random".

    What is no weight of the tower is left out: the image tower, the causal mask, the logit scale.
    """
    file = config.weights
    if file == "random":
        return None
    config.require(bool(file), "weights", 'a file of weights (or "random")')
    path = Path(file)
    is_pickle = path.suffix == ".ckpt"
    state = (
        read_ldm_checkpoint(path)
        if is_pickle
        else read_open_clip_weights(path, "text_encoder.weights")
    )
    if is_pickle or any(name.startswith(PREFIXES["text"]) for name in state):
        state = split_components(state)["text"]
    tower = {name: value for name, value in state.items() if not name.startswith("visual.")}
    for constant in ("attn_mask", "logit_scale", "logit_bias"):
        tower.pop(constant, None)
    return tower
