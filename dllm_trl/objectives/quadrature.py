import torch


def gauss_legendre(n: int) -> list[tuple[float, float]]:
    """Points and weights of the quadrature on [0, 1], from the eigenvalues of its Jacobi matrix (Golub and Welsch)."""
    k = torch.arange(1, n, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(torch.diag(k / (4 * k**2 - 1).sqrt(), -1))  # which reads the lower triangle
    points = (1 + (values - values.flip(0)) / 2) / 2  # symmetric to the last bit, so that the middle one is 1/2
    return list(zip(points.tolist(), vectors[0].square().tolist(), strict=True))
