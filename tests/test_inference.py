"""Tiles and self-ensemble against the authors' plans; pictures in, pictures out; ONNX against onnxruntime."""
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from conftest import ABSENT, SHARED
from msnlan.inference import chop_tiles, eightfold, enhance, export_model, exported_record, in_tiles, predict, restore, upscale
from msnlan.models.zoo import SYSTEMS as NETWORKS, create_model, save_weights

PLANS = json.loads((SHARED/'golden/chop_plans.json').read_text()) if SHARED else []
SYSTEMS = {'panet_sr': ('panet', 'sr'), 'panet_dn': ('panet', 'denoise'), 'panet_car': ('panet', 'dejpeg')}


@pytest.mark.parametrize('plan', PLANS, ids=lambda p: f"{p['repo']}-{p['H']}x{p['W']}-x{p['scale']}")
def test_tiles_are_the_programs(plan):
    system, task = SYSTEMS.get(plan['repo'], (plan['repo'], 'sr'))
    limit = None if plan['min_size'] == 'default' else plan['min_size']
    tiles = chop_tiles(plan['H'], plan['W'], plan['output_scale'], system, task, limit)
    assert [[t.y0, t.y1, t.x0, t.x1] for t in tiles] == plan['leaves_y0y1x0x1']
    assert [[t.oy0, t.oy1, t.ox0, t.ox1] for t in tiles] == plan['owned_hr_y0y1x0x1']
    x, s = torch.rand(1, 3, plan['H'], plan['W']), plan['output_scale']
    repeat = lambda x: x.repeat_interleave(s, 2).repeat_interleave(s, 3)
    assert torch.equal(in_tiles(repeat, x, tiles, s), repeat(x)) == plan['exact_stitch']


@pytest.mark.parametrize('system,task,scale', [('msnlan', 'sr', 4), ('csnln', 'sr', 3), ('panet', 'sr', 3), ('hspan', 'sr', 2), ('panet', 'denoise', 1)])
def test_tiles_of_any_size_cover_the_output_once(system, task, scale):
    for h, w in [(1, 1), (1, 90), (7, 3), (21, 22), (19, 200), (90, 61)]:
        for limit in None, 300, 1:
            seen = np.zeros((scale*h, scale*w), int)
            for t in chop_tiles(h, w, scale, system, task, limit):
                assert 0 <= t.y0 < t.y1 <= h and 0 <= t.x0 < t.x1 <= w
                assert scale*t.y0 <= t.oy0 and t.oy1 <= scale*t.y1 or t.oy0 >= t.oy1
                if t.oy0 < t.oy1 and t.ox0 < t.ox1: seen[t.oy0:t.oy1, t.ox0:t.ox1] += 1
            assert (seen == 1).all()


def test_self_ensemble_is_the_programs(golden):
    t = load_file(golden/'self_ensemble_x8.safetensors')
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.PReLU(), torch.nn.Conv2d(8, 12, 3, padding=1), torch.nn.PixelShuffle(2))
    net.load_state_dict({k[6:]:v for k,v in t.items() if k.startswith('state.')})
    with torch.no_grad():
        assert (net(t['input']) - t['output_single']).abs().max() < 1e-5
        assert (eightfold(net, t['input']) - t['output']).abs().max() < 1e-5


@pytest.fixture(scope='module')
def tiny():
    "A network small enough for many passes"
    torch.manual_seed(0)
    return create_model('msnlan', scale=2, n_feats=16, n_resgroups=2, n_resblocks=1)


def test_self_ensemble_with_tiles(tiny):
    x = torch.rand(1, 3, 26, 31)
    a = enhance(tiny, x, tile=700, self_ensemble=True)
    assert a.shape == (1, 3, 52, 62)
    b = enhance(tiny, x.flip(2), tile=10**9, self_ensemble=True).flip(2)      # four tiles, one split
    assert not torch.equal(a, b) and (a - b).abs().mean() < 0.1


