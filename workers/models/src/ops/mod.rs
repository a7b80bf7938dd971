//! Differentiable tensor operations that training and inference share, and, in `tile`, products for frozen models alone.
//!
//! candle's fused layer norm and softmax have no backward pass (the gradient is silently lost), and its composed ones pass over
//! memory many times. These do each in one multi-threaded pass on a CPU in f32, with a backward pass of their own; on any other device, and
//! for any other number type, they are made of candle's operations with the same result (its fused ones where nothing is trained). One
//! function serves both uses, so a model cannot be right in one and wrong in the other.
//!
//! Results do not depend on the number of threads: work is cut by rows, and sums over rows are added in the order of fixed blocks.

mod activation;
mod attention;
mod cross_entropy;
mod dense;
mod depthwise;
mod kernel;
mod layer_norm;
mod linear;
#[cfg(test)]
mod tests;
mod tile;

pub use activation::Activation;
pub use attention::{attention, attention_qkv};
pub(crate) use attention::{attention_kv, attention_split, split_heads};
pub use cross_entropy::smoothed_cross_entropy;
pub(crate) use dense::{dense, mlp};
pub(crate) use depthwise::{depthwise_relu6, windows};
pub use layer_norm::layer_norm;
pub use linear::linear;
pub(crate) use tile::{PackedCrossAttention, PackedLinear, PackedStates, packed_self_attention};
pub use tile::{Precision, is_fast, multiplies};

use candle_core::{CpuStorage, DType, Layout, Result, Shape, Storage, Tensor};

/// Whether the one-pass CPU kernels apply to these tensors.
pub(crate) fn on_cpu(tensors: &[&Tensor]) -> bool {
    tensors.iter().all(|tensor| tensor.device().is_cpu() && tensor.dtype() == DType::F32)
}

/// The number type for sums over many numbers of type `dtype`: at least f32.
pub(crate) fn wide(dtype: DType) -> DType {
    match dtype {
        DType::F16 | DType::BF16 => DType::F32,
        other => other,
    }
}

/// The elements of a contiguous f32 argument of a custom operation.
fn slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        candle_core::bail!("operation needs a contiguous argument, got strides {:?}", layout.stride());
    };
    Ok(&storage.as_slice::<f32>()?[start..end])
}

/// Runs `read` on the elements of contiguous f32 CPU tensors.
fn with_slices<R>(tensors: &[&Tensor], read: impl FnOnce(&[&[f32]]) -> Result<R>) -> Result<R> {
    let guards: Vec<_> = tensors.iter().map(|tensor| tensor.storage_and_layout()).collect();
    let slices = guards
        .iter()
        .map(|(storage, layout)| match &**storage {
            Storage::Cpu(storage) => slice(storage, layout),
            _ => candle_core::bail!("operation needs tensors in main memory"),
        })
        .collect::<Result<Vec<_>>>()?;
    read(&slices)
}

/// A tensor like `like` in shape, from its elements.
fn tensor_like(elements: Vec<f32>, like: &Tensor) -> Result<Tensor> {
    Tensor::from_vec(elements, like.shape(), like.device())
}

/// What a custom operation returns from its forward pass.
fn output(elements: Vec<f32>, shape: impl Into<Shape>) -> (CpuStorage, Shape) {
    (CpuStorage::F32(elements), shape.into())
}
