//! The configuration of a MED, read from and written to the `config.json` of Hugging Face's `BlipConfig`.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::{ModelError, Result};
use crate::files::read_text;
use crate::ops::Activation;
use crate::trunk::TrunkKind;

/// No width, side or vocabulary is larger, so that sizes of tensors can be reckoned with.
pub(crate) const MAX_SIZE: usize = 1 << 24;
/// No transformer is deeper.
pub(crate) const MAX_LAYERS: usize = 1 << 10;

/// The vision transformer (`vision_config`); missing keys take the defaults of `BlipVisionConfig`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct VisionConfig {
    /// Width of the hidden states.
    pub hidden_size: usize,
    /// Width inside the MLP.
    pub intermediate_size: usize,
    /// Number of transformer blocks.
    pub num_hidden_layers: usize,
    /// Number of attention heads; divides `hidden_size`.
    pub num_attention_heads: usize,
    /// Side of the square input image in pixels.
    pub image_size: usize,
    /// Side of a patch in pixels; divides `image_size` in a MED, in a CLIP the rest is left out.
    pub patch_size: usize,
    /// Activation of the MLP.
    pub hidden_act: Activation,
    /// Epsilon of every layer norm.
    pub layer_norm_eps: f64,
    /// A frozen network whose feature map stands in the place of the patches. Not a field of `BlipConfig`: transformers has no such model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trunk: Option<TrunkKind>,
}

impl Default for VisionConfig {
    fn default() -> Self {
        Self {
            hidden_size: 768,
            intermediate_size: 3072,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            image_size: 384,
            patch_size: 16,
            hidden_act: Activation::Gelu,
            layer_norm_eps: 1e-5,
            trunk: None,
        }
    }
}

impl VisionConfig {
    /// Number of whole patches.
    #[must_use]
    pub fn num_patches(&self) -> usize {
        let grid = self.image_size / self.patch_size;
        grid * grid
    }
}

/// The text transformer in all its modes (`text_config` of `BlipConfig`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct TextConfig {
    /// Number of rows of the word embedding.
    pub vocab_size: usize,
    /// Width of the hidden states.
    pub hidden_size: usize,
    /// Width of the states that cross-attention reads: the vision width, or that of the question in the decoder that answers it.
    pub encoder_hidden_size: usize,
    /// Width inside the feed-forward part.
    pub intermediate_size: usize,
    /// Number of transformer blocks.
    pub num_hidden_layers: usize,
    /// Number of attention heads; divides `hidden_size`.
    pub num_attention_heads: usize,
    /// Longest text in tokens.
    pub max_position_embeddings: usize,
    /// Activation; always [`Activation::Gelu`].
    pub hidden_act: Activation,
    /// Epsilon of every layer norm.
    pub layer_norm_eps: f64,
    /// Token `[DEC]`, which starts every generated text.
    pub bos_token_id: u32,
    /// Padding token.
    pub pad_token_id: u32,
    /// Token `[SEP]`, which ends every text and stops generation.
    pub sep_token_id: u32,
    /// Token `[ENC]`, which opens a text for the image-grounded encoder. Not a field of `BlipConfig`: where it is absent,
    /// the tokenizer is asked and then BLIP's convention (the id after `[DEC]`) holds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub enc_token_id: Option<u32>,
    /// Always true: the blocks have cross-attention.
    pub is_decoder: bool,
}

impl Default for TextConfig {
    fn default() -> Self {
        Self {
            vocab_size: 30_524,
            hidden_size: 768,
            encoder_hidden_size: 768,
            intermediate_size: 3072,
            num_hidden_layers: 12,
            num_attention_heads: 8,
            max_position_embeddings: 512,
            hidden_act: Activation::Gelu,
            layer_norm_eps: 1e-12,
            bos_token_id: 30_522,
            pad_token_id: 0,
            sep_token_id: 102,
            enc_token_id: None,
            is_decoder: true,
        }
    }
}

/// A whole MED: `config.json` of `BlipForConditionalGeneration` and `BlipForImageTextRetrieval`.
///
/// Missing keys take the defaults of `BlipConfig` in transformers 5; unknown keys are ignored, as there.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct MedConfig {
    /// Always `blip`.
    pub model_type: String,
    /// The image side.
    pub vision_config: VisionConfig,
    /// The text side.
    pub text_config: TextConfig,
    /// Width of the contrastive (ITC) space.
    pub image_text_hidden_size: usize,
}

impl Default for MedConfig {
    fn default() -> Self {
        Self {
            model_type: "blip".to_owned(),
            vision_config: VisionConfig::default(),
            text_config: TextConfig::default(),
            image_text_hidden_size: 256,
        }
    }
}

impl MedConfig {
    /// Reads and checks `config.json` of a checkpoint directory.
    ///
    /// # Errors
    /// The file cannot be read, does not parse, or describes an impossible model.
    pub fn from_dir(dir: &Path) -> Result<Self> {
        let path = dir.join("config.json");
        let text = read_text(&path)?;
        let config: Self = serde_json::from_str(&text).map_err(|source| ModelError::Json { path, source })?;
        config.checked()
    }

