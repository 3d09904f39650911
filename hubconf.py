"""Entries for torch.hub: `torch.hub.load('.../msnlan', 'msnlan_tiny', scale=2)`; each takes the keywords of `msnlan.create_model`."""
dependencies = ['torch', 'numpy', 'safetensors', 'huggingface_hub', 'scipy', 'PIL']


def _entry(name, pretrained):
    def entry(pretrained=pretrained, **config):
        from msnlan.models.zoo import create_model
        return create_model(name, pretrained=pretrained, **config).eval()
    entry.__name__ = name.replace('-', '_')
    entry.__doc__ = f'Network {name}; keywords as for msnlan.create_model, e.g. scale=2'
    return entry


msnlan = _entry('msnlan', False)
msnlan_tiny = _entry('msnlan-tiny', True)
csnln = _entry('csnln', False)
panet = _entry('panet', False)
hspan = _entry('hspan', False)
mlrn = _entry('mlrn', False)
slot = _entry('slot', False)
csnln_tiny = _entry('csnln-tiny', False)
panet_tiny = _entry('panet-tiny', False)
hspan_tiny = _entry('hspan-tiny', False)
mlrn_tiny = _entry('mlrn-tiny', False)
