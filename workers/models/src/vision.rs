//! The vision transformer (pre-norm, Dosovitskiy et al. 2021, arXiv 2010.11929) as BLIP, CLIP and SigLIP have it: `vision_model.*` in
//! the weight file.

use candle_core::{DType, Result, Tensor};
use candle_nn::VarBuilder;

use crate::block::{Block, BlockConfig, load_blocks};
use crate::config::VisionConfig;
use crate::layers::{INIT_WEIGHT, LayerNorm, Linear};
use crate::ops::Precision;
use crate::trunk::{Trunk, TrunkKind};

/// Whose vision transformer it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum VisionFamily {
    /// A class token, one weight for queries, keys and values.
    Blip,
    /// A class token, no bias of the patches, a layer norm before the first block.
    Clip,
    /// No class token.
    Siglip,
}

/// Turns pixels into image states.
#[derive(Debug, Clone)]
pub(crate) struct VisionModel {
    config: VisionConfig,
    trunk: Option<Trunk>,
    patch: Linear,
    class: Option<Tensor>,
    positions: Tensor,
    pre_layernorm: Option<LayerNorm>,
    blocks: Vec<Block>,
    post_layernorm: LayerNorm,
}

impl VisionModel {
    /// Reads the weights below `vision_model`.
    ///
    /// # Errors
    /// A tensor is missing or misshapen.
    #[expect(clippy::needless_pass_by_value, reason = "a builder is a cheap handle, passed by value as in candle-nn")]
    pub(crate) fn load(config: &VisionConfig, family: VisionFamily, vb: VarBuilder<'_>) -> Result<Self> {
        let (d, p, eps) = (config.hidden_size, config.patch_size, config.layer_norm_eps);
        let patches = config.num_patches();
        let embeddings = vb.pp("embeddings");
        // A convolution whose stride is its kernel is a matrix product over flattened patches.
        let (channels, p) = if config.trunk.is_some() { (TrunkKind::CHANNELS, 1) } else { (3, p) };
        let kernel = embeddings.get_with_hints((d, channels, p, p), "patch_embedding.weight", INIT_WEIGHT)?;
        let kernel = kernel.reshape((d, channels * p * p))?;
        let bias = match family {
            VisionFamily::Clip => Tensor::zeros(d, vb.dtype(), vb.device())?,
            VisionFamily::Blip | VisionFamily::Siglip => embeddings.get(d, "patch_embedding.bias")?,
        };
        let (class, positions) = match family {
            VisionFamily::Blip => (
                Some(embeddings.get_with_hints((1, 1, d), "class_embedding", INIT_WEIGHT)?),
                embeddings.get_with_hints((1, 1 + patches, d), "position_embedding", INIT_WEIGHT)?,
            ),
            VisionFamily::Clip => (
                Some(embeddings.get_with_hints(d, "class_embedding", INIT_WEIGHT)?.reshape((1, 1, d))?),
                embeddings.get_with_hints((1 + patches, d), "position_embedding.weight", INIT_WEIGHT)?,
            ),
            VisionFamily::Siglip => (None, embeddings.get_with_hints((patches, d), "position_embedding.weight", INIT_WEIGHT)?),
        };
        let pre_layernorm = match family {
            // Spelt so in transformers.
            VisionFamily::Clip => Some(LayerNorm::load(d, eps, vb.pp("pre_layrnorm"))?),
            VisionFamily::Blip | VisionFamily::Siglip => None,
        };
        let block = BlockConfig {
            width: d,
            heads: config.num_attention_heads,
            mlp_width: config.intermediate_size,
            activation: config.hidden_act,
            eps,
            fused: family == VisionFamily::Blip,
        };
        Ok(Self {
            trunk: config.trunk.map(|kind| Trunk::load(kind, &vb.pp("trunk"))).transpose()?,
            patch: Linear::new(kernel, bias)?,
            class,
            positions,
            pre_layernorm,
            blocks: load_blocks(&block, config.num_hidden_layers, vb.pp("encoder.layers"))?,
            post_layernorm: LayerNorm::load(d, eps, vb.pp("post_layernorm"))?,
            config: config.clone(),
        })
    }

