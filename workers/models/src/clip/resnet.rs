//! CLIP's modified ResNet (`ModifiedResNet` of OpenAI's `clip/model.py`), `visual.*` in the weight file: three convolutions as a stem,
//! average pools instead of strides, attention instead of a last average.
//!
//! Images lie channels last, so a convolution is a matrix product over the channels of its window.

use candle_core::{D, Result, Tensor};
use candle_nn::VarBuilder;

use super::config::ResNetConfig;
use crate::block::attention_scale;
use crate::layers::{INIT_WEIGHT, Linear};
use crate::ops::{attention, linear, wide};

/// Epsilon of every batch norm.
const EPS: f64 = 1e-5;
/// Share of a batch in the running mean and variance (the default of `torch.nn.BatchNorm2d`).
const NORM_MOMENTUM: f64 = 0.1;
/// A bottleneck's output has this many times the channels of its middle.
const EXPANSION: usize = 4;

/// Turns pixels into image features.
#[derive(Debug, Clone)]
pub(super) struct ModifiedResNet {
    image_size: usize,
    stem: [Convolution; 3],
    blocks: Vec<Bottleneck>,
    pool: AttentionPool,
}

/// A convolution with its batch norm. A window of 3 is padded with 1.
#[derive(Debug, Clone)]
struct Convolution {
    window: usize,
    stride: usize,
    product: Product,
}

/// What a convolution makes of the channels of its window.
#[derive(Debug, Clone)]
enum Product {
    /// With the batch norm folded in: of a frozen model.
    Folded(Linear),
    /// Of a model in training: the kernel `(outputs, inputs, window, window)` changes.
    Normed { kernel: Tensor, norm: BatchNorm },
}

/// Batch normalisation in training (Ioffe and Szegedy 2015, arXiv 1502.03167): by the mean and the variance of the batch, which the running
/// ones follow.
#[derive(Debug, Clone)]
struct BatchNorm {
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
}

#[derive(Debug, Clone)]
struct Bottleneck {
    convolutions: [Convolution; 3],
    downsample: Option<Convolution>,
    stride: usize,
}

#[derive(Debug, Clone)]
struct AttentionPool {
    positions: Tensor,
    heads: usize,
    scale: f64,
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
}

impl ModifiedResNet {
    /// Reads the weights below the builder's prefix; features have width `projection`.
    #[expect(clippy::needless_pass_by_value, reason = "a builder is a cheap handle, passed by value as in candle-nn")]
    pub(super) fn load(config: &ResNetConfig, projection: usize, vb: VarBuilder<'_>) -> Result<Self> {
        let width = config.width;
        let stem = |i: usize, inputs, outputs, stride| {
            Convolution::load((inputs, outputs), 3, stride, vb.pp(format!("conv{i}")), vb.pp(format!("bn{i}")))
        };
        let mut blocks = Vec::new();
        let mut inputs = width;
        for (stage, &count) in config.layers.iter().enumerate() {
            let middle = width << stage;
            let layer = vb.pp(format!("layer{}", stage + 1));
            for i in 0..count {
                let stride = if stage > 0 && i == 0 { 2 } else { 1 };
                blocks.push(Bottleneck::load(inputs, middle, stride, layer.pp(i))?);
                inputs = middle * EXPANSION;
            }
        }
        Ok(Self {
            image_size: config.image_size,
            stem: [stem(1, 3, width / 2, 2)?, stem(2, width / 2, width / 2, 1)?, stem(3, width / 2, width, 1)?],
            blocks,
            pool: AttentionPool::load(config, projection, vb.pp("attnpool"))?,
        })
    }

    /// Normalised pixels `(b, 3, s, s)` to features `(b, projection)`.
    pub(super) fn forward(&self, pixels: &Tensor) -> Result<Tensor> {
        let (_, channels, height, width) = pixels.dims4()?;
        let s = self.image_size;
        if (channels, height, width) != (3, s, s) {
            candle_core::bail!("the model takes images of shape [3, {s}, {s}], got [{channels}, {height}, {width}]");
        }
        let mut x = pixels.permute((0, 2, 3, 1))?.contiguous()?;
        for convolution in &self.stem {
            x = convolution.forward(&x)?.relu()?;
        }
        x = halve(&x)?;
        for block in &self.blocks {
            x = block.forward(&x)?;
        }
        self.pool.forward(&x)
    }
}

