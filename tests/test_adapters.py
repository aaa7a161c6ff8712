"""Inputs as people have them: adapters are lossless, and what goes through them is what plain autograd says."""

import copy
import pickle
from collections import UserDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gpntk
from gpntk.errors import InputError, NetworkError, SelectionError
from gpntk.network import Adapter
from gpntk.network.heads import Body

DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
]
QUICK: dict[str, Any] = {"kernel": "ntk", "hyperparameters": "maximum"}


def anything(**_: Any) -> None: ...


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Numbers over the whole range of the dtype."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator) > 0.5
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    info = torch.iinfo(dtype)
    return torch.randint(info.min, info.max, shape, generator=generator, dtype=torch.int64).to(dtype)


def same(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return list(one) == list(two) and all(same(one[name], two[name]) for name in one)
    return len(one) == len(two) and all(map(same, one, two))


# --- laws ------------------------------------------------------------------------------------------------------------

shapes = st.lists(st.integers(1, 3), max_size=3).map(tuple)
leaves = st.dictionaries(st.sampled_from("abcdef"), st.tuples(shapes, st.sampled_from(DTYPES)), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(leaves, st.integers(1, 4), st.integers(0, 99), st.sampled_from(["mapping", "tuple", "tensor"]))
def test_unpacking_gives_what_was_packed(kinds: Any, rows: int, seed: int, form: str) -> None:
    batch: Any = {name: values((rows, *shape), dtype, seed) for name, (shape, dtype) in kinds.items()}
    if form != "mapping":
        batch = tuple(batch.values()) if form == "tuple" else next(iter(batch.values()))
    adapter = Adapter.of(batch, lambda *args, **kwargs: None)
    x = adapter.pack(batch)
    assert x.shape == (rows, adapter.width)
    assert x.is_floating_point()
    assert same(adapter.unpack(x), batch)
    # On the way through another precision whole numbers stay what they were.
    if adapter.kind == "mapping":
        there = adapter.unpack(x.double().float() if x.dtype == torch.float32 else x.float())
        assert all(same(there[name], batch[name]) for name in batch if not batch[name].is_floating_point())
    again = Adapter.from_facts(adapter.facts())
    assert same(again.unpack(again.pack(batch)), batch)


def test_ids_beyond_single_precision_are_exact_or_refused() -> None:
    ids = torch.tensor([[2**24 + 1, 5], [2**62 + 3, -(2**63)]])
    adapter = Adapter.of({"ids": ids}, anything)
    x = adapter.pack({"ids": ids}, torch.float32)
    assert x.dtype == torch.float32
    assert torch.equal(adapter.unpack(x)["ids"], ids)
    small = Adapter.of({"ids": torch.tensor([[1, 2]])}, anything)
    assert small.width == 2
    with pytest.raises(InputError, match=r"'ids' has whole numbers beyond"):
        small.pack({"ids": ids})
    with pytest.raises(InputError, match=r"cannot hold the ids of 'ids'"):
        small.unpack(torch.ones(1, 2, dtype=torch.float16))


def test_floating_columns_are_differentiable_and_whole_ones_have_zero_derivative() -> None:
    batch = {"a": torch.randn(3, 2, dtype=torch.float64), "b": torch.tensor([[1, 2], [3, 4], [5, 6]])}
    adapter = Adapter.of(batch, anything)
    x = adapter.pack(batch).requires_grad_()
    kwargs = adapter.arguments(x).kwargs
    ((kwargs["a"] ** 2).sum() + kwargs["b"].sum()).backward()
    torch.testing.assert_close(x.grad, torch.cat([2 * batch["a"], torch.zeros(3, 2)], 1))


def test_kernels_are_differentiable_in_the_floating_columns_alone() -> None:
    torch.manual_seed(0)
    frozen = gpntk.freeze(ByName().double(), inputs=(LEFT, RIGHT))
    kernel = gpntk.NTKKernel(frozen)
    x = frozen.adapter.pack((LEFT, RIGHT)).requires_grad_()
    weights = torch.randn(4, 4, dtype=torch.float64)
    (grad,) = torch.autograd.grad((kernel(x).to_dense() * weights).sum(), x)
    assert not grad[:, 2:].any()
    step = torch.zeros_like(x).detach()
    step[:, :2] = torch.randn(4, 2, dtype=torch.float64) * 1e-6
    plus, minus = (kernel(x.detach() + sign * step).to_dense() for sign in (1, -1))
    found = ((plus - minus) * weights).sum() / 2e-6
    torch.testing.assert_close((grad * step).sum() / 1e-6, found, rtol=1e-6, atol=1e-8)


def test_copies_and_pickles_of_an_adapter_keep_its_objects() -> None:
    graphs = [Graph(torch.ones(2, 1)), Graph(torch.ones(3, 1))]
    adapter = Adapter.of(graphs, anything)
    x = adapter.pack(graphs)
    assert x.tolist() == [[0.0], [1.0]]
    assert adapter.pack(graphs[::-1]).tolist() == [[1.0], [0.0]]
    for other in (copy.deepcopy(adapter), pickle.loads(pickle.dumps(adapter))):
        assert torch.equal(other.unpack(x)[1].nodes, graphs[1].nodes)
        assert other.pack([Graph(torch.ones(1, 1))]).tolist() == [[2.0]] or other is adapter
    with pytest.raises(InputError, match="names objects 7 to 7"):
        adapter.unpack(torch.tensor([[7.0]]))


# --- how forward is called --------------------------------------------------------------------------------------------


class Calls(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 3), nn.Linear(3, 1)


class ByName(Calls):
    def forward(self, left: Tensor, right: Tensor | None = None) -> Tensor:
        assert right is not None
        return self.b(torch.tanh(self.a(left)) * right)


class OneDictionary(Calls):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.b(torch.tanh(self.a(batch["left"])) * batch["right"])


class OneTuple(Calls):
    def forward(self, pair: tuple[Tensor, Tensor], scale: float = 1.0) -> Tensor:
        left, right = pair
        return self.b(torch.tanh(self.a(left)) * right) * scale


LEFT, RIGHT = torch.randn(4, 2).double(), torch.tensor([[True, False, True]]).repeat(4, 1)


@pytest.mark.parametrize(
    ("kind", "batch", "spread"),
    [
        (ByName, {"right": RIGHT, "left": LEFT}, True),
        (ByName, UserDict({"left": LEFT, "right": RIGHT}), True),
        (ByName, (LEFT, RIGHT), True),
        (OneDictionary, {"right": RIGHT, "left": LEFT}, False),
        (OneTuple, (LEFT, RIGHT), False),
    ],
)
def test_forward_is_called_as_it_wants(kind: type[Calls], batch: Any, spread: bool) -> None:
    torch.manual_seed(0)
    module = kind().double()
    frozen = gpntk.freeze(module, inputs=batch)
    assert frozen.adapter.spread == spread
    x = frozen.adapter.pack(batch)
    expected = module.b(torch.tanh(module.a(LEFT)) * RIGHT)
    torch.testing.assert_close(frozen(x), expected)
    rows = [torch.autograd.grad(one, list(module.parameters()), retain_graph=True) for one in expected.flatten()]
    j = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
    torch.testing.assert_close(gpntk.NTKKernel(frozen)(x).to_dense(), j @ j.T, rtol=1e-10, atol=1e-10)


def test_what_forward_does_not_take_is_named() -> None:
    with pytest.raises(InputError, match=r"forward takes 'left', 'right', and needs \['left'\], but .* 'types'"):
        gpntk.freeze(ByName().double(), inputs={"left": LEFT, "types": RIGHT})
    with pytest.raises(InputError, match="different numbers of rows"):
        gpntk.freeze(ByName().double(), inputs={"left": LEFT, "right": RIGHT[:3]})
    with pytest.raises(InputError, match="'left' is text: tokenise it"):
        gpntk.freeze(ByName().double(), inputs={"left": ["a"] * 4, "right": RIGHT})
    with pytest.raises(InputError, match="give one of them"):
        gpntk.freeze(ByName().double(), inputs=LEFT, input_shape=(2,))
    frozen = gpntk.freeze(ByName().double(), inputs={"left": LEFT, "right": RIGHT})
    with pytest.raises(InputError, match="pass the same"):
        frozen.adapter.pack({"left": LEFT})
    with pytest.raises(SelectionError, match="frozen already"):
        gpntk.freeze(frozen, inputs=LEFT)


def test_input_shape_is_the_simplest_adapter() -> None:
    images = torch.randn(3, 1, 4, 4)
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 1))
    by_shape = gpntk.freeze(network, input_shape=(1, 4, 4))
    by_batch = gpntk.freeze(network, inputs=images)
    assert by_shape.adapter.input_shape == by_batch.adapter.input_shape == (1, 4, 4)
    x = by_batch.adapter.pack(images)
    assert torch.equal(x, images.flatten(1))
    assert torch.equal(by_batch.adapter.unpack(x), images)
    torch.testing.assert_close(by_shape(x), by_batch(x))
    with pytest.raises(InputError, match=r"input_shape=\(1, 4, 4\) needs 16"):
        by_batch(x[:, :15])


