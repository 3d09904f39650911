"""Correlation maps: the authors' attention rows, the places of keys in the picture, repetitions found exactly, pictures of any kind, flat memory."""
import copy, math, resource, time

import numpy as np
import pytest
import torch
from torch import nn

from conftest import ABSENT
from golden_cases import BLOCK_CASES, Attend, build, read
from msnlan.correlation.recording import attention_layers, correlation_maps, record, record_attention
from msnlan.images import to_tensor
from msnlan.models.layers import Embedding, PatchAttention
from msnlan.models import csnln, hspan, mlrn, msnlan, panet
from msnlan.models.zoo import create_model

SMALL = {
    'msnlan': dict(n_feats=16, n_resgroups=2, n_resblocks=1),
    'csnln': dict(n_feats=8, depth=2),
    'panet': dict(n_feats=8, n_resblocks=2, pa_reduction=2),
    'hspan': dict(n_feats=8, n_resgroups=2, n_resblocks=1),
    'mlrn': dict(n_feats=16, n_modules=2, region=9),
}


def small(name, scale=2, seed=0, **more):
    torch.manual_seed(seed)
    return create_model(name, scale=scale, **SMALL[name] | more).eval()


def noise(*shape, seed=0): return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# ---- the authors' numbers --------------------------------------------------------------------------------------

class Given(nn.Module):
    "A block that takes its keys' map as a second input, as a module of one input"
    def __init__(self, inner, s): super().__init__(); self.inner, self.s = inner, s
    def forward(self, x): return self.inner(x, self.s.to(x))


ROWS = [c for c in BLOCK_CASES if 'attn_labels' in read(c)[1]] or [pytest.param('', marks=pytest.mark.skip(reason=ABSENT))]


@pytest.mark.parametrize('case', ROWS)
@pytest.mark.parametrize('together', [False, True], ids=['one by one', 'together'])
def test_rows_of_the_authors(case, together):
    "The weights at the programs' query positions, asked one by one and all at once"
    module, tensors, meta = build(case)
    wanted = {}
    for key in [k for k in tensors if k.startswith('attn.')]:
        *label, at = key[5:].split('.')
        patch = next((int(p[1:]) for p in label if p[0] == 'k'), None)
        batch = next((int(p[1:]) for p in label if p[0] == 'b'), 0)
        wanted.setdefault((patch, batch), []).append((tuple(map(int, at[1:].split('_'))), tensors[key].flatten().numpy()))
    for (patch, batch), rows in wanted.items():
        one = slice(batch, batch + 1)
        block = Given(module, tensors['input_s'][one]) if isinstance(module, Attend) else module
        features = record(block, tensors['input'][one])
        call = next(c for c in features.calls if patch in (None, c.patch))
        points = [p for p, _ in rows]
        found = features.maps(points, call)[0].weights if together else [features.maps([p], call)[0].weights[0] for p in points]
        for row, (_, want) in zip(found, rows):
            assert row.shape == want.shape and np.abs(row - want).max() <= 1e-5
            assert math.isclose(row.sum(), 1, abs_tol=1e-5)


# ---- places: keys that hold their own coordinates ----------------------------------------------------------------

