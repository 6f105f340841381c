"""Products by look-up on the CPU."""

import os
import signal
import sys
import time

import pytest
import torch

from tests.support.kernels import (
    assert_no_worse,
    plain_product,
    random_activations,
    random_tensors,
    relative_rms,
)
from vqllm.runtime import VQLinear, describe, set_weight_cache
from vqllm_kernels import compilers, dispatch, formats, ops, select
from vqllm_kernels import linear as linear_module
from vqllm_kernels.linear import LinearSpec
from vqllm_kernels.lut import cpu


def lut(rows, cols, bits):
    return {"format": "lut-v1", "tile_rows": rows, "tile_cols": cols, "index_bits": bits}


SERVED = {
    "4 columns, 8 bits": lut(1, 4, 8),
    "8 columns, 6 bits": lut(1, 8, 6),
    "1 column, 3 bits": lut(1, 1, 3),
    "e81b": {"format": "e81b-v1"},
    "a sum": {"format": "residual-v1", "stages": [lut(1, 8, 8), lut(1, 8, 5)]},
}


IN_REGISTERS = pytest.mark.skipif(
    not cpu._in_registers(4096), reason="the processor has no AVX-512 VBMI"
)


@pytest.fixture(autouse=True)
def _fresh_choices(monkeypatch):
    monkeypatch.setattr(cpu, "fewest_weights", lambda cols: 48 * 64)
    dispatch.forget()
    yield
    dispatch.forget()
    set_weight_cache("auto")


@pytest.fixture(
    params=[True, False] if cpu._in_registers(4096) else [False],
    ids=lambda param: "64 at once" if param else "one",
)
def in_registers(request, monkeypatch):
    """Whether codes are looked up 64 at once: both ways, where the processor can."""
    if not request.param:
        monkeypatch.setattr(cpu, "_in_registers", lambda cols: False)
    return request.param


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def linear(values, rows=48, cols=64):
    spec = LinearSpec(rows=rows, cols=cols, format=formats.from_dict(values))
    return VQLinear.from_tensors(
        spec, random_tensors(spec.format, rows, cols, "cpu"), None, torch.float32
    )


