"""The explorer in headless Chromium: as voila's page and in JupyterLab. Requests to other machines are blocked and counted."""
import hashlib, os, re, shutil, signal, socket, subprocess, sys, time
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit
import numpy as np, pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser')
FLAGS = ('--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking '
         '--disable-component-update --disable-sync').split()
PATIENCE = 150_000   # ms, for a machine that is busy

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason='needs Chromium: make browser')


def free_port():
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); return s.getsockname()[1]


@contextmanager
def serving(command, port, folder):
    "A server of its own process group, with settings and caches in `folder`"
    env = {k: v for k, v in os.environ.items() if not k.startswith(('JUPYTER', 'COVERAGE'))}
    env |= {n: str(folder/n.lower()) for n in ('JUPYTER_CONFIG_DIR', 'JUPYTER_RUNTIME_DIR', 'JUPYTER_DATA_DIR', 'IPYTHONDIR')}
    log = folder/'log'
    with open(log, 'wb') as out:
        server = subprocess.Popen([sys.executable, '-m', *command], cwd=folder, env=env, stdout=out, stderr=out,
                                  start_new_session=True)
    try:
        end = time.monotonic() + 120
        while socket.socket().connect_ex(('127.0.0.1', port)):
            if server.poll() is not None or time.monotonic() > end: pytest.fail('no server: ' + log.read_text()[-2000:])
            time.sleep(.2)
        yield f'http://127.0.0.1:{port}'
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try: server.wait(20)
        except subprocess.TimeoutExpired: os.killpg(server.pid, signal.SIGKILL); server.wait()


@pytest.fixture(scope='module')
def voila(tmp_path_factory):
    folder, port = tmp_path_factory.mktemp('voila'), free_port()
    command = ['msnlan.cli', 'explore', 'coffee', '--port', str(port), '--no-browser', '--side', '64']
    with serving(command, port, folder) as url: yield url


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    folder, port = tmp_path_factory.mktemp('lab'), free_port()
    shutil.copy(ROOT/'nbs/explore.ipynb', folder)
    command = ['jupyterlab', '--no-browser', f'--port={port}', '--ServerApp.ip=127.0.0.1', '--allow-root',
               f'--ServerApp.root_dir={folder}', '--IdentityProvider.token=', '--LabApp.news_url=None',
               '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate', '--LabApp.extension_manager=readonly']
    with serving(command, port, folder) as url: yield f'{url}/lab/tree/explore.ipynb'


@pytest.fixture(scope='module')
def chromium():
    playwright = pytest.importorskip('playwright.sync_api', reason='needs playwright')
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture()
def page(chromium):
    "A page whose test fails if anything outside was asked for, or anything went wrong in the browser"
    context = chromium.new_context(viewport=dict(width=1280, height=1000), accept_downloads=True)
    outside, errors = [], []
    def guard(route):
        url = urlsplit(route.request.url)
        if url.scheme in ('data', 'blob') or url.hostname in ('127.0.0.1', 'localhost'): return route.continue_()
        outside.append(route.request.url); route.abort()
    context.route('**/*', guard)
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.on('console', lambda m: m.type == 'error' and errors.append(m.text))
    page.on('pageerror', lambda e: errors.append(str(e)))
    page.on('websocket', lambda w: urlsplit(w.url).hostname in ('127.0.0.1', 'localhost') or outside.append(w.url))
    yield page
    context.close()
    assert outside == [] and errors == []


class Driver:
    "What a reader does, in a page that shows the explorer"
    def __init__(self, page):
        self.page, self.root = page, page.locator('.msnlan-explorer')
        page.wait_for_selector('.msnlan-explorer[data-count]')

    def count(self): return int(self.root.get_attribute('data-count'))

    def answered(self, act):
        "Do something and wait until its answer is drawn"
        before = self.count()
        act()
        self.page.wait_for_function('n => Number(document.querySelector(".msnlan-explorer").dataset.count) > n', arg=before)

    def drawn(self, panel=0):
        "A fingerprint of what a panel shows"
        return hashlib.sha1(self.page.evaluate("i => document.querySelectorAll('.mx-picture')[i].toDataURL()", panel).encode()).hexdigest()

    def label(self, text): return self.root.get_by_label(text, exact=True)

    def point(self): return [int(self.label(n).input_value()) for n in ('Row', 'Column')]

    def click(self, row, column, panel=0):
        canvas = self.root.locator('.mx-picture').nth(panel)
        height, width = int(self.label('Row').get_attribute('max')) + 1, int(self.label('Column').get_attribute('max')) + 1
        box = canvas.bounding_box()
        at = dict(x=(column + .5)*box['width']/width, y=(row + .5)*box['height']/height)
        self.answered(lambda: canvas.click(position=at))
        assert self.point() == [row, column]


