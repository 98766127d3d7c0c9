"""Loaders: two halves, at most so many samples, and objects that are no loader."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import accelerate
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, DataLoaderDispatcher, DataLoaderShard
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from transformers import BatchEncoding

import crl_kernels as ck
from crl_kernels.diagnostics.diagnose import diagnose
from crl_kernels.per_sample.batches import batch_size
from crl_kernels.per_sample.loaders import halves, limited

pytestmark = pytest.mark.usefixtures("fresh_accelerate_state")
X = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))


# Two halves, and at most so many samples


class Prebatched(Dataset[Tensor]):
    """Item i is a batch; all samples have a number of their own."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.batches = torch.arange(sum(sizes)).split(list(sizes))

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, i: int) -> Tensor:
        return self.batches[i]


class Stream(IterableDataset[Tensor]):
    def __init__(self, count: int, length: int) -> None:
        self.count, self.length = count, length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.arange(self.count))


class ByLength(Sampler[list[int]]):
    """Batches of many sizes, the smallest first."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = sizes

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[list[int]]:
        ids = iter(range(sum(self.sizes)))
        return (list(itertools.islice(ids, size)) for size in self.sizes)


class Counted:
    """A loader of one's own: batches, and how many."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def shard(process: int, **options: Any) -> DataLoader[Any]:
    batches = BatchSampler(SequentialSampler(range(100)), 8, False)
    return DataLoader(range(100), batch_sampler=BatchSamplerShard(batches, 2, process, **options))


def drop_odd(samples: list[int]) -> Tensor:
    return torch.tensor([s for s in samples if s % 2 == 0], dtype=torch.int64)


# Samples in each half. Exact where the number of samples is known, else the number of batches is cut in half.
HALVES: dict[str, tuple[Callable[[], Any], tuple[int, int]]] = {
    "plain": (lambda: DataLoader(range(50), 8), (25, 25)),
    "two batches, the last of one": (lambda: DataLoader(range(17), 16), (8, 9)),
    "drop_last": (lambda: DataLoader(range(50), 8, drop_last=True), (24, 24)),
    "drop_last, odd": (lambda: DataLoader(range(60), 8, drop_last=True), (28, 28)),
    "prebatched": (lambda: DataLoader(Prebatched([32] * 20), batch_size=None), (320, 320)),
    "prebatched, odd": (lambda: DataLoader(Prebatched([32] * 5), batch_size=None), (80, 80)),
    "prebatched, small first": (lambda: DataLoader(Prebatched([1] + [32] * 19), batch_size=None), (289, 320)),
    "prebatched in a batch of one": (lambda: DataLoader(Prebatched([32] * 20), 1, collate_fn=torch.cat), (320, 320)),
    "prebatched in batches of two": (lambda: DataLoader(Prebatched([32] * 21), 2, collate_fn=torch.cat), (352, 320)),
    "with replacement": (
        lambda: DataLoader(range(10), 8, sampler=RandomSampler(range(10), True, num_samples=200)),
        (100, 100),
    ),
    "weighted": (lambda: DataLoader(range(10), 8, sampler=WeightedRandomSampler([1.0] * 10, 203)), (101, 102)),
    "subset": (lambda: DataLoader(range(1000), 8, sampler=SubsetRandomSampler(range(100, 150))), (25, 25)),
    "sampler shorter than one batch fewer": (lambda: DataLoader(range(60), 8, sampler=range(52)), (26, 26)),
    "one of two processes": (
        lambda: DataLoader(range(101), 8, sampler=DistributedSampler(range(101), 2, 1, shuffle=False)),
        (25, 26),
    ),
    "batches as a list": (
        lambda: DataLoader(range(50), batch_sampler=[list(range(9)), [9], [10, 11, 12], [13]]),
        (10, 4),
    ),
    "batches by length": (lambda: DataLoader(range(60), batch_sampler=ByLength([4, 6, 8, 12, 14, 16])), (18, 42)),
    "stream": (lambda: DataLoader(Stream(50, 50), 8), (25, 25)),
    "stream, two batches": (lambda: DataLoader(Stream(17, 17), 16), (8, 9)),
    "stream of batches": (
        lambda: DataLoader(Stream(40, 40), batch_size=None, collate_fn=lambda t: t.expand(8)),
        (160, 160),
    ),
    "stream, longer than it says": (lambda: DataLoader(Stream(50, 40), 8), (20, 30)),
    "stream, shorter than it says": (lambda: DataLoader(Stream(50, 64), 8), (32, 18)),
    "samples left out": (lambda: DataLoader(range(64), 8, collate_fn=drop_odd), (16, 16)),
    "no loader of torch's": (lambda: Counted([torch.arange(8)] * 10), (40, 40)),
    "list": (lambda: [torch.arange(8), torch.arange(1), torch.arange(8)], (8, 9)),
    "tuple": (lambda: (torch.arange(30), torch.arange(2)), (16, 16)),
    "shard of a batch sampler": (lambda: shard(0), (28, 28)),
    "shard, uneven": (lambda: shard(0, even_batches=False), (28, 24)),
    "shard, split": (lambda: shard(1, split_batches=True), (26, 26)),
    "DataLoaderShard": (lambda: DataLoaderShard(range(50), batch_size=8), (25, 25)),
    "DataLoaderDispatcher": (lambda: DataLoaderDispatcher(range(50), batch_size=8), (25, 25)),
    "prepared": (lambda: accelerate.Accelerator(cpu=True).prepare(DataLoader(range(50), 8, shuffle=True)), (25, 25)),
    "batches skipped": (lambda: accelerate.skip_first_batches(DataLoader(range(66), 8), 2), (28, 22)),
}


