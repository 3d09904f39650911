"""The tables of papers that the project keeps, and their join with what is measured."""
from pathlib import Path
import pandas as pd, pytest
from msnlan.evaluation.scores import evaluate, summarise
from msnlan.evaluation.claims import read_claims
from msnlan.evaluation.published import join_published, read_published

FOLDER = Path(__file__).resolve().parents[1]/'reports'/'published'


def test_every_number_has_a_source_and_a_sensible_value():
    t = read_published(FOLDER)
    assert len(t) > 500 and t.source.str.len().min() > 5 and t.method.notna().all()
    assert t.psnr.dropna().between(5, 60).all() and t.ssim.dropna().between(0, 1).all()
    empty = t[t.psnr.isna() & t.ssim.isna()]
    assert {'MSNLAN', 'HSPAN'} <= set(empty.method) and empty.source.str.contains('could not be read').all()


def test_measured_beside_published(data_root):
    means = summarise(pd.concat([
        evaluate('bicubic', 'Set5', scale=4, protocol='bicubic', data_root=data_root, progress=False),
        evaluate('input', 'Classic5', task='dejpeg', setting=10, data_root=data_root, progress=False)]))
    j = join_published(means, read_published(FOLDER))
    assert set(j.model) == {'bicubic', 'input'} and j.psnr_diff.notna().all()
    assert j.psnr_diff.abs().max() < 0.0051 and j.ssim_diff.abs().max() < 0.0011, j[['source', 'ssim_diff']]


def test_bad_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match='expected a folder'): read_published(tmp_path/'no')
    with pytest.raises(ValueError, match='found none'): read_published(tmp_path)


def test_claims_are_those_of_the_printed_ablations():
    claims = read_claims(FOLDER.parents[1]/'nbs/experiments/claims.yaml')
    printed = pd.read_csv(FOLDER/'csnln_ablations.csv').set_index('variant').psnr_db
    names = {'none': 'branches: none (10 convs)', 'patch 1': 'patch 1x1', 'patch 3': 'patch 3x3', 'patch 5': 'patch 5x5',
             **{n: f'fusion {n}' for n in ('addition', 'concatenation', 'mutual projection')}}
    variant = lambda arm: names.get(arm, f'branches: {arm}')
    from_csnln = {n: c for n, c in claims.items() if c['study'].startswith('ablation-csnln')}
    assert len(from_csnln) == 6 and len(claims) > 10
    for name, c in from_csnln.items():
        assert round(printed[variant(c['better'])] - printed[variant(c['worse'])], 2) == c['printed'], name
