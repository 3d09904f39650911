"""The guide's picture of the explorer: `python nbs/_book/explorer.py` saves a view of its page, in headless Chromium, as nbs/images/explorer.png."""
import shutil, subprocess, sys, tempfile
from pathlib import Path

import nbformat
from playwright.sync_api import Error, sync_playwright

CROSS = dict(model='csnln-tiny-x2', layer='cell.stages.0.project, recurrence 2', branch='3x3 cross-scale')
VIEW = f"Explorer('astronaut', model='msnlan-tiny-x2', against={CROSS}, point=(50, 11))"
PORT = 8867


def draw(path):
    "Two trained networks, one query; saved by the page's own button"
    chromium = shutil.which('chromium') or shutil.which('chromium-browser')
    if chromium is None: sys.exit('needs Chromium: make browser')
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(f'from msnlan.correlation.explorer import Explorer\n{VIEW}')])
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as play:
        nbformat.write(nb, f'{folder}/view.ipynb')
        server = subprocess.Popen([sys.executable, '-m', 'voila', 'view.ipynb', '--no-browser', f'--port={PORT}'], cwd=folder)
        try:
            page = play.chromium.launch(executable_path=chromium, args=['--no-sandbox']).new_page()
            for _ in range(60):                                              # until the server answers
                try: page.goto(f'http://localhost:{PORT}'); break
                except Error: page.wait_for_timeout(1000)
            page.wait_for_selector('.msnlan-explorer[data-count]', timeout=150_000)   # both maps are drawn
            with page.expect_download() as download: page.get_by_label('Save this view as PNG', exact=True).click()
            download.value.save_as(path)
        finally: server.terminate(); server.wait()


if __name__ == '__main__': draw(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1]/'images/explorer.png')
