"""The explorer without a browser: pictures of any kind, layers of every system, speed, memory, the cell of a view."""
import io, os, re, statistics, subprocess, sys, time
from importlib.resources import files
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from msnlan.correlation.recording import correlation_maps
from msnlan.correlation.explorer import SUFFIX, Desk, Explorer, Shared, model_names
from msnlan.models.zoo import previews
from msnlan.correlation.page import serve
from msnlan.models.zoo import create_model, save_weights

SMALL = 'msnlan' + SUFFIX


def picture(height=20, width=24, seed=0): return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(image, kind='PNG'):
    out = io.BytesIO(); Image.fromarray(image).save(out, kind)
    return out.getvalue()


def upload(explorer, name, data, part=300):
    "What the browser sends for a file: parts of at most `part` bytes"
    parts = max(1, -(-len(data)//part))
    for i in range(parts):
        explorer.receive(explorer, dict(kind='upload', name=name, part=i, parts=parts), [memoryview(data[i*part:(i+1)*part])])


def shown(explorer, panel=0):
    "The map that was sent, (H, W)"
    return np.frombuffer(explorer.answer['panels'][panel]['map'], '<f4').reshape(explorer.scene['size'])


@pytest.fixture(scope='module')
def explorer(): return Explorer(picture(), SMALL)


def test_sends_the_maps_of_the_correlation_room(explorer):
    explorer.point = [3, 17]
    net = Desk().network(SMALL)
    for branch, m in zip(('3x3 in-scale', '5x5 in-scale', '7x7 in-scale'), correlation_maps(net, picture(), [(3, 17)])):
        explorer.panels = [dict(model=SMALL, layer='block.branches', branch=branch)]
        np.testing.assert_allclose(shown(explorer), m.on_picture()[0], atol=1e-7)
        found = explorer.answer['panels'][0]
        assert found['effective_keys'] == pytest.approx(m.effective_keys[0]) and found['distance'] == pytest.approx(m.distance[0])
        assert [x['weight'] for x in found['matches']] == pytest.approx([x.weight for x in m.matches(0, 5)])
        assert found['query'] == list(m.query_box())


@pytest.mark.parametrize('system', previews())
def test_every_layer_and_branch_of(system):
    e = Explorer(picture(30, 26), system + SUFFIX, point=(8, 9))
    maps = set()
    for layer, choices in e.scene['layers'][0]:
        for branch in choices:
            e.panels = [dict(model=system + SUFFIX, layer=layer, branch=branch)]
            assert e.problem == '' and e.panels[0]['branch'] == branch
            assert shown(e).min() >= 0 and 0 < shown(e).max() <= 1 + 1e-6
            assert 0 < e.answer['panels'][0]['share'] <= 1 + 1e-5
            maps.add(e.answer['panels'][0]['map'])
    assert len(maps) == sum(len(c) for _, c in e.scene['layers'][0])          # no two choices show the same


def test_two_models_share_the_pixel():
    e = Explorer(picture(), SMALL, against=dict(model='csnln' + SUFFIX, branch='3x3 cross-scale'), point=(5, 6))
    first = [p['map'] for p in e.answer['panels']]
    e.point = [11, 2]
    second = [p['map'] for p in e.answer['panels']]
    assert all(a != b for a, b in zip(first, second)) and second[0] != second[1]
    middles = [(q[0] + q[2]/2, q[1] + q[3]/2) for q in (p['query'] for p in e.answer['panels'])]
    assert middles == [(11.5, 2.5)]*2


@pytest.mark.parametrize('shape', [(1, 1), (1, 9), (9, 1)])
def test_smallest_pictures(shape):
    for system in previews():
        e = Explorer(picture(*shape), system + SUFFIX)
        e.point = [8, 8]
        assert e.point == [shape[0] - 1, shape[1] - 1] and np.isfinite(shown(e)).all() and e.problem == ''


def test_grey_alpha_and_palette_pictures(explorer):
    grey = picture()[..., 0]
    upload(explorer, 'grey.png', encoded(grey))
    assert explorer.problem == '' and explorer.scene['pixels'] == np.repeat(grey[..., None], 3, 2).tobytes()
    clear = np.dstack([picture(), np.zeros((20, 24), np.uint8)])
    upload(explorer, 'clear.png', encoded(clear))
    assert explorer.problem == '' and set(explorer.scene['pixels']) == {255}   # nothing on white
    out = io.BytesIO(); Image.fromarray(picture()).quantize(8).save(out, 'GIF')
    upload(explorer, 'colours.gif', out.getvalue())
    assert explorer.problem == '' and explorer.picture == 'colours.gif' and 'colours.gif' in explorer.options['pictures']


def test_large_picture_is_reduced_with_a_notice(explorer):
    upload(explorer, 'large.jpg', encoded(np.tile(picture(30, 40), (100, 100, 1)), 'JPEG'), 2**20)
    assert explorer.problem == '' and explorer.scene['size'] == [96, 128]
    assert explorer.scene['notice'] == 'Reduced from 4000 x 3000 to 128 x 96 pixels.'
    explorer.side = 64
    assert explorer.scene['size'] == [48, 64]
    explorer.side = 128


@pytest.mark.parametrize('data', [b'', b'no picture at all', encoded(picture())[:200]], ids=['empty', 'text', 'truncated'])
def test_what_is_no_picture_gets_a_message(explorer, data):
    before = explorer.scene['pixels'], explorer.picture, explorer.answer['panels']
    upload(explorer, 'broken.png', data)
    assert explorer.problem.startswith('broken.png is not a picture that can be read') and '\n' not in explorer.problem
    assert (explorer.scene['pixels'], explorer.picture, explorer.answer['panels']) == before
    explorer.point = [0, (explorer.point[1] + 1)%20]
    explorer.panels = [dict(explorer.panels[0], branch='7x7 in-scale')]
    assert explorer.problem == ''                                            # gone with the next thing that works


def test_upload_with_the_name_of_another(explorer):
    upload(explorer, 'same.png', encoded(picture(seed=1))); first = explorer.answer['panels'][0]['map']
    upload(explorer, 'same.png', encoded(picture(seed=2)))
    assert explorer.scene['pixels'] == picture(seed=2).tobytes() and explorer.answer['panels'][0]['map'] != first
    upload(explorer, 'astronaut', encoded(picture()))
    assert explorer.picture == 'astronaut (yours)'


def test_weights_file(tmp_path, explorer):
    net = create_model('msnlan', scale=2, n_feats=16, n_resgroups=2, n_resblocks=1)
    path = str(save_weights(net, tmp_path/'mine.safetensors'))
    explorer.panels = [dict(model=path)]
    assert explorer.problem == '' and path in explorer.options['models']
    (tmp_path/'broken.safetensors').write_bytes(b'no weights')
    for bad in str(tmp_path/'broken.safetensors'), str(tmp_path/'none.pt'), str(tmp_path), '':
        explorer.panels = [dict(model=bad)]
        assert explorer.problem and '\n' not in explorer.problem and explorer.panels[0]['model'] == path


def test_own_network_and_its_mode():
    net = create_model('msnlan', scale=2, n_feats=16, n_resgroups=2, n_resblocks=1).train()
    e = Explorer(picture(), net, against=dict(branch='7x7 in-scale'))
    assert [p['model'] for p in e.panels] == ['your msnlan 1']*2 and not net.training
    assert 'model=your_msnlan_1' in e.code


def test_cell_makes_the_same_view(tmp_path):
    path = tmp_path/'a.png'; path.write_bytes(encoded(picture()))
    e = Explorer(str(path), SMALL, point=(2, 3), against=dict(model='panet' + SUFFIX), palette='viridis', decades=4)
    e.point, e.opacity, e.zoom = [7, 8], .35, 3.
    scope = {}
    exec(e.code.replace('Explorer(', 'again = Explorer(', 1), scope)
    again = scope['again']
    for name in 'picture', 'point', 'panels', 'side', 'opacity', 'zoom', 'palette', 'decades', 'matches', 'scene', 'code':
        assert getattr(again, name) == getattr(e, name), name
    assert [p['map'] for p in again.answer['panels']] == [p['map'] for p in e.answer['panels']]


def test_mistakes_in_python_are_errors():
    for settings, text in [(dict(picture='nothing.png'), 'expected a picture file'), (dict(model='edsr'), 'no weights file'),
                           (dict(layer='nowhere'), "layer is 'nowhere'"), (dict(branch='9x9'), 'has 3x3 in-scale, 5x5 in-scale')]:
        with pytest.raises((ValueError, OSError), match=text): Explorer(**dict(picture=picture(), model=SMALL) | settings)


def test_browser_side_reads_traits_that_exist():
    code = (files('msnlan.correlation')/'static/explorer.js').read_text()
    names = set(re.findall(r'(?:this\.ask|\bset|this\.set|model\.get)\("(\w+)"', code))
    names |= set(re.findall(r'"(\w+)"', re.search(r'const names = \[(.*?)\]', code, re.S)[1]))
    shared = {n for n, t in Shared.class_traits(sync=True).items() if not n.startswith('_')}
    assert names <= shared and {'picture', 'panels', 'point', 'answer', 'scene', 'decades'} <= names


def test_nothing_on_the_page_comes_from_elsewhere():
    for f in (files('msnlan.correlation')/'static').iterdir():
        if f.is_file(): assert not re.search(r'https?:|//cdn|@import|url\(', f.read_text()), f.name


def test_page_without_voila(monkeypatch):
    monkeypatch.setattr('msnlan.correlation.page.find_spec', lambda name: None)
    with pytest.raises(ImportError, match='pip install voila'): serve()


def memory():
    "Resident memory of this process, MB"
    with open('/proc/self/statm') as f: return int(f.read().split()[1])*4096/2**20


@pytest.mark.skipif(not Path('/proc/self/statm').exists(), reason='needs /proc')
def test_memory_stays_flat_over_500_clicks():
    e, rng, seen = Explorer(picture(32, 32), SMALL), np.random.default_rng(0), []
    for i in range(600):
        e.point = rng.integers(0, 32, 2).tolist()
        if i >= 99 and i%100 == 99: seen.append(memory())                    # the first hundred fill what is kept
    assert e.answer['count'] > 500 and max(seen) - seen[0] < 8, seen


def test_memory_of_kept_features_is_bounded():
    e = Explorer(picture(), SMALL)
    for side in range(8, 20): e.side = side
    assert len(e.desk.kept.found) <= 4 and len(e.desk.scenes.found) <= 4
    first = e.desk.features(e.key, SMALL)
    assert e.desk.features(e.key, SMALL) is first


@pytest.mark.slow
@pytest.mark.parametrize('name', ['msnlan-tiny-x2', 'msnlan of 64 features'])
def test_a_click_answers_within_a_third_of_a_second(name):
    torch.manual_seed(0)
    net = name if name in model_names() else create_model('msnlan', scale=2, n_feats=64, n_resgroups=2, n_resblocks=1)
    e = Explorer('astronaut', net, side=256)
    assert e.scene['size'] == [256, 256]
    times = {}
    for branch in e.scene['layers'][0][0][1]:
        e.panels = [dict(e.panels[0], branch=branch)]
        for i in range(9):
            start = time.perf_counter(); e.point = [20*i + 3, 240 - 20*i]
            times.setdefault(branch, []).append(time.perf_counter() - start)
    medians = {b: statistics.median(t) for b, t in times.items()}
    print(name, {b: f'{1000*t:.0f} ms' for b, t in medians.items()})
    assert max(medians.values()) < .3, medians


def test_command_refuses_what_is_not_there():
    from typer.testing import CliRunner
    from msnlan.cli import app
    for given, text in (['nothing.png'], 'expected a picture file'), (['--model', 'edsr'], 'no weights file'):
        error = CliRunner().invoke(app, ['explore', *given]).exception
        assert isinstance(error, OSError) and text in str(error)


# ---- seen when tried as a new user would -------------------------------------------------------------------------

def ask(explorer, name, value, number, **more):
    "What the browser sends for a choice"
    explorer.receive(explorer, dict(kind='ask', name=name, value=value, asked=number, **more), [])


def test_the_code_cell_takes_any_upload_name():
    e = Explorer(picture(), SMALL)
    for name in '0801.png', '3 dogs (1).jpg', 'class.png':
        upload(e, name, encoded(picture()))
        compile(e.code, 'cell', 'exec')
        variable = re.search(r'Explorer\((\w+),', e.code)[1]
        scope = {variable: picture(seed=4)}
        exec(e.code.replace('Explorer(', 'again = Explorer(', 1), scope)
        assert scope['again'].scene['pixels'] == picture(seed=4).tobytes()


def test_a_side_beyond_the_limit_is_refused_before_the_page():
    from typer.testing import CliRunner
    from msnlan.cli import app
    for side in '1000', '4', '513':
        error = CliRunner().invoke(app, ['explore', '--side', side]).exception
        assert isinstance(error, ValueError) and str(error) == f'side is {side}; expected 8 to 512 pixels'
    with pytest.raises(Exception): Explorer(picture(), SMALL, side=513)


def test_an_upload_keeps_the_other_pictures():
    e = Explorer(picture(), SMALL)
    upload(e, 'a.png', encoded(picture(seed=1))); upload(e, 'b.png', encoded(picture(seed=2)))
    assert {'your picture', 'a.png', 'b.png'} <= set(e.options['pictures'])
    for name, seed in ('your picture', 0), ('a.png', 1), ('b.png', 2):
        e.picture = name
        assert e.problem == '' and e.scene['pixels'] == picture(seed=seed).tobytes()


def test_requests_are_answered_in_order_and_by_number():
    "Choose a network, click, choose another at once: the last choice stands"
    e = Explorer(picture(), SMALL)
    ask(e, 'panel', dict(model='csnln' + SUFFIX), 1, index=0); assert e.answer['asked'] == 1
    ask(e, 'point', [3, 4], 2)
    ask(e, 'panel', dict(model='mlrn' + SUFFIX), 3, index=0)
    assert e.panels[0]['model'] == 'mlrn' + SUFFIX and e.point == [3, 4] and e.answer['asked'] == 3
    ask(e, 'point', [3, 4], 4); assert e.answer['asked'] == 4                 # nothing to do is an answer too
    ask(e, 'panel', dict(model='none.pth'), 5, index=0)
    assert 'no weights file' in e.problem and e.answer['asked'] == 5 and e.panels[0]['model'] == 'mlrn' + SUFFIX
    ask(e, 'code', 'import os', 6); assert 'there is no' in e.problem and e.answer['asked'] == 6


def test_untrained_networks_are_marked():
    e = Explorer(picture(), 'msnlan-tiny-x2', against=dict(model='panet' + SUFFIX))
    assert e.scene['untrained'] == [False, True]


def test_numbers_are_possible():
    "A level's keys are not compared with those of all levels; a region's query reaches its region; padding is named"
    e = Explorer(picture(30, 26), 'panet' + SUFFIX)
    for branch in e.scene['layers'][0][0][1]:
        e.panels = [dict(e.panels[0], branch=branch)]
        found = e.answer['panels'][0]
        assert 1 <= found['effective_keys'] <= found['keys'], branch
    e.panels = [dict(model='mlrn' + SUFFIX)]
    assert e.answer['panels'][0]['keys'] <= 24*24
    e.panels = [dict(model=SMALL, branch='7x7 in-scale')]
    assert e.answer['panels'][0]['beside'] == 34*30 - 30*26 and e.answer['panels'][0]['keys'] == 34*30


def test_terminating_the_command_ends_what_it_started(tmp_path):
    "With a page server that only waits in the place of voila: server and folder are gone, and idle kernels would be culled"
    (tmp_path/'voila').mkdir()
    (tmp_path/'voila/__main__.py').write_text('import os, pathlib, sys, time\n'
        f'pathlib.Path({str(tmp_path/"new")!r}).write_text("\\n".join([str(os.getpid()), *sys.argv[1:]]))\n'
        f'os.rename({str(tmp_path/"new")!r}, {str(tmp_path/"started")!r})\ntime.sleep(600)\n')
    (tmp_path/'voila/__init__.py').write_text('')
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(tmp_path), str(Path(__file__).resolve().parents[1])]))
    command = subprocess.Popen([sys.executable, '-c', 'from msnlan.correlation.page import serve; serve(browser=False)'], env=env)
    try:
        end = time.monotonic() + 120
        while not (tmp_path/'started').exists(): assert command.poll() is None and time.monotonic() < end; time.sleep(.1)
        pid, notebook, *flags = (tmp_path/'started').read_text().splitlines()
        assert any('cull_idle_timeout' in f for f in flags) and Path(notebook).is_file()
        command.terminate()
        assert command.wait(60) == 0 and not Path(notebook).parent.exists()
        with pytest.raises(ProcessLookupError): os.kill(int(pid), 0)
    finally: command.kill()


