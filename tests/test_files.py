"""Saved files and states: the same numbers come back, or a ValueError names the file and what is wrong with it."""

import json
import math
import os
import stat
import struct
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from helpers.saved_objects import (
    HISTORIES,
    KINDS,
    entry_of,
    joined,
    load,
    named,
    network,
    numbers,
    rewrite,
    save_in_old_format,
    saved_object,
    split,
    statistics,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import crl_kernels as ck

# What cannot be, with or without a digest


def spoiled(tensor: Tensor, damage: str) -> Tensor:
    changed = tensor.clone()
    if damage in ("nan", "inf", "negative"):
        changed.view(-1)[-1] = {"nan": math.nan, "inf": math.inf, "negative": -1e-3}[damage]
        return changed
    return {
        "dtype": lambda: changed.half() if changed.is_floating_point() else changed.int(),
        "short": lambda: changed[..., :-1] if changed.dim() else changed.expand(2),
        "long": lambda: torch.cat([changed, changed]) if changed.dim() else changed.expand(1),
        "flat": lambda: changed.reshape(-1)[None],
    }[damage]()


@pytest.mark.parametrize("damage", ["nan", "inf", "negative", "dtype", "short", "long", "flat"])
@pytest.mark.parametrize("kind", KINDS)
def test_impossible_tensors_are_refused_by_name(kind, damage, tmp_path):
    saved, model = saved_object(kind)
    path = tmp_path / "old.safetensors"
    tensors, entry = save_in_old_format(saved, path)
    signed = ("directions", "anchor", "slopes")
    for name, tensor in tensors.items():
        if (damage in ("nan", "inf") and name == "num_tasks") or (damage == "negative" and name.startswith(signed)):
            continue
        if damage in ("nan", "inf") and tensor.dtype == torch.int8:
            continue
        if (
            kind in ("low-rank Fisher", "low-rank int8 Fisher")
            and name.startswith("directions")
            and damage in ("short", "long")
        ):
            continue  # of other parameters, perhaps: without a digest nothing says so
        changed = {**tensors, name: spoiled(tensor, damage)}
        rewrite(path, changed, entry)
        with pytest.raises(ValueError, match=r"old\.safetensors"):
            load(kind, path, model)
        if kind.endswith("history"):
            before = numbers(saved)
            with pytest.raises(ValueError, match=name.split(".")[0] + "|'0.|'2.|curvatures"):
                saved.load_state_dict(changed)
            assert numbers(saved) == before
    for changed in ({**tensors, "extra": torch.ones(1)}, dict(list(tensors.items())[1:])):
        rewrite(path, changed, entry)
        with pytest.raises(ValueError, match=r"old\.safetensors.*(has 'extra'|lacks|as many directions as)"):
            load(kind, path, model)


@pytest.mark.parametrize("count", [0, -5, 2.5, math.nan, [1], True])
@pytest.mark.parametrize("kind", HISTORIES)
def test_impossible_numbers_of_tasks_are_refused(kind, count, tmp_path):
    saved, model = saved_object(kind)
    before = numbers(saved)
    with pytest.raises(ValueError, match=r"num_tasks in the state|for 0 tasks"):
        saved.load_state_dict({**saved.state_dict(), "num_tasks": torch.tensor(count)})
    assert numbers(saved) == before
    path = tmp_path / "old.safetensors"
    tensors, entry = save_in_old_format(saved, path)
    rewrite(path, {**tensors, "num_tasks": torch.tensor(count)}, entry)
    with pytest.raises(ValueError, match=r"old\.safetensors"):
        load(kind, path, model)


@pytest.mark.parametrize("kind", HISTORIES)
def test_malformed_states_are_refused(kind):
    saved, _ = saved_object(kind)
    before, state = numbers(saved), saved.state_dict()
    vector = next(key for key in state if key.endswith("0.weight"))
    for wrong, error, message in (
        ([], TypeError, "the state is a list; expected a mapping"),
        ({**state, vector: [1.0]}, TypeError, f"{vector} in the state is a list; expected a tensor"),
        ({**state, vector: state[vector].to("meta")}, ValueError, "expected a dense one that has values"),
        ({**state, vector: state[vector].to_sparse()}, ValueError, "expected a dense one"),
        ({**state, vector: state[vector].double()}, ValueError, "expected tensors of one dtype"),
        ({**state, "num_tasks": 2}, TypeError, "num_tasks in the state is a int; expected a tensor"),
        ({**state, "directions.9.0.weight": state[vector]}, ValueError, "directions"),
        ({}, ValueError, "the state lacks"),
    ):
        with pytest.raises(error, match=message):
            saved.load_state_dict(wrong)
        assert numbers(saved) == before


@pytest.mark.parametrize("kind", HISTORIES)
def test_empty_histories_come_back(kind, tmp_path):
    full, model = saved_object(kind)
    empty = type(full)(model, **full._options())
    empty.save(tmp_path / "empty.safetensors")
    loaded = type(full).load(tmp_path / "empty.safetensors", model)
    assert numbers(loaded) == numbers(empty)
    full.load_state_dict(empty.state_dict())
    assert len(full) == 0


def test_a_history_whose_terms_merged_to_none_comes_back(tmp_path):
    model = network()
    history = ck.LowRankHistory(model, max_terms=1)
    for seed in (1, 2):
        history.append(ck.LowRankFisher(named(model, seed, 1), torch.zeros(1), named(model, 3)))
    assert len(history) == 0
    history.save(tmp_path / "h.safetensors")
    assert numbers(ck.LowRankHistory.load(tmp_path / "h.safetensors", model)) == numbers(history)
    assert history.penalty(1.0) == 0


# Versions and metadata


@pytest.mark.parametrize("kind", KINDS)
def test_a_digest_covers_tensors_and_metadata(kind, tmp_path):
    """Contents that are possible, and not what was saved."""
    saved, model = saved_object(kind)
    path = tmp_path / "saved.safetensors"
    saved.save(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors, entry = load_file(path), entry_of(path)
    save_file(tensors, path, metadata)
    assert numbers(load(kind, path, model)) == numbers(saved)  # what another program rewrites is the same file

    changes = [({**tensors, name: (t * 2).to(t.dtype)}, entry) for name, t in tensors.items() if t.any()]
    facts = entry["facts"]
    if kind.endswith("history"):
        changes += [(tensors, {**entry, "facts": {**facts, "num_tasks": 3}})]
        changes += [(tensors, {**entry, "facts": {**facts, "decay": 0.5}})]
    else:
        changes += [(tensors, {**entry, "facts": {**facts, "statistics": {**facts["statistics"], "trace": 1.0}}})]
        changes += [(tensors, {**entry, "facts": {**facts, "names": facts["names"][::-1]}})]
    for changed, changed_entry in changes:
        rewrite(path, changed, changed_entry)
        with pytest.raises(ValueError, match=r"saved\.safetensors' is damaged, or was changed after it was saved"):
            load(kind, path, model)


def test_files_of_a_later_version_are_refused(tmp_path):
    saved, model = saved_object("low-rank history")
    path = tmp_path / "later.safetensors"
    saved.save(path)
    rewrite(path, load_file(path), {"version": 3, "contents": "of another shape"})
    with pytest.raises(ValueError, match=r"later\.safetensors' is of format 3, and this version .* up to 2"):
        ck.LowRankHistory.load(path, model)


@pytest.mark.parametrize(
    "entry",
    [
        [],
        "x",
        3,
        None,
        {},
        {"version": 1},
        {"version": "1", "kind": "LowRankHistory", "facts": {}},
        {"version": True, "kind": "LowRankHistory", "facts": {}},
        {"version": 1, "kind": 3, "facts": {}},
        {"version": 1, "kind": "LowRankHistory", "facts": []},
        {"version": 2, "kind": "x", "facts": {}},
        {"version": 2, "kind": "LowRankHistory", "facts": {}, "digest": None},
    ],
)
def test_malformed_metadata_is_refused(entry, tmp_path):
    path = tmp_path / "odd.safetensors"
    rewrite(path, {"curvatures": torch.ones(1)}, entry)
    for read in (ck.load_fisher, lambda path: ck.LowRankHistory.load(path, network())):
        with pytest.raises(ValueError, match=r"odd\.safetensors"):
            read(path)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("decay", 0.0, "decay is 0.0"),
        ("decay", math.nan, "decay is nan"),
        ("decay", None, "decay is None"),
        ("max_terms", -1, "max_terms is -1"),
        ("first_order", 2, "first_order is 2; expected True or False"),
        ("include", "0", "include in the file .* is '0'; expected a list of patterns"),
        ("exclude", [0], r"exclude in the file .* is \[0\]; expected a list of patterns"),
        ("include", ["head"], "include pattern 'head' matches none"),
        ("model", None, "unknown options"),
        ("surprise", 1, "unknown options"),
    ],
)
def test_impossible_options_are_refused(option, value, message, tmp_path):
    saved, model = saved_object("low-rank history")
    path = tmp_path / "old.safetensors"
    tensors, entry = save_in_old_format(saved, path)
    entry["facts"][option] = value
    rewrite(path, tensors, entry)
    with pytest.raises(ValueError, match=rf"(?s)(?=.*old\.safetensors).*{message}"):
        ck.LowRankHistory.load(path, model)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_samples", 0),
        ("num_samples", 2.5),
        ("num_samples", True),
        ("trace", -1.0),
        ("trace", math.nan),
        ("trace", "1"),
        ("kappa", math.inf),
        ("rho", -0.5),
        ("curvature_se", 0.1),
        ("curvature_se", [-0.1]),
        ("curvature_se", [None]),
        ("signal_share", 1.5),
        ("share", math.nan),
        ("stratum", "a"),
        ("strata", [3]),
        ("strata", {}),
        ("surprise", 1),
    ],
)
def test_impossible_statistics_are_refused(field, value, tmp_path):
    path = tmp_path / "old.safetensors"
    tensors, entry = save_in_old_format(saved_object("low-rank Fisher")[0], path)
    entry["facts"]["statistics"][field] = value
    rewrite(path, tensors, entry)
    with pytest.raises(ValueError, match=rf"old\.safetensors.*{field}|old\.safetensors.*statistics"):
        ck.load_fisher(path)
    if value != {}:
        with pytest.raises((TypeError, ValueError)):
            ck.FisherStatistics(**{**asdict(statistics()), field: value})


