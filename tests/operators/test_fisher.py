"""Fisher matrices: sampled labels against enumerated ones, seeds, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import curvlib as cl
from tests import oracles
from tests.cases import CASES, build
from tests.problems import columns, error, loader, rebatched, risk_of, snapshot

pytestmark = pytest.mark.filterwarnings("ignore:curvlib. .*:UserWarning")

KNOWN = [n for n in CASES if build(n).truth.kind != "other"]
SAMPLED = [
    "mlp ce",
    "mlp nll",
    "mlp mse",
    "mlp bce",
    "ce weighted",
    "ce smooth",
    "ce soft weighted smooth",
    "dense labels weighted",
    "masked lm",
    "nll weighted",
    "bce pos_weight",
    "bce weighted",
    "mse sum",
    "ce sum",
    "hf target",
    "BatchNorm1d train",
]


@pytest.mark.parametrize("name", SAMPLED)
def test_sampled_labels_average_to_type2(name: str) -> None:
    """Each entry of some random quadratic forms, within 5 standard errors over seeds."""
    risk = risk_of(build(name))
    exact = oracles.dense("type2", name)
    V = columns(exact.shape[0], 12)
    draws = []
    for seed in range(200):
        sampled = cl.fisher(risk, kind="mc", seed=seed)
        draws.append((V * (sampled @ V)).sum(0))
    found = torch.stack(draws)
    expected = (V * (exact @ V)).sum(0)
    stderr = found.std(0) / len(draws) ** 0.5
    assert (stderr > 0).all()
    assert (stderr < 0.2 * expected).all()  # else the test says nothing
    assert ((found.mean(0) - expected).abs() <= 5 * stderr).all()


def test_more_samples_vary_less() -> None:
    name = "mlp ce"
    risk = risk_of(build(name))
    exact = oracles.dense("type2", name)
    V = columns(exact.shape[0], 4)

    def spread(samples: int) -> float:
        errors = [
            cl.fisher(risk, kind="mc", samples=samples, seed=s) @ V - exact @ V for s in range(40)
        ]
        return float(torch.stack(errors).square().mean())

    assert spread(16) == pytest.approx(spread(1) / 16, rel=0.5)


@pytest.mark.parametrize("name", ["mlp ce", "mlp bce", "mlp mse", "masked lm", "dense labels"])
def test_a_seed_is_one_matrix(name: str) -> None:
    case = build(name)
    before = snapshot(case.model)
    op = cl.fisher(risk_of(case), kind="mc", seed=3, samples=2)
    V = columns(op.shape[1], 3)
    out = op @ V
    assert torch.equal(op @ V, out)
    snapshot(case.model).assert_same(before)
    again = cl.fisher(risk_of(build(name)), kind="mc", seed=3, samples=2)
    assert torch.equal(again @ V, out)
    assert error(op @ V[:, :1], out[:, :1]) < 1e-12
    assert error(cl.fisher(risk_of(case), kind="mc", seed=4, samples=2) @ V, out) > 1e-3
    dense = op.to_dense()
    assert op.psd
    assert error(dense, dense.T) < 1e-12
    assert float(torch.linalg.eigvalsh(dense).min()) > -1e-12 * float(dense.norm())
    for layer, block in op.blocks().items():  # the same labels in every block
        where = torch.cat(
            [torch.arange(len(dense))[op.space.slice(n)] for n in op.space.layers()[layer]]
        )
        assert error(block.to_dense(), dense[where][:, where]) < 1e-10


@pytest.mark.parametrize("name", ["mlp ce", "mlp bce", "mlp mse", "masked lm", "dense labels"])
def test_labels_do_not_depend_on_batches(name: str) -> None:
    case = build(name)
    op = cl.fisher(risk_of(case), kind="mc", seed=1)
    V = columns(op.shape[1], 3)
    expected = op @ V
    for sizes in ([8], [1] * 8, [5, 3]):
        other = cl.fisher(risk_of(rebatched(case, sizes)), kind="mc", seed=1)
        assert error(other @ V, expected) < 1e-10
    loaded = cl.Risk(case.model, case.loss, loader(case), **case.settings)
    assert error(cl.fisher(loaded, kind="mc", seed=1) @ V, expected) < 1e-10


def test_the_rank_is_at_most_the_number_of_samples() -> None:
    """One sampled label for each of 8 terms, or each of 8 x 3 entries that are summed."""
    for name in ("mlp ce", "mlp bce"):
        dense = cl.fisher(risk_of(build(name)), kind="mc").to_dense()
        rank = int(torch.linalg.matrix_rank(dense, hermitian=True, rtol=1e-10))
        assert 1 <= rank <= 24
    dense = cl.fisher(risk_of(build("mlp ce")), kind="mc").to_dense()
    assert int(torch.linalg.matrix_rank(dense, hermitian=True, rtol=1e-10)) <= 8


@pytest.mark.parametrize("name", KNOWN)
def test_type2_is_the_ggn(name: str) -> None:
    risk = risk_of(build(name))
    V = columns(risk.space.size, 2)
    assert error(cl.fisher(risk, kind="type2") @ V, cl.ggn(risk) @ V) < 1e-12


def test_empirical_is_not_scaled_by_the_batch() -> None:
    """The peers' fault: gradients of a batch's mean loss, squared."""
    model = nn.Linear(2, 1, bias=False).double()
    x = torch.eye(2, dtype=torch.float64)
    y = torch.ones(2, 1, dtype=torch.float64)
    risk = cl.Risk(model, nn.MSELoss(), (x, y))
    residual = (model(x) - y).detach().flatten()
    expected = torch.diag(4 * residual**2) / 2
    assert error(cl.fisher(risk, kind="empirical").to_dense(), expected) < 1e-14


def test_names_and_fingerprints_tell_kinds_apart() -> None:
    risk = risk_of(build("mlp ce"))
    ops = [
        cl.fisher(risk, kind="empirical"),
        cl.fisher(risk, kind="type2"),
        cl.fisher(risk, kind="mc", seed=0),
        cl.fisher(risk, kind="mc", seed=1),
        cl.fisher(risk, kind="mc", seed=0, samples=2),
        cl.ggn(risk),
        cl.hessian(risk),
    ]
    assert len({op.fingerprint() for op in ops}) == len(ops)
    assert all("Fisher" in op.name for op in ops[:5])
    assert len({op.name for op in ops[:3]}) == 3


# ----------------------------------------------------------------------- refusals
def test_refusals() -> None:
    risk = risk_of(build("mlp ce"))
    with pytest.raises(ValueError, match=r"kind=.*'type2', 'mc', 'empirical', got 'true'"):
        cl.fisher(risk, kind="true")
    for samples in (0, -1):
        with pytest.raises(ValueError, match=f"samples=.*at least one.*got {samples}"):
            cl.fisher(risk, kind="mc", samples=samples)
    custom = risk_of(build("custom"))
    for kind in ("mc", "type2"):
        with pytest.raises(ValueError, match=r"ggn|GGN|empirical"):
            cl.fisher(custom, kind=kind) @ torch.zeros(custom.space.size, 1, dtype=torch.float64)


def test_outputs_that_are_no_tensor() -> None:
    case = build("hf own loss")
    with pytest.raises(TypeError, match=r"one tensor, but the model returned.*forward="):
        cl.ggn(risk_of(case)) @ torch.zeros(risk_of(case).space.size, 1, dtype=torch.float64)


def test_nll_of_what_is_no_log_probability() -> None:
    model = nn.Linear(3, 3).double()
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    risk = cl.Risk(model, nn.NLLLoss(), (x, y))
    with pytest.raises(ValueError, match=r"NLL needs log-probabilities.*log_softmax"):
        cl.ggn(risk) @ torch.zeros(12, 1, dtype=torch.float64)


def test_ggn_of_a_loss_that_ignores_the_output() -> None:
    model = nn.Linear(3, 3).double()
    x = torch.randn(4, 3, dtype=torch.float64)

    def decay(out: Tensor, y: Tensor) -> Tensor:
        return model.weight.square().sum()

    with pytest.raises(ValueError, match="does not depend on the model's output"):
        cl.ggn(cl.Risk(model, decay, (x, x))) @ torch.zeros(12, 1, dtype=torch.float64)


def test_ggn_of_a_loss_that_is_linear_in_the_output_is_zero() -> None:
    model = nn.Linear(3, 3).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    risk = cl.Risk(model, lambda out, y: (out * y).sum(1).mean(), (x, x))
    assert float(cl.ggn(risk).to_dense().abs().sum()) == 0.0
