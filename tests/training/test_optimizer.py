"""Weight decay reaches what OLMo 2 decays, and nothing else; clipping is that of `clip_grad_norm_`."""

import pytest
import torch

from models.decoder import Decoder
from models.initialization import initialize
from tests.models.plain import small
from training.config import OptimizerConfig
from training.optimizer import build_optimizer, clip, gradient_norm, set_lr


@pytest.mark.parametrize("tied", [True, False])
def test_everything_but_the_input_embedding_is_decayed(tied):
    model = Decoder(small(tie_embeddings=tied, depth_kv=True, ffn_kv_proj=True))
    initialize(model, 0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.5))
    set_lr(optimizer, 0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # without a gradient only decay moves a weight: by lr * weight_decay
    for name, parameter in model.named_parameters():
        expected = before[name] * (1.0 if name == "embedding.weight" else 1 - 0.1 * 0.5)
        torch.testing.assert_close(parameter, expected, msg=name)


def test_the_fields_reach_adamw():
    optimizer = build_optimizer(Decoder(small()), OptimizerConfig(lr=0.3, beta1=0.8, beta2=0.7, eps=1e-5))
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.3, (0.8, 0.7), 1e-5)


def stepped(gradient, clipping):
    """Weights after two steps with gradients of this size, whose scale an eps as large as they are lets AdamW see."""
    model = Decoder(small())
    initialize(model, 0)
    optimizer = build_optimizer(model, OptimizerConfig(lr=0.1, eps=1e-3))
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = gradient * torch.randn(parameter.shape, generator=generator)
        clipping(model, optimizer)
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


def by(limit):
    return lambda model, optimizer: clip(optimizer, gradient_norm(optimizer), limit)


@pytest.mark.parametrize("gradient", [1e-4, 1.0])
def test_a_step_takes_the_gradients_that_clip_grad_norm_would_leave(gradient):
    got = stepped(gradient, by(0.5))
    want = stepped(gradient, lambda model, _: torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5))
    unclipped = stepped(gradient, lambda *_: None)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
    assert all(map(torch.equal, got, unclipped)) == (gradient < 1), "below the limit no bit changes, above it much does"
    assert all(map(torch.equal, stepped(gradient, by(0.0)), unclipped)), "a limit of 0 is none"


def test_the_norm_is_that_before_clipping():
    norms = []
    stepped(1.0, lambda model, optimizer: (norms.append(gradient_norm(optimizer)), by(0.5)(model, optimizer)))
    weights = sum(parameter.numel() for parameter in Decoder(small()).parameters())
    assert [norm.item() for norm in norms] == pytest.approx([weights**0.5] * 2, rel=0.02)
