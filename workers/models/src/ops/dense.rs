//! Dense layers in training, with what goes with them: `activation(norm(x) Wᵀ + b) + added`, and `x + MLP(norm(x))`. Each is one operation that
//! keeps nothing but its arguments: the backward pass works out again what lies in between.
//!
//! candle's backward pass makes zeros for every tensor and adds each gradient to them, three passes over memory where a small model has time for
//! one: the fewer tensors, the better. An operation has three arguments at most, so the weights of one go in as a single tensor, put together by
//! `cat`, which hands their gradients back.

use std::borrow::Cow;

use candle_core::{CpuStorage, CustomOp2, CustomOp3, D, Layout, Result, Shape, Tensor};
use pulp::NullaryFnOnce;
use rayon::prelude::*;

use super::activation::Activation;
use super::kernel::{sum_over_rows, unwritten, vectorized};
use super::layer_norm;
use super::linear::ColumnSums;
use super::tile::{Inputs, Norm, Precision, Weights, activate_with_slope, multiplies};
use super::{on_cpu, output, slice, with_slices};

/// The weight `(outputs, inputs)` and bias `(outputs)` of a dense layer.
pub(crate) type DenseLayer<'a> = (&'a Tensor, &'a Tensor);

/// Weight, bias and epsilon of a layer norm.
pub(crate) type NormLayer<'a> = (&'a Tensor, &'a Tensor, f64);

/// `activation(norm(x) Wᵀ + b) + added`: `x` is `(…, inputs)`, `added` and the result `(…, outputs)`, with the outputs of several layers behind each
/// other. `None` where these kernels are not for it: on another device, in another number type, or with a weight that does not lie row by row, as
/// those of frozen models do not.
///
/// # Errors
/// Shapes that do not fit.
pub(crate) fn dense(
    x: &Tensor,
    layers: &[DenseLayer<'_>],
    norm: Option<NormLayer<'_>>,
    activation: Option<Activation>,
    added: Option<&Tensor>,
) -> Result<Option<Tensor>> {
    if !layers.iter().all(|(weight, _)| applies(x, weight)) {
        return Ok(None);
    }
    let mut layer = Layer { inputs: x.dim(D::Minus1)?, outputs: 0 };
    for one in layers {
        layer.outputs += Layer::new(layer.inputs, *one)?.outputs;
    }
    let mut parts = layers.iter().map(|(weight, _)| weight.flatten_all()).collect::<Result<Vec<_>>>()?;
    parts.extend(layers.iter().map(|(_, bias)| (*bias).clone()));
    parts.extend(norm_parts(norm, layer.inputs)?);
    let (op, packed) = (Dense { layer, eps: norm.map(|norm| norm.2), activation }, Tensor::cat(&parts, 0)?);
    let x = x.contiguous()?;
    let result = match added {
        Some(added) => x.apply_op3(&packed, &added.contiguous()?, op)?,
        None => x.apply_op2(&packed, op)?,
    };
    Ok(Some(result))
}

/// `x + second(activation(first(norm(x))))`, the MLP of a transformer. `None` as above.
///
/// # Errors
/// Shapes that do not fit.
pub(crate) fn mlp(
    x: &Tensor,
    norm: Option<NormLayer<'_>>,
    (first, activation, second): (DenseLayer<'_>, Activation, DenseLayer<'_>),
) -> Result<Option<Tensor>> {
    if !(applies(x, first.0) && applies(x, second.0)) {
        return Ok(None);
    }
    let width = x.dim(D::Minus1)?;
    let first_layer = Layer::new(width, first)?;
    let second_layer = Layer::new(first_layer.outputs, second)?;
    if second_layer.outputs != width {
        candle_core::bail!("mlp: the second layer makes {} of {width} numbers, to which they are added", second_layer.outputs);
    }
    let mut parts = vec![first.0.flatten_all()?, first.1.clone(), second.0.flatten_all()?, second.1.clone()];
    parts.extend(norm_parts(norm, width)?);
    let op = Mlp { first: first_layer, second: second_layer, activation, eps: norm.map(|norm| norm.2) };
    Ok(Some(x.contiguous()?.apply_op2(&Tensor::cat(&parts, 0)?, op)?))
}

fn applies(x: &Tensor, weight: &Tensor) -> bool {
    // What has one row or column lies either way.
    let by_row = weight.is_contiguous() && weight.dims().iter().all(|&size| size > 1);
    by_row && on_cpu(&[x, weight]) && multiplies(Precision::F32)
}

fn norm_parts(norm: Option<NormLayer<'_>>, width: usize) -> Result<Vec<Tensor>> {
    let Some((weight, bias, _)) = norm else { return Ok(Vec::new()) };
    if weight.dims() != [width] || bias.dims() != [width] {
        candle_core::bail!("layer norm: weight {:?} and bias {:?} do not fit width {width}", weight.dims(), bias.dims());
    }
    Ok(vec![weight.clone(), bias.clone()])
}

/// Sizes of a dense layer.
#[derive(Clone, Copy)]
struct Layer {
    inputs: usize,
    outputs: usize,
}

impl Layer {
    fn new(width: usize, (weight, bias): DenseLayer<'_>) -> Result<Self> {
        let (outputs, inputs) = weight.dims2()?;
        if width != inputs || bias.dims() != [outputs] {
            candle_core::bail!("dense: width {width} and bias {:?} do not fit weight ({outputs}, {inputs})", bias.dims());
        }
        Ok(Self { inputs, outputs })
    }

    /// The weight and the bias that `packed` begins with, and the rest.
    fn split<'a>(&self, packed: &'a [f32]) -> (&'a [f32], &'a [f32], &'a [f32]) {
        let (weight, rest) = packed.split_at(self.inputs * self.outputs);
        let (bias, rest) = rest.split_at(self.outputs);
        (weight, bias, rest)
    }

    /// The gradients of the rows `x` and, behind each other, of weight and bias, from that of what the layer makes of them.
    fn gradients(&self, x: &[f32], weight: &[f32], grad: &[f32], for_rows: bool) -> Result<(Option<Vec<f32>>, Vec<f32>)> {
        let rows = grad.len() / self.outputs;
        let mut for_weights = tiles(Weights::from_rows(x, self.inputs))?.product_of_columns(grad);
        for_weights.extend(sum_over_rows(rows, self.outputs, &ColumnSums { elements: grad, width: self.outputs }));
        let for_rows = for_rows.then(|| {
            let weight = tiles(Weights::from_rows(weight, self.inputs))?;
            Ok::<_, candle_core::Error>(weight.product(Inputs { x: grad, norm: None, added: None }, None))
        });
        Ok((for_rows.transpose()?, for_weights))
    }
}

