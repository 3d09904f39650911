"""A run that is killed ends with the bits of one that was not; damage, a full disk and a bad loss are survived."""
import errno, json, multiprocessing, os, random, resource, shutil, signal, subprocess, time
from pathlib import Path
import numpy as np, pytest, torch
from safetensors.torch import load_file
from msnlan.training.checkpointing import checkpoints, last_checkpoint
from msnlan.images import imwrite
from msnlan.training.trainer import Trainer, fit, make_config, train


def small_run(folder, **changes):
    "Settings of a run of a second on pictures of its own"
    rng = np.random.default_rng(0)
    for name, n in (('train', 3), ('test', 2)):
        for i in range(n):
            smooth = np.kron(rng.integers(0, 256, (8, 8, 3)), np.ones((6, 6, 1))).astype(np.uint8)
            if not (folder/name/f'{i}.png').exists(): imwrite(folder/name/f'{i}.png', smooth)
    return dict(dict(model='msnlan', model_config=dict(n_feats=16, n_resgroups=2, n_resblocks=1), patch=8, batch=4, lr=1e-3,
                     data=[str(folder/'train')], validation=[str(folder/'test')], steps=8, checkpoint_every=2, validate_every=4,
                     log_every=2, trackers=[]), **changes)


def in_child(settings, out, answer=None, limit=None):
    "Train in a process of its own; with `limit` no file may grow beyond so many bytes"
    torch.set_num_threads(1)
    if limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try: result = train(settings, out, quiet=True, cpu=True)
    except OSError as e: result = str(e)
    if answer: answer.send(result)


@pytest.fixture(scope='module')
def forks():
    "Processes that start with everything imported"
    ctx = multiprocessing.get_context('forkserver')
    ctx.set_forkserver_preload(['msnlan.training.trainer'])
    return ctx


def start(forks, *args):
    p = forks.Process(target=in_child, args=args)
    p.start()
    return p


def results(out):
    "All that a run leaves: weights, best weights, curves with digests"
    files = [load_file(out/f'{n}.safetensors') for n in ('weights', 'best')]
    return files, json.loads((out/'curves.json').read_text())


def assert_same_bits(one, other):
    (a, curves), (b, other_curves) = results(one), results(other)
    assert curves == other_curves
    for x, y in zip(a, b): assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


def steps_done(out):
    found = checkpoints(out)
    return int(found[-1].name[5:]) if found else 0


def kill_and_go_on(forks, settings, out, kills, seed):
    "SIGKILL `kills` times: a third at a random moment of the start, the others at random moments of the training"
    rng, killed, begin = random.Random(seed), 0, None
    for k in range(kills):
        p, t0 = start(forks, settings, out), time.monotonic()
        if begin and rng.random() < 1/3: time.sleep(rng.uniform(0, begin))
        else:
            first, goal = steps_done(out), settings['steps']*(k + rng.random())/(kills + 1)
            while p.is_alive() and steps_done(out) <= max(first, goal): time.sleep(0.002)
            begin = begin or time.monotonic() - t0
            time.sleep(rng.uniform(0, 0.15))
        p.kill(); p.join()
        killed += p.exitcode == -signal.SIGKILL
    p = start(forks, settings, out); p.join()
    assert p.exitcode == 0 and killed == kills, f'{killed} of {kills} kills hit a run in progress'


def check_kills(forks, tmp_path, kills, steps, optimizer='adam'):
    seed = random.randrange(10**6)
    print(f'seed {seed}')
    settings = small_run(tmp_path, steps=steps, checkpoint_every=1, ema=0.9, clip=1., schedule='cosine', warmup=3,
                         optimizer=optimizer)
    p = start(forks, settings, tmp_path/'whole'); p.join()
    kill_and_go_on(forks, settings, tmp_path/'killed', kills, seed)
    assert_same_bits(tmp_path/'whole', tmp_path/'killed')
    assert not list((tmp_path/'killed/checkpoints').glob('*.partial')) and len(checkpoints(tmp_path/'killed')) == 2


