//! A frozen convolutional trunk in front of the vision transformer, which then reads its last feature map in place of patches: the hybrid
//! architecture of Dosovitskiy et al. 2021 (arXiv 2010.11929, section 3.1). What an image classifier has learned is worth much to a model that is
//! trained on some thousand pairs.
//!
//! The trunks are EfficientNet-Lite (github.com/tensorflow/tpu, `efficientnet/lite`): `MBConv` blocks without squeeze-and-excitation, `ReLU6`, batch
//! norms with epsilon 1e-3, padding as TensorFlow has it. Their tensors are named as in timm, `vision_model.trunk.*` in a checkpoint. They are always
//! computed in f32.
//!
//! Images lie channels last, so that a convolution of width 1 is a dense layer.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{Init, VarBuilder};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::error::{ModelError, TensorProblem, TensorProblems};
use crate::layers::{Around, INIT_WEIGHT, Linear};
use crate::ops::{Activation, Precision, depthwise_relu6, windows};
use crate::parameters::{Parameter, asked_for};
use crate::preprocess::{CLIP_MEAN, CLIP_STD};
use crate::weights::Weights;

/// What the names of a trunk's tensors begin with.
pub(crate) const TRUNK: &str = "vision_model.trunk.";
/// Epsilon of every batch norm.
const EPS: f64 = 1e-3;

/// The trunks that there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "one network in five sizes")]
pub enum TrunkKind {
    #[serde(rename = "efficientnet_lite0")]
    EfficientNetLite0,
    #[serde(rename = "efficientnet_lite1")]
    EfficientNetLite1,
    #[serde(rename = "efficientnet_lite2")]
    EfficientNetLite2,
    #[serde(rename = "efficientnet_lite3")]
    EfficientNetLite3,
    #[serde(rename = "efficientnet_lite4")]
    EfficientNetLite4,
}

/// Blocks that follow each other: expansion, channels, blocks, stride of the first one, window.
type Stage = (usize, usize, usize, usize, usize);

/// EfficientNet-B0 (Tan and Le 2019, arXiv 1905.11946, table 1).
const STAGES: [Stage; 7] = [
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
];

impl TrunkKind {
    /// Pixels of the image on a side of one place of the feature map.
    pub const STRIDE: usize = 32;
    /// Channels of the feature map.
    pub const CHANNELS: usize = 1280;
    /// Channels after the stem.
    const STEM: usize = 32;

    /// The stages of B0, wider and deeper; the first and the last one keep their depth, stem and head their width.
    fn stages(self) -> [Stage; 7] {
        let (wider, deeper) = match self {
            Self::EfficientNetLite0 => (1.0, 1.0),
            Self::EfficientNetLite1 => (1.0, 1.1),
            Self::EfficientNetLite2 => (1.1, 1.2),
            Self::EfficientNetLite3 => (1.2, 1.4),
            Self::EfficientNetLite4 => (1.4, 1.8),
        };
        let mut stages = STAGES;
        let last = stages.len() - 1;
        for (number, (_, channels, blocks, ..)) in stages.iter_mut().enumerate() {
            let exact = *channels as f64 * wider;
            let rounded = ((exact + 4.0) as usize / 8 * 8).max(8);
            *channels = if (rounded as f64) < 0.9 * exact { rounded + 8 } else { rounded };
            if number != 0 && number != last {
                *blocks = (*blocks as f64 * deeper).ceil() as usize;
            }
        }
        stages
    }
}

/// The trunk, its batch norms folded into its convolutions.
#[derive(Debug, Clone)]
pub struct Trunk {
    /// What makes of normalised pixels those that it was trained on, per channel: `x · scale + shift`.
    pixels: (Tensor, Tensor),
    stem: Linear,
    blocks: Vec<Block>,
    head: Linear,
}

/// An inverted bottleneck (`MBConv`).
#[derive(Debug, Clone)]
struct Block {
    /// Not there where it does not expand.
    expand: Option<Linear>,
    /// `(window, window, channels)` and `(channels)`.
    depthwise: (Tensor, Tensor),
    stride: usize,
    project: Linear,
    residual: bool,
}