@pytest.mark.parametrize("values", SERVED.values(), ids=SERVED.keys())
@pytest.mark.parametrize("shape", [(37, 41, 3), (8, 16, 1), (131, 541, 2), (600, 2048, 8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_products_are_as_exact_as_torch(values, shape, dtype, in_registers):
    rows, cols, num_rows = shape
    spec = formats.from_dict(values)
    tensors = random_tensors(spec, rows, cols, "cpu")
    x_NC = random_activations(num_rows, cols, dtype, "cpu")
    W_RC = spec.decode(tensors, rows, cols)
    with dispatch.force("lookup"):
        y_NR = dispatch.matmul(x_NC, tensors, spec, rows, cols)
    assert_no_worse(y_NR, plain_product(x_NC, W_RC), x_NC.double() @ W_RC.double().T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_an_outlier_leaves_the_rest_exact(dtype, in_registers):
    spec = formats.from_dict(lut(1, 4, 8))
    tensors = random_tensors(spec, 200, 2048, "cpu")
    x_NC = random_activations(1, 2048, dtype, "cpu")
    x_NC[0, 1000] = 1e4
    W_RC = spec.decode(tensors, 200, 2048)
    exact = x_NC.double() @ W_RC.double().T
    with dispatch.force("lookup"):
        y_NR = dispatch.matmul(x_NC, tensors, spec, 200, 2048)
    if dtype == torch.float32:
        # 64 pieces share the scale of the largest product: 8.6e-7 in registers, torch 3.7e-7.
        assert relative_rms(y_NR, exact) < 1.2e-6
    else:
        assert_no_worse(y_NR, plain_product(x_NC, W_RC), exact)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_what_is_not_finite_stays_so(value, in_registers):
    spec = formats.from_dict(lut(1, 4, 8))
    tensors = random_tensors(spec, 16, 600, "cpu")
    x_NC = random_activations(1, 600, torch.float32, "cpu")
    x_NC[0, 5] = value
    with dispatch.force("lookup"):
        assert not dispatch.matmul(x_NC, tensors, spec, 16, 600).isfinite().any()


def test_the_product_of_nothing_is_zero(in_registers):
    spec = formats.from_dict(lut(1, 4, 8))
    tensors = random_tensors(spec, 16, 600, "cpu")
    with dispatch.force("lookup"):
        assert not dispatch.matmul(torch.zeros(1, 600), tensors, spec, 16, 600).any()


def test_the_number_of_threads_changes_nothing(monkeypatch, in_registers):
    monkeypatch.setattr(cpu, "LARGE", 1)
    spec = formats.from_dict(lut(1, 4, 8))
    tensors = random_tensors(spec, 2048, 2048, "cpu")
    x_NC = random_activations(1, 2048, torch.float32, "cpu")
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(dispatch.matmul(x_NC, tensors, spec, 2048, 2048))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def exit_status(work):
    """Of a forked process that does this work, which returns whether all is well."""
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if work() else 1)
        finally:
            os._exit(2)
    for _ in range(1200):  # only what hangs takes two minutes
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pytest.fail("the child waits for threads that it does not have")


def test_a_forked_process_has_threads_of_its_own(monkeypatch, two_threads):
    monkeypatch.setattr(cpu, "LARGE", 1)
    # Nothing of torch's own threads is used: they are gone in the child too.
    sums, codes = torch.randn(512, 256), torch.randint(0, 256, (512, 2048), dtype=torch.uint8)
    expected = cpu._gather(sums, codes)
    assert exit_status(lambda: torch.equal(cpu._gather(sums, codes), expected)) == 0
    assert torch.equal(cpu._gather(sums, codes), expected)


@IN_REGISTERS
def test_look_ups_in_registers_go_on_after_a_fork(two_threads):
    spec = formats.from_dict(lut(1, 4, 8))
    tensors = random_tensors(spec, 2048, 2048, "cpu")
    x_NC = random_activations(1, 2048, torch.float32, "cpu")
    expected = dispatch.matmul(x_NC, tensors, spec, 2048, 2048)

    def repeated():
        return torch.equal(dispatch.matmul(x_NC, tensors, spec, 2048, 2048), expected)

    assert exit_status(repeated) == 0
    assert repeated()


def test_codes_that_change_are_seen(in_registers):
    spec = formats.from_dict(lut(1, 4, 8))
    tensors = random_tensors(spec, 16, 600, "cpu")
    x_NC = random_activations(1, 600, torch.float32, "cpu")
    dispatch.matmul(x_NC, tensors, spec, 16, 600)
    tensors["codes"].add_(1)
    tensors["codebook"].mul_(2)
    y_NR = dispatch.matmul(x_NC, tensors, spec, 16, 600)
    torch.testing.assert_close(y_NR, x_NC @ spec.decode(tensors, 16, 600).T)


def test_copies_go_with_the_codes():
    spec = formats.from_dict(lut(1, 4, 8))
    tensors = random_tensors(spec, 16, 32, "cpu")
    before = len(cpu._prepared)
    dispatch.matmul(random_activations(1, 32, torch.float32, "cpu"), tensors, spec, 16, 32)
    assert len(cpu._prepared) == before + 1
    del tensors
    assert len(cpu._prepared) == before


@pytest.mark.parametrize(
    ("values", "dtype", "rows", "reason"),
    [
        ({"format": "e8p-v1"}, torch.float32, 1, "e8p-v1 is no table of at most 256 entries"),
        (lut(2, 4, 8), torch.float32, 1, "entries of 2 rows, 8 bits"),
        (lut(1, 8, 12), torch.float32, 1, "entries of 1 rows, 12 bits"),
        (lut(1, 4, 8), torch.float64, 1, "float64 is none of"),
        (lut(1, 4, 8), torch.float32, 9, "more than 8 rows"),
    ],
    ids=str,
)
def test_what_is_not_looked_up_is_said(values, dtype, rows, reason):
    spec = formats.from_dict(values)
    tensors = random_tensors(spec, 16, 64, "cpu")
    x_NC = random_activations(rows, 64, dtype, "cpu")
    y_NR = dispatch.matmul(x_NC, tensors, spec, 16, 64)
    torch.testing.assert_close(y_NR, x_NC @ spec.decode(tensors, 16, 64).to(dtype).T)
    choice = dispatch.choices()[-1]
    assert choice.implementation == "reference"
    assert reason in choice.reason


def test_without_numba_the_reference_serves(monkeypatch):
    spec = formats.from_dict(lut(1, 4, 8))
    packed = random_tensors(spec, 16, 64, "cpu")
    monkeypatch.setitem(sys.modules, "numba", None)
    for cached in (compilers.why_no_numba, select.looked_up):
        cached.cache_clear()
    try:
        assert dispatch.matmul(torch.ones(1, 64), packed, spec, 16, 64).shape == (1, 16)
        assert "numba cannot be imported" in dispatch.choices()[-1].reason
        assert linear(lut(1, 4, 8))(torch.ones(1, 64)).shape == (1, 48)
    finally:
        for cached in (compilers.why_no_numba, select.looked_up):
            cached.cache_clear()


@pytest.mark.parametrize("mode", ["auto", "on", "off"])
def test_a_linear_looks_up_few_rows(mode):
    set_weight_cache(mode)
    module = linear(lut(1, 4, 8))
    few, many = torch.randn(1, 1, 64), torch.randn(3, 64)
    W_RC = module.dequantize()
    torch.testing.assert_close(module(few), few @ W_RC.T)
    assert (module._dense is None) == (mode != "on")
    torch.testing.assert_close(module(many), many @ W_RC.T)
    assert (module._dense is None) == (mode == "off")
    runs = {run.num_rows: run.implementation for run in describe(module, (1, 2048))}
    kept = "dense weights, kept"
    assert runs == {
        1: kept if mode == "on" else "lookup",
        2048: "reference" if mode == "off" else kept,
    }


def test_a_small_linear_keeps_its_weights():
    module = linear(lut(1, 4, 8), rows=47)
    module(torch.randn(1, 64))
    assert module._dense is not None
    assert describe(module, (1,))[0].implementation == "dense weights, kept"


def test_a_look_up_has_a_gradient():
    module = linear(lut(1, 4, 8))
    x = torch.randn(1, 64, requires_grad=True)
    module(x).sum().backward()
    torch.testing.assert_close(x.grad, module.dequantize().sum(0)[None])


def test_a_large_matrix_is_prepared_once(monkeypatch):
    monkeypatch.setattr(linear_module, "BLOCK_WEIGHTS", 32 * 64)
    monkeypatch.setattr(linear_module, "BLOCK_ROWS", 1)
    spec = LinearSpec(rows=96, cols=64, format=formats.from_dict(SERVED["4 columns, 8 bits"]))
    tensors = random_tensors(spec.format, 96, 64, "cpu")
    x = random_activations(1, 64, torch.float32, "cpu")
    ops.linear_of.cache_clear()
    assert len(spec.row_blocks()) == 3
    with dispatch.force("reference"):
        wanted = dispatch.linear(x, tensors, spec)
    unpacked = []
    unpack = cpu.unpack_bits
    monkeypatch.setattr(cpu, "unpack_bits", lambda *a: unpacked.append(1) or unpack(*a))
    for _ in range(3):
        with dispatch.force("lookup"):
            y = dispatch.linear(x, tensors, spec)
        torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)
    assert len(unpacked) == 1
    assert cpu.kept_bytes(tensors["codes"]) > 0
    ops.linear_of.cache_clear()