    /// BLIP base at 384 pixels: ViT-B/16 and BERT-base (the public `blip-*-base` checkpoints).
    #[must_use]
    pub fn base() -> Self {
        let mut config = Self::default();
        config.text_config.num_attention_heads = 12;
        config
    }

    /// A MED that trains and runs on two CPU cores: 64 pixels, width 128, for a vocabulary made by
    /// [`crate::tokenizer::train_wordpiece`], whose special tokens have fixed ids.
    #[must_use]
    pub fn tiny(vocab_size: usize) -> Self {
        use crate::special;
        Self {
            vision_config: VisionConfig {
                hidden_size: 128,
                intermediate_size: 512,
                num_hidden_layers: 4,
                num_attention_heads: 4,
                image_size: 64,
                patch_size: 8,
                ..VisionConfig::default()
            },
            text_config: TextConfig {
                vocab_size,
                hidden_size: 128,
                encoder_hidden_size: 128,
                intermediate_size: 512,
                num_hidden_layers: 3,
                num_attention_heads: 4,
                max_position_embeddings: 64,
                bos_token_id: special::DEC_ID,
                pad_token_id: special::PAD_ID,
                sep_token_id: special::SEP_ID,
                enc_token_id: Some(special::ENC_ID),
                ..TextConfig::default()
            },
            image_text_hidden_size: 64,
            ..Self::default()
        }
    }

    /// Checks the sizes against each other and sets the cross-attention width to the vision width, as `BlipConfig` does.
    ///
    /// # Errors
    /// [`ModelError::Config`] names the first value that cannot work.
    pub fn checked(mut self) -> Result<Self> {
        self.text_config.encoder_hidden_size = self.vision_config.hidden_size;
        let (v, t) = (&self.vision_config, &self.text_config);
        let sizes = [
            ("vision_config.hidden_size", v.hidden_size),
            ("vision_config.intermediate_size", v.intermediate_size),
            ("vision_config.num_attention_heads", v.num_attention_heads),
            ("vision_config.image_size", v.image_size),
            ("vision_config.patch_size", v.patch_size),
            ("text_config.vocab_size", t.vocab_size),
            ("text_config.hidden_size", t.hidden_size),
            ("text_config.intermediate_size", t.intermediate_size),
            ("text_config.num_attention_heads", t.num_attention_heads),
            ("text_config.max_position_embeddings", t.max_position_embeddings),
            ("image_text_hidden_size", self.image_text_hidden_size),
        ];
        if let Some((key, value)) = sizes.iter().find(|(_, value)| !(1..=MAX_SIZE).contains(value)) {
            return Err(ModelError::Config(format!("{key} is {value}")));
        }
        let depths =
            [("vision_config.num_hidden_layers", v.num_hidden_layers), ("text_config.num_hidden_layers", t.num_hidden_layers)];
        if let Some((key, value)) = depths.iter().find(|(_, value)| *value > MAX_LAYERS) {
            return Err(ModelError::Config(format!("{key} is {value}")));
        }
        let divides = [
            ("vision_config.num_attention_heads", v.num_attention_heads, "vision_config.hidden_size", v.hidden_size),
            ("vision_config.patch_size", v.patch_size, "vision_config.image_size", v.image_size),
            ("text_config.num_attention_heads", t.num_attention_heads, "text_config.hidden_size", t.hidden_size),
        ];
        for (part, divisor, whole, value) in divides {
            if value % divisor != 0 {
                return Err(ModelError::Config(format!("{part} {divisor} does not divide {whole} {value}")));
            }
        }
        if v.trunk.is_some() && v.patch_size != TrunkKind::STRIDE {
            let (size, stride) = (v.patch_size, TrunkKind::STRIDE);
            return Err(ModelError::Config(format!(
                "vision_config.patch_size is {size}, but the trunk makes patches of {stride}"
            )));
        }
        if t.hidden_act != Activation::Gelu {
            return Err(ModelError::Config(format!("text_config.hidden_act is {:?}, BERT has only gelu", t.hidden_act)));
        }
        let ids = [
            ("bos_token_id", Some(t.bos_token_id)),
            ("pad_token_id", Some(t.pad_token_id)),
            ("sep_token_id", Some(t.sep_token_id)),
            ("enc_token_id", t.enc_token_id),
        ];
        for (key, id) in ids {
            if let Some(id) = id
                && id as usize >= t.vocab_size
            {
                return Err(ModelError::Config(format!("text_config.{key} {id} is outside the vocabulary of {}", t.vocab_size)));
            }
        }
        if self.model_type != "blip" {
            return Err(ModelError::Config(format!("model_type is {:?}, expected \"blip\"", self.model_type)));
        }
        if !t.is_decoder {
            return Err(ModelError::Config("text_config.is_decoder is false: a MED needs the cross-attention blocks".to_owned()));
        }
        Ok(self)
    }
}