impl Trunk {
    /// Reads the weights below the builder's prefix.
    ///
    /// # Errors
    /// A tensor is missing or misshapen.
    pub fn load(kind: TrunkKind, vb: &VarBuilder<'_>) -> Result<Self> {
        let vb = vb.to_dtype(DType::F32);
        let mut blocks = Vec::new();
        let mut inputs = TrunkKind::STEM;
        for (stage, (expansion, channels, count, stride, window)) in kind.stages().into_iter().enumerate() {
            for number in 0..count {
                let block = vb.pp(format!("blocks.{stage}.{number}"));
                let stride = if number == 0 { stride } else { 1 };
                blocks.push(Block::load(&block, (inputs, expansion, channels), (window, stride))?);
                inputs = channels;
            }
        }
        // Trained on (255 x − 127) / 128 of pixels x from 0 to 1.
        let to_trunk = |of: fn(f32, f32) -> f32| {
            let values: Vec<f32> = CLIP_MEAN.iter().zip(CLIP_STD).map(|(mean, std)| of(*mean, std)).collect();
            Tensor::from_vec(values, 3, vb.device())
        };
        Ok(Self {
            pixels: (to_trunk(|_, std| 255.0 * std / 128.0)?, to_trunk(|mean, _| (255.0 * mean - 127.0) / 128.0)?),
            stem: dense(&vb, ("conv_stem", "bn1"), (3, TrunkKind::STEM, 3))?,
            blocks,
            head: dense(&vb, ("conv_head", "bn2"), (inputs, TrunkKind::CHANNELS, 1))?,
        })
    }

    /// Normalised pixels `(b, 3, s, s)` in f32, `s` in whole strides, to the feature map row by row: `(b, (s / 32)², 1280)`. On a CPU each image by
    /// itself, so that its layers stay in the cache.
    ///
    /// # Errors
    /// Shapes do not fit.
    pub fn forward(&self, pixels: &Tensor) -> Result<Tensor> {
        let images = pixels.dim(0)?;
        if images > 1 && pixels.device().is_cpu() {
            let each = (0..images).into_par_iter().map(|image| self.forward(&pixels.narrow(0, image, 1)?));
            return Tensor::cat(&each.collect::<Result<Vec<_>>>()?, 0);
        }
        let (scale, shift) = &self.pixels;
        let x = pixels.permute((0, 2, 3, 1))?.broadcast_mul(scale)?.broadcast_add(shift)?;
        let mut x = relu6(&self.stem, &Tensor::cat(&windows(&x, 3, 2)?, 3)?)?;
        for block in &self.blocks {
            x = block.forward(&x)?;
        }
        relu6(&self.head, &x)?.flatten(1, 2)
    }
}

