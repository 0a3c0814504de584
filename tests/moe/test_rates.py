"""Rates that follow the residual energy: what a layer sees, what ranks add up, what they do with it."""

import random

import torch

from megatron_lsh.config.moe import LSHConfig
from megatron_lsh.config.rates import Rates
from megatron_lsh.moe.compressors.lsh import ClusterByHash
from megatron_lsh.moe.rates import FollowedRate, LayerRates
from tests.moe.test_dispatchers import make_layer, run, single, tokens

FOLLOWING = Rates.of("0.5").following(0.1, 0.05)
CPU = torch.device("cpu")


def seen(rows: int, missed: float, total: float) -> FollowedRate:
    """In two micro-batches."""
    followed = FollowedRate(0, 0.5)
    followed.see(rows // 2, torch.tensor(missed / 2), torch.tensor(total / 2))
    followed.see(rows - rows // 2, torch.tensor(missed / 2), torch.tensor(total / 2))
    return followed


def test_what_ranks_add_does_not_depend_on_their_order() -> None:
    """They are whole numbers, and few enough of them for ten thousand ranks of ten million rows."""
    random.seed(1)
    ranks = [seen(random.randrange(10**6), random.random() * 3, 3.3).take(CPU).tolist() for _ in range(300)]
    sums = set()
    for _ in range(20):
        random.shuffle(ranks)
        sums.add((sum(missed for missed, _ in ranks), sum(rows for _, rows in ranks)))
    assert len(sums) == 1 and all(number.is_integer() for rank in ranks for number in rank)
    assert 10**4 * 10**7 * 2**16 < 2**53


def test_energies_are_weighted_by_rows_and_what_is_not_finite_does_not_count() -> None:
    rates = LayerRates(FOLLOWING, 3, [])
    parts = [
        seen(100, 0.01, 1.0),
        seen(300, 0.03, 1.0),
        seen(50, float("nan"), 1.0),
        FollowedRate(0, 0.5),
        seen(9, 0, 0),
    ]
    missed, rows = torch.stack([part.take(CPU) for part in parts]).sum(0).tolist()
    assert rows == 400
    rates.move([0, 0, missed, rows, 0, 0], 1)
    energy = (int(0.01 * 65536) * 100 + int(0.03 * 65536) * 300) / 400 / 65536
    assert rates.of_layer == [0.5, FOLLOWING.followed(1, 1, 0.5, energy), 0.5] and rates.of_layer[1] < 0.5


def test_a_layer_sends_what_its_rate_follows_to() -> None:
    """What it sees is what the gauge says; evaluations are not seen. Another layer goes on with saved rates."""
    lsh = LSHConfig(lsh_target_rate="0.5", lsh_target_energy=0.9, lsh_least_rate=0.2)

    def made() -> tuple:
        layer, telemetry = make_layer(single(), "lsh", lsh)
        held = [module.followed for module in layer.modules() if isinstance(module, ClusterByHash)]
        return layer, telemetry, LayerRates(lsh.rates(), 4, held)

    (layer, telemetry, rates), x, sent = made(), tokens(0), []
    for iteration in range(20):
        layer.set_iteration(iteration)
        run(layer, x)
        (report,) = telemetry.collect(single(), iterations=1)
        layer.eval()
        with torch.no_grad(), telemetry.paused():
            layer(3 * x)
        layer.train()
        told = rates.seen(CPU)
        assert not told[:6].any() and told[7] == 48
        assert abs(float(told[6]) / 48 / 65536 - report["lsh_residual_energy"]) < 2**-15
        rates.move(told.tolist(), iteration + 1)
        sent.append(report["lsh_compression_rate"])
    assert sent[0] > 0.5 and sent[-1] < 0.45 and 0.2 <= rates.of_layer[3] < 0.35
    other, _, again = made()
    again.load_state_dict(rates.state_dict(), 20)
    for each in (layer, other):
        each.set_iteration(20)
    assert torch.equal(run(layer, x)["y"], run(other, x)["y"])
    again.load_state_dict({"3": 0.9}, 20)
    assert again.of_layer[3] == 0.5  # within today's bounds
