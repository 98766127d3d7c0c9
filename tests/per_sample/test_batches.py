"""Batches: whatever goes with the samples is cut, reordered and joined with them.

The truth is plain Python: a batch built from scratch of the rows that are wanted.
"""

import collections
import dataclasses
import itertools
import types
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence
from transformers import BatchEncoding, BatchFeature, PreTrainedTokenizerFast
from transformers.modeling_outputs import BaseModelOutput

import crl_kernels as ck
from crl_kernels.diagnostics.diagnose import diagnose
from crl_kernels.per_sample.batches import batch_size, concatenate_batches, reorder_batch, slice_batch

X = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
IMAGES = [Image.new("L", (2, 2), i) for i in range(40)]


class Pair(NamedTuple):
    x: Tensor
    caption: Any


@dataclasses.dataclass
class Record:
    x: Tensor
    caption: Any
    step: int = 3


@dataclasses.dataclass(frozen=True)
class FrozenRecord:
    x: Tensor
    caption: Any
    mask: Tensor = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "mask", self.x > 0)


@dataclasses.dataclass(frozen=True)
class SlottedRecord:
    __slots__ = ("caption", "x")
    x: Tensor
    caption: Any

    def __getstate__(self) -> tuple[Any, ...]:
        return (self.x, self.caption)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        for name, value in zip(("x", "caption"), state, strict=True):
            object.__setattr__(self, name, value)


class PinnedBatch:
    """The custom batch of PyTorch's documentation of ``pin_memory``."""

    def __init__(self, samples: Sequence[tuple[Tensor, str]]) -> None:
        x, caption = zip(*samples, strict=True)
        self.x, self.caption = torch.stack(x), caption


class ReadOnly(Mapping[str, Any]):
    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = dict(values)

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


class Writable(ReadOnly, MutableMapping[str, Any]):
    def __setitem__(self, key: str, value: Any) -> None:
        self._values[key] = value

    def __delitem__(self, key: str) -> None:
        del self._values[key]


def x_of(rows: Sequence[int]) -> Tensor:
    return X[list(rows)]


def captions(rows: Sequence[int]) -> list[str]:
    return [f"caption {i}" for i in rows]


def ragged(rows: Sequence[int]) -> list[Tensor]:
    """One tensor for each sample, of 100 + i rows."""
    return [torch.full((100 + i, 2), i) for i in rows]


def annotations(rows: Sequence[int]) -> list[dict[str, Any]]:
    return [{"boxes": torch.full((200 + i, 4), i), "name": f"image {i}"} for i in rows]


CAPTIONED: dict[str, Callable[[Tensor, list[str]], Any]] = {  # from x and captions
    "tuple of captions": lambda x, caption: (x, tuple(caption)),
    "list of captions": lambda x, caption: [x, caption],
    "array of strings": lambda x, caption: (x, np.array(caption)),
    "ordered dict": lambda x, caption: collections.OrderedDict(x=x, caption=caption),
    "default dict": lambda x, caption: collections.defaultdict(list, x=x, caption=caption),
    "UserDict": lambda x, caption: collections.UserDict(x=x, caption=caption),
    "read-only Mapping": lambda x, caption: ReadOnly({"x": x, "caption": caption}),
    "writable Mapping": lambda x, caption: Writable({"x": x, "caption": caption}),
    "mapping proxy": lambda x, caption: types.MappingProxyType({"x": x, "caption": caption}),
    "BatchEncoding": lambda x, caption: BatchEncoding({"x": x, "caption": caption}),
    "BatchFeature": lambda x, caption: BatchFeature({"x": x, "caption": caption}),
    "namedtuple": Pair,
    "dataclass": Record,
    "frozen dataclass": FrozenRecord,
    "dataclass with slots": lambda x, caption: SlottedRecord(x, tuple(caption)),
    "object": lambda x, caption: PinnedBatch(list(zip(x, caption, strict=True))),
}


def captioned(name: str, rows: Sequence[int]) -> Any:
    return CAPTIONED[name](x_of(rows), captions(rows))


