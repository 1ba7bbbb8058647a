"""Probes: their laws, and that they depend on nothing but the generator."""

from __future__ import annotations

import pytest
import torch

from curvlib.estimators.probes import LAWS, fill_probes, generator_of, probes

F64 = torch.float64


@pytest.mark.parametrize("law", LAWS)
def test_probes_have_unit_covariance(law: str) -> None:
    n, count = 4, 40_000
    W = probes((n, count), law, generator=generator_of(None, 0), dtype=F64)
    covariance = W @ W.T / count
    # Entries of the sum have variance at most E[w^4] = 3: five standard errors.
    assert (covariance - torch.eye(n, dtype=F64)).abs().max() < 5 * (3 / count) ** 0.5
    assert W.mean(1).abs().max() < 5 / count**0.5


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("n", [1, 3, 17, 100])
def test_probes_do_not_depend_on_the_blocking(law: str, dtype: torch.dtype, n: int) -> None:
    whole = probes((n, 5), law, generator=generator_of(None, 3), dtype=dtype)
    generator = generator_of(None, 3)
    parts = [probes((n, c), law, generator=generator, dtype=dtype) for c in (1, 3, 1)]
    assert torch.equal(whole, torch.cat(parts, dim=1))
    assert whole.T.is_contiguous()
    assert whole.dtype == dtype


def test_norms_and_entries() -> None:
    signs = probes((50, 8), "rademacher", generator=generator_of(None, 0))
    assert set(signs.flatten().tolist()) == {-1.0, 1.0}
    sphere = probes((50, 8), "sphere", generator=generator_of(None, 0), dtype=F64)
    torch.testing.assert_close(sphere.norm(dim=0), torch.full((8,), 50**0.5, dtype=F64))
    assert probes((1, 3), "sphere", generator=generator_of(None, 0)).abs().eq(1).all()


def test_a_user_stream_of_the_same_seed_is_another_stream() -> None:
    for seed in (0, 1, 12345):
        user = torch.randn(1000, dtype=F64, generator=torch.Generator().manual_seed(seed))
        ours = probes((1000, 1), "gaussian", generator=generator_of(None, seed), dtype=F64)[:, 0]
        correlation = float(user @ ours / (user.norm() * ours.norm()))
        assert abs(correlation) < 5 / 1000**0.5


@pytest.mark.usefixtures("rng_untouched")
def test_generators_from_seeds_and_generators() -> None:
    def draw(**given: object) -> torch.Tensor:
        options = {"generator": None, "seed": None} | given
        return torch.rand(3, generator=generator_of(**options))  # type: ignore[arg-type]

    assert torch.equal(draw(seed=4), draw(seed=4))
    assert not torch.equal(draw(seed=4), draw(seed=5))
    assert torch.equal(draw(), draw(seed=0))
    assert torch.isfinite(draw(seed=-(2**63))).all()
    mine = torch.Generator().manual_seed(9)
    first, second = draw(generator=mine), draw(generator=mine)
    assert not torch.equal(first, second), "calls with one generator are independent"
    again = torch.Generator().manual_seed(9)
    assert torch.equal(first, draw(generator=again)), "a program that seeds it repeats"


def test_errors() -> None:
    with pytest.raises(ValueError, match="pass generator= or seed=, not both"):
        generator_of(torch.Generator(), 1)
    with pytest.raises(TypeError, match=r"generator= is a torch.Generator, got int; use seed="):
        generator_of(3, None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="seed= is an int, got float"):
        generator_of(None, 1.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="seed= is an int, got bool"):
        generator_of(None, True)
    with pytest.raises(ValueError, match="unknown law of probes 'cauchy'; there are rademacher"):
        fill_probes(torch.zeros(1, 2), "cauchy", torch.Generator())


@pytest.mark.gpu
def test_probes_live_where_the_generator_does() -> None:
    W = probes((5, 2), generator=generator_of(torch.Generator().manual_seed(1), None, "cuda"))
    assert W.device.type == "cuda"