@pytest.mark.parametrize('optimizer', ['adam', 'muon'])
def test_killed_three_times_same_bits(forks, tmp_path, optimizer): check_kills(forks, tmp_path, 3, 24, optimizer)


@pytest.mark.slow
def test_killed_twenty_times_same_bits(forks, tmp_path): check_kills(forks, tmp_path, 20, 160)


def test_signal_to_the_whole_group_saves_and_goes_on(forks, tmp_path):
    "Ctrl-C reaches the loader processes too: they leave it to the trainer"
    settings = small_run(tmp_path, steps=4000, checkpoint_every=10, workers=2, validate_every=4000)
    here, there = forks.Pipe()
    p = forks.Process(target=in_own_group, args=(settings, tmp_path/'run', there)); p.start()
    while p.is_alive() and steps_done(tmp_path/'run') < 10: time.sleep(0.01)
    os.killpg(p.pid, signal.SIGINT); p.join(60)
    assert p.exitcode == 0 and here.poll(), 'the run did not save and return'
    summary = here.recv()
    assert summary['stopped'] == 'SIGINT' and 10 <= summary['steps'] < 4000
    assert steps_done(tmp_path/'run') == summary['steps']
    n = summary['steps'] + 3
    changes = dict(steps=n, workers=0, validation=[])
    train({**settings, **changes}, tmp_path/'run', quiet=True, cpu=True)
    train({**settings, **changes}, tmp_path/'whole', quiet=True, cpu=True)
    a, b = [load_file(tmp_path/f/'weights.safetensors') for f in ('run', 'whole')]
    assert all(torch.equal(a[k], b[k]) for k in a)


def in_own_group(*args): os.setsid(); in_child(*args)


@pytest.mark.parametrize('damage', ['byte', *[pytest.param(d, marks=pytest.mark.slow) for d in ('truncated', 'missing', 'unsealed')]])
def test_damaged_checkpoint_goes_back_one(tmp_path, capsys, damage):
    settings = small_run(tmp_path)
    train(settings, tmp_path/'whole', quiet=True, cpu=True)
    train(dict(settings, steps=6), tmp_path/'run', quiet=True, cpu=True)
    last = checkpoints(tmp_path/'run')[-1]
    file = last/('checksums.json' if damage == 'unsealed' else 'model.safetensors')
    if damage == 'byte': b = bytearray(file.read_bytes()); b[-1] ^= 1; file.write_bytes(b)
    elif damage == 'truncated': file.write_bytes(file.read_bytes()[:100])
    else: file.unlink()
    assert last_checkpoint(tmp_path/'run').name == 'step-00000004' and 'is damaged' in capsys.readouterr().err
    train(settings, tmp_path/'run', quiet=True, cpu=True)
    a, b = [load_file(tmp_path/f/'weights.safetensors') for f in ('run', 'whole')]
    assert all(torch.equal(a[k], b[k]) for k in a)


def check_not_written(message, out, step):
    assert f'checkpoint of step {step + 2} could not be written' in message and f'step-{step:08d}' in message, message
    assert steps_done(out) == step and last_checkpoint(out) and not list((out/'checkpoints').glob('*.partial'))