def test_files_of_other_programs_are_refused(tmp_path):
    model, path = network(), tmp_path / "odd.safetensors"
    deep = "[" * 100_000
    for data in (
        b"",
        b"\0" * 7,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2**64 - 1),
        struct.pack("<Q", 2) + b"{}",
        b'{"a": [1, 2]}',
        b"PK\x03\x04" + b"\0" * 60,
        joined({"__metadata__": {"crl_kernels": "{"}}, b""),
        joined({"__metadata__": {"crl_kernels": deep}}, b""),
        joined({"__metadata__": {"crl_kernels": "9" * 5000}}, b""),
        joined({"__metadata__": {"crl_kernels": 3}}, b""),
        struct.pack("<Q", 8) + b'{"a":1,"' + b"x",
    ):
        path.write_bytes(data)
        for read in (ck.load_fisher, lambda path: ck.DiagonalHistory.load(path, model)):
            with pytest.raises(ValueError, match=r"odd\.safetensors"):
                read(path)
    for read in (ck.load_fisher, lambda path: ck.DiagonalHistory.load(path, model)):
        with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors' is not a file"):
            read(tmp_path / "nothing.safetensors")
        with pytest.raises(IsADirectoryError, match="is a folder; expected a file"):
            read(tmp_path)


def test_a_tensor_that_occurs_twice_is_refused(tmp_path):
    saved, model = saved_object("diagonal history")
    path = tmp_path / "twice.safetensors"
    saved.save(path)
    header, body = split(path.read_bytes())
    names = [name for name in header if name.startswith("anchor.2")]
    diagonal = next(name for name in header if name.startswith("fisher_diagonal.2"))
    text = json.dumps(header)[:-1] + f', "{names[0]}": {json.dumps(header[diagonal])}}}'
    path.write_bytes(struct.pack("<Q", len(text)) + text.encode() + body)
    with pytest.raises(ValueError, match=r"twice\.safetensors"):
        ck.DiagonalHistory.load(path, model)


