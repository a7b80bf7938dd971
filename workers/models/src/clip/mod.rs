//! CLIP (Radford et al. 2021, arXiv 2103.00020) and SigLIP (Zhai et al. 2023, arXiv 2303.15343): images and texts as vectors of one space,
//! in the weight layout of Hugging Face's `CLIPModel` and `SiglipModel`.

mod config;
pub mod openclip;
mod pool;
mod resnet;
mod score;
mod text;
mod tokenizer;

use candle_core::{DType, Device, Tensor};
use candle_nn::{Init, VarBuilder};
use rayon::prelude::*;

pub use config::{ClipConfig, ClipFamily, ClipTextConfig, ClipVision, ResNetConfig};
pub use score::{ClipScorer, clip_score, cosine};
pub use tokenizer::ClipTokenizer;

use crate::error::Result;
use crate::layers::{INIT_WEIGHT, Linear, l2_normalize};
use crate::ops::Precision;
use crate::preprocess::Pixels;
use crate::vision::{VisionFamily, VisionModel};
use pool::PoolingHead;
use resnet::ModifiedResNet;
use text::ClipText;

/// CLIP's own start of the logit scale: ln(1 / 0.07).
const LOGIT_SCALE: f64 = 2.6592;

/// A CLIP with its weights on a device.
#[derive(Debug, Clone)]
pub struct Clip {
    config: ClipConfig,
    device: Device,
    dtype: DType,
    image: ImageSide,
    text: ClipText,
    text_projection: Linear,
    logit_scale: f32,
    logit_bias: f32,
}

/// From pixels to features.
#[derive(Debug, Clone)]
enum ImageSide {
    /// The class token, projected.
    Vit(VisionModel, Linear),
    /// Pooled by attention.
    Siglip(VisionModel, Box<PoolingHead>),
    /// Pooled and projected in one.
    ResNet(Box<ModifiedResNet>),
}

impl Clip {
    /// Builds the model from a source of tensors in Hugging Face's layout. A ResNet, which has none there, has OpenAI's names (`visual.*`).
    ///
    /// # Errors
    /// The config is unusable, or a tensor is missing or misshapen.
    #[expect(clippy::needless_pass_by_value, reason = "a builder is a cheap handle, passed by value as in candle-nn")]
    pub fn load(config: &ClipConfig, vb: VarBuilder<'_>) -> Result<Self> {
        let config = config.clone().checked()?;
        let shared = config.projection_dim;
        let siglip = config.family == ClipFamily::Siglip;
        let vision = vb.pp("vision_model");
        let image = match &config.vision {
            ClipVision::Vit(vit) if siglip => ImageSide::Siglip(
                VisionModel::load(vit, VisionFamily::Siglip, vision.clone())?,
                Box::new(PoolingHead::load(vit, vision.pp("head"))?),
            ),
            ClipVision::Vit(vit) => ImageSide::Vit(
                VisionModel::load(vit, VisionFamily::Clip, vision)?,
                projection(vit.hidden_size, shared, vb.pp("visual_projection"))?,
            ),
            ClipVision::ResNet(resnet) => ImageSide::ResNet(Box::new(ModifiedResNet::load(resnet, shared, vb.pp("visual"))?)),
        };
        let width = config.text.hidden_size;
        let text_model = vb.pp("text_model");
        let text_projection = match siglip {
            true => Linear::load(width, shared, text_model.pp("head"))?,
            false => projection(width, shared, vb.pp("text_projection"))?,
        };
        let scalar = |name: &str, init: f64| -> Result<f32> {
            let vb = vb.to_dtype(DType::F32);
            let value = match siglip {
                true => vb.get_with_hints(1, name, Init::Const(init))?.squeeze(0)?,
                false => vb.get_with_hints((), name, Init::Const(init))?,
            };
            Ok(value.to_scalar()?)
        };
        Ok(Self {
            image,
            text: ClipText::load(&config.text, config.family, text_model)?,
            text_projection,
            logit_scale: scalar("logit_scale", LOGIT_SCALE)?.exp(),
            logit_bias: if siglip { scalar("logit_bias", 0.0)? } else { 0.0 },
            device: vb.device().clone(),
            dtype: vb.dtype(),
            config,
        })
    }