/// The layer norm that is the end of what is packed, if it has this epsilon.
fn norm_of(rest: &[f32], eps: Option<f64>) -> Option<Norm<'_>> {
    let (weight, bias) = rest.split_at(rest.len() / 2);
    eps.map(|eps| Norm { weight, bias, eps: eps as f32 })
}

/// The rows after the norm.
fn normal<'a>(x: &'a [f32], norm: Option<Norm<'_>>) -> Cow<'a, [f32]> {
    norm.map_or(Cow::Borrowed(x), |Norm { weight, bias, eps }| Cow::Owned(layer_norm::normal(x, weight, bias, eps)))
}

/// The gradients of `x` and, behind those of the weights, of the norm, from that of the normal rows. `added` is added to the former.
fn through_norm(
    x: &[f32],
    norm: Option<Norm<'_>>,
    grad: Vec<f32>,
    added: Option<&[f32]>,
    for_weights: &mut Vec<f32>,
) -> Vec<f32> {
    match norm {
        Some(norm) => {
            let (for_x, for_norm) = layer_norm::gradients(x, norm.weight, norm.eps, &grad, added);
            for_weights.extend(for_norm);
            for_x
        }
        None => {
            let mut grad = grad;
            if let Some(added) = added {
                grad.par_chunks_mut(CHUNK).zip(added.par_chunks(CHUNK)).for_each(|(grad, added)| {
                    for (grad, added) in grad.iter_mut().zip(added) {
                        *grad += added;
                    }
                });
            }
            grad
        }
    }
}

struct Dense {
    layer: Layer,
    eps: Option<f64>,
    activation: Option<Activation>,
}

impl Dense {
    fn forward(&self, x: &[f32], packed: &[f32], added: Option<&[f32]>) -> Result<Vec<f32>> {
        let (weight, bias, rest) = self.layer.split(packed);
        let inputs = Inputs { x, norm: norm_of(rest, self.eps), added };
        Ok(tiles(Weights::new(weight, bias, Precision::F32))?.product(inputs, self.activation))
    }

    fn backward(&self, x: &Tensor, packed: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (wanted, shape, device) = (x.track_op(), x.shape(), x.device());
        let grad = grad.contiguous()?;
        let (for_x, for_packed) = with_slices(&[x, packed, &grad], |slices| {
            let [x, packed, grad] = [slices[0], slices[1], slices[2]];
            let (weight, bias, rest) = self.layer.split(packed);
            let norm = norm_of(rest, self.eps);
            let grad = match self.activation {
                Some(activation) => {
                    let before =
                        tiles(Weights::new(weight, bias, Precision::F32))?.product(Inputs { x, norm, added: None }, None);
                    let (_, mut slopes) = activated(activation, before);
                    multiply(&mut slopes, grad);
                    Cow::Owned(slopes)
                }
                None => Cow::Borrowed(grad),
            };
            let wanted = wanted || norm.is_some();
            let (for_normal, mut for_packed) = self.layer.gradients(&normal(x, norm), weight, &grad, wanted)?;
            let for_x = for_normal.map(|grad| through_norm(x, norm, grad, None, &mut for_packed));
            Ok((for_x, for_packed))
        })?;
        let for_x = for_x.filter(|_| wanted).map(|for_x| Tensor::from_vec(for_x, shape, device)).transpose()?;
        let for_packed = Tensor::from_vec(for_packed, packed.shape(), packed.device())?;
        Ok((for_x, Some(for_packed)))
    }

