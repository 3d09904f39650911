"""Figures of attention maps: one call each, every system, legible and the same bytes again; the notebook that makes them in batches."""
import io, json

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from conftest import ROOT
from msnlan.correlation import drawing, figures
from msnlan.correlation.recording import plot_maps, record
from test_correlation import SMALL, noise, small


def smooth(H, W):
    "A picture with structure"
    y, x = np.mgrid[:H, :W]
    return np.stack([127 + 120*np.sin(y/3), 127 + 120*np.sin(x/4), 127 + 60*np.sin(y/3 + x/4)], -1).astype(np.uint8)


SPECIAL = {'msnlan': [], 'csnln': ['0-scales'], 'panet': ['0-levels'], 'hspan': ['0-threshold'], 'mlrn': []}


def texts_inside(fig):
    "No title or label leaves the figure, no two titles of a row overlap"
    for _ in range(2): fig.draw_without_rendering()
    renderer, page = fig._get_renderer(), fig.bbox
    titles = []
    for ax in fig.findobj(lambda a: hasattr(a, 'title') and hasattr(a, 'get_title')):
        for t in (ax.title, ax.xaxis.label, ax.yaxis.label):
            if not t.get_text().strip() or not t.get_visible() or not (ax.axison or t is ax.title): continue
            box = t.get_window_extent(renderer)
            assert box.x0 >= page.x0 - 1 and box.y0 >= page.y0 - 1 and box.x1 <= page.x1 + 1 and box.y1 <= page.y1 + 1, t.get_text()
            if t is ax.title: titles.append((t.get_text(), box))
    for i, (a, box) in enumerate(titles):
        for b, other in titles[i+1:]: assert not box.overlaps(other), (a, b)


@pytest.mark.parametrize('name', ['csnln', 'panet', *[pytest.param(n, marks=pytest.mark.slow) for n in ('hspan', 'msnlan', 'mlrn')]])
@pytest.mark.parametrize('width', drawing.WIDTHS)
def test_the_set_of_every_system(name, width):
    "What suits the network is drawn, legibly, in one column and in two"
    features = record(small(name), smooth(18, 26))
    made = {n: fig for n, _, fig in figures.figure_set(features, [(7, 12)], 3, width=width)}
    assert list(made) == ['0', '0-patches', *SPECIAL[name], 'spread']
    for fig in [*made.values(), figures.overview(features, width=width)]:
        assert isinstance(fig, Figure) and fig.get_figwidth() == drawing.WIDTHS[width]
        texts_inside(fig)


@pytest.mark.parametrize('shape', [(1, 1), pytest.param((30, 7), marks=pytest.mark.slow), pytest.param((7, 40), marks=pytest.mark.slow)], ids=str)
def test_pictures_of_odd_shapes(shape):
    for _, _, fig in figures.figure_set(record(small('csnln'), smooth(*shape)), [(0, 0)], 2): fig.draw_without_rendering()


def test_grey_pictures():
    features = record(small('msnlan', n_colors=1), smooth(9, 11)[..., 0])
    for _, _, fig in figures.figure_set(features, [(3, 3)], 3): fig.draw_without_rendering()


def test_files_are_vector_and_the_same_again(tmp_path):
    features = record(small('csnln'), smooth(16, 22))
    made = [[f.read_bytes() for f in drawing.save_figure_as(figures.compare_scales([features, features], [(3, 3), (9, 9)]), tmp_path/str(i)/'x')]
            for i in range(2)]
    assert made[0] == made[1] and made[0][0].startswith(b'%PDF') and b'/Type /Font' in made[0][0] and made[0][1][:4] == b'\x89PNG'
    assert Image.open(io.BytesIO(made[0][1])).width == 1432