BATCHES: dict[str, Callable[[Sequence[int]], Any]] = {
    **{name: partial(captioned, name) for name in CAPTIONED},
    "tensor": x_of,
    "array": lambda rows: x_of(rows).numpy(),
    "array of objects": lambda rows: (x_of(rows), np.array([{"i": i} for i in rows], dtype=object)),
    "numbers": lambda rows: (x_of(rows), [float(i) for i in rows]),
    "images": lambda rows: (x_of(rows), [IMAGES[i] for i in rows]),
    "some without": lambda rows: (x_of(rows), [None if i % 2 else f"caption {i}" for i in rows]),
    "deque": lambda rows: (x_of(rows), collections.deque(captions(rows))),
    "ragged tensors": lambda rows: (x_of(rows), ragged(rows)),
    "tensors without dimensions": lambda rows: (x_of(rows), [torch.tensor(i) for i in rows]),
    "annotations": lambda rows: (x_of(rows), annotations(rows)),
    "five captions each": lambda rows: (x_of(rows), [captions([i] * 5) for i in rows]),
    "some captions each": lambda rows: (x_of(rows), [captions([i] * (7 + i)) for i in rows]),
    "columns of captions": lambda rows: (x_of(rows), [tuple(captions(rows)) for _ in range(7)]),
    "nested lists of tensors": lambda rows: [[x_of(rows), x_of(rows) + 1], (x_of(rows) + 2, [x_of(rows) + 3])],
    "detection": lambda rows: (tuple(ragged(rows)), tuple(annotations(rows))),
    "text only": captions,
    "text in a dict": lambda rows: {"text": captions(rows), "source": "web"},
    "constants": lambda rows: (x_of(rows), "split", 3, 0.5, None, torch.tensor(2.0), b"id", torch.Size([6, 4]), int),
    "nested dicts": lambda rows: {"a": {"b": {"x": x_of(rows), "c": captions(rows)}}, "d": (x_of(rows).numpy(), "e")},
    "ModelOutput": lambda rows: BaseModelOutput(last_hidden_state=x_of(rows), attentions=(x_of(rows) + 1,)),
    "namespace": lambda rows: types.SimpleNamespace(inputs={"x": x_of(rows)}, caption=captions(rows)),
    "packed": lambda rows: (x_of(rows), pack_sequence([t.float() for t in ragged(rows)], enforce_sorted=False)),
    "jagged": lambda rows: (x_of(rows), torch.nested.nested_tensor(ragged(rows), layout=torch.jagged)),
    "sparse": lambda rows: (x_of(rows), x_of(rows).relu().to_sparse()),
}


def require_same(got: Any, want: Any) -> None:
    """The same classes and the same values, all the way down."""
    assert type(got) is type(want)
    if isinstance(want, PackedSequence):
        got, want = unpack_sequence(got), unpack_sequence(want)
    if isinstance(want, Tensor) and want.is_nested:
        got, want = got.unbind(), want.unbind()
    if isinstance(want, Tensor):
        assert got.dtype == want.dtype
        assert torch.equal(got.to_dense(), want.to_dense())
    elif isinstance(want, np.ndarray):
        assert got.dtype == want.dtype
        assert np.array_equal(got, want)
    elif isinstance(want, Mapping):
        assert list(got) == list(want)
        for key in want:
            require_same(got[key], want[key])
    elif isinstance(want, (list, tuple, collections.deque)):
        assert len(got) == len(want)
        for parts in zip(got, want, strict=True):
            require_same(*parts)
    elif isinstance(want, SlottedRecord):
        require_same((got.x, got.caption), (want.x, want.caption))
    elif isinstance(want, (Record, FrozenRecord, types.SimpleNamespace, PinnedBatch)):
        require_same(vars(got), vars(want))
    else:
        assert got == want


@pytest.fixture(params=BATCHES.values(), ids=BATCHES)
def batch_of(request):
    return request.param


# Classes of batches


def test_batches_are_cut_reordered_and_joined_as_their_rows_are(batch_of):
    batch = batch_of(range(6))
    assert batch_size(batch) == 6
    for begin, end in ((0, 6), (0, 4), (1, 4), (5, 6), (4, 9)):
        require_same(slice_batch(batch, begin, end), batch_of(range(begin, min(end, 6))))
    for order in ([5, 4, 3, 2, 1, 0], [2], [3, 3, 0, 3, 1, 1, 1, 0]):
        require_same(reorder_batch(batch, torch.tensor(order)), batch_of(order))
    parts = [range(6), range(6, 9), range(9, 10), range(10, 18)]
    require_same(concatenate_batches([batch_of(rows) for rows in parts]), batch_of(range(18)))
    require_same(batch, batch_of(range(6)))  # left as it was


