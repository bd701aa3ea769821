"""In-context learning against gradient descent, layer by layer, on any TransformerLens model.

>>> import iclgd_lens as lens
>>> model = lens.load_model("bundled")
>>> episode = lens.load_task("bundled/remapped").episode(model, k=12, n_queries=16, seed=0)
>>> zsl = lens.capture(model, episode.queries)
>>> icl = lens.capture(model, episode.queries, context=episode.demonstrations)
>>> update = lens.lcgd(model, episode.demonstrations, lr=0.01)
>>> ft = lens.capture(model, episode.queries, update=update)
>>> list(lens.sim_aou(icl, ft, zsl).shape)
[16, 4]
"""

import lazy_loader

# The names, and where they live, are in __init__.pyi. They are imported when first used: torch and TransformerLens take seconds.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
