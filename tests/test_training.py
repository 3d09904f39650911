"""What the trainer's settings do, where its pictures come from, and what a person can follow."""
import json, multiprocessing, os, shutil
from functools import partial
import numpy as np, pytest, torch
from safetensors.torch import load_file
from test_checkpoints import assert_same_bits, small_run
from msnlan.data.patches import make_pairs
from msnlan.models.zoo import create_model
from msnlan.data.pairs import mapped_pairs
from msnlan.training.recipes import list_recipes, load_recipe
from msnlan.data.registry import Picture
from msnlan.training.trainer import LiveCurves, Trainer, fit, make_config, train


def losses(settings, out, **kw):
    train(settings, out, quiet=True, cpu=True, **kw)
    return np.array(json.loads((out/'curves.json').read_text())['loss'])


def test_accumulation_is_the_same_step(tmp_path):
    one = losses(small_run(tmp_path, log_every=1, lr=1e-4), tmp_path/'one')
    four = losses(small_run(tmp_path, log_every=1, lr=1e-4, accumulate=4), tmp_path/'four')
    np.testing.assert_allclose(one[:, 1], four[:, 1], rtol=1e-4)


def test_clipping_bounds_the_gradient(tmp_path):
    t = Trainer(make_config(small_run(tmp_path, clip=1e-3)), tmp_path/'run', cpu=True, quiet=True)
    norms, step = [], t.optimizer.step
    def watched(*args, **kw):
        norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in t.net.parameters() if p.grad is not None])))
        return step(*args, **kw)
    t.optimizer.step = watched
    fit(t)
    assert len(norms) == 8 and max(norms) <= 1e-3*1.001 and min(norms) > 0.9e-3


def test_averaged_weights(tmp_path):
    t = Trainer(make_config(small_run(tmp_path, ema=0.2, steps=3)), tmp_path/'run', cpu=True, quiet=True)
    seen, update = [], t.average.update_parameters
    def watched(net): seen.append(net.head.weight.detach().clone()); update(net)
    t.average.update_parameters = watched
    fit(t)
    torch.testing.assert_close(load_file(tmp_path/'run/weights.safetensors')['head.weight'],
                               (seen[0]*2/11 + seen[1]*9/11)*.2 + seen[2]*.8)          # decays 2/11, then 0.2


@pytest.mark.parametrize('change', [dict(precision='bf16'),
                         pytest.param(dict(channels_last=True), marks=pytest.mark.slow)], ids=str)
def test_other_arithmetic_stays_near(tmp_path, change):
    plain = losses(small_run(tmp_path, log_every=1), tmp_path/'plain')
    other = losses(small_run(tmp_path, log_every=1, **change), tmp_path/'other')
    np.testing.assert_allclose(other[:, 1], plain[:, 1], rtol=3e-2)
    assert load_file(tmp_path/'other/weights.safetensors')['head.weight'].dtype == torch.float32


@pytest.mark.slow
def test_compiled(tmp_path):
    plain = losses(small_run(tmp_path, log_every=1), tmp_path/'plain')
    losses(small_run(tmp_path, log_every=1, compile=True, steps=4), tmp_path/'other')
    other = losses(small_run(tmp_path, log_every=1, compile=True), tmp_path/'other')           # goes on, compiled
    np.testing.assert_allclose(other[:, 1], plain[:, 1], rtol=1e-4)
    create_model('msnlan', scale=2, **small_run(tmp_path)['model_config']).load_state_dict(load_file(tmp_path/'other/weights.safetensors'))


def test_learning_rate_follows_the_schedule(tmp_path):
    steps = losses(small_run(tmp_path, log_every=1, schedule='multistep', milestones=[4, 6], warmup=2, lr=8e-4), tmp_path/'run')
    np.testing.assert_allclose(steps[:, 2], [8e-4, 8e-4, 8e-4, 4e-4, 4e-4, 2e-4, 2e-4, 2e-4])   # after each step: the next one's


def test_workers_and_mapped_pictures_change_no_bit(tmp_path):
    train(small_run(tmp_path), tmp_path/'plain', quiet=True, cpu=True)
    train(small_run(tmp_path, workers=2, cache=str(tmp_path/'cache')), tmp_path/'other', quiet=True, cpu=True)
    assert_same_bits(tmp_path/'plain', tmp_path/'other')
    assert len(list((tmp_path/'cache').glob('*.pairs'))) == 1