def test_cut_tensors_and_arrays_are_views():
    batch = {"x": x_of(range(6)), "array": x_of(range(6)).numpy()}
    part = slice_batch(batch, 2, 4)
    batch["x"].zero_()
    batch["array"].fill(0)
    assert not part["x"].any()
    assert not part["array"].any()


def test_attributes_of_a_copy_are_those_of_the_original():
    class Listed(list):
        pass

    feature = BatchFeature({"x": x_of(range(6))}, skip_tensor_conversion=["y"])
    listed = Listed(captions(range(6)))
    listed.language = "en"
    record = Record(x_of(range(6)), listed)
    record.mask = record.x > 0  # not a field
    part = slice_batch(record, 1, 3)
    assert slice_batch(feature, 0, 2).skip_tensor_conversion == ["y"]
    assert slice_batch(captioned("default dict", range(6)), 0, 2).default_factory is list
    assert (type(part.caption), part.caption.language) == (Listed, "en")
    assert torch.equal(part.mask, record.mask[1:3])
    output = slice_batch(BaseModelOutput(last_hidden_state=x_of(range(6))), 1, 3)
    assert output.last_hidden_state is output["last_hidden_state"]
    assert output.hidden_states is None


def test_encodings_of_a_fast_tokenizer_are_cut_too():
    vocabulary = {"[UNK]": 0, "[PAD]": 1, "a": 2, "cat": 3, "dog": 4}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]")
    texts = ["a cat", "a a dog", "cat", "dog a"]
    batch = fast(texts, padding=True, return_tensors="pt")
    assert type(batch) is BatchEncoding

    def require(got: BatchEncoding, rows: list[int]) -> None:
        assert type(got) is BatchEncoding
        assert torch.equal(got["input_ids"], batch["input_ids"][rows])
        assert [got.tokens(i) for i in range(len(rows))] == [batch.tokens(i) for i in rows]

    require(slice_batch(batch, 1, 3), [1, 2])
    require(reorder_batch(batch, torch.tensor([3, 1, 1])), [3, 1, 1])
    require(concatenate_batches([slice_batch(batch, 0, 3), slice_batch(batch, 3, 4)]), [0, 1, 2, 3])
    assert [batch.tokens(i)[0] for i in range(4)] == ["a", "a", "cat", "dog"]


def test_attrs_classes_and_objects_without_attributes():
    class Slotted:
        __slots__ = ("__weakref__", "caption", "unset", "x")
        __attrs_attrs__ = ()

    class Opaque:
        __slots__ = ()

    batch, opaque = Slotted(), Opaque()
    batch.x, batch.caption = {"x": x_of(range(6))}, captions(range(6))
    part = slice_batch((batch, opaque, object, len), 2, 4)
    assert torch.equal(part[0].x["x"], x_of([2, 3]))
    assert part[0].caption == captions([2, 3])
    assert not hasattr(part[0], "unset")
    assert part[1:] == (opaque, object, len)
    with pytest.raises(ValueError, match=r"batch, a Opaque, .* it holds no tensor and no array"):
        batch_size(opaque)


# A list is a container of columns, or a column


def test_two_columns_in_a_batch_of_two():
    x, y = x_of(range(2)), x_of(range(2)) + 1
    for batch, want in (
        ((x, y), (x[1:], y[1:])),
        ([x, y], [x[1:], y[1:]]),
        ((x, ("a", "b")), (x[1:], ("b",))),
        ({"crops": [x, y]}, {"crops": [x[1:], y[1:]]}),
        ((x, [y, ("a", "b")]), (x[1:], [y[1:], ("b",)])),
        ([x, "ab"], [x[1:], "ab"]),
        ((["a", "b"], ["c", "d"]), (["b"], ["d"])),
        ({"x": x, "caption": ("a", "b"), "size": torch.Size([2, 2])}, {"x": x[1:], "caption": ("b",), "size": (2, 2)}),
    ):
        assert batch_size(batch) == 2
        got = slice_batch(batch, 1, 2)
        assert str(got).replace("torch.Size([2, 2])", "(2, 2)") == str(want)