impl Convolution {
    #[expect(clippy::needless_pass_by_value, reason = "a builder is a cheap handle, passed by value as in candle-nn")]
    fn load(
        (inputs, outputs): (usize, usize),
        window: usize,
        stride: usize,
        kernel: VarBuilder<'_>,
        norm: VarBuilder<'_>,
    ) -> Result<Self> {
        let (dtype, wide) = (kernel.dtype(), wide(kernel.dtype()));
        let (kernel, norm) = (kernel.to_dtype(wide), norm.to_dtype(wide));
        let get = |name: &str, init| norm.get_with_hints(outputs, name, candle_nn::Init::Const(init));
        let norm = BatchNorm {
            weight: get("weight", 1.0)?,
            bias: get("bias", 0.0)?,
            running_mean: get("running_mean", 0.0)?,
            running_var: get("running_var", 1.0)?,
        };
        let kernel = kernel.get_with_hints((outputs, inputs, window, window), "weight", INIT_WEIGHT)?;
        let product = match kernel.track_op() {
            true => Product::Normed { kernel, norm },
            false => {
                let kernel = by_window(&kernel)?;
                let factor = (&norm.weight / (norm.running_var + EPS)?.sqrt()?)?;
                let bias = (norm.bias - (norm.running_mean * &factor)?)?;
                let kernel = kernel.broadcast_mul(&factor.unsqueeze(1)?)?;
                Product::Folded(Linear::new(kernel.to_dtype(dtype)?, bias.to_dtype(dtype)?)?)
            }
        };
        Ok(Self { window, stride, product })
    }

    /// `(b, h, w, inputs)` to `(b, h / stride, w / stride, outputs)`.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        if self.window == 1 {
            return self.product.forward(x);
        }
        let (b, height, width, channels) = x.dims4()?;
        let (h, w, stride) = (height / self.stride, width / self.stride, self.stride);
        // Zeros around, and as many behind as make every shifted window whole.
        let padded = x.pad_with_zeros(1, 1, stride)?.pad_with_zeros(2, 1, stride)?;
        let mut shifted = Vec::with_capacity(self.window * self.window);
        for top in 0..self.window {
            for left in 0..self.window {
                let rows = padded.narrow(1, top, h * stride)?.narrow(2, left, w * stride)?;
                let every = rows.reshape(&[b, h, stride, w, stride, channels])?.narrow(2, 0, 1)?.narrow(4, 0, 1)?;
                shifted.push(every.reshape((b, h, w, channels))?);
            }
        }
        self.product.forward(&Tensor::cat(&shifted, D::Minus1)?)
    }
}

/// A kernel `(outputs, inputs, window, window)` as a matrix over the places of a window, each with its channels.
fn by_window(kernel: &Tensor) -> Result<Tensor> {
    kernel.permute((0, 2, 3, 1))?.flatten_from(1)
}

impl Product {
    /// `(.., inputs)` to `(.., outputs)`.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Folded(product) => product.forward(x),
            Self::Normed { kernel, norm } => norm.forward(&linear(x, &by_window(kernel)?, None)?),
        }
    }
}

impl BatchNorm {
    /// Over all but the last dimension. Changes the running mean and variance.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let channels = x.dim(D::Minus1)?;
        let rows = x.reshape(((), channels))?;
        let count = rows.dim(0)?;
        let mean = rows.mean_keepdim(0)?;
        let centred = rows.broadcast_sub(&mean)?;
        let variance = centred.sqr()?.mean_keepdim(0)?;
        let unbiased = (variance.detach() * (count as f64 / count.saturating_sub(1).max(1) as f64))?;
        for (running, new) in [(&self.running_mean, mean.detach()), (&self.running_var, unbiased)] {
            let moved = ((running.detach() * (1.0 - NORM_MOMENTUM))? + (new.squeeze(0)? * NORM_MOMENTUM)?)?;
            running.slice_set(&moved, 0, 0)?;
        }
        let normal = centred.broadcast_div(&(variance + EPS)?.sqrt()?)?;
        normal.broadcast_mul(&self.weight)?.broadcast_add(&self.bias)?.reshape(x.shape())
    }
}

