"""The text tower: published tokens, open_clip's own penultimate states, weight files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sd_perf.config import TextEncoderConfig
from sd_perf.errors import CheckpointError, ConfigError
from sd_perf.models.text_encoder import OpenClipTextEncoder

TINY = str(Path(__file__).parents[2] / "configs" / "text_tiny.json")


@pytest.fixture(scope="module")
def encoder() -> OpenClipTextEncoder:
    return OpenClipTextEncoder(TextEncoderConfig(TINY, "random"))


def test_tokens_are_clips_padded_with_zero(encoder):
    """CLIP's published tokens of "a photo of a cat".

    Case, spaces and HTML entities do not matter.
    """
    for caption in ("a photo of a cat", "  A photo\nof a &#99;at "):
        assert (
            encoder.tokenizer([caption])[0].tolist()
            == [49406, 320, 1125, 539, 320, 2368, 49407] + [0] * 17
        )


def test_long_captions_end_with_the_end_token(encoder):
    tokens = encoder.tokenizer(["word " * 100])[0]
    assert len(tokens) == 24 and tokens[-1] == 49407


def test_states_are_penultimate(encoder):
    """Compared with open_clip's own forward, hooked after the last block but one."""
    captions = ["a dog on a skateboard", ""]
    tower, seen = encoder.tower, []
    hook = tower.transformer.resblocks[-2].register_forward_hook(
        lambda *call: seen.append(call[-1])
    )
    with torch.no_grad():
        tower(encoder.tokenizer(captions))
        expected = tower.ln_final(seen[0])
    hook.remove()
    states = encoder(captions)
    assert states.shape == (2, 24, 128) and states.dtype == torch.float32
    torch.testing.assert_close(states, expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        last = tower.ln_final(tower.transformer.resblocks[-1](seen[0], attn_mask=tower.attn_mask))
    assert (states - last).norm() > 0.1 * last.norm()  # the last block would have been seen


def test_the_activation_is_that_of_the_model(encoder, tmp_path):
    """The first CLIPs were trained with an approximation of GELU; weights fit either."""
    model = json.loads(Path(TINY).read_text())
    (tmp_path / "quick.json").write_text(json.dumps({**model, "quick_gelu": True}))
    quick = OpenClipTextEncoder(TextEncoderConfig(str(tmp_path / "quick.json"), "random"))
    kinds = [type(each.tower.transformer.resblocks[0].mlp.gelu) for each in (encoder, quick)]
    assert [kind.__name__ for kind in kinds] == ["GELU", "QuickGELU"]
    assert not torch.equal(encoder(["a cat"]), quick(["a cat"]))


def test_attention_is_causal_and_padding_is_attended(encoder):
    states = encoder(["a red cat", "a red dog"])
    torch.testing.assert_close(states[0, :3], states[1, :3])
    assert not torch.allclose(states[0, 3], states[1, 3])
    assert states[0, -1].abs().sum() > 0


def test_random_weights_are_the_same_every_time(encoder):
    torch.manual_seed(123)
    again = OpenClipTextEncoder(TextEncoderConfig(TINY, "random"))
    torch.testing.assert_close(again(["a cat"]), encoder(["a cat"]), rtol=0, atol=0)


def test_weights_of_open_clip_and_of_an_ldm_checkpoint(encoder, tmp_path):
    changed = {name: value + 0.01 for name, value in encoder.tower.state_dict().items()}
    extra = {
        "visual.proj": torch.zeros(2),
        "logit_scale": torch.ones(()),
        "attn_mask": encoder.tower.attn_mask,
    }
    torch.save({**changed, **extra}, tmp_path / "open_clip.bin")
    ldm = {f"cond_stage_model.model.{name}": value for name, value in {**changed, **extra}.items()}
    torch.save({"state_dict": ldm}, tmp_path / "sd.ckpt")
    both = [
        OpenClipTextEncoder(TextEncoderConfig(TINY, str(tmp_path / name)))
        for name in ("open_clip.bin", "sd.ckpt")
    ]
    assert all(torch.equal(e.tower.ln_final.bias, changed["ln_final.bias"]) for e in both)


@pytest.mark.parametrize(
    ("config", "error", "sentence"),
    [
        (
            TextEncoderConfig("ViT-H-41", "random"),
            ConfigError,
            "'ViT-H-41' is no model of open_clip",
        ),
        (TextEncoderConfig("absent.json", "random"), ConfigError, "no such file"),
        (TextEncoderConfig(TINY, "absent.bin"), CheckpointError, r"absent\.bin: no such file"),
        (TextEncoderConfig(TINY, TINY), CheckpointError, "not a file of open_clip weights"),
    ],
)
def test_bad_input(config, error, sentence):
    with pytest.raises(error, match=sentence):
        OpenClipTextEncoder(config)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[]", "is no model of open_clip"),
        ("{", "cannot be read as JSON"),
        ('{"embed_dim": 8, "vision_cfg": {}, "text_cfg": 3}', "describes no model"),
        ('{"embed_dim": "x", "vision_cfg": {}, "text_cfg": {}}', "describes no model"),
        (
            '{"embed_dim": 8, "vision_cfg": {}, "text_cfg": {"width": 7, "heads": 2}}',
            "describes no model",
        ),
    ],
)
def test_hostile_models(text, sentence, tmp_path):
    model = tmp_path / f"model_{abs(hash(text))}.json"
    model.write_text(text)
    with pytest.raises(ConfigError, match=sentence):
        OpenClipTextEncoder(TextEncoderConfig(str(model), "random"))