def test_the_mixture_can_be_chosen():
    "What the output pixel is made of, by the browser's request and in the cell of the view"
    e = Explorer(picture(), SMALL, point=(3, 17))
    (m,) = e.features[0].maps([(3, 17)], 0, quantity='mixture')
    match = shown(e).copy()
    ask(e, 'quantity', 'mixture', 1)
    np.testing.assert_allclose(shown(e), m.on_picture()[0], rtol=1e-5, atol=1e-7)
    assert np.abs(shown(e) - match).max() > 1e-3 and e.answer['panels'][0]['query'] == [3, 17, 1, 1]
    assert e.answer['panels'][0]['share'] == pytest.approx(m.weights.sum()) and "quantity='mixture'" in e.code
    ask(e, 'quantity', 'mood', 2)
    assert e.problem and e.quantity == 'mixture' and e.answer['asked'] == 2


# ---- scenes, outcomes, pictures of the whole, sessions --------------------------------------------------------------

def test_truth_beside_the_picture():
    "A reduced upload is its own truth; benchmark pictures come as the evaluation makes them"
    from msnlan.degradations import bicubic
    from msnlan.metrics import psnr
    from msnlan.inference import predict
    large = np.kron(picture(20, 16), np.ones((4, 4, 1), np.uint8))
    e = Explorer(large, 'msnlan-tiny-x2', side=24, outcomes=True)
    assert e.scene['truth'] and e.scene['size'] == [24, 19]
    e.fit, e.corner = 'crop', [5, 99]
    lr, hr = bicubic(large, 2)
    assert e.corner == [5, 8] and e.scene['pixels'] == lr[5:29, 8:32].tobytes()
    (found,) = e.results['panels']
    assert found['truth'] == hr[10:58, 16:64].tobytes()
    sr = predict(e.desk.network('msnlan-tiny-x2'), lr[5:29, 8:32])
    assert found['plain'] == sr.tobytes() and found['scores']['plain'] == pytest.approx(psnr(sr, hr[10:58, 16:64], border=2))
    ask(e, 'point', found['worst'], 1)
    assert e.point == found['worst'] and all(m['unlike'] >= 0 for m in e.answer['panels'][0]['matches'])