def test_file_size_limit_keeps_the_last_checkpoint(forks, tmp_path):
    "The writers of torch and safetensors report a failed write in ways of their own"
    settings = small_run(tmp_path)
    train(dict(settings, steps=4), tmp_path/'run', quiet=True, cpu=True)
    size = (last_checkpoint(tmp_path/'run')/'model.safetensors').stat().st_size
    for limit in (size//2, size + 1000):                # the weights do not fit; the weights do, Adam's moments do not
        here, there = forks.Pipe()
        p = start(forks, settings, tmp_path/'run', there, limit); p.join()
        assert p.exitcode == 0 and here.poll()
        check_not_written(here.recv(), tmp_path/'run', 4)
    train(settings, tmp_path/'run', quiet=True, cpu=True)
    train(settings, tmp_path/'whole', quiet=True, cpu=True)
    assert_same_bits(tmp_path/'run', tmp_path/'whole')


def test_full_disk_keeps_the_last_checkpoint(tmp_path):
    disk = tmp_path/'disk'; disk.mkdir()
    mounted = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=6m', 'tmpfs', disk], capture_output=True)
    if mounted.returncode: pytest.skip('mounting a small disk needs root')
    try:
        settings = small_run(tmp_path)
        train(dict(settings, steps=4, keep=1), disk/'run', quiet=True, cpu=True)
        free = shutil.disk_usage(disk).free
        (disk/'filler').write_bytes(bytes(free - 150_000))
        with pytest.raises(OSError, match='the disk is full') as e: train(dict(settings, keep=1), disk/'run', quiet=True, cpu=True)
        check_not_written(str(e.value), disk/'run', 4)
        (disk/'filler').unlink()
        assert train(dict(settings, keep=1), disk/'run', quiet=True, cpu=True)['steps'] == 8
    finally: subprocess.run(['umount', '-l', disk])


def test_no_space_while_sealing(tmp_path, monkeypatch):
    settings = small_run(tmp_path)
    train(dict(settings, steps=4), tmp_path/'run', quiet=True, cpu=True)
    def full(fd): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError, match='the disk is full') as e: train(settings, tmp_path/'run', quiet=True, cpu=True)
    check_not_written(str(e.value), tmp_path/'run', 4)


def test_not_finite_loss_saves_its_batch(tmp_path):
    calls = [0]
    def loss(out, hr):
        calls[0] += 1
        return (out - hr).abs().mean()*(float('nan') if calls[0] == 2*5 + 2 else 1)       # second micro-batch of step 5
    t = Trainer(make_config(small_run(tmp_path, accumulate=2)), tmp_path/'run', cpu=True, loss=loss, quiet=True)
    with pytest.raises(FloatingPointError, match='loss of step 5 is not finite'): fit(t)
    saved = load_file(next((tmp_path/'run').glob('not-finite-step-5-*.safetensors')))
    assert torch.equal(saved['lr'], torch.stack([t.train_set[i][0] for i in (22, 23)])) and saved['output'].isfinite().all()
    assert steps_done(tmp_path/'run') == 4 and all(w.isfinite().all() for w in t.net.parameters())


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    t = Trainer(make_config(small_run(tmp_path, validation=[])), tmp_path/'run', cpu=True, quiet=True)
    fit(t)
    with torch.no_grad(): t.net.head.weight[0] = float('inf')
    from msnlan.training.trainer import save_run
    with pytest.raises(FloatingPointError, match='head.weight is not finite'): save_run(t)


def test_another_recipe_is_refused_and_never_starts_again(tmp_path):
    settings = small_run(tmp_path)
    train(settings, tmp_path/'run', quiet=True, cpu=True)
    with pytest.raises(ValueError, match='seed = 1, asked for is 2'): train(dict(settings, seed=2), tmp_path/'run', quiet=True, cpu=True)
    again = train(dict(settings, seed=2, steps=2, validate_every=9), tmp_path/'run', 'never', quiet=True, cpu=True)
    assert again['steps'] == 2 and steps_done(tmp_path/'run') == 2


def test_checkpoints_of_an_older_version_go_on(tmp_path):
    "Settings and state that came later have their defaults"
    settings = small_run(tmp_path)
    train(dict(settings, steps=4), tmp_path/'run', quiet=True, cpu=True)
    recipe = tmp_path/'run/config.json'
    old = {k: v for k, v in json.loads(recipe.read_text()).items() if k not in ('level', 'hr_patch', 'cache', 'trackers')}
    recipe.write_text(json.dumps(old))
    assert train(settings, tmp_path/'run', quiet=True, cpu=True)['steps'] == 8