def run_all(page):
    "Run a notebook's cells in JupyterLab, which may ask for a kernel while it is starting one"
    page.get_by_role('menuitem', name='Run', exact=True).click()
    page.get_by_text('Run All Cells', exact=True).click()
    page.wait_for_selector('.jp-Dialog .jp-mod-accept, .msnlan-explorer[data-count]')
    if page.locator('.jp-Dialog .jp-mod-accept').count(): page.locator('.jp-Dialog .jp-mod-accept').click()


def three_clicks(driver):
    seen = {driver.drawn()}
    for row, column in (5, 7), (20, 41), (33, 12):
        driver.click(row, column); seen.add(driver.drawn())
    assert len(seen) == 4, 'each click changes the picture'


def full_tour(page, tmp_path):
    "Open, click, change branch, compare, keyboard, look, upload, export"
    driver = Driver(page)
    three_clicks(driver)
    seen = driver.drawn()
    driver.answered(lambda: driver.label('Branch').first.select_option('7x7 in-scale'))
    assert driver.drawn() != seen, 'another branch, another map'

    driver.answered(lambda: driver.label('Maps').select_option('2'))
    first, second = driver.drawn(0), driver.drawn(1)
    assert first != second
    driver.click(14, 40, panel=1)
    assert driver.drawn(0) != first and driver.drawn(1) != second, 'the pixel is linked'
    driver.answered(lambda: driver.label('Model').nth(1).select_option('mlrn (untrained)'))
    assert 'mlrn' in driver.root.locator('.mx-picture').nth(1).get_attribute('aria-label')

    canvas = driver.root.locator('.mx-picture').first
    canvas.focus()
    driver.answered(lambda: page.keyboard.press('ArrowRight'))
    driver.answered(lambda: page.keyboard.press('Shift+ArrowDown'))
    assert driver.point() == [24, 41]
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == 'solid', 'the focus can be seen'

    second = 'document.querySelectorAll(".mx-picture")[1].toDataURL()'         # its weights are no single key's
    for act in (lambda: driver.label('Colours').select_option('viridis'), lambda: driver.label('Opacity of the map').fill('0.3'),
                lambda: driver.label('Scale').select_option(label='linear'),      # beside the first map's one key nothing is left to see
                lambda: driver.label('Zoom in').click()):
        before = page.evaluate(second)
        act()
        page.wait_for_function(f'was => {second} != was', arg=before)

    bad = tmp_path/'notes.png'; bad.write_text('no picture')
    driver.answered(lambda: driver.root.locator('input[accept="image/*"]').set_input_files(bad))
    assert 'notes.png is not a picture' in driver.root.get_by_role('alert').inner_text()
    rng, large = np.random.default_rng(0), tmp_path/'large.png'
    pixels = np.kron(rng.integers(0, 256, (30, 40), dtype=np.uint8), np.ones((100, 100), np.uint8))
    pixels[:1500, :1500] = rng.integers(0, 256, (1500, 1500))                 # more than one message's bytes
    Image.fromarray(pixels).save(large)
    driver.answered(lambda: driver.root.locator('input[accept="image/*"]').set_input_files(large))
    assert re.search('Reduced from 4000 x 3000 to .* pixels', driver.root.inner_text())
    assert driver.root.get_by_role('alert').count() == 0, 'the message is gone'
    driver.answered(lambda: driver.label('Set').select_option('photographs'))
    driver.answered(lambda: driver.label('Picture').select_option('coffee'))

    with page.expect_download() as download: driver.label('Save this view as PNG').click()
    row, column = driver.point()
    assert download.value.suggested_filename == f'coffee-{row}-{column}.png'
    download.value.save_as(tmp_path/'view.png')
    view = np.asarray(Image.open(tmp_path/'view.png').convert('RGB'))
    assert view.shape[1] == 2*(512 + 16) + 16 and len(np.unique(view.reshape(-1, 3), axis=0)) > 200

    driver.root.locator('.mx-cell summary').click()
    code = driver.root.locator('.mx-code').inner_text()
    scope = {}
    exec(code.replace('Explorer(', 'again = Explorer(', 1), scope)
    again = scope['again']
    assert again.point == [row, column] and again.panels[1]['model'] == 'mlrn (untrained)' and again.code == code
    labels = page.evaluate("""[...document.querySelectorAll('.msnlan-explorer :is(select, input:not([hidden]), button, canvas.mx-picture)')]
        .filter(n => !(n.labels && n.labels.length) && !n.getAttribute('aria-label') && !n.textContent.trim())
        .map(n => n.outerHTML)""")
    assert labels == [], 'every control has a name'


