"""What every network of the zoo must do, whoever wrote it: `test_zoo` asks it of the five, `test_sixth` of a newcomer."""
import json

import pytest
import torch

from msnlan.models.zoo import create_model, load_model, save_weights


def any_size(net):
    "Every size from one pixel up; finite; a batch is its pictures one by one"
    net.eval()
    for h, w in [(1, 1), (1, 7), (2, 1), (5, 9), (8, 6)]:
        x = torch.rand(1, net.n_colors, h, w)
        with torch.no_grad(): y = net(x)
        assert y.shape == (1, net.n_colors, net.scale*h, net.scale*w) and y.isfinite().all()
        if (h, w) == (5, 9):
            with torch.no_grad(): two = net(torch.cat([x, x.flip(3)]))
            assert (two[:1] - y).abs().max() < 1e-5


def finite_gradients(net):
    "On pictures of one colour too"
    for level in 0., 0.5:
        net.zero_grad(); net(torch.full((1, net.n_colors, 6, 6), level)).square().sum().backward()
        assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)


def bad_values_are_refused(name):
    "Unknown keywords and bad values, with the accepted ones in the message"
    with pytest.raises(ValueError, match='does not know n_feat; it accepts scale'): create_model(name, n_feat=8)
    with pytest.raises(ValueError, match='scale is 7; expected one of 2, 3, 4'): create_model(name, scale=7)
    with pytest.raises(ValueError, match='n_feats'): create_model(name, n_feats='64')
    with pytest.raises(ValueError, match='rgb_range is -1'): create_model(name, rgb_range=-1)
    with pytest.raises(ValueError, match='n_colors is 2; expected one of 1, 3'): create_model(name, n_colors=2)


def config_makes_it_again(net):
    "The configuration is plain data, and enough"
    assert json.loads(json.dumps(net.config)) == net.config
    assert create_model(net.system, **net.config).config == net.config


def same_weights(net, back):
    assert back.config == net.config and not back.training
    assert all(torch.equal(v, back.state_dict()[k]) for k, v in net.state_dict().items())


def weights_come_back(net, folder):
    "Saved and loaded bit by bit, with the configuration"
    for p in net.parameters():
        if p.requires_grad: p.data.uniform_(-0.1, 0.1)
    same_weights(net, load_model(save_weights(net, folder/'own.safetensors')))