def test_paths_that_safetensors_does_not_open(tmp_path):
    saved, model = saved_object("low-rank history")
    path = f"{tmp_path}/\udcff.safetensors"
    Path(path).write_bytes(b"")
    for call in (saved.save, ck.load_fisher, lambda path: ck.LowRankHistory.load(path, model)):
        with pytest.raises(ValueError, match=r"udcff\.safetensors' is not UTF-8.*; rename it"):
            call(path)


# Before they are saved


def test_fishers_and_histories_hold_no_number_that_overflowed():
    model = network()
    huge = {name: torch.full_like(t, 1e300, dtype=torch.float64) for name, t in named(model, 1).items()}
    rows = {name: t[None] for name, t in huge.items()}
    curvature = torch.ones(1)
    with pytest.raises(ValueError, match=r"anchor_projections is \[inf\]; expected finite values"):
        ck.LowRankFisher(rows, curvature, huge)
    with pytest.raises(ValueError, match=r"directions has NaN or infinite values in '0.weight'"):
        ck.LowRankFisher(rows, curvature, named(model, 1), storage_dtype=torch.float32)
    with pytest.raises(ValueError, match="K = 0; expected at least one term"):
        ck.LowRankFisher({name: t[:0] for name, t in rows.items()}, curvature[:0], named(model, 1))
    for curvatures in (None, "1", [1j], torch.ones(1) * 1j, torch.tensor([True])):
        with pytest.raises(TypeError, match=r"curvatures is .*; expected a \(K,\) tensor of real numbers"):
            ck.LowRankFisher(named(model, 1, 1), curvatures, named(model, 1))

    low_rank, _ = saved_object("low-rank history")
    diagonal, _ = saved_object("diagonal history")
    before = numbers(low_rank), numbers(diagonal)
    tiny = ck.LowRankFisher(named(model, 1, 1), curvature.double() * 1e-308, named(model, 2), slopes=curvature * 1e3)
    with pytest.raises(ValueError, match=r"fisher's anchor_projections - slopes / curvatures is \[-inf\]"):
        low_rank.append(tiny)
    long = {name: t.double() * 1e200 for name, t in named(model, 1, 1).items()}
    with pytest.raises(ValueError, match=r"sum_k a_k \|u_k\|\^2, is inf; expected a finite value"):
        low_rank.append(ck.LowRankFisher(long, curvature, named(model, 1), slopes=curvature))
    with pytest.raises(ValueError, match=r"sum of curvatures in torch.float32 has NaN or infinite values"):
        diagonal.append(ck.DiagonalFisher(huge, named(model, 1)))
    with pytest.raises(ValueError, match=r"mean anchor in torch.float32 has NaN or infinite values"):
        diagonal.append(ck.DiagonalFisher({n: torch.ones_like(t) for n, t in huge.items()}, huge))
    assert (numbers(low_rank), numbers(diagonal)) == before


