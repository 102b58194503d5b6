"""The loss as a module: in every respect torch's, with the further options."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
from oracle import Options, loss_and_grad
from torch import nn
from torch.nn import functional as F

import xent

OPTIONS = [
    {},
    {"reduction": "sum", "ignore_index": 3},
    {"reduction": "none", "label_smoothing": 0.1},
    {"dim": -1, "normalizer": 5, "on_empty": "zero", "z_loss": 0.1},
    {"softcap": 3.0, "logit_scale": 0.5, "loss_dtype": torch.float64, "inplace_backward": True},
    {"normalizer": torch.tensor(7)},
]
every_options = pytest.mark.parametrize("options", OPTIONS, ids=str)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (6, 5) and targets."""
    torch.manual_seed(0)
    return torch.randn(6, 5), torch.randint(5, (6,))


@every_options
@pytest.mark.parametrize("weighted", [False, True])
def test_module_is_the_function(options: Options, weighted: bool) -> None:
    """Every option of the constructor arrives."""
    weight = torch.rand(5) if weighted else None
    x, y = batch()
    module = xent.CrossEntropyLoss(weight, **options)
    ours = loss_and_grad(module, x.clone(), y)
    functions = loss_and_grad(xent.cross_entropy, x.clone(), y, weight, **options)
    assert ours[0].equal(functions[0])
    assert ours[1].equal(functions[1])
    assert ours[0].dtype == functions[0].dtype


def test_each_option_matters() -> None:
    """Or the test above would not see one that is dropped."""
    x, y = batch()
    plain = loss_and_grad(xent.CrossEntropyLoss(), x.clone(), y)
    for options in OPTIONS[1:]:
        for name, value in options.items():
            if name in ("dim", "on_empty", "inplace_backward"):
                continue  # they have a say in other cases only
            ours = loss_and_grad(xent.CrossEntropyLoss(**{name: value}), x.clone(), y)
            assert ours[0].shape != plain[0].shape or ours[0].dtype != plain[0].dtype or not ours[0].equal(plain[0]), (
                name
            )
    assert xent.CrossEntropyLoss(on_empty="zero")(x, torch.full((6,), -100)) == 0
    square = torch.randn(2, 3, 3)
    first, last = (xent.CrossEntropyLoss(dim=dim)(square, torch.tensor([[0, 1, 2], [2, 1, 1]])) for dim in (1, -1))
    assert not first.equal(last)
    in_place = loss_and_grad(xent.CrossEntropyLoss(inplace_backward=True), x, y)
    assert in_place[1].data_ptr() == x.data_ptr()


def test_drop_in() -> None:
    """Whoever asks for nn.CrossEntropyLoss gets it: by isinstance, by name, by repr."""
    ours, torchs = xent.CrossEntropyLoss(), nn.CrossEntropyLoss()
    assert isinstance(ours, nn.CrossEntropyLoss)
    assert repr(ours) == repr(torchs) == "CrossEntropyLoss()"
    assert repr(nn.Sequential(ours)) == repr(nn.Sequential(torchs))
    assert ours.reduction == torchs.reduction
    assert ours.ignore_index == torchs.ignore_index
    assert ours.label_smoothing == torchs.label_smoothing
    assert ours.weight is torchs.weight is None


def test_state_dict_is_the_weight() -> None:
    weight = torch.rand(5)
    ours, torchs = xent.CrossEntropyLoss(weight), nn.CrossEntropyLoss(weight)
    assert list(ours.state_dict()) == list(torchs.state_dict()) == ["weight"]
    assert not list(ours.parameters())
    assert ours.state_dict()["weight"].equal(weight)
    other = xent.CrossEntropyLoss(torch.zeros(5))
    other.load_state_dict(torchs.state_dict())
    assert other.weight.equal(weight)
    assert not xent.CrossEntropyLoss().state_dict()
    assert ours.to(torch.float64).weight.dtype == torch.float64
    assert ours.to("meta").weight.is_meta


def through_pickle(module: nn.Module) -> Any:
    """The module, written to bytes and read again."""
    return pickle.loads(pickle.dumps(module))


def through_torch_save(module: nn.Module) -> Any:
    """The module, as torch.save keeps it."""
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@every_options
def test_copies(options: Options) -> None:
    x, y = batch()
    module = xent.CrossEntropyLoss(torch.rand(5), **options)
    for copied in (copy.deepcopy, copy.copy, through_pickle, through_torch_save):
        twin = copied(module)
        assert type(twin) is xent.CrossEntropyLoss
        assert twin(x, y).equal(module(x, y))
        assert vars(twin).keys() == vars(module).keys()


def test_hooks_run() -> None:
    """It is called as any module is."""
    calls = []
    module = xent.CrossEntropyLoss()
    module.register_forward_hook(lambda module, args, loss: calls.append(loss))
    loss = module(*batch())
    assert calls == [loss]


def test_module_takes_candidates() -> None:
    x, y = batch()
    several, q = torch.stack([y, y.flip(0)], 1), torch.rand(len(y), 2)
    expected = xent.cross_entropy(x, several, target_prob=q)
    assert torch.equal(xent.CrossEntropyLoss()(x, several, target_prob=q), expected)


@pytest.mark.parametrize(
    ("ours", "torchs"),
    [(xent.cross_entropy, F.cross_entropy), (xent.CrossEntropyLoss.__init__, nn.CrossEntropyLoss.__init__)],
    ids=["function", "module"],
)
def test_names_and_defaults_are_torchs(ours: object, torchs: object) -> None:
    """And all after `weight` go by keyword only, lest an old positional `size_average` slip in."""
    signature, model = (inspect.signature(function).parameters for function in (ours, torchs))
    shared = [name for name in model if name not in ("size_average", "reduce")]
    assert [name for name in signature if name in model] == shared
    assert all(signature[name].default == model[name].default for name in shared)
    names = list(signature)
    after = names[names.index("weight") + 1 :]
    assert {signature[name].kind for name in after} == {inspect.Parameter.KEYWORD_ONLY}


def test_module_and_function_have_the_same_options() -> None:
    function, module = (inspect.signature(f).parameters for f in (xent.cross_entropy, xent.CrossEntropyLoss))
    assert {name: p.default for name, p in function.items() if name not in ("input", "target", "target_prob")} == {
        name: p.default for name, p in module.items()
    }