# --- a small model of texts ----------------------------------------------------------------------------------------


@dataclass
class Output:
    logits: Tensor
    attentions: tuple[Tensor, ...] = ()


@dataclass
class Hidden:
    last_hidden_state: Tensor
    pooler_output: Tensor


class Bert(nn.Module):
    """One block of masked attention over token and type embeddings, then a classifier of the first token."""

    def __init__(self, headless: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.types, self.places = nn.Embedding(30, 8), nn.Embedding(2, 8), nn.Embedding(12, 8)
        self.query, self.key, self.value, self.norm = (
            nn.Linear(8, 8),
            nn.Linear(8, 8),
            nn.Linear(8, 8),
            nn.LayerNorm(8),
        )
        self.headless, self.classifier = headless, nn.Linear(8, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Any:
        assert input_ids.dtype == torch.int64
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        places = torch.arange(input_ids.shape[1])
        h = self.words(input_ids) + self.types(types) + self.places(places)
        scores = self.query(h) @ self.key(h).mT / 8**0.5
        scores = scores.masked_fill(attention_mask[:, None, :] == 0, -1e9)
        h = self.norm(h + scores.softmax(-1) @ self.value(h))
        return Hidden(h, self.classifier(h[:, 0])) if self.headless else Output(self.classifier(h[:, 0]))


def texts(rows: int, length: int = 6, seed: int = 0) -> UserDict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 30, (rows, length), generator=generator)
    mask = torch.arange(length) < torch.randint(2, length, (rows, 1), generator=generator)
    return UserDict({"input_ids": ids * mask, "attention_mask": mask.long(), "token_type_ids": (ids % 2) * mask})


BATCH, LABELS = texts(14), np.array(["no", "yes"])[np.arange(14) % 2]


def jacobian(outputs: Tensor, module: nn.Module) -> Tensor:
    weights = list(module.parameters())
    rows = [
        torch.autograd.grad(one, weights, retain_graph=True, materialize_grads=True, allow_unused=True)
        for one in outputs.flatten()
    ]
    return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])