def test_counterfactuals_are_those_of_python():
    from msnlan.correlation.interventions import intervened
    from msnlan.inference import predict
    e = Explorer(picture(), SMALL, layer='block.branches', branch='5x5 in-scale', outcomes=True)
    net = e.desk.network(SMALL)
    for where, layers in ('branch', 'block.branches.1.attention'), ('layer', 'block.branches'), ('network', None):
        ask(e, 'change', dict(weighting='local window', radius=2, where=where), 1)
        with intervened(net, layers, 'local window', radius=2): want = predict(net, picture())
        assert e.results['panels'][0]['changed'] == want.tobytes() and e.problem == ''
    ask(e, 'change', {}, 2)
    assert e.results['panels'][0]['changed'] is None
    h = Explorer(picture(), 'hspan' + SUFFIX, outcomes=True, change=dict(weighting='softmax'))
    assert h.results['panels'][0]['note'] == 'counterfactual: trained with sparsemax'


@pytest.mark.parametrize('number', ['effective_keys', 'self_match', 'contribution'])
def test_pictures_of_the_whole(number):
    e = Explorer(picture(), SMALL)
    e.whole = number
    found = np.frombuffer(e.answer['panels'][0]['whole']['map'], '<f4').reshape(20, 24)
    e.point = [7, 9]
    assert np.isfinite(found).all() and found.std() > 0
    if number == 'effective_keys': assert found[7, 9] == pytest.approx(e.answer['panels'][0]['effective_keys'], rel=1e-3)