impl Bottleneck {
    #[expect(clippy::needless_pass_by_value, reason = "a builder is a cheap handle, passed by value as in candle-nn")]
    fn load(inputs: usize, middle: usize, stride: usize, vb: VarBuilder<'_>) -> Result<Self> {
        let outputs = middle * EXPANSION;
        let part =
            |i: usize, sizes, window| Convolution::load(sizes, window, 1, vb.pp(format!("conv{i}")), vb.pp(format!("bn{i}")));
        let downsample = match stride > 1 || inputs != outputs {
            true => Some(Convolution::load((inputs, outputs), 1, 1, vb.pp("downsample.0"), vb.pp("downsample.1"))?),
            false => None,
        };
        Ok(Self {
            convolutions: [part(1, (inputs, middle), 1)?, part(2, (middle, middle), 3)?, part(3, (middle, outputs), 1)?],
            downsample,
            stride,
        })
    }

    /// `(b, h, w, inputs)` to `(b, h / stride, w / stride, outputs)`.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let smaller = |x: &Tensor| if self.stride > 1 { halve(x) } else { Ok(x.clone()) };
        let [first, second, third] = &self.convolutions;
        let middle = second.forward(&first.forward(x)?.relu()?)?.relu()?;
        let out = third.forward(&smaller(&middle)?)?;
        let identity = match &self.downsample {
            Some(convolution) => convolution.forward(&smaller(x)?)?,
            None => x.clone(),
        };
        (out + identity)?.relu()
    }
}

impl AttentionPool {
    #[expect(clippy::needless_pass_by_value, reason = "a builder is a cheap handle, passed by value as in candle-nn")]
    fn load(config: &ResNetConfig, projection: usize, vb: VarBuilder<'_>) -> Result<Self> {
        let d = 32 * config.width;
        let grid = config.image_size / 32;
        Ok(Self {
            positions: vb.get_with_hints((grid * grid + 1, d), "positional_embedding", INIT_WEIGHT)?,
            heads: config.heads,
            scale: attention_scale(d, config.heads),
            query: Linear::load(d, d, vb.pp("q_proj"))?,
            key: Linear::load(d, d, vb.pp("k_proj"))?,
            value: Linear::load(d, d, vb.pp("v_proj"))?,
            output: Linear::load(d, projection, vb.pp("c_proj"))?,
        })
    }

    /// `(b, h, w, d)` to `(b, projection)`: the mean asks the cells and itself.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let cells = x.flatten(1, 2)?;
        let x = Tensor::cat(&[&cells.mean_keepdim(1)?, &cells], 1)?.broadcast_add(&self.positions)?;
        let query = self.query.forward(&x.narrow(1, 0, 1)?.contiguous()?)?;
        let mixed = attention(&query, &self.key.forward(&x)?, &self.value.forward(&x)?, self.heads, self.scale, None)?;
        self.output.forward(&mixed)?.squeeze(1)
    }
}

/// The mean of every 2 × 2 cells: `(b, h, w, c)` to `(b, h / 2, w / 2, c)`.
fn halve(x: &Tensor) -> Result<Tensor> {
    let (b, h, w, c) = x.dims4()?;
    let rows = x.reshape((b * h / 2, 2, w * c))?;
    let rows = (rows.narrow(1, 0, 1)? + rows.narrow(1, 1, 1)?)?.reshape((b * h / 2 * w / 2, 2, c))?;
    ((rows.narrow(1, 0, 1)? + rows.narrow(1, 1, 1)?)? * 0.25)?.reshape((b, h / 2, w / 2, c))
}
