"""What Transformer Engine's compiled library computes, in torch on a CPU, for its real Python to call.

The functions that its products and norms call in training with delayed scaling, by their names and arguments
in the library (csrc/extensions/pybind.cpp). FP8 is torch's, which rounds as a GPU does; sums are float32's.
"""

from __future__ import annotations

import enum
from typing import Any

import torch


class DType(enum.IntEnum):
    kByte = 0
    kInt32 = 2
    kFloat32 = 4
    kFloat16 = 5
    kBFloat16 = 6
    kFloat8E4M3 = 7
    kFloat8E5M2 = 8
    kFloat4E2M1 = 10


# Places of a module's tensors in its scales: up to three products.
FP8FwdTensors = enum.IntEnum(
    "FP8FwdTensors", [f"GEMM{i}_{what}" for i in (1, 2, 3) for what in ("INPUT", "WEIGHT", "OUTPUT")], start=0
)
FP8BwdTensors = enum.IntEnum(
    "FP8BwdTensors", [f"GRAD_{what}{i}" for i in (1, 2, 3) for what in ("OUTPUT", "INPUT")], start=0
)

_FP8 = {DType.kFloat8E4M3: torch.float8_e4m3fn, DType.kFloat8E5M2: torch.float8_e5m2}
_PLAIN = {DType.kFloat32: torch.float32, DType.kBFloat16: torch.bfloat16}


def quantize(tensor: torch.Tensor, quantizer: Any, output: Any = None, noop: Any = None) -> Any:
    """The tensor in FP8, saturated, by a scale known before (delayed) or made of it now (current)."""
    assert noop is None
    if output is None:
        output = create_empty_quantized_tensor(quantizer, tensor.shape, tensor.dtype, tensor.device, False)
    if tensor.numel() == 0:
        return output
    fp8 = _FP8[quantizer.dtype]
    largest = torch.finfo(fp8).max
    amax = tensor.float().abs().max()
    if hasattr(quantizer, "scale"):
        quantizer.amax.copy_(torch.maximum(quantizer.amax, amax))  # of all since the last update
        scale = quantizer.scale
    else:
        assert not quantizer.force_pow_2_scales
        assert quantizer.amax_epsilon == 0
        if quantizer.with_amax_reduction:
            torch.distributed.all_reduce(amax, torch.distributed.ReduceOp.MAX, quantizer.amax_reduction_group)
        scale = torch.where(amax > 0, largest / amax, 1.0)
    data = (tensor.float() * scale).clamp(-largest, largest).to(fp8).view(torch.uint8)
    if output._data is not None:
        output._data.copy_(data)
    if output._transpose is not None:
        output._transpose.copy_(_transposed(data))
        output._transpose_invalid = False
    output._scale_inv.copy_(1 / scale)
    return output


def create_empty_quantized_tensor(
    quantizer: Any, shape: Any, dtype: torch.dtype, device: Any, pin_memory: bool
) -> Any:
    """Before Blackwell products read both operands by rows: a transposed copy is kept where asked for."""
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Tensor
    from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage

    data = torch.empty(*shape, dtype=torch.uint8)
    fields = {
        "data": data if quantizer.rowwise_usage else None,
        "data_transpose": _transposed(data) if quantizer.columnwise_usage else None,
        "fp8_scale_inv": torch.empty(1),
        "fp8_dtype": quantizer.dtype,
        "quantizer": quantizer,
    }
    if quantizer.internal:
        return Float8TensorStorage(**fields, fake_dtype=dtype)
    return Float8Tensor(shape=tuple(shape), dtype=dtype, **fields)


def fp8_transpose(input: torch.Tensor, dtype: Any, *, out: torch.Tensor | None) -> torch.Tensor:
    return _transposed(input) if out is None else out.copy_(_transposed(input))


def _transposed(data: torch.Tensor) -> torch.Tensor:
    return data.movedim(-1, 0).contiguous()