def test_a_session_is_taken_up_again(tmp_path):
    import json
    path = tmp_path/'a.png'; path.write_bytes(encoded(picture()))
    e = Explorer(str(path), SMALL, point=(2, 3), pins=[(1, 1), (4, 5)], whole='distance', matches=3, apart=2)
    kept = json.loads(json.dumps(e.session))
    other = Explorer(picture(), 'msnlan-tiny-x2')
    other.receive(other, dict(kind='session', session=kept, asked=1), [])
    assert other.session == kept and other.answer['panels'][0]['map'] == e.answer['panels'][0]['map']
    for bad in None, 3, {}, kept | dict(evil=1), kept | dict(picture='gone.png'), kept | dict(side=9999):
        other.receive(other, dict(kind='session', session=bad, asked=2), [])
        assert other.problem and '\n' not in other.problem and other.session == kept


def test_cancel_leaves_what_was_on_show():
    e = Explorer(picture(), SMALL)
    before = e.session
    e.receive(e, dict(kind='cancel', asked=5), [])
    for name, value in ('whole', 'entropy'), ('outcomes', True):
        ask(e, name, value, 5)
        assert e.problem.startswith('Cancelled') and e.session == before and e.answer['asked'] == 5
    ask(e, 'whole', 'entropy', 6)
    assert e.problem == '' and e.whole == 'entropy'


