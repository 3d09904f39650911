"""Interventions against weights put in by hand: every way of weighing, every kind of attention; what a branch adds; nothing left behind."""
import numpy as np
import pytest
import torch
from torch import nn

from msnlan.attention.definition import attention_map
from msnlan.correlation.interventions import WEIGHTINGS, contributions, intervened, layers_named
from msnlan.models.csnln import CrossScaleAttention, InScaleAttention
from msnlan.models.hspan import HSPA
from msnlan.models.layers import PatchAttention
from msnlan.models.mlrn import RegionNonLocal
from msnlan.models.msnlan import Branch
from msnlan.models.panet import PyramidAttention
from test_correlation import SMALL, small

SYSTEMS = list(SMALL)


def by_hand(layer, change, query, keys, values):
    "Attention with `change(weights (H*W, L), grids)` between weighing and the overlap-add, patch by patch"
    keys, values = [list(t) if isinstance(t, (list, tuple)) else [t] for t in (keys, values)]
    H, W = query.shape[-2:]
    s, p, r = values[0].shape[-2]//keys[0].shape[-2], layer.patch, layer.patch//2
    cells = [(y, x) for y in range(H) for x in range(W)]
    weights = attention_map(query, keys, cells, p, layer.softmax_scale, layer.normalize_keys, layer.weighting)[0]
    grids = [tuple(k.shape[-2:]) for k in keys]
    weights = torch.as_tensor(change(weights.numpy(), (H, W), grids), dtype=query.dtype)
    patches = torch.cat([nn.functional.unfold(v, s*p, padding=s*r, stride=s)[0] for v in values], 1)    # (c*sp*sp, L)
    mixed = (patches@weights.T)[None]                                                                   # one patch a query
    return nn.functional.fold(mixed, (s*H, s*W), s*p, padding=s*r, stride=s)/layer.divisor


def largest(k):
    def change(w, shape, grids):
        out = np.zeros_like(w)
        for row, new in zip(w, out): at = np.argsort(-row)[:k]; new[at] = row[at]/row[at].sum()
        return out
    return change


def near(radius):
    "Renormalised softmax within a square window: the same as masking the scores"
    def change(w, shape, grids):
        out = np.zeros_like(w)
        for q, (y, x) in enumerate(np.ndindex(*shape)):
            keep = np.zeros(grids[0], bool)
            for i, j in np.ndindex(*grids[0]):
                top, left = (grids[0][0] - shape[0])/2, (grids[0][1] - shape[1])/2                       # MSNLAN's margins
                keep[i, j] = max(abs(i - top - y), abs(j - left - x)) <= radius
            row = w[q]*keep.ravel(); out[q] = row/row.sum()
        return out
    return change


uniform = lambda w, shape, grids: np.full_like(w, 1/w.shape[1])

def shuffled(w, shape, grids): return w[:, torch.randperm(w.shape[1], generator=torch.Generator().manual_seed(5)).numpy()]


class Tap(nn.Module):
    "A block whose attention is seen from outside"
    def __init__(self, block):
        super().__init__(); self.block, self.seen = block, []
        for m in block.modules():
            if isinstance(m, PatchAttention): m.register_forward_pre_hook(lambda m, args: self.seen.append((m, args)))
            if isinstance(m, PatchAttention): m.register_forward_hook(lambda m, args, out: self.seen.append(out))
    def forward(self, x): return self.block(x)


def blocks():
    torch.manual_seed(3)
    return dict(branch3=Branch(8, 3, softmax_scale=6.), branch5=Branch(8, 5, softmax_scale=6.), pyramid=PyramidAttention(8, levels=3), cross=CrossScaleAttention(8, 2),
                within=InScaleAttention(8), regions=InScaleAttention(8, 2), region=RegionNonLocal(8, 4), high=HSPA(8))


@pytest.mark.parametrize('name', blocks())
@pytest.mark.parametrize('how, options, change', [
    ('uniform', {}, uniform), ('top-k', dict(k=1), largest(1)), ('top-k', dict(k=5), largest(5)), ('shuffled', dict(seed=5), shuffled),
    ('own', {}, lambda w, *_: w)], ids=lambda v: str(v) if isinstance(v, (str, dict)) else '')