    /// Images that a CPU thread encodes together: so many that their states have the rows for which products are fast.
    pub(crate) fn images_together(&self) -> usize {
        const ROWS: usize = 512;
        (ROWS / self.config.num_patches()).max(1)
    }

    /// See [`Med::pack`](crate::med::Med::pack).
    pub(crate) fn pack(&mut self, precision: Precision) -> Result<()> {
        self.patch.pack(precision)?;
        self.blocks.iter_mut().try_for_each(|block| block.pack(precision))
    }

    /// Normalised pixels `(b, 3, s, s)` to image states `(b, n, d)` after the last layer norm: the class token first if there is one, then
    /// the patches row by row.
    ///
    /// # Errors
    /// The images are not `image_size` square.
    pub(crate) fn forward(&self, pixels: &Tensor) -> Result<Tensor> {
        self.forward_patches(&self.patches(pixels)?)
    }

    /// [`Self::forward`] from [`Self::patches`].
    ///
    /// # Errors
    /// As [`Self::forward`].
    pub(crate) fn forward_patches(&self, patches: &Tensor) -> Result<Tensor> {
        self.post_layernorm.forward(&self.through(self.embed(patches)?, &self.blocks)?)
    }

    /// The first state of [`Self::forward`], that of the class token: `(b, d)`. The last block leaves the others out.
    ///
    /// # Errors
    /// As [`Self::forward`].
    pub(crate) fn forward_first(&self, pixels: &Tensor) -> Result<Tensor> {
        self.forward_patches_first(&self.patches(pixels)?)
    }

    /// [`Self::forward_first`] from [`Self::patches`].
    ///
    /// # Errors
    /// As [`Self::forward`].
    pub(crate) fn forward_patches_first(&self, patches: &Tensor) -> Result<Tensor> {
        let x = self.embed(patches)?;
        let first = match self.blocks.split_last() {
            Some((last, blocks)) => last.forward_first(&self.through(x, blocks)?)?,
            None => x.narrow(1, 0, 1)?.contiguous()?,
        };
        self.post_layernorm.forward(&first)?.squeeze(1)
    }

    /// Patches to what goes into the first block.
    fn embed(&self, patches: &Tensor) -> Result<Tensor> {
        let patches = self.patch.forward(&patches.to_dtype(self.positions.dtype())?)?;
        let b = patches.dim(0)?;
        let states = match &self.class {
            Some(class) => Tensor::cat(&[&class.broadcast_as((b, 1, self.config.hidden_size))?, &patches], 1)?,
            None => patches,
        };
        let x = states.broadcast_add(&self.positions)?;
        self.pre_layernorm.as_ref().map_or(Ok(x.clone()), |norm| norm.forward(&x))
    }

    fn through(&self, x: Tensor, blocks: &[Block]) -> Result<Tensor> {
        blocks.iter().try_fold(x, |x, block| block.forward(&x, None))
    }

    /// Normalised pixels `(b, 3, s, s)` to what the transformer sees of them: `(b, patches, 3·p·p)`, or what the trunk makes of them,
    /// `(b, patches, 1280)`. Pixels to the right and below of the last whole patch are left out, as a convolution does.
    ///
    /// # Errors
    /// The images are not `image_size` square.
    pub(crate) fn patches(&self, pixels: &Tensor) -> Result<Tensor> {
        let (s, p) = (self.config.image_size, self.config.patch_size);
        let (b, channels, height, width) = pixels.dims4()?;
        if (channels, height, width) != (3, s, s) {
            candle_core::bail!("the model takes images of shape [3, {s}, {s}], got [{channels}, {height}, {width}]");
        }
        if let Some(trunk) = &self.trunk {
            return trunk.forward(&pixels.to_dtype(DType::F32)?);
        }
        let grid = s / p;
        let pixels = pixels.narrow(2, 0, grid * p)?.narrow(3, 0, grid * p)?;
        pixels.reshape(&[b, 3, grid, p, grid, p])?.permute([0, 2, 4, 1, 3, 5])?.reshape((b, grid * grid, 3 * p * p))
    }
}