def test_ambiguous_lists_are_refused_only_when_they_are_cut():
    x = x_of(range(3))
    for column in (
        [("a", "b", "c")] * 3,
        [{"boxes": x}, {"boxes": x}, {"boxes": x}],
        ([["a", "b", "c"]] * 3),
    ):
        batch = {"x": x, "unclear": column}
        assert batch_size(batch) == 3
        for use in (lambda batch: slice_batch(batch, 0, 2), lambda batch: reorder_batch(batch, torch.arange(3))):
            with pytest.raises(ValueError, match=r"batch\['unclear'\] is a list of 3 containers .* samples or columns"):
                use(batch)
    # Batches of another size show what it is: three columns of captions, or three captions for each sample.
    first, second = ((x_of(range(n)), [("a",) * n] * 3) for n in (3, 4))
    assert concatenate_batches([first, second])[1] == [("a",) * 7] * 3
    first, second = ((x_of(range(n)), [("a",) * 3] * n) for n in (3, 4))
    assert concatenate_batches([first, second])[1] == [("a",) * 3] * 7
    # Tensors as many rows long as there are samples, by chance.
    first, second = ((x_of(range(n)), [torch.full((3, 2), i) for i in range(n)]) for n in (3, 4))
    assert [int(t[0, 0]) for t in concatenate_batches([first, second])[1]] == [0, 1, 2, 0, 1, 2, 3]
    mixed = (x, [torch.ones(3, 1), torch.ones(2, 1), torch.ones(3, 1)])
    require_same(slice_batch(mixed, 1, 3), (x[1:], [torch.ones(2, 1), torch.ones(3, 1)]))


@pytest.mark.parametrize(
    ("column", "words"),
    [
        (["a", "b"], r"batch\['c'\] is a list of length 2 in a batch of 6 samples"),
        ((64, 64), r"batch\['c'\] is a tuple of length 2 in a batch of 6 samples"),
        ([torch.ones(2), torch.ones(2)], r"batch\['c'\] is a list of length 2 in a batch of 6"),
        ([["a"] * 5] * 4, r"batch\['c'\] is a list of length 4 in a batch of 6"),
        ([x_of(range(6)), x_of(range(5))], r"batch\['c'\]\[1\] has 5 rows in a batch of 6 samples"),
        ([x_of(range(6)), ["a"] * 5], r"batch\['c'\]\[1\] is a list of length 5 in a batch of 6"),
        (Pair(x_of(range(6)), ["a"] * 5), r"batch\['c'\].caption is a list of length 5"),
        (pack_sequence(ragged(range(5, 2, -1))), None),
        ({"a", "b", "c", "d", "e", "f"}, r"batch\['c'\] is a set of length 6, as many"),
        (range(6), r"batch\['c'\] is a range, and another one cannot be made"),
    ],
)
def test_columns_of_another_length_are_named_when_they_are_cut(column, words):
    batch = {"x": x_of(range(6)), "c": column}
    if words is None:
        words = r"batch\['x'\] has 6, batch\['c'\] has 3"
    with pytest.raises((ValueError, TypeError), match=words):
        slice_batch(batch, 0, 3)


def test_empty_lists_and_constants_stay():
    batch = {"x": x_of(range(6)), "none": [], "also": (), "set": {1, 2}, "text": "abcdef", "module": nn.ReLU()}
    part = slice_batch(batch, 0, 3)
    for name in list(batch)[1:]:
        assert part[name] == batch[name]


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ((x_of(range(6)), x_of(range(5))), r"batch\[0\] has 6, batch\[1\] has 5"),
        ({"x": {"y": x_of(range(6))}, "z": np.zeros(4)}, r"batch\['x'\]\['y'\] has 6, batch\['z'\] has 4"),
        (Record(x_of(range(6)), np.zeros(4)), r"a Record, .*batch.x has 6, batch.caption has 4"),
        ({"text": ["a", "b"], "more": ["c"]}, r"batch\['text'\] has 2, batch\['more'\] has 1"),
        (([torch.ones(3), torch.ones(2)], ["a"]), r"batch\[0\]\[0\] has 3, batch\[0\]\[1\] has 2, batch\[1\] has 1"),
        (torch.tensor(1.0), "a Tensor, .*it holds no tensor"),
        (None, "a NoneType, .*it holds no tensor"),
        ("text", "a str, .*it holds no tensor"),
        ({"x": torch.tensor(1.0), "n": 3}, "a dict, .*it holds no tensor"),
    ],
)
def test_batches_without_a_common_first_dimension_are_refused(batch, words):
    with pytest.raises(ValueError, match=f"no common first dimension, the number of its samples: .*{words}|{words}"):
        batch_size(batch)


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ({"a": 1}, {"b": 1}, r"some batches have batch\['a'\], batch\['b'\] and others do not"),
        ({"a": 1}, {"a": 2}, r"batch\['a'\] is 1 in one batch and 2 in another"),
        ({"a": torch.tensor(1)}, {"a": torch.tensor(2)}, r"batch\['a'\] is tensor\(1\) in one batch"),
        ({"a": "x"}, {"a": None}, r"batch\['a'\] is 'x' in one batch and None in another"),
        ({"a": torch.ones(2, 3)}, {"a": torch.ones(2, 4)}, r"batch\['a'\] has samples of shapes \(3,\) and \(4,\)"),
        ({"a": torch.ones(2, 3)}, {"a": ["x", "y"]}, r"batch\['a'\] is a Tensor in one batch, in another a list"),
        ({"a": {"b": 1}}, {"a": None}, r"batch\['a'\] is a dict in one batch, in another a NoneType"),
        ({"a": {"b": 1}}, {"a": ["x", "y"]}, r"batch\['a'\] is a dict in one batch, in another a list"),
    ],
)
def test_batches_that_cannot_be_joined_are_refused(first, second, words):
    x = x_of(range(2))
    with pytest.raises(ValueError, match=words):
        concatenate_batches([{"x": x, **first}, {"x": x, **second}])