def test_a_map_is_bright_where_the_weight_is():
    "The drawn map has its largest lightness at the heaviest key, and boxes and query lie in picture coordinates"
    features = record(small('panet', levels=1), noise(12, 17, 3))
    (m,) = features.maps([(4, 13)])
    best = m.matches(0, 1)[0]
    fig = plot_maps(features.image, [m])
    ax = fig.axes[1]
    (shown,) = ax.get_images()
    assert shown.get_extent() == [0, 17, 12, 0] and ax.get_xlim() == (0, 17) and ax.get_ylim() == (12, 0)
    light = np.asarray(drawing.shade(features.image, drawing.strength(m.on_picture()[0]), backdrop=0)).sum(-1)
    assert np.unravel_index(light.argmax(), light.shape) == (best.row, best.column)
    boxes = [(p.get_y(), p.get_x(), p.get_height(), p.get_width()) for p in ax.patches]
    assert best.box in boxes and m.query_box() in boxes
    (ring,) = ax.get_lines()
    assert (ring.get_ydata()[0], ring.get_xdata()[0]) == (4.5, 13.5)


def test_colours_keep_their_order_in_grey():
    "Lightness of the map rises with the weight, and the colours of boxes differ in lightness or hue for every common vision"
    ramp = drawing.shade(np.zeros((1, 256), np.uint8), np.linspace(0, 1, 256)[None], backdrop=0)[0]
    assert (np.diff(ramp@[.2126, .7152, .0722]) > 0).all()
    assert set(drawing.MATCHES) | {drawing.QUERY} <= set(drawing.OKABE_ITO.values()) and drawing.QUERY not in drawing.MATCHES


def test_patches_are_cut_where_the_boxes_are():
    "A cross-scale patch of the figure shows the pixels of its box"
    features = record(small('csnln', scale=3), noise(18, 24, 3))
    fig = figures.engaged_patches(features, (5, 9), n=3, context=1)
    (m,) = features.maps([(5, 9)], features.calls[-1])
    shown = [ax.get_images()[0].get_array() for ax in fig.findobj(lambda a: hasattr(a, 'get_images') and a.get_images())]
    assert len(shown) == 5                                     # the picture, the query, three patches
    for f, got in zip(m.matches(0, 3, m.query_box()[2]), shown[2:]):
        top, left = int(f.top), int(f.left)
        rows, columns = [np.arange(a, a + 9).clip(0, n - 1) for a, n in ((top, 18), (left, 24))]
        assert f.height == f.width == 9 and np.array_equal(got[::40], drawing.cut_patch(features.image, f.box, 1, 120)[::40])
        assert np.array_equal(got[0, 0], features.image[rows[0], columns[0]]) and np.array_equal(got[-1, -1], features.image[rows[-1], columns[-1]])


@pytest.mark.slow
@pytest.mark.parametrize('name, config', [('csnln', dict(n_feats=8, depth=2)), ('msnlan-tiny', {})])
def test_the_notebook(tmp_path, name, config):
    "papermill: figures as PNG and PDF, numbers as JSON; named pictures and queries"
    import papermill
    parameters = dict(out=str(tmp_path), model=name, untrained=bool(config), config=config, pictures=['chelsea'], size=32, raster=4,
                      points=[[.5, .25], [.1, .9]], top=2)
    papermill.execute_notebook(ROOT/'nbs/experiments/attention_maps.ipynb', tmp_path/'run.ipynb', parameters, cwd=ROOT, progress_bar=False)
    result = json.loads((tmp_path/'result.json').read_text())
    assert {r['picture'] for r in result['rows']} == {'chelsea'} and {(r['row'], r['column']) for r in result['rows']} == {(16, 8), (3, 28)}
    for r in result['rows']:
        assert np.isclose(np.exp(r['entropy']), r['effective_keys']) and len(r['matches']) == 2 and len(r['matches'][0]['box']) == 4
    assert all((tmp_path/f).is_file() for g in result['figures'] for f in g['files']) and all(g['file'].endswith('.png') for g in result['figures'])
    assert len(result['rows']) == 2*(4 if config else 3)