impl Block {
    fn load(
        vb: &VarBuilder<'_>,
        (inputs, expansion, outputs): (usize, usize, usize),
        (window, stride): (usize, usize),
    ) -> Result<Self> {
        let middle = inputs * expansion;
        let expands = expansion > 1;
        let (norm, project) = if expands { ("bn2", ("conv_pwl", "bn3")) } else { ("bn1", ("conv_pw", "bn2")) };
        let kernel = vb.get_with_hints((middle, 1, window, window), "conv_dw.weight", INIT_WEIGHT)?;
        let (factor, bias) = folded(&vb.pp(norm), middle)?;
        let kernel = kernel.reshape((middle, window * window))?.broadcast_mul(&factor.unsqueeze(1)?)?;
        let kernel = kernel.t()?.contiguous()?.reshape((window, window, middle))?;
        Ok(Self {
            expand: expands.then(|| dense(vb, ("conv_pw", "bn1"), (inputs, middle, 1))).transpose()?,
            depthwise: (kernel, bias),
            stride,
            project: dense(vb, project, (middle, outputs, 1))?,
            residual: stride == 1 && inputs == outputs,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let wide = self.expand.as_ref().map_or_else(|| Ok(x.clone()), |expand| relu6(expand, x))?;
        let (kernel, bias) = &self.depthwise;
        let seen = depthwise_relu6(&wide, kernel, bias, self.stride)?;
        self.project.forward_with(&seen, Around { added: self.residual.then_some(x), ..Around::default() })
    }
}

fn relu6(layer: &Linear, x: &Tensor) -> Result<Tensor> {
    layer.forward_with(x, Around { activation: Some(Activation::Relu6), ..Around::default() })
}

/// What a batch norm multiplies each channel by, and adds to it.
fn folded(vb: &VarBuilder<'_>, channels: usize) -> Result<(Tensor, Tensor)> {
    let get = |name: &str, init| vb.get_with_hints(channels, name, Init::Const(init));
    let factor = (get("weight", 1.0)? / (get("running_var", 1.0)? + EPS)?.sqrt()?)?;
    let bias = (get("bias", 0.0)? - (get("running_mean", 0.0)? * &factor)?)?;
    Ok((factor, bias))
}

/// A convolution with its batch norm, as a dense layer over the channels of its window.
fn dense(
    vb: &VarBuilder<'_>,
    (convolution, norm): (&str, &str),
    (inputs, outputs, window): (usize, usize, usize),
) -> Result<Linear> {
    let kernel = vb.pp(convolution).get_with_hints((outputs, inputs, window, window), "weight", INIT_WEIGHT)?;
    let (factor, bias) = folded(&vb.pp(norm), outputs)?;
    // Channels last, as what lies in the window does.
    let kernel = kernel.permute((0, 2, 3, 1))?.reshape((outputs, window * window * inputs))?;
    let mut layer = Linear::new(kernel.broadcast_mul(&factor.unsqueeze(1)?)?, bias)?;
    if matches!(vb.device(), Device::Cpu) {
        layer.pack(Precision::F32)?;
    }
    Ok(layer)
}

/// The tensors of a trunk under their names in a checkpoint, from weights that timm names, or `efficientnet_lite_pytorch`; its classifier is left out.
///
/// # Errors
/// The names of two tensors that mean the same, tensors that are missing or misshapen, or a file that became unreadable.
pub(crate) fn pretrained(kind: TrunkKind, weights: Weights, device: &Device) -> crate::Result<BTreeMap<String, Tensor>> {
    let weights = weights.rename(|name| Some(translate(kind, name)))?;
    let wanted = asked_for(u64::MAX, |vb| Ok(Trunk::load(kind, &vb)?))?.list;
    let problem = |Parameter { name, shape, .. }: &Parameter| match weights.get(name) {
        None => Some(TensorProblem::Missing { name: name.clone(), expected: shape.clone() }),
        Some(stored) if stored.shape() != shape => {
            Some(TensorProblem::Shape { name: name.clone(), expected: shape.clone(), found: stored.shape().to_vec() })
        }
        Some(_) => None,
    };
    let problems: Vec<TensorProblem> = wanted.iter().filter_map(problem).collect();
    if !problems.is_empty() {
        return Err(ModelError::Tensors { path: weights.path().to_owned(), problems: TensorProblems(problems) });
    }
    let read =
        |Parameter { name, .. }: &Parameter| Ok((format!("{TRUNK}{name}"), weights.read(name, device)?.to_dtype(DType::F32)?));
    wanted.iter().map(read).collect()
}

/// timm's name of a tensor that has this name in `efficientnet_lite_pytorch`; any other name as it is.
pub(crate) fn translate(kind: TrunkKind, name: &str) -> String {
    let parts: Vec<&str> = name.split('.').collect();
    let (module, rest) = match parts[..] {
        ["_conv_stem", rest] => ("conv_stem".to_owned(), rest),
        ["_bn0", rest] => ("bn1".to_owned(), rest),
        ["_conv_head", rest] => ("conv_head".to_owned(), rest),
        ["_bn1", rest] => ("bn2".to_owned(), rest),
        ["_blocks", number, module, rest] => {
            let Some(((stage, block), expands)) = number.parse().ok().and_then(|number| place(kind, number)) else {
                return name.to_owned();
            };
            let module = match (module, expands) {
                ("_depthwise_conv", _) => "conv_dw",
                ("_expand_conv", _) | ("_project_conv", false) => "conv_pw",
                ("_project_conv", true) => "conv_pwl",
                ("_bn0", _) | ("_bn1", false) => "bn1",
                ("_bn1", true) | ("_bn2", false) => "bn2",
                ("_bn2", true) => "bn3",
                _ => return name.to_owned(),
            };
            (format!("blocks.{stage}.{block}.{module}"), rest)
        }
        _ => return name.to_owned(),
    };
    format!("{module}.{rest}")
}

/// Stage and number within it of a block that is numbered through, and whether it expands.
fn place(kind: TrunkKind, number: usize) -> Option<((usize, usize), bool)> {
    let mut first = 0;
    for (stage, (expansion, _, blocks, ..)) in kind.stages().into_iter().enumerate() {
        if number < first + blocks {
            return Some(((stage, number - first), expansion > 1));
        }
        first += blocks;
    }
    None
}
