"""float32 matrix products on CPUs through oneDNN, where they are as exact and clearly faster.

On AMD, torch's default library takes a slow path: oneDNN is up to twice as fast (Zen 5), or some percent, and
two fifths in products with a large vocabulary (Zen 4). Elsewhere a self-test has to show a gain. The switch
allows oneDNN to round factors to bfloat16 inside; it does so only on CPUs that have instructions for that
(AMX), and there the self-test refuses. The last bits of the two libraries differ: the vendor decides, or a
wide margin, so that the choice is the same in every run on a machine.

Trap: while the switch is on, `torch.get_float32_matmul_precision()` raises RuntimeError (torch holds that two
interfaces were mixed); torch.compile on CUDA asks it. Use it where training runs on the CPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

ONEDNN = "bf16"  # the precision that sends float32 products to oneDNN
EXACT = 1e-5  # largest error relative to the largest magnitude, against float64
MARGIN = 1.5  # how many times as fast a linear layer's three products must be
ROWS, INPUTS, OUTPUTS = 768, 512, 1376  # tokens of a small microbatch through an MLP of a small model
TRIALS = 7


def use_onednn_products() -> bool:
    """From here on, compute this process's float32 products with oneDNN if a self-test allows it.

    The test takes about half a second with the threads that are set. Wrap decoding in
    :func:`default_products`.

    Returns:
        Whether they are; if not, nothing has changed.
    """
    if not torch.backends.mkldnn.is_available() or not _is_exact():
        return False
    if not is_amd() and _gain() < MARGIN:
        return False
    torch.backends.mkldnn.matmul.fp32_precision = ONEDNN
    return True


def is_amd(facts: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this is a processor of AMD's, where Linux says so."""
    return facts.is_file() and "AuthenticAMD" in facts.read_text(errors="replace")


@contextmanager
def default_products() -> Iterator[None]:
    """Torch's own products inside: for decoding, where oneDNN would reorder all weights for a few rows."""
    with _products("none"):
        yield


@contextmanager
def _products(precision: str) -> Iterator[None]:
    switch = torch.backends.mkldnn.matmul
    before = switch.fp32_precision
    switch.fp32_precision = precision
    try:
        yield
    finally:
        switch.fp32_precision = before


def _linear(rows: Tensor, weights: Tensor, gradient: Tensor) -> Sequence[Callable[[], Tensor]]:
    """The products of a linear layer, [M, K], [N, K], [M, N]: forward, to its inputs, to its weights."""
    return lambda: rows @ weights.T, lambda: gradient @ weights, lambda: gradient.T @ rows


def _factors() -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = (ROWS, INPUTS), (OUTPUTS, INPUTS), (ROWS, OUTPUTS)
    return [torch.randn(shape, generator=draw) for shape in shapes]


def _is_exact() -> bool:
    factors = _factors()
    with _products(ONEDNN):
        found = [product() for product in _linear(*factors)]
    wanted = [product() for product in _linear(*(x.double() for x in factors))]
    return all((a - b).abs().max() <= EXACT * b.abs().max() for a, b in zip(found, wanted, strict=True))


def _gain() -> float:
    """How many times as fast oneDNN is in the three products; best of some trials, in turns."""
    total = {"none": 0.0, ONEDNN: 0.0}
    for product in _linear(*_factors()):
        trials = [{precision: _seconds(product, precision) for precision in total} for _ in range(TRIALS)]
        for precision in total:
            total[precision] += min(trial[precision] for trial in trials)
    return total["none"] / total[ONEDNN]


def _seconds(product: Callable[[], Tensor], precision: str) -> float:
    with _products(precision):
        start = time.perf_counter()
        product()
        return time.perf_counter() - start