def test_no_weight_no_paint_and_four_decades_at_most():
    "The browser's rule for transparency and scale, run by node where it is there"
    import shutil
    if not shutil.which('node'): pytest.skip('needs node')
    code = (files('msnlan.correlation')/'static/explorer.js').read_text()
    part = '\n'.join([re.search(rf'^const {n} = [^\n]*', code, re.M)[0] for n in ('clamp', 'DECADES')]
                     + [re.search(rf'^function {n}\(.*?^}}', code, re.S | re.M)[0] for n in ('span', 'level')])
    run = part + """
        const map = new Float32Array([0, 0, 0, 1e-20, 1e-3, 1]), far = new Float32Array([0, 1e-20, 1e-20, 1]);
        console.log(JSON.stringify([span(map, 1, -1), span(far, 1, -1), level(0, 1, 4), level(1, 1, 4), level(1e-20, 1, 4)]))"""
    out = subprocess.run(['node', '-e', run], capture_output=True, text=True, timeout=60)
    assert out.stdout.strip() == '[3,4,0,255,0]', out.stderr


@pytest.mark.parametrize('system', ['csnln', 'hspan', 'mlrn'])
def test_opening_computes_no_more_attention_than_the_layer_on_show_needs(system, monkeypatch):
    "The first layer is shown without computing any attention; a later one is what a whole recording has"
    from msnlan.correlation.recording import record
    from msnlan.models.layers import PatchAttention
    done, forward = [], PatchAttention.forward
    def count(layer, query, keys, values):
        if query.shape[-2:] != (1, 1): done.append(1)
        return forward(layer, query, keys, values)
    monkeypatch.setattr(PatchAttention, 'forward', count)
    e = Explorer(picture(28, 26), system + SUFFIX)
    assert not done, 'nothing is computed for the first layer'
    net, key = e.desk.network(system + SUFFIX), e.key
    layer, branches = e.scene['layers'][0][-1]
    e.panels = [dict(model=system + SUFFIX, layer=layer, branch=branches[-1])]
    (call, _), = e.places()
    (m,) = record(net, picture(28, 26)).maps([tuple(e.point)], call)
    np.testing.assert_allclose(shown(e), m.on_picture()[0], rtol=1e-5, atol=1e-7)
    e.outcomes = True
    done.clear(); e.side = 27; done.clear(); e.side = 128
    assert not done, 'what was computed once is kept'