def mean_of(module: nn.Module, batch: Any) -> Tensor:
    weights = batch["attention_mask"].double()
    return ((weights / weights.sum(1, keepdim=True))[..., None] * module(**batch).last_hidden_state).sum(1)


def last_of(module: nn.Module, batch: Any) -> Tensor:
    last = batch["attention_mask"].sum(1) - 1
    return module(**batch).last_hidden_state[torch.arange(len(last)), last]


@pytest.mark.parametrize(
    ("headless", "extract", "plain", "named"),
    [
        (False, None, lambda m, b: m(**b).logits, "'logits'"),
        (True, "mean", mean_of, "mean over the tokens of 'last_hidden_state'"),
        (True, "cls", lambda m, b: m(**b).last_hidden_state[:, 0], "cls over"),
        (True, "last", last_of, "last over"),
        (True, "pooler_output", lambda m, b: m(**b).pooler_output, "'pooler_output'"),
    ],
)
def test_kernels_of_texts(headless: bool, extract: str | None, plain: Any, named: str) -> None:
    module, batch = Bert(headless).double().eval(), texts(3)
    frozen = gpntk.freeze(module, extract=extract, inputs=batch)
    x = frozen.adapter.pack(batch, torch.float64).requires_grad_()
    j = jacobian(plain(module, batch), module)
    kernel = gpntk.NTKKernel(frozen)
    found = kernel(x).to_dense()
    torch.testing.assert_close(found.detach(), j @ j.T, rtol=1e-9, atol=1e-9)
    assert named in repr(kernel)
    assert not torch.autograd.grad(found.sum(), x)[0].any()


def test_the_output_that_was_taken_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "gpntk.network"):
        frozen = gpntk.freeze(Bert(), inputs=BATCH)
    assert [record.getMessage() for record in caplog.records] == [
        "of what the network returns, its output is 'logits'."
    ]
    assert "outputs are 'logits'" in repr(frozen)
    with pytest.raises(
        NetworkError, match=r"choose extract='mean', extract='cls', extract='last', extract='pooler_out"
    ):
        gpntk.freeze(Bert(headless=True), inputs=BATCH)
    with pytest.raises(NetworkError, match=r"extract='logit', but the network returned Output with 'logits' \[2, 2\]"):
        gpntk.freeze(Bert(), extract="logit", inputs=BATCH)


