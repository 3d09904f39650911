"Studies: the notebook on runs made by hand, and the committed verdicts computed again from their scores."
import json
import numpy as np, pandas as pd, pytest
from conftest import ROOT
from msnlan.basics import file_hash, project_folder
from msnlan.evaluation.claims import judge, read_claims
from msnlan.evaluation.studies import arm_table, printed_arms, printed_verdicts
from msnlan.reproduce.overview import MORE, write_overview
from msnlan.reproduce.provenance import run_notebook

CLAIMS = project_folder('experiments')/'claims.yaml'
REPORTS = sorted({p.parent.parent.parent for p in (ROOT/'reports').glob('**/runs/*/done-*')})
STUDIES = sorted(p.parent.parent for p in (ROOT/'reports/studies').glob('*/tables/arms.csv'))


def again(folder, study, against):
    "Arms and verdicts from the scores alone, as texts"
    scores = pd.read_csv(folder/'per_picture.csv', dtype=dict(picture=str, weights=str, tiles=str))
    text = lambda t: t.astype(str).replace('nan', '').values.tolist()
    arms = printed_arms(arm_table(scores, against), against)
    kept = pd.read_csv(folder/'arms.csv', dtype=str, keep_default_na=False)
    assert text(kept[[c for c in arms.columns]]) == text(arms)
    judged = judge(read_claims(CLAIMS), scores, study)
    if len(judged): assert text(pd.read_csv(folder/'verdicts.csv', dtype=str, keep_default_na=False)) == text(printed_verdicts(judged))
    return judged


def test_verdicts_of_runs_made_by_hand(tmp_path):
    "An arm that gains 0.3 dB, one that gains nothing: the verdicts say so"
    rng = np.random.default_rng(0)
    easy = rng.normal(30, 3, 20)
    for arm, gain in {'none': 0, 'pixel softmax': .01, 'random keys': .01, 'patch 3': .3, 'patches 3, 5, 7': .6, 'soft threshold': -.3}.items():
        run = tmp_path/'runs'/f"evaluate-{arm.replace(' ', '-').replace(',', '')}"; run.mkdir(parents=True)
        rows = [dict(model=arm, dataset='Urban100:20@64', task='sr', setting='x2', scale=2, protocol='cnn', picture=f'{i:03}', arm=arm, seed=s,
                     weights=f'{arm}-{s}', tiles='whole', ensemble=1, psnr=e + gain + rng.normal(0, .005), ssim=.9)
                for s in (1, 2, 3) for i, e in enumerate(easy)]
        pd.DataFrame(rows).to_csv(run/'per_picture.csv', index=False)
        (run/'result.json').write_text(json.dumps(dict(kind='evaluate', networks=[])))
    out = tmp_path/'runs/study'
    result = run_notebook('study', dict(study='one-slot', against='none'), out, quiet=True)
    assert [t['name'] for t in result['tables']] == ['verdicts', 'arms'] and (out/'figures/arms.png').is_file()
    judged = again(out/'tables', 'one-slot', 'none').set_index('claim').verdict
    found = {claim[:30]: v for claim, v in judged.items()}
    assert found == {'Patches of several sizes find ': 'holds', 'A multi-scale non-local block ': 'holds',
                     'Standard non-local attention r': 'holds', 'A soft threshold, which leaves': 'contradicted'}
    arms = pd.read_csv(out/'tables/arms.csv')
    assert arms.seeds.eq(3).all() and arms.pictures.eq(20).all()


@pytest.mark.skipif(not STUDIES, reason='no study is committed below reports/studies')
@pytest.mark.parametrize('folder', STUDIES, ids=lambda p: p.name)
def test_committed_verdicts_follow_from_their_scores(folder):
    result = json.loads((folder/'runs/study/result.json').read_text())
    again(folder/'tables', result['study'], result['against'])


@pytest.mark.parametrize('folder', REPORTS, ids=lambda p: p.name)
def test_tables_and_figures_are_what_the_runs_left(folder):
    "A page that was written from files of a run before would show its numbers"
    if not (preset := json.loads((folder/'provenance.json').read_text()))['committed']: pytest.skip('not a committed report')
    for run, record in preset['runs'].items():
        for name, then in record['outputs'].items():
            kind, _, file = name.partition('/')
            path = folder/kind/(file if kind == 'tables' else f'{run}-{file}')
            if kind in ('tables', 'figures') and path.suffix != '.html': assert file_hash(path) == then, f'{path}: not of the run {run}'


@pytest.mark.skipif(not (ROOT/'reports/index.html').is_file(), reason='reports/index.html is not committed')
def test_the_page_over_all_reports_is_current(tmp_path):
    "What `make readme` writes today is what is kept"
    for source in [*(ROOT/'reports').glob('**/provenance.json'), *(ROOT/'reports').glob('studies/*/tables/*.csv'),
                   *(ROOT/'reports').glob('studies/*/runs/*/result.json'), ROOT/'reports/benchmarks/training-cpu.json']:
        kept = tmp_path/'reports'/source.relative_to(ROOT/'reports')
        if source.name == 'provenance.json' and 'runs' in source.relative_to(ROOT/'reports').parts: continue
        kept.parent.mkdir(parents=True, exist_ok=True); kept.write_bytes(source.read_bytes())
    for name in MORE: (tmp_path/'reports'/name).mkdir(exist_ok=True)
    assert write_overview(tmp_path/'reports').read_text() == (ROOT/'reports/index.html').read_text(), 'make readme writes it'