def sizes_of_halves(make: Callable[[], Any], most: int | None) -> tuple[int, int]:
    """Of halves that hold the loader's samples up to ``most``, in its order."""
    expected = torch.cat(list(make()))[:most]
    torch.manual_seed(0)
    first, second = ([*batches] for batches in halves(make(), most))
    assert torch.equal(torch.cat([*first, *second]), expected)
    return sum(map(batch_size, first)), sum(map(batch_size, second))


@pytest.mark.parametrize(("make", "sizes"), HALVES.values(), ids=HALVES)
def test_halves_hold_what_the_loader_yields_and_share_nothing(make, sizes):
    assert sizes_of_halves(make, None) == sizes


@pytest.mark.parametrize("make", [make for make, _ in HALVES.values()], ids=HALVES)
@pytest.mark.parametrize("most", [2, 7, 16, 10_000])
def test_halves_of_at_most_so_many_samples(make, most):
    first, second = sizes_of_halves(make, most)
    if most <= 8:
        assert first == (first + second) // 2


@pytest.mark.filterwarnings("ignore:the mean gradient is mostly noise")
def test_a_stream_that_ends_before_its_second_half_is_refused():
    model, stream = nn.Linear(5, 2), DataLoader(Stream(20, 80), 8, collate_fn=lambda ids: X[torch.stack(ids)])

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).square().sum(1)

    with pytest.raises(ValueError, match="loader ended after 20 samples, before the second half began"):
        ck.estimate_fisher(model, loss, stream)
    assert ck.estimate_fisher(model, loss, stream, max_samples=20).statistics.num_samples == 20


def test_workers_that_persist():
    loader = DataLoader(range(50), 8, num_workers=1, persistent_workers=True)
    for _ in range(2):
        first, second = (torch.cat([*batches]) for batches in halves(loader, None))
        assert torch.equal(first, torch.arange(25))
        assert torch.equal(second, torch.arange(25, 50))


def test_empty_batches_are_skipped():
    x = torch.arange(12)
    empty = x[:0]
    for batches in ([empty, x[:6], empty, empty, x[6:], empty], Counted([empty, empty, x[:6], x[6:]])):
        assert [len(batch) for batch in limited(batches, None)] == [6, 6]
        assert [len(batch) for batch in limited(batches, 7)] == [6, 1]
        assert [len(batch) for batch in limited(batches, 6)] == [6]
        assert [[len(batch) for batch in half] for half in halves(batches, None)] == [[6], [6]]
    first, second = (torch.cat([*half]) for half in halves(Counted([empty, x]), None))
    assert torch.equal(first, x[:6])
    assert torch.equal(second, x[6:])
    lists = [([], []), (["a", "b"], ["c", "d"]), ([], [])]
    assert list(limited(lists, None)) == lists[1:2]


