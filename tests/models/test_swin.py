"""Swin against Hugging Face's, Swin-MoE against a loop over experts and over layouts, and what each setting changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_lsh.config.swin import SwinConfig
from megatron_lsh.convert.swin_names import to_huggingface, to_microsoft
from megatron_lsh.errors import CheckpointError
from megatron_lsh.models.position_bias import resized_table
from megatron_lsh.models.swin import DropPath, SwinModel, swin_stacks
from megatron_lsh.moe.layer import MoELayer
from megatron_lsh.parallel.data_parallel import finalize_gradients, shard_model
from megatron_lsh.parallel.initialize import initialize
from megatron_lsh.parallel.testing import run_distributed_test
from megatron_lsh.training.optimizer import parameter_groups
from tests.models.model_helpers import full_gradients, randomize
from tests.models.swin_helpers import MOE, make_pictures, make_swin, swin_config


def huggingface_logits(model: SwinModel, cfg: SwinConfig, images: Tensor) -> Tensor:
    """Of Hugging Face's model with the same weights; its tables hold what our position networks compute."""
    transformers = pytest.importorskip("transformers")
    theirs = to_microsoft(model.state_dict(), lambda stage: cfg.heads()[stage])
    for stage, part in model.stages.items():
        for number, block in part.layers.items():
            name = f"layers.{stage}.blocks.{number}.attn."
            theirs = {key: value for key, value in theirs.items() if not key.startswith(name + "cpb_mlp")}
            theirs[name + "relative_position_bias_table"] = block.position_bias.table().detach()
    config = transformers.SwinConfig(
        image_size=cfg.swin.img_h, patch_size=cfg.swin.patch_dim, embed_dim=cfg.model.hidden_size, num_labels=10,
        depths=cfg.swin.swin_depths, num_heads=cfg.heads(), window_size=cfg.swin.swin_window_size,
    )  # fmt: skip
    reference = transformers.SwinForImageClassification(config).eval()
    weights = _names_in_memory(to_huggingface(theirs), reference)
    reference.load_state_dict(weights, strict=False)
    assert set(weights) <= set(reference.state_dict())
    with torch.no_grad():
        logits: Tensor = reference((images / 255.0 - model.mean) / model.std).logits
    return logits


def _names_in_memory(weights: dict[str, Tensor], reference: nn.Module) -> dict[str, Tensor]:
    """Newer transformers name some modules otherwise in memory than in files."""
    if any("attention.self.query" in name for name in reference.state_dict()):
        return weights
    pairs = {
        "attention.self.query": "attention.q_proj", "attention.self.key": "attention.k_proj",
        "attention.self.value": "attention.v_proj", "attention.output.dense": "attention.o_proj",
        "attention.self.relative_position_bias_table": "attention.relative_position_bias.relative_position_bias_table",
        "intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2",
    }  # fmt: skip
    renamed = {}
    for name, value in weights.items():
        for theirs, memory in pairs.items():
            name = name.replace(theirs, memory)
        renamed[name] = value
    return renamed


@pytest.mark.parametrize(("side", "window"), [(64, 4), (64, 8), (56, 6), (52, 4)])
def test_a_dense_swin_is_huggingfaces(side: int, window: int) -> None:
    """The last two sizes do not divide into windows."""
    flags = f"--img-h {side} --swin-depths 2 2 2 --hidden-size 24 --swin-window-size {window} --init-method-std 0.2"
    cfg = swin_config(flags)
    model = randomize(make_swin(cfg)).eval()
    images, _ = make_pictures(cfg, 3)
    with torch.no_grad():
        logits, aux_loss = model(images)
    torch.testing.assert_close(logits, huggingface_logits(model, cfg, images), rtol=0, atol=1e-5)
    assert aux_loss == 0 and logits.std() > 0.1


def test_odd_sides_are_filled_up_and_every_pixel_counts() -> None:
    cfg = swin_config("--img-h 11 --img-w 9 --swin-depths 2 1 1 --swin-window-size 3 --init-method-std 0.2")
    assert [stack.seq_length for stack in swin_stacks(cfg)] == [30, 9, 4]
    model = make_swin(cfg).eval()
    images = make_pictures(cfg, 1)[0].float().div(255).requires_grad_()
    model(images)[0].square().sum().backward()
    assert images.grad is not None and (images.grad.abs().sum(1) > 0).all()


