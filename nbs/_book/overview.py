"""The picture at the head of the README: `python nbs/_book/overview.py` draws nbs/images/overview.png from a photograph that no network saw."""
import sys
from pathlib import Path
import matplotlib
matplotlib.use('agg')
import matplotlib.pyplot as plt
import numpy as np

import msnlan
from msnlan.correlation import record
from msnlan.data.sets import load_dataset
from msnlan.images import imresize
from msnlan.metrics import psnr

PICTURE, TOP, LEFT, SIDE, QUERY = 'chelsea', 60, 90, 192, (16, 40)


def draw(path):
    "Original, bicubic, the shipped network at x4, and what one pixel looks at"
    hr = {p.name: p for p in load_dataset('skimage-test')}[PICTURE].read()[TOP:TOP + SIDE, LEFT:LEFT + SIDE]
    lr = imresize(hr, 1/4)
    net = msnlan.create_model('msnlan-tiny', scale=4, pretrained=True).eval()
    bicubic, sr = imresize(lr, 4), msnlan.predict(net, lr)
    maps = record(net, lr).maps([QUERY])
    score = lambda img: f'{psnr(img, hr, 4):.2f} dB'
    shown = [(hr, 'original'), (bicubic, f'bicubic x4, {score(bicubic)}'), (sr, f'msnlan-tiny x4, {score(sr)}')]
    fig, axes = plt.subplots(1, 4, figsize=(10, 2.75), layout='constrained')
    for ax, (img, title) in zip(axes, shown): ax.imshow(img); ax.set_title(title, fontsize=9)
    m = max(maps, key=lambda m: m.effective_keys[0])                            # the layer that looks at most
    weights = m.on_picture(*lr.shape[:2])[0]
    strength = 1 + np.log10(np.maximum(weights/weights.max(), 1e-3))/3             # 0: a thousandth of the strongest
    grey = np.repeat(lr.mean(-1, keepdims=True)/255*.45, 3, -1)
    axes[3].imshow(np.where((strength > 0)[..., None], matplotlib.colormaps['autumn'](strength)[..., :3], grey))
    axes[3].plot(QUERY[1], QUERY[0], 's', mec='white', mfc='none', ms=7); axes[3].set_title(f'what one pixel looks at (p = {m.patch}, log)', fontsize=9)
    for ax in axes: ax.set_axis_off()
    fig.savefig(path, dpi=90, metadata={'Software': None})


if __name__ == '__main__': draw(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1]/'images/overview.png')