def generic_gemm(
    A: Any,
    transA: bool,
    B: Any,
    transB: bool,
    D: torch.Tensor | None,
    quantizer: Any,
    output_dtype: Any,
    bias: torch.Tensor | None,
    bias_type: Any,
    gelu: bool,
    gelu_in: torch.Tensor | None,
    grad: bool,
    workspace: torch.Tensor,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    comm_overlap: Any = None,
    comm_type: Any = None,
    extra_output: torch.Tensor | None = None,
    bulk_overlap: bool = False,
    alpha: float = 1.0,
    beta: float | None = None,
) -> tuple[torch.Tensor, None, None, None]:
    """op(B) op(A), as cuBLAS sees matrices that are stored by rows; added to D where it accumulates."""
    assert quantizer is bias is comm_overlap is extra_output is None
    assert not gelu
    assert alpha == 1
    left, right = _matrix(B, transB), _matrix(A, not transA)
    product = (left.t() if transB else left) @ (right.t() if transA else right)
    if D is None:
        shape = product.shape if transB else (*B.size()[:-1], product.shape[-1])
        return product.view(shape).to(_PLAIN[output_dtype]), None, None, None
    D.copy_(D + product if accumulate else product)
    return D, None, None, None


def _matrix(operand: Any, by_columns: bool) -> torch.Tensor:
    """float32 [rows, columns]. FP8's comes from the copy that the product reads, which must be there."""
    if isinstance(operand, torch.Tensor):
        return operand.float().flatten(0, -2)
    data = operand._transpose if by_columns else operand._data
    assert data is not None
    assert not (by_columns and operand._transpose_invalid)
    values = data.view(_FP8[operand._fp8_dtype]).float() * operand._scale_inv
    return values.flatten(1).t() if by_columns else values.flatten(0, -2)


def rmsnorm_fwd(
    input: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    ln_out: Any,
    quantizer: Any,
    otype: Any,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> tuple[Any, None, torch.Tensor]:
    """(output, nothing, 1 / root mean square of each row)."""
    assert ln_out is None
    assert not zero_centered_gamma
    scale = (input.float().square().mean(-1) + eps).rsqrt()
    output = (input.float() * scale[:, None] * weight.float()).to(_PLAIN[otype])
    return output if quantizer is None else quantize(output, quantizer), None, scale


def rmsnorm_bwd(
    dz: torch.Tensor,
    x: torch.Tensor,
    rsigma: torch.Tensor,
    gamma: torch.Tensor,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the input and of the weight."""
    normed = x.float() * rsigma[:, None]
    inner = dz.float() * gamma.float()
    dx = (inner - normed * (inner * normed).mean(-1, keepdim=True)) * rsigma[:, None]
    return dx.to(x.dtype), (dz.float() * normed).sum(0).to(gamma.dtype)


def layernorm_fwd(*_: Any) -> None:
    raise AssertionError("the model has RMSNorm")  # named beside it in a table


layernorm_bwd = layernorm_fwd


def multi_tensor_l2norm(
    chunk_size: int, noop: Any, lists: list[list[torch.Tensor]], per_tensor: bool = False
) -> tuple[torch.Tensor, None]:
    return torch.stack([tensor.float().norm() for tensor in lists[0]]).norm().view(1), None


def multi_tensor_scale(chunk_size: int, noop: Any, lists: list[list[torch.Tensor]], scale: float) -> None:
    for source, target in zip(*lists, strict=True):
        target.copy_(source * scale)


def compute_amax(input: torch.Tensor, amax: torch.Tensor) -> None:
    amax.copy_(input.float().abs().max())


def multi_tensor_compute_scale_and_scale_inv(
    chunk_size: int,
    noop: Any,
    lists: list[list[torch.Tensor]],
    max_fp8: float,
    force_pow_2_scales: bool,
    amax_epsilon: float,
) -> None:
    """Scales of weights that are kept in FP8."""
    assert not force_pow_2_scales
    assert amax_epsilon == 0
    for amax, scale, scale_inv in zip(*lists, strict=True):
        scale.copy_(torch.where(amax > 0, max_fp8 / amax, 1.0))
        scale_inv.copy_(1 / scale)