class LoopedExperts(nn.Module):
    """Every token through its experts, one expert after the other."""

    def __init__(self, layer: MoELayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        routing, experts = self.layer.router(x_TD), self.layer.experts
        y_TD = torch.zeros_like(x_TD)
        for expert in range(4):
            chosen = routing.expert_ids_TK[:, 0] == expert
            hidden = F.gelu(F.linear(x_TD, experts.linear_fc1.weight[expert], experts.linear_fc1.bias[expert]))
            out = F.linear(hidden, experts.linear_fc2.weight[expert], experts.linear_fc2.bias[expert])
            y_TD = y_TD + torch.where(chosen[:, None], out * routing.probs_TK[:, :1], 0.0)
        return y_TD, routing.aux_loss


def test_experts_are_a_loop() -> None:
    cfg = swin_config(MOE + "--init-method-std 0.3 --moe-layer-freq [1]*4")
    model = make_swin(cfg)
    layers = model.moe_layers()
    assert [layer.router.weight.shape[1] for layer in layers] == [16, 16, 32, 32]
    generator = torch.Generator().manual_seed(1)  # not whatever the tests before left
    for layer in layers:
        x_SBD = torch.randn(6, 2, layer.router.weight.shape[1], generator=generator)
        y_SBD, aux_loss = layer(x_SBD)
        expected, expected_loss = LoopedExperts(layer)(x_SBD.flatten(0, 1))
        torch.testing.assert_close(y_SBD.flatten(0, 1), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(aux_loss, expected_loss)


def test_experts_are_in_the_odd_blocks_of_the_last_two_stages() -> None:
    stacks = swin_stacks(swin_config(MOE + "--swin-depths 2 2 6 3"))
    assert [stack.moe_pattern() for stack in stacks] == [
        [False] * 2,
        [False] * 2,
        [False, True] * 3,
        [False, True, False],
    ]
    assert [stack.cfg.moe.moe_ffn_hidden_size for stack in stacks] == [64, 128, 256, 512]
    assert [stack.shape.heads for stack in stacks] == [2, 4, 8, 16]
    chosen = swin_stacks(swin_config(MOE + "--moe-layer-freq [1,0]+[0,0]"))
    assert [stack.moe_pattern() for stack in chosen] == [[True, False], [False, False]]


def test_blank_pictures_are_seen_by_no_expert_and_change_no_other() -> None:
    cfg = swin_config(MOE + "--moe-expert-capacity-factor 1.0 --eval-capacity --init-method-std 0.3")
    model = make_swin(cfg).eval()
    images, _ = make_pictures(cfg, 3)
    with torch.no_grad():
        alone, _ = model(images[:1])
        filled, _ = model(images, torch.tensor([True, False, False]))
    torch.testing.assert_close(filled[0], alone[0])


def forward_backward(model: SwinModel, cfg: SwinConfig, seeds: list[int]) -> tuple[float, dict[str, Tensor]]:
    total = 0.0
    for seed in seeds:
        images, labels = make_pictures(cfg, 4, seed)
        logits, aux_loss = model(images)
        loss = F.cross_entropy(logits, labels)
        ((loss + aux_loss) / len(seeds)).backward()
        total += loss.item() / len(seeds)
    finalize_gradients(model, model.ctx)
    return total, full_gradients(model)


LAYOUTS = (
    {"expert_model_parallel_size": 2},
    {},
    {"expert_model_parallel_size": 2, "use_distributed_optimizer": True},
)


DISPATCHERS = ("alltoall", "lsh")


def two_ranks() -> dict[tuple[str, int], tuple[float, dict[str, Tensor]]]:
    """This rank's loss and the gradients, for each dispatcher and layout."""
    found = {}
    for dispatcher in DISPATCHERS:
        for number, layout in enumerate(LAYOUTS if dispatcher == "alltoall" else LAYOUTS[:1]):
            cfg = swin_config(
                f"{MOE} --moe-token-dispatcher-type {dispatcher} --lsh-target-rate 1 --init-method-std 0.1", 2
            )
            for name, value in layout.items():
                setattr(cfg.parallel, name, value)
            ctx = initialize(cfg.parallel, moe=True)
            model = make_swin(cfg, ctx)
            shard_model(model, ctx, cfg.precision)
            found[dispatcher, number] = forward_backward(model, cfg, [ctx.dp.rank])
    return found


def test_two_ranks_with_spread_or_copied_experts_are_one() -> None:
    """EP 2, DP 2, and both with a sharded optimizer; exact and by an LSH of one row per cluster."""
    cfg = swin_config(MOE + "--init-method-std 0.1")
    loss, grads = forward_backward(make_swin(cfg), cfg, [0, 1])
    floor = 1e-4 * torch.stack([grad.norm() for grad in grads.values()]).norm()
    first, second = run_distributed_test(two_ranks, 2)
    assert len(first) == len(LAYOUTS) + 1
    for case, (own_loss, own_grads) in first.items():
        torch.testing.assert_close((own_loss + second[case][0]) / 2, loss, rtol=1e-5, atol=0)
        for name, grad in grads.items():
            error = (own_grads[name] - grad).norm() / (grad.norm() + floor)
            assert error < 1e-4, f"{case}, {name}: {error:.1e}"


@pytest.mark.parametrize(
    "flags", ["full --recompute-num-layers 2", "selective --recompute-modules core_attn moe mlp layernorm"]
)
def test_recomputation_changes_nothing(flags: str) -> None:
    noisy = MOE + "--moe-router-gate-noise 1.0 --moe-expert-dropout 0.2 --drop-path-rate 0.3 --init-method-std 0.1 "
    results = []
    for recompute in ("", f"--recompute-granularity {flags}"):
        cfg = swin_config(noisy + recompute)
        model = make_swin(cfg)
        torch.manual_seed(0)
        results.append(forward_backward(model, cfg, [0]))
    assert results[0][0] == results[1][0]
    for name, grad in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], grad, rtol=1e-6, atol=1e-8)