class Returns(nn.Module):
    def __init__(self, what: Any) -> None:
        super().__init__()
        self.a, self.what = nn.Linear(2, 3), what

    def forward(self, x: Tensor) -> Any:
        return self.what(self.a(x))


def test_other_classes_of_outputs() -> None:
    x = torch.randn(4, 2)
    for what in (lambda h: (h, h.sum()), lambda h: [h], lambda h: {"only": h, "n": 3}, lambda h: {"logits": h, "b": h}):
        module = Returns(what)
        torch.testing.assert_close(gpntk.freeze(module)(x), module.a(x))
    with pytest.raises(NetworkError, match=r"returned dict, not a tensor: pass extract=.*'a' \[2, 3\], 'b' \[2, 3\]"):
        gpntk.freeze(Returns(lambda h: {"a": h, "b": h})).num_outputs(x)


# --- estimators ------------------------------------------------------------------------------------------------------


def test_texts_go_into_a_classifier_as_they_are(tmp_path: Path) -> None:
    model = gpntk.TransferClassifier(Bert().eval(), classes=["no", "yes"], **QUICK).fit(BATCH, LABELS)
    assert set(model.predict(BATCH)) <= {"no", "yes"}
    probabilities = model.predict_proba(BATCH)
    # By hand, on what the adapter makes of them.
    frozen = gpntk.freeze(Bert().eval(), inputs=BATCH)
    x = frozen.adapter.pack(BATCH, torch.float64)
    gp = gpntk.TransferGP(frozen, x, torch.arange(14) % 2, likelihood="categorical", **QUICK)
    gp.fit()
    np.testing.assert_allclose(probabilities, gp.probabilities(x).numpy(), rtol=1e-6)
    assert "The network's output is 'logits'." in str(model.report_)
    # Arrays in a plain dictionary, and texts that are padded otherwise.
    arrays = {name: tensor.numpy() for name, tensor in BATCH.items()}
    np.testing.assert_allclose(model.predict_proba(arrays), probabilities)
    long = {name: torch.cat([tensor, torch.zeros(14, 3).long()], 1) for name, tensor in BATCH.items()}
    np.testing.assert_allclose(model.predict_proba(long), probabilities)
    few = {name: tensor[:1, :5] for name, tensor in texts(14).items()}
    padded = {name: torch.cat([tensor, torch.zeros(1, 1).long()], 1) for name, tensor in few.items()}
    np.testing.assert_allclose(model.predict_proba(few), model.predict_proba(padded))
    with pytest.raises(InputError, match="texts are 9 tokens long, but the network was given 6"):
        model.predict(texts(3, length=9, seed=1))
    model.save(tmp_path / "file")
    loaded = gpntk.TransferClassifier.load(tmp_path / "file", Bert())
    np.testing.assert_allclose(loaded.predict_proba(arrays), probabilities, rtol=1e-6)
    more = model.partial_fit(texts(2, seed=3), ["no", "yes"])
    assert more.predict_proba(BATCH).shape == (14, 2)


def test_regression_on_several_tensors() -> None:
    torch.manual_seed(0)
    left, right = torch.randn(12, 2), torch.rand(12, 3) > 0.5
    y = left.sum(1).numpy()
    model = gpntk.TransferRegressor(ByName(), **QUICK).fit((left, right), y)
    by_name = gpntk.TransferRegressor(model.network, **QUICK).fit({"left": left, "right": right}, y)
    mean, std = model.predict((left[:3], right[:3]), return_std=True)
    np.testing.assert_allclose(by_name.predict({"right": right[:3], "left": left[:3]}), mean, rtol=1e-6)
    assert (std > 0).all()
    missing = gpntk.TransferRegressor(model.network, **QUICK).fit((left, right), np.where(y > 1, np.nan, y))
    assert np.isfinite(missing.predict((left, right))).all()
    with pytest.raises(InputError, match="12 inputs, but y has 11"):
        gpntk.TransferRegressor(ByName()).fit((left, right), y[:11])


class OfTwo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.readout = nn.Linear(2, 1)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.readout(torch.stack([a, b], -1))