def pass_through(embedding):
    "Make a convolution with PReLU copy its first channels"
    conv = embedding.conv if isinstance(embedding, Embedding) else embedding
    with torch.no_grad():
        conv.weight.zero_(); conv.bias.zero_()
        for i in range(min(conv.weight.shape[:2])): conv.weight[i, i, conv.kernel_size[0]//2, conv.kernel_size[1]//2] = 1
        if embedding is not conv: embedding.act.weight.fill_(1)


def ramp(H, W, channels):
    "A map whose first channels are the row and the column of each pixel's centre"
    x = torch.zeros(1, channels, H, W)
    x[0, 0], x[0, 1] = torch.arange(H)[:, None] + .5, torch.arange(W) + .5
    return x


def keys_know_their_place(call, inner, exact=1e-4):
    "The kept keys, compared with the centres of the cells that are said to hold them, except `inner` cells around"
    for key, grid in zip([k for p in call.parts for k in p.keys], call.keys):
        assert key.shape[-2:] == grid.shape
        rows, columns = grid.centres()
        cut = [slice(inner, n - inner) for n in grid.shape]
        assert np.abs(key[0, 0].numpy() - rows[:, None])[cut[0], cut[1]].max() < exact
        assert np.abs(key[0, 1].numpy() - columns)[cut[0], cut[1]].max() < exact
        assert key[0, 0, cut[0], cut[1]].numel() >= 6


@pytest.mark.parametrize('block, inner', [
    (msnlan.Branch(16, 3), 0), (msnlan.Branch(16, 5), 1), (msnlan.Branch(16, 7), 2), (csnln.InScaleAttention(16), 0),
    (csnln.CrossScaleAttention(16, 2), 0), (csnln.CrossScaleAttention(16, 3), 0), (csnln.CrossScaleAttention(16, 4), 0),
    (panet.PyramidAttention(16), 2), (panet.PyramidAttention(16, legacy_resize=True), 2), (hspan.HSPA(16), 0)],
    ids=['3x3', '5x5', '7x7', 'in-scale', 'cross x2', 'cross x3', 'cross x4', 'pyramid', 'pyramid, old', 'hspan'])
def test_keys_lie_where_said(block, inner):
    H, W = (24, 36) if isinstance(block, csnln.CrossScaleAttention) else (23, 34)
    for name in 'query', 'key', 'key_map':
        if hasattr(block, name): pass_through(getattr(block, name))
    (call,) = record(block, ramp(H, W, 16)).calls
    # PyTorch's bicubic kernel bends a ramp by 0.05 pixels; the two rules for its places differ by 0.8
    keys_know_their_place(call, inner, .1 if call.kind == 'pyramid' else 1e-4)
    y, x = call.query.centres()
    query = call.parts[0].query
    assert np.array_equal(query[0, 0].numpy(), np.broadcast_to(y[:, None], (H, W))) and np.array_equal(query[0, 1, 0].numpy(), x)


@pytest.mark.parametrize('block', [csnln.InScaleAttention(16, regions=3), mlrn.RegionNonLocal(16, region=5)], ids=['csnln', 'mlrn'])
def test_regions_lie_where_said(block):
    for name in 'query', 'key': pass_through(getattr(block, name))
    (call,) = record(block, ramp(13, 16, 16)).calls
    assert call.kind == 'region' and len(call.parts) in (9, 12)
    for part in call.parts:                                            # the first pixel of each region says where it is
        assert part.query[0, :2, 0, 0].tolist() == [part.top + .5, part.left + .5]
        assert part.keys[0][0, :2, -1, -1].tolist() == [part.top + part.query.shape[2] - .5, part.left + part.query.shape[3] - .5]
    for cell in (0, 0), (12, 15), (4, 5), (5, 4), (9, 11):
        weights = call.rows([cell])[0].view(13, 16)
        seen = np.argwhere(weights.numpy() > 0)
        part = next(p for p in call.parts if p.top <= cell[0] < p.top + p.query.shape[2] and p.left <= cell[1] < p.left + p.query.shape[3])
        assert math.isclose(weights.sum().item(), 1, abs_tol=1e-5)
        assert (seen >= (part.top, part.left)).all() and (seen < (part.top + part.query.shape[2], part.left + part.query.shape[3])).all()


class Twice(nn.Module):
    "A stage of CSNLN that enlarges by interpolation"
    def forward(self, x, origin): return nn.functional.interpolate(x, scale_factor=2, mode='bilinear', align_corners=False)


@pytest.mark.parametrize('scale, size', [(2, (21, 26)), (3, (22, 26)), (4, (21, 27))])
def test_a_network_that_extends_the_picture(scale, size):
    "CSNLN's odd pictures get a row or column below and to the right; at scale 4 a second stage works at half pixels"
    net = small('csnln', scale, depth=1)
    for e in net.head: pass_through(e)
    with torch.no_grad(): net.head[0].conv.bias[:3] = -net.entry.bias
    if scale == 4: net.cell.stages[0] = Twice()
    for stage in list(net.cell.stages)[-1:]:
        for e in (stage.project.cross.query, stage.project.cross.key, stage.project.within.query, stage.project.within.key): pass_through(e)
    features = record(net, ramp(*size, 3))
    assert features.size == size and len(features.calls) == 2
    for call, inner in zip(features.calls, (1, 1)):
        keys_know_their_place(Cropped(call, size), inner)
        step = .5 if scale == 4 else 1
        assert (call.query.row_step, call.query.column_step) == (step, step) and call.query.rows*step >= size[0]
    y, x = features.calls[1].query.cell(6.5, 10.5)
    assert (y, x) == ((12, 20) if scale == 4 else (6, 10))
    found = features.maps([(6, 10)], 1)[0]
    assert found.on_picture().shape == (1, *size)


class Cropped:
    "A call without the last cell of each axis, which the repeated border disturbs"
    def __init__(self, call, size):
        (part,), (grid,) = call.parts, call.keys
        rows, columns = [math.floor(n/step) - 1 for n, step in zip(size, (grid.row_step, grid.column_step))]
        self.keys = [type(grid)(rows, columns, grid.top, grid.left, grid.row_step, grid.column_step)]
        self.parts = [type(part)(0, 0, part.query, [part.keys[0][..., :rows, :columns]])]


# ---- repetitions -------------------------------------------------------------------------------------------------

def same_embedding(block):
    "Keys are embedded as queries are, so that an equal patch scores highest"
    block.key.load_state_dict(block.query.state_dict())
    if hasattr(block, 'key_map'): pass_through(block.key_map)


def lit(m, height, width, inner, point=0, share=.999):
    "Pixels of the picture's inside whose key has the weight of the query's own"
    shown = m.on_picture(height, width)[point]
    y, x = m.points[point]
    alike = np.abs(shown/shown[y, x] - 1) < 1 - share
    alike[:inner] = alike[-inner:] = False; alike[:, :inner] = alike[:, -inner:] = False
    return {tuple(map(int, p)) for p in np.argwhere(alike)}


def lattice(query, tile, height, width, inner):
    "Where the query's pixel occurs again in the inside of a picture of repeated tiles"
    return {(y, x) for y in range(inner, height - inner) for x in range(inner, width - inner)
            if (y - query[0]) % tile[0] == 0 and (x - query[1]) % tile[1] == 0}


def sharpen(net, image, query):
    "Scale query embeddings so that scores without normalisation differ by a few units from key to key"
    for call in record(net, image).calls:
        if call.options['normalize_keys'] or call.call: continue
        with torch.no_grad():
            scores = call.rows([query])[0].log()
            owner = net.get_submodule(call.layer.rpartition('.')[0])
            embed = getattr(owner.query, 'conv', owner.query)
            for t in (embed.weight, embed.bias): t *= 3/scores.std().item()


@pytest.mark.parametrize('name, inner, more', [
    ('msnlan', 10, {}), ('hspan', 8, dict(weighting='softmax')), ('csnln', 3, dict(depth=1)), ('panet', 6, dict(levels=1)),
    ('mlrn', 5, dict(region=99, n_modules=1))], ids=lambda v: v if isinstance(v, str) else '')
@pytest.mark.parametrize('query', [(29, 24), (25, 30), (31, 19)], ids=str)
def test_repetitions_in_scale(name, inner, more, query):
    "A tile of 9 x 7 pixels: whatever has the query's weight lies 9 rows or 7 columns apart, nothing else"
    net, tile = small(name, **more), (9, 7)
    H, W = 6*tile[0] + 4, 7*tile[1]
    picture = np.tile(noise(*tile, 3), (7, 7, 1))[:H]
    for block in net.modules():
        if isinstance(block, (msnlan.Branch, panet.PyramidAttention)): same_embedding(block)
    sharpen(net, picture, query)
    maps = record(net, picture).maps([query], slice(0, 3 if name == 'msnlan' else 1))
    assert [m.patch for m in maps] == ([3, 5, 7] if name == 'msnlan' else [3] if name == 'panet' else [1])
    for m in maps:
        assert math.isclose(m.weights.sum(), 1, abs_tol=1e-5)
        again = lattice(query, tile, H, W, inner)
        assert len(again) >= 12 and lit(m, H, W, inner) == again
        if name in ('msnlan', 'panet'):                                # equal patches are the best ones
            shown = m.on_picture()[0]
            assert shown[inner:-inner, inner:-inner].max() <= 1.001*shown[query]


@pytest.mark.parametrize('scale', [2, 3])
def test_repetitions_cross_scale(scale):
    "A 3x3 pattern and its enlargement in every tile: the pattern looks at exactly the enlargements, as boxes"
    tile, at, native = (8*scale, 10*scale), (2*scale, 5*scale), (5*scale + 1, scale + 1)     # corners within the tile
    pattern = noise(3, 3, 3, seed=1)
    one = noise(*tile, 3, seed=2)
    one[at[0]:at[0]+3*scale, at[1]:at[1]+3*scale] = pattern.repeat(scale, 0).repeat(scale, 1)
    one[native[0]:native[0]+3, native[1]:native[1]+3] = pattern
    picture = np.tile(one, (4, 3, 1))
    net = small('csnln', scale, depth=1)
    for e in net.head: pass_through(e)
    same_embedding(net.cell.stages[0].project.cross)
    features = record(net, picture)
    query = tile[0] + native[0] + 1, 2*tile[1] + native[1] + 1
    (m,) = features.maps([query], 1)
    assert m.kind == 'cross-scale' and m.query_box() == (query[0] - 1, query[1] - 1, 3, 3)
    best = m.weights.max()
    boxes = {f.box for f in m.matches(0, 40) if f.weight > .999*best}
    assert boxes == {(a*tile[0] + at[0], b*tile[1] + at[1], 3*scale, 3*scale) for a in range(4) for b in range(3)}
    shown = m.on_picture()[0]                       # a key lights the s x s pixels that it was reduced from
    middle = {(a*tile[0] + at[0] + scale + i, b*tile[1] + at[1] + scale + j) for a in range(4) for b in range(3)
              for i in range(scale) for j in range(scale)}
    assert {tuple(map(int, p)) for p in np.argwhere(shown > .999*best)} == middle


@pytest.mark.parametrize('legacy', [False, True])
def test_repetitions_in_a_pyramid(legacy):
    "What level 4 makes of a place is put into the tile: the query there finds itself and, reduced, the place it came from"
    net = small('panet', legacy_resize=legacy)
    pass_through(net.head)
    with torch.no_grad(): net.before[0].conv2.weight.zero_(); net.before[0].conv2.bias.zero_()
    same_embedding(net.pyramid)
    tile, (g, h), native = (20, 30), (4, 5), (14, 22)          # cells of 5/3 pixels; 12 x 18 of them a tile
    one = torch.rand(3, *tile, generator=torch.Generator().manual_seed(3))
    reduced = panet.reduce(one.repeat(1, 4, 3)[None], 4)[0]
    one[:, native[0]-1:native[0]+2, native[1]-1:native[1]+2] = reduced[:, 12+g-1:12+g+2, 18+h-1:18+h+2]
    features = record(net, one.repeat(1, 4, 3)[None])
    query = tile[0] + native[0], tile[1] + native[1]
    (m,) = features.maps([query])
    assert m.kind == 'pyramid' and len(m.keys) == 5
    found = [f for f in m.matches(0, 60) if f.weight > .999*m.weights.max()]
    assert {f.level for f in found} == {0, 4}
    assert {f.centre for f in found if f.level == 0} == {(20*a + 14.5, 30*b + 22.5) for a in range(4) for b in range(3)}
    want = {(20*a + (g + .5)*5/3, 30*b + (h + .5)*5/3) for a in range(4) for b in range(3)}
    inside = lambda p: 8 < p[0] < 72 and 8 < p[1] < 82
    got = sorted(f.centre for f in found if f.level == 4 and inside(f.centre))
    assert np.allclose(got, sorted(filter(inside, want)), atol=1e-9) and len(got) >= 6
    assert all(math.isclose(f.height, 5 if f.level == 4 else 3) for f in found)


def test_repetitions_with_a_soft_threshold():
    "Sparsemax gives the repetitions equal weight and nearly all others none"
    net, tile = small('hspan'), (9, 7)
    with torch.no_grad():
        for g in net.groups: g.attend.query.conv.weight *= 30
    for g in net.groups: same_embedding(g.attend)
    (m,) = record(net, np.tile(noise(*tile, 3), (6, 6, 1))[:, :40]).maps([(23, 17)], 0)
    assert math.isclose(m.weights.sum(), 1, abs_tol=1e-5) and (m.weights == 0).mean() > .5
    assert m.effective_keys[0] < .5*m.weights.size


# ---- any picture, any network ------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', SMALL)
@pytest.mark.parametrize('shape', [(1, 1, 3), (1, 1), (5, 7), (6, 9, 4), (4, 3, 1), (1, 9, 3)], ids=str)
def test_pictures_of_any_kind(name, shape):
    "1x1, grey and with alpha"
    features = record(small(name), noise(*shape))
    H, W = shape[:2]
    assert features.size == (H, W) and features.image.shape == (H, W, 3) and features.calls
    for m in features.maps([(0, 0), (H - 1, W - 1)]):
        assert np.allclose(m.weights.sum(1), 1, atol=1e-5) and m.on_picture().shape == (2, H, W)
        assert np.isfinite(m.distance).all() and (m.effective_keys >= 1 - 1e-9).all() and m.matches(1)


def test_networks_of_one_colour():
    net = create_model('panet', task='dejpeg', **SMALL['panet'])
    for shape in (6, 5), (6, 5, 3), (6, 5, 4):
        features = record(net, noise(*shape))
        assert features.image.shape == (6, 5) and len(features.maps([(1, 1)])) == 1


def test_no_attention_no_maps():
    assert correlation_maps(small('msnlan', patches=()), noise(5, 6, 3), [(0, 0)]) == []


@pytest.mark.parametrize('name', SMALL)
@pytest.mark.parametrize('scale', [2, pytest.param(3, marks=pytest.mark.slow), 4])
def test_recording_changes_nothing(name, scale):
    "Same bits before and after, no hook left, the same queries and keys as in a whole forward pass"
    net, image = small(name, scale), noise(13, 10, 3)
    state = copy.deepcopy(net.state_dict())
    x = to_tensor(image)
    with torch.no_grad(), record_attention(net) as calls: before = net(x)
    net.train()
    features = record(net, image)
    assert net.training; net.eval()
    with torch.no_grad(): assert torch.equal(net(x), before)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert not any(m._forward_pre_hooks for m in net.modules())
    kept = [(c.layer, p.query, k) for c in features.calls for p in c.parts for k in p.keys]
    seen = [(n, q, k) for n, _, q, keys in calls for k in (keys if isinstance(keys, list) else [keys])]
    assert len(kept) == len(seen)
    for (a, q, k), (b, r, l) in zip(kept, seen): assert a == b and torch.equal(q, r) and torch.equal(k, l)
    assert {c.layer for c in features.calls} == set(attention_layers(net))


def test_hooks_go_when_the_network_fails():
    net = small('panet')
    with pytest.raises(ValueError): record(net, torch.zeros(1, 2, 4, 4))
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_some_layers_only():
    net = small('hspan')
    first = attention_layers(net)[:1]
    features = record(net, noise(6, 7, 3), first)
    assert [c.layer for c in features.calls] == first
    assert features.nbytes < record(net, noise(6, 7, 3)).nbytes


# ---- cost --------------------------------------------------------------------------------------------------------

def resident():
    "Memory of this process now, bytes"
    with open('/proc/self/statm') as f: return int(f.read().split()[1])*resource.getpagesize()


def test_memory_stays_flat():
    "500 rows, of each branch in turn, cost no memory beyond what a few rows needed"
    features = record(small('msnlan'), noise(48, 40, 3))
    ask = lambda n: [len(m.matches()) for i in range(n) for m in features.maps([(i % 48, 7*i % 40)], i % 3)]
    ask(60)
    before = resident()
    ask(500)
    assert resident() - before < 8*2**20, f'{(resident() - before)/2**20:.1f} MB more after 500 rows'


@pytest.mark.slow
@pytest.mark.parametrize('name, config', [('msnlan-tiny', dict(scale=2, pretrained=True)), ('msnlan', dict(scale=4))])
def test_a_click_is_quick(name, config):
    "256 x 256 pixels: the map of one branch, its numbers and patches within 0.3 s, and memory flat over 500 of them"
    features = record(create_model(name, **config), noise(256, 256, 3))
    took, base = [], None
    for i in range(500):
        start = time.perf_counter()
        (m,) = features.maps([(i*31 % 256, i*17 % 256)], i % 3)
        m.on_picture(), m.matches(0, 4), m.effective_keys
        took.append(time.perf_counter() - start)
        if i == 50: base = resident()
    assert np.median(took) < .3
    assert resident() - base < 32*2**20
