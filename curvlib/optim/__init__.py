"""Optimizers for PyTorch that are fed by curvature: AdaHessian, Sophia, M-FAC, K-FAC, Newton-CG."""
