"""What watch_merges says of a layer, against the layer's gauges, and against experts that are called row by row."""

import pytest
import torch

from megatron_lsh.config.moe import LSHConfig
from megatron_lsh.moe.experts import Feed
from megatron_lsh.moe.merges import watch_merges
from tests.moe.test_dispatchers import make_layer, single, tokens


def watched(residual: str, **settings):
    """A layer of some residual, its tokens [T, D], its telemetry, and what it merged at a rate of 0.3."""
    lsh = LSHConfig(lsh_target_rate="0.3", lsh_residual=residual, lsh_probe_interval=1, **settings)
    layer, telemetry = make_layer(single(), "lsh", lsh)
    layer.set_iteration(0)
    with torch.no_grad(), watch_merges(layer) as found:
        layer(tokens(0, requires_grad=False))
    (merges,) = found
    return layer, tokens(0, requires_grad=False).flatten(0, 1), telemetry, merges


@pytest.mark.parametrize("residual", ["interpolate", "none", "identity"])
def test_errors_and_energies_add_up_to_the_layers_own_gauges(residual: str) -> None:
    _, _, telemetry, merges = watched(residual)
    (report,) = telemetry.collect(single(), iterations=1)
    assert float(merges.error_N.sum() / merges.output_N.sum()) == pytest.approx(report["lsh_restored_error"], rel=1e-4)
    assert float(merges.missed_N.sum() / merges.energy_N.sum()) == pytest.approx(
        report["lsh_residual_energy"], rel=1e-4
    )
    assert len(merges.sent_C) / len(merges.token_N) == pytest.approx(report["lsh_compression_rate"])
    assert merges.layer == 3 and merges.sends_rows == (residual == "interpolate")


@pytest.mark.parametrize("residual", ["none", "identity"])
def test_every_row_against_its_expert_called_alone(residual: str) -> None:
    """y = E(mean of the cluster) (+ x - mean), for each row by itself."""
    layer, x_TD, _, merges = watched(residual)
    routing = layer.router(x_TD, None, 1, {})
    chosen = {(token, expert) for token, row in enumerate(routing.expert_ids_TK.tolist()) for expert in row}
    assert {*zip(merges.token_N.tolist(), merges.expert_N.tolist(), strict=True)} == chosen

    @torch.no_grad()
    def expert(number: int, row_D: torch.Tensor) -> torch.Tensor:
        counts = [0] * merges.num_experts
        counts[number] = 1
        return layer.experts(Feed(row_D[None], counts))[0].double()

    for row, (token, number, cluster) in enumerate(
        zip(*(t.tolist() for t in (merges.token_N, merges.expert_N, merges.cluster_N)), strict=True)
    ):
        mates = (merges.cluster_N == cluster).nonzero().squeeze(1)
        assert set(merges.expert_N[mates].tolist()) == {number}, "rows of different experts never travel as one"
        rows_MD = x_TD[merges.token_N[mates]]
        mean_D = rows_MD.mean(0)
        exact_D = expert(number, x_TD[token])
        restored_D = expert(number, mean_D) + (x_TD[token] - mean_D if residual == "identity" else 0)
        assert float(merges.error_N[row]) == pytest.approx(
            float((restored_D - exact_D).square().sum()), rel=1e-3, abs=1e-9
        )
        assert float(merges.output_N[row]) == pytest.approx(float(exact_D.square().sum()), rel=1e-4)
        assert float(merges.missed_N[row]) == pytest.approx(
            float((x_TD[token] - mean_D).square().sum()), rel=1e-3, abs=1e-9
        )
        # Two rows are equally near to their mean: the first one travels, whatever rounding says.
        nearest = mates[0 if len(mates) == 2 else (rows_MD - mean_D).square().sum(1).argmin()]
        assert int(merges.sent_C[cluster]) == int(nearest)


def test_a_row_that_is_sent_misses_nothing() -> None:
    _, _, _, merges = watched("interpolate")
    assert torch.equal(merges.cluster_N[merges.sent_C], torch.arange(len(merges.sent_C)))
    assert (merges.missed_N[merges.sent_C] == 0).all() and (merges.missed_N > 0).any()


def test_layers_merge_whatever_their_schedule_says_and_only_while_they_are_watched() -> None:
    lsh, x = LSHConfig(lsh_target_rate="0.3", lsh_warmup_iters=10), tokens(0, requires_grad=False)
    layer, _ = make_layer(single(), "lsh", lsh)
    layer.set_iteration(0)
    before = layer(x)[0]
    with watch_merges(layer) as found:
        merged = layer(x)[0]
    assert len(found) == 1 and not torch.equal(before, merged)
    assert torch.equal(layer(x)[0], before) and len(found) == 1
    with watch_merges(layer, start_layer=4) as found:
        assert torch.equal(layer(x)[0], before) and not found, "--lsh-start-layer is after it"
    exact, _ = make_layer(single(), "alltoall")
    with watch_merges(exact) as found:
        exact(x)
    assert not found