def test_sizes_that_the_weights_have_not_take_no_memory(encoder, tmp_path):
    torch.save(encoder.tower.state_dict(), tmp_path / "weights.bin")
    sizes = json.loads(Path(TINY).read_text())
    sizes["text_cfg"]["width"] = 2**20  # 13 TB in each block
    (tmp_path / "huge.json").write_text(json.dumps(sizes))
    config = TextEncoderConfig(str(tmp_path / "huge.json"), str(tmp_path / "weights.bin"))
    with pytest.raises(CheckpointError, match="not the weights of the text encoder"):
        OpenClipTextEncoder(config)


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        ([torch.zeros(1)], "holds no weights"),
        ({"a": "b"}, "'a' is no tensor"),
        ({"a": torch.zeros(2, 2).to_sparse()}, "without numbers of its own"),
        ({"a": torch.zeros(1).expand(10**5, 10**5)}, "without numbers of its own"),
        ({"a": torch.empty(2, device="meta")}, "without numbers of its own"),
    ],
    ids=["list", "text", "sparse", "spread", "meta"],
)
def test_weights_that_are_none(weights, sentence, tmp_path):
    torch.save(weights, tmp_path / "weights.bin")
    with pytest.raises(CheckpointError, match=sentence):
        OpenClipTextEncoder(TextEncoderConfig(TINY, str(tmp_path / "weights.bin")))


def test_a_vocabulary_of_gigabytes(tmp_path):
    """Few rows become those of all 49,408 tokens."""
    rows = {"rows": torch.zeros(0, 20_000), "ids": torch.zeros(0, dtype=torch.int64)}
    path = tmp_path / "weights.safetensors"
    save_file({f"token_embedding.{name}": value for name, value in rows.items()}, path)
    with pytest.raises(CheckpointError, match="its tokens are 20,000 wide"):
        OpenClipTextEncoder(TextEncoderConfig(TINY, str(path)))


def test_weights_of_another_model(encoder, tmp_path):
    torch.save({"positional_embedding": torch.zeros(3, 3)}, tmp_path / "other.bin")
    with pytest.raises(CheckpointError, match="the text encoder"):
        OpenClipTextEncoder(TextEncoderConfig(TINY, str(tmp_path / "other.bin")))