    /// As [`Med::pack`](crate::med::Med::pack); a ResNet's image side stays as it is.
    ///
    /// # Errors
    /// The model is on another device.
    pub fn pack(&mut self, precision: Precision) -> Result<()> {
        match &mut self.image {
            ImageSide::Vit(model, _) => model.pack(precision)?,
            ImageSide::Siglip(model, head) => {
                model.pack(precision)?;
                head.pack(precision)?;
            }
            ImageSide::ResNet(_) => {}
        }
        Ok(self.text.pack(precision)?)
    }

    /// The configuration.
    #[must_use]
    pub fn config(&self) -> &ClipConfig {
        &self.config
    }

    /// The device that holds the weights.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Normalised pixels `(b, 3, s, s)` to features `(b, p)` of length 1.
    ///
    /// # Errors
    /// The images have another size than the config says.
    pub fn image_features(&self, pixels: &Tensor) -> Result<Tensor> {
        let pixels = pixels.to_dtype(self.dtype)?;
        let features = match &self.image {
            ImageSide::Vit(model, projection) => projection.forward(&model.forward_first(&pixels)?)?,
            ImageSide::Siglip(model, head) => head.forward(&model.forward(&pixels)?)?,
            ImageSide::ResNet(model) => model.forward(&pixels)?,
        };
        Ok(l2_normalize(&features)?)
    }

    /// [`Self::image_features`] for prepared images. On a CPU several threads take some images each; features do not depend on the other
    /// images.
    ///
    /// # Errors
    /// There is no image, or one has another size than the config says.
    pub fn encode_images(&self, images: &[Pixels]) -> Result<Tensor> {
        if !self.device.is_cpu() || images.len() < 2 {
            return self.image_features(&Pixels::stack(images, &self.device)?);
        }
        let together = match &self.image {
            ImageSide::Vit(model, _) | ImageSide::Siglip(model, _) => model.images_together(),
            ImageSide::ResNet(_) => 1,
        };
        let together = together.min(images.len().div_ceil(rayon::current_num_threads()));
        let features = images.par_chunks(together).map(|images| self.image_features(&Pixels::stack(images, &self.device)?));
        Ok(Tensor::cat(&features.collect::<Result<Vec<_>>>()?, 0)?)
    }

    /// Features `(b, p)` of length 1 of texts, ids `(b, t)` (u32) with their first and last token.
    ///
    /// CLIP's texts may be padded behind their end with anything below the end's id, or with that id: no state that counts sees it.
    /// SigLIP's are to be padded to the whole context, as it was trained.
    ///
    /// # Errors
    /// A text is longer than the context, or an id is outside the vocabulary.
    pub fn encode_texts(&self, ids: &Tensor) -> Result<Tensor> {
        Ok(l2_normalize(&self.text_projection.forward(&self.text.forward(ids)?)?)?)
    }

    /// Logits `(images, texts)` of features `(images, p)` and `(texts, p)`: cosine times scale, plus SigLIP's bias.
    ///
    /// # Errors
    /// The widths differ.
    pub fn logits(&self, images: &Tensor, texts: &Tensor) -> Result<Tensor> {
        let cosines = images.matmul(&texts.t()?)?;
        Ok(cosines.affine(f64::from(self.logit_scale), f64::from(self.logit_bias))?)
    }

    /// States `(b, n, d)` of the vision transformer after its last layer norm, for comparison with other implementations; nothing for a
    /// ResNet.
    ///
    /// # Errors
    /// The images have another size than the config says.
    pub fn image_states(&self, pixels: &Tensor) -> Result<Option<Tensor>> {
        match &self.image {
            ImageSide::Vit(model, _) | ImageSide::Siglip(model, _) => Ok(Some(model.forward(&pixels.to_dtype(self.dtype)?)?)),
            ImageSide::ResNet(_) => Ok(None),
        }
    }

    /// States `(b, t, d)` of the text transformer after its last layer norm, for comparison with other implementations.
    ///
    /// # Errors
    /// As [`Self::encode_texts`].
    pub fn text_states(&self, ids: &Tensor) -> Result<Tensor> {
        Ok(self.text.states(ids)?)
    }
}

/// A dense layer without a bias.
#[expect(clippy::needless_pass_by_value, reason = "a builder is a cheap handle, passed by value as in candle-nn")]
fn projection(inputs: usize, outputs: usize, vb: VarBuilder<'_>) -> Result<Linear> {
    let weight = vb.get_with_hints((outputs, inputs), "weight", INIT_WEIGHT)?;
    Ok(Linear::new(weight, Tensor::zeros(outputs, vb.dtype(), vb.device())?)?)
}
