"""Saved files and states: the same numbers come back, or a ValueError names the file and what is wrong with it."""

import json
import math
import random
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import crl_kernels as ck

KINDS = ("low-rank Fisher", "diagonal Fisher", "low-rank history", "diagonal history")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3, bias=False))


def named(model: nn.Module, seed: int, *leading: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(*leading, *p.shape, generator=generator).to(p) for n, p in model.named_parameters()}


def statistics() -> ck.FisherStatistics:
    """Of two strata; the standard errors of curvatures made from all samples are not known."""
    parts = [
        ck.FisherStatistics(8, 3.0, -0.1, 0.05, 0.9, (0.1,), 0.2, math.nan, 0.5, math.inf, stratum=stratum, share=0.5)
        for stratum in (0, 7)
    ]
    return ck.FisherStatistics(16, 6.0, rho=0.9, curvature_se=(0.1, math.nan), strata=tuple(parts))


def low_rank_fisher(model: nn.Module, seed: int = 1) -> ck.LowRankFisher:
    return ck.LowRankFisher(
        named(model, seed, 2),
        torch.tensor([0.5, 0.0]),
        named(model, seed + 100),
        slopes=torch.tensor([-0.25, 0.0]),
        storage_dtype=torch.bfloat16,
        statistics=statistics(),
    )


def diagonal_fisher(model: nn.Module, seed: int = 1) -> ck.DiagonalFisher:
    squares = {name: g.square() for name, g in named(model, seed).items()}
    return ck.DiagonalFisher(squares, named(model, seed + 100), statistics=ck.FisherStatistics(9, 2.5))


def saved_object(kind: str):
    """A Fisher or a history, and the model that it belongs to."""
    model = network()
    if kind == "low-rank Fisher":
        return low_rank_fisher(model), model
    if kind == "diagonal Fisher":
        return diagonal_fisher(model), model
    if kind == "low-rank history":
        history = ck.LowRankHistory(model, include=["0", "2.weight"], first_order=True, decay=0.75, max_terms=8)
        for seed in (1, 2):
            history.append(low_rank_fisher(model, seed))
        return history, model
    history = ck.DiagonalHistory(model, decay=0.75)
    for seed in (1, 2):
        history.append(diagonal_fisher(model, seed))
    return history, model


def load(kind: str, path: Path, model: nn.Module):
    if kind.endswith("Fisher"):
        return ck.load_fisher(path)
    return (ck.LowRankHistory if kind.startswith("low") else ck.DiagonalHistory).load(path, model)


def numbers(saved) -> list:
    """All that a Fisher or history holds, comparable."""
    if isinstance(saved, (ck.LowRankFisher, ck.DiagonalFisher)):
        tensors = {name: value for name, value in vars(saved).items() if isinstance(value, Tensor)}
        facts = [saved.layout.names, saved.layout.shapes, str(saved.statistics), getattr(saved, "slopes", 0) is None]
    else:
        tensors, facts = saved.state_dict(), sorted(saved._options().items())
    return [str(facts), *((name, str(t.dtype), t.shape, t.double().tolist()) for name, t in sorted(tensors.items()))]


def save_in_old_format(saved, path: Path) -> tuple[dict[str, Tensor], dict]:
    """Saves as version 1 of the format did: no digest, scalars among the tensors; (tensors, metadata) of the file."""
    saved.save(path)
    entry, tensors = entry_of(path), load_file(path)
    facts = entry["facts"]
    for name, dtype in (("num_tasks", torch.int64), ("residual", torch.float64)):
        if name in facts:
            tensors[name] = torch.tensor(facts.pop(name), dtype=dtype)
    old = {"version": 1, "kind": entry["kind"], "facts": facts}
    rewrite(path, tensors, old)
    return load_file(path), old


def rewrite(path: Path, tensors: dict[str, Tensor], entry: object) -> None:
    save_file({name: t.contiguous() for name, t in tensors.items()}, path, {"crl_kernels": json.dumps(entry)})


def entry_of(path: Path) -> dict:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["crl_kernels"])


# Random damage