def test_tuples_of_vectors_are_rows_in_numpy_and_arguments_in_torch() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(9), torch.randn(9)
    model = gpntk.TransferRegressor(OfTwo(), **QUICK).fit((a, b), (a + b).numpy())
    np.testing.assert_allclose(np.asarray(model.predict((a, b))), (a + b).numpy(), atol=0.1)
    rows = tuple(torch.stack([a, b], -1).numpy())
    plain = gpntk.TransferRegressor(nn.Linear(2, 1), **QUICK).fit(rows, (a + b).numpy())
    np.testing.assert_allclose(np.asarray(plain.predict(rows)), (a + b).numpy(), atol=0.1)


def test_token_ids_are_integers_only_where_the_network_wants_them() -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 9, (10, 4))
    words = nn.Sequential(nn.Embedding(9, 3), nn.Flatten(), nn.Linear(12, 1))
    y = np.linspace(0, 1, 10)
    for X in (ids, ids.numpy(), ids.tolist()):
        model = gpntk.TransferRegressor(words, **QUICK).fit(X, y)
        np.testing.assert_allclose(model.predict(X), model.predict(ids), rtol=1e-9)
    # Counts that go into a linear map are numbers, in which a kernel is differentiable.
    plain = gpntk.TransferRegressor(nn.Linear(4, 1), **QUICK).fit(ids.numpy(), y)
    np.testing.assert_allclose(plain.predict(ids.numpy()), plain.predict(ids.double().numpy()))


def test_texts_are_refused_with_a_hint() -> None:
    for X in (["one", "two"], np.array(["one", "two"]), ("one", "two"), "one"):
        with pytest.raises(InputError, match=r"is text: tokenise it, by tokenizer\(texts, padding=True"):
            gpntk.TransferClassifier(Bert()).fit(X, [0, 1])
    with pytest.raises(InputError, match="all of one length"):
        gpntk.TransferClassifier(Bert()).fit({"input_ids": [[1, 2], [3]], "attention_mask": [[1, 1], [1]]}, [0, 1])


def test_ids_have_no_stationary_kernel() -> None:
    model = gpntk.TransferClassifier(Bert().eval(), hyperparameters="maximum").fit(BATCH, LABELS == "yes")
    comparison = model._model.comparison
    assert comparison is not None
    assert set(comparison.log_evidence) == {"ntk", "ntk+stationary of features", "nngp", "stationary of features"}
    assert "stationary alone" not in model.report_.log_evidence
    with pytest.raises(InputError, match="whose distances mean nothing"):
        gpntk.TransferClassifier(Bert().eval(), stationary_inputs="inputs").fit(BATCH, LABELS == "yes")


@dataclass
class Graph:
    nodes: Tensor


