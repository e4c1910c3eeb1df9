"""Parameters in one flat buffer: nothing about the network changes but where its weights lie."""

from __future__ import annotations

import copy

import pytest
import torch

from sd_kernels.adamw.reference import adamw
from sd_perf.config import OptimizerConfig
from sd_perf.training.flat import ALIGNMENT, FlatParameters, fill_part, in_memory_order
from sd_perf.training.optimizer import FlatAdamW

DTYPES = [torch.bfloat16, torch.float32]


def network() -> torch.nn.Module:
    """Odd sizes, a channels-last filter, one of a single tap, and a layer without bias."""
    torch.manual_seed(0)
    layers = torch.nn.Sequential(
        torch.nn.Conv2d(3, 5, 3, padding=1),
        torch.nn.Conv2d(5, 7, 1),
        torch.nn.GroupNorm(7, 7),
        torch.nn.Flatten(),
        torch.nn.Linear(7 * 16, 3, bias=False),
    )
    return layers.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def backward(module: torch.nn.Module, seed: int) -> None:
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    module(
        x.to(next(module.parameters()).dtype, memory_format=torch.channels_last)
    ).square().sum().backward()


def collect_all(flat: FlatParameters) -> None:
    for bucket in flat.buckets:
        flat.collect(bucket)


@pytest.mark.parametrize("dtype", DTYPES)
def test_names_shapes_order_and_state_dict_stay(dtype: torch.dtype) -> None:
    module, plain = network(), network()
    flat = FlatParameters(module, dtype)
    state, expected = module.state_dict(), plain.state_dict()
    assert list(state) == list(expected)
    for name, value in state.items():
        assert value.shape == expected[name].shape
        assert value.stride() == expected[name].stride()
        assert value.dtype == dtype
        assert value.untyped_storage().data_ptr() == flat.weights.untyped_storage().data_ptr()
        assert value.storage_offset() % ALIGNMENT == 0
        # Within half an ulp: the flat weights round ties away from zero.
        torch.testing.assert_close(
            value.float(), expected[name], rtol=2**-8 if dtype == torch.bfloat16 else 0, atol=0
        )
    assert module[0].weight.is_contiguous(memory_format=torch.channels_last)
    weight = flat.weights[: module[0].weight.numel()].view(5, 3, 3, 3)
    assert torch.equal(weight, module[0].weight.detach().permute(0, 2, 3, 1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_masters_are_kept_exactly(dtype: torch.dtype) -> None:
    module, plain = network(), dict(network().named_parameters())
    flat = FlatParameters(module, dtype)
    for name, master in flat.views(flat.masters()).items():
        assert torch.equal(master, plain[name]), name
    others = {name: torch.randn_like(value) * 1e-3 for name, value in plain.items()}
    flat.set_masters(others)
    for name, master in flat.views(flat.masters()).items():
        assert torch.equal(master, others[name]), name
    with pytest.raises(ValueError, match=r"'4\.weight' is on one side only"):
        flat.set_masters({name: value for name, value in others.items() if name != "4.weight"})


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_collected(dtype: torch.dtype) -> None:
    module = network()
    flat = FlatParameters(module, dtype)
    plain = copy.deepcopy(module)
    for view in flat.views(flat.grads).values():
        view.fill_(float("nan"))  # nothing of an earlier step may stay
    for network_ in (module, plain):
        backward(network_, 1)
        backward(network_, 2)  # a second micro-batch
    expected = {name: parameter.grad for name, parameter in plain.named_parameters()}
    collect_all(flat)
    views = flat.views(flat.grads)
    for name, gradient in expected.items():
        assert torch.equal(views[name], gradient), name
    assert all(parameter.grad is None for parameter in module.parameters())
    assert sum(torch.count_nonzero(view) for view in views.values()) == torch.count_nonzero(
        flat.grads
    )


def test_later_micro_batches_are_added_in_float32() -> None:
    module = network()
    flat = FlatParameters(module, torch.bfloat16, grads_dtype=torch.float32)
    (bucket,), plain = flat.buckets, copy.deepcopy(module)
    expected = {name: torch.zeros(parameter.shape) for name, parameter in flat.parameters.items()}
    for seed in (1, 2, 3):
        backward(module, seed)
        backward(plain, seed)
        flat.collect(bucket, add=seed > 1)
        for name, parameter in plain.named_parameters():
            expected[name] += parameter.grad.float()  # type: ignore[union-attr]
            parameter.grad = None
    for name, view in flat.views(flat.grads).items():
        assert torch.equal(view, expected[name]), name


def test_buckets_lie_in_the_order_of_use() -> None:
    module = network()
    order = [name for name, _ in module.named_parameters()][::-1]
    flat = FlatParameters(module, torch.float32, order=order, buckets=3, share=(1, 2))
    assert [name for bucket in flat.buckets for name in bucket.names] == order
    assert list(flat.offsets.values()) == sorted(flat.offsets.values())
    position = 0
    for bucket in flat.buckets:
        assert bucket.begin == position and bucket.names
        position = bucket.end
        assert (bucket.end - bucket.begin) % (2 * ALIGNMENT) == 0
        assert bucket.share == slice((bucket.begin + bucket.end) // 2, bucket.end)
        assert bucket.local == slice(bucket.begin // 2, bucket.end // 2)
    assert len(flat.weights) == position and len(flat.local_buffer(torch.int16)) == position // 2
    with pytest.raises(ValueError, match=r"name every parameter once; see '4\.weight'"):
        FlatParameters(network(), torch.float32, order=[n for n in order if n != "4.weight"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_shares_of_all_ranks_make_up_the_whole(dtype: torch.dtype) -> None:
    ranks, plain = 3, dict(network().named_parameters())
    flats = [
        FlatParameters(network(), dtype, buckets=2, share=(rank, ranks)) for rank in range(ranks)
    ]
    values = {name: torch.randn_like(value) for name, value in plain.items()}
    found: dict[str, list[tuple[int, torch.Tensor]]] = {name: [] for name in plain}
    for flat in flats:
        flat.set_masters(values)
        for name, part in flat.parts(flat.masters()).items():
            found[name].append((part.begin, part.values))
    for name, parts in found.items():
        joined = torch.cat([part for _, part in sorted(parts, key=lambda item: item[0])])
        assert torch.equal(joined, in_memory_order(values[name])), name
    moments = flats[1].local_buffer(torch.float32)
    for name, part in flats[1].parts(moments).items():
        fill_part(part, values[name])
    assert torch.equal(moments, flats[1].masters())


def test_it_is_the_same_optimizer() -> None:
    """In float32, against the op on every parameter by itself; in bfloat16 the masters move as
    float32 would."""
    config = OptimizerConfig()
    module, other = network(), network()
    flat, halves = FlatParameters(module, torch.float32), FlatParameters(other, torch.bfloat16)
    optimizer, half = (FlatAdamW(each, config, adamw) for each in (flat, halves))
    masters = {name: value.flatten() for name, value in flat.views(flat.masters()).items()}
    moments = {
        name: (torch.zeros_like(value), torch.zeros_like(value)) for name, value in masters.items()
    }
    for step in range(1, 4):
        backward(module, step)
        collect_all(flat)
        halves.grads.copy_(flat.grads)
        for name, gradient in flat.views(flat.grads).items():
            count, rate = torch.tensor(step), torch.tensor(1e-3, dtype=torch.float64)
            adamw(masters[name], None, gradient.flatten(), *moments[name], count, rate)
        for each in (optimizer, half):
            each.step_number.fill_(step)
            each.learning_rate.fill_(1e-3)
            each.step(each.parameters.buckets[0])
    moved = halves.views(halves.masters())
    for name, master in flat.views(flat.masters()).items():
        assert torch.equal(master.flatten(), masters[name]), name
        assert torch.equal(flat.views(optimizer.exp_avg)[name].flatten(), moments[name][0])
        torch.testing.assert_close(moved[name], master, rtol=0, atol=2e-4)  # of 3 steps of 1e-3
    outside = torch.ones_like(flat.weights, dtype=torch.bool)
    for view in flat.views(outside).values():
        view.fill_(False)
    assert outside.any()
    assert (
        torch.count_nonzero(flat.weights[outside])
        == torch.count_nonzero(halves.weights[outside])
        == 0
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_trial_on_scratch_changes_nothing(dtype: torch.dtype) -> None:
    module, calls = network(), []

    def spy(*tensors: torch.Tensor, **options: float) -> object:
        calls.append(tensors)
        return adamw(*tensors, **options)

    flat = FlatParameters(module, dtype)
    flat.grads.fill_(1.0)
    optimizer = FlatAdamW(flat, OptimizerConfig(), spy)
    optimizer.learning_rate.fill_(1.0)
    state = [flat.weights, optimizer.exp_avg, optimizer.exp_avg_sq, optimizer.step_number]
    state += [] if flat.remainders is None else [flat.remainders]
    before = [tensor.clone() for tensor in state]
    optimizer.try_on_scratch()
    assert all(map(torch.equal, state, before))
    ((weights, *_),) = calls
    assert len(weights) % ALIGNMENT == 0 and not torch.equal(weights, before[0][: len(weights)])


def test_a_parameter_that_left_or_took_no_part_is_an_error() -> None:
    module = network()
    flat = FlatParameters(module, torch.bfloat16)
    backward(module, 1)
    module[4].weight.grad = None
    with pytest.raises(RuntimeError, match=r"4\.weight has no gradient"):
        collect_all(flat)
    backward(module, 1)
    module[0].weight.grad = module[0].weight.grad.contiguous()  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match=r"0\.weight has a gradient in another memory order"):
        collect_all(flat)
    module.zero_grad()
    backward(module, 1)
    module[2].bias.data = module[2].bias.data.clone()
    with pytest.raises(RuntimeError, match=r"2\.bias has left the flat buffer"):
        collect_all(flat)
    with pytest.raises(ValueError, match="must be float32"):
        FlatParameters(module, torch.bfloat16)
    strided = torch.nn.Linear(4, 4)
    strided.weight = torch.nn.Parameter(torch.randn(4, 8)[:, ::2])
    with pytest.raises(ValueError, match="fill its memory"):
        FlatParameters(strided, torch.bfloat16)