def test_samples_are_taken_up_to_the_boundary_and_no_batch_more():
    yielded = []

    def batches() -> Iterator[Tensor]:
        for batch in torch.arange(24).split(8):
            yielded.append(len(batch))
            yield batch

    assert [len(batch) for batch in limited(batches(), 16)] == [8, 8]
    assert len(yielded) == 2
    yielded.clear()
    assert [[len(batch) for batch in half] for half in halves(batches(), 16)] == [[8], [8]]
    assert len(yielded) == 2


@pytest.mark.parametrize(
    ("loader", "words"),
    [
        ([], "loader yields no samples"),
        ([X[:0], X[:0]], "loader yields no samples"),
        (iter([]), "loader yields no samples: it is an iterator, and has been read already"),
        (DataLoader(range(1), 8), "loader yields one sample"),
        (Counted([X[:1]]), "loader yields one sample"),
        (iter([X]), "loader has no len, so it cannot be cut in half; give max_samples="),
        (DataLoader(range(9), batch_sampler=iter([[0]])), "loader has no len"),
    ],
)
def test_loaders_without_halves_are_refused(loader, words):
    with pytest.raises(ValueError, match=words):
        next(halves(loader, None))


# What is no loader


@dataclasses.dataclass
class Record:
    x: Tensor


class Tables:
    """As Hugging Face's datasets: items are samples, and so is what an iterator over it yields."""

    column_names = ("x",)

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        if i >= 6:
            raise IndexError
        return {"x": X[i]}


@pytest.mark.parametrize(
    ("loader", "words"),
    [
        (TensorDataset(X), r"loader is a dataset \(TensorDataset\), .*DataLoader\(dataset, batch_size"),
        (Subset(TensorDataset(X), range(6)), r"loader is a dataset \(Subset\)"),
        (ConcatDataset([TensorDataset(X)]), r"loader is a dataset \(ConcatDataset\)"),
        (Prebatched([6, 6]), r"loader is a dataset \(Prebatched\), .*or batch_size=None if its items are batches"),
        (Tables(), r"loader is a dataset \(Tables\), .*DataLoader"),
        (X, r"loader is a Tensor; expected an iterable of batches.*give a list of it: \[batch\]"),
        (X.numpy(), "loader is a ndarray"),
        ({"x": X}, "loader is a dict"),
        (BatchEncoding({"x": X}), "loader is a BatchEncoding"),
        ("data.csv", "loader is 'data.csv'; expected an iterable of batches, such as a DataLoader"),
        (b"data", "loader is b'data'"),
        (None, "loader is None; expected an iterable"),
        (6, "loader is 6"),
        (lambda: [X], "loader is <function"),
        (DataLoader, "loader is <class"),
        (Record(X), r"loader is Record\("),
    ],
)
@pytest.mark.parametrize(
    "options", [{}, {"kind": "diagonal"}, {"unbiased": False}], ids=["low rank", "diagonal", "biased"]
)
def test_objects_that_are_no_loader_are_refused(loader, words, options):
    with pytest.raises(TypeError, match=words):
        ck.estimate_fisher(nn.Linear(5, 2), lambda model, x: model(x).square().sum(1), loader, **options)
    with pytest.raises(TypeError, match=words):
        diagnose(nn.Linear(5, 2), lambda model, x, t: model(x).square().sum(1), loader)


def test_items_of_another_protocol_are_batches():
    """An iterable of old, with __getitem__ alone, and a stream of batches."""

    class Old:
        def __getitem__(self, i: int) -> Tensor:
            return X[:6].split(2)[i]

    class StreamOfBatches(IterableDataset[Tensor]):
        def __iter__(self) -> Iterator[Tensor]:
            return iter(X[:6].split(2))

    for loader in (Old(), StreamOfBatches()):
        assert torch.equal(torch.cat(list(limited(loader, 5))), X[:5])