def test_weights_put_in_by_hand(name, how, options, change):
    block = Tap(blocks()[name]).eval()
    with torch.no_grad(), intervened(block, 'block', how, **options): block(torch.randn(1, 8, 8, 10, generator=torch.Generator().manual_seed(1)))
    assert len(block.seen) >= 2
    for (layer, args), out in zip(block.seen[::2], block.seen[1::2]):
        want = by_hand(layer, change, *args)
        assert out.shape == want.shape and (out - want).abs().max() < 2e-5*max(1, want.abs().max())


@pytest.mark.parametrize('name', ['branch3', 'branch5', 'within'])
@pytest.mark.parametrize('radius', [1, 3])
def test_local_window_by_hand(name, radius):
    block = Tap(blocks()[name]).eval()
    with torch.no_grad(), intervened(block, weighting='local window', radius=radius): block(torch.randn(1, 8, 8, 10))
    (layer, args), out = block.seen
    want = by_hand(layer, near(radius), *args)
    assert (out - want).abs().max() < 2e-5*max(1, want.abs().max())


def test_random_draws_k_keys_for_each_query():
    block = Tap(blocks()['within']).eval()
    x = torch.randn(1, 8, 6, 7)
    def run(**o):
        block.seen.clear()
        with torch.no_grad(), intervened(block, weighting='random', **o): block(x)
        return block.seen[1]
    values = run(k=1) is not None and block.seen[0][1][2].flatten(2)[0]
    a, b = run(k=1, seed=1), run(k=1, seed=2)
    assert torch.equal(a, run(k=1, seed=1)) and not torch.equal(a, b)
    gaps = (a.flatten(2)[0].T[:, None] - values.T[None]).abs().amax(-1)            # each output is one of the values
    assert gaps.amin(1).max() < 1e-6 and len(set(gaps.argmin(1).tolist())) > 10


def test_a_match_built_by_hand_is_lost():
    "A branch whose best key is the query's own place copies the map; without that key (shuffled) it does not"
    block = InScaleAttention(4).eval()
    with torch.no_grad():
        for e in (block.query, block.key, block.value):
            e.conv.weight.zero_(); e.conv.bias.zero_(); e.act.weight.fill_(1)
            for i in range(min(e.conv.weight.shape[:2])): e.conv.weight[i, i] = 1
        angle = torch.arange(30)*2*torch.pi/30
        x = torch.zeros(1, 4, 5, 6); x[0, 0], x[0, 1] = angle.cos().view(5, 6), angle.sin().view(5, 6)
        block.attention.softmax_scale = 2000.                                     # a query and its own key: the only match
        assert (block(x) - x).abs().max() < 1e-5
        with intervened(block, weighting='top-k', k=1): assert (block(x) - x).abs().max() < 1e-6
        with intervened(block, weighting='uniform'): assert (block(x) - x.mean((2, 3), keepdim=True)).abs().max() < 1e-5
        with intervened(block, weighting='none'): assert block(x).abs().max() == 0
        with intervened(block, weighting='own', temperature=1e9): assert (block(x) - x.mean((2, 3), keepdim=True)).abs().max() < 1e-4
        with intervened(block, weighting='sparsemax'): assert (block(x) - x).abs().max() < 1e-5
        with intervened(block, weighting='shuffled'):
            y = block(x)
        found = (y.flatten(2)[0].T[:, None] - x.flatten(2)[0].T[None]).abs().amax(-1)
        assert found.amin(1).max() < 1e-5 and sorted(found.argmin(1).tolist()) == list(range(30)) and (y - x).abs().max() > .5


@pytest.mark.parametrize('name', SYSTEMS)
def test_every_system_every_way_and_back(name):
    "Outputs are finite and as large as before; afterwards the network gives the same bits; gradients flow"
    net, x = small(name), torch.rand(1, 3, 14, 12)
    for m in net.modules():
        if isinstance(m, RegionNonLocal): nn.init.normal_(m.out.weight, std=.5)   # starts at zero: nothing to intervene in
    with torch.no_grad():
        before, changed = net(x), set()
        for how in WEIGHTINGS:
            with intervened(net, weighting=how, k=2, temperature=1.): y = net(x)
            assert y.shape == before.shape and y.isfinite().all()
            if (y - before).abs().max() > 1e-7: changed.add(how)
            assert torch.equal(net(x), before)
    assert {'none', 'uniform', 'random', 'shuffled', 'top-k', 'local window'} <= changed, changed
    with intervened(net, weighting='top-k', k=3): net(x).sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for n, p in net.named_parameters() if 'value' in n)
    with pytest.raises(RuntimeError, match='stop'):
        with intervened(net, weighting='none'): raise RuntimeError('stop')
    assert not any('forward' in vars(m) for m in layers_named(net).values())


