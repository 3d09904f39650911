"""The networks that come with the package: what they were trained on, what they score, what their files say."""
import itertools, json
import numpy as np, pandas as pd, pytest, torch
from conftest import ROOT
from skimage import data
from msnlan.basics import file_hash
from msnlan.data.registry import registry
from msnlan.data.sets import lookalikes
from msnlan.degradations import degrade
from msnlan.evaluation.scores import evaluate
from msnlan.inference import to_tensor
from msnlan.models.cards import kept_card, kept_scores
from msnlan.models.zoo import list_models, load_model, weights_folder
from msnlan.reproduce.trail import read_cell, trail
from msnlan.training.checkpointing import spent, weights_record

NAMES = list_models(pretrained=True)
TRAINED = sorted({d for n in NAMES for d in weights_record(weights_folder()/f'{n}.safetensors')['recipe']['data']})
SCORED = ['Set5', 'Set14', 'B100', 'Urban100', 'CBSD68', 'McMaster18', 'Classic5']
QUICK = 'Set5', 'Classic5'
PAGE = ROOT/'reports/shipped/tables'


def test_no_scored_picture_was_trained_on():
    known = registry()
    hashes = lambda sets: set(known[known.dataset.isin(sets)].pixels_sha256) - {''}
    assert len(hashes(['BSDS400'])) == 399 and len(hashes(SCORED)) > 200
    assert hashes(TRAINED) & hashes(SCORED) == set()


@pytest.mark.slow
def test_no_scored_picture_looks_like_one_trained_on(data_root):
    scored = [s.replace('Urban100', 'Urban100:50') for s in SCORED]
    assert lookalikes(TRAINED, [*scored, 'skimage-test'], data_root=data_root) == []


@pytest.mark.parametrize('name', NAMES)
def test_files_say_what_they_had_cost(name):
    path = weights_folder()/f'{name}.safetensors'
    record, cost = weights_record(path), spent(weights_record(path))
    assert path.stat().st_size <= 2_000_000
    assert record['recipe']['validation'] == ['skimage-test'] and record['steps'] == record['recipe']['steps']
    assert cost['patches'] >= record['steps']*record['recipe']['batch'] and cost['hours'] > 0 and cost['machines']
    assert all(len(s['commit']) == 40 for s in record['sessions'])
    scores = kept_scores(path)
    assert scores and all(s['psnr'] > s['bicubic_psnr'] for s in scores), 'better than doing nothing on every set'
    run = kept_card(path)['run']
    folder = ROOT/f"reports/{run['preset']}/runs/{run['job']}"
    assert (folder/f"done-{run['fingerprint']}").is_file(), 'the card names the run that left the file'
    assert json.loads((folder/'result.json').read_text())['weights'] == file_hash(path)


OVERSHOOT = .5   # of an output in [0, 1]; sharp edges take up to .3


@pytest.mark.parametrize('name', NAMES)
def test_colours_that_training_seldom_has(name):
    "Photographs in one colour alone, as lamps and flowers are: the output stays near [0, 1]"
    net, level = load_model(name).eval(), weights_record(weights_folder()/f'{name}.safetensors')['recipe']['level'] or None
    for photo, colour in itertools.product((data.astronaut()[200:264, 150:214], data.chelsea()[100:164, 120:184], data.coffee()[150:214, 250:314]),
                                           [c for c in itertools.product((0, 1), repeat=3) if any(c)]):
        clean = (photo/photo.max()*255*np.array(colour)).astype(np.uint8)
        seen = clean if net.task == 'sr' else degrade(clean, net.task, level)[0]
        with torch.no_grad(): out = net(to_tensor(seen))
        assert -OVERSHOOT < out.min() and out.max() < 1 + OVERSHOOT, f'{colour}: from {out.min():.2f} to {out.max():.2f}'


LONG = 'B100', 'Urban100', 'CBSD68'   # minutes each: their first three pictures are scored anew

def scored_pictures(path, card)->pd.DataFrame:
    "A row a picture: what the committed run wrote of the file on the card's set"
    for run in sorted((ROOT/'reports/shipped/runs').glob('evaluate-*')):
        mine = [n['model'] for n in json.loads((run/'result.json').read_text())['networks'] if n['sha256'] == file_hash(path)]
        rows = pd.read_csv(run/'per_picture.csv', dtype={'picture': str})
        rows = rows[rows.model.isin(mine) & (rows.dataset == card['dataset']) & (rows.setting == card['setting'])]
        if len(rows): return rows.set_index('picture')
    raise LookupError(f'no run scored {path} on {card["dataset"]}')


@pytest.mark.parametrize('name', [pytest.param(n, marks=[] if n == 'msnlan-tiny-x2' else pytest.mark.slow) for n in NAMES])
def test_scored_anew_they_give_their_cards_digits(name, data_root, request):
    path, net = weights_folder()/f'{name}.safetensors', load_model(name)
    digits = lambda s: (round(s['psnr'], 2), round(s['ssim'], 4))
    for card in kept_scores(path):
        then, long = scored_pictures(path, card), card['dataset'].startswith(LONG)
        assert digits(then[['psnr', 'ssim']].mean()) == digits(card)
        if not (request.config.getoption('--all') or card['dataset'] in QUICK): continue
        options = dict(scale=net.scale) if net.task == 'sr' else dict(task=net.task, setting=int(weights_record(path)['recipe']['level']) or None)   # the noise's seed is of 30, not 30.0
        now = evaluate(net, card['dataset'].split(':')[0] + ':3' if long else card['dataset'], **options, tile='chop', data_root=data_root, progress=False)
        if not long: assert digits(now[['psnr', 'ssim']].mean()) == digits(card), card['dataset']
        assert np.allclose(now.psnr, then.psnr[now.picture], rtol=0, atol=1e-3), card['dataset']


@pytest.mark.slow
@pytest.mark.parametrize('table', sorted(p.stem for p in PAGE.glob('*.csv')))
def test_numbers_of_the_page_lead_back_to_their_runs(table, data_root, monkeypatch):
    "First and last measured cell of each table: all that was hashed then is that file today. Otherwise: msnlan reproduce shipped"
    monkeypatch.setenv('MSNLAN_DATA', str(data_root))
    rows = len(pd.read_csv(PAGE/f'{table}.csv'))
    measured = [i for i in range(rows) if read_cell(f'{PAGE}/{table}.csv[{i + 1},1]')['runs']]
    assert measured
    for i in (measured[0], measured[-1]):
        lines, wrong = trail(f'{PAGE}/{table}.csv[{i + 1},1]')
        assert not wrong and lines[-1] == 'every hash is that of the file'
