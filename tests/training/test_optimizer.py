"""Weight decay reaches what OLMo 2 decays, and nothing else."""

import pytest
import torch

from models.decoder import Decoder
from models.initialization import initialize
from tests.models.plain import small
from training.config import OptimizerConfig
from training.optimizer import build_optimizer, set_lr


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