class Unmakeable(ReadOnly):
    def __init__(self, *, values: Mapping[str, Any]) -> None:
        super().__init__(values)


class Renaming(ReadOnly):
    def __init__(self, values: Mapping[str, Any], **kwargs: Any) -> None:
        super().__init__({f"_{key}": value for key, value in values.items()})


@pytest.mark.parametrize("batch", [Unmakeable(values={"x": X}), Renaming({"x": X})], ids=["TypeError", "other keys"])
def test_a_mapping_that_cannot_be_made_of_a_dict_is_refused(batch):
    with pytest.raises(TypeError, match=f"batch is a {type(batch).__name__}, and another one cannot be made"):
        slice_batch(batch, 0, 2)


@pytest.mark.parametrize(
    "order", [torch.ones(3), torch.ones(3, dtype=torch.bool), torch.tensor(1), torch.ones(2, 2).int()]
)
def test_an_order_is_a_list_of_integers(order):
    with pytest.raises(ValueError, match=r"order is torch\..*; expected a 1-d tensor of integers"):
        reorder_batch(x_of(range(3)), order)


# Any tree

_LEAVES: list[Callable[[Sequence[int]], Any]] = [
    x_of,
    lambda rows: np.array(rows),
    captions,
    lambda rows: tuple(captions(rows)),
    ragged,
    annotations,
    lambda rows: "all",
    lambda rows: None,
    lambda rows: torch.tensor(3),
]


def _tuple(parts: list[Any], make: Callable[[list[Any]], Any]) -> Callable[[Sequence[int]], Any]:
    return lambda rows: make([x_of(rows), *(part(rows) for part in parts)])


def _named(parts: list[Any], make: Callable[[dict[str, Any]], Any]) -> Callable[[Sequence[int]], Any]:
    return lambda rows: make({f"part {i}": part(rows) for i, part in enumerate(parts)})


def _trees(parts: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    several = st.lists(parts, min_size=1, max_size=3)
    return st.one_of(
        st.builds(_tuple, several, st.sampled_from([list, tuple])),
        st.builds(_named, several, st.sampled_from([dict, collections.UserDict, ReadOnly, collections.OrderedDict])),
        st.builds(_named, several, st.just(lambda named: types.SimpleNamespace(**named))),
        st.builds(lambda x, part: lambda rows: Pair(x(rows), part(rows)), parts, parts),
        st.builds(lambda x, part: lambda rows: Record(x(rows), part(rows)), parts, parts),
    )


@settings(max_examples=150, deadline=None)
@given(st.recursive(st.sampled_from(_LEAVES), _trees, max_leaves=6), st.data())
def test_any_tree_is_cut_reordered_and_joined_as_its_rows_are(tree, data):
    def batch_of(rows: Sequence[int]) -> Any:
        return {"x": x_of(rows), "tree": tree(rows)}

    count = data.draw(st.integers(1, 8))
    batch = batch_of(range(count))
    assert batch_size(batch) == count
    begin = data.draw(st.integers(0, count - 1))
    end = data.draw(st.integers(begin + 1, count))
    require_same(slice_batch(batch, begin, end), batch_of(range(begin, end)))
    order = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=8))
    require_same(reorder_batch(batch, torch.tensor(order)), batch_of(order))
    cuts = sorted({0, count, *data.draw(st.lists(st.integers(0, count), max_size=3))})
    parts = [slice_batch(batch, a, b) for a, b in itertools.pairwise(cuts)]
    require_same(concatenate_batches(parts), batch)


