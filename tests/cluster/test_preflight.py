"""What pre-flight finds in what the nodes say of themselves."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path

import pytest

from sd_perf.cluster.preflight import (
    Facts,
    UnfitNodesError,
    describe,
    gather_facts,
    read_by,
    require_alike,
    require_fit_nodes,
)
from sd_perf.distributed.world import start_world

RESULTS = Path("/results")


def facts(node: str, **changes: object) -> Facts:
    fit = Facts(node, 8, 0.01, {"torch": "2.13.0"}, {"/data": "8 files"}, (), True, 1000.0)
    return dataclasses.replace(fit, **changes)  # type: ignore[arg-type]


def test_nodes_that_are_alike():
    require_alike([facts("n1"), facts("n1"), facts("n2", clock=1001.0)], 8, RESULTS)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"files": {"/data": "no such file"}, "missing": ("/data",)}, "/data: no such file"),
        ({"files": {"/data": "7 files"}}, "/data 7 files, 8 files elsewhere"),
        ({"versions": {"torch": "2.12.0"}}, "torch 2.12.0, 2.13.0 elsewhere"),
        ({"gpus": 7}, "7 GPUs where 8 are asked for"),
        ({"gpu_busy": 0.5}, "50 % of a GPU's memory is taken by others"),
        ({"sees_results": False}, "/results: is another folder here"),
        ({"clock": 1030.0}, "its clock is 30.0 s ahead of n1's"),
    ],
)
def test_the_node_that_is_unlike_the_others(change, told):
    with pytest.raises(UnfitNodesError) as error:
        require_alike([facts("n1"), facts("n2", **change), facts("n3")], 8, RESULTS)
    assert str(error.value).startswith("pre-flight: n2 is unfit (") and told in str(error.value)
    assert error.value.nodes == ["n2"] and "--exclude n2" in str(error.value)
    assert pickle.loads(pickle.dumps(error.value)).nodes == ["n2"]


def test_two_nodes_that_differ_are_both_named():
    with pytest.raises(UnfitNodesError) as error:
        require_alike([facts("n1"), facts("n2", versions={"torch": "2.12.0"})], 8, RESULTS)
    assert error.value.nodes == ["n1", "n2"]


def test_sizes_of_files(tmp_path):
    assert describe(tmp_path / "absent") == ("no such file or directory", False)
    assert describe(tmp_path) == ("an empty folder", False)
    (tmp_path / "a").write_bytes(b"123")
    told, there = describe(tmp_path)
    assert there and told.startswith("1 files of 3 bytes")
    assert describe(tmp_path / "a") == ("3 bytes", True)
    (tmp_path / "a").write_bytes(b"1234")
    assert describe(tmp_path)[0] != told


@pytest.mark.parametrize(
    ("data", "weights", "read"),
    [
        ({"format": "synthetic"}, "random", []),
        ({"path": "/d", "context": "precomputed"}, "", ["/d"]),
        ({"path": "/d"}, "/clip", ["/d", "/clip"]),
        ({"path": "/d"}, "random", ["/d"]),
        ({"path": "/d", "format": "raw", "autoencoder": "/vae"}, "/clip", ["/d", "/vae", "/clip"]),
        ({"path": "/d", "context": "precomputed", "drop_captions": 0.1}, "/clip", ["/d", "/clip"]),
    ],
)
def test_what_training_reads(data, weights, read, make_config):
    config = make_config(
        data={"format": "moments", "context": "open_clip", **data},
        text_encoder={"weights": weights},
    )
    assert [str(path) for path in read_by(config)] == read


def test_a_world_of_one(make_config, tmp_path):
    config, world = make_config(), start_world("cpu")
    assert require_fit_nodes(config, world, tmp_path / "results", 0) == "nodes fit: 1, processes: 1"
    assert not list((tmp_path / "results").iterdir())
    mine = gather_facts(config, world, tmp_path)
    assert mine.sees_results and mine.files == {} and "torch" in mine.versions