    fn shape(&self, x: &Layout) -> Shape {
        let mut shape = x.dims().to_vec();
        if let Some(last) = shape.last_mut() {
            *last = self.layer.outputs;
        }
        shape.into()
    }
}

impl CustomOp2 for Dense {
    fn name(&self) -> &'static str {
        "dense"
    }

    fn cpu_fwd(&self, x: &CpuStorage, x_at: &Layout, packed: &CpuStorage, packed_at: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok(output(self.forward(slice(x, x_at)?, slice(packed, packed_at)?, None)?, self.shape(x_at)))
    }

    fn bwd(&self, x: &Tensor, packed: &Tensor, _result: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        self.backward(x, packed, grad)
    }
}

impl CustomOp3 for Dense {
    fn name(&self) -> &'static str {
        "dense-added"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_at: &Layout,
        packed: &CpuStorage,
        packed_at: &Layout,
        added: &CpuStorage,
        added_at: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let shape = self.shape(x_at);
        if *added_at.shape() != shape {
            candle_core::bail!("dense: {:?} cannot be added to {shape:?}", added_at.shape());
        }
        Ok(output(self.forward(slice(x, x_at)?, slice(packed, packed_at)?, Some(slice(added, added_at)?))?, shape))
    }

    fn bwd(
        &self,
        x: &Tensor,
        packed: &Tensor,
        _added: &Tensor,
        _result: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (for_x, for_packed) = self.backward(x, packed, grad)?;
        Ok((for_x, for_packed, Some(grad.clone())))
    }
}

struct Mlp {
    first: Layer,
    second: Layer,
    activation: Activation,
    eps: Option<f64>,
}

impl CustomOp2 for Mlp {
    fn name(&self) -> &'static str {
        "mlp"
    }

    fn cpu_fwd(&self, x: &CpuStorage, x_at: &Layout, packed: &CpuStorage, packed_at: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = slice(x, x_at)?;
        let (weight, bias, rest) = self.first.split(slice(packed, packed_at)?);
        let first = tiles(Weights::new(weight, bias, Precision::F32))?;
        let (weight, bias, rest) = self.second.split(rest);
        let second = tiles(Weights::new(weight, bias, Precision::F32))?;
        let inputs = Inputs { x, norm: norm_of(rest, self.eps), added: Some(x) };
        Ok(output(first.mlp(&second, inputs, self.activation), x_at.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, packed: &Tensor, _result: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (shape, device) = (x.shape(), x.device());
        let grad = grad.contiguous()?;
        let (for_x, for_packed) = with_slices(&[x, packed, &grad], |slices| {
            let [x, packed, grad] = [slices[0], slices[1], slices[2]];
            let (first, bias, rest) = self.first.split(packed);
            let (second, _, rest) = self.second.split(rest);
            let norm = norm_of(rest, self.eps);
            let before = tiles(Weights::new(first, bias, Precision::F32))?.product(Inputs { x, norm, added: None }, None);
            let (hidden, slopes) = activated(self.activation, before);
            let (for_hidden, for_second) = self.second.gradients(&hidden, second, grad, true)?;
            let mut for_hidden = for_hidden.unwrap_or_default();
            multiply(&mut for_hidden, &slopes);
            let (for_normal, mut for_packed) = self.first.gradients(&normal(x, norm), first, &for_hidden, true)?;
            for_packed.extend(for_second);
            let for_x = through_norm(x, norm, for_normal.unwrap_or_default(), Some(grad), &mut for_packed);
            Ok((for_x, for_packed))
        })?;
        let for_packed = Tensor::from_vec(for_packed, packed.shape(), packed.device())?;
        Ok((Some(Tensor::from_vec(for_x, shape, device)?), Some(for_packed)))
    }
}

fn tiles(weights: Option<Weights>) -> Result<Weights> {
    weights.map_or_else(|| candle_core::bail!("this processor has no fused multiply-add"), Ok)
}

/// Numbers that a thread takes at a time.
const CHUNK: usize = 1 << 13;

/// What the activation makes of some numbers, and its derivative at each.
fn activated(activation: Activation, mut numbers: Vec<f32>) -> (Vec<f32>, Vec<f32>) {
    struct Chunk<'a>(Activation, &'a mut [f32], &'a mut [f32]);
    impl NullaryFnOnce for Chunk<'_> {
        type Output = ();

        #[inline(always)]
        fn call(self) {
            activate_with_slope(self.0, self.1, self.2);
        }
    }
    let mut slopes = unwritten(numbers.len());
    numbers
        .par_chunks_mut(CHUNK)
        .zip(slopes.par_chunks_mut(CHUNK))
        .for_each(|(numbers, slopes)| vectorized(Chunk(activation, numbers, slopes)));
    (numbers, slopes)
}

fn multiply(numbers: &mut [f32], by: &[f32]) {
    numbers.par_chunks_mut(CHUNK).zip(by.par_chunks(CHUNK)).for_each(|(numbers, by)| {
        for (number, by) in numbers.iter_mut().zip(by) {
            *number *= by;
        }
    });
}
