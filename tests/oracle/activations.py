"""Pointwise functions, each in the form of its definition."""

from __future__ import annotations

import math

import numpy as np

from oracle.array import Array


def sigmoid(x: Array) -> Array:
    return np.exp(-np.logaddexp(0.0, -x))  # 1 / (1 + exp(-x)) without overflow


def silu(x: Array) -> Array:
    return x * sigmoid(x)


def softplus(x: Array) -> Array:
    return np.logaddexp(0.0, x)


def gelu(x: Array) -> Array:
    """Multiply x by the normal distribution function: the exact GELU."""
    erf = np.array([math.erf(value) for value in (x / math.sqrt(2.0)).ravel()]).reshape(x.shape)
    return 0.5 * x * (1.0 + erf)


def softmax(x: Array) -> Array:
    """Over the last axis, which may be empty if there are no rows; -inf entries get probability 0."""
    exponentials: Array = np.exp(x - x.max(axis=-1, keepdims=True, initial=-np.inf))
    total: Array = exponentials.sum(axis=-1, keepdims=True)
    quotient: Array = exponentials / total
    return quotient
