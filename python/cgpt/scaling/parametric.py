"""Chinchilla's third approach: L(N, D) = E + A / N^alpha + B / D^beta fitted to the final losses of many runs.

    minimise over a, b, e, alpha, beta
        sum_i Huber( log( exp(a - alpha log N_i) + exp(b - beta log D_i) + exp(e) ) - log L_i )

with A = exp(a), B = exp(b), E = exp(e) and Huber's delta 1e-3, by L-BFGS from the best of a grid of starts.
Sources: Hoffmann et al. 2022 (arXiv 2203.15556), appendix D.3. Besiroglu et al. 2024 (arXiv 2404.10102) found that a
mean in place of the sum stops L-BFGS early, since its tolerance is absolute below 1: here residuals count in deltas, so
that the objective is far above 1 until it is small for good, and logarithms are centred, which parts A from alpha.
"""

from __future__ import annotations

from itertools import product

import numpy as np
from scipy.optimize import minimize

DELTA = 1e-3
STARTS = 24  # of the grid, polished; 300 found nothing better in 40 made-up sets of 8 to 100 runs
RANKED = 500  # points at most that starts are ranked by
BOUNDS = ((-40, 40), (-40, 40), (-40, 40), (1e-3, 5), (1e-3, 5))  # a and b of centred logarithms
NAMES = ("E", "A", "B", "alpha", "beta")


def fit_parametric(params: np.ndarray, tokens: np.ndarray, loss: np.ndarray, start: np.ndarray | None = None):
    """E (nats per token), A, B, alpha, beta as an array (5,) of the points (n,). start: an answer nearby, to begin from
    it alone, as for resampled points."""
    x, y, target = np.log(params), np.log(tokens), np.log(loss)
    centre = x.mean(), y.mean()
    x, y = x - centre[0], y - centre[1]
    starts = _best_of_grid(x, y, target, centre) if start is None else [_inner(start, centre)]
    options = {"maxiter": 5000, "maxfun": 20000, "ftol": 1e-14, "gtol": 1e-9, "maxcor": 20}
    found = [
        minimize(_objective, begin, (x, y, target), "L-BFGS-B", jac=True, bounds=BOUNDS, options=options)
        for begin in starts
    ]
    return _outer(min(found, key=lambda one: one.fun).x, centre)


def left_open(coefficients: np.ndarray, params: np.ndarray, tokens: np.ndarray, loss: np.ndarray) -> list[str]:
    """Names of the exponents that the points do not tell: at the end of what is searched, or of a term that moves no
    loss by a tenth of DELTA."""
    _, A, B, alpha, beta = coefficients
    terms = {"alpha": (alpha, A * params**-alpha, BOUNDS[3]), "beta": (beta, B * tokens**-beta, BOUNDS[4])}
    return [
        name
        for name, (value, term, (low, high)) in terms.items()
        if not 1.01 * low < value < 0.99 * high or np.ptp(term) < DELTA / 10 * loss.min()
    ]


def _objective(theta: np.ndarray, x: np.ndarray, y: np.ndarray, target: np.ndarray):
    """Sum of Huber's function of the residuals in deltas, and its gradient (5,)."""
    a, b, e, alpha, beta = theta
    terms = np.stack((a - alpha * x, b - beta * y, np.full_like(x, e)))
    largest = terms.max(0)
    shares = np.exp(terms - largest)
    total = shares.sum(0)
    shares /= total
    residual = (largest + np.log(total) - target) / DELTA
    slope = np.clip(residual, -1, 1)
    value = np.where(np.abs(residual) <= 1, residual**2 / 2, np.abs(residual) - 0.5).sum()
    of_params, of_tokens, of_rest = slope * shares / DELTA
    gradient = of_params.sum(), of_tokens.sum(), of_rest.sum(), -(of_params @ x), -(of_tokens @ y)
    return value, np.array(gradient)


def _best_of_grid(x, y, target, centre) -> list[np.ndarray]:
    """The starts of Hoffmann's grid (appendix D.3) with the lowest objective; at most STARTS."""
    every = slice(None, None, -(-len(x) // RANKED))
    x, y, target = x[every], y[every], target[every]
    exponents = 0.0, 0.5, 1.0, 1.5, 2.0
    grid = np.array(list(product(range(0, 26, 5), range(0, 26, 5), (-1, -0.5, 0, 0.5, 1), exponents, exponents)), float)
    grid[:, 0] -= grid[:, 3] * centre[0]
    grid[:, 1] -= grid[:, 4] * centre[1]
    values = np.empty(len(grid))
    for rows in np.array_split(np.arange(len(grid)), 30):
        a, b, e, alpha, beta = grid[rows].T[:, :, None]
        model = np.logaddexp(np.logaddexp(a - alpha * x, b - beta * y), e)
        size = np.abs(model - target) / DELTA
        values[rows] = np.where(size <= 1, size**2 / 2, size - 0.5).sum(1)
    best = grid[np.argsort(values, kind="stable")[:STARTS]]
    low, high = np.array(BOUNDS).T
    return list(np.clip(best, low, high))


def _inner(coefficients: np.ndarray, centre) -> np.ndarray:
    E, A, B, alpha, beta = coefficients
    theta = np.log(A) - alpha * centre[0], np.log(B) - beta * centre[1], np.log(E), alpha, beta
    low, high = np.array(BOUNDS).T
    return np.clip(theta, low, high)


def _outer(theta: np.ndarray, centre) -> np.ndarray:
    a, b, e, alpha, beta = theta
    return np.array((np.exp(e), np.exp(a + alpha * centre[0]), np.exp(b + beta * centre[1]), alpha, beta))