def map_pictures(folder, answer):
    "In a process of its own"
    rng = np.random.default_rng(0)
    pictures = [Picture(f'p{i}', array=rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for i in range(6)]
    pairs = mapped_pairs(partial(make_pairs, scale=2), pictures, 2, folder=folder)
    answer.send((pairs.path.stat().st_mtime_ns, [int(lr.sum()) for lr, _ in pairs]))


def test_processes_share_one_file_of_pictures(tmp_path):
    ctx = multiprocessing.get_context('forkserver')
    ctx.set_forkserver_preload(['msnlan.training.trainer'])
    ends = [ctx.Pipe() for _ in range(3)]
    runs = [ctx.Process(target=map_pictures, args=(tmp_path, there)) for _, there in ends]
    for r in runs: r.start()
    for r in runs: r.join(60)
    assert [r.exitcode for r in runs] == [0, 0, 0]
    answers = [here.recv() for here, _ in ends]
    assert answers[0] == answers[1] == answers[2] and len(list(tmp_path.glob('*.pairs'))) == 1
    assert not list(tmp_path.glob('.*.partial'))


def test_full_disk_leaves_pictures_in_memory(tmp_path, monkeypatch):
    def full(fd): raise OSError(28, os.strerror(28))
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.warns(UserWarning, match='stay in memory'):
        pairs = mapped_pairs(make_pairs, [Picture('a', array=np.zeros((8, 8, 3), np.uint8))], 1, folder=tmp_path)
    assert isinstance(pairs, list) and not list(tmp_path.glob('*partial*'))


def test_restoration_trains(tmp_path):
    settings = small_run(tmp_path, model='panet', model_config=dict(task='dejpeg', n_feats=16, n_resblocks=2), level=10)
    summary = train(settings, tmp_path/'run', quiet=True, cpu=True)
    assert summary['steps'] == 8 and summary['scale'] == 1 and summary['psnr'] > 5
    with pytest.raises(ValueError, match='level: expected a noise sigma or JPEG quality'): train(dict(settings, level=0), tmp_path/'b', quiet=True)


def test_events_for_tensorboard_have_no_step_twice(tmp_path):
    tensorboard = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    settings = small_run(tmp_path, trackers=['tensorboard'])
    train(dict(settings, steps=5, checkpoint_every=4), tmp_path/'run', quiet=True, cpu=True)
    shutil.rmtree(tmp_path/'run/checkpoints/step-00000005')                     # as if killed before it
    train(settings, tmp_path/'run', quiet=True, cpu=True)
    events = tensorboard.EventAccumulator(str(tmp_path/'run/tensorboard/msnlan')); events.Reload()
    assert [e.step for e in events.Scalars('train/loss')] == [2, 4, 6, 8]
    assert [e.step for e in events.Scalars('validation/PSNR, dB')] == [4, 8]
    curve = json.loads((tmp_path/'run/curves.json').read_text())['loss']
    np.testing.assert_allclose([e.value for e in events.Scalars('train/loss')], [row[1] for row in curve], rtol=1e-6)


def test_live_curves_and_summary(tmp_path):
    live = LiveCurves(every=0)
    summary = fit(Trainer(make_config(small_run(tmp_path)), tmp_path/'run', cpu=True, quiet=True), watch=live)
    assert live.drawn == 6                                                    # four points of the loss, two validations
    assert json.loads((tmp_path/'run/summary.json').read_text()) == json.loads(json.dumps(summary))
    assert summary['steps'] == 8 and summary['patches_per_second'] > 0 and summary['best'] >= summary['psnr'] - 1e-9


@pytest.mark.parametrize('name', list_recipes())
def test_recipes_make_their_networks(name):
    recipe = load_recipe(name)
    task = recipe.model_config.get('task', 'sr')
    with torch.device('meta'): net = create_model(recipe.model, **({} if task != 'sr' else dict(scale=recipe.scale)), **recipe.model_config)
    assert net.task == task
    if name in ('default', 'shipped', 'tiny'): return                                 # ours, not a paper's
    with torch.device('meta'): plain = create_model(recipe.model, scale=net.scale, **dict(task=task) if recipe.model == 'panet' else {})
    assert plain.config == net.config                                         # the network is the paper's
    assert recipe.batch == 16 and recipe.steps % 1000 == 0 and recipe.schedule == 'multistep' and recipe.data


def test_the_papers_numbers():
    "As the papers state them"
    r = load_recipe
    assert [(r(n).patch, r(n).steps, r(n).lr, tuple(r(n).milestones)) for n in ('msnlan', 'hspan', 'panet-sr', 'panet-denoise')] == \
        4*[(48, 1_000_000, 1e-4, (200_000, 400_000, 600_000, 800_000))]
    assert (r('csnln').steps, tuple(r('csnln').milestones)) == (500_000, (150_000, 300_000, 450_000))
    assert [r('mlrn', dict(scale=s)).patch for s in (2, 3, 4)] == [96, 64, 48]
    assert [r('msnlan-program', dict(scale=s)).patch for s in (2, 3, 4)] == [96, 64, 48] and r('msnlan-program').lr == 2e-4
