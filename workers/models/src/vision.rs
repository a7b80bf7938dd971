//! The vision transformer of BLIP (pre-norm, with a class token), `vision_model.*` in the weight file.

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;

use crate::config::VisionConfig;
use crate::layers::{INIT_WEIGHT, LayerNorm, Linear};
use crate::ops::{Precision, attention_packed, packed_self_attention};

/// Turns pixels into image states.
#[derive(Debug, Clone)]
pub struct VisionModel {
    config: VisionConfig,
    patch: Linear,
    class: Tensor,
    positions: Tensor,
    blocks: Vec<Block>,
    post_layernorm: LayerNorm,
}

#[derive(Debug, Clone)]
struct Block {
    heads: usize,
    scale: f64,
    layer_norm1: LayerNorm,
    qkv: Linear,
    projection: Linear,
    layer_norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
    /// Of the products in attention, once packed.
    precision: Option<Precision>,
}

impl VisionModel {
    /// Reads the weights below `vision_model`.
    ///
    /// # Errors
    /// A tensor is missing or misshapen.
    #[expect(clippy::needless_pass_by_value, reason = "a builder is a cheap handle, passed by value as in candle-nn")]
    pub fn load(config: &VisionConfig, vb: VarBuilder<'_>) -> Result<Self> {
        let (d, p) = (config.hidden_size, config.patch_size);
        let embeddings = vb.pp("embeddings");
        // A convolution whose stride is its kernel is a matrix product over flattened patches.
        let kernel = embeddings.get_with_hints((d, 3, p, p), "patch_embedding.weight", INIT_WEIGHT)?.reshape((d, 3 * p * p))?;
        let bias = embeddings.get(d, "patch_embedding.bias")?;
        let layers = vb.pp("encoder.layers");
        Ok(Self {
            patch: Linear::new(kernel, bias)?,
            class: embeddings.get_with_hints((1, 1, d), "class_embedding", INIT_WEIGHT)?,
            positions: embeddings.get_with_hints((1, config.num_positions(), d), "position_embedding", INIT_WEIGHT)?,
            blocks: (0..config.num_hidden_layers).map(|i| Block::load(config, layers.pp(i))).collect::<Result<_>>()?,
            post_layernorm: LayerNorm::load(d, config.layer_norm_eps, vb.pp("post_layernorm"))?,
            config: config.clone(),
        })
    }

    /// See [`Med::pack`](crate::med::Med::pack).
    pub(crate) fn pack(&mut self, precision: Precision) -> Result<()> {
        self.patch.pack(precision)?;
        self.blocks.iter_mut().try_for_each(|block| block.pack(precision))
    }

    /// Normalised pixels `(b, 3, s, s)` to image states `(b, 1 + patches, d)`, class token first, patches row by row.
    ///
    /// # Errors
    /// The images are not `image_size` square.
    pub fn forward(&self, pixels: &Tensor) -> Result<Tensor> {
        let patches = self.patch.forward(&self.patches(pixels)?)?;
        let b = patches.dim(0)?;
        let class = self.class.broadcast_as((b, 1, self.config.hidden_size))?;
        let mut x = Tensor::cat(&[&class, &patches], 1)?.broadcast_add(&self.positions)?;
        for block in &self.blocks {
            x = block.forward(&x)?;
        }
        self.post_layernorm.forward(&x)
    }

    /// `(b, 3, s, s)` to `(b, patches, 3·p·p)`.
    fn patches(&self, pixels: &Tensor) -> Result<Tensor> {
        let (s, p) = (self.config.image_size, self.config.patch_size);
        let (b, channels, height, width) = pixels.dims4()?;
        if (channels, height, width) != (3, s, s) {
            candle_core::bail!("the model takes images of shape [3, {s}, {s}], got [{channels}, {height}, {width}]");
        }
        let grid = s / p;
        pixels.reshape(&[b, 3, grid, p, grid, p])?.permute([0, 2, 4, 1, 3, 5])?.reshape((b, grid * grid, 3 * p * p))
    }
}

impl Block {
    #[expect(clippy::needless_pass_by_value, reason = "a builder is a cheap handle, passed by value as in candle-nn")]
    fn load(config: &VisionConfig, vb: VarBuilder<'_>) -> Result<Self> {
        let (d, eps) = (config.hidden_size, config.layer_norm_eps);
        Ok(Self {
            heads: config.num_attention_heads,
            scale: ((d / config.num_attention_heads) as f64).powf(-0.5),
            layer_norm1: LayerNorm::load(d, eps, vb.pp("layer_norm1"))?,
            qkv: Linear::load(d, 3 * d, vb.pp("self_attn.qkv"))?,
            projection: Linear::load(d, d, vb.pp("self_attn.projection"))?,
            layer_norm2: LayerNorm::load(d, eps, vb.pp("layer_norm2"))?,
            fc1: Linear::load(d, config.intermediate_size, vb.pp("mlp.fc1"))?,
            fc2: Linear::load(config.intermediate_size, d, vb.pp("mlp.fc2"))?,
            precision: None,
        })
    }

    fn pack(&mut self, precision: Precision) -> Result<()> {
        self.precision = Some(precision);
        [&mut self.qkv, &mut self.projection, &mut self.fc1, &mut self.fc2].into_iter().try_for_each(|layer| layer.pack(precision))
    }

    /// `(b, n, d)` to `(b, n, d)`.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let qkv = self.qkv.forward(&self.layer_norm1.forward(x)?)?;
        let packed = self.precision.map(|precision| packed_self_attention(&qkv, self.heads, self.scale, precision));
        let mixed = match packed.transpose()?.flatten() {
            Some(mixed) => mixed,
            None => attention_packed(&qkv, self.heads, self.scale, None)?,
        };
        let x = self.projection.forward_add(&mixed, x)?;
        let hidden = self.fc1.forward_gelu(&self.layer_norm2.forward(&x)?)?;
        self.fc2.forward_add(&hidden, &x)
    }
}
