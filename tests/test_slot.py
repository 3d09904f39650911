"""One backbone, any attention: equal parameters, equal starts, saved and loaded, trained."""
import pytest, torch
from msnlan.models.slot import ATTENTIONS
from msnlan.models.zoo import create_model, load_model, save_weights


def net(attention, **more):
    torch.manual_seed(5)
    return create_model('slot', attention=attention, n_feats=18, n_resblocks=2, **more)


@pytest.mark.parametrize('attention', ATTENTIONS)
def test_equal_start_round_trip_and_gradient(attention, tmp_path):
    model, none = net(attention), net('none')
    own = {k: v for k, v in model.state_dict().items() if 'slot.second' not in k}
    assert list(own) == list(none.state_dict()) and all(v.equal(own[k]) for k, v in none.state_dict().items())
    x = torch.rand(2, 3, 9, 8)
    loss = model(x).square().mean(); loss.backward()
    learning = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0} == learning
    back = load_model(save_weights(model, tmp_path/'w.safetensors'))
    assert back.config['attention'] == attention and back(x).equal(model.eval()(x))


def test_attentions_differ():
    x = torch.rand(1, 3, 12, 12)
    outs = [net(a, window=4, random=9)(x) for a in ATTENTIONS]
    assert all(not a.allclose(b, atol=1e-7) for i, a in enumerate(outs) for b in outs[:i])