def split(data: bytes) -> tuple[dict, bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: dict, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def flip_a_bit(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def overwrite_a_run(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data))
    run = bytes(rng.choice((0, 255, rng.randrange(256))) for _ in range(rng.randrange(1, 40)))
    return (data[:start] + run + data[start + len(run) :])[: len(data)]


def truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def insert(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    return data[:start] + rng.randbytes(rng.randrange(1, 16)) + data[start:]


def repeat_or_move(data: bytes, rng: random.Random) -> bytes:
    start, end = sorted(rng.randrange(len(data)) for _ in range(2))
    return data[:start] + data[start:end] * 2 + data[end:] if rng.random() < 0.5 else data[:start] + data[end:]


def change_text(data: bytes, rng: random.Random) -> bytes:
    """A character of the header by another that keeps it JSON, more often than not."""
    changed = bytearray(data)
    (length,) = struct.unpack("<Q", data[:8])
    digits = [i for i in range(8, 8 + length) if chr(data[i]).isalnum()]
    changed[rng.choice(digits)] = rng.choice(b"0123456789abcFNI")
    return bytes(changed)


def edit_a_tensor(data: bytes, rng: random.Random) -> bytes:
    header, body = split(data)
    names = [name for name in header if name != "__metadata__"]
    name, second = rng.choice(names), rng.choice(names)
    field = rng.choice(("dtype", "shape", "data_offsets", "swap", "rename", "drop"))
    if field == "swap":
        header[name], header[second] = header[second], header[name]
    elif field == "rename":
        header[name + rng.choice(("", ".weight", "\0", "é"))] = header.pop(name)
    elif field == "drop":
        del header[name]
    elif field == "dtype":
        header[name][field] = rng.choice(
            ("F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL", "C64", "F8_E4M3", "?")
        )
    elif field == "shape":
        old = header[name][field]
        header[name][field] = rng.choice((old[::-1], [math.prod(old)], [*old, 1], [0], [-1], [2**62, 4], None, {}))
    else:
        header[name][field] = rng.choice(([0, 8], header[second][field], [8, 0], [2**63, 2**63 + 8], None, []))
    return joined(header, body)


def edit_metadata(data: bytes, rng: random.Random) -> bytes:
    header, body = split(data)
    entry = json.loads(header["__metadata__"]["crl_kernels"])
    statistics_facts = entry["facts"].get("statistics", {})
    values = (None, -1, 0, 3, 2**70, 0.5, math.nan, math.inf, "x", [], ["0"], {}, True, [[]], {"": 0})
    level = rng.choice((entry, entry["facts"]))
    key = rng.choice((*level, "extra"))
    if rng.random() < 0.2:
        level.pop(key, None)
    else:
        level[key] = rng.choice(values)
    facts = entry.get("facts")
    if isinstance(facts, dict) and facts.get("statistics") and rng.random() < 0.5:
        facts["statistics"] = {**statistics_facts, rng.choice(tuple(statistics_facts)): rng.choice(values)}
    header["__metadata__"]["crl_kernels"] = rng.choice((json.dumps(entry), json.dumps(entry, indent=2)))
    return joined(header, body)


def keep_the_contents(data: bytes, rng: random.Random) -> bytes:
    """Another file of the same contents: another order of its header, or spaces."""
    header, body = split(data)
    items = list(header.items())
    rng.shuffle(items)
    return joined(dict(items), body)


MUTATIONS = (
    flip_a_bit,
    overwrite_a_run,
    truncate,
    insert,
    repeat_or_move,
    change_text,
    edit_a_tensor,
    edit_metadata,
    keep_the_contents,
)


def outcomes(kind: str, path: Path, count: int, check: Callable) -> Counter:
    """Loads ``count`` mutated copies of a file; ``check`` sees whatever loads."""
    _, model = saved_object(kind)
    data, rng, counts = path.read_bytes(), random.Random(kind), Counter()
    for i in range(count):
        mutation = MUTATIONS[i % len(MUTATIONS)]
        copy = path.parent / "mutated.safetensors"
        copy.write_bytes(mutation(data, rng))
        try:
            loaded = load(kind, copy, model)
        except ValueError as error:
            refusal = str(error)
        else:
            check(loaded, mutation.__name__)
            counts["loaded"] += 1
            continue
        assert "mutated.safetensors" in refusal, (mutation.__name__, refusal)
        counts["refused"] += 1
    print(f"{kind}: {dict(counts)}")
    return counts


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_give_the_same_numbers_or_a_value_error(kind, tmp_path):
    """4 kinds x 540 mutations."""
    saved, _ = saved_object(kind)
    path = tmp_path / "undamaged.safetensors"
    saved.save(path)
    expected = numbers(saved)

    def check(loaded, mutation: str) -> None:
        assert numbers(loaded) == expected, mutation

    counts = outcomes(kind, path, 540, check)
    assert counts["refused"] > 300
    assert counts["loaded"] >= 60  # those whose contents were kept


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_without_a_digest_give_possible_numbers_or_a_value_error(kind, tmp_path):
    saved, model = saved_object(kind)
    path = tmp_path / "undamaged.safetensors"
    save_in_old_format(saved, path)
    assert numbers(load(kind, path, model)) == numbers(saved)

    def check(loaded, mutation: str) -> None:
        for name, value in vars(loaded).items() if kind.endswith("Fisher") else loaded.state_dict().items():
            if isinstance(value, Tensor):
                assert bool(torch.isfinite(value).all()), (mutation, name)
                if "fisher" in name or name in ("curvatures", "residual"):
                    assert bool((value >= 0).all()), (mutation, name)
        assert kind.endswith("Fisher") or loaded.state_dict()["num_tasks"] > 0, mutation

    counts = outcomes(kind, path, 540, check)
    assert counts["refused"] > 300
    assert counts["loaded"] >= 60


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
        if kind == "low-rank Fisher" and name.startswith("directions") and damage in ("short", "long"):
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
@pytest.mark.parametrize("kind", KINDS[2:])
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


@pytest.mark.parametrize("kind", KINDS[2:])
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


@pytest.mark.parametrize("kind", KINDS[2:])
def test_empty_histories_come_back(kind, tmp_path):
    model = network()
    cls = ck.LowRankHistory if kind.startswith("low") else ck.DiagonalHistory
    empty = cls(model)
    empty.save(tmp_path / "empty.safetensors")
    loaded = cls.load(tmp_path / "empty.safetensors", model)
    assert numbers(loaded) == numbers(empty)
    full, _ = saved_object(kind)
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


@pytest.mark.parametrize("kind", KINDS[2:])
def test_distributed_checkpoints_are_checked(kind, tmp_path):
    dcp = pytest.importorskip("torch.distributed.checkpoint", reason="torch.distributed is missing")
    from crl_kernels.integrations.distributed_checkpoint import load_history

    saved, model = saved_object(kind)
    loaded = saved_object(kind)[0]
    loaded.load_state_dict(type(saved)(model).state_dict())
    before, state = numbers(loaded), saved.state_dict()
    vector = next(key for key in state if key.endswith("2.weight"))

    def save(state: dict, name: str) -> Path:
        dcp.save({"history": state}, checkpoint_id=tmp_path / name, no_dist=True)
        return tmp_path / name

    for name, changed, message in (
        ("nan", {**state, vector: state[vector] * math.nan}, "has NaN or infinite values in '2.weight'"),
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
