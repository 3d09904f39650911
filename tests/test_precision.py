"""Training in bfloat16 autocast reaches float32's PSNR: the difference is below what another seed of float32 makes."""
import itertools
import numpy as np, pytest
from msnlan.data.patches import load_dataset
from msnlan.images import imwrite
from msnlan.training.trainer import train

NETWORK = dict(n_feats=16, n_resgroups=2, n_resblocks=1)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "Function of seed, precision, steps: validation PSNR, dB, after training on crops of pictures that come with scikit-image"
    folder, ways = tmp_path_factory.mktemp('precision'), itertools.count()
    for name in ('train', 'test'):
        for p in load_dataset(f'skimage-{name}')[:4]: imwrite(folder/name/f'{p.name}.png', p.read()[100:196, 100:196])
    def psnr(seed, precision, steps):
        settings = dict(model='msnlan', model_config=NETWORK, scale=2, data=[str(folder/'train')], validation=[str(folder/'test')], patch=12, batch=4,
                        lr=1e-3, schedule='cosine', steps=steps, validate_every=steps, checkpoint_every=steps, trackers=[], seed=seed, precision=precision)
        return train(settings, folder/f'run{next(ways)}', quiet=True, cpu=True)['psnr']
    return psnr


@pytest.mark.slow
def test_bf16_is_float32_within_noise_after_200_steps(trained):
    "The noise is what seeds of float32 differ by; a faster, coarser check is `test_training.test_other_arithmetic_stays_near`"
    one, half = [np.array([trained(seed, precision, 200) for seed in (1, 2, 3)]) for precision in ('no', 'bf16')]
    print(f'float32 {one.round(3)}, bf16 {half.round(3)}, noise {one.std(ddof=1):.3f} dB')
    assert np.abs(half - one).max() < np.ptp(one) and abs(half.mean() - one.mean()) < one.std(ddof=1)