def test_weight_decay_leaves_out_what_the_published_recipe_does() -> None:
    cfg = swin_config(MOE + "--moe-router-type cosine")
    model = make_swin(cfg)
    names = {id(param): name for name, param in model.named_parameters()}
    decays = {names[id(p)]: group["decay"] for group in parameter_groups(model) for p in group["params"]}
    expected = {
        name: not (param.ndim == 1 or name.endswith(".bias") or ".position_bias." in name or ".router.gate." in name)
        for name, param in model.named_parameters()
    }
    assert decays == expected and any(decays.values())
    linear = make_swin(swin_config(MOE))
    routers = [p for name, p in linear.named_parameters() if name.endswith("router.weight")]
    kept = {id(p) for group in parameter_groups(linear) if group["decay"] for p in group["params"]}
    assert routers and all(id(p) in kept for p in routers)


def test_drop_path_sets_samples_to_zero_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    path = DropPath(0.3)
    y_SBD = path(torch.ones(2, 4000, 3))
    dropped = (y_SBD == 0).all(-1).all(0)
    assert torch.equal(dropped, (y_SBD == 0).any(-1).any(0))
    assert 0.27 < dropped.float().mean() < 0.33
    torch.testing.assert_close(y_SBD[:, ~dropped], torch.full_like(y_SBD[:, ~dropped], 1 / 0.7))
    assert torch.equal(path.eval()(y_SBD), y_SBD)


def test_frozen_experts_and_routers_have_no_gradient() -> None:
    model = make_swin(swin_config(MOE + "--freeze-experts"))
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert (
        frozen == {name for name, _ in model.named_parameters() if ".experts." in name or ".router." in name} and frozen
    )


def test_a_table_of_another_window_is_interpolated() -> None:
    heads = 2
    rows = torch.arange(7.0)
    table = torch.stack([rows[:, None] * 0.5 + rows, rows[:, None] - rows * 0.25], -1).flatten(0, 1)
    assert torch.equal(resized_table(table, table.shape), table)
    wide = resized_table(table, torch.Size((15 * 15, heads))).unflatten(0, (15, 15))
    assert wide.shape == (15, 15, heads)
    middle = wide[5:10, 5:10]  # a plane stays one, away from its edges
    slope = middle[1:] - middle[:-1]
    torch.testing.assert_close(slope, torch.tensor([0.5, 1.0]).expand_as(slope) * 7 / 15, rtol=0, atol=0.04)
    for shape in ((15 * 15, 3), (15 * 14, heads)):
        with pytest.raises(CheckpointError, match=r"shape \(49, 2\) cannot be resized"):
            resized_table(table, torch.Size(shape))


def test_settings_reach_the_blocks() -> None:
    cfg: Any = swin_config(MOE + "--swin-position-bias table --disable-bias-fc2 --swin-depths 2 2 --drop-path-rate 0.3")
    model = make_swin(cfg)
    names = set(dict(model.named_parameters()))
    assert "stages.0.layers.0.position_bias.weight" in names and not any("fc1_weight" in name for name in names)
    assert not any(name.endswith("linear_fc2.bias") for name in names)
    blocks = [block for stage in model.stages.values() for block in stage.layers.values()]
    assert [round(block.drop_path.rate, 3) for block in blocks] == [0.0, 0.1, 0.2, 0.3]
    assert [block.windows.shift for block in blocks] == [0, 2, 0, 0]
    rates = swin_config(MOE + "--moe-token-dispatcher-type lsh --lsh-target-rate [0.5,0.25]").lsh.rates()
    assert [rates.at(block, 0) for block in range(4)] == [0.5, 0.5, 0.25, 0.25]  # one per stage
