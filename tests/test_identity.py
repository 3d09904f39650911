"""A row of a table is what made it: weights, tiles, ensemble, run; never a folder's name."""
import warnings
import numpy as np, pandas as pd, pytest, torch
from msnlan.data.patches import Picture
from msnlan.evaluation.scores import evaluate, one_thing_a_label, summarise
from msnlan.evaluation.tables import means, score_table
from msnlan.models.zoo import create_model, save_weights
from msnlan.reproduce.runs import arm_of, model_by_name

PICS = [Picture(f'p{i}', array=np.random.default_rng(i).integers(0, 256, (24, 28, 3), np.uint8)) for i in range(2)]


def trained(path, seed=1, **recipe):
    torch.manual_seed(seed)
    net = create_model('slot', n_feats=18, n_resblocks=2, attention='pixel')
    return str(save_weights(net, path, dict(training=dict(recipe=dict(seed=seed, **recipe)))))


def scored(path, run, label='net', **options):
    return evaluate(model_by_name(path)[0], PICS, scale=2, label=label, progress=False, **options).assign(run=run, **arm_of(path))


def refused(*tables):
    for check in (means, summarise, one_thing_a_label):
        with pytest.raises(ValueError, match='two different things are called') as e: check(pd.concat(tables))
        assert '\n' not in str(e.value) and all(set(t.run) <= {n for n in ('first', 'second') if f'run {n}' in str(e.value)} for t in tables)
    return str(e.value)


@pytest.fixture
def folder(tmp_path): (tmp_path/'net').mkdir(); return tmp_path/'net'


def test_best_against_last_weights(folder):
    best, last = trained(folder/'best.safetensors', 1), trained(folder/'weights.safetensors', 2, steps=9)
    a, b = scored(best, 'first'), scored(last, 'second')
    said = refused(a, b)
    assert a.weights[0] in said and b.weights[0] in said
    assert (model_by_name(best)[1], model_by_name(last)[1]) == ('net.best', 'net')       # two files of one folder, two rows
    t = score_table(means(pd.concat([a.assign(model='net.best'), b])))
    assert t.model.tolist() == ['net.best', 'net']


def test_two_folders_of_one_name(tmp_path):
    files = [trained(tmp_path/d/'net'/'weights.safetensors', s, lr=s) for d, s in (('a', 1), ('b', 2))]
    assert [model_by_name(f)[1] for f in files] == ['net', 'net']
    refused(scored(files[0], 'first'), scored(files[1], 'second'))


@pytest.mark.parametrize('other', [dict(self_ensemble=True), dict(tile=300)], ids=['self-ensemble', 'tiles'])
def test_plain_against_other_inference(folder, other):
    path = trained(folder/'weights.safetensors')
    said = refused(scored(path, 'first'), scored(path, 'second', **other))
    assert ('ensemble 8' in said) == ('self_ensemble' in other) and ('tiles 300' in said) == ('tile' in other)


def test_the_same_twice_counts_once(folder):
    a = scored(trained(folder/'weights.safetensors'), 'first')
    both = pd.concat([a, a.assign(run='second')])
    assert means(both).pictures.tolist() == [2] and means(both).equals(means(a)) and summarise(both).equals(summarise(a))
    refused(a, a.assign(run='second', psnr=a.psnr + 1))                                  # one network, two results


def test_seeds_are_an_axis(tmp_path):
    files = [trained(tmp_path/f's{s}'/'weights.safetensors', s) for s in (1, 2, 3)]
    parts = [scored(f, f'run{s}') for s, f in enumerate(files)]
    m, each = means(pd.concat(parts)).iloc[0], [p.psnr.mean() for p in parts]
    assert (m.seeds, m.pictures) == (3, 2)
    assert m.psnr == pytest.approx(np.mean(each)) and m.psnr_sd == pytest.approx(np.std(each, ddof=1)) and m.psnr_sd > 0
    changed = trained(tmp_path/'other'/'weights.safetensors', 4, lr=1.)                  # another recipe is no seed
    refused(parts[0].assign(run='first'), scored(changed, 'second'))