@pytest.mark.parametrize('name', SYSTEMS)
def test_contributions_add_up(name):
    "added is the norm of output with minus output without; where the attention is nothing, it adds nothing"
    net, x = small(name), torch.rand(1, 3, 14, 12)
    found = contributions(net, x)
    assert {c.layer for c in found} == set(layers_named(net)) and all(c.size == (14, 12) for c in found)
    if name == 'mlrn': assert all((c.added == 0).all() and (c.passing > 0).all() for c in found)         # `out` starts at zero
    else: assert all(c.added.max() > 0 and 0 <= c.share.min() <= c.share.max() <= 1 for c in found)
    if name != 'csnln':
        block, hold = found[0].layer.rpartition('.')[0], []
        hook = dict(net.named_modules())[block].register_forward_hook(lambda m, a, y: hold.append((a[0], y)))
        with torch.no_grad(): net(x)
        hook.remove()
        (a, y), module = hold[0], dict(net.named_modules())[block]
        rest = dict(msnlan=lambda: 1.01*a, panet=lambda: module.res_scale*a, hspan=lambda: a, mlrn=lambda: a)[name]()
        norm = lambda t: t.norm(dim=1)[0].detach().numpy()
        for found, want in (found[0].passing, norm(rest)), (found[0].added, norm(y - rest)):
            assert np.abs(found - want).max() <= 1e-5*max(1, norm(rest).max())


# ---- replay -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', SYSTEMS)
def test_a_replay_is_the_network_with_other_weights(name):
    "Digit for digit, for the first, the last and all layers, every way of weighing; nothing before the layer is computed again"
    from msnlan.correlation.outcomes import Replay, result, steps
    net, image = small(name), np.random.default_rng(1).integers(0, 256, (14, 13, 3), dtype=np.uint8)
    replay, layers = Replay(net), [n for n, m in net.named_modules() if isinstance(m, PatchAttention)]
    with replay.running(): plain = result(net, image)
    kept, seen = replay.nbytes, []
    assert (result(net, image) == plain).all() and 0 < kept < 2**24
    for place, how in [(layers[0], dict(weighting='uniform')), (layers[-1], dict(weighting='top-k', k=2)), (None, dict(weighting='none')),
                       (layers[-1], dict(temperature=3.)), (layers[0], dict(weighting='shuffled'))]:
        with intervened(net, place, **how):
            want = result(net, image)
            hooks = [m.conv.register_forward_hook(lambda *_: seen.append(1)) for m in steps(net) if hasattr(m, 'conv')]
            seen.clear()
            with replay.running(): assert (result(net, image) == want).all()
            for h in hooks: h.remove()
            if place == layers[-1] and len(layers) > 1 and name != 'csnln': assert len(seen) <= sum(hasattr(m, 'conv') for m in steps(net))//2
    assert replay.nbytes == kept and not any('forward' in vars(m) for m in net.modules())
    with replay.running(): assert (result(net, image) == plain).all()
    with Replay(net, room=1).running(): assert (result(net, image) == plain).all()


def test_a_counterfactual_of_a_branch_is_fast():
    "msnlan-tiny at 96x96: a replay with other weights takes at most a second of one core for what needs no new scores of all pairs"
    import time
    from msnlan.correlation.outcomes import Replay, result
    from msnlan.models.zoo import load_model
    net, image = load_model('msnlan-tiny-x2'), np.random.default_rng(1).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    replay = Replay(net)
    with replay.running(): result(net, image)
    for how in 'none', 'uniform', 'random', 'local window':
        times = []
        for _ in range(3):
            with intervened(net, 'block.branches.2', how), replay.running():
                start = time.process_time(); result(net, image); times.append(time.process_time() - start)
        assert min(times) < 1, (how, times)
