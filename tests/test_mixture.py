"""Mixture and Jacobian: what an output pixel is made of is the derivative of the attention's output by its values, in every system; raw maps as files."""
from collections import defaultdict

import numpy as np
import pytest
import torch

from msnlan.correlation.recording import record
from msnlan.models.layers import PatchAttention
from test_correlation import SMALL, noise, small


def taken(net, image):
    "The arguments of every attention layer's calls, by name, and the features"
    taps = defaultdict(list)
    hooks = [m.register_forward_pre_hook(lambda m, args, n=n: taps[n].append((m, args))) for n, m in net.named_modules() if isinstance(m, PatchAttention)]
    x = torch.from_numpy(image).permute(2, 0, 1)[None].to(next(net.parameters()).dtype)/255
    with torch.no_grad(): net(x)
    for h in hooks: h.remove()
    return taps, record(net, image)


@pytest.mark.parametrize('name', SMALL)
@pytest.mark.parametrize('point', [(0, 0), (6, 5), (13, 11), (9, 0)])
def test_mixture_is_the_jacobian_of_output_to_values(name, point):
    net, image = small(name).double(), noise(14, 12, 3)                     # in doubles: MSNLAN's scores are large
    taps, features = taken(net, image)
    assert features.calls and {c.layer for c in features.calls} == set(taps)
    for call in features.calls:
        (m,) = features.maps([point], call, quantity='mixture')
        parts = [taps[call.layer].pop(0) for _ in call.parts]
        row, column = m.cells[0]
        wanted = [np.zeros(k.shape) for k in call.keys]
        for part, (layer, (query, keys, values)) in zip(call.parts, parts):
            y, x = row - part.top, column - part.left
            if not (0 <= y < query.shape[-2] and 0 <= x < query.shape[-1]): continue
            several = isinstance(values, (list, tuple))
            values = [v.detach().requires_grad_() for v in (values if several else [values])]
            keys_ = keys if several else [keys]
            s = values[0].shape[-2]//keys_[0].shape[-2]
            out = layer(query, keys, values if several else values[0])
            a, b = s - 1, 0                                                         # a place within the s x s cell
            found = torch.autograd.grad(out[0, 1, s*y + a, s*x + b], values)
            for level, g in enumerate(found):
                g = g[0].numpy().copy()
                own = g[1, a::s, b::s].copy(); g[1, a::s, b::s] = 0
                assert not g.any(), 'one channel and one place of a cell are made of their own alone'
                h, w = own.shape
                wanted[level][part.top:part.top + h, part.left:part.left + w] = own
        assert sum(w.sum() for w in wanted) > .1
        for got, want in zip(m.levels, wanted): assert np.abs(got[0] - want).max() <= 1e-5
        assert m.quantity == 'mixture' and m.query_box()[2:] == (call.query.row_step, call.query.column_step)


def test_of_one_pixel_patches_match_and_mixture_are_one():
    features = record(small('hspan'), noise(10, 9, 3))
    for call in features.calls:
        (match,), (mixture,) = [features.maps([(4, 5)], call, quantity=q) for q in ('match', 'mixture')]
        assert np.abs(match.weights - mixture.weights).max() <= 1e-7


def test_a_box_of_queries_and_its_file(tmp_path):
    features = record(small('panet'), noise(12, 13, 3))
    points = features.points_in((2, 3, 3, 4))
    assert len(points) == 12 and points[0] == (2, 3) and points[-1] == (4, 6)
    (m,) = features.maps(points, 0)
    for i in (0, 7): assert np.abs(m.weights[i] - features.maps([points[i]], 0)[0].weights[0]).max() < 1e-6
    saved = np.load(m.save(tmp_path/'map.npz'))
    assert saved['points'].tolist() == [list(p) for p in points] and str(saved['layer']) == m.layer and str(saved['quantity']) == 'match'
    for i, (level, grid) in enumerate(zip(m.levels, m.keys)):
        assert np.array_equal(saved[f'weights_{i}'], level) and level.shape == (12, *grid.shape)
        assert np.array_equal(saved[f'rows_{i}'], grid.centres()[0]) and len(saved[f'columns_{i}']) == grid.columns
    assert saved['query_boxes'][0].tolist() == list(m.query_box(0))
    with pytest.raises(ValueError, match='at least one pixel'): features.points_in((0, 0, 0, 3))
    with pytest.raises(ValueError, match='must lie in the picture'): features.points_in((10, 0, 3, 3))
    with pytest.raises(ValueError, match='expected one of match, mixture'): features.maps([(0, 0)], 0, quantity='mean')


def test_numbers_are_possible():
    "Never more effective keys than keys; a region's query reaches its region; padding is counted as such"
    for name in SMALL:
        features = record(small(name), noise(20, 22, 3))
        for quantity in 'match', 'mixture':
            for m in features.maps([(0, 0), (19, 21), (9, 9)], quantity=quantity):
                assert (m.effective_keys <= m.compared).all() and (m.effective_keys >= 1).all()
                assert (m.entropy <= np.log(m.compared) + 1e-9).all() and (m.distance <= 40).all()
    (m,) = record(small('mlrn'), noise(20, 22, 3)).maps([(0, 0), (19, 21)], 0)
    assert m.compared.tolist() == [81, 2*4] and m.weights.shape[1] == 440          # regions of 9
    beside = [m.beside for m in record(small('msnlan'), noise(20, 22, 3)).maps([(0, 0)])]
    assert beside == [0, 22*24 - 440, 24*26 - 440]