@pytest.mark.slow
def test_voila_page_answers_clicks(voila, page):
    page.goto(voila, wait_until='commit')
    three_clicks(Driver(page))


def settled(page):
    page.wait_for_function('() => document.querySelector(".msnlan-explorer").getAttribute("aria-busy") === "false"')
    time.sleep(1.)


@pytest.mark.slow
def test_what_a_new_user_saw(voila, page, tmp_path):
    "Pyramid colours do not saturate; the read-out follows the map; the last choice stands; no weight, no paint"
    page.goto(voila, wait_until='commit')
    driver = Driver(page)
    model, canvas = driver.label('Model').first, driver.root.locator('.mx-picture').first
    driver.answered(lambda: model.select_option('panet (untrained)'))
    driver.click(14, 36)
    pixels = page.evaluate("""() => { const c = document.querySelector('.mx-picture'), d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
        return Array.from({length: 4000}, (_, i) => [...d.slice(4*Math.floor(i*c.width*c.height/4000), 4*Math.floor(i*c.width*c.height/4000) + 3)].join()) }""")
    assert max(pixels.count(p) for p in set(pixels)) < 1000, 'few pixels share a colour'

    box = canvas.bounding_box()
    canvas.hover(position=dict(x=box['width']/2, y=box['height']/2))
    under = driver.root.locator('.mx-under').first
    before = under.inner_text()
    canvas.focus()
    driver.answered(lambda: page.keyboard.press('Shift+ArrowDown'))
    assert under.inner_text() != before and under.inner_text().split(':')[0] == before.split(':')[0], 'same place, another weight'

    for column in 10, 30, 50:
        driver.answered(lambda: model.select_option('msnlan-tiny-x2'))
        model.select_option('csnln (untrained)'); time.sleep(.4)
        canvas.click(position=dict(x=column, y=20))
        model.select_option('mlrn (untrained)')
        settled(page)
        assert model.input_value() == 'mlrn (untrained)' and 'Map of mlrn' in canvas.get_attribute('aria-label')
    driver.answered(lambda: model.select_option('msnlan-tiny-x2'))
    match = driver.drawn()
    driver.answered(lambda: driver.label('Map of').select_option('mixture'))
    assert driver.drawn() != match and 'Sum of the mixture' in driver.root.inner_text()
    driver.answered(lambda: driver.label('Map of').select_option('match'))


