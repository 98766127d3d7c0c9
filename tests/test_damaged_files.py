"""Saved files with random damage: the same numbers come back, or a ValueError names the file."""

import json
import math
import random
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.saved_objects import KINDS, joined, load, numbers, save_in_old_format, saved_object, split
from torch import Tensor


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
