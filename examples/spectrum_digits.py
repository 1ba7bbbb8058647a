"""The Hessian spectrum of a small network on handwritten digits, from Python.

`curvlib spectrum` does the same from the command line. Run: python examples/spectrum_digits.py
"""

import curvlib as cl
from curvlib.demo import digits

demo = digits(seed=0)
print(f"trained to {demo.accuracy:.1%} on held-out digits")

risk = demo.risk()
H = cl.hessian(risk)
print(risk)
print(H)

top = cl.eigenpairs(H, k=10, seed=0)
for value, residual in zip(top.values.tolist(), top.residuals.tolist(), strict=True):
    print(f"  eigenvalue {value:8.4f}   residual {residual:.1e}")
print(f"gradient descent is stable up to a step of {2 / float(top.values.max()):.3g}")

spectrum = cl.density(H, steps=30, probes=2, deflate=top, seed=0)
print(f"trace {spectrum.trace:.3f} ± {spectrum.trace_stderr:.3f}")

# One layer after the other: the diagonal blocks of the Hessian.
for layer, block in H.blocks().items():
    largest = cl.eigenpairs(block, k=1, seed=0)
    print(f"layer {layer}: {block.shape[0]:5d} parameters, top {float(largest.values[0]):.4f}")