class Message(nn.Module):
    """Sums over the nodes of each graph, which differ in number."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(1, 4), nn.Linear(4, 1)

    def forward(self, graphs: list[Graph]) -> Tensor:
        return self.b(torch.stack([torch.tanh(self.a(graph.nodes)).sum(0) for graph in graphs]))


def test_graphs_go_into_a_regressor_as_a_list(tmp_path: Path) -> None:
    torch.manual_seed(0)
    graphs = [Graph(torch.randn(2 + number % 3, 1)) for number in range(10)]
    y = np.array([float(graph.nodes.sum()) for graph in graphs])
    module = Message()
    model = gpntk.TransferRegressor(module, **QUICK).fit(graphs, y)
    others = [Graph(torch.randn(4, 1)), graphs[2]]
    found, of_fit = np.asarray(model.predict(others)), np.asarray(model.predict(graphs))
    np.testing.assert_allclose(found[1], of_fit[2], rtol=1e-6)
    assert found.shape == (2,)
    with pytest.raises(InputError, match="list of objects cannot be saved"):
        model.save(tmp_path / "file")
    frozen = gpntk.freeze(module.double(), inputs=graphs[:3])
    x = frozen.adapter.pack(graphs[:3], torch.float64)
    j = jacobian(module([Graph(graph.nodes.double()) for graph in graphs[:3]]), module)
    torch.testing.assert_close(gpntk.NTKKernel(frozen)(x).to_dense(), j @ j.T, rtol=1e-9, atol=1e-9)


# --- new heads -------------------------------------------------------------------------------------------------------


class Embedder(nn.Module):
    def __init__(self, last: Any) -> None:
        super().__init__()
        self.body, self.linear, self.last = nn.Linear(3, 8), nn.Linear(8, 4), last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.linear(torch.tanh(self.body(x))))


@pytest.mark.parametrize(
    "last",
    [
        lambda h: h / h.norm(dim=1, keepdim=True),
        lambda h: h.relu() / h.relu().norm(dim=1, keepdim=True),
        lambda h: h.log(),
        lambda h: (-h).log(),
        lambda h: torch.cosine_similarity(h[:, None], torch.eye(4)[None].to(h), dim=-1),
        lambda h: h.softmax(-1).log(),
    ],
)
def test_new_heads_of_networks_that_normalise(last: Any) -> None:
    torch.manual_seed(0)
    module, x = Embedder(last).eval(), torch.randn(12, 3)
    body = Body(module)
    body.check(x)
    torch.testing.assert_close(body(x), torch.tanh(module.body(x)))

    def bypassed(h: Tensor) -> Tensor:
        return last(h) + x[: len(h), :1].to(h)

    with pytest.raises(NetworkError, match="by other ways"):
        Body(Embedder(bypassed)).check(x)


def test_a_normalised_embedding_takes_new_classes() -> None:
    torch.manual_seed(0)
    x = torch.randn(12, 3)
    for last in (lambda h: h / h.norm(dim=1, keepdim=True), lambda h: h.relu() / h.relu().norm(dim=1, keepdim=True)):
        model = gpntk.TransferClassifier(Embedder(last).eval(), new_head=True, hyperparameters="maximum")
        assert model.fit(x, torch.arange(12) % 3).predict_proba(x).shape == (12, 3)


def test_an_encoder_without_a_readout_takes_classes(tmp_path: Path) -> None:
    module = Bert(headless=True).eval()
    model = gpntk.TransferClassifier(module, extract="mean", new_head=True, **QUICK).fit(BATCH, np.arange(14) % 3)
    probabilities = model.predict_proba(BATCH)
    assert "a new head on the mean over the tokens of 'last_hidden_state'" in str(model.report_)
    # The same by hand: the encoder under a Linear, whose weights do not matter.
    wrapped = Wrapped(module).eval()
    by_hand = gpntk.TransferClassifier(wrapped, new_head=True, **QUICK).fit(BATCH, np.arange(14) % 3)
    np.testing.assert_allclose(by_hand.predict_proba(BATCH), probabilities, rtol=1e-5)
    model.save(tmp_path / "file")
    loaded = gpntk.TransferClassifier.load(tmp_path / "file", module, extract="mean")
    np.testing.assert_allclose(loaded.predict_proba(BATCH), probabilities, rtol=1e-6)


def test_groups_of_an_encoder_under_a_new_head_are_those_of_its_own_names() -> None:
    frozen = gpntk.freeze(Bert(headless=True).eval(), extract="mean", inputs=BATCH)
    x, labels = frozen.adapter.pack(BATCH, torch.float64), torch.arange(14) % 3
    groups = {"rest": "*", "words": "words.*"}
    options: dict[str, Any] = {"likelihood": "dirichlet", "new_head": True, "prior_groups": groups, **QUICK}
    gp = gpntk.TransferGP(frozen, x, labels, **options)
    gp.fit()
    assert {"ntk words", "ntk rest", "readout"} <= set(gp.hyperparameters())


class Wrapped(nn.Module):
    def __init__(self, encoder: Bert) -> None:
        super().__init__()
        self.network, self.head = encoder, nn.Linear(8, 5)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        h, weights = self.network(**batch).last_hidden_state, attention_mask[..., None].float()
        return self.head((h * weights).sum(1) / weights.sum(1))


class LastToken(Bert):
    """A readout of every token, of which the last that counts is taken, as decoders do."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Any:
        self.headless = True
        hidden = super().forward(input_ids, attention_mask, token_type_ids).last_hidden_state
        return self.head(hidden)[torch.arange(len(hidden)), attention_mask.sum(1) - 1]

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Identity()
        self.head = nn.Linear(8, 2)


def test_a_readout_of_every_token_takes_new_classes() -> None:
    module = LastToken().double().eval()
    body = Body(module)
    body.check(**BATCH)
    w, b = module.head.weight, module.head.bias
    torch.testing.assert_close(body(**BATCH) @ w.T + b, module(**BATCH))
    model = gpntk.TransferClassifier(LastToken().eval(), new_head=True, **QUICK).fit(BATCH, np.arange(14) % 3)
    assert model.predict_proba(BATCH).shape == (14, 3)
