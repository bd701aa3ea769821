"""Examples of what is built of a `HookedTransformer` are left out where TransformerLens has none."""

from iclgd_lens.models.hooked import HookedTransformer

collect_ignore = []
if HookedTransformer is None:
    collect_ignore += ["iclgd_lens/benchmarks/models.py", "iclgd_lens/benchmarks/run.py", "iclgd_lens/kernels/constructed.py"]
