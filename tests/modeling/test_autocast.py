"""Mixed precision changes numbers a little and choices hardly ever."""

import torch

from chorus_moe import ChorusForConditionalGeneration, ExpertBankConfig
from chorus_moe.modeling.moe_routers import SoftmaxRouter
from tests.conftest import tiny_batch, tiny_config


def test_a_router_chooses_the_same_experts_under_autocast():
    bank = ExpertBankConfig(name="common", num_experts=16, num_experts_per_tok=2, intermediate_size=4)
    router = SoftmaxRouter(64, bank)
    torch.manual_seed(0)
    torch.nn.init.normal_(router.weight, std=0.02)
    hidden = torch.randn(10_000, 64)
    expected = router(hidden)[2]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(router(hidden)[2], expected)
        rounded = router(hidden.bfloat16())[2]
    # Only the rounding of the input to 8 bits is left, which turns near ties: 99.66% at worst in three seeds.
    same = (rounded.sort(dim=-1).values == expected.sort(dim=-1).values).all(dim=-1)
    assert same.float().mean() > 0.99


def test_a_training_step_under_autocast_is_near_the_float32_step():
    losses, gradients = [], []
    for enabled in (False, True):
        torch.manual_seed(0)
        config = tiny_config(router_z_loss_coef=0.1, alignment_loss_coef=0.1)
        model = ChorusForConditionalGeneration(config).train()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = model(**tiny_batch(model.config))
        output.loss.backward()
        losses.append(output.loss.float())
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
        assert output.aux_loss.dtype == output.z_loss.dtype == torch.float32
    # bfloat16 keeps 8 bits: worst loss difference seen over three seeds is 2.1e-4.
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=0.005)
    assert torch.cosine_similarity(gradients[0], gradients[1], dim=0) > 0.99


def test_bfloat16_weights_train_and_route_in_float32():
    torch.manual_seed(0)
    model = ChorusForConditionalGeneration(tiny_config()).bfloat16().train()
    output = model(**tiny_batch(model.config), output_router_logits=True)
    output.loss.backward()
    assert all(bank.router_logits.dtype == torch.float32 for layer in output.routing for bank in layer.values())
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