@pytest.mark.parametrize("attribute", ["curvatures", "directions", "anchor_projections", "fisher_diagonal", "anchor"])
def test_fishers_that_were_changed_are_refused_by_a_history(attribute):
    model = network()
    kind = "diagonal" if attribute in ("fisher_diagonal", "anchor") else "low-rank"
    fisher, history = saved_object(f"{kind} Fisher")[0], saved_object(f"{kind} history")[0]
    before = numbers(history)
    getattr(fisher, attribute).view(-1)[-1] = math.nan
    with pytest.raises(ValueError, match=rf"{attribute} (is|has NaN)"):
        history.append(fisher)
    assert numbers(history) == before
    assert all(p.grad is None for p in model.parameters())


# Distributed checkpoints


@pytest.mark.parametrize("kind", HISTORIES)
def test_distributed_checkpoints_are_checked(kind, tmp_path):
    dcp = pytest.importorskip("torch.distributed.checkpoint", reason="torch.distributed is missing")
    from crl_kernels.integrations.distributed_checkpoint import load_history

    saved, model = saved_object(kind)
    loaded = saved_object(kind)[0]
    loaded.load_state_dict(type(saved)(model, **saved._options()).state_dict())
    before, state = numbers(loaded), saved.state_dict()
    vector = next(key for key in state if key.endswith("2.weight"))
    floats = next(key for key, tensor in state.items() if key.endswith("2.weight") and tensor.is_floating_point())

    def save(state: dict, name: str) -> Path:
        dcp.save({"history": state}, checkpoint_id=tmp_path / name, no_dist=True)
        return tmp_path / name

    for name, changed, message in (
        ("nan", {**state, floats: state[floats] * math.nan}, "has NaN or infinite values in '2.weight'"),
        ("tasks", {**state, "num_tasks": torch.tensor(-1)}, "num_tasks in the checkpoint .* is -1|for -1 tasks"),
        ("shape", {**state, vector: state[vector][:2]}, r"'2.weight' has shape \(2, 3\) in the checkpoint"),
        ("joined", {**state, vector.replace("2.", "3."): state[vector]}, "has '3.weight', which the model lacks"),
        ("absent", {k: v for k, v in state.items() if k != vector}, "lacks '2.weight', which the model has"),
    ):
        with pytest.raises(ValueError, match=message):
            load_history(loaded, save(changed, name))
        assert numbers(loaded) == before
    path = save(state, "cut short")
    for part in path.glob("*.distcp"):
        data = part.read_bytes()
        part.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="cut short' is damaged, or parts of it are missing"):
        load_history(loaded, path)
    assert numbers(loaded) == before
    load_history(loaded, save(state, "again"))
    assert numbers(loaded) == numbers(saved)
    with pytest.raises(FileNotFoundError):
        load_history(loaded, tmp_path / "nowhere")


# Who may read them


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002, 0o077])
@pytest.mark.parametrize("kind", KINDS)
def test_files_have_the_mode_that_the_umask_gives(kind, mask, tmp_path):
    saved, _ = saved_object(kind)
    path = tmp_path / "saved.safetensors"
    before = os.umask(mask)
    try:
        saved.save(path)
        first = stat.S_IMODE(path.stat().st_mode)
        path.chmod(0o600)
        saved.save(path)  # in place of an older file
    finally:
        os.umask(before)
    assert [oct(first), oct(stat.S_IMODE(path.stat().st_mode))] == [oct(0o666 & ~mask)] * 2
    assert list(tmp_path.iterdir()) == [path]