@pytest.mark.slow
def test_other_weights_and_several_maps(voila, page, tmp_path):
    "What comes out with other weights; four maps on one scale; a difference; a figure as PDF; a session; cancel"
    page.goto(voila, wait_until='commit')
    driver = Driver(page)
    driver.answered(lambda: driver.label('What comes out').check())
    results = driver.root.locator('.mx-results figure')
    assert results.count() == 3, 'output, truth, error'
    for weights in 'none', 'uniform', 'top-k', 'random', 'shuffled', 'local window', 'sparsemax':
        driver.answered(lambda: driver.label('Weights').select_option(weights))
        page.wait_for_function('document.querySelectorAll(".mx-results figure").length === 5')
        assert 'dB' in results.nth(1).inner_text(), weights
    assert 'counterfactual: trained with softmax' in driver.root.inner_text()
    worst = driver.root.get_by_role('button', name='Go to the largest error')
    driver.answered(worst.click)
    driver.answered(lambda: driver.label('Weights').select_option(''))
    driver.answered(lambda: driver.label('What comes out').uncheck())

    driver.answered(lambda: driver.label('Maps').select_option('4'))
    canvases = driver.root.locator('.mx-picture:visible')
    assert canvases.count() == 4
    before = driver.drawn(1)
    driver.label('Difference to the first').check()
    page.wait_for_function('was => document.querySelectorAll(".mx-legend")[1].textContent.includes("against the first")')
    assert driver.drawn(1) != before and driver.drawn(0)
    canvases.first.hover()
    assert all('row' in t for t in driver.root.locator('.mx-under').all_inner_texts()), 'the pointer is linked'
    for kind in 'pdf single', 'svg double':
        driver.label('Figure for a paper').select_option(kind)
        with page.expect_download() as download: driver.label('Save the maps as a figure in vectors').click()
        download.value.save_as(tmp_path/'figure')
        assert (tmp_path/'figure').read_bytes()[:5] in (b'%PDF-', b'<?xml')
    with page.expect_download() as download: driver.label('Save all choices as a small file').click()
    download.value.save_as(tmp_path/'session.json')
    driver.answered(lambda: driver.label('Maps').select_option('1'))
    driver.answered(lambda: driver.root.locator('input[accept=".json"]').set_input_files(tmp_path/'session.json'))
    assert canvases.count() == 4 and driver.label('Difference to the first').is_checked()


@pytest.mark.slow
def test_on_a_phone(voila, page):
    "The picture is on the first screen, nothing is wider than the screen, the controls are one touch away"
    page.set_viewport_size(dict(width=390, height=844))
    page.goto(voila, wait_until='commit')
    driver = Driver(page)
    canvas, weights = driver.root.locator('.mx-picture').first, driver.label('Weights')
    assert canvas.bounding_box()['y'] < 700 and not weights.is_visible()
    driver.root.locator('.mx-more summary').click()
    assert weights.is_visible()
    wide = page.evaluate("[...document.querySelectorAll('.msnlan-explorer *')].filter(n => n.getBoundingClientRect().right > innerWidth + 1).length")
    assert wide == 0


@pytest.mark.slow
def test_500_clicks_are_quick_and_leave_nothing(voila, page):
    "The median of 500 clicks is below 0.3 s, and the page's memory does not grow"
    page.goto(voila, wait_until='commit')
    driver, rng = Driver(page), np.random.default_rng(0)
    session = page.context.new_cdp_session(page)
    session.send('HeapProfiler.enable')
    def heap():
        session.send('HeapProfiler.collectGarbage')
        return session.send('Runtime.getHeapUsage')['usedSize']/2**20
    click = """at => new Promise(done => { const root = document.querySelector('.msnlan-explorer'), canvas = root.querySelector('.mx-picture'),
        box = canvas.getBoundingClientRect(), was = Number(root.dataset.count), start = performance.now();
        new MutationObserver((_, o) => { if (Number(root.dataset.count) > was) { o.disconnect(); done(performance.now() - start); } }).observe(root, {attributes: true});
        const where = {bubbles: true, pointerId: 1, clientX: box.left + at[1]*box.width, clientY: box.top + at[0]*box.height};
        canvas.setPointerCapture = () => {}; canvas.dispatchEvent(new PointerEvent('pointerdown', where)); })"""
    times, held = [], []
    for i in range(500):
        times.append(page.evaluate(click, [(i*37%64 + .5)/64, (i*11%64 + .5)/64]))
        if i%100 == 99: held.append(heap())
    print(f'median {np.median(times):.0f} ms, 95 % {np.quantile(times, .95):.0f} ms, heap {held} MB')
    assert np.median(times) < 300 and held[-1] - held[0] < 3, (np.median(times), held)


@pytest.mark.slow
def test_voila_page(voila, page, tmp_path):
    page.goto(voila, wait_until='commit')
    full_tour(page, tmp_path)


@pytest.mark.slow
def test_jupyterlab(lab, page, tmp_path):
    page.goto(lab, wait_until='commit')
    page.wait_for_selector('.jp-Notebook .jp-Cell')
    page.get_by_text('| Idle').wait_for()                                     # the status bar: the kernel is there
    run_all(page)
    full_tour(page, tmp_path)
