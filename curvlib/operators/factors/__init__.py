"""The fit of Kronecker factors: sums over data, eigenvectors, ranks and files."""