def test_one_tile_is_the_whole_picture(tiny):
    x = torch.rand(1, 3, 12, 14)                                               # a tile would exceed it: no cut
    assert torch.equal(enhance(tiny, x, tile='chop'), enhance(tiny, x))


def test_predict_is_the_model_rounded(tiny):
    img = np.random.default_rng(1).integers(0, 256, (10, 12, 3), dtype=np.uint8)
    x = torch.from_numpy(img).permute(2, 0, 1)[None]/255
    with torch.no_grad(): want = (tiny.eval()(x)[0].permute(1, 2, 0)*255).clamp(0, 255).round().numpy().astype(np.uint8)
    assert np.array_equal(predict(tiny, img), want)


def test_grey_network_keeps_the_colours():
    torch.manual_seed(0)
    net = create_model('msnlan', scale=2, n_colors=1, n_feats=16, n_resgroups=2, n_resblocks=1)
    net.features = lambda x: x.repeat_interleave(2, 2).repeat_interleave(2, 3)   # luma untouched
    flat = np.full((6, 7, 3), (200, 30, 90), np.uint8)
    assert np.abs(predict(net, flat).astype(int) - flat[0, 0]).max() <= 1


def test_upscale_by_name_file_and_network(tiny, tmp_path):
    from PIL import Image
    img = np.random.default_rng(2).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    Image.fromarray(img).save(tmp_path/'in.png')
    want = upscale(img, tiny, scale=2)
    path = save_weights(tiny, tmp_path/'w.safetensors')
    assert np.array_equal(upscale(tmp_path/'in.png', path, scale=2), want)
    with pytest.raises(ValueError, match='scale 2; scale 3 was asked for'): upscale(img, path, scale=3)
    with pytest.raises(ValueError, match='scale 2; scale 1 was asked for'): restore(img, path)
    with pytest.raises(ValueError, match='expected a weight file or one of bicubic'): upscale(img, tmp_path/'none.pt')


OTHER_SIZES = (11, 19), (24, 9), (17, 32)      # than the exporter saw
FIXED = ('mlrn',)                              # systems whose height and width cannot be left free

def runs_of(path):
    "An exported file as a function of numpy arrays"
    if path.suffix == '.pt2':
        program = torch.export.load(path).module()
        return lambda x: program(torch.from_numpy(x)).detach().numpy()
    session = pytest.importorskip('onnxruntime').InferenceSession(str(path), providers=['CPUExecutionProvider'])
    return lambda x: session.run(None, {'image': x})[0]


@pytest.mark.slow
@pytest.mark.parametrize('ending', ['pt2', 'onnx'])
@pytest.mark.parametrize('name', NETWORKS)
def test_exported_files_agree_with_the_network(name, ending, tmp_path):
    "At three sizes that the exporter did not see; where sizes cannot be free, the error says so and a fixed size is exported"
    if ending == 'onnx': pytest.importorskip('onnxscript')
    torch.manual_seed(0)
    net, path = create_model(name, **NETWORKS[name].toy), tmp_path/f'net.{ending}'
    if name in FIXED:
        with pytest.raises(ValueError, match='cannot be exported with free height and width .*; give a size') as e: export_model(net, path)
        assert '\n' not in str(e.value) and not list(tmp_path.iterdir())
    assert net.training
    files = {size: export_model(net, tmp_path/f'{size}.{ending}', size) for size in OTHER_SIZES} if name in FIXED \
        else dict.fromkeys(OTHER_SIZES, export_model(net, path))
    for size, file in files.items():
        x = np.random.default_rng(0).random((1, net.n_colors, *size), np.float32)
        with torch.no_grad(): want = net.eval()(torch.from_numpy(x)).numpy()
        assert np.abs(runs_of(file)(x) - want).max() < 1e-5, size
        said = exported_record(file)
        assert (said['system'], said['config'], said['scale']) == (name, net.config, net.scale)
        assert said['height_width'] == (list(size) if name in FIXED else 'free, at least 8')