# Through the estimators


def x_and_captions(batch: Any) -> tuple[Any, Any]:
    """Of the classes below."""
    if isinstance(batch, (Pair, Record, FrozenRecord, SlottedRecord, PinnedBatch)):
        return batch.x, batch.caption
    return (batch["x"], batch["caption"]) if isinstance(batch, Mapping) else tuple(batch)


@pytest.mark.filterwarnings("ignore:the mean gradient is mostly noise")
@pytest.mark.parametrize("name", CAPTIONED)
@pytest.mark.parametrize(
    "options", [{}, {"kind": "diagonal"}, {"rank": 2}, {"unbiased": False}], ids=["mean", "diagonal", "top", "biased"]
)
def test_fishers_of_any_class_of_batch_are_those_of_tensors(name, options):
    """Seven samples a batch, so that halves and the last batch are cut in the middle."""
    model = nn.Linear(5, 2)
    parts = [range(i, i + 7) for i in (0, 7, 14)]
    number_of = {caption: i for i, caption in enumerate(captions(range(40)))}

    def loss(model: nn.Module, batch: Any) -> Tensor:
        x, caption = x_and_captions(batch)
        rows = [number_of[str(c)] for c in caption]
        assert torch.equal(x, x_of(rows))
        return (model(x) - torch.tensor(rows)[:, None] / 10).square().sum(1)

    def plain(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (model(batch[0]) - batch[1][:, None] / 10).square().sum(1)

    got = ck.estimate_fisher(model, loss, [captioned(name, rows) for rows in parts], max_samples=19, **options)
    tensors = [(x_of(rows), torch.tensor(rows)) for rows in parts]
    want = ck.estimate_fisher(model, plain, tensors, max_samples=19, **options)
    assert got.statistics.num_samples == 19
    assert str(got.statistics) == str(want.statistics)
    if options.get("kind") == "diagonal":
        assert torch.equal(got.fisher_diagonal, want.fisher_diagonal)
    else:
        assert torch.equal(got.curvatures, want.curvatures)
        assert torch.equal(got.directions, want.directions)


def test_projections_of_any_class_of_batch_are_those_of_tensors():
    model = nn.Linear(5, 2)
    direction = {name: torch.randn_like(p) for name, p in model.named_parameters()}

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return model(x_and_captions(batch)[0]).square().sum(1)

    want = ck.jvp_projections(model, lambda model, x: model(x).square().sum(1), x_of(range(6)), direction)
    for name in CAPTIONED:
        assert torch.equal(ck.jvp_projections(model, loss, captioned(name, range(6)), direction), want)


@pytest.mark.filterwarnings("ignore:the mean gradient is mostly noise", "ignore:only .* of the trace")
def test_an_empty_batch_changes_nothing():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2), nn.Flatten(), nn.Linear(18, 2))
    x = torch.randn(24, 1, 5, 5)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        assert len(x)
        return model(x).square().sum(1)

    for options in ({}, {"kind": "diagonal"}, {"rank": 2}, {"unbiased": False}):
        want = ck.estimate_fisher(model, loss, list(x.split(6)), **options)
        for batches in ([x[:0], *x.split(6)], [x[:6], x[:0], x[6:12], x[:0], *x[12:].split(6), x[:0]]):
            assert str(ck.estimate_fisher(model, loss, batches, **options).statistics) == str(want.statistics)
        with pytest.raises(ValueError, match="loader yields no samples"):
            ck.estimate_fisher(model, loss, [x[:0], x[:0]], **options)


@pytest.mark.parametrize("name", ["tuple of captions", "UserDict", "dataclass", "BatchEncoding"])
def test_a_diagnosis_pairs_captions_with_their_samples(name):
    model, seen = nn.Linear(5, 2), set()

    def loss(model: nn.Module, batch: Any, t: Tensor) -> Tensor:
        x, caption = x_and_captions(batch)
        assert torch.equal(x, x_of([int(c.split()[1]) % 40 for c in caption]))
        seen.add(len(x))
        return (model(x) - t[:, None] / 1000).square().sum(1)

    parts = [[i % 40 for i in range(a, b)] for a, b in ((0, 20), (20, 20), (20, 50), (50, 70))]
    diagnosis = diagnose(model, loss, [captioned(name, rows) for rows in parts if rows], samples=60)
    assert diagnosis.num_samples == 48
    assert seen == {48, 3}
