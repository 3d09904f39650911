"""A sixth network, written as a user would, in a file of its own: everything that the five can do works, and no room knows its name."""
import importlib, sys

import numpy as np
import pandas as pd
import pytest
import torch

import conformance
from msnlan.correlation.explorer import SUFFIX, Explorer, model_names
from msnlan.correlation.figures import figure_set
from msnlan.correlation.interventions import contributions
from msnlan.correlation.recording import correlation_maps, record
from msnlan.data.patches import Picture
from msnlan.evaluation.scores import evaluate
from msnlan.evaluation.tables import means, score_table, write_table
from msnlan.inference import chop_tiles, upscale
from msnlan.models import zoo
from msnlan.models.checkpoints import to_authors
from msnlan.models.names import AUTHORS
from msnlan.training.budget import step_budget
from msnlan.training.recipes import TrainConfig

MODULE = '''
"""Bilinear enlargement, corrected by an attention to the map at half size"""
import torch.nn.functional as F
from torch import nn
from msnlan.models.layers import MeanShift, Network, PatchAttention, Embedding, Upsampler, conv, whole
from msnlan.models.names import AUTHORS, upsampler_scale
from msnlan.models.zoo import register

class Half(nn.Module):
    "x + attention to the map at half size; (N, C, H, W) to the same"
    def __init__(self, n_feats):
        super().__init__()
        self.query, self.key, self.value = [Embedding(n_feats, n_feats) for _ in range(3)]
        self.attention = PatchAttention(3, divisor=9.)

    def forward(self, x):
        small = F.avg_pool2d(x, 2, ceil_mode=True)
        return x + self.attention(self.query(x), self.key(small), self.value(small))

    def keys_at(self, start, step, queries, keys, level): return start, 2*step

@register
class Sixth(Network):
    "Half a map is enough; an example"
    system, rounds = 'sixth', 1
    variants = {'sixth-tiny': dict(n_feats=4)}
    preview = toy = dict(n_feats=6)
    marks = ('theirs',)

    def __init__(self,
        scale:int=2,         # 2, 3 or 4
        n_feats:int=8,       # channels
        rgb_range:float=1,   # largest value inside
        n_colors:int=3,      # 1 or 3
    ):
        super().__init__(dict(scale=scale, n_feats=n_feats, rgb_range=rgb_range, n_colors=n_colors))
        self.entry, self.exit = [MeanShift(sign, rgb_range, n_colors=n_colors) for sign in (-1, 1)]
        self.head, self.block = conv(n_colors, whole('n_feats', n_feats)), Half(n_feats)
        self.upsampler, self.tail = Upsampler(self.scale, n_feats), conv(n_feats, n_colors)

    @staticmethod
    def tile_area(scale, task='sr'): return 500

    @staticmethod
    def infer(state): return dict(scale=upsampler_scale(state, 'theirs.up.'), n_feats=len(state['theirs.head.bias']))

    def features(self, x): return self.exit(self.tail(self.upsampler(self.block(self.head(self.entry(x))))))

AUTHORS[Half] = lambda m: {k: k for k in ('query', 'key', 'value', 'attention')}
AUTHORS[Sixth] = lambda m: {k: f'theirs.{k}' for k in ('entry', 'exit', 'head', 'block', 'tail')} | {'upsampler': 'theirs.up'}
'''


@pytest.fixture(scope='module')
def sixth(tmp_path_factory):
    "Its class; forgotten again afterwards"
    kept = [dict(d) for d in (zoo.SYSTEMS, zoo.VARIANTS, AUTHORS)]
    folder = tmp_path_factory.mktemp('mine')
    (folder/'sixth.py').write_text(MODULE)
    sys.path.insert(0, str(folder))
    yield importlib.import_module('sixth').Sixth
    sys.path.remove(str(folder)); del sys.modules['sixth']
    for d, before in zip((zoo.SYSTEMS, zoo.VARIANTS, AUTHORS), kept): d.clear(); d.update(before)


@pytest.fixture
def net(sixth):
    torch.manual_seed(0)
    return zoo.create_model('sixth').eval()


def photo(h=26, w=31): return np.random.default_rng(0).integers(0, 256, (h, w, 3), dtype=np.uint8)


def test_conformance(net, tmp_path):
    assert {'sixth', 'sixth-tiny'} <= set(zoo.list_models()) and zoo.create_model('sixth-tiny').config['n_feats'] == 4
    conformance.any_size(net); conformance.finite_gradients(net)
    conformance.bad_values_are_refused('sixth'); conformance.config_makes_it_again(net)
    conformance.weights_come_back(net.eval(), tmp_path)


def test_its_own_layout_of_weights_is_known_by_the_names(net):
    theirs = to_authors(net)
    assert 'theirs.block.query.0.weight' in theirs and zoo.infer_config(theirs) == ('sixth', dict(scale=2, n_feats=8))
    conformance.same_weights(net, zoo.load_model(theirs))


def test_pictures_in_its_own_tiles(net):
    tiles = chop_tiles(60, 61, 2, 'sixth')
    assert len(tiles) > len(chop_tiles(60, 61, 2)) and all((t.y1 - t.y0)*(t.x1 - t.x0) < 2*500 for t in tiles)
    assert upscale(photo(), net, 2).shape == (52, 62, 3)


def test_attention_maps(net):
    (m,) = correlation_maps(net, photo(), [(4, 5), (20, 30)])
    assert m.kind == 'cross-scale' and m.keys[0].shape == (13, 16) and m.keys[0].row_step == m.keys[0].column_step == 2
    assert np.allclose(m.weights.sum(1), 1, atol=1e-6)
    assert list(figure_set(record(net, photo()), [(4, 5)], 2))
    (added,) = contributions(net, photo())
    assert added.added.shape == (26, 31) and (added.added > 0).all()


def test_entry_in_the_explorer(sixth):
    assert 'sixth' + SUFFIX in model_names()
    e = Explorer(photo(), 'sixth' + SUFFIX, point=(8, 9))
    assert e.problem == '' and e.panels[0]['model'] == 'sixth' + SUFFIX


def test_a_score_in_a_table(net, tmp_path):
    pictures = [Picture(f'p{i}', array=photo(40, 44 + 2*i)) for i in range(2)]
    scored = pd.concat([evaluate(m, pictures, 2, label=name) for m, name in ((net, 'sixth'), ('bicubic', 'bicubic'))])
    table = score_table(means(scored))
    assert list(table.model) == ['sixth', 'bicubic'] and ' / ' in table.iloc[0, 1]
    write_table(table, tmp_path, 'mine')
    assert {p.suffix for p in tmp_path.iterdir()} == {'.csv', '.tex', '.html'}


def test_budget_of_its_training(sixth):
    assert step_budget(TrainConfig(model='sixth', model_config=dict(n_feats=6), scale=2, patch=12, batch=2), 'cpu').parameters > 100
