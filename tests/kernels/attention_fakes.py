"""Stand-ins for the attention packages: their signatures and pitfalls, computed in plain torch.

Each keeps what a caller can get wrong: default masks and scales, the order of arguments, memory
layouts that the kernel assumes, and packed gradients. Signatures: flash-attn 2.8.3.post2,
hopper/flash_attn_interface.py at 01afd16d, flash-attn-4 4.0.0b36, transformer_engine 2.20.2;
`fake_cudnn` has cuDNN's.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tests.kernels import fake_cudnn

Calls = list[dict[str, Any]]


def probabilities(q: torch.Tensor, k: torch.Tensor, scale: float, causal: bool) -> torch.Tensor:
    scores = torch.einsum("blhd,bthd->bhlt", q, k) * scale
    return (
        scores.masked_fill(torch.ones(scores.shape[-2:]).tril() == 0, -torch.inf)
        if causal
        else scores
    ).softmax(-1)


def plain(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool
) -> torch.Tensor:
    return torch.einsum("bhlt,bthd->blhd", probabilities(q, k, scale, causal), v).contiguous()


def gradients(
    q: Any, k: Any, v: Any, dout: Any, scale: float, causal: bool
) -> tuple[torch.Tensor, ...]:
    # Written out: within a registered op there is no autograd.
    weights = probabilities(q, k, scale, causal)
    product = torch.einsum("blhd,bthd->bhlt", dout, v)
    slopes = scale * weights * (product - (product * weights).sum(-1, keepdim=True))
    dq, dk = torch.einsum("bhlt,bthd->blhd", slopes, k), torch.einsum("bhlt,blhd->bthd", slopes, q)
    return dq, dk, torch.einsum("bhlt,blhd->bthd", weights, dout)


class Packed(torch.autograd.Function):
    """Attention whose gradients are slices of one tensor q | k | v, or of two, q and k | v."""

    @staticmethod
    def forward(ctx: Any, scale: float, causal: bool, *tensors: torch.Tensor) -> torch.Tensor:
        ctx.options = scale, causal
        ctx.save_for_backward(*tensors)
        return plain(*Packed.parts(tensors), scale, causal)

    @staticmethod
    def parts(tensors: Any) -> list[torch.Tensor]:
        return [part for x in tensors for part in (x.unbind(2) if x.dim() == 5 else [x])]

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> Any:
        grads = [torch.empty(x.shape, dtype=x.dtype) for x in ctx.saved_tensors]
        results = gradients(*Packed.parts(ctx.saved_tensors), dout, *ctx.options)
        for slot, result in zip(Packed.parts(grads), results, strict=True):
            slot.copy_(result)
        return None, None, *grads


def flash_attention_2(calls: Calls) -> dict[str, types.ModuleType]:
    def flash_attn_qkvpacked_func(
        qkv,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
    ):
        calls.append(
            {"qkv": qkv, "dropout_p": dropout_p, "softmax_scale": softmax_scale, "causal": causal}
        )
        return Packed.apply(softmax_scale, causal, qkv)

    def flash_attn_kvpacked_func(
        q,
        kv,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
    ):
        calls.append(
            {
                "q": q,
                "kv": kv,
                "dropout_p": dropout_p,
                "softmax_scale": softmax_scale,
                "causal": causal,
            }
        )
        return Packed.apply(softmax_scale, causal, q, kv)

    package, interface = (
        types.ModuleType("flash_attn"),
        types.ModuleType("flash_attn.flash_attn_interface"),
    )
    package.flash_attn_qkvpacked_func, package.flash_attn_kvpacked_func = (
        flash_attn_qkvpacked_func,
        flash_attn_kvpacked_func,
    )
    return {"flash_attn": package, "flash_attn.flash_attn_interface": interface}


def flash_attention_3(calls: Calls) -> dict[str, types.ModuleType]:
    def flash_attn_qkvpacked_func(
        qkv,
        softmax_scale=None,
        causal=False,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        window_size=(-1, -1),
        attention_chunk=0,
        softcap=0.0,
        deterministic=False,
        num_heads_q=None,
        sm_margin=0,
        return_attn_probs=False,
    ):
        calls.append({"qkv": qkv, "softmax_scale": softmax_scale, "causal": causal})
        return Packed.apply(softmax_scale, causal, qkv)

    def flash_attn_func(
        q,
        k,
        v,
        softmax_scale=None,
        causal=False,
        qv=None,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        window_size=(-1, -1),
        attention_chunk=0,
        softcap=0.0,
        num_splits=1,
        pack_gqa=None,
        deterministic=False,
        sm_margin=0,
        return_attn_probs=False,
    ):
        calls.append(
            {"q": q, "k": k, "v": v, "softmax_scale": softmax_scale, "causal": causal, "qv": qv}
        )
        return Packed.apply(softmax_scale, causal, q, k, v)

    module = types.ModuleType("flash_attn_interface")
    module.flash_attn_qkvpacked_func, module.flash_attn_func = (
        flash_attn_qkvpacked_func,
        flash_attn_func,
    )
    return {"flash_attn_interface": module}


FLASH_4_MODULES = ("cute", "cute.interface")


def flash_attention_4(calls: Calls) -> dict[str, types.ModuleType]:
    def flash_attn_func(
        q,
        k,
        v,
        qv=None,
        gather_kv_indices=None,
        softmax_scale=None,
        causal=False,
        window_size=(None, None),
        learnable_sink=None,
        softcap=0.0,
        num_splits=1,
        pack_gqa=None,
        deterministic=False,
        score_mod=None,
        score_mod_bwd=None,
        mask_mod=None,
        aux_tensors=None,
        aux_scalars=None,
        block_sparse_tensors=None,
        block_sparse_tensors_bwd=None,
        return_lse=False,
        gather_bwd_recompute_p=False,
        gather_bwd_token_chunk=None,
    ):
        tensors = {"q": q, "k": k, "v": v, "qv": qv}
        calls.append({**tensors, "softmax_scale": softmax_scale, "causal": causal})
        lse = torch.zeros(q.shape[0], q.shape[2], q.shape[1]) if return_lse else None
        return plain(q, k, v, softmax_scale, causal), lse

    def _flash_attn_bwd(
        q,
        k,
        v,
        out,
        dout,
        lse,
        softmax_scale=None,
        causal=False,
        softcap=0.0,
        window_size_left=None,
        window_size_right=None,
        *,
        deterministic=False,
        dq=None,
        dk=None,
        dv=None,
        dlse=None,
    ):
        calls.append({"dout": dout, "lse": lse, "dq": dq, "dk": dk, "dv": dv})
        results = gradients(q, k, v, dout, softmax_scale, causal)
        for slot, result in zip((dq, dk, dv), results, strict=True):
            slot.copy_(result)
        return dq, dk, dv

    cute, interface = (types.ModuleType(f"flash_attn.{name}") for name in FLASH_4_MODULES)
    cute.flash_attn_func, interface._flash_attn_bwd = flash_attn_func, _flash_attn_bwd
    package = types.ModuleType("flash_attn")
    return {module.__name__: module for module in (package, cute, interface)}


def _dense(x: torch.Tensor, parts: int) -> torch.Tensor:
    """The numbers that a kernel reads which takes x for one of `parts` of a dense packed tensor."""
    _, L, H, D = x.shape
    return x.as_strided(x.shape, (L * parts * H * D, parts * H * D, D, 1))


class _TransformerEngineFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, scale: float, causal: bool) -> torch.Tensor:
        ctx.self_attention = q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
        read = (
            _dense(q, 3 if ctx.self_attention else 1),
            *(_dense(x, 3 if ctx.self_attention else 2) for x in (k, v)),
        )
        ctx.options = scale, causal
        ctx.save_for_backward(*read)
        return plain(*read, scale, causal).flatten(2)

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> Any:
        q, k, v = ctx.saved_tensors
        (B, L, H, D), T = q.shape, k.shape[1]
        if ctx.self_attention:
            slots = torch.empty(B, L, 3, H, D, dtype=q.dtype).unbind(2)
        else:
            slots = torch.empty_like(q), *torch.empty(B, T, 2, H, D, dtype=q.dtype).unbind(2)
        for slot, result in zip(
            slots, gradients(q, k, v, dout.view(q.shape), *ctx.options), strict=True
        ):
            slot.copy_(result)
        return *slots, None, None


def transformer_engine(calls: Calls) -> dict[str, types.ModuleType]:
    state = {"fp8": True}

    @contextmanager
    def autocast(
        enabled=True, calibrating=False, recipe=None, amax_reduction_group=None
    ) -> Iterator[None]:
        before, state["fp8"] = state["fp8"], enabled
        yield
        state["fp8"] = before

    class DotProductAttention:
        def __init__(
            self,
            num_attention_heads,
            kv_channels,
            num_gqa_groups=None,
            attention_dropout=0.0,
            qkv_format="sbhd",
            attn_mask_type="causal",
            window_size=None,
            *,
            attention_type="self",
            softmax_scale=None,
        ) -> None:
            self.options = {
                "qkv_format": qkv_format,
                "mask": attn_mask_type,
                "attention_type": attention_type,
            }
            self.heads, self.scale = (num_attention_heads, kv_channels), softmax_scale

        def __call__(self, query_layer, key_layer, value_layer):
            assert query_layer.shape[-2:] == self.heads
            calls.append({**self.options, "fp8": state["fp8"]})
            causal = self.options["mask"] == "causal"
            return _TransformerEngineFunction.apply(
                query_layer, key_layer, value_layer, self.scale, causal
            )

    modules = {
        name: types.ModuleType(name)
        for name in ("transformer_engine", "transformer_engine.pytorch")
    }
    module = modules["transformer_engine"].pytorch = modules["transformer_engine.pytorch"]
    module.DotProductAttention, module.autocast = DotProductAttention, autocast
    return modules


FAKES = {
    "cudnn_graph": lambda calls: fake_cudnn.modules(calls, plain, gradients),
    "fa2": flash_attention_2,
    "fa3": flash_attention_3,
    "fa4": flash_attention_4,
    "te": transformer_engine,
}


def install(backend: str, monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Install the stand-in of a backend's package; the list keeps its calls."""
    calls: Calls = []
    for name, module in FAKES[backend](calls).items():
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        monkeypatch.setenv(name, "1")
    monkeypatch.delitem(sys.modules, "sd_kernels.attention.te", raising=False)
    if backend == "cudnn_graph":
        from sd_kernels.attention import cudnn_graph

        cudnn_graph._handle.cache_clear()
        cudnn_graph._plan.cache_clear()
    return calls
