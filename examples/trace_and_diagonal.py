"""Traces layer by layer, the diagonal, and a log-determinant of a digits network, with errors.

`curvlib trace` and `curvlib diagonal` do most of it from the command line.
Run: python examples/trace_and_diagonal.py
"""

import curvlib as cl
from curvlib.demo import digits

risk = digits(seed=0).risk()
H, G = cl.hessian(risk), cl.ggn(risk)
print(risk)

# From independent probes: everything that 50 products tell at once.
answers = cl.estimate(H, of=["trace", "layers", "frobenius"], max_products=50, seed=0)
print(f"trace of the Hessian: {answers.trace:.2f} ± {answers.trace_stderr:.2f}")
print(f"its Frobenius norm:   {answers.frobenius:.2f} ± {answers.frobenius_stderr:.2f}")
for layer, value in answers.layers.items():
    print(f"  layer {layer}: trace {value:.2f} ± {answers.layers_stderr[layer]:.2f}")

# The same number of products, spent on a sketch first: the spectrum decays.
for op in (H, G):
    better = cl.trace(op, max_products=50, seed=0)
    low, high = better.interval
    print(f"{op.name}: {better.value:.3f} by {better.method}, 95 % {low:.3f} to {high:.3f}")

entries = cl.diagonal(G, max_products=50, seed=0)
means = entries.block_means("layers")
print(f"diagonal of the GGN by {entries.method}, means over layers:")
for layer in means.counts:
    value, stderr = (float(x[0]) for x in means.of(layer))
    print(f"  layer {layer}: {value:.2e} ± {stderr:.0e}")

# Functions of the eigenvalues, by Lanczos quadrature. The damping makes them well defined.
for function in (cl.logdet, cl.effective_dimension):
    found = function(G, 1e-3, steps=20, probes=2, seed=0)
    print(f"tr {found.function} of the GGN: {found.value:.1f} ± {found.stderr:.1f}")
