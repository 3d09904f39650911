"""Packaging: everything is read from settings.ini, which nbdev reads too; `TRAVELS` of msnlan/basics.py says which folders go along."""
import runpy, shutil
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
cfg = ConfigParser(delimiters=['='])
cfg.read(HERE/'settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']
readme = HERE/'README.md'
extras = {k: cfg[f'{k}_requirements'].split() for k in ('gpu', 'export', 'foreign', 'perceptual', 'dev')}


class WithFolders(build_py):
    "A wheel holds the experiment notebooks, presets, recipes and papers' numbers; an editable installation finds them in the clone"
    def run(self):
        super().run()
        if getattr(self, 'editable_mode', False): return
        skip = shutil.ignore_patterns('.*', '__pycache__', 'runs')
        for name, folder in runpy.run_path(str(HERE/'msnlan/basics.py'))['TRAVELS'].items():
            to = Path(self.build_lib)/'msnlan'/name
            shutil.rmtree(to, ignore_errors=True)
            shutil.copytree(HERE/folder, to, ignore=skip)


setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    author=cfg['author'], author_email=cfg['author_email'], license='Apache-2.0', license_files=['LICENSE'],
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else '',
    long_description_content_type='text/markdown',
    python_requires=f">={cfg['min_python']}", install_requires=cfg['requirements'].split(), extras_require=extras,
    packages=find_packages(include=['msnlan', 'msnlan.*']), cmdclass={'build_py': WithFolders},
    package_data={'msnlan': ['weights/*', 'data/*.csv', 'correlation/static/*.*', 'reproduce/static/*.*', 'correlation/static/voila/templates/explorer/*']},
    entry_points={'console_scripts': cfg['console_scripts'].split()}, zip_safe=False,
)
